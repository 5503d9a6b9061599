"""Log lines of diffusers and transformers that say nothing, or what this package says itself, while a call makes them.

`parts.quiet_loading` silences everything around a loader; these leave everything else as it is.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator

__all__ = ["leaving_out", "short_lines"]

_LONGEST = 200
"""Letters of a line that quotes a prompt."""
_TWICE = "Token indices sequence length is longer than"
"""What a tokenizer says before the pipeline says that it cut the prompt."""


@contextlib.contextmanager
def leaving_out(*parts: str) -> Generator[None, None, None]:
    """Leave some log lines of both libraries out while the block runs.

    Args:
        *parts: Texts of which a line that is left out holds one.

    Yields:
        Nothing; all lines are shown again after the block.
    """

    def judge(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return not any(part in said for part in parts)

    with _filtered(judge):
        yield


@contextlib.contextmanager
def short_lines() -> Generator[None, None, None]:
    """Shorten log lines that quote a whole prompt, and leave out what announces them, while the block runs.

    Yields:
        Nothing; lines are whole again after the block.
    """

    def judge(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if len(said) > _LONGEST:
            record.msg, record.args = f"{said[:_LONGEST]}...", ()
        return _TWICE not in said

    with _filtered(judge):
        yield


@contextlib.contextmanager
def _filtered(judge: Callable[[logging.LogRecord], bool]) -> Generator[None, None, None]:
    """Let `judge` see the lines of both libraries before their own handlers write them."""
    handlers = [handler for name in ("diffusers", "transformers") for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(judge)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(judge)
