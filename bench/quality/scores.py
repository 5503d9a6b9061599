"""One score for a set of images, and its parts.

The composite was fixed before the first measurement:

    0.40 attributes + 0.25 letters + 0.15 local structure + 0.10 look + 0.10 spectrum

attributes       share of the caption's attributes, letters excluded, that the judge reads in the image
letters          share of the letters of its word
local structure  1 - d / d(blank), mean over the pyramid's levels; d: sliced Wasserstein distance to the ground truth
look             1 - sqrt(d / d(blank)); d: Frechet distance of the judge's features to those of the ground truth
spectrum         1 - d / 10 dB; d: root mean square difference of the power spectrum from that of the ground truth

"Blank" images are uniform, in the mean colour of the ground truth. Parts are clipped at 0. If no image has a word, the
other weights are scaled up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.quality import judge, metrics
from mrflow_sched.demo.scenes import Scene
from mrflow_sched.measure.metrics import psnr

WEIGHTS: Mapping[str, float] = {
    "attributes": 0.40,
    "letters": 0.25,
    "local structure": 0.15,
    "look": 0.10,
    "spectrum": 0.10,
}
DECIBEL = 10.0


@dataclass(frozen=True)
class Measured:
    """What all scores of a set of images are computed from."""

    pictures: Tensor
    hits: Sequence[Mapping[str, Sequence[bool]]]
    projected: metrics.Projected
    features: Tensor
    spectrum: Tensor
    maps: Sequence[Tensor]


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
        saved = (pictures.clamp(0, 1) * 255).round() / 255
        return Measured(
            saved,
            judge.hits(saved, self.scenes),
            metrics.project(saved, self._scale),
            self._basis(judge.features(saved)),
            metrics.spectrum(saved),
            judge.maps(saved),
        )

    def parts(self, measured: Measured, rows: Tensor | None = None) -> dict[str, float]:
        """The parts of the composite over the images `rows`, and "composite" itself."""
        chosen = range(len(self.scenes)) if rows is None else rows.tolist()
        every = [measured.hits[row] for row in chosen]
        attributes = [hit for each in every for group, values in each.items() if group != "letters" for hit in values]
        letters = [hit for each in every for hit in each.get("letters", ())]
        levels = metrics.sliced_wasserstein(measured.projected, self.true.projected, rows) / self._blank_levels
        look = metrics.frechet(measured.features, self.true.features, rows) / self._blank_look
        apart = metrics.spectrum_distance(measured.spectrum, self.true.spectrum, rows)
        found = {
            "attributes": sum(attributes) / len(attributes),
            **({"letters": sum(letters) / len(letters)} if letters else {}),
            "local structure": max(0.0, 1.0 - float(levels.mean())),
            "look": max(0.0, 1.0 - look**0.5),
            "spectrum": max(0.0, 1.0 - apart / DECIBEL),
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
        from mrflow_sched.demo.scenes import word_boxes

        found: dict[int, list[bool]] = {}
        for scene, hits in zip(self.scenes, measured.hits, strict=True):
            if scene.word:
                _, top, _, bottom = word_boxes(scene)[0]
                height = round((bottom - top) * measured.pictures.shape[-2])
                found.setdefault(height, []).extend(hits["letters"])
        return {height: sum(values) / len(values) for height, values in sorted(found.items())}

    def rows_of(self, category: str) -> Tensor:
        """Numbers of the images of one category."""
        return torch.tensor([row for row, scene in enumerate(self.scenes) if scene.category == category])


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


def compared(
    truth: Truth, ways: Mapping[str, Measured], base: str, samples: Sequence[Tensor]
) -> dict[str, dict[str, Any]]:
    """Composite of every way with its interval, and of its difference to `base` on the same resampled scenes."""
    drawn = {name: [truth.parts(each, rows)["composite"] for rows in samples] for name, each in ways.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, each in ways.items():
        parts = truth.parts(each)
        gaps = [mine - theirs for mine, theirs in zip(drawn[name], drawn[base], strict=True)]
        found[name] = {
            **parts,
            "interval": metrics.interval(drawn[name]),
            "to base": parts["composite"] - truth.parts(ways[base])["composite"],
            "to base, interval": metrics.interval(gaps),
        }
    return found
