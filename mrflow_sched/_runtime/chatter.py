"""What libraries write to the terminal while they are imported, and that concerns nobody who runs a command."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator

__all__ = ["without_chatter"]

_LOGGERS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""torchao, once installed, is imported by diffusers and transformers, and says which kernels of others it lacks."""


@contextlib.contextmanager
def without_chatter() -> Generator[None, None, None]:
    """Leave those lines out while the block runs.

    Yields:
        Nothing; the loggers have their own levels again after the block.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
