"""`bench.tiny` for tests: `make("flux1-dev")` skips a test where the installed diffusers has no such class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor
from torch.nn import functional

from bench import tiny
from bench.tiny import MODULAR, NAMES, VIDEO, available
from bench.tiny.parts import diffusers

__all__ = ["MODULAR", "NAMES", "TWICE", "VIDEO", "available", "diffusers", "make"]


@dataclass(frozen=True)
class Twice:
    """Stands for a x2 network: a plan for interpolation refines more."""

    name: str = "twice"
    scale: int = 2

    def __call__(self, images: Tensor) -> Tensor:
        return functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)


TWICE = Twice()


def make(name: str) -> Any:
    """A fresh pipeline called `name`."""
    if not hasattr(diffusers(), tiny.class_name(name)):
        pytest.skip(f"the installed diffusers has no {tiny.class_name(name)}")
    try:
        return tiny.make(name)
    except ModuleNotFoundError as error:  # Kolors of diffusers 0.31 needs sentencepiece
        pytest.skip(f"{tiny.class_name(name)} needs {error.name}")
