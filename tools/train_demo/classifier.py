"""A small classifier of scene attributes, trained on true scenes only: the judge of what a sampled picture shows.

It looks at the picture at 128 pixels (larger ones are averaged down), so native and staged results are judged alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mrflow_sched.demo.scenes import Scene
from train_demo import data
from train_demo.text import FIELDS, labels

GROUPS = {
    "category": ("category",),
    "colour": ("colour0", "colour1", "ink", "wall"),
    "shape": ("shape0", "shape1"),
    "texture": ("texture0", "texture1"),
    "ground and sky": ("ground", "sky", "light", "side"),
    "detail": ("detail",),
    "letters": tuple(field for field in FIELDS if field.startswith("letter")),
}


class Classifier(nn.Module):
    """(B, 3, 128, 128) in [0, 1] → logits per field."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 48, 64, 96)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [
                nn.Conv2d(a, b, 3, 2, 1),
                nn.BatchNorm2d(b),
                nn.ReLU(),
                nn.Conv2d(b, b, 3, 1, 1),
                nn.BatchNorm2d(b),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], 48, 1), nn.ReLU(), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(48 * 64, 256), nn.ReLU())
        self.heads = nn.ModuleDict({field: nn.Linear(256, len(options)) for field, options in FIELDS.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.hidden(self.body(pictures * 2 - 1))
        return {field: head(features) for field, head in self.heads.items()}


@dataclass(frozen=True)
class ClassifierSettings:
    seconds: float = 780.0
    batch: int = 32
    lr: float = 2e-3
    seed: int = 6


def _augment(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Shifts, noise, blur and a little contrast: what samplers do to a picture without changing what it shows."""
    if rng.random() < 0.5:
        dy, dx = (int(v) for v in rng.integers(-2, 3, 2))
        x = torch.roll(x, (dy, dx), (2, 3))
    if rng.random() < 0.2:
        x = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = (
        (x - 0.5) * torch.empty(len(x), 1, 1, 1).uniform_(0.85, 1.1)
        + 0.5
        + torch.empty(len(x), 3, 1, 1).uniform_(-0.03, 0.03)
    )
    return x + torch.empty(len(x), 1, 1, 1).uniform_(0, 0.05) * torch.randn_like(x)


def train(work: Path, settings: ClassifierSettings | None = None) -> dict[str, Any]:
    settings = settings or ClassifierSettings()
    torch.manual_seed(settings.seed)
    model = Classifier()
    pictures = np.load(work / "pictures.npy", mmap_mode="r")
    truth = [labels(scene) for scene in data.load_scenes(work)]
    targets = {field: torch.tensor([row[field] for row in truth]) for field in FIELDS}
    opt = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.02)
    rng = np.random.default_rng(settings.seed)
    begin, step, elapsed, curve = time.time(), 0, 0.0, []
    while elapsed < settings.seconds:
        for group in opt.param_groups:
            group["lr"] = settings.lr * min(1, (step + 1) / 100) * max(0.01, 1 - elapsed / settings.seconds)
        rows = np.sort(rng.integers(0, len(pictures), settings.batch))
        high = torch.from_numpy(pictures[rows]).permute(0, 3, 1, 2).float() / 255
        x = nn.functional.avg_pool2d(high, 2)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(_augment(x, rng).contiguous(memory_format=torch.channels_last))
        loss = torch.zeros(())
        for field, value in logits.items():
            wanted = targets[field][rows]
            if (wanted >= 0).any():
                loss = loss + nn.functional.cross_entropy(value.float(), wanted, ignore_index=-1)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        step += 1
        elapsed = time.time() - begin
        if step % 100 == 0:
            curve.append([step, elapsed, float(loss.detach())])
            print("classifier", curve[-1], flush=True)
    torch.save(model.state_dict(), work / "classifier.pt")
    count = 600
    scenes = [data.scene_at(index, data.TEST_STREAM) for index in range(count)]
    shown = np.stack([data.picture_at(index, data.TEST_STREAM, data.LOW) for index in range(count)])
    score = accuracy(model, torch.from_numpy(shown).permute(0, 3, 1, 2), scenes)
    record = {
        "settings": asdict(settings),
        "steps": step,
        "seconds": elapsed,
        "curve": curve,
        "accuracy_on_true_scenes": score,
    }
    (work / "classifier.json").write_text(json.dumps(record))
    print(score, flush=True)
    return record


@torch.inference_mode()
def accuracy(model: Classifier, pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of attributes, by group and over all, that the classifier reads as the caption says; pictures (N, 3, H,
    W) in [0, 1]."""
    model.eval()
    if pictures.shape[-1] != data.LOW:
        pictures = nn.functional.interpolate(pictures, (data.LOW, data.LOW), mode="area")
    logits = [model(part.float()) for part in pictures.split(50)]
    truth = [labels(scene) for scene in scenes]
    hits: dict[str, list[bool]] = {group: [] for group in GROUPS}
    for group, fields in GROUPS.items():
        for field in fields:
            wanted = torch.tensor([row[field] for row in truth])
            found = torch.cat([part[field].argmax(-1) for part in logits])
            known = wanted >= 0
            if field == "length":
                known = wanted > 0
            hits[group] += (found == wanted)[known].tolist()
    out = {group: float(np.mean(values)) for group, values in hits.items() if values}
    out["all"] = float(np.mean([hit for values in hits.values() for hit in values]))
    return out
