"""The judge of what a sampled image shows, trained on rendered scenes only.

Two small networks: one classifies the attributes of the whole image, the other reads one letter in a strip around the
place where the caption's word belongs; a letter elsewhere, or none, is an error. The judge sees every image at 128
pixels (larger ones are averaged down), so native and staged images are judged alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mrflow_sched.demo.glyphs import LETTERS
from mrflow_sched.demo.scenes import Scene, word_boxes
from tools.train_demo import data
from tools.train_demo.text import FIELDS, labels

GROUPS = {
    "category": ("category",),
    "colour": ("colour0", "colour1", "ink", "wall"),
    "shape": ("shape0", "shape1"),
    "texture": ("texture0", "texture1"),
    "ground and sky": ("ground", "sky", "light", "side"),
    "detail": ("detail",),
}


WHOLE = tuple(field for field in FIELDS if not field.startswith("letter"))
STRIP = (60, 24)  # pixels of a letter's strip, rows and columns


class Classifier(nn.Module):
    """(B, 3, 128, 128) in [0, 1] → logits per field of :data:`WHOLE`."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 48, 64, 96)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += _convolution(a, b, 2) + _convolution(b, b, 1)
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], 48, 1), nn.ReLU(), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(48 * 64, 256), nn.ReLU())
        self.heads = nn.ModuleDict({field: nn.Linear(256, len(FIELDS[field])) for field in WHOLE})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.hidden(self.body(pictures * 2 - 1))
        return {field: head(features) for field, head in self.heads.items()}


class LetterReader(nn.Module):
    """Strips (N, 3, 60, 24) in [0, 1] → logits (N, letters), the maximum over all positions in the strip."""

    def __init__(self) -> None:
        super().__init__()
        layers = [*_convolution(3, 32, 1), *_convolution(32, 64, 2), *_convolution(64, 96, 2)]
        self.body = nn.Sequential(*layers, *_convolution(96, 96, 1), *_convolution(96, 96, 1), *_convolution(96, 96, 1))
        self.head = nn.Conv2d(96, len(LETTERS), 1)

    def forward(self, strips: Tensor) -> Tensor:
        return self.head(self.body(strips * 2 - 1)).float().flatten(2).logsumexp(-1)


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole, self.letters = Classifier(), LetterReader()


def _convolution(a: int, b: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU()]


def strips(pictures: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """A strip around every letter of every scene's word, (N, 3, 60, 24), and the letters' indices (N,)."""
    rows: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    wanted: list[int] = []
    for row, scene in enumerate(scenes):
        for letter, box in zip(scene.word, word_boxes(scene), strict=True):
            rows.append(row)
            boxes.append(box)
            wanted.append(LETTERS.index(letter))
    left, top, right, bottom = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4).T
    half = 0.8 * (right - left)
    place = torch.zeros(len(rows), 2, 3)
    place[:, 0, 0], place[:, 0, 2] = 2 * half, left + right - 1
    place[:, 1, 1], place[:, 1, 2] = 2 * half * STRIP[0] / STRIP[1], top + bottom - 1
    grid = nn.functional.affine_grid(place, [len(rows), 3, *STRIP], align_corners=False)
    cut = nn.functional.grid_sample(pictures[rows], grid, padding_mode="border", align_corners=False)
    return cut, torch.tensor(wanted)


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


def at_reading_size(pictures: Tensor) -> Tensor:
    """Images (N, 3, H, W) as the judge sees them: averaged down to 128 pixels."""
    if pictures.shape[-1] != data.LOW:
        pictures = nn.functional.interpolate(pictures, (data.LOW, data.LOW), mode="area")
    return pictures.float()


@torch.inference_mode()
def hits(judge: Judge, pictures: Tensor, scenes: Sequence[Scene]) -> list[dict[str, list[bool]]]:
    """For every image (N, 3, H, W) in [0, 1], by group: whether each attribute reads as its scene says."""
    judge.eval()
    pictures = at_reading_size(pictures)
    logits = [judge.whole(part) for part in pictures.split(50)]
    truth = [labels(scene) for scene in scenes]
    found: list[dict[str, list[bool]]] = [{} for _ in scenes]
    for group, fields in GROUPS.items():
        for field in fields:
            read = torch.cat([part[field].argmax(-1) for part in logits]).tolist()
            for row, wanted in enumerate(each[field] for each in truth):
                if wanted >= 0:
                    found[row].setdefault(group, []).append(read[row] == wanted)
    if any(scene.word for scene in scenes):
        cut, letters = strips(pictures, scenes)
        right = iter((torch.cat([judge.letters(part).argmax(-1) for part in cut.split(200)]) == letters).tolist())
        for row, scene in enumerate(scenes):
            if scene.word:
                found[row]["letters"] = [next(right) for _ in scene.word]
    return found


def accuracy(judge: Judge, pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of attributes, by group and over all, that the judge reads as the caption says."""
    found = hits(judge, pictures, scenes)
    groups = [group for group in (*GROUPS, "letters") if any(group in row for row in found)]
    out = {group: float(np.mean([hit for row in found for hit in row.get(group, [])])) for group in groups}
    out["all"] = float(np.mean([hit for row in found for values in row.values() for hit in values]))
    return out
