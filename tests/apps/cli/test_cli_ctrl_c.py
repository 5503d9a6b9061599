"""Ctrl-C in `mrflow generate`."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from cli_tools import SMALL, pixels, watch_network

from mrflow_sched.apps.cli.main import main
from mrflow_sched.images.files import read_png_text
from mrflow_sched.images.record import RunRecord


def press_at(monkeypatch: pytest.MonkeyPatch, forward: int, presses: int = 1) -> None:
    """Press Ctrl-C while the network makes its `forward`-th evaluation."""

    def press(number: int) -> None:
        for _ in range(presses if number == forward else 0):
            signal.raise_signal(signal.SIGINT)

    watch_network(monkeypatch, press)


def test_ctrl_c_keeps_the_best_picture_so_far(mrflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        press_at(patch, forward=2)
        code, out, err = mrflow("generate", "a star", *SMALL, "--out", str(tmp_path), "--json")
    assert code == 130
    assert "Stopped; the best image so far is" in err
    [path] = json.loads(out)["images"]
    assert path.endswith("mrflow-0-unfinished.png")
    assert pixels(path).shape == (16, 16, 3)
    assert RunRecord.from_json(read_png_text(path)["mrflow"]).unfinished
    assert signal.getsignal(signal.SIGINT) is before
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


def test_off_the_main_thread_no_signal_is_touched(tiny_folder: Path, tmp_path: Path) -> None:
    codes: list[int] = []
    words = ["generate", "a star", *SMALL, "--out", str(tmp_path), "--model", str(tiny_folder)]
    thread = threading.Thread(target=lambda: codes.append(main(words)))
    thread.start()
    thread.join()
    assert codes == [0]
