"""Callbacks that scripts register while they are loaded: kept, and run by the page where it comes to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

registered: dict[str, list[Callable[..., Any]]] = {}


def __getattr__(name: str) -> Callable[..., None]:
    if not name.startswith("on_"):
        raise AttributeError(name)

    def register(callback: Callable[..., Any], **_: Any) -> None:
        registered.setdefault(name, []).append(callback)

    return register
