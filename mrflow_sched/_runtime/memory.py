"""Whether an error says that memory ran out, and how cached memory is given back."""

from __future__ import annotations

import re
from typing import Any

import torch

_MEMORY_WORDS = re.compile(r"out of memory|(can't|cannot) allocate memory|not enough memory", re.IGNORECASE)


# ------------------------------------------------------------------------------------------------------ memory, cancel


def is_memory_error(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device.

    Args:
        error: Any exception.

    Returns:
        True for MemoryError, for torch's own type, and for an allocator's RuntimeError with the words for it.
    """
    kinds: list[Any] = [MemoryError, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)]
    if isinstance(error, tuple(kinds)):
        return True
    return isinstance(error, RuntimeError) and _MEMORY_WORDS.search(str(error)) is not None


def free_memory(device: torch.device) -> None:
    """Return cached blocks to the device, so that a smaller attempt finds room in one piece.

    Args:
        device: Where memory ran out; nothing is done unless it is a CUDA device.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
