"""`mrflow compare`: native and staged sampling, measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrflow_sched.images.record import KEY

if TYPE_CHECKING:
    from mrflow_sched.sampler import StagedResult
from mrflow_sched.apps.cli.console import print_json, progress_bar, say, saying_warnings, writable
from mrflow_sched.apps.cli.load import Job, find_upscaler, load_parts, make_record, model_family
from mrflow_sched.apps.cli.options import plan_of, with_calibration

# --- mrflow compare ---------------------------------------------------------------------------


def run_compare(args: argparse.Namespace) -> int:
    solver = {} if args.solver else {"solver": "euler"}
    plan = plan_of(args, with_calibration(args, model_family(args)), **solver)
    from mrflow_sched.measure.compare import compare, native_plan_of

    upscaler_path = find_upscaler(args)
    job = Job(plan, args.prompt, None, 1, (0,))
    with writable(args.out), saying_warnings():
        engine, upscaler = load_parts(args, job, upscaler_path)
        for note in plan.notes:
            say(note)
        record = make_record(args, job, engine, upscaler, upscaler_path)

        def save(result: StagedResult, path: Path) -> None:
            from mrflow_sched.images.files import save_png

            one = replace(record, plan=result.plan.to_string())
            save_png(path, result.images[0], {KEY: one.to_json()})

        with progress_bar(args) as show:
            found = compare(
                engine,
                args.prompt,
                plan,
                args.out,
                native_plan=native_plan_of(plan, args.steps, family=engine.family),
                upscaler=upscaler,
                save=save,
                repeats=args.repeats,
                callback=show,
            )
    for note in dict.fromkeys(found.notes):
        say(note)
    if args.json:
        print_json(found.to_dict())
    else:
        print("\n".join(_compare_lines(found.to_dict())))
    return 0


def _compare_lines(found: dict[str, Any]) -> Iterator[str]:
    native, staged = found["native_seconds"], found["staged_seconds"]
    yield f"native {native:.2f} s, staged {staged:.2f} s: {found['speedup']:.2f} times as fast"
    for name in ("native", "staged"):
        parts = found["stages" if name == "staged" else "native_stages"]
        yield f"{name}: " + ", ".join(f"{part['name']} {part['seconds']:.2f} s" for part in parts)
    yield f"outside the network: {found['overhead_share']:.1%} of the staged time"
    yield f"peak memory: {found['peak_memory_ratio']:.2f} times native"
    yield f"picture: {found['sheet']}"
