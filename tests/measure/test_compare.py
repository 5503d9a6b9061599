"""What `compare` measures with and draws: peak memory, the sheet, records, plans of the two ways."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mrflow_sched._runtime import peak as _memory
from mrflow_sched._runtime.peak import PeakMemory
from mrflow_sched.engines.analytic import GaussianFieldEngine
from mrflow_sched.images.files import save_png
from mrflow_sched.images.record import RunRecord, library_versions
from mrflow_sched.measure import sheet as _sheet
from mrflow_sched.measure.compare import compare, native_plan_of, shortest
from mrflow_sched.measure.runs import Comparison, Part, Run
from mrflow_sched.plan.make import make_native_plan, make_plan
from mrflow_sched.sampler import StagedResult

MEGABYTE = 1 << 20


def hold(megabytes: int) -> int:
    """Fill that much memory and let go of it."""
    return int(torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)[-1])


# --- peak memory


@pytest.mark.parametrize("kernel", [True, False])
def test_peak_memory_sees_what_was_held_and_freed(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(_memory, "_reset_high_water", lambda: False)
    peaks: list[int] = []
    for size in (200, 20, 200):
        with PeakMemory(torch.device("cpu")) as peak:
            for _ in range(3):
                hold(size)
        peaks.append(peak.bytes)
    for large in (peaks[0], peaks[2]):
        assert 120 * MEGABYTE < large - peaks[1] < 240 * MEGABYTE


def test_the_kernels_mark_is_used_only_where_it_moves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_memory, "_CLEAR", tmp_path / "none" / "clear_refs")
    assert not _memory._reset_high_water()
    monkeypatch.setattr(_memory, "_CLEAR", tmp_path / "clear_refs")
    monkeypatch.setattr(_memory, "_STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("VmHWM:   2000 kB\nVmRSS:   1000 kB\n")
    assert not _memory._reset_high_water()
    (tmp_path / "status").write_text("VmHWM:   1000 kB\nVmRSS:   1000 kB\n")
    assert _memory._reset_high_water()
    (tmp_path / "status").write_text("Name: x\n")
    assert not _memory._reset_high_water()


def test_cuda_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("max_memory_allocated", 7)):
        monkeypatch.setattr(torch.cuda, name, lambda _d, name=name, value=value: calls.append(name) or value)
    with PeakMemory(torch.device("cuda")) as peak:
        pass
    assert peak.bytes == 7
    assert calls == ["synchronize", "reset_peak_memory_stats", "max_memory_allocated"]


def test_systems_without_trimming_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory.sys, "platform", "win32")
    _memory.give_back()
    monkeypatch.setattr(_memory.sys, "platform", "linux")
    monkeypatch.setattr(_memory.ctypes, "CDLL", lambda _name: object())
    _memory.give_back()


# --- the two plans and the comparison


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
    with pytest.raises(ValueError, match="repeats is 0"):
        compare(tiny_engine, "a star", plan, tmp_path, repeats=0)
    found = compare(tiny_engine, "a star", plan, tmp_path, native_plan=native_plan_of(plan, 2))
    assert found.sheet == tmp_path / "compare.png"
    with Image.open(found.staged.path) as picture:
        assert picture.size == (32, 32)
        assert picture.info == {}
    assert found.staged.detail == "16x16 then 32x32, euler, sigma 0.12, 3 forwards"
    assert found.native.title == "native, 2 steps"


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

    engine = GaussianFieldEngine()
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
    monkeypatch.setattr(_sheet, "draw_sheet", fail if where == "sheet" else lambda *_: small)
    if where == "second move":
        monkeypatch.setattr(os, "replace", move)
    with pytest.raises(type(error)):
        compare(GaussianFieldEngine(), "", plan, tmp_path, native_plan=native_plan_of(plan, 3), save=save)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(older, b"older")


def test_a_folder_that_cannot_take_the_pictures_is_refused_before_the_run(tmp_path: Path) -> None:
    plan = make_plan("demo", 32, 32, guidance=1.0)
    with pytest.raises(FileNotFoundError, match="does not exist; make it first"):
        compare(GaussianFieldEngine(), "", plan, tmp_path / "none")
    (tmp_path / "staged.png").mkdir()
    with pytest.raises(IsADirectoryError, match=r"staged\.png.*a folder has that name"):
        compare(GaussianFieldEngine(), "", plan, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["staged.png"]


# --- the sheet


@pytest.mark.parametrize("size", [(32, 32), (256, 128), (640, 700)])
@pytest.mark.parametrize("prompt", ["a star", "星 über " * 60, "x" * 500])
def test_any_size_and_prompt_fit_on_the_sheet(size: tuple[int, int], prompt: str) -> None:
    pictures = [Image.new("RGB", size, colour) for colour in ((255, 0, 0), (0, 0, 255))]
    sheet = _sheet.draw_sheet(prompt, NATIVE, STAGED, pictures)
    factor = max(1, round(512 / size[0]))
    colours = {colour: count for count, colour in sheet.getcolors(1 << 24) or []}
    assert colours[(255, 0, 0)] == colours[(0, 0, 255)] == size[0] * size[1] * factor**2
    # Text and bars end before the sheet does: its right and bottom margins are paper.
    paper = {sheet.getpixel((sheet.width - 3, y)) for y in range(0, sheet.height, 3)}
    paper |= {sheet.getpixel((x, sheet.height - 3)) for x in range(0, sheet.width, 3)}
    assert paper == {_sheet._PAPER}


def test_a_word_without_end_is_cut_in_little_time() -> None:
    begin = time.perf_counter()
    sheet = _sheet.draw_sheet("x" * 100_000, NATIVE, STAGED, [Image.new("RGB", (32, 32))] * 2)
    assert time.perf_counter() - begin < 10
    assert sheet.size == _sheet.draw_sheet("x" * 500, NATIVE, STAGED, [Image.new("RGB", (32, 32))] * 2).size


def test_bars_are_as_long_as_the_seconds() -> None:
    pictures = [Image.new("RGB", (512, 8)) for _ in range(2)]
    sheet = _sheet.draw_sheet("a star", NATIVE, STAGED, pictures)
    widths = [
        sum(1 for x in range(sheet.width) if sheet.getpixel((x, y)) == _sheet._SAMPLING) for y in range(sheet.height)
    ]
    assert max(widths) > 500
    staged = [width for width in widths if 30 < width < 200]
    assert staged
    assert max(widths) / max(staged) == pytest.approx(9.0 / 0.75, rel=0.1)


def test_old_pillow_draws_with_its_small_font(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = _sheet.ImageFont.load_default
    small = usual(size=10)

    def old(*args: Any, **words: Any) -> Any:
        if words:
            raise TypeError("load_default() got an unexpected keyword argument 'size'")
        return small

    monkeypatch.setattr(_sheet.ImageFont, "load_default", old)
    assert _sheet.draw_sheet("a star", NATIVE, STAGED, [Image.new("RGB", (32, 32))] * 2).width > 1000


# --- records


RECORD = RunRecord(
    plan="p",
    prompt="a star",
    negative=None,
    seed=1,
    batch=2,
    image=1,
    model="m",
    model_fingerprint="f",
    upscaler="u",
    upscaler_sha256=None,
    device="cpu",
    dtype="float32",
    vae_dtype="float32",
    threads=2,
    versions={"torch": "2"},
)


@given(prompt=st.text(), negative=st.none() | st.text(), seed=st.integers(0, 2**63), unfinished=st.booleans())
def test_a_record_survives_its_json(prompt: str, negative: str | None, seed: int, unfinished: bool) -> None:
    from dataclasses import replace

    record = replace(RECORD, prompt=prompt, negative=negative, seed=seed, unfinished=unfinished)
    text = record.to_json()
    assert text.isascii()
    assert "\n" not in text
    assert RunRecord.from_json(text) == record


def test_newer_and_older_records_are_read() -> None:
    found = json.loads(RECORD.to_json())
    del found["unfinished"]
    assert RunRecord.from_json(json.dumps(found | {"added later": 1})) == RECORD


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": "1"}, {"seed": True}, {"versions": []}, {"prompt": None}, {"unfinished": 0}),
        *({"image": 2}, {"image": -1}, {"batch": 0}, {"batch": 10**9}),
    ],
)
def test_an_altered_record_is_refused(change: dict[str, Any]) -> None:
    text = json.dumps(json.loads(RECORD.to_json()) | change)
    with pytest.raises(ValueError, match=next(iter(change))):
        RunRecord.from_json(text)
    for other in ("{", "[]", "null", "[" * 200_000):
        with pytest.raises(ValueError, match="altered"):
            RunRecord.from_json(other)


def test_versions_name_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    from mrflow_sched.images import record

    monkeypatch.setattr(record, "_LIBRARIES", ("torch", "no-such-library"))
    found = library_versions()
    assert found["no-such-library"] == "absent"
    assert found["torch"][0].isdigit()
