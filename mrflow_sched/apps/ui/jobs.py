"""One job at a time: whoever asks second waits, is told so, and can go away again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

WAITING = "Waiting for the job of another tab or button."


@dataclass
class Job:
    """Work that runs in a thread of its own, so that a closed tab does not end it before it has saved.

    Attributes:
        owner: The tab that asked for it.
        words: What it does now.
        fraction: How far it is, from 0 to 1.
        preview: The newest image of what it makes, as Pillow holds it; or None.
        made: What it made so far, in order.
        error: What ended it early, or None.
        done: Set when it has ended.
        stop: Set to end it with the best so far.
    """

    owner: str
    words: str = WAITING
    fraction: float = 0.0
    preview: Any = None
    made: list[Any] = field(default_factory=list[Any])
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)

    def tell(self, words: str, fraction: float = 0.0) -> None:
        """Say what the job does now.

        Args:
            words: A few words for the user.
            fraction: How far it is, from 0 to 1.
        """
        self.words, self.fraction = words, fraction


class Desk:
    """Where the jobs of all tabs are done, one after the other."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._jobs: list[Job] = []
        self._guard = threading.Lock()

    def start(self, owner: str, work: Callable[[Job], object]) -> Job:
        """Start a job; it begins when those before it have ended.

        Args:
            owner: The tab that asks for it.
            work: Does it; what it raises is kept in `Job.error`.

        Returns:
            The job.
        """
        job = Job(owner)
        with self._guard:
            self._jobs.append(job)
        threading.Thread(target=self._run, args=(job, work), daemon=True).start()
        return job

    def cancel(self, owner: str | None = None) -> bool:
        """End jobs, each with the best so far.

        Args:
            owner: The tab whose jobs end; None: all.

        Returns:
            Whether there was one.
        """
        with self._guard:
            found = [job for job in self._jobs if owner in (None, job.owner)]
        for job in found:
            job.stop.set()
        return bool(found)

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        with self._guard:
            return bool(self._jobs)

    def close(self) -> None:
        """End all jobs and wait until what they have made is saved."""
        self.cancel()
        with self._guard:
            left = list(self._jobs)
        for job in left:
            while not job.done.wait(0.2):  # short waits: a signal comes between two
                pass

    def _run(self, job: Job, work: Callable[[Job], object]) -> None:
        try:
            while not self._turn.acquire(timeout=0.1):
                if job.stop.is_set():
                    return
            try:
                if not job.stop.is_set():
                    work(job)
            finally:
                self._turn.release()
        except BaseException as error:
            job.error = error
        finally:
            with self._guard:
                self._jobs.remove(job)
            job.done.set()
