"""Just-in-Time sampling against plain sampling at equal steps and at equal cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.markdown import table
from bench.quality import judge
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import Scene
from mrflow_sched.measure.metrics import psnr
from mrflow_sched.methods import Jit
from mrflow_sched.plan.make import make_native_plan, make_plan
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import sample_staged

__all__ = ["measure", "report"]

CONVERGED = 30
"""Dense native Euler steps of the reference."""


def _dense(size: int, **options: Any) -> StagedPlan:
    return make_native_plan("demo", size, size, **options)


def ways(size: int) -> dict[str, tuple[StagedPlan, Any]]:
    """Name of a row -> its plan and its method, the reference first; every row starts from the same noise."""
    slow, fast = (make_plan("demo", size, size, method=name) for name in ("jit-4x", "jit-7x"))
    native = _dense(size, steps=18).stages[0]
    on_native = replace(slow.stages[0], sigmas=native.sigmas, recipe=native.recipe, mu=native.mu)
    code = Jit(micro_flow="blend", noise="fresh", padding="zeros")
    return {
        f"dense {CONVERGED} (reference)": (_dense(size, steps=CONVERGED), None),
        "dense 18, its sigmas": (_dense(size, sigmas=slow.stages[0].sigmas), None),
        "dense 12": (_dense(size, steps=12), None),
        "dense 11, its sigmas": (_dense(size, sigmas=fast.stages[0].sigmas), None),
        "dense 7": (_dense(size, steps=7), None),
        "dense 2 (known bad)": (_dense(size, steps=2), None),
        "jit-4x": (slow, None),
        "jit-4x as its code": (slow, code),
        "jit-4x without micro-flow": (slow, Jit(micro_flow="off")),
        "jit-4x on native sigmas": (replace(slow, stages=(on_native,)), None),
        "jit-7x": (fast, None),
        "jit-7x as its code": (fast, code),
    }


def measure(engine: Any, scenes: Sequence[Scene], first_seed: int, size: int) -> list[dict[str, Any]]:
    """The rows."""
    rows: list[dict[str, Any]] = []
    reference: Tensor | None = None
    for name, (plan, method) in ways(size).items():
        made: list[Tensor] = []
        begin = time.process_time()
        for index, scene in enumerate(scenes):
            made.append(
                sample_staged(engine, replace(plan, seed=first_seed + index), caption(scene), method=method).images
            )
        seconds = (time.process_time() - begin) / len(scenes)
        pictures = torch.cat(made)
        reference = pictures if reference is None else reference
        evaluations = plan.native_forwards / plan.cost_ratio
        row: dict[str, Any] = {"way": name, "seconds": seconds, "evaluations": evaluations}
        row["read"] = judge.share_read(pictures, scenes)
        if pictures is not reference:
            near = psnr(pictures, reference)
            row |= {"psnr": float(near.mean()), "psnr_error": float(near.std() / len(near) ** 0.5)}
        rows.append(row)
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    cells: list[list[object]] = []
    for row in rows:
        near = f"{row['psnr']:.1f} ± {row['psnr_error']:.1f}" if "psnr" in row else ""
        cells.append(
            [row["way"], f"{row['seconds']:.2f}", f"{row['evaluations']:.1f}", near, f"{100 * row['read']:.0f} %"]
        )
    return table(["way", "CPU s", "dense evaluations", "PSNR to the reference", "read"], cells)
