"""Where a run stands: its clock and its progress, and what its caller hears of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrflow_sched._runtime.cancel import stop_if

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import Stage

__all__ = ["Hooks", "Progress", "StageTiming", "Tracker", "wait_for"]


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        fraction: Rises from 0 to 1 with the network's cost, so a bar drawn from it moves evenly in time.
        stage: The stage at work, from 1.
        stages: How many there are.
        step: Steps evaluated in this stage, 0 before the first.
        steps: How many the stage has.
        name: The part at work, as in `StagedResult.timings`, at last "done".
        denoised: The clean estimate of the step just evaluated, latents (B, ...), else None.
    """

    fraction: float
    stage: int
    stages: int
    step: int
    steps: int
    name: str
    denoised: Tensor | None = None


@dataclass(frozen=True)
class StageTiming:
    """Wall-clock seconds of one part, measured with the device's queue empty at both ends."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Hooks:
    """What a run asks and tells its caller.

    Attributes:
        cancel: Asked between parts, steps, images and tiles; True stops the run.
        warn: Hears one sentence at a time for the user.
        keep: Hears every image on the way by name: "stage 1", "stage 2 upscaled"; (B, 3, H, W) in [0, 1].
    """

    cancel: Callable[[], bool] | None = None
    warn: Callable[[str], object] | None = None
    keep: Callable[[str, Tensor], object] | None = None

    def say(self, sentence: str) -> None:
        """Tell the user `sentence`."""
        if self.warn is not None:
            self.warn(sentence)

    def stop_if_cancelled(self) -> None:
        """Raise `Cancelled` where the caller wants the run to stop."""
        stop_if(self.cancel)


@dataclass
class Tracker:
    """The clock of one run: which part is at work, how long each took, how far the whole is.

    Attributes:
        stages: The stages of the run.
        costs: The network's cost of each, in any unit.
        device: Waited for before a clock is read.
        tell: Hears `Progress`.
        timings: Of the parts that have ended, in order.
        forwards: Evaluations of the network per image so far.
        estimate: The clean estimate of the last evaluation, latents (B, ...).
        part: The part at work; empty between two.
        index: The stage at work, from 0.
    """

    stages: Sequence[Stage]
    costs: Sequence[float]
    device: torch.device
    tell: Callable[[Progress], object] | None = None
    timings: list[StageTiming] = field(default_factory=list[StageTiming])
    forwards: float = 0.0
    estimate: Tensor | None = None
    part: str = ""
    index: int = 0
    _began: float = 0.0
    _first: int | None = None

    def begin(self, name: str, index: int) -> None:
        """End the part at work, start the part `name` of stage `index`, and say so."""
        self.end()
        self.part, self.index = name, index
        self._first = index if self._first is None else self._first
        self._began = time.perf_counter()
        self.report(0)

    def report(self, step: int, estimate: Tensor | None = None) -> None:
        """Tell where the run stands: `step` steps of the stage are evaluated, the last with the clean `estimate`."""
        self.estimate = estimate
        if self.tell is None:
            return
        steps = self.stages[self.index].steps
        done = steps if self.part.endswith("decode") else step
        fraction = self._fraction(done / max(steps, 1))
        self.tell(Progress(fraction, self.index + 1, len(self.stages), done, steps, self.part, estimate))

    def end(self) -> None:
        """End the part at work, if there is one."""
        if self.part:
            wait_for(self.device)
            self.timings.append(StageTiming(self.part, time.perf_counter() - self._began))
        self.part = ""

    def finish(self) -> None:
        """End the last part and tell that all is done."""
        self.end()
        if self.tell is not None:
            count, steps = len(self.stages), self.stages[-1].steps
            self.tell(Progress(1.0, count, count, steps, steps, "done"))

    def _fraction(self, within: float) -> float:
        """Share of the run's network cost that is spent with `within` of the present stage."""
        first = self._first or 0
        total = sum(self.costs[first:])
        spent = sum(self.costs[first : self.index]) + within * self.costs[self.index]
        return min(spent / total, 1.0) if total > 0 else 0.0


def wait_for(device: torch.device) -> None:
    """Let the device finish what is queued, so that a clock read now is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()
