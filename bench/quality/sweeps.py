"""Sweeps: one option of the staged way at a time, everything else as in the family's 12+1. Each answers a question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.quality.cached import cached
from bench.quality.guided import guided
from bench.quality.ways import UPSCALERS, Way, staged


@dataclass(frozen=True)
class Sweep:
    """`ways(size)`, and the question that comparing them answers."""

    question: str
    ways: Callable[[int], list[Way]]


def _each(name: str, values: tuple[object, ...], **fixed: object) -> Callable[[int], list[Way]]:
    def ways(size: int) -> list[Way]:
        return [staged(size, "12+1", f"{name} {value}", **{name: value}, **fixed) for value in values]  # type: ignore[arg-type]

    return ways


def _refine_steps(size: int) -> list[Way]:
    made = [staged(size, "12+1", "refine_steps 0", refine_steps=0), staged(size, "12+1", "refine_steps 1")]
    for steps in (2, 3, 4):
        made += [
            staged(size, "12+1", f"refine_steps {steps} {curve}", refine_steps=steps, refine_curve=curve)
            for curve in ("linear", "shifted")
        ]
    return [*made, staged(size, "12+1", "refine_steps 2, careful", refine_steps=2, solver="careful")]


def _seed_rules(size: int) -> list[Way]:
    return [staged(size, "12+1", f"seed_rule {rule}", seed_rule=rule) for rule in ("offset", "hash")]


def _guidance_interval(size: int) -> list[Way]:
    intervals = ((0.0, 1.0), (0.0, 0.9), (0.0, 0.8), (0.0, 0.6), (0.3, 1.0), (0.5, 1.0), (0.7, 1.0), (0.3, 0.9))
    made = [guided(size, f"CFG {low}-{high}", guidance_interval=(low, high)) for low, high in intervals]
    return [
        *made,
        guided(size, "CFG, not in the refine step", refine_guidance=1.0),
        guided(size, "CFG 0.3-0.9, not in the refine step", guidance_interval=(0.3, 0.9), refine_guidance=1.0),
        guided(size, "no CFG", guidance=1.0),
    ]


def _step_cache(size: int) -> list[Way]:
    made = [cached(size, threshold) for threshold in (0.0, 0.05, 0.1, 0.2, 0.4)]
    return [*made, cached(size, 0.1, low_steps=20), cached(size, 0.2, low_steps=20), cached(size, 0.0, low_steps=6)]


def _precision(size: int) -> list[Way]:
    return [
        staged(size, "12+1", "float"),
        staged(size, "12+1", "8 bits and tiles", upscaler="reference"),
    ]


SWEEPS: dict[str, Sweep] = {
    "sigma": Sweep(
        "Which start sigma?",
        _each("sigma", (0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.18, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
    ),
    "low_steps": Sweep("How many steps at the low size?", _each("low_steps", (4, 5, 6, 7, 8, 10, 12, 16, 20, 30))),
    "refine_steps": Sweep("How many refine steps, and on which curve?", _refine_steps),
    "factor": Sweep("How much smaller can stage 1 be?", _each("factor", (1.25, 1.5, 2.0, 3.0, 4.0))),
    "upscaler": Sweep(
        "Does the upscaler have to be a network?",
        lambda size: [staged(size, "12+1", f"upscaler {kind}", upscaler=kind) for kind in UPSCALERS],
    ),
    "refine_guidance": Sweep("Guidance in the refine step?", _each("refine_guidance", (1.0, 2.0, 3.5, 5.0))),
    "guidance_interval": Sweep("Where does CFG matter?", _guidance_interval),
    "shift_tokens": Sweep("Shift of stage 1: low or final size?", _each("shift_tokens", ("low", "final"))),
    "posterior": Sweep("Posterior: mode or sample?", _each("posterior", ("mode", "sample"))),
    "seed_rule": Sweep("Which noise for the refine step?", _seed_rules),
    "precision": Sweep("Float, or 8 bits between the stages?", _precision),
    "step_cache": Sweep("Does step caching save more than fewer steps do?", _step_cache),
    "solver": Sweep("Which solver at 12+1?", _each("solver", ("euler", "multistep", "careful", "dpmpp_2m"))),
}
