"""Workers on a cluster of Ray: an actor for each GPU, or for some CPU cores where there is none."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator, Sequence
from importlib.util import find_spec
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched.batch.pool import Event, Maker, Work, answer

__all__ = ["RayPool"]


@contextlib.contextmanager
def _own_signals() -> Generator[None, None, None]:
    """Leave SIGTERM to whom it belongs: Ray takes it when it starts, and ends the process then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Actor:
    """A worker on some machine of the cluster."""

    def __init__(self, maker: Maker, place: int, device: str | None, threads: int) -> None:
        """Remember what to load; `load` does it, so that what goes wrong is an event.

        Args:
            maker: Makes the worker.
            place: Its number.
            device: Where to; None: where the maker was told, which Ray narrows to the actor's own GPU.
            threads: CPU threads of torch.
        """
        self._maker, self._place, self._device, self._threads = maker, place, device, threads
        self._work: list[Work] = []

    def load(self) -> Event:
        """Load the model.

        Returns:
            "ready", or what went wrong.
        """
        found = answer(self._place, lambda: self._work.append(self._maker(self._device, self._threads)) or True)
        return Event(self._place, "ready") if self._work else found

    def do(self, task: Any) -> Event:
        """Do a task.

        Args:
            task: The task.

        Returns:
            What became of it.
        """
        return answer(self._place, lambda: self._work[0](task, lambda: False))


class RayPool:
    """Actors on a cluster, started anew, wherever there is room, where one is lost.

    Attributes:
        places: How many.
    """

    def __init__(
        self,
        maker: Maker,
        address: str,
        *,
        workers: int | None,
        device: str | None,
        threads: int | None,
    ) -> None:
        """Connect; no actor is started yet.

        Args:
            maker: Makes a worker; the package and the model's files must be where the actors run.
            address: Of the cluster ("auto", "HOST:6379", "ray://HOST:10001"); "local" starts one on this machine.
            workers: How many actors; None: one for each GPU, or for each share of CPU cores where there is none.
            device: "cpu" for actors without a GPU; None: with one each, where the cluster has any.
            threads: CPU threads of each actor; None: the cores shared out, or 1 beside a GPU.

        Raises:
            MrFlowError: Ray is not installed, or the cluster cannot be reached.
        """
        if find_spec("ray") is None:
            raise MrFlowError("--ray needs Ray, which is not installed; run pip install 'mrflow-sched[ray]'.")
        import ray  # pyright: ignore[reportMissingImports]

        self._ray: Any = ray
        try:
            with _own_signals():
                self._ray.init(
                    address=None if address == "local" else address,
                    log_to_driver=False,
                    logging_level="ERROR",
                    **({"include_dashboard": False} if address == "local" else {}),
                )
            resources = self._ray.cluster_resources()
        except Exception as error:  # connection errors of several libraries
            raise MrFlowError(
                f"--ray is {address!r}, where no cluster answers ({first_line(error)}); start one with ray start "
                "--head, or give local."
            ) from error
        gpus, cores = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
        self._gpus = 1 if gpus and device != "cpu" else 0
        self.places = workers or (gpus if self._gpus else max(1, cores // (threads or 1)))
        self._threads = threads or (1 if self._gpus else max(1, cores // self.places))
        self._maker, self._device = maker, device
        self._actors: dict[int, Any] = {}
        self._asked: dict[Any, int] = {}

    def start(self, place: int) -> None:
        """As in `Pool`.

        Args:
            place: Which.
        """
        self._end(place)
        kind = self._ray.remote(_Actor).options(num_cpus=self._threads, num_gpus=self._gpus, max_restarts=0)
        actor = kind.remote(self._maker, place, self._device, self._threads)
        self._actors[place] = actor
        self._asked[actor.load.remote()] = place

    def send(self, place: int, task: Any) -> None:
        """As in `Pool`.

        Args:
            place: Which.
            task: The task.
        """
        self._asked[self._actors[place].do.remote(task)] = place

    def wait(self, seconds: float) -> Sequence[Event]:
        """As in `Pool`.

        Args:
            seconds: At most.

        Returns:
            What happened.
        """
        if not self._asked:
            return ()
        ready, _ = self._ray.wait(list(self._asked), num_returns=1, timeout=seconds)
        if ready:  # whoever has answered by now is not taken for hung
            ready, _ = self._ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
        found: list[Event] = []
        for each in ready:
            place = self._asked.pop(each)
            try:
                found.append(self._ray.get(each))
            except self._ray.exceptions.OutOfMemoryError as error:
                found.append(Event(place, "lost", reason=f"memory ran out ({first_line(error)})"))
            except self._ray.exceptions.RayError as error:
                found.append(Event(place, "lost", reason=f"Ray lost it ({first_line(error)})"))
        return found

    def close(self) -> None:
        """As in `Pool`; leaves the cluster."""
        for place in list(self._actors):
            self._end(place)
        self._ray.shutdown()

    def _end(self, place: int) -> None:
        actor = self._actors.pop(place, None)
        for asked in [each for each, owner in self._asked.items() if owner == place]:
            del self._asked[asked]
        if actor is not None:
            with contextlib.suppress(Exception):  # it is gone already
                self._ray.kill(actor, no_restart=True)
