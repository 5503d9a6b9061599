"""The few-step LoRA on the model, and on fine-tunes that it was not trained for; presets and sigmas on them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from bench.markdown import table
from bench.quality import kinds, scores
from mrflow_sched import demo, load_upscaler
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import Scene
from mrflow_sched.plan.make import make_native_plan, make_plan
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import sample_staged
from tools.train_demo import finetune

__all__ = ["FILES", "measure", "report"]

FILES: Mapping[str, str] = {kind: f"{kind}.safetensors" for kind in get_args(finetune.Kind)}
"""The file of each fine-tune, as `tools.train_demo.finetune` writes it into a folder."""
MODEL = "the model itself"
BASE = "12+1"
SIGMAS = (0.12, 0.3, 0.45)
_TOGETHER = 4


def plans(size: int) -> dict[str, StagedPlan]:
    """The ways: native, the default with other sigmas, turbo, and as few steps without its LoRA (known bad)."""
    return {
        "native 50": make_native_plan("demo", size, size, steps=50, solver="euler"),
        BASE: make_plan("demo", size, size),
        **{f"12+1 from {sigma:g}": make_plan("demo", size, size, sigma=sigma) for sigma in SIGMAS},
        "turbo": make_plan("demo", size, size, "turbo"),
        "turbo, 3 steps": make_plan("demo", size, size, "turbo", low_steps=3),
        "4+1 (known bad)": make_plan("demo", size, size, "4+1"),
        "3+1 (known bad)": make_plan("demo", size, size, "3+1"),
    }


def _scenes(name: str, each: int) -> tuple[list[Scene], list[str], Tensor | None]:
    """Scenes of a model's world, their captions, and as it shows them; None where that is the world's own drawing."""
    if name == MODEL:
        every = kinds.all_scenes(each)
        return every, [caption(scene) for scene in every], None
    kind: Any = name
    numbers = range(finetune.TEST_FIRST, finetune.TEST_FIRST + 4 * each)
    every = [finetune.scene_of(kind, number) for number in numbers]
    shown = [finetune.picture_of(kind, scene, number) for scene, number in zip(every, numbers, strict=True)]
    pictures = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).float()
    return every, [finetune.caption_of(kind, scene) for scene in every], pictures


def measure(each: int, first_seed: int, size: int, folder: Path | None) -> dict[str, Any]:
    """The rows of every way on the model, and on each fine-tune whose LoRA lies in `folder`."""
    upscaler = load_upscaler(demo.upscaler_path())
    found: dict[str, Any] = {}
    for name in (MODEL, *FILES):
        file = None if folder is None or name == MODEL else folder / FILES[name]
        if name != MODEL and (file is None or not file.is_file()):
            found[name] = f"no {FILES[name]}: python -m tools.train_demo.finetune {name} --out FOLDER/{FILES[name]}"
            continue
        engine: Any = demo.load_engine()
        if file is not None:
            engine.pipe.load_lora_weights(file.parent, weight_name=file.name)
        scenes, prompts, pictures = _scenes(name, each)
        truth = scores.Truth(scenes, kinds.rendered(scenes, size) if pictures is None else pictures)
        rows: dict[str, Any] = {"true": {**truth.parts(truth.true), "forwards": None}}
        for way, plan in plans(size).items():
            parts: list[Tensor] = []
            for first in range(0, len(prompts), _TOGETHER):
                texts = prompts[first : first + _TOGETHER]
                seeds = range(first_seed + first, first_seed + first + len(texts))
                parts.append(sample_staged(engine, plan, texts, seeds=seeds, upscaler=upscaler).images.cpu())
            made = truth.parts(truth.measure(torch.cat(parts)))
            rows[way] = {**made, "forwards": sum(plan.stage_costs()), "of native": plan.cost_ratio}
        found[name] = {"scenes": len(scenes), "rows": rows}
    return found


def report(found: Mapping[str, Any]) -> str:
    """A table for each model; `+` and `-` are against the default on the same model."""
    parts: list[str] = []
    for name, each in found.items():
        if isinstance(each, str):
            parts.append(f"**{name}**: {each}")
            continue
        rows: Mapping[str, Any] = each["rows"]
        lines = [_line(way, row, rows[BASE]["composite"]) for way, row in rows.items()]
        head = ["way", "composite", "to 12+1", "attributes", "letters", "structure", "look", "times less than native"]
        parts.append(f"**{name}**, {each['scenes']} scenes\n\n" + table(head, lines, "lr"))
    return "\n\n".join(parts)


def _line(way: str, row: Mapping[str, Any], base: float) -> Sequence[object]:
    shown = [f"{row[part]:.3f}" if part in row else "" for part in _SHOWN]
    less = "" if row["forwards"] is None else f"{row['of native']:.1f}"
    return [way, f"{row['composite']:.3f}", f"{row['composite'] - base:+.3f}", *shown, less]


_SHOWN = ("attributes", "letters", "local structure", "look")
