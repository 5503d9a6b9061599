"""`mrflow sizes`: what each size costs a model, which stages are fastest there, and which cards hold it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrflow_sched.apps.cli.console import Outcome
from mrflow_sched.apps.cli.options import Commands, common_options
from mrflow_sched.apps.cli.parsing import size_option
from mrflow_sched.apps.cli.timings import measured_speeds
from mrflow_sched.apps.plan_lines import counted
from mrflow_sched.plan.card import Fitted, fit_card
from mrflow_sched.plan.families import FAMILIES, Family, get_family
from mrflow_sched.plan.fastest import Fastest, fastest_plan
from mrflow_sched.plan.stages import StagedPlan

CARDS = (8, 12, 16, 24)
"""Memory in GB of the cards that are shown."""
SIZES = ((1024, 1024), (1440, 1440), (2048, 2048), (2880, 2880))
"""About one, two, four and eight megapixels."""
_SMALL = 500
"""A model made for images below this side has sizes of its own."""


@dataclass(frozen=True)
class SizesRequest:
    """Sizes to compare.

    Attributes:
        family: Name of the model's family.
        sizes: (width, height) of each; empty: 1, 2, 4 and 8 megapixels, or as many times the own size of a small model.
        preset: Of the staged plans; None: the family's default.
        timings: A file that holds what `mrflow compare --json` printed; None: FLOP are counted.
    """

    family: str
    sizes: tuple[tuple[int, int], ...]
    preset: str | None
    timings: Path | None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> SizesRequest:
        """Make the request from parsed arguments.

        Args:
            args: What the parser of `add_parser` returned.

        Returns:
            The request.
        """
        return cls(args.family, tuple(args.sizes or ()), args.preset, args.timings)


def add_parser(commands: Commands) -> None:
    """Add `mrflow sizes`.

    Args:
        commands: Where the parser is added.
    """
    parser = commands.add_parser(
        "sizes",
        parents=[common_options()],
        allow_abbrev=False,
        help="show where staged sampling pays, and which cards hold it",
    )
    parser.add_argument("--family", required=True, metavar="NAME", help=", ".join(FAMILIES))
    parser.add_argument(
        "--sizes", nargs="+", type=size_option, metavar="WxH", help="sizes to show (default: 1, 2, 4 and 8 megapixels)"
    )
    parser.add_argument("--preset", metavar="NAME", help="steps of the staged runs (default: the family's)")
    parser.add_argument(
        "--timings",
        type=Path,
        metavar="FILE",
        help="predict seconds from what `mrflow compare --json` printed on this machine, in place of counting FLOP",
    )
    parser.set_defaults(from_args=SizesRequest.from_args, run=run)


def run(request: SizesRequest) -> Outcome:
    """Find the fastest stages of each size.

    Args:
        request: What to compare.

    Returns:
        A row for each size.

    Raises:
        MrFlowError: The family, its cost or a size is unknown or out of range, or the file of --timings cannot be used.
    """
    family = get_family(request.family)
    speeds = None if request.timings is None else measured_speeds(family.name, request.timings)
    sizes = request.sizes or _usual_sizes(family)
    found = [fastest_plan(family, width, height, preset=request.preset, speeds=speeds) for width, height in sizes]
    cards = [[fit_card(each.usual, gigabytes, family) for gigabytes in CARDS] for each in found]
    unit = "FLOP" if speeds is None else "seconds"
    rows = [_value(each, fitted, unit) for each, fitted in zip(found, cards, strict=True)]
    lines = tuple(_lines(family, found, cards, unit, request.timings))
    return Outcome({"family": family.name, "unit": unit, "sizes": rows}, lines)


def _usual_sizes(family: Family) -> tuple[tuple[int, int], ...]:
    side = math.sqrt(math.prod(family.native_size))
    if side >= _SMALL:
        return SIZES
    return tuple((round(side * math.sqrt(times)), round(side * math.sqrt(times))) for times in (1, 2, 4, 8))


def _value(found: Fastest, cards: list[Fitted], unit: str) -> dict[str, Any]:
    plans = {"usual": (found.usual, found.usual_cost), "fastest": (found.plan, found.cost)}
    return {
        "width": found.plan.requested_width,
        "height": found.plan.requested_height,
        "unit": unit,
        "native": found.native,
        **{
            name: {
                "cost": cost,
                "ratio": found.native / cost,
                "stages": [{"width": stage.width, "height": stage.height} for stage in plan.stages],
                "plan": plan.to_string(),
            }
            for name, (plan, cost) in plans.items()
        },
        "cards": [fitted.to_dict() for fitted in cards],
    }


def _lines(
    family: Family, found: list[Fastest], cards: list[list[Fitted]], unit: str, timings: Path | None
) -> Iterator[str]:
    """Yield a line for each size, then what each card needs for it."""
    native = counted(family.native_steps, "native step")
    how = "counted in TFLOP" if timings is None else f"seconds predicted from {timings.name}"
    yield f"{family.title}: all parts of a run against {native}, {how}; loading is in neither"
    for each, fitted in zip(found, cards, strict=True):
        plan, same = each.plan, each.plan.stages == each.usual.stages
        faster = each.native / each.usual_cost
        words = f"{faster:.1f}x less" if faster >= 1.05 else "no gain: sample natively"
        costs = f"native {_amount(each.native, unit)}, staged {_amount(each.usual_cost, unit)}, {words}"
        yield f"{plan.requested_width}x{plan.requested_height}: {costs}"
        yield f"  {plan.preset}, {_stages(each.usual)}" + (f", the fastest of {each.tried} plans" if same else "")
        if not same:
            best = f"{_amount(each.cost, unit)}, {each.ratio:.1f}x less"
            yield f"  fastest of {each.tried} plans: {_stages(plan)}, {best}"
        for card in fitted:
            yield f"  {card.gigabytes:g} GB: {_needs(card)}"


def _stages(plan: StagedPlan) -> str:
    return " -> ".join(f"{stage.width}x{stage.height}" for stage in plan.stages)


def _amount(cost: float, unit: str) -> str:
    return f"{cost:.1f} s" if unit == "seconds" else f"{cost / 1e12:.4g}"


def _needs(card: Fitted) -> str:
    """What a card needs, in the words of the command line's options."""
    switched = [] if card.offload is None else [f"--offload {card.offload}"]
    cuts = (("VAE", card.vae_tile), ("upscaler", card.upscaler_tile))
    switched += [f"{name} in tiles of {side}" for name, side in cuts if side is not None]
    switched += [f"--tile {card.plan.tile}"] if card.plan.tile else []
    words = ", ".join(switched) or "everything stays on it"
    return words if card.fits else f"does not fit, even with {words}"
