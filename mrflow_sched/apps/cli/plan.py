"""`mrflow plan`: the numbers of a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched.apps.cli.console import counted, print_json
from mrflow_sched.apps.cli.options import plan_of, with_calibration
from mrflow_sched.plan.cost import Speeds, part_costs, peak_memory, work_ratio
from mrflow_sched.plan.stages import StagedPlan

# --- mrflow plan ------------------------------------------------------------------------------


def run_plan(args: argparse.Namespace) -> int:
    plan = plan_of(args, with_calibration(args, args.family))
    seconds = None if args.timings is None else _predicted(plan, args.timings)
    if args.json:
        more = {} if seconds is None else {"seconds": [{"name": name, "seconds": value} for name, value in seconds]}
        print_json({**plan.to_dict(), "work_ratio": work_ratio(plan), "work": _work(plan), **more})
    else:
        print("\n".join(_plan_lines(plan, seconds)))
    return 0


def _work(plan: StagedPlan) -> list[dict[str, Any]]:
    return [{"name": part.name, "calls": part.calls, "flop": part.flop} for part in part_costs(plan) or ()]


def _predicted(plan: StagedPlan, path: Path) -> tuple[tuple[str, float], ...]:
    """(part, seconds) of `plan` on the machine that `mrflow compare --json` was run on."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        measured = StagedPlan.from_string(found["plan"])
        seconds = {str(part["name"]): float(part["seconds"]) for part in found["stages"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MrFlowError(
            f"--timings {path} cannot be read ({first_line(error)}); give what mrflow compare --json printed."
        ) from error
    if measured.family != plan.family:
        raise MrFlowError(f"--timings {path} is of family {measured.family}, not {plan.family}; compare this model.")
    return Speeds.measured(measured, seconds).predict(plan)


def _tera(flop: float) -> str:
    return f"{flop / 1e12:.3g}"


def _plan_lines(plan: StagedPlan, seconds: Sequence[tuple[str, float]] | None = None) -> Iterator[str]:
    size, forwards = f"{plan.width}x{plan.height}", counted(plan.forwards, "forward")
    yield f"{plan.family} {plan.preset}: {size}, {forwards}, seed {plan.seed}"
    if len(plan.stages) > 1:
        yield f"expected network work: {plan.native_steps} native steps cost {plan.cost_ratio:.2f} times as much"
    parts, peak = part_costs(plan), peak_memory(plan)
    if parts is not None:
        share = ", ".join(f"{part.name} {_tera(part.flop)}" for part in parts)
        has_vae = any(part.name.endswith("decode") for part in parts)
        what = "VAE and upscaler" if has_vae else "upscaler, without the VAE, which was not counted"
        whole = f"work with {what}: {_tera(sum(part.flop for part in parts))} TFLOP a picture ({share})"
        yield whole if len(plan.stages) == 1 else f"{whole}; native {work_ratio(plan):.2f} times as much"
    if peak is not None:
        yield (
            f"memory in 16 bits: about {peak.total / 2**30:.1f} GiB, most of it in {peak.name}, "
            f"{peak.weights / 2**30:.1f} of it weights"
        )
    if seconds is not None:
        share = ", ".join(f"{name} {value:.2f}" for name, value in seconds)
        yield f"expected seconds on the measured machine: {sum(value for _, value in seconds):.2f} ({share})"
    for number, stage in enumerate(plan.stages, 1):
        shift = "no shift" if stage.mu is None else f"mu {stage.mu:.4g}"
        yield (
            f"stage {number}: {stage.width}x{stage.height}, {counted(stage.tokens, 'token')}, {shift}, {stage.solver}, "
            f"guidance {stage.guidance:g}, {counted(stage.forwards, 'forward')}"
        )
        yield "  sigmas " + (" ".join(f"{sigma:.5g}" for sigma in stage.sigmas) or "none: the upscaled picture is kept")
    for note in plan.notes:
        yield f"note: {note}"
    yield f"plan: {plan.to_string()}"
