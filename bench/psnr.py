"""The one measure that every bench takes."""

from __future__ import annotations

from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in [0, 1].

    Args:
        a: Images, (N, ...).
        b: As many of the same shape.

    Returns:
        dB for each image, (N,); infinity where both are equal.
    """
    return -10 * (a - b).square().flatten(1).mean(1).log10()
