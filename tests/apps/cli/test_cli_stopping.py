"""Ctrl-C, SIGTERM and SIGHUP: what is kept, what is left, and the exit code."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_tools import SIGNALS, SMALL, pixels, watch_network

from mrflow_sched.apps.cli import load
from mrflow_sched.apps.cli.main import main
from mrflow_sched.apps.cli.stopping import Stop, Stopped, current, watching
from mrflow_sched.images.files import read_text
from mrflow_sched.images.record import RunRecord


def press_at(
    monkeypatch: pytest.MonkeyPatch, forward: int, presses: int = 1, number: signal.Signals = signal.SIGINT
) -> None:
    """Send a signal while the network makes its `forward`-th evaluation."""

    def press(count: int) -> None:
        for _ in range(presses if count == forward else 0):
            signal.raise_signal(number)

    watch_network(monkeypatch, press)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_keeps_the_best_picture_so_far(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS], sys.unraisablehook
    with monkeypatch.context() as patch:
        press_at(patch, forward=2, number=number, presses=1 if number == signal.SIGINT else 3)
        code, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path), "--json")
    assert code == 128 + number
    found = json.loads(out)
    assert found["error"].startswith("Stopped; the best image so far is")
    assert f"mrflow: {found['error']}\n" in err
    assert (found["cancelled"], found["unfinished"], found["details"][0]["unfinished"]) == (True, True, True)
    [path] = found["images"]
    assert path.endswith("mrflow-0-unfinished.png")
    assert pixels(path).shape == (16, 16, 3)
    assert RunRecord.from_json(read_text(path)["mrflow"]).unfinished
    assert before == ([signal.getsignal(each) for each in SIGNALS], sys.unraisablehook)
    code, out, err = mrflow("generate", "--from", path, "--out", str(tmp_path))
    assert code == 0
    assert "now completed" in err
    assert pixels(out.strip()).shape == (32, 32, 3)


def test_a_second_ctrl_c_stops_at_once(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    press_at(monkeypatch, forward=2, presses=2)
    code, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path / "o"))
    assert (code, out) == (130, "")
    assert "Stopped." in err
    assert not (tmp_path / "o").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_where_nothing_was_made_yet_no_grey_picture_is_saved(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

    usual = PipelineEngine.encode_text

    def encode_text(*given: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return usual(*given, **named)

    monkeypatch.setattr(PipelineEngine, "encode_text", encode_text)
    code, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path / "o"), "--json")
    assert code == 143
    assert json.loads(out)["images"] == []
    assert json.loads(out)["cancelled"] is True
    assert err.splitlines()[-1] == "mrflow: Stopped."
    assert not (tmp_path / "o").exists()


def test_off_the_main_thread_no_signal_is_touched(tiny_folder: Path, tmp_path: Path) -> None:
    codes: list[int] = []
    words = ["generate", "a star", *SMALL, "--out", str(tmp_path), "--model", str(tiny_folder)]
    thread = threading.Thread(target=lambda: codes.append(main(words)))
    thread.start()
    thread.join()
    assert codes == [0]


def strike(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: signal.Signals, presses: int = 1) -> None:
    """Send a signal, once, when `owner.name` is called."""
    usual: Callable[..., Any] = getattr(owner, name)
    left = [presses]

    def struck(*given: Any, **named: Any) -> Any:
        while left[0]:
            left[0] -= 1
            signal.raise_signal(number)
        return usual(*given, **named)

    monkeypatch.setattr(owner, name, struck)


@pytest.mark.parametrize("place", ["fsync", "link", "unlink"])
@pytest.mark.parametrize("presses", [1, 2])
def test_a_press_while_saving_loses_no_finished_picture(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, presses: int
) -> None:
    words = ("a star", *SMALL, "--batch", "3", "--out", str(tmp_path / "o"), "--json")
    with monkeypatch.context() as patch:
        strike(patch, Path if place == "unlink" else os, place, signal.SIGINT, presses)
        code, out, err = mrflow("generate", *words)
    assert code == 130
    found = json.loads(out)
    kept = ["mrflow-0.png", "mrflow-1.png", "mrflow-2.png"] if presses == 1 else ["mrflow-0.png"]
    assert names(tmp_path / "o") == kept == [Path(path).name for path in found["images"]]
    assert (found["cancelled"], found["unfinished"]) == (True, False)
    assert all(pixels(path).shape == (32, 32, 3) for path in found["images"])
    assert "what was finished is saved" in err


def test_a_press_in_the_last_decode_keeps_the_finished_picture(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

    usual = PipelineEngine.decode

    def decode(self: Any, latents: Any) -> Any:
        if latents.shape[-1] == 8:
            signal.raise_signal(signal.SIGINT)
        return usual(self, latents)

    monkeypatch.setattr(PipelineEngine, "decode", decode)
    code, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path / "o"))
    assert code == 130
    assert out == f"{tmp_path / 'o' / 'mrflow-0.png'}\n"
    assert "what was finished is saved" in err


def test_a_press_that_a_library_swallows_is_not_lost(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    loading = load.open_upscaler

    def open_upscaler(*given: Any) -> Any:
        Dying()
        gc.collect()
        return loading(*given)

    monkeypatch.setattr(load, "open_upscaler", open_upscaler)
    code, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path / "o"))
    assert (code, out, err) == (143, "", "mrflow: Stopped.\n")
    assert not (tmp_path / "o").exists()


def test_a_press_that_a_library_turns_into_its_own_error_is_a_stop(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_engine(*_given: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException as error:
            raise ImportError("numpy cannot be imported") from error

    monkeypatch.setattr(load, "load_engine", load_engine)
    code, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path / "o"))
    assert (code, out, err) == (130, "", "mrflow: Stopped.\n")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_compare_leaves_the_folder_as_it_was(
    mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    (tmp_path / "native.png").write_bytes(b"mine")
    press_at(monkeypatch, forward=5, number=number, presses=2)
    code, out, err = mrflow("compare", "a star", *SMALL, "--steps", "2", "--out", str(tmp_path), "--json")
    assert (code, json.loads(out)) == (128 + number, {"error": "Stopped."})
    assert err.splitlines()[-1] == "mrflow: Stopped."
    assert names(tmp_path) == ["native.png"]
    assert (tmp_path / "native.png").read_bytes() == b"mine"


def test_a_stop_raises_once_and_not_again_while_files_are_removed() -> None:
    stop = Stop()
    with pytest.raises(Stopped):
        stop.press(signal.SIGTERM, None)
    stop.press(signal.SIGINT, None)
    with pytest.raises(Stopped):
        stop.check()
    assert stop.finish(0) == 143
    stop.press(signal.SIGINT, None)


def test_what_the_process_was_told_to_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with watching() as stop, watching() as inner:
            assert inner is stop is current()
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
            assert not stop.requested
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process at once")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_at_any_moment_ends_a_process_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """From the first import on; the moment is another one in every run of this test."""
    moment = random.uniform(0.05, 4.0)
    words = ["generate", "a blue star", "--size", "64x64", "--low-steps", "2", "--out", str(tmp_path / "o"), "--json"]
    begin = "print(end=' ', file=sys.stderr, flush=True)"
    code = f"import sys; from mrflow_sched.__main__ import main; {begin}; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    process.stderr.read(1)  # Python itself has started
    time.sleep(moment)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode in (128 + number, 0), (moment, err)
    assert "Traceback" not in err, moment
    assert "ignored" not in err, moment
    kept = [] if not out else [Path(path).name for path in json.loads(out).get("images", ())]
    assert names(tmp_path / "o") == kept, moment
    assert (tmp_path / "o").exists() == bool(kept), moment
