"""Queues graphs on a running ComfyUI and reads what became of them: outputs, errors, cached nodes, network calls."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .process import Server

RUN_SECONDS = 300.0
Api = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """One prompt that ran to its end, its interrupt or its error.

    Attributes:
        status: "success", "error" or "interrupted".
        cached: Ids of the nodes whose outputs were there already.
        outputs: What output nodes showed, by node id.
        error: The exception's message, empty without one.
        broken: The class of the node that raised it.
        events: What the recorder wrote meanwhile.
        log: What ComfyUI printed meanwhile.
    """

    status: str
    cached: tuple[str, ...]
    outputs: Mapping[str, Any]
    error: str
    broken: str
    events: tuple[Mapping[str, Any], ...]
    log: str
    _saved: Path

    def of(self, event: str) -> list[Mapping[str, Any]]:
        """Events of one kind, in order."""
        return [entry for entry in self.events if entry["event"] == event]

    @property
    def sigmas(self) -> list[float]:
        """One for each call of the model, as the sampler asked for it."""
        return [entry["sigma"][0] for entry in self.of("model")]

    @property
    def times(self) -> list[float]:
        """One for each call of the network: its own time argument."""
        return [entry["time"][0] for entry in self.of("network")]

    @property
    def rows(self) -> list[int]:
        """One for each call of the network: samples in it."""
        return [entry["shape"][0] for entry in self.of("network")]

    def array(self, name: str) -> Any:
        """A tensor that a RecorderSave node saved under this name."""
        return np.load(self._saved / f"{name}.npy")

    def text(self, name: str) -> str:
        """A text that a RecorderSave node saved under this name."""
        return (self._saved / f"{name}.txt").read_text("utf-8")

    def levels(self, name: str) -> Any:
        """A saved image in whole levels of 0 to 255, as int16."""
        return np.rint(np.clip(self.array(name), 0.0, 1.0) * 255.0).astype(np.int16)

    def succeeded(self) -> Run:
        """The run itself.

        Raises:
            AssertionError: It did not succeed; says why not.
        """
        assert self.status == "success", f"{self.status} in {self.broken}: {self.error}\n{self.log[-3000:]}"
        return self


def check_sentence(text: str) -> None:
    """One sentence of ours: no traceback, no line break, an end."""
    assert re.fullmatch(r"[^\n]{20,900}\.", text), text
    assert "Traceback" not in text
    assert not re.search(r"0x[0-9a-f]{6}|<[\w.]+ object", text)


@dataclass
class Client:
    """Speaks to a server."""

    server: Server
    _number: int = 0

    def run(self, graph: Api, meanwhile: Callable[[], object] | None = None, **extra: Any) -> Run:
        """Queue a graph and wait for its end.

        Args:
            graph: In API form.
            meanwhile: Called once it is queued.
            extra: More fields of the request.

        Returns:
            What became of it.
        """
        recorded, logged = self._mark(), len(self.server.log())
        identity = self.queue(graph, **extra)
        if meanwhile is not None:
            meanwhile()
        entry = self.wait(identity)
        messages = dict(entry["status"]["messages"])
        failed = messages.get("execution_error") or {}
        status = "interrupted" if "execution_interrupted" in messages else entry["status"]["status_str"]
        return Run(
            status,
            tuple(messages.get("execution_cached", {}).get("nodes", ())),
            entry["outputs"],
            failed.get("exception_message", "").strip(),
            failed.get("node_type", ""),
            self.events(recorded),
            self.server.log()[logged:],
            self.server.saved,
        )

    def queue(self, graph: Api, **extra: Any) -> str:
        """Queue a graph and return its id.

        Raises:
            Refused: The server did not take it.
        """
        return self.server.post("/prompt", {"prompt": graph, "client_id": "tests", **extra})["prompt_id"]

    def wait(self, identity: str) -> Any:
        """The history of a prompt, once it has ended."""
        end = time.monotonic() + RUN_SECONDS
        while time.monotonic() < end:
            found = self.server.get(f"/history/{identity}")
            if identity in found and found[identity]["status"]:
                return found[identity]
            time.sleep(0.03)
        raise RuntimeError(f"prompt {identity} did not end within {RUN_SECONDS:.0f} s:\n{self.server.log()[-3000:]}")

    def interrupt(self) -> None:
        """What the page's stop button does."""
        self.server.post("/interrupt", {})

    def until(self, event: str, count: int, after: int | None = None) -> None:
        """Wait until the recorder has written that many events of a kind since a mark."""
        start = self._mark() if after is None else after
        end = time.monotonic() + RUN_SECONDS
        while sum(entry["event"] == event for entry in self.events(start)) < count:
            if time.monotonic() > end:
                raise RuntimeError(f"no {count} events {event!r} within {RUN_SECONDS:.0f} s")
            time.sleep(0.01)

    def events(self, after: int = 0) -> tuple[Mapping[str, Any], ...]:
        """What the recorder wrote after a mark; a line that is being written is left for the next time."""
        if not self.server.recorded.is_file():
            return ()
        data = self.server.recorded.read_bytes()[after:]
        return tuple(json.loads(line) for line in data.decode("utf-8").splitlines(keepends=True) if line[-1] == "\n")

    def name(self) -> str:
        """A name for a saved file that no other has."""
        self._number += 1
        return f"saved{self._number}"

    def _mark(self) -> int:
        return self.server.recorded.stat().st_size if self.server.recorded.is_file() else 0
