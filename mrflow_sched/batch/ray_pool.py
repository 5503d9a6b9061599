"""Workers on a cluster of Ray: an actor for each GPU, or for some CPU cores where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from mrflow_sched._runtime.errors import first_line
from mrflow_sched.batch.pool import Event, Maker, Work, answer
from mrflow_sched.batch.ray_cluster import connect

__all__ = ["RayPool"]


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
        cluster = connect(address)
        self._ray = cluster.ray
        gpus, cores = cluster.gpus, cluster.cores
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
