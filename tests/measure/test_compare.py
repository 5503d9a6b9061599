"""What `compare` measures: the two plans, the runs that count, and all files or none."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mrflow_sched._runtime.errors import FileError, MissingFileError, MrFlowError
from mrflow_sched.engines.analytic import GaussianFieldEngine
from mrflow_sched.images.files import read_text, save_png
from mrflow_sched.measure.compare import compare, native_plan_of, shortest
from mrflow_sched.measure.runs import Comparison, Part, Run
from mrflow_sched.plan.make import make_native_plan, make_plan
from mrflow_sched.sampler import StagedResult


def field() -> GaussianFieldEngine:
    """The exact engine under the embedded model's name, for its plans."""
    return GaussianFieldEngine(family=replace(GaussianFieldEngine().family, name="demo"))


def test_the_native_plan_shares_size_solver_guidance_and_seed() -> None:
    staged = make_plan("demo", 256, 192, "12+1", solver="heun", guidance=2.5, seed=4)
    native = native_plan_of(staged)
    [stage] = native.stages
    assert (native.width, native.height, stage.solver, stage.guidance, native.seed) == (256, 192, "heun", 2.5, 4)
    assert stage.steps == staged.native_steps == 50


@pytest.mark.parametrize("refine_steps", [0, 1, 3])
def test_the_warm_up_has_the_same_sizes_and_one_step_each(refine_steps: int) -> None:
    plan = make_plan("demo", 256, 192, refine_steps=refine_steps)
    short = shortest(plan)
    assert [(s.width, s.height, s.solver) for s in short.stages] == [(s.width, s.height, s.solver) for s in plan.stages]
    assert [s.steps for s in short.stages] == [1, min(1, refine_steps)]
    assert short.stages[-1].start_sigma == plan.stages[-1].start_sigma


def a_run(name: str, *parts: tuple[str, float], peak: int = 100) -> Run:
    seconds = sum(part[1] for part in parts)
    return Run(name, f"{name}, 5 steps", "32x32", seconds, tuple(Part(*part) for part in parts), peak, Path(name))


NATIVE = a_run("native", ("text", 0.5), ("stage 1 sample", 9.0), ("stage 1 decode", 0.4), ("save", 0.1))
STAGED = a_run(
    "staged",
    *(("text", 0.5), ("stage 1 sample", 0.5), ("stage 1 decode", 0.25), ("upscale", 0.25), ("encode", 0.1)),
    *(("noise", 0.0), ("stage 2 sample", 0.25), ("stage 2 decode", 0.1), ("save", 0.05)),
    peak=110,
)


def test_the_figures_follow_from_the_seconds() -> None:
    found = Comparison(NATIVE, STAGED, Path("sheet"), 1, make_plan("demo", 256, 256))
    assert found.speedup == pytest.approx(5.0)
    assert found.overhead_share == pytest.approx(1.25 / 2.0)
    assert found.peak_memory_ratio == pytest.approx(1.1)
    assert json.loads(json.dumps(found.to_dict()))["stages"][3] == {"name": "upscale", "seconds": 0.25}


def test_compare_from_python_saves_without_a_record(tiny_engine: Any, tmp_path: Path) -> None:
    plan = make_plan("demo", 32, 32, low_steps=2, solver="euler")
    with pytest.raises(MrFlowError, match="repeats is 0; give 1 or more"):
        compare(tiny_engine, "a star", plan, tmp_path, repeats=0)
    found = compare(tiny_engine, "a star", plan, tmp_path, native_plan=native_plan_of(plan, 2))
    assert found.sheet == tmp_path / "compare.png"
    with Image.open(found.staged.path) as picture:
        assert picture.size == (32, 32)
        assert picture.info == {}
    assert found.staged.detail == "16x16 then 32x32, euler, sigma 0.6, 3 forwards"
    assert found.native.title == "native, 2 steps"


@pytest.mark.parametrize(("repeats", "native", "staged"), [(3, 5.0, 3.0), (4, 5.0, 3.0), (1, 5.0, 1.0)])
def test_the_run_of_median_time_counts(
    repeats: int, native: float, staged: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of our own, which moves only while an image is saved; of an even number the faster middle one."""
    now = [0.0]
    seconds = {"native.png": [100.0, 5.0, 2.0, 8.0, 9.0], "staged.png": [100.0, 1.0, 9.0, 3.0, 4.0]}
    taken = {name: iter(values) for name, values in seconds.items()}

    def save(result: StagedResult, path: Path) -> None:
        save_png(path, result.images[0])
        now[0] += next(taken[path.name])

    plan = make_plan("demo", 32, 32, low_steps=2)
    engine = field()
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now[0])
        found = compare(engine, "", plan, tmp_path, native_plan=native_plan_of(plan, 2), save=save, repeats=repeats)
    assert (found.native.seconds, found.staged.seconds) == (native, staged)


def test_the_sheet_keeps_the_prompt_as_text(tmp_path: Path) -> None:
    plan = make_plan("demo", 32, 32, low_steps=2)
    found = compare(field(), "海港の夜明け", plan, tmp_path, native_plan=native_plan_of(plan, 2))
    assert read_text(found.sheet) == {"prompt": "海港の夜明け"}


def test_an_engine_of_its_own_family_needs_no_native_plan(tmp_path: Path) -> None:
    engine = GaussianFieldEngine()
    plan = make_plan(engine.family, 32, 32, low_steps=2, solver="euler", seed_rule="hash", posterior="sample")
    found = compare(engine, "", plan, tmp_path)
    assert found.native.title == "native, 50 steps"
    native = native_plan_of(plan, family=engine.family)
    assert (native.family, native.seed_rule, native.posterior) == ("analytic", "hash", "sample")


def test_the_native_plan_keeps_the_shift_of_its_own_size() -> None:
    plan = make_plan("demo", 256, 256, mu=0.1)
    assert native_plan_of(plan).stages[0].mu == make_native_plan("demo", 256, 256).stages[0].mu


def test_the_warm_up_saves_too_and_leaves_nothing_beside_the_pictures(tmp_path: Path) -> None:
    plan = make_plan("demo", 32, 32, low_steps=2)
    saved: list[tuple[int, str]] = []

    def save(result: StagedResult, path: Path) -> None:
        saved.append((result.plan.stages[0].steps, path.name))
        save_png(path, result.images[0])

    engine = field()
    found = compare(engine, "", plan, tmp_path, native_plan=native_plan_of(plan, 3), save=save)
    assert saved == [(1, "native.png"), (1, "staged.png"), (3, "native.png"), (2, "staged.png")]
    assert {path.name for path in tmp_path.iterdir()} == {"native.png", "staged.png", "compare.png"}
    assert all(path.parent == tmp_path for path in (found.native.path, found.staged.path, found.sheet))


PICTURES = ("native.png", "staged.png", "compare.png")


@pytest.mark.parametrize("older", [PICTURES, ("staged.png",)])
@pytest.mark.parametrize(
    ("where", "error"),
    [("staged run", KeyboardInterrupt()), ("sheet", MemoryError()), ("second move", PermissionError())],
)
def test_a_broken_comparison_leaves_the_folder_as_it_was(
    where: str, error: BaseException, older: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in older:
        (tmp_path / name).write_bytes(b"older")
    plan = make_plan("demo", 32, 32, low_steps=2)
    usual = os.replace

    def save(result: StagedResult, path: Path) -> None:
        if where == "staged run" and result.plan.stages[0].steps == 2:
            raise error
        save_png(path, result.images[0])

    def fail(*_: object) -> None:
        raise error

    def move(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "staged.png" and Path(source).read_bytes() != b"older":
            raise error
        usual(source, target)

    small = Image.new("RGB", (8, 8))
    drawing = fail if where == "sheet" else lambda *_: small
    monkeypatch.setattr("mrflow_sched.measure.compare.draw_sheet", drawing)
    if where == "second move":
        monkeypatch.setattr(os, "replace", move)
    with pytest.raises(FileError if where == "second move" else type(error)):
        compare(field(), "", plan, tmp_path, native_plan=native_plan_of(plan, 3), save=save)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(older, b"older")


@pytest.mark.parametrize("place", ["mkdtemp", "fsync", "replace"])
def test_a_full_disk_is_told_of_the_folder_and_not_of_a_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / ".mrflow-draft"))

    engine = GaussianFieldEngine()
    (tmp_path / "native.png").write_bytes(b"older")
    monkeypatch.setattr(tempfile if place == "mkdtemp" else os, place, full)
    with pytest.raises(FileError) as caught:
        compare(engine, "a", make_plan(engine.family, 32, 32, low_steps=2), tmp_path)
    assert str(caught.value) == (
        f"the images of the comparison cannot be written into {str(tmp_path)!r}: No space left on device; "
        "what was there is unchanged."
    )
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]


def test_a_folder_that_cannot_take_the_pictures_is_refused_before_the_run(tmp_path: Path) -> None:
    plan = make_plan("demo", 32, 32, guidance=1.0)
    with pytest.raises(MissingFileError, match="does not exist; make it first"):
        compare(field(), "", plan, tmp_path / "none")
    (tmp_path / "staged.png").mkdir()
    with pytest.raises(FileError, match=r"staged\.png.*a folder has that name"):
        compare(field(), "", plan, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["staged.png"]
