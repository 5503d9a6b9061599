"""D: how the state of a run at its full size becomes a state of a small run, for flow models.

A down-map gives the small state, the velocity that a small run should have there (the target of the guidance), and the
sigmas that are left. Equations in sigma form: x = (1 - sigma) x0 + sigma noise, u = dx/dsigma = noise - x0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError

__all__ = [
    "DOWNS",
    "DownSelector",
    "Estimate",
    "Head",
    "Switched",
    "averaged",
    "commutator_norms",
    "in_pixels",
    "lower_sigmas",
    "select_phase",
    "selected",
]

Estimate = Callable[[Tensor, Tensor], Tensor]
"""The clean estimate of noisy latents (B, ...) at sigma (B,), guidance included."""

DOWNS = ("pixels", "average", "polyphase")
"""The down-maps of a `Chain`."""


class Head(NamedTuple):
    """A run at its full size, stopped at the switch.

    Attributes:
        state: x, (B, C, H, W).
        velocity: u(x), likewise.
        noise: What the run started from, likewise.
        sigmas: The sigmas that are left, from that of `state` to 0.
    """

    state: Tensor
    velocity: Tensor
    noise: Tensor
    sigmas: tuple[float, ...]

    @property
    def clean(self) -> Tensor:
        """The clean estimate x - sigma u."""
        return self.state - self.sigmas[0] * self.velocity

    @property
    def noise_estimate(self) -> Tensor:
        """The noise estimate x + (1 - sigma) u."""
        return self.state + (1.0 - self.sigmas[0]) * self.velocity


class Switched(NamedTuple):
    """Where the small run starts.

    Attributes:
        state: Small latents (B, C, h, w) at `sigmas[0]`.
        target: The velocity that D of the full run has there, likewise.
        sigmas: The sigmas of the small run, falling to 0.
        estimate: The clean estimate at `state`, where it was made on the way; else None.
    """

    state: Tensor
    target: Tensor
    sigmas: tuple[float, ...]
    estimate: Tensor | None = None


# -------------------------------------------------------------------------------------------------- polyphase selectors


@dataclass(frozen=True)
class DownSelector:
    """D_k: one latent of every size x size block, the same one in all of them (arXiv 2604.09227, section 4).

    D_k D_k^T = I and D_j D_k^T = 0, so white noise stays white, and the phases of one noise are independent.

    Attributes:
        size: s, the side of a block, 1 or more.
        phase: k, from 0 to s^2 - 1: row k // s and column k mod s of the block.

    Raises:
        MrFlowError: A value out of its range.
    """

    size: int = 2
    phase: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise MrFlowError(f"size must be 1 or more, got {self.size!r}.")
        if not 0 <= self.phase < self.size**2:
            raise MrFlowError(f"phase must be from 0 to {self.size**2 - 1}, got {self.phase!r}.")

    def down(self, latents: Tensor) -> Tensor:
        """Shrink latents.

        Args:
            latents: (..., H, W), both multiples of `size`.

        Returns:
            (..., H / size, W / size), a view.

        Raises:
            MrFlowError: A side is no multiple of `size`.
        """
        self._check(latents)
        row, column = divmod(self.phase, self.size)
        return latents[..., row :: self.size, column :: self.size]

    def scatter(self, small: Tensor, fill: Tensor) -> Tensor:
        """Put small latents where `down` takes them from.

        Args:
            small: (..., h, w).
            fill: (..., h size, w size): all other latents.

        Returns:
            A copy of `fill` of which `down` gives `small`.

        Raises:
            MrFlowError: The shapes do not fit.
        """
        self._check(fill)
        if (*small.shape[:-2], *(side * self.size for side in small.shape[-2:])) != tuple(fill.shape):
            raise MrFlowError(f"fill has the shape {tuple(fill.shape)}, {self.size}x that of {tuple(small.shape)}.")
        row, column = divmod(self.phase, self.size)
        full = fill.clone()
        full[..., row :: self.size, column :: self.size] = small
        return full

    def _check(self, latents: Tensor) -> None:
        rows, columns = latents.shape[-2:]
        if rows % self.size or columns % self.size:
            raise MrFlowError(
                f"the latents have {rows} rows and {columns} columns, which polyphase selectors cannot shrink by "
                f"{self.size}; choose a size whose latents are multiples of {self.size}."
            )


def commutator_norms(head: Head, estimate: Estimate, size: int = 2) -> tuple[Tensor, Tensor]:
    """How far each selector is from commuting with the velocity: |D_k u(x) - u(D_k x)| (paper, equation of D*).

    Args:
        head: The full run at the switch; its velocity is shared by all selectors.
        estimate: Evaluates the model, once for every selector, on the whole batch.
        size: s of the selectors.

    Returns:
        The norms (s^2, B), and the clean estimates at D_k x, (s^2, B, C, h, w).
    """
    level = head.sigmas[0]
    norms: list[Tensor] = []
    estimates: list[Tensor] = []
    for phase in range(size**2):
        down = DownSelector(size, phase).down
        small = down(head.state).contiguous()
        estimates.append(estimate(small, small.new_full((len(small),), level)))
        distance = down(head.velocity) - (small - estimates[-1]) / level
        norms.append(distance.flatten(1).double().square().sum(1).sqrt())
    return torch.stack(norms), torch.stack(estimates)


def select_phase(head: Head, estimate: Estimate, size: int = 2) -> tuple[list[int], Tensor]:
    """The selector of the smallest commutator, for each image by itself.

    At the first step the velocity is the mean image minus the noise, whatever the noise is, so the norms say nothing of
    the seed: phase 0 is taken there without an evaluation.

    Args:
        head: As in `commutator_norms`.
        estimate: Likewise.
        size: Likewise.

    Returns:
        One phase per image, and the clean estimates (B, C, h, w) at D_k x; the latter are empty at the first step.
    """
    if head.sigmas[0] >= 1.0:
        return [0] * len(head.state), head.state.new_empty(0)
    norms, estimates = commutator_norms(head, estimate, size)
    phases = [int(phase) for phase in norms.argmin(0)]
    return phases, torch.stack([estimates[phase, row] for row, phase in enumerate(phases)])


def selected(head: Head, phases: Sequence[int], size: int = 2) -> Switched:
    """Shrink by selectors, as published.

    Args:
        head: The full run at the switch.
        phases: k for each image.
        size: s of the selectors.

    Returns:
        D_k x with the target D_k u, on the sigmas that are left.
    """

    def down(latents: Tensor) -> Tensor:
        return torch.stack([DownSelector(size, phase).down(each) for phase, each in zip(phases, latents, strict=True)])

    return Switched(down(head.state), down(head.velocity), head.sigmas)


# ------------------------------------------------------------------------------------------------------------- averages


def averaged(head: Head, height: int, width: int) -> Switched:
    """Shrink by block means, at the lower noise level that the mean has.

    The mean of an r x s block keeps the image and divides the noise by g = sqrt(r s). Scaled by
    (1 - sigma') / (1 - sigma), it is a state of a small run at sigma' = (sigma / g) / ((1 - sigma) + sigma / g).

    Args:
        head: The full run at the switch, after at least one step.
        height: Rows of the small latents; H must be a multiple.
        width: Columns likewise.

    Returns:
        That state with the target g mean(noise estimate) - mean(clean estimate), on its `lower_sigmas`.

    Raises:
        MrFlowError: The latents are no multiple of the small ones, or the switch comes before the first step.
    """
    rows, columns = head.state.shape[-2:]
    if rows % height or columns % width:
        raise MrFlowError(
            f"the latents have {rows} rows and {columns} columns, no multiple of {height} and {width}, so they cannot "
            "be averaged in blocks; choose a size that halves exactly."
        )
    sigma, block = head.sigmas[0], (rows // height, columns // width)
    if sigma >= 1.0:
        raise MrFlowError("switch is 0, where the state is noise alone, and its average no state; give 1 or more.")
    gain = math.sqrt(block[0] * block[1])
    sigmas = lower_sigmas(head.sigmas, gain)
    state = functional.avg_pool2d(head.state, block) * ((1.0 - sigmas[0]) / (1.0 - sigma))
    noise, clean = (functional.avg_pool2d(each, block) for each in (head.noise_estimate, head.clean))
    return Switched(state, gain * noise - clean, sigmas)


def lower_sigmas(sigmas: Sequence[float], gain: float) -> tuple[float, ...]:
    """The sigmas that are left where the noise of a state was divided.

    Args:
        sigmas: Those that were left before, falling to 0.
        gain: What the noise was divided by, 1 or more.

    Returns:
        The level of the state, (sigma / gain) / ((1 - sigma) + sigma / gain), and the given sigmas below it by 2 per
        cent and more.
    """
    lower = (sigmas[0] / gain) / ((1.0 - sigmas[0]) + sigmas[0] / gain)
    return (lower, *(each for each in sigmas if each < 0.98 * lower))


def in_pixels(head: Head, shrink: Callable[[Tensor], Tensor], noise: Tensor) -> Switched:
    """Shrink the clean estimate as an image, and put shrunk noise on it.

    Args:
        head: The full run at the switch.
        shrink: Small latents of clean latents, by way of the image: encode(area(decode(x0))).
        noise: Of the small run, (B, C, h, w), standard normal.

    Returns:
        (1 - sigma) c + sigma noise with c = `shrink`(clean estimate) and the target noise - c, on the sigmas that are
        left.
    """
    sigma, clean = head.sigmas[0], shrink(head.clean)
    return Switched((1.0 - sigma) * clean + sigma * noise, noise - clean, head.sigmas)
