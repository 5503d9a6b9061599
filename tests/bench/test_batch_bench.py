"""The bench of `mrflow batch` sees what is missing, made twice, different or untrue."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from bench import batch


def fill(folder: Path, files: dict[str, bytes], lines: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    entries = [
        {"status": "done", "file": name, "sha256": hashlib.sha256(data).hexdigest(), "tries": 2}
        for name, data in lines.items()
    ]
    (folder / "manifest.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


def test_what_is_wrong_is_counted(tmp_path: Path) -> None:
    whole = {"a.png": b"a", "b.png": b"b", "c.png": b"c"}
    fill(tmp_path / "alone", whole, whole)
    fill(tmp_path / "good", whole, whole)
    fill(tmp_path / "bad", {"a.png": b"a", "b.png": b"x", "a-2.png": b"a"}, {"a.png": b"z"})
    good = batch.check(tmp_path / "good", tmp_path / "alone", 3)
    assert good == {
        **dict.fromkeys(("missing", "different", "twice", "unlisted", "untrue"), 0),
        "files": 3,
        "tries": 2,
    }
    bad = batch.check(tmp_path / "bad", tmp_path / "alone", 3)
    assert [bad[name] for name in ("missing", "different", "twice", "unlisted", "untrue")] == [1, 1, 1, 2, 1]
    assert batch.is_right({"kills": {**good, "half": 0}})
    assert not batch.is_right({"kills": good, "ray": bad})


def test_the_page_has_a_table_for_each_part() -> None:
    kills = dict.fromkeys(("missing", "half", "different", "twice", "untrue", "unlisted"), 0)
    found = {
        "kills": {**kills, "files": 9, "killed": 4, "runs": 3},
        "speed": {"one": 10.0, "two": 19.0, "ratio": 1.9},
        "memory": {"images": 50, "early_mb": 100.0, "late_mb": 101.0, "ratio": 1.01},
    }
    text = batch.page(found)
    assert "| two processes | 9 | 4 | 2 | 0 | 0 | 0 | 0 | 0 |" in text
    assert "| ratio | 1.9 |" in text
    assert "over 50 images" in text


def test_a_small_run_with_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--parts", "kills", "--items", "24", "--kills", "2", "--drivers", "1", "--size", "64x64", "--steps", "4"]
    assert batch.main([*words, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "batch.json").read_text())["kills"]
    assert (found["files"], found["runs"]) == (24, 2)
    assert found["killed"] >= 1
    assert "two processes" in (tmp_path / "batch.md").read_text()
    assert "two processes" in capsys.readouterr().out
