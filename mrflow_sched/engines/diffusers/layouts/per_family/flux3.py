"""FLUX 3 Klein."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor
from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.per_family.flux import Flux2Layout

__all__ = ["Flux3Layout"]


class Flux3Layout(Flux2Layout):
    """FLUX 3 Klein: latents as in FLUX.2. The length of a text is its own, as the network sees its padding too."""

    one_prompt_a_call: ClassVar[bool] = True

    @override
    def runs_together(self, text: Mapping[str, Any]) -> bool:
        lists = [cast("list[Tensor]", value) for value in text.values() if isinstance(value, list)]
        return all(len({each.shape for each in several}) == 1 for several in lists)
