"""`mrflow plan`: the numbers of a run, without running it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched.apps.cli.console import Outcome, counted
from mrflow_sched.apps.cli.inputs import read_small
from mrflow_sched.apps.cli.options import Commands, PlanChoices, common_options, plan_options
from mrflow_sched.plan.cost import Speeds, part_costs, peak_memory, work_ratio
from mrflow_sched.plan.families import FAMILIES
from mrflow_sched.plan.stages import StagedPlan


@dataclass(frozen=True)
class PlanRequest:
    """A plan to show.

    Attributes:
        family: Name of the model family.
        choices: Options of the plan.
        timings: A file that holds what `mrflow compare --json` printed, to predict the run time from; or None.
    """

    family: str
    choices: PlanChoices
    timings: Path | None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> PlanRequest:
        """Make the request from parsed arguments.

        Args:
            args: What the parser of `add_parser` returned.

        Returns:
            The request.
        """
        return cls(args.family, PlanChoices.from_args(args), args.timings)


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
    seconds = None if request.timings is None else _predicted(plan, request.timings)
    more = {} if seconds is None else {"seconds": [{"name": name, "seconds": value} for name, value in seconds]}
    value = {**plan.to_dict(), "work_ratio": work_ratio(plan), "work": _work(plan), **more}
    return Outcome(value, tuple(_lines(plan, seconds)))


def _work(plan: StagedPlan) -> list[dict[str, Any]]:
    return [{"name": part.name, "calls": part.calls, "flop": part.flop} for part in part_costs(plan) or ()]


def _predicted(plan: StagedPlan, path: Path) -> tuple[tuple[str, float], ...]:
    """Predict (part, seconds) of `plan` on the machine that `mrflow compare --json` was run on."""
    wanted = "what `mrflow compare --json` printed"
    data = read_small(path, "--timings", wanted)
    try:
        found = json.loads(data)
        measured = StagedPlan.from_string(found["plan"])
        seconds = {str(part["name"]): part["seconds"] for part in found["stages"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MrFlowError(
            f"--timings is {str(path)!r}, which cannot be read ({first_line(error)}); give {wanted}."
        ) from error
    if measured.family != plan.family:
        raise MrFlowError(
            f"--timings is {str(path)!r}, which is of family {measured.family}, not {plan.family}; compare this model."
        )
    try:
        return Speeds.measured(measured, seconds).predict(plan)
    except MrFlowError as error:
        raise MrFlowError(f"--timings is {str(path)!r}, which does not fit: {error}") from error


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"


def _tera(flop: float) -> str:
    return f"{flop / 1e12:.3g}"


def _lines(plan: StagedPlan, seconds: Sequence[tuple[str, float]] | None = None) -> Iterator[str]:
    size, forwards = f"{plan.width}x{plan.height}", counted(plan.forwards, "forward")
    yield f"{plan.family} {plan.preset}: {size}, {forwards}, seed {plan.seed}"
    yield from _cost_lines(plan)
    if seconds is not None:
        share = ", ".join(f"{name} {value:.2f}" for name, value in seconds)
        yield f"predicted run time: {sum(value for _, value in seconds):.2f} s ({share})"
    for number, stage in enumerate(plan.stages, 1):
        shift = "no shift" if stage.mu is None else f"mu {stage.mu:.4g}"
        yield (
            f"stage {number}: {stage.width}x{stage.height}, {counted(stage.tokens, 'token')}, {shift}, {stage.solver}, "
            f"guidance {stage.guidance:g}, {counted(stage.forwards, 'forward')}"
        )
        yield "  sigmas " + (" ".join(f"{sigma:.5g}" for sigma in stage.sigmas) or "none: the upscaled image is kept")
    for note in plan.notes:
        yield f"note: {note}"
    yield f"plan: {plan.to_string()}"


def _cost_lines(plan: StagedPlan) -> Iterator[str]:
    """Yield what the run costs: the network alone, all parts, peak memory."""
    native = counted(plan.native_steps, "native step")
    if len(plan.stages) > 1:
        yield f"network cost: {_compared(plan.cost_ratio)} than {native}"
    parts, peak = part_costs(plan), peak_memory(plan)
    if parts is not None:
        share = ", ".join(f"{part.name} {_tera(part.flop)}" for part in parts)
        has_vae = any(part.name.endswith("decode") for part in parts)
        what = "with VAE and upscaler" if has_vae else "with upscaler; the VAE was not counted"
        whole = f"total cost ({what}): {_tera(sum(part.flop for part in parts))} TFLOP per image ({share})"
        yield whole if len(plan.stages) == 1 else f"{whole}, {_compared(work_ratio(plan))} than {native}"
    if peak is not None and peak.counted:
        yield (
            f"memory in 16 bits: about {_size(peak.total)} at the peak, which is {peak.name}; "
            f"{_size(peak.weights)} of it are weights"
        )


def _compared(ratio: float) -> str:
    """Write the ratio of another cost to ours as "2.00x less" or "2.00x more"."""
    return f"{ratio:.2f}x less" if ratio >= 1 else f"{1 / ratio:.2f}x more"
