"""The markdown tables of all benches."""

from __future__ import annotations

import pytest

from bench.markdown import table


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
