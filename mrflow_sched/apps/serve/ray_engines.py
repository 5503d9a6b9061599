"""The model on a cluster: a deployment of Ray Serve, each of whose replicas makes one image at a time.

Only the engines are deployed. Queue, jobs and HTTP stay in the process of the command, so that its limits, its key and
its ending are those of a server without Ray: the proxies of Ray Serve know none of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import queue
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched.apps.serve.limits import Refused
from mrflow_sched.apps.serve.served import Made, Served, failure_of, make_image
from mrflow_sched.batch.ray_cluster import connect
from mrflow_sched.sampling.progress import Progress

if TYPE_CHECKING:
    from mrflow_sched.apps.serve.served import ImageRequest
    from mrflow_sched.plan.checks import UpscalerKind

__all__ = ["Described", "RayEngines", "ServedMaker"]

_TRIES = 3
"""Replicas that may be lost over an image."""
_POLL = 0.1
"""Seconds between two looks at whether a job is to end."""
_HASTE = 5.0
"""Seconds that a replica has for the step that it is in when it is ended."""
_HUNG = 60.0
"""Seconds after which a run that was told to end and has not is taken for one that never will."""


class ServedMaker(Protocol):
    """Loads the model in a replica; it can be pickled."""

    def __call__(self) -> Served:
        """Load the model.

        Returns:
            The model.
        """
        ...


@dataclass(frozen=True)
class Described:
    """What a replica says of the model that it loaded.

    Attributes:
        name: The model's name for clients.
        upscaler_kind: What plans are made for.
        refusal: Why it could not be loaded; empty where it was.
    """

    name: str = ""
    upscaler_kind: UpscalerKind = "interpolation"
    refusal: str = ""


@dataclass(frozen=True)
class _Failed:
    """What went wrong with an image: a `Refused`, whose own pickles cannot be read, and lines for the terminal."""

    status: int
    code: str
    sentence: str
    param: str | None
    lines: str


class _Replica:
    """A loaded model on some machine of the cluster."""

    def __init__(self, maker: ServedMaker, threads: int) -> None:
        """Load the model; a refusal is remembered, as one that is raised here is tried again and told at length.

        Args:
            maker: Loads the model.
            threads: CPU threads of torch.
        """
        import torch

        torch.set_num_threads(threads)
        self._turn = ThreadPoolExecutor(1)
        self._left: tuple[Future[None], float] | None = None
        self._served: Served | None = None
        self._refusal = ""
        try:
            self._served = maker()
        except MrFlowError as error:
            self._refusal = str(error)

    async def describe(self) -> Described:
        """Say what was loaded.

        Returns:
            The description.
        """
        served = self._served
        return Described(refusal=self._refusal) if served is None else Described(served.name, served.upscaler_kind)

    async def make(self, asked: ImageRequest, index: int) -> AsyncIterator[Any]:
        """Make one image of a request. Whoever cancels this call ends the run after its step.

        Args:
            asked: The request.
            index: Which image, from 0.

        Yields:
            How far it is, and last the image, or what went wrong, or None where it was cancelled.
        """
        loop, stop = asyncio.get_running_loop(), threading.Event()
        said: asyncio.Queue[Any] = asyncio.Queue()

        def say(what: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(said.put_nowait, what)

        def work() -> None:
            say(self._made(asked, index, lambda step: say(replace(step, _estimate=None)), stop.is_set))

        run = self._turn.submit(work)
        try:
            step = True
            while step:
                found = await said.get()
                step = isinstance(found, Progress)
                yield found
        finally:
            stop.set()
            if self._left is None or self._left[0].done():
                self._left = run, time.monotonic()

    def check_health(self) -> None:
        """Ray Serve asks again and again, and puts another in the place of a replica that raises here.

        Raises:
            RuntimeError: A run that was told to end goes on, so no other can begin.
        """
        if self._left is not None and not self._left[0].done() and time.monotonic() - self._left[1] > _HUNG:
            raise RuntimeError(f"a run that was told to end {_HUNG:g} seconds ago goes on")

    def _made(
        self, asked: ImageRequest, index: int, tell: Callable[[Progress], object], cancel: Callable[[], bool]
    ) -> Made | _Failed | None:
        served = self._served
        if served is None:
            return _Failed(500, "fault", self._refusal, None, "")
        try:
            if cancel():  # while the one before ended
                return None
            _check(served, asked)
            return make_image(served, asked, index, tell, cancel)
        except Cancelled:
            return None
        except BaseException as error:
            lines = io.StringIO()
            with contextlib.redirect_stderr(lines):
                refused = failure_of(served, error)
            return _Failed(refused.status, refused.code, str(refused), refused.param, lines.getvalue())


def _check(served: Served, asked: ImageRequest) -> None:
    """Refuse a plan that does not fit this machine: the one that took the request has other memory."""
    try:
        served.check(asked.plan)
    except MrFlowError as error:
        raise Refused(422, "invalid", str(error)) from error


class RayEngines:
    """Replicas of a model on a cluster. Images may be asked for from several threads.

    Attributes:
        replicas: How many.
        described: What they loaded.
    """

    def __init__(
        self, maker: ServedMaker, address: str, *, replicas: int | None, device: str, check: Callable[[], object]
    ) -> None:
        """Join the cluster and load the model in every replica.

        Args:
            maker: Loads the model; the package and the model's files must be where the replicas run.
            address: Of the cluster, as in `connect`, but for "ray://".
            replicas: How many; None: one for each GPU, or 1 where there is none.
            device: "cpu" for replicas without a GPU; else with one each, where the cluster has any.
            check: Raises where the process is to end.

        Raises:
            MrFlowError: Ray Serve is not installed, the cluster cannot be reached or is too small, or the model cannot
                be used.
        """
        if address.startswith("ray://"):
            raise MrFlowError(
                f"--ray is {address!r}, and a server must run on a machine of the cluster; start it there, with --ray "
                "auto."
            )
        cluster = connect(address)
        self._ray: Any = cluster.ray
        self._own = address == "local"
        self._name = f"mrflow-{secrets.token_hex(4)}"
        self._serve: Any = None
        try:
            self._serve = _ray_serve()
            gpus = 1 if cluster.gpus and device != "cpu" else 0
            room, what = (cluster.gpus, "GPU") if gpus else (cluster.cores, "CPU core")
            self.replicas = replicas or (room if gpus else 1)
            if self.replicas > room:
                raise MrFlowError(
                    f"--replicas is {self.replicas}, and the cluster has {room} {what}{'s' if room > 1 else ''}, one "
                    f"for each; give at most {room}."
                )
            threads = 1 if gpus else max(1, cluster.cores // self.replicas)
            self._handle: Any = self._deploy(maker, threads, gpus)
            check()
            self.described: Described = self._handle.describe.remote().result()
            if self.described.refusal:
                raise MrFlowError(self.described.refusal)
        except BaseException:
            self.close()
            raise

    def _deploy(self, maker: ServedMaker, threads: int, gpus: int) -> Any:
        serve = self._serve
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled")
        kind = serve.deployment(_Replica).options(
            name="engine",
            num_replicas=self.replicas,
            max_ongoing_requests=1,
            graceful_shutdown_timeout_s=_HASTE,
            ray_actor_options={"num_cpus": threads, "num_gpus": gpus},
        )
        try:
            return serve.run(kind.bind(maker, threads), name=self._name, route_prefix=None)
        except RuntimeError as error:
            raise MrFlowError(
                f"the model was loaded by no replica on the cluster ({first_line(error)}); mrflow generate there says "
                "why."
            ) from error

    def make(
        self, asked: ImageRequest, index: int, tell: Callable[[Progress], object], cancel: Callable[[], bool]
    ) -> Made:
        """Have an image made; where its replica is lost, by another, to the same bits.

        Args:
            asked: The request.
            index: Which image, from 0.
            tell: Is told how far it is.
            cancel: Asked again and again; True ends the run.

        Returns:
            The image.

        Raises:
            Cancelled: `cancel` answered True.
            Refused: It cannot be made, or every replica that tried was lost.
        """
        for _ in range(_TRIES):
            found = self._tried(asked, index, tell, cancel)
            if isinstance(found, Made):
                return found
            if isinstance(found, _Failed):
                sys.stderr.write(found.lines)
                raise Refused(found.status, found.code, found.sentence, param=found.param)
        raise Refused(
            500, "lost", f"{_TRIES} replicas were lost over this image; their machines may be short of memory."
        )

    def _tried(
        self, asked: ImageRequest, index: int, tell: Callable[[Progress], object], cancel: Callable[[], bool]
    ) -> Made | _Failed | None:
        """What a replica makes; None where it was lost."""
        stream = self._handle.options(stream=True).make.remote(asked, index)
        said: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def read() -> None:
            try:
                for each in stream:
                    said.put(each)
            except BaseException as error:
                said.put(error)

        # Another thread waits for the replica, as this one must see that the job is to end.
        threading.Thread(target=read, name="mrflow-replica", daemon=True).start()
        while True:
            if cancel():
                stream.cancel()
                raise Cancelled
            try:
                found = said.get(timeout=_POLL)
            except queue.Empty:
                continue
            if isinstance(found, Progress):
                tell(found)
            elif isinstance(found, self._ray.exceptions.RayActorError):
                return None
            elif isinstance(found, BaseException):
                raise found
            else:
                return found

    def close(self) -> None:
        """End the replicas and leave the cluster; Ray Serve ends where it has nothing else to do."""
        serve = self._serve
        with contextlib.suppress(Exception):  # the cluster is gone
            if serve is not None and not self._own:  # a cluster of our own ends with all that it runs
                serve.delete(self._name)
                status = serve.status()
                if not (status.applications or status.proxies):
                    serve.shutdown()
        self._ray.shutdown()


def _ray_serve() -> Any:
    try:
        return import_module("ray.serve")
    except ImportError as error:
        raise MrFlowError(
            f"--ray needs Ray Serve, which is not installed ({first_line(error)}); run pip install 'mrflow-sched[ray]'."
        ) from error
