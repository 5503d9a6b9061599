"""`mrflow plan`: the numbers of a run, without running it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrflow_sched.apps.cli.console import Outcome
from mrflow_sched.apps.cli.options import Commands, PlanChoices, add_memory, common_options, plan_options
from mrflow_sched.apps.cli.timings import measured_speeds
from mrflow_sched.apps.plan_lines import plan_lines
from mrflow_sched.plan.card import fit_card
from mrflow_sched.plan.cost import part_costs, work_ratio
from mrflow_sched.plan.families import FAMILIES
from mrflow_sched.plan.stages import StagedPlan


@dataclass(frozen=True)
class PlanRequest:
    """A plan to show.

    Attributes:
        family: Name of the model family.
        choices: Options of the plan.
        timings: A file that holds what `mrflow compare --json` printed, to predict the run time from; or None.
        memory: Of a card in GiB, for which offload and tiles are chosen; None: neither is.
    """

    family: str
    choices: PlanChoices
    timings: Path | None
    memory: float | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> PlanRequest:
        """Make the request from parsed arguments.

        Args:
            args: What the parser of `add_parser` returned.

        Returns:
            The request.
        """
        return cls(args.family, PlanChoices.from_args(args), args.timings, args.memory)


def add_parser(commands: Commands) -> None:
    """Add `mrflow plan`.

    Args:
        commands: Where the parser is added.
    """
    parser = commands.add_parser(
        "plan", parents=[plan_options(), common_options()], allow_abbrev=False, help="show the numbers of a run"
    )
    parser.add_argument("--family", required=True, metavar="NAME", help=", ".join(FAMILIES))
    parser.add_argument(
        "--timings",
        type=Path,
        metavar="FILE",
        help="predict the run time from what `mrflow compare --json` printed on this machine",
    )
    add_memory(parser)
    parser.set_defaults(from_args=PlanRequest.from_args, run=run)


def run(request: PlanRequest) -> Outcome:
    """Make the plan.

    Args:
        request: The plan to show.

    Returns:
        The plan and what it costs.

    Raises:
        MrFlowError: The options make no plan, or the file of --timings cannot be used.
    """
    plan = request.choices.make_plan(request.family)
    fitted = None if request.memory is None else fit_card(plan, request.memory, name="--memory")
    plan = plan if fitted is None else fitted.plan
    seconds = None if request.timings is None else measured_speeds(plan.family, request.timings).predict(plan)
    more: dict[str, Any] = (
        {} if seconds is None else {"seconds": [{"name": name, "seconds": value} for name, value in seconds]}
    )
    if fitted is not None:
        more["memory"] = fitted.to_dict()
    value = {**plan.to_dict(), "work_ratio": work_ratio(plan), "work": _work(plan), **more}
    return Outcome(value, (*plan_lines(plan, seconds), *([] if fitted is None else [fitted.sentence])))


def _work(plan: StagedPlan) -> list[dict[str, Any]]:
    return [{"name": part.name, "calls": part.calls, "flop": part.flop} for part in part_costs(plan) or ()]
