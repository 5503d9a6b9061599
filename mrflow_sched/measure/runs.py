"""What was measured: parts, runs, and two of them side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrflow_sched.plan.stages import StagedPlan


@dataclass(frozen=True)
class Part:
    """A named part of a run.

    Attributes:
        name: As in `StagedResult.timings`, or "save".
        seconds: Wall-clock seconds.
    """

    name: str
    seconds: float


@dataclass(frozen=True)
class Run:
    """One measured run.

    Attributes:
        name: "native" or "staged".
        title: The name and the steps, for the label in compare.png.
        detail: Sizes, solver and forwards, for the line below it.
        seconds: Wall-clock seconds of the whole run, saving included.
        parts: Its parts in order.
        peak_bytes: Highest memory use, see `_runtime.peak.PeakMemory`.
        path: The image.
        notes: The sampler's sentences for the user.
    """

    name: str
    title: str
    detail: str
    seconds: float
    parts: tuple[Part, ...]
    peak_bytes: int
    path: Path
    notes: tuple[str, ...] = ()

    @property
    def network_seconds(self) -> float:
        """Seconds spent sampling, that is in the network and its solver."""
        return sum(part.seconds for part in self.parts if part.name.endswith("sample"))


@dataclass(frozen=True)
class Comparison:
    """A native and a staged run of the same prompt, and the image that shows both.

    Attributes:
        native: The native run that counts.
        staged: The staged run that counts.
        sheet: Path of compare.png.
        repeats: How often each was run.
        plan: The staged plan.
    """

    native: Run
    staged: Run
    sheet: Path
    repeats: int
    plan: StagedPlan

    @property
    def speedup(self) -> float:
        """Native seconds divided by staged seconds."""
        return self.native.seconds / self.staged.seconds

    @property
    def overhead_share(self) -> float:
        """Share of the staged run spent outside the network: text, decode, super-resolution, encode, noise, saving."""
        return 1 - self.staged.network_seconds / self.staged.seconds

    @property
    def peak_memory_ratio(self) -> float:
        """Peak memory of the staged run divided by that of the native run (see `_runtime.peak.PeakMemory`)."""
        return self.staged.peak_bytes / self.native.peak_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """The sampler's sentences for the user, of both runs."""
        return (*self.native.notes, *self.staged.notes)

    def to_dict(self) -> dict[str, Any]:
        """The measurements as numbers, strings and lists.

        Returns:
            Keys that stay the same from version to version; those of `mrflow compare --json`.
        """
        return {
            "native_seconds": self.native.seconds,
            "staged_seconds": self.staged.seconds,
            "plan": self.plan.to_string(),
            "speedup": self.speedup,
            "overhead_share": self.overhead_share,
            "peak_memory_ratio": self.peak_memory_ratio,
            "stages": [{"name": part.name, "seconds": part.seconds} for part in self.staged.parts],
            "native": str(self.native.path),
            "staged": str(self.staged.path),
            "sheet": str(self.sheet),
            "native_stages": [{"name": part.name, "seconds": part.seconds} for part in self.native.parts],
            "native_peak_bytes": self.native.peak_bytes,
            "staged_peak_bytes": self.staged.peak_bytes,
            "warmup": True,
            "repeats": self.repeats,
        }
