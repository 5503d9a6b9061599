"""Measures how accurate each solver is: RMS distance to the converged solution, by solver, step count and guidance.

    python -m bench.solvers --out DIR      random Gaussian-mixture flows (about a minute): solvers.md, solvers.json
    python -m bench.solvers --demo --out DIR   the embedded network, in float32 (some minutes): solvers-demo.*
    python -m bench.solvers --quick        fewer problems and samples, prints only

From Python, `measure` runs on any engine, text and latent shape:

    text = engine.encode_text(prompts)
    measure(Problem("mine", engine, text, (len(prompts), *engine.latent_shape(128, 128)), mu=0.5))

"Converged" is Heun with many steps on the same noise. All solvers here take one evaluation per step, so equal steps
mean equal cost. `best` in the table is the best of Euler, multistep and DPM++ 2M, chosen in hindsight for each problem
and step count; `careful` below 1 is more accurate than that.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import markdown
from bench.command import results_folder, run_command
from mrflow_sched.engines.analytic import MixtureEngine
from mrflow_sched.plan.schedule import native_sigmas
from mrflow_sched.sampling.engine import Engine
from mrflow_sched.sampling.noise import draw_noise, model_sigmas
from mrflow_sched.sampling.solvers import SOLVERS

STEPS = (4, 5, 6, 7, 8, 10, 12, 16, 20, 28)
COMPARED = ("euler", "multistep", "dpmpp_2m", "careful")
ORACLE = ("euler", "multistep", "dpmpp_2m")


@dataclass(frozen=True)
class Problem:
    """Something to sample: an engine, its encoded text for a batch, the latent shape (B, ...), and the shift."""

    name: str
    engine: Engine
    text: Any
    shape: tuple[int, ...]
    mu: float = 0.63


@dataclass(frozen=True)
class Row:
    """One measurement: RMS distance to the converged solution over all values of the batch."""

    problem: str
    guidance: float
    steps: int
    solver: str
    rms: float


def measure(
    problem: Problem,
    *,
    guidance: Sequence[float] = (1.0,),
    steps: Sequence[int] = STEPS,
    solvers: Sequence[str] = COMPARED,
    reference_steps: int = 200,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """All solvers on one problem from the same noise. `reference_steps` Heun steps count as converged."""
    rows: list[Row] = []
    seeds = range(seed, seed + problem.shape[0])
    noise = draw_noise(problem.shape[1:], seeds, device=problem.engine.device, dtype=dtype)

    def run(solver: str, count: int, scale: float) -> torch.Tensor:
        sigmas = model_sigmas(native_sigmas(count, mu=problem.mu), problem.engine.family.prediction)
        extra = {"text": problem.text, "guidance": scale}
        return SOLVERS[solver](problem.engine.denoise, noise * sigmas[0], sigmas, extra)

    with torch.no_grad():
        for scale in guidance:
            truth = run("heun", reference_steps, scale)
            for count in steps:
                for solver in solvers:
                    rms = (run(solver, count, scale) - truth).double().square().mean().sqrt().item()
                    rows.append(Row(problem.name, scale, count, solver, rms))
    return rows


def analytic_problems(first: int, count: int, batch: int) -> list[Problem]:
    """Random 64-dimensional Gaussian-mixture flows: few and many components, near and far, flat and falling spectra."""
    draw = torch.Generator().manual_seed(first)

    def pick(values: Sequence[Any]) -> Any:
        return values[int(torch.randint(len(values), (), generator=draw))]

    problems: list[Problem] = []
    for seed in range(first, first + count):
        settings = {
            "components": pick((8, 16, 40, 100)),
            "labels": pick((2, 4, 8)),
            "spread": pick((0.15, 0.3, 0.6, 1.0)),
            "std": pick((0.1, 0.3, 0.6)),
            "decay": pick((0.0, 0.5, 1.0, 1.5)),
        }
        engine = MixtureEngine.random(seed, **settings)
        name = f"seed {seed}: " + ", ".join(f"{key} {value}" for key, value in settings.items())
        text = engine.encode_text([f"label {i % settings['labels']}" for i in range(batch)])
        problems.append(Problem(name, engine, text, (batch, *engine.shape)))
    return problems


def demo_problem() -> Problem:
    """The embedded network at its low size, in float32 so that rounding does not hide the solvers."""
    from mrflow_sched import demo, make_plan

    engine = demo.load_engine(dtype="float32")
    prompts = demo.example_prompts()[:4]
    stage = make_plan("demo", 256, 256).stages[0]
    shape = (len(prompts), *engine.latent_shape(stage.width, stage.height))
    return Problem("embedded network", engine, engine.encode_text(prompts), shape, stage.mu or 0.0)


def mean_ratios(rows: Iterable[Row], steps: Sequence[int]) -> dict[str, dict[int, float]]:
    """Geometric mean over problems of each solver's distance divided by the best in hindsight, by step count."""
    cells: dict[tuple[str, float, int], dict[str, float]] = {}
    for row in rows:
        cells.setdefault((row.problem, row.guidance, row.steps), {})[row.solver] = row.rms
    ratios: dict[str, dict[int, float]] = {}
    for solver in COMPARED:
        for count in steps:
            logs = [
                math.log(cell[solver] / min(cell[name] for name in ORACLE))
                for (_, _, at), cell in cells.items()
                if at == count
            ]
            ratios.setdefault(solver, {})[count] = math.exp(sum(logs) / len(logs))
    return ratios


def table(title: str, values: Mapping[str, Mapping[int, float]], steps: Sequence[int]) -> str:
    """A markdown table: one line per solver, one column per step count."""
    return markdown.table([title, *steps], [[name, *(f"{row[n]:.3f}" for n in steps)] for name, row in values.items()])


def report(rows: Sequence[Row], guidance: Sequence[float], steps: Sequence[int]) -> str:
    """The result as markdown: ratios to the best in hindsight per guidance, then the distances of the first problem."""
    parts = [
        table(f"ratio to best, guidance {scale:g}", mean_ratios([r for r in rows if r.guidance == scale], steps), steps)
        for scale in guidance
    ]
    first = rows[0].problem
    for scale in guidance:
        plain = {
            solver: {r.steps: r.rms for r in rows if (r.problem, r.guidance, r.solver) == (first, scale, solver)}
            for solver in COMPARED
        }
        parts.append(table(f"RMS, {first}, guidance {scale:g}", plain, steps))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of solvers on Gaussian-mixture flows with exact velocity.")
    parser.add_argument("--out", type=results_folder, help="folder for solvers.json and solvers.md")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the first problem")
    parser.add_argument("--problems", type=int, default=12, help="how many random problems")
    parser.add_argument("--batch", type=int, default=8, help="samples per problem")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    parser.add_argument("--quick", action="store_true", help="4 problems, 4 samples, a short reference")
    parser.add_argument("--demo", action="store_true", help="the embedded network instead of the mixtures")
    args = parser.parse_args()
    rows: list[Row] = []
    if args.demo:
        args.guidance = [1.0, 3.5]
        rows = measure(demo_problem(), guidance=args.guidance, reference_steps=60)
    else:
        problems, batch, converged = (4, 4, 100) if args.quick else (args.problems, args.batch, 200)
        for problem in analytic_problems(args.seed, problems, batch):
            rows += measure(problem, guidance=args.guidance, reference_steps=converged, dtype=torch.float64)
    text = report(rows, args.guidance, STEPS)
    print(text)
    if args.out is not None:
        name = "solvers-demo" if args.demo else "solvers"
        (args.out / f"{name}.md").write_text(text, encoding="utf-8")
        (args.out / f"{name}.json").write_text(json.dumps([vars(row) for row in rows], indent=0), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
