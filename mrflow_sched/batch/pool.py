"""Workers: in this process, or processes of their own, one device each.

A worker is made once (`Maker`: the model is loaded) and then given one task after the other. It gets the next one when
the answer to the last was taken, so no more answers wait than there are workers.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched.batch.sharing import Share, join, share_of

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

__all__ = ["Event", "EventKind", "HerePool", "Maker", "Pool", "ProcessPool", "Work", "answer", "devices_for"]

EventKind = Literal["ready", "done", "stopped", "refused", "memory", "failed", "lost"]
"""What became of a worker's start or task. Refused: as it would be everywhere. Memory: it ran out. Failed: any other
error, after which the worker is not trusted. Lost: the worker is gone."""

_PATIENCE = 5.0
"""Seconds that a process has to end before it is killed."""


@dataclass(frozen=True)
class Event:
    """What a worker tells.

    Attributes:
        place: Number of the worker.
        kind: What became of its start or its task.
        value: What the task gave.
        reason: Why it gave nothing, for a sentence.
    """

    place: int
    kind: EventKind
    value: Any = None
    reason: str = ""


class Work(Protocol):
    """What a worker does with a task; the model is loaded."""

    def __call__(self, task: Any, cancel: Callable[[], bool], /) -> Any:
        """Do it.

        Args:
            task: Whatever this kind of worker takes.
            cancel: Polled; once it returns True the task is to be dropped, and the answer is None.

        Returns:
            Whatever it gives.
        """
        ...


class Maker(Protocol):
    """Makes a worker; it can be pickled."""

    def __call__(self, device: str | None, threads: int | None, /) -> Work:
        """Load the model.

        Args:
            device: Where to; None: where the maker was told.
            threads: CPU threads of torch; None: as many as torch takes.

        Returns:
            What does the tasks.
        """
        ...


class Pool(Protocol):
    """Several workers, each at a place with a number from 0."""

    places: int

    def start(self, place: int) -> None:
        """Start the worker of a place, or end it, whatever it does, and start it anew. An event tells when it is ready.

        Args:
            place: Which.
        """
        ...

    def send(self, place: int, task: Any) -> None:
        """Give a worker its task.

        Args:
            place: One that has none.
            task: The task.
        """
        ...

    def wait(self, seconds: float) -> Sequence[Event]:
        """Wait until something happens.

        Args:
            seconds: At most.

        Returns:
            What happened.
        """
        ...

    def close(self) -> None:
        """End all workers, whatever they do."""
        ...


def answer(place: int, call: Callable[[], Any]) -> Event:
    """Run a worker's task, and put what goes wrong into words, which reach any process.

    Args:
        place: Of the worker.
        call: The task; None as its result means that it was cancelled.

    Returns:
        The event. `KeyboardInterrupt` passes through.
    """
    try:
        value = call()
    except Exception as error:
        from mrflow_sched._runtime.memory import is_memory_error

        if is_memory_error(error):
            return Event(place, "memory", reason=f"memory ran out ({first_line(error)})")
        if isinstance(error, MrFlowError):
            return Event(place, "refused", reason=str(error))
        return Event(place, "failed", reason=f"{type(error).__name__}: {first_line(error)}")
    return Event(place, "stopped") if value is None else Event(place, "done", value)


# --- in this process ---------------------------------------------------------------------------


class HerePool:
    """One worker in this process.

    Attributes:
        places: 1.
    """

    places = 1

    def __init__(self, maker: Maker, threads: int | None, cancel: Callable[[], bool]) -> None:
        """Load the model.

        Args:
            maker: Makes the worker.
            threads: As in `Maker`.
            cancel: Polled while a task runs.
        """
        self._before: int | None = None
        if threads is not None:
            import torch

            self._before = torch.get_num_threads()
        self._work = maker(None, threads)
        self._cancel = cancel
        self._ready = False
        self._tasks: list[Any] = []

    def start(self, place: int) -> None:
        """As in `Pool`; a model that is loaded stays.

        Args:
            place: 0.
        """
        self._ready = True

    def send(self, place: int, task: Any) -> None:
        """As in `Pool`.

        Args:
            place: 0.
            task: The task.
        """
        self._tasks.append(task)

    def wait(self, seconds: float) -> Sequence[Event]:
        """As in `Pool`; the task is done here, however long it takes.

        Args:
            seconds: Not used.

        Returns:
            What happened.
        """
        found = [Event(0, "ready")] if self._ready else []
        self._ready = False
        for task in self._tasks:
            found.append(answer(0, lambda task=task: self._work(task, self._cancel)))
        self._tasks.clear()
        return found

    def close(self) -> None:
        """As in `Pool`; torch has as many threads as before."""
        if self._before is not None:
            import torch

            torch.set_num_threads(self._before)


# --- processes ---------------------------------------------------------------------------------


@dataclass
class _Process:
    process: SpawnProcess
    connection: Connection[Any, Any]
    answer: Event | None = None


@dataclass
class _Worker:
    """One process, or several that share every forward; the first one's answers count."""

    processes: list[_Process] = field(default_factory=list[_Process])
    folder: tempfile.TemporaryDirectory[str] | None = None


class ProcessPool:
    """Processes of this machine, started anew where one dies. They end when this process does, however it ends.

    Attributes:
        places: How many workers.
    """

    def __init__(self, maker: Maker, devices: Sequence[str | None], threads: int | None, *, parts: int = 1) -> None:
        """Prepare; nothing is started yet.

        Args:
            maker: Makes a worker.
            devices: Of each process (`devices_for`), those of a worker together (`groups_for`).
            threads: As in `Maker`.
            parts: Processes of a worker; several are joined by torch.distributed, all get its tasks, and they end and
                start together.
        """
        self.places = len(devices) // parts
        self._parts = parts
        self._maker, self._devices, self._threads = maker, devices, threads
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, _Worker] = {}

    def pids(self) -> tuple[int, ...]:
        """The processes that run now.

        Returns:
            Their numbers.
        """
        found = [each.process.pid for worker in self._workers.values() for each in worker.processes]
        return tuple(pid for pid in found if pid is not None)

    def start(self, place: int) -> None:
        """As in `Pool`.

        Args:
            place: Which.
        """
        self._end(place)
        devices = self._devices[place * self._parts : (place + 1) * self._parts]
        worker = self._workers[place] = _Worker()
        if self._parts > 1:
            worker.folder = tempfile.TemporaryDirectory(prefix="mrflow-")
        for rank, device in enumerate(devices):
            share = None
            if worker.folder is not None:
                share = share_of(rank, os.path.join(worker.folder.name, "store"), devices, os.environ)
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve,
                args=(theirs, self._maker, place, device, self._threads, share),
                name=f"mrflow-worker-{place}",
                daemon=True,
            )
            with _without_ctrl_c():
                process.start()
            theirs.close()
            worker.processes.append(_Process(process, ours))

    def send(self, place: int, task: Any) -> None:
        """As in `Pool`.

        Args:
            place: Which.
            task: The task.
        """
        for each in self._workers[place].processes:
            with contextlib.suppress(OSError):  # it is gone, which `wait` tells
                each.connection.send(task)

    def wait(self, seconds: float) -> Sequence[Event]:
        """As in `Pool`.

        Args:
            seconds: At most.

        Returns:
            What happened.
        """
        owners = {
            each.connection: (place, each) for place, worker in self._workers.items() for each in worker.processes
        }
        found: list[Event] = []
        for connection in wait(list(owners), seconds):
            place, each = owners[connection]  # pyright: ignore[reportArgumentType]
            if place not in self._workers:  # another process of this worker ended it
                continue
            event = self._heard(place, each)
            if event is not None:
                found.append(event)
        return found

    def _heard(self, place: int, speaker: _Process) -> Event | None:
        """What a process says, as its worker's event; None: the others of the worker are not done."""
        try:
            speaker.answer = speaker.connection.recv()
        except (EOFError, OSError):  # a pipe ends with the process at its other end
            speaker.process.join(_PATIENCE)
            code = speaker.process.exitcode
            self._end(place)
            return Event(place, "lost", reason=_how_it_ended(code))
        worker = self._workers[place]
        answers = [each.answer for each in worker.processes if each.answer is not None]
        if len(worker.processes) > 1:
            broken = next((each for each in answers if each.kind in ("memory", "failed")), None)
            if broken is not None:  # the others would wait for it for ever
                self._end(place)
                return replace(broken, kind="failed")
        if len(answers) < len(worker.processes):
            return None
        for each in worker.processes:
            each.answer = None
        return next((each for each in answers if each.kind not in ("ready", "done")), answers[0])

    def close(self) -> None:
        """As in `Pool`."""
        for worker in self._workers.values():
            for each in worker.processes:
                each.process.terminate()
        for place in list(self._workers):
            self._end(place)

    def _end(self, place: int) -> None:
        worker = self._workers.pop(place, None)
        if worker is None:
            return
        for each in worker.processes:
            each.connection.close()
            each.process.terminate()
        for each in worker.processes:
            each.process.join(_PATIENCE)
            if each.process.is_alive():
                each.process.kill()  # a process that is stopped, or deep in a driver, does not hear the first signal
                each.process.join(_PATIENCE)
            if not each.process.is_alive():  # not even that ends one that a driver of the system holds
                each.process.close()
        if worker.folder is not None:
            worker.folder.cleanup()


def _serve(
    connection: Connection[Any, Any],
    maker: Maker,
    place: int,
    device: str | None,
    threads: int | None,
    share: Share | None,
) -> None:
    """The life of a worker's process: load, then a task after the other until the pipe ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from tqdm import tqdm

    from mrflow_sched._runtime.chatter import without_chatter

    logging.getLogger("mrflow_sched").addHandler(logging.NullHandler())  # what it says comes with the answers
    bars: Any = tqdm
    bars.set_lock(threading.RLock())  # its usual one is a semaphore of the system, which a killed process leaves behind
    with without_chatter(), contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        made: list[Work] = []

        def make() -> bool:
            if share is not None:
                join(share)
            made.append(maker(device if share is None else share.device, threads))
            return True

        first = answer(place, make)
        connection.send(Event(place, "ready") if made else first)
        while made:
            task = connection.recv()
            event = answer(place, lambda task=task: made[0](task, lambda: False))
            connection.send(event if share is None or share.rank == 0 else replace(event, value=None))


def _end_with_parent() -> None:
    """End this process at once when the one that started it is gone: a kill lets nobody say goodbye."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _without_ctrl_c() -> Generator[None, None, None]:
    """Let processes that start in this block never hear a terminal's Ctrl-C: the one that started them ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        hint = ", as the system does where memory runs out" if code == -9 else ""
        return f"its process was ended by signal {-code}{hint}"
    return f"its process ended with code {code}"


def devices_for(device: str, workers: int) -> tuple[str | None, ...]:
    """A device for each of several processes.

    Args:
        device: "auto" or a torch device, as --device says it.
        workers: How many processes.

    Returns:
        A device for each: all the same CPU, or accelerators with numbers of their own.

    Raises:
        MrFlowError: There are fewer accelerators than workers, or one of them was named.
    """
    from mrflow_sched._runtime.device import resolve_device

    found = resolve_device(device)
    if workers == 1 or found.type == "cpu":
        return (str(found),) * workers
    if ":" in str(found):
        raise MrFlowError(
            f"--device {device} is one device, and --workers {workers} take one each; give --device {found.type}."
        )
    import torch

    backend: Any = getattr(torch, found.type, None)
    count = int(backend.device_count()) if hasattr(backend, "device_count") else 1
    if workers > count:
        raise MrFlowError(
            f"--workers is {workers}, and this machine has {count} {found.type} device{'s' if count > 1 else ''}, one "
            f"for each worker; give at most {count}."
        )
    return tuple(f"{found.type}:{number}" for number in range(workers))
