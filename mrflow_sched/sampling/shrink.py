"""Noise of one size from noise of a larger one: one seed, the same composition at both sizes.

An average of pixels makes white noise too weak, and a selection of pixels (nearest) forgets three in four of them. The
map here, D, averages and stays white: D D^T = I, so what it makes of standard normal noise is standard normal noise.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError

__all__ = ["shrink_noise"]


def shrink_noise(noise: Tensor, height: int, width: int) -> Tensor:
    """Shrink white noise so that it stays white.

    Where both sides shrink by whole ratios r and s it is the Haar mean, sqrt(r s) times the mean of every r x s block.
    Otherwise each axis is shrunk by the area mean A, whitened: (A A^T)^(-1/2) A, the map with orthonormal rows that is
    nearest to A.

    Args:
        noise: (B, C, H, W), of any float dtype; computed on the CPU, each image by itself.
        height: Rows of the result, 1 to H.
        width: Columns of the result, 1 to W.

    Returns:
        (B, C, height, width), float32, on the device of `noise`.

    Raises:
        MrFlowError: `noise` has another number of dimensions, or a size is out of its range.
    """
    if noise.ndim != 4:
        raise MrFlowError(f"noise must have the shape (B, C, H, W), got {tuple(noise.shape)}.")
    rows, columns = int(noise.shape[-2]), int(noise.shape[-1])
    for name, value, largest in (("height", height, rows), ("width", width, columns)):
        if not 1 <= value <= largest:
            raise MrFlowError(f"{name} must be from 1 to {largest}, the size of the noise, got {value!r}.")
    state = noise.detach().cpu()
    if rows % height == 0 and columns % width == 0:
        block = (rows // height, columns // width)
        small = functional.avg_pool2d(state.float(), block) * math.sqrt(block[0] * block[1])
    else:
        down, across = _white_mean(rows, height), _white_mean(columns, width)
        small = torch.stack([down @ image @ across.T for image in state.double()])
    return small.to(noise.device, torch.float32)


def _white_mean(size: int, smaller: int) -> Tensor:
    """The area mean of one axis, whitened: (smaller, size), float64, with orthonormal rows."""
    edges = torch.arange(smaller + 1, dtype=torch.float64) * (size / smaller)
    pixels = torch.arange(size, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    mean = overlap.clamp_min(0.0) * (smaller / size)
    # With A = U S V^T, (A A^T)^(-1/2) A = U V^T.
    parts = torch.linalg.svd(mean, full_matrices=False)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    left, _, right = cast("tuple[Tensor, Tensor, Tensor]", parts)
    return left @ right
