"""How long a worker may be silent about its task before it counts as hung."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LEAST", "TIMES", "Patience"]

TIMES = 10.0
"""Where no limit is given: as many times the longest that a task took so far, for the same cost."""

LEAST = 600.0
"""Where no limit is given: seconds that a worker has in any case."""

_LOOK = 1.0
"""Seconds that count at most between two looks at the clock: this process may have been stopped, with its workers."""


@dataclass
class _Task:
    cost: float
    began: float


class Patience:
    """Watches the tasks that workers are at, and tells which take too long."""

    def __init__(self, seconds: float | None = None) -> None:
        """Begin to watch.

        Args:
            seconds: That a task may take, above 0, `math.inf` for as long as it likes; None: `TIMES` the longest so
                far, scaled by cost, and `LEAST` at least. Before the first task is done nothing is known to scale.
        """
        self._seconds = seconds
        self._slowest: float | None = None
        self._tasks: dict[int, _Task] = {}
        self._now = 0.0
        self._seen = time.monotonic()

    def begin(self, place: int, cost: float) -> None:
        """A worker is given a task.

        Args:
            place: Its number.
            cost: Of the task, in any unit that all have.
        """
        self._look()
        self._tasks[place] = _Task(cost, self._now)

    def end(self, place: int, *, done: bool) -> None:
        """A worker has answered, or is gone.

        Args:
            place: Its number; one that has no task is nothing to end.
            done: Whether the task was done, so that the time it took says something.
        """
        self._look()
        task = self._tasks.pop(place, None)
        if task is not None and done:
            self._slowest = max(self._slowest or 0.0, (self._now - task.began) / max(task.cost, 1.0))

    def overdue(self) -> Sequence[tuple[int, float]]:
        """Look at the clock.

        Returns:
            (number, seconds that it had) of each worker whose time is over.
        """
        self._look()
        limits = [(place, self._limit(task), task) for place, task in self._tasks.items()]
        return [(place, limit) for place, limit, task in limits if limit is not None and self._now - task.began > limit]

    def _limit(self, task: _Task) -> float | None:
        if self._seconds is not None:
            return self._seconds
        return None if self._slowest is None else max(LEAST, TIMES * self._slowest * max(task.cost, 1.0))

    def _look(self) -> None:
        seen = time.monotonic()
        self._now += min(seen - self._seen, _LOOK)
        self._seen = seen
