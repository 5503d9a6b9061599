"""A long queue: every prompt ends, the history holds them all, and memory does not grow."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import pytest

from .client import Client
from .graphs import Graph, demo, staged
from .process import INSTALLATION, REASON, Server

if INSTALLATION is None:
    pytest.skip(REASON, allow_module_level=True)

PROMPTS = 100
SIZE = {"width": 64, "height": 64, "low_steps": 1, "refine_steps": 1, "cfg": 1.0}


def test_a_hundred_prompts_end_and_memory_stays(
    client: Client, server: Server, graph: Callable[[], Graph], seed: int
) -> None:
    """The outputs of the nodes, which ComfyUI caches, are small here: what would grow is what nodes hold on to."""
    queued: list[str] = []
    start = server.recorded.stat().st_size if server.recorded.is_file() else 0
    for number in range(PROMPTS):
        made = graph()
        node = made.add("MrFlowSampler", **demo(made).sockets, **SIZE, seed=seed * 1000 + number)
        made.add("PreviewImage", images=node[0])
        queued.append(client.queue(made.api))
    held: list[int] = []
    for identity in queued:
        assert client.wait(identity)["status"]["status_str"] == "success"
        held.append(server.memory())
    history = server.get("/history")
    assert set(queued) <= set(history)
    assert all(history[identity]["outputs"] for identity in queued)
    calls = [entry for entry in client.events(start) if entry["event"] == "network"]
    assert len(calls) == 2 * PROMPTS
    early, late = median(held[20:40]), median(held[80:])
    assert late - early < 24 * 2**20, f"{early / 2**20:.0f} MiB after 20 prompts, {late / 2**20:.0f} MiB after 80"


def test_a_model_that_was_unloaded_makes_the_same_picture(
    client: Client, server: Server, graph: Callable[[], Graph], seed: int
) -> None:
    """What the page's "unload models" and "free the cache" do."""
    pictures: list[Any] = []
    for _ in range(2):
        made, name = graph(), client.name()
        staged(made, demo(made), name, width=128, height=128, seed=seed)
        run = client.run(made.api).succeeded()
        assert len(run.times) == 13
        pictures.append(run.levels(name))
        server.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(2)  # it does so once it finds its queue empty
    assert np.abs(pictures[0] - pictures[1]).max() == 0
