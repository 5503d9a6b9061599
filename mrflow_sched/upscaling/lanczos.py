"""Lanczos resampling: the upscaler where there is no model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.upscaling.role import check_images


@dataclass(frozen=True)
class LanczosUpscaler:
    """Plain windowed-sinc enlargement: no detail is added. `upscale_to` takes it to any size in one resize."""

    scale: int = 2
    name: str = "Lanczos"

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 3, h*scale, w*scale), clamped to [0, 1]."""
        check_images(images)
        height, width = images.shape[-2:]
        return resize_lanczos(images, width * self.scale, height * self.scale).clamp(0, 1)


def resize_lanczos(images: Tensor, width: int, height: int) -> Tensor:
    """(..., h, w) float -> (..., height, width) float32 by separable Lanczos with three lobes, antialiased.

    The kernel sinc(x) sinc(x/3), |x| < 3, is widened by the factor when shrinking, so nothing aliases; weights are
    renormalised at the borders. This is Pillow's LANCZOS without its rounding to 8 bits. Overshoot beyond the input's
    range is kept: clamp where a range is promised. Raises ValueError for sides below 1.
    """
    if width < 1 or height < 1:
        raise MrFlowError(f"width and height must be 1 or more, got {width}x{height}.")
    across = _lanczos_axis(images.float(), width)
    return _lanczos_axis(across.transpose(-1, -2), height).transpose(-1, -2).contiguous()


def _lanczos_axis(x: Tensor, size: int) -> Tensor:
    """Resample the last axis to `size` values, one tap of the kernel at a time: no matrix product, so no TF32."""
    if x.shape[-1] == size:
        return x
    indices, weights = _lanczos_taps(x.shape[-1], size)
    result = x.new_zeros((*x.shape[:-1], size))
    for index, weight in zip(indices.to(x.device), weights.to(x), strict=True):
        result += x.index_select(-1, index) * weight
    return result


def _lanczos_taps(source: int, target: int) -> tuple[Tensor, Tensor]:
    """Source positions and weights (taps, target) of each output value; pixel centres lie at half-integers."""
    ratio = source / target
    width = max(ratio, 1.0)
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * ratio
    first = torch.floor(centres - 3 * width)
    offsets = torch.arange(math.ceil(6 * width) + 2, dtype=torch.float64)
    positions = first + offsets[:, None]
    x = (positions + 0.5 - centres) / width
    kernel = torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)
    kernel = torch.where((positions >= 0) & (positions < source), kernel, 0.0)
    return positions.clamp(0, source - 1).long(), kernel / kernel.sum(0)
