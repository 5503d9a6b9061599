"""The colour guard: a shift of an image's mean colour, which super-resolution or refining brought in, is taken back."""

from __future__ import annotations

import torch
from torch import Tensor

from mrflow_sched.upscaling.fit import upscale_to

__all__ = ["SHIFT", "colour_shift", "with_colours_of"]

SHIFT = 3 / 255, 0.15
"""The guard acts where the largest shift of a channel's mean is between these (values in [0, 1]): a smaller one cannot
be seen, and a larger one is no colour cast but another image."""


def colour_shift(before: Tensor, after: Tensor) -> Tensor:
    """How far the mean of each channel moved from one image to another, where the guard is to act.

    Args:
        before: (..., 3, h, w) in [0, 1], or (..., 4, h, w) with transparency; values outside are clipped.
        after: (..., 3, H, W), likewise, of any size.

    Returns:
        (3,) on the CPU, after minus before; zeros where the largest shift is outside `SHIFT`.
    """
    shift = _means(after) - _means(before)
    worst = float(shift.abs().max())
    return shift if SHIFT[0] < worst < SHIFT[1] else torch.zeros_like(shift)


def with_colours_of(before: Tensor, after: Tensor) -> Tensor:
    """Images whose mean colours are moved back to those of the images they were made from.

    Args:
        before: (B, 3, h, w), float32 in [0, 1], or (B, 4, h, w) with transparency, which hides what does not count.
        after: (B, 3, H, W), likewise; where the shapes differ, `before` was cropped at the centre (`upscale_to`).

    Returns:
        In the shape of `after`, float32 in [0, 1]; an image that did not shift is returned as it is.
    """
    height, width = after.shape[-2:]
    shown = upscale_to(before, width, height)
    shifts = torch.stack([colour_shift(*pair) for pair in zip(shown, after, strict=True)])
    if not bool(shifts.any()):
        return after
    colour = (after[:, :3] - shifts.to(after)[..., None, None]).clamp(0, 1)
    return torch.cat([colour, after[:, 3:]], dim=1)


def _means(image: Tensor) -> Tensor:
    """Mean of each colour (3,) of (..., 3, H, W), on the CPU, values outside [0, 1] clipped; alpha is its weight."""
    channels = image.float().clamp(0.0, 1.0).movedim(-3, 0).flatten(1)
    if len(channels) == 3:
        return channels.mean(dim=1).cpu()
    colour, alpha = channels[:3], channels[3]
    return ((colour * alpha).sum(dim=1) / alpha.sum().clamp(min=torch.finfo(alpha.dtype).tiny)).cpu()
