"""How a run is stopped from outside, and how it sends messages to its user."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Cancel", "Cancelled", "Warn", "ignore", "stop_if"]

Cancel = Callable[[], bool]
Warn = Callable[[str], object]


class Cancelled(Exception):
    """Raised between two steps to stop a run."""


def stop_if(cancel: Cancel | None) -> None:
    """Raise `Cancelled` where `cancel` answers True.

    Args:
        cancel: Asked once; None never stops.

    Raises:
        Cancelled: `cancel` answered True.
    """
    if cancel is not None and cancel():
        raise Cancelled


def ignore(sentence: str) -> None:
    """Do nothing: a `Warn` for callers that want none.

    Args:
        sentence: The message that is dropped.
    """
