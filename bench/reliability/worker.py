"""The process that runs subjects in forked children and watches each: ``python -m bench.reliability.worker``.

It runs under the Python and the checkout that are tried. Libraries are imported once, before the first fork, so that a
child's memory above that baseline is what its case cost. One JSON object a line comes in on standard input (see
`runner.Case`), one a line goes out on standard output. Needs POSIX.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from typing import Any

import psutil

from bench.reliability import subjects

_POLL = 0.01
"""Seconds between two looks at a child."""

_WALL = 5
"""A child is also ended after this many times its limit of CPU seconds, for one that waits for ever."""

_TEXT = 20_000
"""Characters of a child's output that are kept, from its beginning and from its end."""


def _child(case: dict[str, Any], output: int, answer: str, gate: int) -> None:
    """Once the gate closes, run the subject and write what it returned or raised into `answer`; never returns."""
    os.setsid()
    os.read(gate, 1)
    for number in (1, 2):
        os.dup2(output, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(case["environment"])
    said: dict[str, Any] = {}
    code = 0
    try:
        module, _, name = case["subject"].rpartition(".")
        subject = getattr(importlib.import_module(f"bench.reliability.{module or 'subjects'}"), name)
        said["value"] = subject(**case["arguments"])
    except BaseException as error:
        # What the interpreter itself makes of an exception that nobody caught.
        said |= {"error": type(error).__name__, "refusal": isinstance(error, subjects.refusal()), "message": str(error)}
        traceback.print_exc()
        code = 1
    with open(answer, "w") as file:
        json.dump(said, file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _watch(pid: int, start: int, case: dict[str, Any]) -> dict[str, Any]:
    """Wait for a child that began with `start` resident bytes, and end it where it goes over its limits."""
    process = psutil.Process(pid)
    began, peak, cpu, killed = time.monotonic(), start, 0.0, None
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            break
        with contextlib.suppress(psutil.Error):
            peak = max(peak, process.memory_info().rss)
            times = process.cpu_times()
            cpu = times.user + times.system
        if peak - start > case["bytes"]:
            killed = "memory"
        elif cpu > case["seconds"] or time.monotonic() - began > _WALL * case["seconds"]:
            killed = "time"
        if killed:
            os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(_POLL)
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "killed": killed,
        "seconds": usage.ru_utime + usage.ru_stime,
        "peak": max(peak, usage.ru_maxrss * unit) - start,
    }


def run(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a case in as many children at once as it asks for, and say how each ended."""
    with tempfile.TemporaryDirectory() as folder:
        started: list[tuple[int, int, str, str]] = []
        gate, opener = os.pipe()
        for number in range(case["copies"]):
            said, answer = os.path.join(folder, f"{number}.txt"), os.path.join(folder, f"{number}.json")
            output = os.open(said, os.O_RDWR | os.O_CREAT)
            pid = os.fork()
            if pid == 0:
                os.close(opener)
                _child(case, output, answer, gate)
            os.close(output)
            started.append((pid, psutil.Process(pid).memory_info().rss, said, answer))
        os.close(opener)  # all begin together, once each has been measured
        os.close(gate)
        ended: list[dict[str, Any]] = []
        for pid, start, said, answer in started:
            outcome = _watch(pid, start, case)
            with open(said, errors="replace", newline="") as file:
                text = file.read()
            outcome["text"] = text if len(text) <= 2 * _TEXT else text[:_TEXT] + "\n...\n" + text[-_TEXT:]
            with contextlib.suppress(OSError, ValueError), open(answer) as file:
                outcome |= json.load(file)
            ended.append(outcome)
        return ended


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    print(json.dumps(subjects.prepare()), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
