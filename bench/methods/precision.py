"""Fewer bits by stage: how near the image stays to that of the network as it was loaded."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.markdown import table
from bench.quality import judge
from bench.quality.ways import AUTHORS_SIGMA
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import Scene
from mrflow_sched.engines.diffusers.precision import OWN, PRECISIONS, LoweredNetworks
from mrflow_sched.measure.metrics import psnr
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import sample_staged

__all__ = ["measure", "report"]

STAGES = {"stage 1": (True, False), "refine": (False, True), "both": (True, True)}


def measure(engine: Any, upscaler: Any, scenes: Sequence[Scene], first_seed: int, size: int) -> list[dict[str, Any]]:
    """A row for every precision and stage; what this device cannot do has the reason instead of numbers."""
    # From more noise the refine step would mend what few bits do to stage 1.
    plan = make_plan("demo", size, size, sigma=AUTHORS_SIGMA)

    def made(plan: StagedPlan) -> tuple[Tensor, float]:
        pictures: list[Tensor] = []
        begin = time.process_time()
        for index, scene in enumerate(scenes):
            seeded = replace(plan, seed=first_seed + index)
            pictures.append(sample_staged(engine, seeded, caption(scene), upscaler=upscaler).images.cpu())
        return torch.cat(pictures), (time.process_time() - begin) / len(scenes)

    def row(name: str, stage: str, weights: int, plan: StagedPlan) -> dict[str, Any]:
        images, seconds = made(plan)
        found: dict[str, Any] = {"precision": name, "stage": stage, "seconds": seconds, "bytes": weights}
        return {**found, "read": judge.share_read(images, scenes), "psnr": float(psnr(images, own).mean())}

    own, _ = made(plan)
    weights = _bytes(engine.network)
    few = replace(plan, stages=(make_plan("demo", size, size, "2+1").stages[0], *plan.stages[1:]))
    rows = [row(OWN, "both", weights, plan), row("own, 2 steps (known bad)", "stage 1", weights, few)]
    for name in PRECISIONS:
        try:
            weights = _bytes(LoweredNetworks()(engine.in_precision(name).network, name))
        except MrFlowError as error:
            rows.append({"precision": name, "reason": str(error)})
            continue
        for stage, (first, later) in STAGES.items():
            named: Any = {"precision": name if first else OWN, "refine_precision": name if later else OWN}
            rows.append(row(name, stage, weights, make_plan("demo", size, size, sigma=AUTHORS_SIGMA, **named)))
    return rows


def _bytes(network: torch.nn.Module) -> int:
    """Bytes of a network's weights, those of quantised ones included."""
    total = 0
    for weight in network.parameters():
        inner = getattr(weight, "__tensor_flatten__", None)
        names = inner()[0] if inner is not None else []
        parts = [getattr(weight, name) for name in names] or [weight]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table; below it what cannot be done here, and why."""
    lines: list[list[object]] = []
    for row in rows:
        if "reason" in row:
            continue
        near = "same" if math.isinf(row["psnr"]) else f"{row['psnr']:.1f}"
        weights = f"{row['bytes'] / 2**20:.1f}"
        lines.append(
            [row["precision"], row["stage"], near, f"{100 * row['read']:.0f} %", f"{row['seconds']:.2f}", weights]
        )
    head = ["precision", "of", "PSNR to own", "read", "CPU s", "MiB of weights"]
    refused = "".join(f"\n- {row['reason']}" for row in rows if "reason" in row)
    return table(head, lines, "llr") + ("\n" + refused if refused else "")
