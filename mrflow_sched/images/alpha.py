"""Transparency: taken apart from colour without a fringe, so that both can be upscaled by themselves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_TRUSTED = 1 / 32
"""Alpha from which a pixel's own colour counts fully; below, 8-bit editors round colour to nearly nothing."""


def split_alpha(images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Colour and alpha of images.

    Editors leave any colour, mostly black, where nothing is seen. A resampler would draw it over the edge as a dark or
    light fringe, so it is filled in from the visible neighbours.

    Args:
        images: (B, C, H, W), float in [0, 1]; C is 1 or 3, and one more with alpha.

    Returns:
        Colour (B, 3, H, W), and alpha (B, 1, H, W) or None.
    """
    if images.shape[1] in (1, 3):
        return images.expand(-1, 3, -1, -1).contiguous(), None
    colour, alpha = images[:, :-1], images[:, -1:]
    if bool((alpha < _TRUSTED).any()) and bool((alpha > 0).any()):
        colour = _filled(colour, (alpha / _TRUSTED).clamp(max=1), alpha)
    return colour.expand(-1, 3, -1, -1).contiguous(), alpha.contiguous()


def opaque(images: Tensor) -> Tensor:
    """Images with alpha, which is 1 where they had none.

    Args:
        images: (B, 3, H, W) or (B, 4, H, W), float in [0, 1].

    Returns:
        (B, 4, H, W).
    """
    return images if images.shape[1] == 4 else torch.cat([images, torch.ones_like(images[:, :1])], dim=1)


def on_white(images: Tensor) -> Tensor:
    """Images as they are seen on a white page, for what knows no transparency.

    Args:
        images: (..., 3, H, W) or, with alpha, (..., 4, H, W), float in [0, 1].

    Returns:
        (..., 3, H, W).
    """
    if images.shape[-3] == 3:
        return images
    colour, alpha = images[..., :3, :, :], images[..., 3:, :, :]
    return alpha * colour + (1 - alpha)


def _filled(colour: Tensor, trust: Tensor, weight: Tensor) -> Tensor:
    """Each colour mixed by `trust` with the mean, by `weight`, of an ever wider neighbourhood that has some weight."""
    height, width = colour.shape[-2:]
    if height == 1 and width == 1:
        return colour
    small_weight = functional.avg_pool2d(weight, 2, ceil_mode=True, count_include_pad=False)
    small = functional.avg_pool2d(colour * weight, 2, ceil_mode=True, count_include_pad=False)
    small = small / small_weight.clamp(min=torch.finfo(small.dtype).tiny)
    around = _filled(small, (small_weight / _TRUSTED).clamp(max=1), small_weight)
    return torch.lerp(functional.interpolate(around, (height, width), mode="bilinear"), colour, trust)
