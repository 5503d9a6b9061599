"""The reliability bench: it tells good from bad, and a small share of each of its groups."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")
if not hasattr(os, "fork"):
    pytest.skip("the bench forks its cases", allow_module_level=True)

from bench.reliability import faults, folders, fuzz, images, parallel, report, signals, upscalers
from bench.reliability.__main__ import main
from bench.reliability.runner import (
    CONTROL,
    ENDING,
    EXECUTED,
    LOST,
    MEMORY,
    MIB,
    OWNER,
    ROOT,
    SILENT,
    SLACK,
    TIME,
    TRACEBACK,
    WRONG,
    Bench,
    Case,
    Outcome,
    Tally,
    common_faults,
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("bench"), sys.executable, ROOT, 3, quick=True)
    yield made
    made.close()


def outcome(**values: Any) -> Outcome:
    return Outcome(**{"code": 0, "signal": None, "killed": None, "seconds": 0.1, "peak": 0, "text": "", **values})


@pytest.mark.parametrize(
    ("ended", "kinds"),
    [
        ({}, []),
        ({"peak": SLACK + 20}, []),
        ({"peak": SLACK + 21}, [MEMORY]),
        ({"killed": "memory", "signal": 9}, [MEMORY]),
        ({"killed": "time", "signal": 9}, [TIME]),
        ({"executed": True}, [EXECUTED]),
        ({"signal": 11}, [ENDING]),
        ({"text": "Traceback (most recent call last)"}, [TRACEBACK]),
        ({"text": "a\x1b[31m"}, [CONTROL]),
        ({"text": "a\x9b31m"}, [CONTROL]),
        ({"text": "a bar\rof\tprogress\n"}, []),
        ({"error": "KeyError", "text": "Traceback (most recent call last)"}, [TRACEBACK]),
        ({"error": "MrFlowError", "refusal": True, "message": "no", "text": "Traceback (most recent call last)"}, []),
        ({"error": "MrFlowError", "refusal": True, "message": "x" * 5000}, [TRACEBACK]),
        ({"error": "MrFlowError", "refusal": True, "message": "\x07"}, [CONTROL]),
    ],
)
def test_each_kind_of_fault_is_told_from_its_opposite(ended: dict[str, Any], kinds: list[str]) -> None:
    assert common_faults(Case("", "", {}, need=10), outcome(**ended)) == kinds


def test_bad_subjects_are_counted(bench: Bench, tmp_path: Path) -> None:
    files = upscalers.Files(tmp_path / "files", bench.mark)
    payloads = dict(upscalers.payloads(files))
    bomb = upscalers.zip_bomb(files, "a/unused", 24)
    known = [
        (Case("", "bad_torch_load", {"path": str(payloads["open, zip"])}), [EXECUTED]),
        (Case("", "bad_unpack", {"path": str(bomb)}), [MEMORY]),
        (Case("", "bad_wait", {}, seconds=0.3), [TIME]),
        (Case("", "good_nothing", {}), []),
    ]
    assert [[kind for kind in common_faults(case, bench.one(case)) if kind in kinds] for case, kinds in known] == [
        kinds for _, kinds in known
    ]
    good = ["open, zip", "eval, legacy", "opcode inst, raw", "payload in tar", "TorchScript"]
    cases = [Case(name, "upscaler", {"path": str(payloads[name])}) for name in good]
    assert {case.name: common_faults(case, bench.one(case)) for case in cases} == {name: [] for name in good}


def test_a_folder_with_python_runs_nothing(bench: Bench, tmp_path: Path) -> None:
    import shutil

    from mrflow_sched import demo

    changes = dict(folders.code_in_folders(bench.mark))
    bad: list[bool] = []
    for number, name in enumerate(["StableDiffusion3Pipeline: None.py", "FluxPipeline: vae/evil.py"]):
        folder = Path(shutil.copytree(demo.weights_path(), tmp_path / str(number)))
        changes[name](folder)
        bad.append(EXECUTED in common_faults(case := Case("", "bad_folder", {"path": str(folder)}), bench.one(case)))
        case = Case(name, "command", {"arguments": ["doctor", "--model", str(folder)]}, need=100 * MIB)
        assert EXECUTED not in common_faults(case, bench.one(case))
    assert bad[0]


def test_faults_of_a_run_are_judged(bench: Bench, tmp_path: Path) -> None:
    blamed = outcome(value=2, text="mrflow: the upscaler x2 gave values that are not finite.")
    assert faults.judge_command(blamed, "network", 3, "NaN", tmp_path) == [LOST, OWNER]
    assert faults.judge_command(blamed, "upscaler", 1, "NaN", tmp_path) == [LOST]
    owned = outcome(value=2, text="mrflow: the network gave NaN in stage 1; try --dtype float32.")
    assert faults.judge_command(owned, "network", 1, "NaN", tmp_path) == []
    assert faults.judge_result(outcome(value={"flat": True, "unfinished": False, "warnings": []})) == [SILENT]
    assert faults.judge_result(outcome(value={"flat": True, "unfinished": True, "warnings": ["NaN"]})) == []
    assert faults.judge_callback(outcome(error="KeyError"), "KeyError") == []
    assert faults.judge_callback(outcome(value={}), "MemoryError") == [OWNER]
    arguments = {"part": "decode", "call": 2, "fault": "CUDA", "out": str(tmp_path / "out"), "more": []}
    case = Case("", "injected.command", arguments, need=200 * MIB)
    ended = bench.one(case)
    assert common_faults(case, ended) + faults.judge_command(ended, "decode", 2, "CUDA", tmp_path / "out") == []


def test_a_saver_that_looks_and_writes_later_loses_images(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "meeting").mkdir()
    arguments = {"out": str(tmp_path / "out"), "meeting": str(tmp_path / "meeting"), "copies": parallel.COPIES}
    bench.run(Case("", "injected.bad_together", arguments, copies=parallel.COPIES))
    assert len(list((tmp_path / "out").iterdir())) < parallel.COPIES


@pytest.mark.parametrize(
    ("code", "files", "text", "kinds"),
    [
        (130, [], "Stopped.", []),
        (143, [], "", [ENDING]),
        (-2, [], "Traceback (most recent call last)", [ENDING, TRACEBACK]),
        (0, ["mrflow-7.png"], "", []),
        (0, [], "", [LOST]),
        (130, [], "upscale", [LOST]),
        (130, ["mrflow-7-unfinished.png"], "upscale", []),
        (130, [".half.tmp"], "", [WRONG]),
        (None, [], "", [TIME]),
    ],
)
def test_endings_are_judged(tmp_path: Path, code: int | None, files: list[str], text: str, kinds: list[str]) -> None:
    from PIL import Image

    for name in files:
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    out = tmp_path if files else tmp_path / "none"
    assert signals.judge(signals.Ending(code, text, 1.0), out, signal.SIGINT, 1) == kinds


def test_wild_values_are_drawn_alike_for_a_seed_and_only_refused(bench: Bench, tmp_path: Path) -> None:
    import pickle

    values = fuzz.draw(fuzz.DOORS["command line"], 30, 5)
    assert values == fuzz.draw(fuzz.DOORS["command line"], 30, 5) != fuzz.draw(fuzz.DOORS["command line"], 30, 6)
    path = tmp_path / "values.pickle"
    path.write_bytes(pickle.dumps([["plan", "--family", "demo"], ["plan", "--mu", "\x1b"], ["plan", "--steps"]]))
    lines = bench.one(Case("", "doors.try_all", {"door": "command line", "path": str(path)}))
    assert lines.value == []
    path.write_bytes(pickle.dumps([0, 1]))
    assert len(bench.one(Case("", "doors.try_all", {"door": "known bad", "path": str(path)})).value) == 1


def test_an_image_is_read_as_a_viewer_shows_it(bench: Bench, tmp_path: Path) -> None:
    cases = {name: (path, mean) for name, path, mean in images.modes(tmp_path)}
    for name in ("RGB as png", "CMYK as jpg", "P as png"):
        path, mean = cases[name]
        assert bench.one(Case(name, "reader", {"path": str(path)})).value[0] == pytest.approx(mean, abs=0.05)


def test_the_table_has_a_column_a_version(tmp_path: Path) -> None:
    before, now = Tally(20000, {TRACEBACK: 3, EXECUTED: 1}, [], True), Tally(20000, {}, [], True)
    versions = {"torch": "2"}
    report.add(tmp_path / "r.json", "before", {"files": report.entry(before, 16, versions, quick=False)})
    columns = report.add(tmp_path / "r.json", "now", {"files": report.entry(now, 16, versions, quick=True)})
    text = report.table_of(columns)
    assert "| files | 20,000, executed 1, traceback 3 | 20,000, none | yes |" in text
    assert text.endswith("Seed 16; torch 2. Some groups are short runs (`--quick`).")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- reliability -->\nold\n<!-- end -->\nb\n")
    report.write_page(page, text)
    assert page.read_text() == f"a\n<!-- reliability -->\n{text}\n<!-- end -->\nb\n"


@pytest.mark.parametrize("words", [["--page", "x.md"], ["nothing"], ["--checkout", "/nowhere"]])
def test_options_that_do_not_fit_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert "error: " in capsys.readouterr().err
