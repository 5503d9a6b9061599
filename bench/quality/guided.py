"""The embedded model guided by two forwards, as families without embedded guidance are.

At an embedded scale of 1 the network answers as its caption says, and without a caption as if it had none:
classifier-free guidance of the two is what it was taught to give in one forward. So the questions that only such
families have can be asked here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bench.quality.ways import FAMILY, Way, planned
from mrflow_sched import get_family, make_plan

CFG = replace(get_family(FAMILY), guidance_kind="cfg")


@dataclass(frozen=True)
class Pair:
    """Text of a batch, and the empty text."""

    text: Any
    empty: Any


class GuidedByTwo:
    """`Engine` around the embedded one: guidance g is empty + g (text - empty), off at 1."""

    family = CFG

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def encode_text(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None) -> Pair:
        own = self._engine
        return Pair(own.encode_text(prompts), own.encode_text(negative_prompts or [""] * len(prompts)))

    def denoise(self, x: Tensor, sigma: Tensor, text: Pair, *, guidance: float) -> Tensor:
        with_text = self._engine.denoise(x, sigma, text.text, guidance=1.0)
        if guidance == 1.0:
            return with_text
        without = self._engine.denoise(x, sigma, text.empty, guidance=1.0)
        return without + guidance * (with_text - without)


def guided(size: int, name: str, **numbers: Any) -> Way:
    """The staged way with guidance by two forwards, with `numbers` of `make_plan`."""
    return planned(name, "guided by two", make_plan(CFG, size, size, "12+1", **numbers), around=GuidedByTwo)
