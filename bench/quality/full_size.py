"""Simple statistics of pictures at full size, nothing shrunk, and paired tests of them.

Refining changes little but the finest detail, which a judge that shrinks its pictures cannot see. Each statistic below
is one number per picture; two ways are compared scene by scene, so that what a scene shows cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from bench.markdown import table
from mrflow_sched.measure.metrics import paired_t

FLOOR = 1e-10
"""Added to powers before their logarithm: less than one 8-bit level in one pixel of a picture."""
RINGS: dict[str, tuple[float, float]] = {
    "energy 1/8": (0.125, 0.25),
    "energy 1/4": (0.25, 0.5),
    "energy 1/2": (0.5, 0.75),
    "energy 3/4": (0.75, 1.0),
    "energy of corners": (1.0, 1.5),
}
"""Rings of spatial frequency, from and to, in shares of the Nyquist limit; corners lie beyond it, along diagonals."""

FEATURES: dict[str, str] = {
    "energy 1/8": "log10 of the brightness's mean power from 1/8 to 1/4 of the Nyquist limit",
    "energy 1/4": "the same from 1/4 to 1/2",
    "energy 1/2": "the same from 1/2 to 3/4, above what a half-size image holds",
    "energy 3/4": "the same from 3/4 to 1",
    "energy of corners": "the same beyond 1: fine diagonals, and noise",
    "flat": "share of neighbouring pixels whose brightness differs by less than 1/255",
    "grid of 4": "log of the strongest over the mean of the steps across every 4th row and column: the VAE's patches",
    "kurtosis": "log10 of the high pass's kurtosis: high for few strong edges, low for noise",
    "strong detail": "share of the high pass beyond 0.05",
    "sharp edges": "of the steepest 1 % of steps, their share in what changes across three: 1 for a hard edge",
    "quiet noise": "log10 of the high pass's power in the quietest tenth of blocks of 8x8",
    "coloured detail": "log10 of the high pass's power in red minus green and blue minus green",
    "saturation": "mean of the largest minus the smallest colour",
    "contrast": "standard deviation of the brightness",
}
"""The statistics in their order, each in a line."""


def measure(pictures: Tensor) -> Tensor:
    """The statistics of pictures (N, 3, H, W) in [0, 1], (N, len(FEATURES)) in float64; H and W are multiples of 8."""
    grey = pictures.mean(1)
    high = grey - _soft(grey)
    power = high.square().flatten(1).mean(1)
    colours = pictures[:, 1:2] - pictures[:, ::2]
    coloured = (colours - _soft(colours)).square().flatten(1).mean(1)
    blocks = functional.avg_pool2d(high.square()[:, None], 8).flatten(1)
    found: dict[str, Tensor] = {
        **_rings(grey),
        "flat": torch.stack([(step < 1 / 255).float().mean((1, 2)) for step in _steps(grey)]).mean(0),
        "grid of 4": torch.stack([_grid(step) for step in _steps(grey)]).mean(0),
        "kurtosis": (high.pow(4).flatten(1).mean(1) + FLOOR**2).log10() - 2 * (power + FLOOR).log10(),
        "strong detail": (high.abs() > 0.05).float().flatten(1).mean(1),
        "sharp edges": _sharpness(grey),
        "quiet noise": (torch.quantile(blocks, 0.1, dim=1) + FLOOR).log10(),
        "coloured detail": (coloured + FLOOR).log10(),
        "saturation": (pictures.amax(1) - pictures.amin(1)).flatten(1).mean(1),
        "contrast": grey.flatten(1).std(1),
    }
    return torch.stack([found[name].double() for name in FEATURES], 1)


def _soft(x: Tensor) -> Tensor:
    """The mean of every pixel's 3x3 neighbours."""
    return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _steps(grey: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute differences from column to column and from row to row, both (N, lines, steps)."""
    return grey.diff(dim=2).abs(), grey.diff(dim=1).abs().transpose(1, 2)


def _rings(grey: Tensor) -> dict[str, Tensor]:
    height, width = grey.shape[-2:]
    taper = torch.hann_window(height)[:, None] * torch.hann_window(width)
    power = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * taper).abs().square() / (height * width) ** 2
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]) * 2
    return {
        name: (power[:, (radius >= low) & (radius < high)].mean(1) + 1e-4 * FLOOR).log10()
        for name, (low, high) in RINGS.items()
    }


def _grid(step: Tensor) -> Tensor:
    phases = torch.stack([step[:, :, phase::4].mean((1, 2)) for phase in range(4)], 1) + FLOOR
    return (phases.amax(1) / phases.mean(1)).log()


def _sharpness(grey: Tensor) -> Tensor:
    """The steepest steps' share in what changes there across three."""
    steps = _steps(grey)
    here = torch.cat([each[:, :, 1:-1].flatten(1) for each in steps], 1)
    around = torch.cat([(each[:, :, 2:] + each[:, :, :-2]).flatten(1) for each in steps], 1)
    steepest = here.topk(max(1, here.shape[1] // 100), dim=1).indices
    step = here.gather(1, steepest).mean(1)
    return step / (step + around.gather(1, steepest).mean(1) + FLOOR)


# ------------------------------------------------------------------------------------------------------------ comparing


def paired(features: Tensor, other: Tensor) -> dict[str, dict[str, float]]:
    """Every statistic of pictures against others of the same scenes (N, F): the mean difference, Student's t, and the
    share of scenes in which it is higher (ties count half)."""
    change = features - other
    higher = (change > 0).double().mean(0) + (change == 0).double().mean(0) / 2
    return {
        name: {
            "difference": float(change[:, column].mean()),
            "t": paired_t(change[:, column]),
            "higher": float(higher[column]),
        }
        for column, name in enumerate(FEATURES)
    }


def distance(features: Tensor, true: Tensor, rows: Tensor | None = None) -> float:
    """How far a set is from the true pictures (N, F): the root mean square over the statistics of the mean paired
    difference, in standard deviations of the true pictures."""
    chosen = slice(None) if rows is None else rows
    shift = (features - true)[chosen].mean(0)
    return float((shift / (true.std(0) + 1e-6)).square().mean().sqrt())


def to_markdown(tests: Mapping[str, Mapping[str, Mapping[str, float]]], against: str) -> str:
    """The paired tests of ways against one, {way: `paired`}, a statistic a line."""
    head = [f"to {against}: t, scenes higher", *tests]
    cells = [
        [name, *(f"{test[name]['t']:+.1f}, {test[name]['higher']:.0%}" for test in tests.values())] for name in FEATURES
    ]
    return table(head, cells)
