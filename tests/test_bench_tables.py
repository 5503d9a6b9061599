"""What all benches share: markdown tables and the peak signal-to-noise ratio."""

from __future__ import annotations

import pytest
import torch

from bench.markdown import table
from bench.psnr import psnr


def test_a_table_has_a_line_a_row_and_aligns_as_asked() -> None:
    rows = [["native", 1.0, "yes"], ["staged", "0.25", ""]]
    expected = ["| way | s | met |", "| --- | ---: | ---: |", "| native | 1.0 | yes |", "| staged | 0.25 |  |"]
    assert table(["way", "s", "met"], rows).splitlines() == expected
    assert table(["way", "s", "met"], rows, "lrl").splitlines()[1] == "| --- | ---: | --- |"
    assert table(["way", "s", "met"], [], "l").splitlines()[1:] == ["| --- | --- | --- |"]
    assert table(["way", "s", "met"], [], "r").splitlines()[1] == "| ---: | ---: | ---: |"


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 2 cells is needed, not \\['native'\\]"):
        table(["way", "s"], [["native"]])


def test_psnr_is_ten_logarithms_of_the_mean_square_error_of_each_image() -> None:
    image = torch.full((2, 3, 8, 8), 0.5)
    other = torch.stack([image[0] + 0.1, image[1]])
    assert psnr(image, other).tolist() == pytest.approx([20.0, float("inf")], abs=1e-4)
