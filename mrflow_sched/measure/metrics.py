"""How similar two images are."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["paired_t", "psnr", "ssim"]


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


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5.

    Args:
        a: Images, (N, 3, H, W) in [0, 1], of at least 11x11 pixels.
        b: Images of the same shape.

    Returns:
        (N,), the mean over pixels and colours, at most 1.
    """
    axis = torch.arange(11, dtype=a.dtype, device=a.device) - 5
    window = torch.exp(-(axis**2) / (2 * 1.5**2))
    window = window / window.sum()
    kernel = (window[:, None] * window).expand(3, 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return functional.conv2d(x, kernel, groups=3)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return (score / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).flatten(1).mean(1)


def paired_t(differences: Tensor) -> float:
    """Student's t of paired differences: their mean over its standard error.

    Args:
        differences: (N,), one per pair, at least two.

    Returns:
        A number; infinite where all differences are the same, and 0 where all are 0.
    """
    values = differences.double()
    mean, error = float(values.mean()), float(values.std()) / len(values) ** 0.5
    if error == 0.0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / error
