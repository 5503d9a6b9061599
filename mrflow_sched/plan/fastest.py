"""Which stages are fastest for a model at a size, by counting or from one measured run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.cost import Speeds, part_costs
from mrflow_sched.plan.families import Family
from mrflow_sched.plan.make import make_native_plan, make_plan
from mrflow_sched.plan.stages import StagedPlan

__all__ = ["Fastest", "fastest_plan"]

_STAGES, _FACTORS = (2, 3, 4), (1.5, 2.0)
_LARGEST_FIRST = 1.15
"""Stage 1 has at most this many times the model's native area, as where stages are chosen (`sizes.chosen_sizes`)."""


@dataclass(frozen=True, slots=True)
class Fastest:
    """The fastest way to make an image of one size.

    Attributes:
        plan: The staged plan that costs least.
        cost: What all its parts cost: seconds, or FLOP where no machine was measured.
        usual: The plan that `make_plan` chooses by itself, which looks at what the model knows, not at cost alone.
        usual_cost: What that one costs.
        native: What native sampling and decoding cost, in the same unit.
        tried: How many plans were compared.
    """

    plan: StagedPlan
    cost: float
    usual: StagedPlan
    usual_cost: float
    native: float
    tried: int

    @property
    def ratio(self) -> float:
        """Cost of native sampling over that of the plan."""
        return self.native / self.cost


def fastest_plan(
    family: Family,
    width: int,
    height: int,
    *,
    preset: str | None = None,
    guidance: float | None = None,
    speeds: Speeds | None = None,
) -> Fastest:
    """Compare two to four stages of factor 1.5 and 2, and what the plan would choose by itself.

    Plans whose first stage is larger than the model was trained for, or smaller than it knows, are left out, unless
    there is no other.

    Args:
        family: The model's family; its cost must be known.
        width: Of the image in pixels.
        height: Likewise.
        preset: Steps and sigma, as in `make_plan`.
        guidance: Likewise.
        speeds: What one measured run showed; None: FLOP are compared.

    Returns:
        The fastest of them.

    Raises:
        MrFlowError: The size or the preset makes no plan, or the family's cost is unknown.
    """
    plans = list(_candidates(family, width, height, preset, guidance))
    fitting = [plan for plan in plans if _fits(family, plan)] or plans[:1]
    best = min(fitting, key=lambda plan: _cost(plan, family, speeds))
    native = make_native_plan(family, width, height, guidance=guidance)
    cost, usual, whole = (_cost(plan, family, speeds) for plan in (best, plans[0], native))
    return Fastest(best, cost, plans[0], usual, whole, len(fitting))


def _candidates(
    family: Family, width: int, height: int, preset: str | None, guidance: float | None
) -> Iterator[StagedPlan]:
    """The plan as it is by default, which may refuse, then the others that can be made."""
    yield make_plan(family, width, height, preset, guidance=guidance)
    for stages in _STAGES:
        for factor in _FACTORS:
            options: dict[str, Any] = {"stages": stages, "factor": factor, "guidance": guidance}
            try:
                yield make_plan(family, width, height, preset, **options)
            except MrFlowError:  # a stage would be too small, or the preset counts other stages
                continue


def _fits(family: Family, plan: StagedPlan) -> bool:
    first = plan.stages[0]
    area = first.width * first.height
    least = family.min_low_side**2 * 0.99
    return least <= area <= _LARGEST_FIRST * math.prod(family.native_size)


def _cost(plan: StagedPlan, family: Family, speeds: Speeds | None) -> float:
    if speeds is not None:
        return sum(seconds for _, seconds in speeds.predict(plan, family))
    parts = part_costs(plan, family)
    if parts is None:
        raise MrFlowError(f"the cost of family {family.name} is unknown; choose one of `mrflow families`.")
    return sum(part.flop for part in parts)
