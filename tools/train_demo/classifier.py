"""Training of the judge (`mrflow_sched.demo.judge`), on rendered scenes only."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mrflow_sched.demo.judge import GROUPS, WHOLE, Judge, hits, labels, strips
from mrflow_sched.demo.scenes import Scene
from tools.train_demo import data


@dataclass(frozen=True)
class ClassifierSettings:
    seconds: float = 900.0  # of the whole-image network
    letter_seconds: float = 240.0
    batch: int = 32
    lr: float = 2e-3
    seed: int = 6


def _augment(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Shifts, noise, blur and slight contrast changes, as samplers make them without changing what an image shows."""
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
    """Train both networks; writes ``classifier.pt``."""
    settings = settings or ClassifierSettings()
    torch.manual_seed(settings.seed)
    judge = Judge()
    pictures = np.load(work / "pictures.npy", mmap_mode="r")
    scenes = data.load_scenes(work)
    truth = [labels(scene) for scene in scenes]
    targets = {field: torch.tensor([row[field] for row in truth]) for field in WHOLE}
    lettered = np.array([row for row, scene in enumerate(scenes) if scene.word])
    rng = np.random.default_rng(settings.seed)

    def drawn(rows: np.ndarray) -> Tensor:
        high = torch.from_numpy(pictures[rows]).permute(0, 3, 1, 2).float() / 255
        return _augment(nn.functional.avg_pool2d(high, 2), rng)

    def whole_loss() -> Tensor:
        rows = np.sort(rng.integers(0, len(pictures), settings.batch))
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge.whole(drawn(rows).contiguous(memory_format=torch.channels_last))
        losses = [
            nn.functional.cross_entropy(value.float(), targets[field][rows], ignore_index=-1)
            for field, value in logits.items()
            if bool((targets[field][rows] >= 0).any())
        ]
        return torch.stack(losses).sum()

    def letter_loss() -> Tensor:
        rows = np.sort(rng.choice(lettered, settings.batch // 2))
        cut, wanted = strips(drawn(rows), [scenes[row] for row in rows])
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge.letters(cut.contiguous(memory_format=torch.channels_last))
        return nn.functional.cross_entropy(logits, wanted)

    curves = {
        "whole": _fit(judge.whole, whole_loss, settings.seconds, settings.lr),
        "letters": _fit(judge.letters, letter_loss, settings.letter_seconds, settings.lr),
    }
    torch.save(judge.state_dict(), work / "classifier.pt")
    count = 600
    shown = [data.scene_at(index, data.TEST_STREAM) for index in range(count)]
    true = np.stack([data.picture_at(index, data.TEST_STREAM, data.LOW) for index in range(count)])
    score = accuracy(judge, torch.from_numpy(true).permute(0, 3, 1, 2), shown)
    record = {"settings": asdict(settings), "curves": curves, "accuracy_on_true_scenes": score}
    (work / "classifier.json").write_text(json.dumps(record))
    print(score, flush=True)
    return record


def _fit(model: nn.Module, loss_of_batch: Callable[[], Tensor], seconds: float, lr: float) -> list[list[float]]:
    """Train with AdamW and linear decay for the given seconds; returns the curve as [step, seconds, loss]."""
    opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    begin, step, elapsed, curve = time.time(), 0, 0.0, []
    while elapsed < seconds:
        for group in opt.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * max(0.01, 1 - elapsed / seconds)
        loss = loss_of_batch()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        step += 1
        elapsed = time.time() - begin
        if step % 100 == 0:
            curve.append([step, elapsed, float(loss.detach())])
            print(type(model).__name__, curve[-1], flush=True)
    return curve


def accuracy(judge: Judge, pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of attributes, by group and over all, that the judge reads as the caption says."""
    found = hits(judge, pictures, scenes)
    groups = [group for group in (*GROUPS, "letters") if any(group in row for row in found)]
    out = {group: float(np.mean([hit for row in found for hit in row.get(group, [])])) for group in groups}
    out["all"] = float(np.mean([hit for row in found for values in row.values() for hit in values]))
    return out
