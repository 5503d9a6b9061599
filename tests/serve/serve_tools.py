"""What the tests of the API share."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched.apps.cli.load import Job as CliJob
from mrflow_sched.apps.cli.load import find_upscaler, load, plan_family, upscaler_kind
from mrflow_sched.apps.cli.options import ModelChoices
from mrflow_sched.apps.cli.serve import served_of
from mrflow_sched.apps.serve.jobs import Job, Jobs
from mrflow_sched.apps.serve.limits import Limits, Refused
from mrflow_sched.apps.serve.served import ImageRequest, Made, Served
from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.make import make_plan

SMALL: dict[str, Any] = {
    "prompt": "a red star",
    "size": "32x32",
    "seed": 5,
    "mrflow": {"low_steps": 3, "refine_steps": 1},
}
WORDS = ("a red star", "--size", "32x32", "--low-steps", "3", "--refine-steps", "1", "--seed", "5")
ON_CPU = ("--dtype", "float32", "--device", "cpu")
KEY = "a-key-that-nobody-guesses"


def served_on(model: Path | None) -> Served:
    """What `mrflow serve --model MODEL` hands to the server."""
    choices = ModelChoices(model=None if model is None else str(model), device="cpu", dtype="float32")
    known = plan_family(choices)
    family = get_family(known) if isinstance(known, str) else known
    usual = make_plan(family, 32, 32, upscaler_kind=upscaler_kind(choices))
    return served_of(choices, family, usual, load(choices, CliJob(usual, ""), find_upscaler(choices)))


class Press:
    """Makes images when it is told to, in place of a model."""

    def __init__(self, *, held: bool = True) -> None:
        self.gate = threading.Event()
        self.error: BaseException | None = None
        self.made: list[str] = []
        if not held:
            self.gate.set()

    def __call__(
        self, asked: ImageRequest, index: int, tell: Callable[[Any], object], cancel: Callable[[], bool]
    ) -> Made:
        tell(SimpleNamespace(fraction=0.5, name="stage 1 sample", step=1, steps=2))
        while not self.gate.wait(0.01):
            if cancel():
                raise Cancelled
        if self.error is not None:
            raise self.error
        self.made.append(asked.prompt)
        return Made(asked.prompt.encode() * 10, asked.plan.seed + index, ("a note",))


def wanted(prompt: str = "a star", count: int = 1) -> ImageRequest:
    return ImageRequest(make_plan("demo", 64, 64), prompt, count=count)


def failure(error: BaseException) -> Refused:
    return error if isinstance(error, Refused) else Refused(500, "fault", type(error).__name__)


def queue_of(press: Press, *, at_once: int = 1, **limits: Any) -> Jobs:
    return Jobs(press, failure, Limits(**{"pixels": 64 * 64, "grace": 5.0, **limits}), at_once=at_once)


def until(true: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until something is so."""
    late = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < late, "it did not come to be"
        time.sleep(0.005)


def ended(job: Job) -> Job:
    until(lambda: job.is_over)
    return job


class Process:
    """`mrflow serve` in a process of its own."""

    def __init__(self, *words: str, **environment: str) -> None:
        import os

        command = [sys.executable, "-m", "mrflow_sched", "serve", "--port", "0", *ON_CPU, *words]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        until(lambda: self.address or self.process.poll() is not None, 120)
        assert self.address, "".join(self.lines)

    @property
    def address(self) -> str | None:
        found = re.search(r"The API is at (http://\S+)/v1", "".join(self.lines))
        return found[1] if found else None

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
