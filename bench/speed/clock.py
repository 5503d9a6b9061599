"""Timing that waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


class Clock:
    """Seconds between construction and `stop`: by CUDA events on CUDA, else by the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._device = device.type == "cuda", device
        self._events: Any = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._cuda else []
        if self._cuda:
            torch.cuda.synchronize(device)
            self._events[0].record()
        self._begin = time.perf_counter()

    def stop(self) -> float:
        if not self._cuda:
            return time.perf_counter() - self._begin
        self._events[1].record()
        torch.cuda.synchronize(self._device)
        return self._events[0].elapsed_time(self._events[1]) / 1000


def in_turn(ways: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each way: all run one after the other in every round, after a warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for counted in range(-1, rounds):
        for name, work in ways.items():
            clock = Clock(device)
            work()
            seconds = clock.stop()
            if counted >= 0:
                found[name].append(seconds)
    return {name: sorted(seconds)[(len(seconds) - 1) // 2] for name, seconds in found.items()}
