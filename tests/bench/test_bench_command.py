"""The commands of the bench learn before any work where their results can go, and Ctrl-C ends them with a sentence."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.command import results_file, results_folder, run_command, to_json

FOLDER = [
    "batch",
    "methods.__main__",
    "previews.__main__",
    "previews.composition",
    "previews.ranks",
    "quality.__main__",
    "quality.few_steps",
    "quality.variety",
    "reference",
    "reliability.__main__",
    "rewards",
    "serve",
    "solvers",
    "speed.__main__",
    "tiles",
]
FILE = ("pipelines.__main__", "quality.patch_judge")


@pytest.mark.parametrize("name", [*FOLDER, *FILE])
def test_a_place_without_room_for_results_is_told_before_any_work(
    name: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    out = str(blocked / "inside") if name in FILE else str(blocked)
    module = importlib.import_module(f"bench.{name}")
    for value, said in ((out, "can be made and written in."), ("", "argument --out: '' is no ")):
        words = ["--out", value, *(["--train"] if "judge" in name else [])]
        monkeypatch.setattr("sys.argv", ["bench", *words])
        with pytest.raises(SystemExit) as stopped:
            module.main(*([] if name in ("solvers", "previews.ranks") else [words]))
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    assert blocked.read_text() == "kept"


def test_a_folder_is_made_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    made = results_folder(str(tmp_path / "a" / "b"))
    assert made == tmp_path / "a" / "b"
    assert os.listdir(made) == []
    assert results_file(str(tmp_path / "c" / "page.md")) == tmp_path / "c" / "page.md"
    assert os.listdir(tmp_path / "c") == []


def test_ctrl_c_ends_a_command_with_a_sentence(capsys: Any) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    sentence = "Stopped by Ctrl-C; what was not written before is lost.\n"
    for main, code, said in ((interrupted, 130, sentence), (int, 0, "")):
        with pytest.raises(SystemExit) as stopped:
            run_command(main)
        assert stopped.value.code == code
        assert capsys.readouterr().err == said


def test_what_is_no_number_is_null_in_a_record() -> None:
    record = {"row": {8: (1.5, float("nan")), "none": [float("inf"), "nan", True, None]}}
    written = to_json(record)
    assert json.loads(written) == {"row": {"8": [1.5, None], "none": [None, "nan", True, None]}}
    assert written.startswith('{\n "row"')
    assert written.endswith("}\n")
