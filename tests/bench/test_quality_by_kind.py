"""The bench by kind of picture: true drawings are read, halved ones lose what only the full size holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.quality import __main__ as command
from bench.quality import by_kind, known, scores, ways
from bench.quality.by_upscaler import Setting
from bench.quality.run import setting

SETTINGS = (Setting(), Setting(1, 0.12))


@pytest.fixture(scope="module")
def found() -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    here = setting(256, 1)
    few = [ways.native(256, 1)]
    record, pictures = by_kind.measure(
        here, 5, names=("SR", "nobody's"), settings=SETTINGS, natives=few, tell=lambda line: None
    )
    return here, record, pictures


def test_the_known_rows_tell_what_only_the_full_size_holds(found: Any) -> None:
    _, record, _ = found
    true, halved = (record["rows"][name] for name in (known.CEILING, known.HALVED))
    assert all(row["read"] >= 0.75 for row in true["kinds"].values())
    assert true["letters by height"][8] == true["letters by height"][12] == 1.0
    assert halved["letters by height"][8] <= 0.5
    assert halved["kinds"]["smooth"]["read"] >= 0.75


def test_a_row_of_every_setting_and_its_difference_to_native(found: Any) -> None:
    here, record, pictures = found
    assert list(record["rows"]) == [known.CEILING, known.HALVED, "native 1", "SR 12+0", "SR 12+1 from 0.12"]
    assert record["not installed"] == ["nobody's"]
    assert record["rows"]["SR 12+0"]["cost"] < record["rows"]["SR 12+1 from 0.12"]["cost"]
    for kind in here.truth.kinds:
        one, base = (record["rows"][name]["kinds"][kind] for name in ("SR 12+0", "native 1"))
        assert one["to base"] == pytest.approx(one["read"] - base["read"])
        assert base["to base"] == 0.0
        assert one["to base, interval"] is None
    json.dumps(record, allow_nan=False)
    assert by_kind._gap({"to base": 0.11, "to base, interval": None}) == "+11"
    assert by_kind._gap({"to base": 0.11, "to base, interval": (0.02, 0.2)}) == "+11 (+2 to +20)"
    assert pictures["SR 12+0"].dtype == torch.uint8
    assert len(pictures["SR 12+0"]) == record["scenes"]


def test_tables_and_a_sheet_are_written(found: Any, tmp_path: Path) -> None:
    here, record, pictures = found
    by_kind.write(record, pictures, here.truth, tmp_path)
    text = (tmp_path / "kinds.md").read_text()
    assert text.startswith("**Could tell its known pairs apart: no: 10 scenes are too few")
    assert "| read, to native 1 (95 %) |" not in text
    trusted = {**record, "known": {**record["known"], "could tell": True}}
    assert "| read, to native 1 (95 %) |" in by_kind.to_markdown(trusted)
    assert "| SR 12+1 from 0.12 | 3.30 |" in text
    assert text.endswith("Not installed: nobody's.\n")
    assert (tmp_path / "kinds.jpg").stat().st_size > 10_000


def test_an_unknown_upscaler_is_told(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        command.main(["--kinds", "--only", "mine"])
    assert "is no upscaler; choose from SR; compact x4; anime x4; Lanczos" in capsys.readouterr().err


def test_only_kinds_of_two_scenes_or_more_have_resamples() -> None:
    samples = [torch.tensor([0, 0, 2]), torch.tensor([1, 2, 1]), torch.tensor([2, 2, 2])]
    assert scores.resampled(torch.tensor([2]), samples) == []
    assert [rows.tolist() for rows in scores.resampled(torch.tensor([0, 1]), samples)] == [[0, 0], [1, 1]]
