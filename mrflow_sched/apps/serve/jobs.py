"""Jobs: a queue of limited length, the threads that work it off, and what became of each job for a while."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched.apps.serve.limits import Limits, Refused
from mrflow_sched.apps.serve.metrics import Metrics
from mrflow_sched.apps.serve.served import ImageRequest, Made

if TYPE_CHECKING:
    from mrflow_sched.sampling.progress import Progress

__all__ = ["ENDED", "Event", "Job", "Jobs", "Make", "State"]

State = Literal["waiting", "running", "done", "failed", "cancelled"]

ENDED = ("done", "failed", "cancelled")
"""States that a job does not leave."""

_STOPPING = 503, "stopping", "the server is being stopped; send the request again when it is back."
_HASTE = 5.0
"""Seconds that a job which is told to stop has until the server ends without it."""
_LONGEST_WAIT = 60
"""Most seconds that a client is asked to wait before it tries again."""
_TIDY = 30.0
"""Seconds between two looks for what has expired, where nothing else happens."""


class Make(Protocol):
    """Makes one image of a request."""

    def __call__(
        self, asked: ImageRequest, index: int, tell: Callable[[Progress], object], cancel: Callable[[], bool], /
    ) -> Made:
        """Make an image.

        Args:
            asked: The request.
            index: Which image, from 0.
            tell: Is told how far it is.
            cancel: Asked between parts and steps; True ends the run.

        Returns:
            The image.
        """
        ...


@dataclass(frozen=True)
class Event:
    """Something that happened to a job.

    Attributes:
        number: Counted from 1 in each job.
        name: "waiting", "running", "progress", "image", or the state in which it ended.
        data: What there is to say of it.
    """

    number: int
    name: str
    data: dict[str, Any]


@dataclass(eq=False)
class Job:
    """One request, from the queue to its images. Read it through `Jobs`; another thread changes it.

    Attributes:
        asked: What is to be made.
        kept: It goes on without anybody who waits, and its images can be fetched for a while.
        id: Names it; cannot be guessed.
        token: Names its images; likewise.
        state: Where it stands.
        created: Unix time at which it came.
        started: Unix time at which it began, or None.
        ended: Unix time at which it ended, or None.
        progress: How far it is, as a client sees it.
        images: What it made so far.
        error: Why it failed or was cancelled, or None.
        events: The last that happened to it.
        stop: Set to end it.
    """

    asked: ImageRequest
    kept: bool
    id: str = field(default_factory=lambda: f"job-{secrets.token_hex(12)}")
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    state: State = "waiting"
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    progress: dict[str, Any] = field(default_factory=dict[str, Any])
    images: list[Made] = field(default_factory=list[Made])
    error: Refused | None = None
    events: deque[Event] = field(default_factory=deque[Event])
    stop: threading.Event = field(default_factory=threading.Event)
    _why: Refused | None = None
    _count: int = 0
    _listeners: list[Callable[[], object]] = field(default_factory=list[Callable[[], object]])

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.state in ENDED

    @property
    def kept_bytes(self) -> int:
        """Bytes of its images."""
        return sum(len(image.png) for image in self.images)

    def file(self, index: int) -> str:
        """The path of an image on the server.

        Args:
            index: Which, from 0.

        Returns:
            The path, which is no secret to whoever was told it, and to nobody else.
        """
        return f"/v1/files/{self.token}/{index}.png"

    def happen(self, name: str, data: dict[str, Any], most: int) -> None:
        """Note an event and wake whoever listens.

        Args:
            name: Of the event.
            data: What there is to say of it.
            most: Events that are kept.
        """
        self._count += 1
        self.events.append(Event(self._count, name, data))
        while len(self.events) > most:
            self.events.popleft()
        for listener in list(self._listeners):
            listener()

    def halt(self, why: Refused) -> None:
        """Tell a running job to stop.

        Args:
            why: What is told of it then, unless something was said before.
        """
        self._why = self._why or why
        self.stop.set()

    @property
    def why(self) -> Refused | None:
        """Why it was told to stop; None: it was not."""
        return self._why

    @contextlib.contextmanager
    def heard(self, listener: Callable[[], object]) -> Generator[None, None, None]:
        """Call a function after each event while the block runs.

        Args:
            listener: Called in the thread in which the event happens; must be quick.

        Yields:
            Nothing.
        """
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)


class Jobs:
    """The queue and the threads that work it off. Every function may be called from any thread."""

    def __init__(
        self,
        make: Make,
        failure: Callable[[BaseException], Refused],
        limits: Limits,
        metrics: Metrics | None = None,
        *,
        at_once: int = 1,
    ) -> None:
        """Begin to wait for jobs.

        Args:
            make: Makes one image.
            failure: What is told of a job that an error ended.
            limits: What is taken at most.
            metrics: Counts; None: new ones.
            at_once: How many jobs run at once; `make` is called from as many threads.
        """
        self.limits = limits
        self.metrics = Metrics() if metrics is None else metrics
        self._make = make
        self._failure = failure
        self._turn = threading.Condition(threading.RLock())
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._known: dict[str, Job] = {}
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"mrflow-serve-{number}", daemon=True) for number in range(at_once)
        ]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------------------------------------ for clients

    def submit(self, asked: ImageRequest, *, kept: bool) -> Job:
        """Put a request into the queue.

        Args:
            asked: What is to be made.
            kept: As in `Job`.

        Returns:
            Its job.

        Raises:
            Refused: The queue is full (429), or the server is being stopped (503).
        """
        with self._turn:
            if not self.is_open:
                raise Refused(*_STOPPING)
            if len(self._waiting) >= self.limits.queue + len(self._threads) - len(self._running):
                wait = self._retry_after()
                raise Refused(
                    429,
                    "queue_full",
                    f"the queue is full, as {self.limits.queue} jobs may wait; try again in {wait} seconds.",
                    retry_after=wait,
                )
            job = Job(asked, kept)
            self._known[job.id] = job
            self._waiting.append(job)
            job.happen("waiting", {"position": len(self._waiting)}, self.limits.events)
            self._tidy()
            self._turn.notify_all()
        return job

    def get(self, name: str) -> Job | None:
        """Find a job.

        Args:
            name: Its id.

        Returns:
            The job; None where there is none, or none any more.
        """
        with self._turn:
            self._tidy()
            return self._known.get(name)

    def file(self, token: str, index: int) -> bytes | None:
        """Find an image.

        Args:
            token: Of its job.
            index: Which of the job's, from 0.

        Returns:
            The PNG; None where there is none, or none any more.
        """
        with self._turn:
            self._tidy()
            found = next((job for job in self._known.values() if secrets.compare_digest(job.token, token)), None)
            return None if found is None or not 0 <= index < len(found.images) else found.images[index].png

    def view(self, job: Job, base: str, *, inside: bool = False) -> dict[str, Any]:
        """What a client is shown of a job.

        Args:
            job: The job.
            base: Address of the server, without a slash at its end.
            inside: Show the images themselves too, where the request asked for that.

        Returns:
            A value for JSON.
        """
        with self._turn:
            within = inside and job.asked.form == "b64_json"
            return {
                "id": job.id,
                "object": "mrflow.job",
                "state": job.state,
                "position": self._waiting.index(job) + 1 if job in self._waiting else None,
                "created": int(job.created),
                "started": None if job.started is None else int(job.started),
                "ended": None if job.ended is None else int(job.ended),
                "expires": None if job.ended is None else int(job.ended + self.limits.keep),
                "progress": job.progress or None,
                "seconds": _seconds(job),
                "images": [shown(job, index, base, within=within) for index in range(len(job.images))],
                "notes": _notes(job),
                "plan": job.asked.plan.to_string(),
                "error": None if job.error is None else job.error.value,
            }

    def events(self, job: Job, after: int) -> Sequence[Event]:
        """What happened to a job.

        Args:
            job: The job.
            after: The number of the last event that is known; 0: none is.

        Returns:
            Those that came later, as far as they are kept.
        """
        with self._turn:
            return tuple(event for event in job.events if event.number > after)

    def heard(self, job: Job, listener: Callable[[], object]) -> contextlib.AbstractContextManager[None]:
        """Call a function after each event of a job, as `Job.heard`.

        Args:
            job: The job.
            listener: The function.

        Returns:
            A context in which it is called.
        """
        return job.heard(listener)

    def cancel(self, job: Job, why: Refused | None = None) -> None:
        """End a job; one that has ended stays as it is.

        Args:
            job: The job. If it runs, it ends after the step that it is in.
            why: What is told of it.
        """
        why = why or Refused(409, "cancelled", "the job was cancelled.")
        with self._turn:
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled", why)
                self._tell_positions()
            elif not job.is_over:
                job.halt(why)

    def forget(self, job: Job) -> None:
        """Drop a job that has ended, and its images.

        Args:
            job: The job.
        """
        with self._turn:
            if job.is_over:
                self._known.pop(job.id, None)

    # ------------------------------------------------------------------------------------------------ for the server

    @property
    def is_open(self) -> bool:
        """Whether jobs are taken."""
        return not self._closing and any(thread.is_alive() for thread in self._threads)

    def gauges(self) -> dict[str, float]:
        """What is so at this moment.

        Returns:
            For `Metrics.text`.
        """
        with self._turn:
            self._tidy()
            kept = sum(job.kept_bytes for job in self._known.values())
            return {
                "jobs_waiting": len(self._waiting),
                "jobs_running": len(self._running),
                "kept_bytes": kept,
            }

    def close(self) -> None:
        """End all jobs: those that wait at once, the others when they are done or their time of grace is over."""
        with self._turn:
            self._closing = True
            for job in list(self._waiting):
                self.cancel(job, Refused(*_STOPPING))
            self._turn.notify_all()
        if not self._join(self.limits.grace):
            for job in list(self._running):
                job.halt(Refused(*_STOPPING))
            self._join(_HASTE)

    def _join(self, seconds: float) -> bool:
        """Wait for the threads to end; False: some have not in this time."""
        late = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, late - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # ------------------------------------------------------------------------------------------------ the thread

    def _work(self) -> None:
        for job in self._turns():
            state, error = self._run(job)
            with self._turn:
                self._running.remove(job)
                self._end(job, state, error)
                self._tidy()

    def _turns(self) -> Iterator[Job]:
        """Every job, when it is its turn."""
        while True:
            with self._turn:
                while not self._waiting:
                    if self._closing:
                        return
                    self._turn.wait(_TIDY)
                    self._tidy()
                job = self._waiting.popleft()
                self._running.append(job)
                job.state, job.started = "running", time.time()
                self.metrics.begin(job.started - job.created)
                job.happen("running", {}, self.limits.events)
                self._tell_positions()
            yield job

    def _run(self, job: Job) -> tuple[State, Refused | None]:
        """Make a job's images. Returns the state in which it ends, and why."""
        late = time.monotonic() + self.limits.seconds
        try:
            for index in range(job.asked.count):
                made = self._make(
                    job.asked,
                    index,
                    lambda step, index=index: self._tell(job, index, step),
                    lambda: job.stop.is_set() or time.monotonic() > late,
                )
                with self._turn:
                    job.images.append(made)
                    self.metrics.image()
                    what = {"index": index, "seed": made.seed, "url": job.file(index)}
                    job.happen("image", what, self.limits.events)
        except Cancelled:
            if job.why is not None:
                return "cancelled", job.why
            return "failed", Refused(
                504,
                "timeout",
                f"the job ran longer than {self.limits.seconds:g} seconds, the most that this server allows; ask for "
                "fewer images or steps, or for a smaller size.",
            )
        except BaseException as error:
            return "failed", self._failure(error)
        return "done", None

    def _tell(self, job: Job, index: int, step: Progress) -> None:
        """Note how far a job is."""
        count = job.asked.count
        with self._turn:
            job.progress = {
                "fraction": round((index + step.fraction) / count, 4),
                "image": index + 1,
                "images": count,
                "part": step.name,
                "step": step.step,
                "steps": step.steps,
            }
            job.happen("progress", job.progress, self.limits.events)

    # ------------------------------------------------------------------------------------------------ the parts

    def _end(self, job: Job, state: State, error: Refused | None) -> None:
        job.state, job.error, job.ended = state, error, time.time()
        self.metrics.end(state, None if job.started is None else job.ended - job.started)
        if state == "failed" and error is not None:
            self.metrics.refuse(error.code)
        if not (job.kept or state == "done"):  # nobody knows its name
            self._known.pop(job.id, None)
        job.happen(state, {}, self.limits.events)

    def _tell_positions(self) -> None:
        for position, job in enumerate(self._waiting, 1):
            job.happen("waiting", {"position": position}, self.limits.events)

    def _retry_after(self) -> int:
        """Seconds in which half of the queue is worked off, about."""
        rounds = max(1.0, len(self._waiting) / 2 / len(self._threads))
        return max(1, min(_LONGEST_WAIT, round(self.metrics.usual_seconds * rounds)))

    def _tidy(self) -> None:
        """Drop ended jobs that are too old, too many or too large, the oldest first."""
        over = [job for job in self._known.values() if job.is_over]
        size, now = sum(job.kept_bytes for job in over), time.time()
        for number, job in enumerate(over, 1):
            expired = job.ended is not None and now - job.ended > self.limits.keep
            left = len(over) - number
            if expired or left >= self.limits.jobs or (size > self.limits.kept_bytes and left):
                size -= job.kept_bytes
                del self._known[job.id]


def shown(job: Job, index: int, base: str, *, within: bool) -> dict[str, Any]:
    """What a client is shown of an image.

    Args:
        job: Made it.
        index: Which of the job's, from 0.
        base: Address of the server, without a slash at its end.
        within: Show the image itself, in base64; else a link to it.

    Returns:
        A value for JSON.
    """
    made = job.images[index]
    image = {"b64_json": b64encode(made.png).decode()} if within else {"url": base + job.file(index)}
    return {**image, "seed": made.seed}


def _notes(job: Job) -> list[str]:
    return list(dict.fromkeys(note for image in job.images for note in image.notes))


def _seconds(job: Job) -> dict[str, float | None]:
    began, now = job.started, time.time()
    ended = now if job.ended is None else job.ended
    waited = (ended if began is None else began) - job.created
    return {"waited": round(waited, 3), "ran": None if began is None else round(ended - began, 3)}
