"""One score for a set of images, and its parts.

The composite was fixed before the first measurement:

    0.40 attributes + 0.25 letters + 0.15 local structure + 0.10 look + 0.10 spectrum

attributes       share of the caption's attributes, letters excluded, that the judge reads in the image
letters          share of the letters of its word
local structure  1 - d / d(blank), mean over the pyramid's levels; d: sliced Wasserstein distance to the ground truth
look             1 - sqrt(d / d(blank)); d: Frechet distance of the judge's features to those of the ground truth
spectrum         1 - d / 10 dB; d: root mean square difference of the power spectrum from that of the ground truth

"Blank" images are uniform, in the mean colour of the ground truth. Nothing is clipped: what is farther from the ground
truth than a blank image, or than 10 dB, has a part below 0. A part that no image has is left out, and the other weights
are scaled up. A perfect model does not reach 1: another rendering of the same captions is the ceiling (known.py).

The distances are our own: torchmetrics' FID and KID need either a download of Inception's weights or a network of one's
own, which leaves of them the formula of `metrics.frechet`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.quality import full_size, judge, metrics, patch_judge
from bench.quality.kinds import kind_of
from mrflow_sched.demo.judge import labels
from mrflow_sched.demo.scenes import FINE_SIZE, PRINTS, Scene
from mrflow_sched.measure.metrics import psnr

WEIGHTS: Mapping[str, float] = {
    "attributes": 0.40,
    "letters": 0.25,
    "local structure": 0.15,
    "look": 0.10,
    "spectrum": 0.10,
}
DECIBEL = 10.0
FLIPPED = ("colour0", "colour1", "ink", "wall", "ground", "sky")
"""The fields that make a picture another one where they read otherwise."""


@dataclass(frozen=True)
class Measured:
    """What all scores of a set of images are computed from."""

    levels: Tensor
    hits: Sequence[Mapping[str, Sequence[bool]]]
    projected: metrics.Projected
    features: Tensor
    spectrum: Tensor
    maps: Sequence[Tensor]
    full: Tensor

    @property
    def pictures(self) -> Tensor:
        """The images (N, 3, H, W) in [0, 1], from their 8-bit levels."""
        return self.levels.float() / 255

    @cached_property
    def patches(self) -> patch_judge.Reading:
        """What the judge of wear reads, when asked: it takes longer than all else."""
        return patch_judge.read(self.pictures)


class Truth:
    """The rendered scenes, and everything that sets of sampled images are compared with."""

    def __init__(self, scenes: Sequence[Scene], pictures: Tensor) -> None:
        self.scenes = list(scenes)
        self._scale = metrics.Scale.of(pictures)
        self._basis = metrics.Basis.of(judge.features(pictures))
        self.true = self.measure(pictures)
        blank = self.measure(pictures.mean((2, 3), keepdim=True).expand_as(pictures).contiguous())
        self._blank_levels = metrics.sliced_wasserstein(blank.projected, self.true.projected)
        self._blank_look = metrics.frechet(blank.features, self.true.features)

    def measure(self, pictures: Tensor) -> Measured:
        """Everything needed to score `pictures` (N, 3, H, W), one per scene, rounded to 8 bits as when saved."""
        levels = (pictures.clamp(0, 1) * 255).round().to(torch.uint8)
        saved = levels.float() / 255
        return Measured(
            levels,
            hits(saved, self.scenes),
            metrics.project(saved, self._scale),
            self._basis(judge.features(saved)),
            metrics.spectrum(saved),
            [each.half() for each in judge.maps(saved)],
            full_size.measure(saved),
        )

    def parts(self, measured: Measured, rows: Tensor | None = None) -> dict[str, float]:
        """The parts of the composite over the images `rows`, and "composite" itself."""
        chosen = range(len(self.scenes)) if rows is None else rows.tolist()
        read = shares(measured.hits[row] for row in chosen)
        levels = metrics.sliced_wasserstein(measured.projected, self.true.projected, rows) / self._blank_levels
        look = metrics.frechet(measured.features, self.true.features, rows) / self._blank_look
        apart = metrics.spectrum_distance(measured.spectrum, self.true.spectrum, rows)
        found = {
            **read,
            "local structure": 1.0 - float(levels.mean()),
            "look": 1.0 - look**0.5,
            "spectrum": 1.0 - apart / DECIBEL,
        }
        weight = sum(WEIGHTS[name] for name in found)
        return {"composite": sum(WEIGHTS[name] * value for name, value in found.items()) / weight, **found}

    def accuracy(self, measured: Measured) -> float:
        """Share of all attributes and letters read correctly, each counted once."""
        every = [hit for each in measured.hits for values in each.values() for hit in values]
        return sum(every) / len(every)

    def groups(self, measured: Measured) -> dict[str, float]:
        """Share of attributes read correctly, by kind of attribute."""
        names = dict.fromkeys(name for each in measured.hits for name in each)
        hits = {name: [hit for each in measured.hits for hit in each.get(name, ())] for name in names}
        return {name: sum(values) / len(values) for name, values in hits.items()}

    def letters_by_height(self, measured: Measured) -> dict[int, float]:
        """Share of letters read correctly, by the height of the glyphs in pixels."""
        from mrflow_sched.demo.drawing import word_boxes

        found: dict[int, list[bool]] = {}
        for scene, hits in zip(self.scenes, measured.hits, strict=True):
            side = measured.levels.shape[-2]
            if scene.word:
                _, top, _, bottom = word_boxes(scene)[0]
                found.setdefault(round((bottom - top) * side), []).extend(hits["letters"])
            if scene.small_word and f"{scene.print} letters" in hits:
                height = round(PRINTS[scene.print] * side / FINE_SIZE)
                found.setdefault(height, []).extend(hits[f"{scene.print} letters"])
        return {height: sum(values) / len(values) for height, values in sorted(found.items())}

    def rows_of(self, kind: str) -> Tensor:
        """Numbers of the images of one kind."""
        return torch.tensor([row for row, scene in enumerate(self.scenes) if kind_of(scene) == kind], dtype=torch.long)

    @property
    def kinds(self) -> list[str]:
        """The kinds of its scenes, in their order."""
        return list(dict.fromkeys(kind_of(scene) for scene in self.scenes))


def hits(pictures: Tensor, scenes: Sequence[Scene]) -> list[dict[str, list[bool]]]:
    """By image and group of attributes, whether each reads as the scene says; groups of letters end in "letters"."""
    coarse, fine = judge.hits(pictures, scenes), judge.fine_hits(pictures, scenes)
    return [{**one, **other} for one, other in zip(coarse, fine, strict=True)]


def shares(rows: Iterable[Mapping[str, Sequence[bool]]]) -> dict[str, float]:
    """Shares of "attributes" and of "letters" that read right, each where there is one."""
    found: dict[str, list[bool]] = {"attributes": [], "letters": []}
    for row in rows:
        for group, values in row.items():
            found["letters" if group.endswith("letters") else "attributes"].extend(values)
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def worst(measured: Measured, other: Measured) -> list[int]:
    """Image numbers, first those that lose most attributes against `other`; ties by perceptual distance."""

    def share(hits: Mapping[str, Sequence[bool]]) -> float:
        every = [hit for values in hits.values() for hit in values]
        return sum(every) / max(len(every), 1)

    lost = [share(theirs) - share(own) for own, theirs in zip(measured.hits, other.hits, strict=True)]
    apart = metrics.perceptual(measured.maps, other.maps).tolist()
    return sorted(range(len(lost)), key=lambda row: (-lost[row], -apart[row]))


def against(measured: Measured, other: Measured) -> dict[str, float]:
    """Mean distances of images to others of the same scenes and seeds."""
    shift = metrics.colour(measured.pictures) - metrics.colour(other.pictures)
    return {
        "psnr": float(psnr(measured.pictures, other.pictures).clamp(max=100).mean()),
        "ssim": float(metrics.ssim(measured.pictures, other.pictures).mean()),
        "perceptual": float(metrics.perceptual(measured.maps, other.maps).mean()),
        "colour drift": float(shift[:, :3].abs().mean() * 255),
        "saturation drift": float(shift[:, 3].mean() * 255),
    }


def same_noise(measured: Measured, converged: Measured, scenes: Sequence[Scene]) -> dict[str, float]:
    """How far images are from those of a converged run from the same noise: the median PSNR in dB, and the share of
    images in which a colour, the ground or the sky reads otherwise."""
    mine, theirs = judge.readings(measured.pictures), judge.readings(converged.pictures)
    named = [labels(scene) for scene in scenes]
    flips = [
        any(each[field] >= 0 and mine[field][row] != theirs[field][row] for field in FLIPPED)
        for row, each in enumerate(named)
    ]
    return {
        "median psnr": float(psnr(measured.pictures, converged.pictures).clamp(max=100).median()),
        "flips": sum(flips) / len(flips),
    }


def resampled(rows: Tensor, samples: Sequence[Tensor]) -> list[Tensor]:
    """The images `rows` as often as they are in each resample that holds any. Of fewer than two there are none: one
    scene says nothing of others, so it gets no interval."""
    if len(rows) < 2:
        return []
    return [chosen for sample in samples if len(chosen := sample[torch.isin(sample, rows)])]


def by_kind(
    truth: Truth, ours: Measured, base: Measured, ceiling: Measured, samples: Sequence[Tensor]
) -> dict[str, dict[str, Any]]:
    """By kind of picture: the three composites, the difference of the first two with its interval, None where there is
    none, what the judge reads, and the distance to the ground truth at full size."""

    def gap(chosen: Tensor) -> float:
        return truth.parts(ours, chosen)["composite"] - truth.parts(base, chosen)["composite"]

    found: dict[str, dict[str, Any]] = {}
    for kind in truth.kinds:
        rows = truth.rows_of(kind)
        gaps = [gap(chosen) for chosen in resampled(rows, samples[:100])]
        found[kind] = {
            "scenes": len(rows),
            "to base": gap(rows),
            "to base, interval": metrics.interval(gaps) if gaps else None,
        }
        for name, each in (("ours", ours), ("base", base), ("ceiling", ceiling)):
            found[kind][name] = {
                "composite": truth.parts(each, rows)["composite"],
                **shares(each.hits[row] for row in rows.tolist()),
                "distance at full size": full_size.distance(each.full, truth.true.full, rows),
            }
    return found


def compared(
    truth: Truth, ways: Mapping[str, Measured], base: str, samples: Sequence[Tensor]
) -> dict[str, dict[str, Any]]:
    """Composite of every way with its interval, and of its difference to `base` on the same resampled scenes; of local
    structure that difference's interval too."""
    drawn = {name: [truth.parts(each, rows) for rows in samples] for name, each in ways.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, each in ways.items():
        parts = truth.parts(each)
        gaps, structure = (
            [mine[part] - theirs[part] for mine, theirs in zip(drawn[name], drawn[base], strict=True)]
            for part in ("composite", "local structure")
        )
        found[name] = {
            **parts,
            "interval": metrics.interval([each["composite"] for each in drawn[name]]),
            "to base": parts["composite"] - truth.parts(ways[base])["composite"],
            "to base, interval": metrics.interval(gaps),
            "local structure to base, interval": metrics.interval(structure),
        }
    return found
