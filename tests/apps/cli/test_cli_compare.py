"""`mrflow compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import SMALL, pixels

from mrflow_sched.apps.cli.main import main
from mrflow_sched.images.files import load_image, read_text, save_png
from mrflow_sched.images.record import RunRecord
from mrflow_sched.plan.stages import StagedPlan


def test_compare_measures_both_and_draws_them(mrflow: Any, tmp_path: Path) -> None:
    words = (*SMALL, "--steps", "4", "--repeats", "2", "--out", str(tmp_path))
    code, out, err = mrflow("compare", "a red star", *words, "--json", "--progress")
    found = json.loads(out)
    assert code == 0
    assert "warm-up, native" in err
    assert err.count("with Lanczos") == 1
    wanted = {"native_seconds", "staged_seconds", "speedup", "overhead_share", "peak_memory_ratio", "stages"}
    assert wanted | {"native", "staged", "sheet"} <= set(found)
    assert found["speedup"] == pytest.approx(found["native_seconds"] / found["staged_seconds"])
    parts = {part["name"]: part["seconds"] for part in found["stages"]}
    assert next(iter(parts)) == "text"
    assert list(parts)[-1] == "save"
    assert 0.9 * found["staged_seconds"] <= sum(parts.values()) <= found["staged_seconds"] * 1.001
    network = parts["stage 1 sample"] + parts["stage 2 sample"]
    assert found["overhead_share"] == pytest.approx(1 - network / found["staged_seconds"])
    assert found["peak_memory_ratio"] == found["staged_peak_bytes"] / found["native_peak_bytes"]
    assert 0.5 < found["peak_memory_ratio"] < 2
    assert (found["warmup"], found["repeats"]) == (True, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.png", "native.png", "staged.png"]
    assert pixels(found["native"]).shape == pixels(found["staged"]).shape == (32, 32, 3)
    sheet = pixels(found["sheet"])
    assert sheet.shape[1] > 1000
    record = RunRecord.from_json(read_text(found["native"])["mrflow"])
    plan = StagedPlan.from_string(record.plan)
    assert [(stage.steps, stage.solver) for stage in plan.stages] == [(4, "euler")]


def test_compare_in_words_and_its_pictures_repeat(mrflow: Any, tmp_path: Path) -> None:
    words = (*SMALL, "--steps", "2", "--solver", "heun", "--negative", "blur")
    code, out, err = mrflow("compare", "a red star", *words, "--out", str(tmp_path))
    assert code == 0
    assert "has no negative prompt" in err
    assert "Both ways use the solver heun, as native pipelines do; mrflow generate uses multistep" in err
    assert RunRecord.from_json(read_text(tmp_path / "staged.png")["mrflow"]).negative == "blur"
    assert "x as fast" in out
    assert f"image: {tmp_path / 'compare.png'}" in out
    code, out, _ = mrflow("generate", "--from", str(tmp_path / "staged.png"), "--out", str(tmp_path / "again"))
    assert code == 0
    assert np.array_equal(pixels(tmp_path / "staged.png"), pixels(out.strip()))


def test_the_native_image_has_no_upscaler_and_repeats_without_a_warning(tmp_path: Path, capsys: Any) -> None:
    words = ("a red star", *SMALL, "--steps", "2", "--out", str(tmp_path))
    assert main(["compare", *words]) == 0
    text = read_text(tmp_path / "native.png")["mrflow"]
    record = RunRecord.from_json(text)
    assert (record.upscaler, record.upscaler_sha256, record.dtype_of("upscaler")) == ("none", None, None)
    older = json.loads(text)
    older["dtypes"]["upscaler"] = "bfloat16"  # as it was recorded once
    save_png(tmp_path / "older.png", load_image(tmp_path / "native.png"), {"mrflow": json.dumps(older)})
    for name in ("native.png", "older.png"):
        capsys.readouterr()
        assert main(["generate", "--from", str(tmp_path / name), "--out", str(tmp_path / "again")]) == 0
        out, err = capsys.readouterr()
        assert "may differ" not in err
        assert np.array_equal(pixels(tmp_path / "native.png"), pixels(out.strip()))
