"""Measures of how alike two images are."""

from __future__ import annotations

import math

import pytest
import torch

from mrflow_sched.measure.metrics import psnr


def test_psnr_is_of_each_image_and_of_the_peak() -> None:
    black = torch.zeros(3, 3, 4, 4)
    other = black + torch.tensor([0.0, 0.1, 1.0]).view(3, 1, 1, 1)
    found = psnr(black, other)
    assert found.shape == (3,)
    assert math.isinf(found[0])
    assert found[1:].tolist() == pytest.approx([20.0, 0.0], abs=1e-5)
    assert psnr(255 * black, 255 * other, peak=255)[1:].tolist() == pytest.approx([20.0, 0.0], abs=1e-5)
