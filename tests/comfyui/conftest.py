"""One ComfyUI for all tests of a run, and what it says of its nodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from .client import Client
from .graphs import Graph
from .process import INSTALLATION, REASON, Server

SEEDS = itertools.count(1000, 100)


def write_older(folder: Path) -> Path:
    """An older release of the package, as pip may have left it among ComfyUI's libraries."""
    (folder / "mrflow_sched").mkdir()
    (folder / "mrflow_sched" / "__init__.py").write_text('"""An older release."""\n\n__version__ = "0.0.1"\n')
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server, None, None]:
    if INSTALLATION is None:
        pytest.skip(REASON)
    older = write_older(tmp_path_factory.mktemp("older"))
    running = Server(INSTALLATION, tmp_path_factory.mktemp("comfyui"), environment={"PYTHONPATH": str(older)})
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def info(server: Server) -> Any:
    """What `/object_info` says of every node."""
    return server.get("/object_info")


@pytest.fixture(scope="session")
def client(server: Server) -> Client:
    return Client(server)


@pytest.fixture
def graph(info: Any) -> Callable[[], Graph]:
    """Makes an empty graph."""
    return lambda: Graph(info)


@pytest.fixture
def seed() -> int:
    """A seed that no other test has: nothing of its pictures is in the cache."""
    return next(SEEDS)
