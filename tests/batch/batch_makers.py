"""Workers without a model, for tests of pools and of the schedule; they are imported by processes of their own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError


@dataclass(frozen=True)
class SharingMaker:
    """A maker whose process says that the CPU is an accelerator: diffusers counts none where there is no other."""

    maker: Any

    def __call__(self, device: str | None, threads: int | None) -> Any:
        import torch

        torch.accelerator.device_count = lambda: 1
        return self.maker(device, threads)


@dataclass(frozen=True)
class WordMaker:
    """A worker whose tasks are words: die, memory, refuse, fail, sleep, stop; any other comes back with the device."""

    refusal: str = ""
    starts: Path | None = None

    def __call__(self, device: str | None, threads: int | None) -> Callable[[Any, Callable[[], bool]], Any]:
        if self.refusal:
            raise MrFlowError(self.refusal)
        if self.starts is not None:
            (self.starts / f"{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return lambda task, cancel: self.work(str(task), device)

    def work(self, task: str, device: str | None) -> Any:
        if task.startswith("once "):  # fails the first time, wherever it is tried
            mark = Path(task.split(" ", 2)[2])
            if not mark.exists():
                mark.touch()
                return self.work(task.split(" ")[1], device)
            return task, device
        if task == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "memory":
            raise MemoryError("not enough")
        if task == "refuse":
            raise MrFlowError("no such thing")
        if task == "fail":
            raise RuntimeError("a bug")
        if task == "sleep":
            time.sleep(60)
        if task == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        return task, device
