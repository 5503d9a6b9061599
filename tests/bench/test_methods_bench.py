"""The benchmark of sparse methods and of fewer bits, in small."""

from __future__ import annotations

from typing import Any

import pytest

from bench.methods import __main__ as command
from bench.methods import jit, precision, sparse, step
from bench.quality.kinds import FIRST_SEED, scenes_of
from mrflow_sched import demo, load_upscaler


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, Any]:
    return demo.load_engine(device="cpu"), load_upscaler(demo.upscaler_path()), scenes_of(1)[:1]


def test_a_better_choice_of_tokens_keeps_more(parts: tuple[Any, Any, Any]) -> None:
    rows = sparse.measure(*parts, FIRST_SEED, 128, (0.45,))
    kept = {(row["way"], row["share"]): row["kept"] for row in rows}
    assert kept["random (known bad)", 0.5] < kept["detail", 0.5] < kept["detail, hard borders", 0.5] + 0.05
    assert kept["detail", 0.25] < kept["detail", 0.5] < kept["detail", 0.75] < 1.0
    assert kept["detail, the rest merged 2x2", 0.5] > kept["random (known bad)", 0.5]
    text = sparse.report(rows)
    assert kept["what dense changes, hard borders (ceiling)", 0.5] > kept["detail, hard borders", 0.5]
    assert "share 0.25" in text


def test_just_in_time_stands_beside_plain_sampling(parts: tuple[Any, Any, Any]) -> None:
    engine, _, scenes = parts
    rows = jit.measure(engine, scenes, FIRST_SEED, 64)
    near: dict[str, Any] = {row["way"]: row.get("psnr") for row in rows}
    assert near.pop("dense 30 (reference)") is None
    assert near["dense 2 (known bad)"] < near["dense 7"] < near["dense 12"]
    assert rows[0]["evaluations"] == 30
    assert "CPU s" in jit.report(rows)


def test_precisions_that_cannot_be_had_are_told(parts: tuple[Any, Any, Any]) -> None:
    pytest.importorskip("torchao")
    rows = precision.measure(*parts, FIRST_SEED, 64)
    made = {(row["precision"], row["stage"]): row for row in rows if "reason" not in row}
    near = {name: row["psnr"] for name, row in made.items()}
    assert near["own", "both"] == float("inf")
    assert near["int8", "refine"] > near["int8", "stage 1"] > near["own, 2 steps (known bad)", "stage 1"]
    assert made["int8", "both"]["bytes"] < 0.7 * made["own", "both"]["bytes"]
    text = precision.report(rows)
    assert "- precision int4 needs a CUDA GPU" in text


def test_a_whole_plan_is_counted_from_the_seconds_of_its_calls() -> None:
    seconds = {"low": 2.0, 1.0: 12.0, 0.5: 6.0}
    rows = [{"megapixels": "2", "share": share, "seconds": each} for share, each in seconds.items()]
    text = step.report(rows)
    assert "| 2 | 12.0 | 0.50 |" in text
    # 12 calls of 2 s and one of 12 s; with half of the tokens one of 6 s. Then the same with four calls.
    assert "| 2 | 12+1 | 36 | 0.33 | 0.83 |" in text
    assert "| 2 | 12+4 | 72 | 0.67 | 0.67 |" in text


def test_the_command_takes_parts_of_itself() -> None:
    with pytest.raises(SystemExit):
        command.main(["--parts", "nothing"])
