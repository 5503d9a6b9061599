"""What a server counts, in the text format of Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["Histogram", "Metrics"]

_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0)
_UNKNOWN = 5.0
"""Seconds that a job is thought to take before any has ended."""


@dataclass
class Histogram:
    """How often values fell into which range.

    Attributes:
        counts: Of the values up to each of `_SECONDS`, and of those above.
        total: Their sum.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(_SECONDS) + 1))
    total: float = 0.0

    def add(self, value: float) -> None:
        """Count a value.

        Args:
            value: In seconds.
        """
        self.counts[sum(value > bound for bound in _SECONDS)] += 1
        self.total += value

    @property
    def mean(self) -> float | None:
        """The mean of the values; None: there is none."""
        count = sum(self.counts)
        return self.total / count if count else None

    def lines(self, name: str) -> Iterable[str]:
        """The histogram in Prometheus' text format.

        Args:
            name: Of the metric.

        Yields:
            Lines.
        """
        below = 0
        for bound, count in zip((*_SECONDS, None), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{"+Inf" if bound is None else f"{bound:g}"}"}} {below}'
        yield f"{name}_sum {self.total:.6g}"
        yield f"{name}_count {below}"


@dataclass
class Metrics:
    """All that is counted; may be used by several threads.

    Attributes:
        ended: Jobs by the state in which they ended.
        refused: Requests that were refused, and jobs that failed, by their code.
        images: Images that were made.
        ran: Seconds that jobs ran.
        waited: Seconds that they waited before.
    """

    ended: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("done", "failed", "cancelled"), 0))
    refused: dict[str, int] = field(default_factory=dict[str, int])
    images: int = 0
    ran: Histogram = field(default_factory=Histogram)
    waited: Histogram = field(default_factory=Histogram)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def refuse(self, code: str) -> None:
        """Count a refusal.

        Args:
            code: Why.
        """
        with self._guard:
            self.refused[code] = self.refused.get(code, 0) + 1

    def image(self) -> None:
        """Count an image."""
        with self._guard:
            self.images += 1

    def begin(self, waited: float) -> None:
        """Count a job that begins to run.

        Args:
            waited: Seconds that it waited.
        """
        with self._guard:
            self.waited.add(waited)

    def end(self, state: str, ran: float | None) -> None:
        """Count a job that has ended.

        Args:
            state: In which it ended.
            ran: Seconds that it ran; None: it did not.
        """
        with self._guard:
            self.ended[state] += 1
            if ran is not None:
                self.ran.add(ran)

    @property
    def usual_seconds(self) -> float:
        """Seconds that a job takes."""
        mean = self.ran.mean
        return _UNKNOWN if mean is None else mean

    def text(self, now: Mapping[str, float]) -> str:
        """Everything in Prometheus' text format, version 0.0.4.

        Args:
            now: What is so at this moment: gauges by their names without "mrflow_", as in `_HELP`.

        Returns:
            The text.
        """
        with self._guard:
            lines = [line for name, value in now.items() for line in (*_head(name, "gauge"), f"mrflow_{name} {value}")]
            lines += _head("jobs_total", "counter")
            lines += [f'mrflow_jobs_total{{state="{state}"}} {count}' for state, count in self.ended.items()]
            lines += _head("images_total", "counter")
            lines.append(f"mrflow_images_total {self.images}")
            lines += _head("refused_total", "counter")
            lines += [f'mrflow_refused_total{{code="{code}"}} {count}' for code, count in sorted(self.refused.items())]
            for name, histogram in (("job_seconds", self.ran), ("job_wait_seconds", self.waited)):
                lines += [*_head(name, "histogram"), *histogram.lines(f"mrflow_{name}")]
        return "\n".join(lines) + "\n"


_HELP = {
    "jobs_waiting": "Jobs in the queue.",
    "jobs_running": "Jobs that are sampled now.",
    "kept_bytes": "Bytes of images that can still be fetched.",
    "jobs_total": "Jobs that have ended, by state.",
    "images_total": "Images that were made.",
    "refused_total": "Requests that were refused and jobs that failed, by code.",
    "job_seconds": "Seconds from a job's first part to its last image.",
    "job_wait_seconds": "Seconds that a job waited before it began.",
}


def _head(name: str, kind: str) -> tuple[str, str]:
    return f"# HELP mrflow_{name} {_HELP[name]}", f"# TYPE mrflow_{name} {kind}"
