"""Lanczos resampling: the upscaler where there is no model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.checks import UpscalerKind
from mrflow_sched.upscaling.role import check_images


@dataclass(frozen=True)
class LanczosUpscaler:
    """Upscaling by windowed-sinc resampling, which adds no detail. `upscale_to` resizes with it to any size at once.

    Attributes:
        scale: Output side over input side.
        name: Its name in metadata and messages.
        kind: It is no network, which plans take into account.
    """

    scale: int = 2
    name: str = "Lanczos"
    kind: ClassVar[UpscalerKind] = "interpolation"

    def __call__(self, images: Tensor) -> Tensor:
        """Upscale a batch by `scale`.

        Args:
            images: (B, 3, h, w) float in [0, 1].

        Returns:
            (B, 3, h*scale, w*scale) float32, clamped to [0, 1].

        Raises:
            MrFlowError: `images` is not as above.
        """
        check_images(images)
        height, width = images.shape[-2:]
        return resize_lanczos(images, width * self.scale, height * self.scale).clamp(0, 1)


def resize_lanczos(images: Tensor, width: int, height: int) -> Tensor:
    """Resize by separable Lanczos resampling with three lobes, antialiased.

    The kernel sinc(x) sinc(x/3), |x| < 3, is widened by the factor when downscaling, so nothing aliases; weights are
    renormalised at the borders. This is Pillow's LANCZOS without its rounding to 8 bits. Overshoot beyond the input's
    range is kept: clamp where a range is promised.

    Args:
        images: (..., h, w) float.
        width: Width of the result, 1 or more.
        height: Its height.

    Returns:
        (..., height, width) float32, contiguous.

    Raises:
        MrFlowError: `width` or `height` is below 1.
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
