"""Distances between images and between sets of images, without a network that must be downloaded.

Images are float tensors (N, 3, H, W) in [0, 1]; compared sets have the same N and size. All metrics are deterministic:
random patches and directions come from a fixed seed, the same for both sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched.measure.metrics import ssim

__all__ = [
    "BANDS",
    "LEVELS",
    "Basis",
    "Projected",
    "Scale",
    "colour",
    "frechet",
    "interval",
    "perceptual",
    "project",
    "pyramid",
    "resamples",
    "sliced_wasserstein",
    "spectrum",
    "spectrum_distance",
    "ssim",
]

LEVELS = 4  # of the Laplacian pyramid: bands from the finest, and the residual
PATCH, PATCHES, DIRECTIONS = 7, 64, 64  # of the sliced Wasserstein distance: side, number per image, projections
COMPONENTS = 24  # principal components of the ground truth's features, for the Frechet distance
BANDS = 16  # rings of the power spectrum

# -------------------------------------------------------------------------------------------------------------- images


def perceptual(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Distance of feature maps in the manner of LPIPS (Zhang et al. 2018), unweighted, (N,): channels at every
    position scaled to length 1, squared difference, mean over positions, sum over layers.

    `a` and `b` hold one map (N, C, h, w) per layer.
    """
    total = torch.zeros(len(a[0]))
    for x, y in zip(a, b, strict=True):
        total += (functional.normalize(x.float()) - functional.normalize(y.float())).square().sum(1).flatten(1).mean(1)
    return total


def colour(images: Tensor) -> Tensor:
    """Means of red, green and blue and of the saturation (largest minus smallest channel), (N, 4)."""
    spread = images.amax(1) - images.amin(1)
    return torch.cat([images.flatten(2).mean(2), spread.flatten(1).mean(1, keepdim=True)], 1)


# ---------------------------------------------------------------------------------------------------------------- sets


def pyramid(images: Tensor, levels: int = LEVELS) -> list[Tensor]:
    """Laplacian pyramid: `levels` - 1 bands from the finest, then the small residual image."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (taps[:, None] * taps).expand(3, 1, 5, 5)

    def blur(x: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(x, [2] * 4, mode="reflect"), kernel, groups=3)

    bands: list[Tensor] = []
    for _ in range(levels - 1):
        small = blur(images)[..., ::2, ::2]
        large = functional.interpolate(small, images.shape[-2:], mode="bilinear", align_corners=False)
        bands.append(images - large)
        images = small
    return [*bands, images]


@dataclass(frozen=True)
class Projected:
    """Patches of a set along fixed directions, per pyramid level: the values in ascending order and the image of each,
    both (DIRECTIONS, N * PATCHES). So sets of resampled images need no sorting."""

    values: tuple[Tensor, ...]
    images: tuple[Tensor, ...]

    def of(self, rows: Tensor | None) -> list[Tensor]:
        """The values of the images `rows`, as often as each is there, in ascending order."""
        if rows is None:
            return list(self.values)
        counts = torch.bincount(rows, minlength=int(self.images[0].max()) + 1)
        return [
            values.flatten().repeat_interleave(counts.index_select(0, images.flatten())).view(len(values), -1)
            for values, images in zip(self.values, self.images, strict=True)
        ]


@dataclass(frozen=True)
class Scale:
    """Normalises the patches of every set: mean and standard deviation of the ground truth, per level and colour."""

    mean: tuple[Tensor, ...]
    deviation: tuple[Tensor, ...]

    @classmethod
    def of(cls, images: Tensor) -> Scale:
        bands = pyramid(images)
        return cls(
            tuple(band.mean((0, 2, 3)).view(3, 1, 1) for band in bands),
            tuple(band.std((0, 2, 3)).view(3, 1, 1) for band in bands),
        )


def project(images: Tensor, scale: Scale, seed: int = 0) -> Projected:
    """Random 7x7 patches of every level, at the same positions in every set, projected on random unit directions."""
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, Tensor]] = []
    for band, mean, deviation in zip(pyramid(images), scale.mean, scale.deviation, strict=True):
        n, _, height, width = band.shape
        top = torch.randint(height - PATCH + 1, (n, PATCHES), generator=generator)
        left = torch.randint(width - PATCH + 1, (n, PATCHES), generator=generator)
        directions = functional.normalize(torch.randn(3 * PATCH**2, DIRECTIONS, generator=generator), dim=0)
        every = ((band - mean) / deviation).unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # (N, 3, h', w', 7, 7)
        rows = torch.arange(n)[:, None].expand_as(top)
        patches = every[rows, :, top, left]  # (N, PATCHES, 3, 7, 7)
        values, order = (patches.flatten(2) @ directions).flatten(0, 1).T.contiguous().sort(1)
        found.append((values, (order // PATCHES).int()))
    return Projected(*zip(*found, strict=True))


def sliced_wasserstein(a: Projected, b: Projected, rows: Tensor | None = None) -> Tensor:
    """Mean distance of the sorted projections, per level from the finest (LEVELS,); `rows` chooses images.

    As in Progressive GAN (Karras et al. 2018), but both sets are normalised by the ground truth, so a lack of contrast
    counts.
    """
    return torch.stack([(x - y).abs().mean() for x, y in zip(a.of(rows), b.of(rows), strict=True)])


@dataclass(frozen=True)
class Basis:
    """Principal components of the ground truth's features, each scaled to standard deviation 1."""

    mean: Tensor
    axes: Tensor

    @classmethod
    def of(cls, features: Tensor, components: int = COMPONENTS) -> Basis:
        """`features` (N, F) of the ground truth."""
        mean = features.mean(0)
        _, deviation, axes = torch.linalg.svd((features - mean).double(), full_matrices=False)
        kept = min(components, len(features) - 1)
        lengths = deviation[:kept] / (len(features) - 1) ** 0.5
        return cls(mean, (axes[:kept] / lengths[:, None]).T)

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean).double() @ self.axes


def frechet(a: Tensor, b: Tensor, rows: Tensor | None = None) -> float:
    """Frechet distance of Gaussians fitted to features (N, K): |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))."""
    x, y = (a, b) if rows is None else (a[rows], b[rows])
    mean = (x.mean(0) - y.mean(0)).square().sum()
    first, second = (torch.cov(each.T, correction=min(1, len(each) - 1)) for each in (x, y))
    # The eigenvalues of S_a S_b are real and not negative, being those of S_a^(1/2) S_b S_a^(1/2).
    crossed = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    return float((mean + first.trace() + second.trace() - 2 * crossed).clamp(min=0))


def spectrum(images: Tensor) -> Tensor:
    """Power of the brightness in BANDS rings of spatial frequency up to the Nyquist limit of a side, (N, BANDS)."""
    grey = images.mean(1)
    height, width = grey.shape[-2:]
    grey = grey - grey.mean((1, 2), keepdim=True)
    taper = torch.hann_window(height)[:, None] * torch.hann_window(width)
    power = torch.fft.fft2(grey * taper).abs().square()
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]) * 2
    ring = (radius * BANDS).long()
    inside = (ring < BANDS) & (radius > 0)
    sums = power.new_zeros(len(power), BANDS).index_add_(1, ring[inside], power[:, inside])
    counts = torch.bincount(ring[inside], minlength=BANDS)
    return sums / counts


def spectrum_distance(a: Tensor, b: Tensor, rows: Tensor | None = None) -> float:
    """Root mean square over the rings of the difference of mean power, in dB."""
    x, y = (a, b) if rows is None else (a[rows], b[rows])
    floor = 1e-10
    decibel = 10 * ((x.mean(0) + floor).log10() - (y.mean(0) + floor).log10())
    return float(decibel.square().mean().sqrt())


# ----------------------------------------------------------------------------------------------------------- resampling


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The middle `level` share of resampled values."""
    ordered: Any = torch.tensor(sorted(values), dtype=torch.float64)
    edge = (1 - level) / 2
    return float(torch.quantile(ordered, edge)), float(torch.quantile(ordered, 1 - edge))


def resamples(count: int, pictures: int, groups: Sequence[Sequence[int]], seed: int = 0) -> list[Tensor]:
    """`count` bootstrap samples of image numbers, drawn with replacement within each group."""
    generator = torch.Generator().manual_seed(seed)
    assert sorted(row for group in groups for row in group) == list(range(pictures))
    drawn: list[Tensor] = []
    for _ in range(count):
        parts = [
            torch.tensor(list(group))[torch.randint(len(group), (len(group),), generator=generator)] for group in groups
        ]
        drawn.append(torch.cat(parts))
    return drawn
