"""Tables of prompts: four formats, the same rows; what is wrong is told with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.batch.table import read_table

COLUMNS = ("prompt", "negative", "seed", "size", "lora", "guidance", "refine_prompt", "native")


def read(path: Path) -> Any:
    return read_table(path, COLUMNS, longest=100)


def test_a_text_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf# mine\r\na red circle\r\n\r\n  a blue star, at night \n")
    assert [(row.line, dict(row.values)) for row in read(path).rows] == [
        (2, {"prompt": "a red circle"}),
        (4, {"prompt": "a blue star, at night"}),
    ]


def test_the_formats_agree(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a, b", "seed": 3, "size": [64, 32], "lora": ["x.safetensors", "y.safetensors:0.5"]},
        {"prompt": 'c "d"', "negative": "e", "guidance": 3.5, "native": True},
    ]
    lines = tmp_path / "t.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    table = tmp_path / "t.csv"
    table.write_text(
        "Prompt,Negative,seed,size,lora,guidance,native\n"
        '"a, b",,3,64x32,x.safetensors;y.safetensors:0.5,,\n'
        '"c ""d""",e,,,,3.5,true\n'
    )
    wanted = [
        {"prompt": "a, b", "seed": "3", "size": "64x32", "lora": "x.safetensors;y.safetensors:0.5"},
        {"prompt": 'c "d"', "negative": "e", "guidance": "3.5", "native": "true"},
    ]
    assert [dict(row.values) for row in read(lines).rows] == wanted
    assert [dict(row.values) for row in read(table).rows] == wanted


def test_parquet_is_read_where_pyarrow_is(tmp_path: Path) -> None:
    pyarrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    columns = {"prompt": ["a", "b"], "seed": [1, None], "refine-prompt": [None, "c"], "score": [0.5, 0.25]}
    parquet.write_table(pyarrow.table(columns), path)
    found = read(path)
    assert [dict(row.values) for row in found.rows] == [
        {"prompt": "a", "seed": "1"},
        {"prompt": "b", "refine_prompt": "c"},
    ]
    assert found.ignored == ("score",)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(MrFlowError, match="no readable Parquet file"):
        read(path)


def test_parquet_without_pyarrow_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrflow_sched.batch.table.find_spec", lambda name: None)
    with pytest.raises(MrFlowError, match="Parquet needs pyarrow"):
        read(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("t.jsonl", '{"prompt": "a"}\n{"prompt": }', "line 2 of .* is not JSON"),
        ("t.jsonl", "[1]", "line 1 of .* is no object"),
        ("t.jsonl", '{"prompt": {"a": 1}}', "line 1 of .* has prompt = "),
        ("t.jsonl", '{"prompt": "a"}\n{"seed": 3}', "line 2 of .* has no prompt"),
        ("t.jsonl", '{"prompt": "a\\u0007"}', "line 1 of .* has control characters in prompt"),
        ("t.jsonl", '{"prompt": "a", "negativ": "b"}', "column 'negativ'; did you mean negative"),
        ("t.jsonl", '{"prompt": "a", "Prompt": "b"}', "line 1 of .* has the column prompt twice"),
        ("t.csv", "text,seed\na,3\n", "names no column prompt"),
        ("t.csv", "prompt,seed\na,b,3\n", "line 2 of .* has 3 cells for 2 columns"),
        ("t.csv", 'prompt\n"a\n', "line 2 of .* is not CSV"),
        ("t.txt", "# nothing\n", "holds no prompt"),
        ("t.txt", "x" * 101, "line 1 of .* has a prompt of more than 100 letters"),
        ("t.json", "", "give a file that ends in .txt, .jsonl, .csv or .parquet"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(MrFlowError, match=sentence):
        read(path)


def test_bytes_that_are_no_text_are_told(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"a\nb\n\xff\n")
    with pytest.raises(MrFlowError, match=r"line 3 of .* is not UTF-8"):
        read(path)
    with pytest.raises(MrFlowError, match="does not exist"):
        read(tmp_path / "none.txt")
