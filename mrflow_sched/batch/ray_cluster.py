"""A cluster of Ray: how this process joins one, and what each worker on it gets."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Generator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError, first_line

__all__ = ["Cluster", "connect"]


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process has joined.

    Attributes:
        ray: The module.
        gpus: GPUs of all its machines.
        cores: CPU cores of all its machines.
    """

    ray: Any
    gpus: int
    cores: int


def connect(address: str) -> Cluster:
    """Join a cluster.

    Args:
        address: "auto", "HOST:6379", "ray://HOST:10001"; "local" starts one on this machine.

    Returns:
        The cluster; `ray.shutdown` leaves it.

    Raises:
        MrFlowError: Ray is not installed, or the cluster cannot be reached.
    """
    if find_spec("ray") is None:
        raise MrFlowError("--ray needs Ray, which is not installed; run pip install 'mrflow-sched[ray]'.")
    # Threads of Ray that outlive `ray.shutdown` would start another cluster with their next call.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    import ray  # pyright: ignore[reportMissingImports]

    module: Any = ray
    try:
        with _own_signals():
            module.init(
                address=None if address == "local" else address,
                log_to_driver=False,
                logging_level="ERROR",
                **({"include_dashboard": False} if address == "local" else {}),
            )
        resources = module.cluster_resources()
    except Exception as error:  # connection errors of several libraries
        raise MrFlowError(
            f"--ray is {address!r}, where no cluster answers ({first_line(error)}); start one with ray start "
            "--head, or give local."
        ) from error
    return Cluster(module, int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1))))


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
