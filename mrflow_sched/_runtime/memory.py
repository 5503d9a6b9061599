"""Whether an error says that memory ran out, and how cached memory is given back."""

from __future__ import annotations

import re
from typing import Any

import torch

_MEMORY_WORDS = re.compile(r"out of memory|(can't|cannot) allocate memory|not enough memory", re.IGNORECASE)


# ------------------------------------------------------------------------------------------------------ memory, cancel


def is_memory_error(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on any device: torch's own types, or an allocator's RuntimeError."""
    kinds: list[Any] = [MemoryError, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)]
    if isinstance(error, tuple(kinds)):
        return True
    return isinstance(error, RuntimeError) and _MEMORY_WORDS.search(str(error)) is not None


def free_memory(device: torch.device) -> None:
    """Give cached blocks of `device` back, so that a smaller attempt finds room in one piece."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
