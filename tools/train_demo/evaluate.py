"""Evaluation of the finished model: attribute accuracy and image sheets, native and staged."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.quality import judge as judges
from bench.quality.kinds import FINE, fine_scenes_of, rendered
from mrflow_sched import make_native_plan, make_plan
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.judge import load_judge
from mrflow_sched.demo.scenes import CATEGORIES, Scene
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.sampler import sample_staged
from mrflow_sched.upscaling.load import load_upscaler
from tools.train_demo import classifier, data


def sheet(pictures: Tensor, columns: int) -> Image.Image:
    """(N, 3, H, W) in [0, 1] as one image, row by row."""
    n, c, h, w = pictures.shape
    grid = (
        pictures.view(n // columns, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, n // columns * h, columns * w)
    )
    return Image.fromarray((grid.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy())


def test_scenes(per_category: int) -> list[Scene]:
    """Scenes that no part was trained on, equally many of each category."""
    found: dict[str, list[Scene]] = {category: [] for category in CATEGORIES}
    index = 0
    while min(len(rows) for rows in found.values()) < per_category:
        scene = data.scene_at(index, data.TEST_STREAM)
        if len(found[scene.category]) < per_category:
            found[scene.category].append(scene)
        index += 1
    return [scene for rows in found.values() for scene in rows]


def _sample(engine: PipelineEngine, plan: Any, prompts: list[str], upscaler: Any, batch: int = 8) -> Tensor:
    parts = []
    for first in range(0, len(prompts), batch):
        part = make_seeded(plan, first)
        parts.append(sample_staged(engine, part, prompts[first : first + batch], upscaler=upscaler).images)
    return torch.cat(parts)


def make_seeded(plan: Any, seed: int) -> Any:
    from dataclasses import replace

    return replace(plan, seed=plan.seed + seed)


def _fine_shares(pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of each kind of fine detail that its judge reads right, as in files of eight bits."""
    found = judges.fine_hits((pictures.clamp(0, 1) * 255).round() / 255, scenes)
    names = dict.fromkeys(name for each in found for name in each if each[name])
    hits = {name: [hit for each in found for hit in each.get(name, ())] for name in names}
    return {name: sum(values) / len(values) for name, values in hits.items()}


def evaluate(work: Path, weights: Path, per_category: int = 12, pictures: Path | None = None) -> dict[str, Any]:
    """Write ``evaluation.json`` and sheets: `per_category` scenes of each category without fine detail, half as many of
    each kind with it. The judges were trained on rendered scenes alone."""
    engine = PipelineEngine.from_folder(weights, family="demo")
    upscaler = load_upscaler(weights / "upscaler" / "x2.safetensors")
    judge = load_judge()
    if (work / "classifier.pt").exists():
        judge.load_state_dict(torch.load(work / "classifier.pt", weights_only=True))
    scenes = test_scenes(per_category)
    prompts = [caption(scene) for scene in scenes]
    true = torch.from_numpy(np.stack([data.picture_at(i, data.TEST_STREAM) for i in range(len(scenes))])).permute(
        0, 3, 1, 2
    )
    true_scenes = [data.scene_at(i, data.TEST_STREAM) for i in range(len(scenes))]
    each = max(1, per_category // 2)
    fine = fine_scenes_of(each)
    guidance = engine.family.guidance
    out: dict[str, Any] = {
        "scenes": len(scenes),
        "guidance": guidance,
        "fine scenes": len(fine),
        "rendered scenes": classifier.accuracy(judge, true, true_scenes) | _fine_shares(rendered(fine, 256), fine),
    }
    plans = {
        "native 50": make_native_plan("demo", 256, 256, solver="euler"),
        "native 12": make_native_plan("demo", 256, 256, steps=12, solver="euler"),
        "staged 20+1": make_plan("demo", 256, 256, "20+1"),
        "staged 12+1": make_plan("demo", 256, 256, "12+1"),
        "staged 6+1": make_plan("demo", 256, 256, "6+1"),
    }
    folder = pictures or work
    for name, plan in plans.items():
        begin = time.time()
        shown = _sample(engine, plan, prompts, upscaler)
        out[name] = {**classifier.accuracy(judge, shown, scenes), "seconds": time.time() - begin}
        detailed = _sample(engine, plan, [caption(scene) for scene in fine], upscaler)
        out[name] |= _fine_shares(detailed, fine)
        for category in CATEGORIES:
            rows = [row for row, scene in enumerate(scenes) if scene.category == category]
            out[name][f"in {category}"] = classifier.accuracy(judge, shown[rows], [scenes[row] for row in rows])["all"]
        columns = min(4, each)
        chosen = [row for k in range(len(CATEGORIES)) for row in range(k * per_category, k * per_category + columns)]
        more = [row for k in range(len(FINE)) for row in range(k * each, k * each + columns)]
        sheet(torch.cat([shown[chosen], detailed[more]]), columns).save(folder / f"sheet {name}.png".replace(" ", "-"))
        print(name, {key: round(value, 3) for key, value in out[name].items()}, flush=True)
    (work / "evaluation.json").write_text(json.dumps(out, indent=1))
    return out
