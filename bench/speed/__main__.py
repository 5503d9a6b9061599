"""Measures how near a staged run comes to the limit by FLOP. Compare only numbers of one run.

    python -m bench.speed --out DIR                  true-size networks with random weights on the GPU, in bfloat16
    python -m bench.speed --small --out DIR          the same on networks of a few channels, on any machine
    python -m bench.speed --demo --out DIR           the embedded model on this machine
    python -m bench.speed --limits                   the limit by FLOP of every family; nothing is run
    python -m bench.speed --scale --demo --out DIR   time and memory against size and batch
    python -m bench.speed --outside --demo           the parts outside the network, and alternatives

Measured, after a warm-up of every way at its own sizes: native sampling, staged presets, the official scripts'
procedure, every part, and peak memory. Beside them: the limit by FLOP (`mrflow_sched.plan.cost`), and the cost model's
prediction from one staged run. `--outside` measures the parts outside the network, and alternatives to each.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.command import results_folder, run_command, to_json
from bench.reference import Tiles
from bench.speed import networks, outside, report
from bench.speed.clock import Clock
from mrflow_sched import demo, load_upscaler, make_native_plan, make_plan
from mrflow_sched._runtime.peak import PeakMemory
from mrflow_sched.engines.diffusers.compiled import COMPILE_MODES, NetworkCompiler
from mrflow_sched.engines.diffusers.folder import load_pipeline
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.measure.compare import shortest
from mrflow_sched.plan.cost import Speeds, part_costs, peak_memory, work_ratio
from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import sample_staged
from mrflow_sched.upscaling.model import ModelUpscaler
from mrflow_sched.upscaling.role import PixelUpscaler

PRESETS = ("20+1", "12+1", "8+1", "6+1")
PREDICTED_FROM = "12+1"
"""The staged run from which the cost model learns the machine's speed."""
REFERENCE = "reference 12+1"
"""The official scripts' choices: Euler, a sampled posterior, upscaling in tiles, 8-bit images in between.
`bench/reference.py` shows that these choices give the reference's images."""


@dataclass(frozen=True)
class Measured:
    """One way on one model: seconds of a whole run (median of the repeats) and of its parts, peak memory in bytes,
    seconds of the fastest repeat, and of the warm-up run, which compiles."""

    seconds: float
    parts: dict[str, float]
    peak: int
    forwards: int
    fastest: float
    first: float


_Run = tuple[float, dict[str, float], int]
"""Seconds of one run, of its parts, and its forwards."""


def _median(runs: Sequence[_Run], peak: int, first: float) -> Measured:
    ranked = sorted(runs, key=lambda run: run[0])
    seconds, parts, forwards = ranked[(len(runs) - 1) // 2]
    return Measured(seconds, parts, peak, forwards, ranked[0][0], first)


class Bench:
    """A model and its upscaler, on which plans are run."""

    def __init__(self, engine: Any, upscaler: Any, prompts: Sequence[str], repeats: int) -> None:
        self.engine, self.upscaler, self.prompts, self.repeats = engine, upscaler, list(prompts), repeats

    @classmethod
    def of(
        cls,
        name: str,
        device: torch.device,
        small: bool,
        repeats: int,
        batch: int = 1,
        compiler: NetworkCompiler | None = None,
    ) -> Bench:
        """A model of family `name` with random weights."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        pipe = networks.build(name, device, dtype, small=small)
        words = networks.embeddings(name, pipe, batch)
        engine = PipelineEngine(pipe, family=name, arguments=words, compiler=compiler)
        with tempfile.TemporaryDirectory() as folder:
            from safetensors.torch import save_file

            path = Path(folder) / "x2.safetensors"
            save_file(networks.make_upscaler(small=small).state_dict(), path)
            return cls(engine, load_upscaler(path, device=device), [""] * batch, repeats)

    @classmethod
    def demo(cls, repeats: int, batch: int = 1, compiler: NetworkCompiler | None = None) -> Bench:
        """The embedded model; with a `compiler`, as a diffusers pipeline."""
        prompt = "a red striped circle and a blue star over green hills under an orange sky, the word FLOW"
        if compiler is None:
            engine: Any = demo.load_engine()
        else:
            pipe = load_pipeline(demo.weights_path())
            pipe.set_progress_bar_config(disable=True)
            engine = PipelineEngine(pipe, family="demo", compiler=compiler)
        return cls(engine, load_upscaler(demo.upscaler_path()), [prompt] * batch, repeats)

    def warm(self, plan: StagedPlan) -> None:
        """One run with one step per stage."""
        self._run(shortest(plan))

    def measure(self, plan: StagedPlan) -> Measured:
        """`plan` run `repeats` times; memory is that of the first run."""
        with PeakMemory(self.engine.device) as peak:
            runs = [self._run(plan)]
        first = runs[0][0]
        return _median([*runs, *(self._run(plan) for _ in range(self.repeats - 1))], peak.bytes, first)

    def measure_in_turn(
        self, plans: Mapping[str, StagedPlan], upscalers: Mapping[str, PixelUpscaler] | None = None
    ) -> dict[str, Measured]:
        """Every plan `repeats` times, one after the other in each round, so that a slow phase of the machine affects
        all. Memory is that of a warm-up run, whose time does not count. `upscalers` holds another upscaler for some
        plans, by name.
        """
        others = upscalers or {}
        firsts: dict[str, tuple[int, float]] = {}
        for name, plan in plans.items():
            with PeakMemory(self.engine.device) as peak:
                seconds, _, _ = self._run(plan, others.get(name))
            firsts[name] = peak.bytes, seconds
        runs: dict[str, list[_Run]] = {name: [] for name in plans}
        for _ in range(self.repeats):
            for name, plan in plans.items():
                runs[name].append(self._run(plan, others.get(name)))
        return {name: _median(made, *firsts[name]) for name, made in runs.items()}

    def _run(self, plan: StagedPlan, upscaler: PixelUpscaler | None = None) -> _Run:
        clock = Clock(self.engine.device)
        done = sample_staged(self.engine, plan, self.prompts, upscaler=upscaler or self.upscaler)
        seconds = clock.stop()
        if not bool(done.images.isfinite().all()):
            raise ValueError(f"{plan.preset} gave NaN or infinity; the random weights are too large.")
        parts: dict[str, float] = {}
        for timing in done.timings:
            parts[timing.name] = parts.get(timing.name, 0.0) + timing.seconds
        return seconds, parts, done.forwards


def compare_ways(
    bench: Bench,
    family: str,
    side: int,
    native_steps: int | None,
    presets: Sequence[str],
    *,
    counted: bool = True,
    predict: bool = True,
) -> dict[str, Any]:
    """Native and staged runs of one model. With `counted` (FLOP of its sizes are known), also the limit of each and,
    with `predict`, the cost model's prediction of each."""
    plans = {preset: _plan(family, side, preset) for preset in presets}
    native = make_native_plan(family, side, side, steps=native_steps)
    tiles: dict[str, PixelUpscaler] = {}
    if PREDICTED_FROM in plans and isinstance(bench.upscaler, ModelUpscaler):
        plans[REFERENCE] = _plan(family, side, PREDICTED_FROM, solver="euler", posterior="sample")
        tiles[REFERENCE] = Tiles(bench.upscaler, rounded=True)
    found_of = bench.measure_in_turn({"native": native, **plans}, tiles)
    base = found_of["native"]
    rows: dict[str, dict[str, Any]] = {"native": {**asdict(base), "steps": native.native_steps}}
    for preset, plan in plans.items():
        found = found_of[preset]
        sampled = sum(seconds for name, seconds in found.parts.items() if name.endswith("sample"))
        rows[preset] = {
            **asdict(found),
            "speedup": base.seconds / found.seconds,
            "overhead": 1 - sampled / found.seconds,
        }
        if counted:
            limit = _limit(plan, native)
            rows[preset] |= {
                "limit": limit,
                "network limit": native.native_forwards / sum(plan.stage_costs()),
                "share of limit": base.seconds / found.seconds / limit,
                "fastest share": base.fastest / found.fastest / limit,
            }
    if counted and predict and PREDICTED_FROM in plans:
        _predict(rows, plans, native, bench)
    memory = peak_memory(plans[presets[0]]) if counted else None
    return {
        "size": side,
        "ways": rows,
        "memory predicted": None if memory is None else {"bytes": memory.total, "part": memory.name},
    }


def _predict(rows: dict[str, Any], plans: dict[str, StagedPlan], native: StagedPlan, bench: Bench) -> None:
    """Add the cost model's prediction of every way, from one staged run."""
    speeds = Speeds.measured(plans[PREDICTED_FROM], rows[PREDICTED_FROM]["parts"], bench.engine.family)
    for name, plan in {"native": native, **plans}.items():
        if name == REFERENCE:
            continue  # upscales more pixels than the plan counts
        told = sum(seconds for _, seconds in speeds.predict(plan, bench.engine.family))
        rows[name]["predicted"] = told
        rows[name]["predicted off by"] = told / rows[name]["seconds"] - 1


def _limit(plan: StagedPlan, native: StagedPlan) -> float:
    """FLOP of the native run over FLOP of the staged one, VAE and upscaler included."""
    parts, whole = part_costs(plan), part_costs(native)
    if parts is None or whole is None:
        return work_ratio(plan)
    return sum(part.flop for part in whole) / sum(part.flop for part in parts)


def _plan(family: str, side: int, preset: str, **more: Any) -> StagedPlan:
    low, high = (int(count) for count in preset.split("+"))
    return make_plan(family, side, side, low_steps=low, refine_steps=high, **more)


def scale(bench: Bench, family: str, sides: Sequence[int], tile: int, start: int) -> list[dict[str, Any]]:
    """Seconds and memory of staged runs by size: two stages, or enough to start at `start` pixels or fewer."""
    rows: list[dict[str, Any]] = []
    own = min(get_family(family).native_size)
    for side in sides:
        stages = 2
        while side / 2 ** (stages - 1) > start:
            stages += 1
        for cut in (0, tile) if side > tile else (0,):
            plan = make_plan(family, side, side, stages=stages, tile=cut)
            if cut == 0 and side > 4 * own:
                continue  # attention over the whole image takes hours
            found = bench.measure(plan)
            told = peak_memory(plan)
            rows.append({"side": side, "stages": stages, "tile": cut, **asdict(found)})
            rows[-1]["memory predicted"] = None if told is None else told.total
            print(f"{side} px, {stages} stages, tile {cut}: {found.seconds:.2f} s", file=sys.stderr, flush=True)
    return rows


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(networks.RECIPES), default=list(networks.RECIPES))
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), metavar="N+1")
    parser.add_argument("--size", type=int, help="final side in pixels (default 1024; 256 with --small or --demo)")
    parser.add_argument("--native-steps", type=int, help="steps of the native run (default: the family's)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way, the median counts (default 3)")
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--small", action="store_true", help="networks of a few channels")
    network.add_argument("--demo", action="store_true", help="the embedded model instead of random networks")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--limits", action="store_true", help="print the limits by FLOP, and run nothing")
    what.add_argument("--scale", action="store_true", help="sizes and batches instead of ways")
    what.add_argument("--outside", action="store_true", help="the parts outside the network instead of ways")
    parser.add_argument("--sides", type=int, nargs="+", help="sides for --scale")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="batches for --scale")
    parser.add_argument(
        "--tile", type=int, help="tile of large refine stages for --scale (default: twice the native side)"
    )
    parser.add_argument("--start", type=int, help="largest side of stage 1 for --scale (default: the native side)")
    parser.add_argument(
        "--compile", choices=COMPILE_MODES, metavar="MODE", help="torch.compile stages of several steps, native too"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=results_folder, help="folder for the results")
    options = parser.parse_args(arguments)
    if options.limits:
        print(report.limits(options.presets), report.large(), sep="\n\n")
        return
    device = torch.device(options.device)
    if device.type == "cpu" and not options.small and not options.demo:
        parser.error("true-size networks need a GPU; add --small or --demo to run here")
    names = ["demo"] if options.demo else options.families
    side = options.size or (256 if options.small or options.demo else 1024)
    record: dict[str, Any] = {
        "device": _device_name(device),
        "torch": torch.__version__,
        "small": options.small,
        "repeats": options.repeats,
        "compile": options.compile,
        "families": {},
    }
    for name in names:

        def made(batch: int = 1, name: str = name) -> Bench:
            compiler = None if options.compile is None else NetworkCompiler(options.compile)
            if name == "demo":
                return Bench.demo(options.repeats, batch, compiler)
            return Bench.of(name, device, options.small, options.repeats, batch, compiler)

        if options.scale:
            own = min(get_family(name).native_size)
            sides = options.sides or [own // 2, own, 2 * own, 4 * own]
            rows = scale(made(), name, sides, options.tile or 2 * own, options.start or own)
            batches = []
            for batch in options.batches:
                bench = made(batch)
                plan = _plan(name, side, PREDICTED_FROM)
                bench.warm(plan)
                batches.append({"batch": batch, **asdict(bench.measure(plan))})
            found: dict[str, Any] = {"sizes": rows, "batches": batches}
        elif options.outside:
            found = {"size": side, "outside": outside.measure(made(), _plan(name, side, PREDICTED_FROM))}
        else:
            found = compare_ways(
                made(),
                name,
                side,
                options.native_steps,
                options.presets,
                counted=not options.small,
                predict=options.compile is None,  # a FLOP costs less in the stages that are compiled
            )
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            found["text"] = outside.encoders(name, device, dtype, options.repeats, small=options.small)
        record["families"][name] = found
        print(report.to_markdown(record), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.out is not None:
        stem = ("scale" if options.scale else "outside" if options.outside else "speed") + (
            "-small" if options.small else "-demo" if options.demo else ""
        )
        stem += "" if options.compile is None else f"-{options.compile}"
        (options.out / f"{stem}.json").write_text(to_json(record))
        (options.out / f"{stem}.md").write_text(report.to_markdown(record) + "\n")
        if not options.outside:
            report.plot(record, options.out / f"{stem}.png")


if __name__ == "__main__":
    run_command(main)
