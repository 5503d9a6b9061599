"""Fewer bits by stage: how near the image stays to that of the network as it was loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.markdown import table
from bench.quality import judge
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import Scene
from mrflow_sched.engines.diffusers.precision import OWN, PRECISIONS, LoweredNetworks
from mrflow_sched.measure.metrics import psnr
from mrflow_sched.methods import StagePrecision
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import sample_staged

__all__ = ["measure", "report"]

STAGES = ("stage 1", "refine", "both")


def measure(engine: Any, upscaler: Any, scenes: Sequence[Scene], first_seed: int, size: int) -> list[dict[str, Any]]:
    """A row for every precision and stage; what this device cannot do has the reason instead of numbers."""
    plan = make_plan("demo", size, size)

    def made(plan: StagedPlan, method: Any = None) -> tuple[Tensor, float]:
        pictures: list[Tensor] = []
        begin = time.process_time()
        for index, scene in enumerate(scenes):
            seeded = replace(plan, seed=first_seed + index)
            pictures.append(
                sample_staged(engine, seeded, caption(scene), upscaler=upscaler, method=method).images.cpu()
            )
        return torch.cat(pictures), (time.process_time() - begin) / len(scenes)

    own, seconds = made(plan)
    rows: list[dict[str, Any]] = [_row(OWN, "both", own, None, seconds, scenes, _bytes(engine.network))]
    few = replace(plan, stages=(make_plan("demo", size, size, "2+1").stages[0], *plan.stages[1:]))
    rows.append(_row("own, 2 steps (known bad)", "stage 1", *_paired(made(few), own), scenes, rows[0]["bytes"]))
    for name in PRECISIONS:
        try:
            weights = _bytes(LoweredNetworks()(engine.in_precision(name).network, name))
        except MrFlowError as error:
            rows.append({"precision": name, "reason": str(error)})
            continue
        for stage in STAGES:
            chosen: dict[str, Any] = {
                "first": name if stage != "refine" else OWN,
                "later": name if stage != "stage 1" else OWN,
            }
            found = made(plan, StagePrecision(**chosen))
            rows.append(_row(name, stage, *_paired(found, own), scenes, weights))
    return rows


def _paired(found: tuple[Tensor, float], own: Tensor) -> tuple[Tensor, Tensor, float]:
    return found[0], own, found[1]


def _row(
    name: str, stage: str, images: Tensor, own: Tensor | None, seconds: float, scenes: Sequence[Scene], weights: int
) -> dict[str, Any]:
    saved = (images.clamp(0, 1) * 255).round() / 255
    read = [hit for each in judge.hits(saved, scenes) for values in each.values() for hit in values]
    row: dict[str, Any] = {"precision": name, "stage": stage, "seconds": seconds, "bytes": weights}
    row["read"] = sum(read) / len(read)
    return row if own is None else {**row, "psnr": float(psnr(images, own).mean())}


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
        near = f"{row['psnr']:.1f}" if "psnr" in row else ""
        weights = f"{row['bytes'] / 2**20:.1f}"
        lines.append(
            [row["precision"], row["stage"], near, f"{100 * row['read']:.0f} %", f"{row['seconds']:.2f}", weights]
        )
    head = ["precision", "of", "PSNR to own", "read", "CPU s", "MiB of weights"]
    refused = "".join(f"\n- {row['reason']}" for row in rows if "reason" in row)
    return table(head, lines, "llr") + ("\n" + refused if refused else "")
