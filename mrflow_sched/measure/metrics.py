"""How similar two images are."""

from __future__ import annotations

from torch import Tensor

__all__ = ["psnr"]


def psnr(a: Tensor, b: Tensor, *, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each image, 10 log10(peak^2 / mean square error).

    Args:
        a: Images, (N, ...) of any further shape.
        b: Images of the same shape.
        peak: The largest value that a pixel can have, 1 or 255.

    Returns:
        (N,) in dB; equal images give infinity.
    """
    error = (a - b).flatten(1).double().square().mean(1)
    return 10 * (peak**2 / error).log10()
