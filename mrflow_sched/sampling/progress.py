"""Timings and progress of a run, and the functions by which its caller follows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrflow_sched._runtime.cancel import stop_if
from mrflow_sched.sampling.faults import Seen, sizes

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import Stage

__all__ = ["Hooks", "Progress", "StageTiming", "Tracker", "wait_for"]


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        fraction: Rises from 0 to 1 with the network's cost: evenly while sampling, and not while images are decoded,
            upscaled and encoded. 1 while the last image is decoded, too; all is done where `name` is "done".
        stage: The current stage, from 1.
        stages: How many there are.
        step: Steps evaluated in this stage, 0 before the first.
        steps: How many the stage has.
        name: The current part, as in `StagedResult.timings`; finally "done".
    """

    fraction: float
    stage: int
    stages: int
    step: int
    steps: int
    name: str
    _estimate: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def denoised(self) -> Tensor | None:
        """The clean estimate of the step just evaluated, latents (B, ...), else None; a copy, which may be written to.

        Copied when it is asked for, so that callbacks that only count steps cost nothing.
        """
        return None if self._estimate is None else self._estimate.clone()


@dataclass(frozen=True)
class StageTiming:
    """Wall-clock time of one part, measured with the device's queue empty at both ends.

    Attributes:
        name: The part: "text", "stage 1 sample", ...
        seconds: Its duration.
    """

    name: str
    seconds: float


@dataclass(frozen=True)
class Hooks:
    """The functions by which a run's caller follows and stops it.

    Attributes:
        cancel: Polled between parts, steps, images and tiles; True stops the run.
        warn: Called with one sentence at a time for the user.
        keep: Called with every intermediate image and its name: "stage 1", "stage 2 upscaled"; (B, 3, H, W) in [0, 1].
        compose: Called with upscaled images, (B, 3, H, W) in [0, 1]; what it returns takes their place.
    """

    cancel: Callable[[], bool] | None = None
    warn: Callable[[str], object] | None = None
    keep: Callable[[str, Tensor], object] | None = None
    compose: Callable[[Tensor], Tensor] | None = None

    def say(self, sentence: str) -> None:
        """Pass a warning to the caller.

        Args:
            sentence: One sentence for the user.
        """
        if self.warn is not None:
            self.warn(sentence)

    def stop_if_cancelled(self) -> None:
        """Raise `Cancelled` where the caller wants the run to stop."""
        stop_if(self.cancel)


@dataclass
class Tracker:
    """Timings and progress of one run: the current part, how long each took, how far the whole is.

    Attributes:
        stages: The stages of the run.
        costs: The network's cost of each, in any unit.
        device: Synchronised before the clock is read.
        tell: Called with `Progress`.
        timings: Of the parts that have ended, in order.
        forwards: Evaluations of the network per image so far.
        estimate: The clean estimate of the last evaluation, latents (B, ...).
        seen: Every evaluation in the current part.
        part: The current part; empty between two.
        index: The current stage, from 0.
    """

    stages: Sequence[Stage]
    costs: Sequence[float]
    device: torch.device
    tell: Callable[[Progress], object] | None = None
    timings: list[StageTiming] = field(default_factory=list[StageTiming])
    forwards: float = 0.0
    estimate: Tensor | None = None
    seen: list[Seen] = field(default_factory=list[Seen])
    part: str = ""
    index: int = 0
    _began: float = 0.0
    _first: int | None = None

    def begin(self, name: str, index: int) -> None:
        """End the current part, start another and report it.

        Args:
            name: The part: "text", "stage 1 sample", ...
            index: Its stage, from 0.
        """
        self.end()
        self.part, self.index = name, index
        self.seen.clear()
        self._first = index if self._first is None else self._first
        self._began = time.perf_counter()
        self.report(0)

    def note(self, step: int, latents: Tensor, estimate: Tensor) -> None:
        """Note the size of an evaluation's values, to find out later where they went wrong.

        Args:
            step: Of the current stage, from 1.
            latents: What the network was given, (B, ...).
            estimate: Its clean estimate, likewise.
        """
        self.seen.append(Seen(step, sizes(latents), sizes(estimate)))

    def report(self, step: int, estimate: Tensor | None = None) -> None:
        """Report how far the run is.

        Args:
            step: Steps of the current stage that are evaluated.
            estimate: The clean estimate of the last of them, latents (B, ...); None where there is none.
        """
        self.estimate = self.estimate if estimate is None else estimate
        if self.tell is None:
            return
        steps = self.stages[self.index].steps
        done = steps if self.part.endswith("decode") else step
        fraction = self._fraction(done / max(steps, 1))
        self.tell(Progress(fraction, self.index + 1, len(self.stages), done, steps, self.part, estimate))

    def end(self) -> None:
        """End the current part, if there is one."""
        if self.part:
            wait_for(self.device)
            self.timings.append(StageTiming(self.part, time.perf_counter() - self._began))
        self.part = ""

    def finish(self) -> None:
        """End the last part and report that all is done."""
        self.end()
        if self.tell is not None:
            count, steps = len(self.stages), self.stages[-1].steps
            self.tell(Progress(1.0, count, count, steps, steps, "done"))

    def _fraction(self, within: float) -> float:
        """Share of the run's network cost that is spent, `within` (0 to 1) being that of the current stage."""
        first = self._first or 0
        total = sum(self.costs[first:])
        spent = sum(self.costs[first : self.index]) + within * self.costs[self.index]
        return min(spent / total, 1.0) if total > 0 else 0.0


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished what is queued, so that a clock read now is right.

    Args:
        device: Nothing is waited for on a CPU.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()
