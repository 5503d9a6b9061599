"""Ctrl-C, SIGTERM and SIGHUP at random moments of a real `mrflow generate`, from its first import to its exit."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from bench.reliability.runner import ENDING, LOST, TIME, TRACEBACK, WRONG, Bench, Tally

TITLE = "signals at random moments"

_BEGIN = "import runpy; print('begun', flush=True); runpy.run_module('mrflow_sched', None, '__main__', True)"
"""The clock starts where the package's first line is imported; nobody can answer for the interpreter's own start."""
_BAD = "import sys, time; print('begun', flush=True); open(sys.argv[-1] + '/.half.tmp', 'w'); time.sleep(9)"
"""Known to be bad: leaves a hidden file and a traceback."""

CODES = {signal.SIGINT: {130}, signal.SIGTERM: {143}, signal.SIGHUP: {129, 143}}
"""128 and the signal's number; a hang-up may also count as a request to end."""
_LIMIT = 120.0


@dataclass(frozen=True)
class Ending:
    """How a process ended after its signals: exit code (negative: killed by that signal), output, seconds."""

    code: int | None
    text: str
    seconds: float


def _start(bench: Bench, program: str, out: Path) -> subprocess.Popen[str]:
    size = ["--size", "64x64", "--low-steps", "6", "--dtype", "float32", "--seed", "7", "--progress"]
    words = ["generate", "a blue star over green hills", *size, "--out", str(out)]
    started = subprocess.Popen(
        [bench.python, "-c", program, *words],
        env=bench.environment,
        cwd=bench.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=_all_signals,
    )
    assert started.stdout is not None
    started.stdout.readline()
    return started


def _all_signals() -> None:
    """A process in the background or under nohup inherits that signals are ignored."""
    for number in CODES:
        signal.signal(number, signal.SIG_DFL)


def end(bench: Bench, program: str, out: Path, after: Sequence[float], number: signal.Signals) -> Ending:
    """Start a process, send it the signal after so many seconds each, and wait for its end."""
    process = _start(bench, program, out)
    began = time.monotonic()
    for moment in after:
        time.sleep(max(0.0, began + moment - time.monotonic()))
        process.send_signal(number)
    try:
        text, _ = process.communicate(timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        return Ending(None, text, _LIMIT)
    return Ending(process.returncode, text, time.monotonic() - began)


def judge(ending: Ending, out: Path, number: signal.Signals, presses: int) -> list[str]:
    """What is wrong with an ending and with what it left in the folder."""
    files = sorted(out.iterdir()) if out.is_dir() else []
    images = [file for file in files if file.suffix == ".png" and not file.name.startswith(".")]
    kinds: list[str] = []
    if ending.code is None:
        kinds.append(TIME)
    elif ending.code not in {0, *CODES[number]}:
        kinds.append(ENDING)
    if "Traceback (most recent call last)" in ending.text or "Exception ignored" in ending.text:
        kinds.append(TRACEBACK)
    if len(images) != len(files) or (out.is_dir() and not files) or not all(map(_whole, images)):
        kinds.append(WRONG)
    # Once the bar has said "upscale", stage 1 has given an image. A second press gives up what there is.
    if not images and (ending.code == 0 or (presses == 1 and "upscale" in ending.text)):
        kinds.append(LOST)
    return kinds


def _whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError):
        return False
    return True


def run(bench: Bench) -> Tally:
    """As many moments as asked for, in two processes at a time; every fifth gets its signal twice."""
    tally = Tally()
    whole = end(bench, _BEGIN, bench.folder / "whole", [], signal.SIGINT)
    tried = 6 if bench.quick else 50
    draws = [(bench.random.uniform(0, whole.seconds), number % 5 == 4) for number in range(tried)]

    def attempt(number: int) -> tuple[str, list[str], str]:
        moment, twice = draws[number]
        kind = list(CODES)[number % len(CODES)]
        out = bench.folder / f"signal-{number}"
        ending = end(bench, _BEGIN, out, [moment, moment + 0.3][: 1 + twice], kind)
        name = f"{kind.name}{' twice' if twice else ''} after {moment / whole.seconds:.0%}, exit code {ending.code}"
        return name, judge(ending, out, kind, 1 + twice), ending.text

    with ThreadPoolExecutor(2) as pool:
        for name, kinds, text in pool.map(attempt, range(tried)):
            tally.add(name, kinds, text)
    bad = bench.folder / "bad"
    bad.mkdir()
    ending = end(bench, _BAD, bad, [0.3], signal.SIGINT)
    tally.checked = whole.code == 0 and set(judge(ending, bad, signal.SIGINT, 1)) == {ENDING, TRACEBACK, WRONG}
    return tally
