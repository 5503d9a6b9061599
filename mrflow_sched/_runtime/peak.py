"""The highest memory use of a part of a run, to compare two runs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
import threading
from pathlib import Path
from types import TracebackType

import psutil
import torch

from mrflow_sched._runtime.errors import MrFlowError

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_INTERVAL = 0.005


class PeakMemory:
    """The most memory in use at any moment inside a `with` block.

    `with PeakMemory(device) as peak: ...`, then `peak.bytes`. On CUDA it counts tensors allocated on the device,
    weights included (`max_memory_allocated`). Elsewhere it is the resident memory of the whole process, weights and
    libraries included: exact on Linux, where the kernel keeps a high-water mark that can be reset, and sampled every 5
    ms by a thread on other systems. Memory that earlier work freed is first returned to the system where that is
    possible, so that the order of two measurements does not decide them.

    Args:
        device: Where the work runs.

    Attributes:
        bytes: The highest use in bytes; 0 until the block ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sampler: _Sampler | None = None
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        give_back()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        elif not _reset_high_water():
            self._sampler = _Sampler()
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        elif self._sampler is None:
            self.bytes = _status_bytes("VmHWM")
        else:
            self.bytes = self._sampler.stop()


def give_back() -> None:
    """Collect garbage and, where the C library can, return freed memory to the system."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water() -> bool:
    """Bring Linux's VmHWM down to the present use (proc(5), clear_refs, value 5); False where that did not happen."""
    try:
        _CLEAR.write_text("5")
        return _status_bytes("VmHWM") <= 1.02 * _status_bytes("VmRSS")
    except (OSError, ValueError):
        return False


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise MrFlowError(f"{_STATUS} has no {key}.")
    return int(found.group(1)) * 1024


class _Sampler(threading.Thread):
    """Reads the process's resident memory until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._highest: int = self._process.memory_info().rss
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def stop(self) -> int:
        self._done.set()
        self.join()
        return max(self._highest, self._process.memory_info().rss)
