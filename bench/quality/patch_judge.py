"""A judge of wear at full size: a small network that tells clean crops of rendered scenes from worn ones.

    python -m bench.quality.patch_judge --train     100 seconds of one core; writes patch_judge.safetensors beside this

It has seen blur, bicubic enlargement and noise of one and two pixels, but no sampler, no VAE and no upscaler. What it
says is no score by itself: the VAE's decoder leaves a softness that reads as wear, so a way that skips the VAE is
rewarded whatever it shows. `compared` therefore calls a way better only where its pictures are both cleaner and nearer
to the true ones in the judge's features, and where local structure, which knows nothing of wear, does not object.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.command import results_file, run_command
from bench.quality.metrics import interval

WEIGHTS = Path(__file__).parent / "patch_judge.safetensors"
CROP = 64
"""Side in pixels of the crops that it is trained on; it reads whole pictures of any size."""
STREAM = 41
"""Of the scenes that it is trained on."""


class PatchJudge(nn.Module):
    """Five convolutions; a field of view of 19 pixels."""

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, 24, 32, 48, 64, 64), (1, 2, 1, 2, 1)
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """How clean every place of pictures (N, 3, H, W) in [0, 1] is, logits (N, h, w), and features (N, 64, h, w)."""
        features = self.body(pictures * 2 - 1)
        return self.head(features)[:, 0], features


@dataclass(frozen=True)
class Reading:
    """What the judge says of pictures: `logit` (N,), above 0 for clean ones, and `features` (N, 128)."""

    logit: Tensor
    features: Tensor


@lru_cache(maxsize=1)
def load() -> PatchJudge:
    """The judge, ready to read."""
    from safetensors import torch as safetensors

    judge = PatchJudge()
    weights: dict[str, Tensor] = safetensors.load_file(WEIGHTS)
    judge.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    return judge.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def untrained() -> PatchJudge:
    """The same network with random weights: features that know of no wear."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = PatchJudge()
    return judge.eval().requires_grad_(False)


@torch.inference_mode()
def read(pictures: Tensor, judge: PatchJudge | None = None) -> Reading:
    """Read pictures (N, 3, H, W) in [0, 1] at full size."""
    logits: list[Tensor] = []
    features: list[Tensor] = []
    for part in pictures.float().split(8):
        logit, maps = (judge or load())(part)
        logits.append(logit.mean((1, 2)))
        features.append(torch.cat([maps.mean((2, 3)), maps.std((2, 3))], 1))
    return Reading(torch.cat(logits), torch.cat(features))


def distance(reading: Reading, true: Reading, rows: Tensor | None = None) -> float:
    """How far the mean features of a set are from those of the true pictures: root mean square over the features, in
    standard deviations of the true pictures."""
    chosen = slice(None) if rows is None else rows
    shift = reading.features[chosen].mean(0) - true.features[chosen].mean(0)
    return float((shift / (true.features.std(0) + 1e-3)).square().mean().sqrt())


def compared(
    reading: Reading, other: Reading, true: Reading, samples: Sequence[Tensor], structure: tuple[float, float]
) -> dict[str, Any]:
    """A set of pictures against another of the same scenes, with intervals over resampled scenes; `structure` is the
    interval of the difference of their local structure, higher being nearer to the truth.

    "verdict" is "better" or "worse" where the logit and the distance to the true pictures both say so and the local
    structure does not say the opposite, "they disagree" where one says better and another worse, else "undecided".
    """
    change = reading.logit - other.logit
    logits = interval([float(change[rows].mean()) for rows in samples])
    gaps = interval([distance(reading, true, rows) - distance(other, true, rows) for rows in samples])
    said = (_sign(*logits), -_sign(*gaps), _sign(*structure))
    if {1, -1} <= set(said):
        verdict = "they disagree"
    elif 0 in said[:2]:
        verdict = "undecided"
    else:
        verdict = "better" if said[0] > 0 else "worse"
    return {
        "logit": float(reading.logit.mean()),
        "logit to base": float(change.mean()),
        "logit to base, interval": logits,
        "distance": distance(reading, true),
        "distance to base": distance(reading, true) - distance(other, true),
        "distance to base, interval": gaps,
        "verdict": verdict,
    }


def _sign(low: float, high: float) -> int:
    return 1 if low > 0 else -1 if high < 0 else 0


# ------------------------------------------------------------------------------------------------------------- training


def worn(crops: Tensor, rng: np.random.Generator) -> Tensor:
    """Crops (N, 3, H, W) with one kind of wear: blur, bicubic enlargement from half, noise, or noise of two pixels;
    each crop takes 40 to 100 % of it."""
    kind, strength = int(rng.integers(4)), float(rng.uniform(0.3, 1.0))
    half = (crops.shape[-2] // 2, crops.shape[-1] // 2)
    if kind == 0:
        changed = blurred(crops, 0.4 + 0.8 * strength)
    elif kind == 1:
        small = functional.interpolate(crops, half, mode="area")
        changed = functional.interpolate(small, crops.shape[-2:], mode="bicubic")
    elif kind == 2:
        changed = crops + (0.02 + 0.05 * strength) * _normal(crops.shape, rng)
    else:
        coarse = functional.interpolate(_normal((*crops.shape[:2], *half), rng), crops.shape[-2:], mode="bilinear")
        changed = crops + (0.03 + 0.06 * strength) * coarse
    share = torch.from_numpy(rng.uniform(0.4, 1.0, (len(crops), 1, 1, 1))).float()
    return (crops + share * (changed - crops)).clamp(0, 1)


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    """Pictures (N, 3, H, W) under a Gaussian of `sigma` pixels."""
    reach = max(1, round(3 * sigma))
    taps = torch.exp(-((torch.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    row = (taps / taps.sum()).view(1, 1, 1, -1).repeat(3, 1, 1, 1)
    edge = functional.pad(pictures, [reach] * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(edge, row, groups=3), row.transpose(2, 3), groups=3)


def _normal(shape: Sequence[int], rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def drawn(count: int) -> np.ndarray:
    """Training pictures (count, 256, 256, 3), uint8; every second one with fine detail."""
    from mrflow_sched.demo.drawing import render
    from mrflow_sched.demo.scenes import fine_scene, random_scene

    pictures: list[np.ndarray] = []
    for index in range(count):
        rng = np.random.default_rng([STREAM, index])
        scene = fine_scene(rng) if index % 2 else random_scene(rng)
        pictures.append(np.rint(render(scene, 256, seed=index) * 255).astype(np.uint8))
    return np.stack(pictures)


def train(seconds: float, count: int = 800, seed: int = 0) -> tuple[PatchJudge, float]:
    """The judge after `seconds` of processor time on `count` pictures, and the share that it reads right of the last
    hundred batches. A batch holds twelve crops clean and the same crops worn."""
    rng = np.random.default_rng([STREAM, seed])
    pictures = drawn(count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = PatchJudge()
    adam = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.02)
    label = torch.cat([torch.ones(12), torch.zeros(12)])
    begin, spent, right = time.process_time(), 0.0, list[float]()
    while spent < seconds:
        for group in adam.param_groups:
            group["lr"] = 1e-3 * min(1, (len(right) + 1) / 50) * max(0.01, 1 - spent / seconds)
        corners = rng.integers(0, pictures.shape[1] - CROP + 1, (12, 2))
        chosen = rng.integers(0, count, 12)
        cut = [pictures[row, y : y + CROP, x : x + CROP] for row, (y, x) in zip(chosen, corners, strict=True)]
        clean = torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float() / 255
        both = torch.cat([clean, (worn(clean, rng) * 255).round() / 255])
        logit = judge(both)[0].mean((1, 2))
        adam.zero_grad()
        functional.binary_cross_entropy_with_logits(logit, label).backward()
        adam.step()
        right.append(float(((logit > 0) == (label > 0)).float().mean()))
        spent = time.process_time() - begin
    return judge.eval(), float(np.mean(right[-100:]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.patch_judge", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--train", action="store_true", required=True, help="train it and write its weights")
    parser.add_argument("--seconds", type=float, default=100.0, help="processor time (default 100)")
    parser.add_argument(
        "--out", type=results_file, default=WEIGHTS, help="where to write the weights (default: in place)"
    )
    options = parser.parse_args(arguments)
    from safetensors import torch as safetensors

    judge, right = train(options.seconds)
    kept = {name: value.half() for name, value in judge.state_dict().items() if value.is_floating_point()}
    safetensors.save_file(kept, options.out)
    print(f"{right:.1%} of training crops read right; {options.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_command(main)
