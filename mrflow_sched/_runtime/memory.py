"""How much memory is free, whether an error says that it ran out, and how cached memory is given back."""

from __future__ import annotations

import contextlib
import errno
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from mrflow_sched._runtime.cancel import Cancelled

Answer = TypeVar("Answer")

# How allocators and the libraries beneath torch say it: CUDA, HIP, MPS, XPU, DirectML, the C++ library, the system.
# A library that cannot even be initialised is the usual face of a device that is full.
_MEMORY_WORDS = re.compile(
    r"out[ _]?of[ _]?(device[ _]|host[ _])?(memory|resources)"
    r"|not enough (\w+ ){0,4}memory|insufficient memory"
    r"|(can't|cannot|could not|unable to|failed to) allocate|(bad|memory)[ _]?alloc"
    r"|alloc(ation)?_?failed|CU(BLAS|DNN)_STATUS_NOT_INITIALIZED|rocblas_status_memory_error"
    r"|unable to find a valid cuDNN algorithm|invalid buffer size|paging file is too small",
    re.IGNORECASE,
)
_WINDOWS_FULL = (8, 14, 1455)  # ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY, ERROR_COMMITMENT_LIMIT
_CALLERS = "_mrflow_callers_own"


# ------------------------------------------------------------------------------------------------------ memory, cancel


def is_memory_error(error: BaseException) -> bool:
    """Whether an error says that memory ran out in this run, on any device.

    Args:
        error: Any exception.

    Returns:
        True for MemoryError, for torch's own type, for the operating system's ENOMEM, and for a RuntimeError with the
        words of an allocator or of a library beneath torch. False for what a function of `callers_own` raised.
    """
    if is_callers_own(error):
        return False
    kinds: list[Any] = [MemoryError, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)]
    if isinstance(error, tuple(kinds)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or getattr(error, "winerror", None) in _WINDOWS_FULL
    return isinstance(error, RuntimeError) and _MEMORY_WORDS.search(str(error)) is not None


def is_callers_own(error: BaseException) -> bool:
    """Whether a function of `callers_own` raised an error, which is then for the caller alone to handle.

    Args:
        error: Any exception.

    Returns:
        True where it did.
    """
    return bool(vars(error).get(_CALLERS, False))


def callers_own(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """A function of the caller's (progress, cancel), whose errors `is_memory_error` does not take for the run's own.

    Args:
        function: Called with whatever is passed.

    Returns:
        A function that does the same; what it raises passes through, marked.
    """

    @functools.wraps(function)
    def called(*values: Any, **named: Any) -> Answer:
        try:
            return function(*values, **named)
        except Cancelled:
            raise
        except Exception as error:
            vars(error)[_CALLERS] = True
            raise

    return called


def free_memory(device: torch.device) -> None:
    """Return cached blocks to the device, so that a smaller attempt finds room in one piece.

    Args:
        device: Where memory ran out; nothing is done on a CPU.
    """
    backend: Any = getattr(torch, device.type, None)  # torch.cuda, torch.mps, torch.xpu
    if device.type != "cpu" and hasattr(backend, "empty_cache"):
        backend.empty_cache()


# ------------------------------------------------------------------------------------------------------- what is free

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """How much memory a run could take now.

    Args:
        device: Where it would run.

    Returns:
        Bytes: of a CUDA device what the driver says is free, of the CPU what the system can hand out without swapping,
        within the limit of a container. None on devices that do not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    return min([int(psutil.virtual_memory().available), *_left_in_cgroups()])


def idle_bytes(device: torch.device) -> int:
    """How much memory this process holds and could use again, which `free_bytes` does not count.

    Args:
        device: Where.

    Returns:
        Bytes: of a CUDA device what torch's allocator keeps for reuse; 0 elsewhere.
    """
    if device.type != "cuda":
        return 0
    return max(torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), 0)


def _left_in_cgroups() -> Iterator[int]:
    """What each of the process's control groups (Linux, version 2 or 1) and those around it still allows."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, own = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            top, names = (CGROUPS / controllers, _CGROUP_FILES[controllers])
            for folder in (top / own.lstrip("/"), *(top / own.lstrip("/")).parents):
                if folder.is_relative_to(top):
                    yield from _left_in_cgroup(folder, *names)


_CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""The limit, the use, and the entry of memory.stat that counts cached files, which are dropped where room is needed."""


def _left_in_cgroup(folder: Path, limit: str, usage: str, cached: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        most, used = (int((folder / name).read_text()) for name in (limit, usage))  # "max" is no number: no limit
        found = re.search(rf"^{cached} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        yield max(most - used + (int(found[1]) if found else 0), 0)
