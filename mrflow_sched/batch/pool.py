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
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mrflow_sched._runtime.errors import MrFlowError, first_line

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
class _Worker:
    process: SpawnProcess
    connection: Connection[Any, Any]


class ProcessPool:
    """Processes of this machine, started anew where one dies. They end when this process does, however it ends.

    Attributes:
        places: How many.
    """

    def __init__(self, maker: Maker, devices: Sequence[str | None], threads: int | None) -> None:
        """Prepare; nothing is started yet.

        Args:
            maker: Makes a worker.
            devices: Of each worker (`devices_for`).
            threads: As in `Maker`.
        """
        self.places = len(devices)
        self._maker, self._devices, self._threads = maker, devices, threads
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, _Worker] = {}

    def pids(self) -> tuple[int, ...]:
        """The processes that run now.

        Returns:
            Their numbers.
        """
        return tuple(each.process.pid for each in self._workers.values() if each.process.pid is not None)

    def start(self, place: int) -> None:
        """As in `Pool`.

        Args:
            place: Which.
        """
        self._end(place)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve,
            args=(theirs, self._maker, place, self._devices[place], self._threads),
            name=f"mrflow-worker-{place}",
            daemon=True,
        )
        with _without_ctrl_c():
            process.start()
        theirs.close()
        self._workers[place] = _Worker(process, ours)

    def send(self, place: int, task: Any) -> None:
        """As in `Pool`.

        Args:
            place: Which.
            task: The task.
        """
        with contextlib.suppress(OSError):  # it is gone, which `wait` tells
            self._workers[place].connection.send(task)

    def wait(self, seconds: float) -> Sequence[Event]:
        """As in `Pool`.

        Args:
            seconds: At most.

        Returns:
            What happened.
        """
        by_connection = {each.connection: place for place, each in self._workers.items()}
        found: list[Event] = []
        for connection in wait(list(by_connection), seconds):
            place = by_connection[connection]  # pyright: ignore[reportArgumentType]
            worker = self._workers[place]
            try:
                found.append(worker.connection.recv())
            except (EOFError, OSError):  # a pipe ends with the process at its other end
                worker.process.join(_PATIENCE)
                code = worker.process.exitcode
                self._end(place)
                found.append(Event(place, "lost", reason=_how_it_ended(code)))
        return found

    def close(self) -> None:
        """As in `Pool`."""
        for worker in self._workers.values():
            worker.process.terminate()
        for place in list(self._workers):
            self._end(place)

    def _end(self, place: int) -> None:
        worker = self._workers.pop(place, None)
        if worker is None:
            return
        worker.connection.close()
        worker.process.terminate()
        worker.process.join(_PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()  # a process that is stopped, or deep in a driver, does not hear the first signal
            worker.process.join(_PATIENCE)
        if not worker.process.is_alive():  # not even that ends one that a driver of the system holds
            worker.process.close()


def _serve(connection: Connection[Any, Any], maker: Maker, place: int, device: str | None, threads: int | None) -> None:
    """The life of a worker's process: load, then a task after the other until the pipe ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from tqdm import tqdm

    from mrflow_sched._runtime.chatter import without_chatter

    logging.getLogger("mrflow_sched").addHandler(logging.NullHandler())  # what it says comes with the answers
    bars: Any = tqdm
    bars.set_lock(threading.RLock())  # its usual one is a semaphore of the system, which a killed process leaves behind
    with without_chatter(), contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        made: list[Work] = []
        first = answer(place, lambda: made.append(maker(device, threads)) or True)
        connection.send(Event(place, "ready") if made else first)
        while made:
            task = connection.recv()
            connection.send(answer(place, lambda task=task: made[0](task, lambda: False)))


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
