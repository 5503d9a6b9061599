"""`bench.tiny` for tests: `make("flux1-dev")` skips a test where the installed diffusers has no such class."""

from __future__ import annotations

from typing import Any

import pytest

from bench import tiny
from bench.tiny import MODULAR, NAMES, VIDEO, available
from bench.tiny.parts import diffusers

__all__ = ["MODULAR", "NAMES", "VIDEO", "available", "diffusers", "make"]


def make(name: str) -> Any:
    """A fresh pipeline called `name`."""
    if not hasattr(diffusers(), tiny.class_name(name)):
        pytest.skip(f"the installed diffusers has no {tiny.class_name(name)}")
    try:
        return tiny.make(name)
    except ModuleNotFoundError as error:  # Kolors of diffusers 0.31 needs sentencepiece
        pytest.skip(f"{tiny.class_name(name)} needs {error.name}")
