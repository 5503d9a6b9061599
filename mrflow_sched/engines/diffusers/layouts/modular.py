"""What is the same in the layouts of all modular pipelines: text and guidance come from blocks, not from a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.base import Layout, parameter_names
from mrflow_sched.engines.diffusers.quiet import leaving_out
from mrflow_sched.engines.diffusers.view import view_of

__all__ = ["modular_layout"]


class _ModularLayout(Layout):
    """A layout whose pipeline is a `ModularView`; before the classic one of its family among the bases.

    Guidance by two branches is a component, the guider. Its scale is what the plan's is told by: where it counts from
    the positive branch on (`use_original_formulation`), the plan's scale is greater by 1.
    """

    @override
    def call_latents(self, latents: Tensor) -> Tensor:
        # The loop begins at them: no block prepares them.
        return self.pack(latents)

    @override
    def rewritten(self, prompts: Sequence[str], options: Mapping[str, Any], size: tuple[int, int]) -> list[str]:
        # Where they are, blocks do it.
        return list(prompts)

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        if prompts is None:
            return {}
        known = parameter_names(self.pipe.encode_prompt)
        if negatives is None and self.one_negative and len(prompts) > 1:
            negatives = [""] * len(prompts)
        asked = {**options, "prompt": prompts, "negative_prompt": negatives if self._guided else None}
        guided = self._guiding(self.family.guidance if self.family.guidance > 1.0 else 2.0) if self._guided else {}
        pipe = view_of(self.pipe, **guided)
        given = {name: value for name, value in asked.items() if name in known}
        text = self._read(pipe, given)
        if (
            self._guided and negatives is not None and "negative_prompt" not in known
        ):  # FLUX.2 Klein knows the empty one
            other = self._read(pipe, {**given, "prompt": negatives})
            text |= {f"negative_{name}": value for name, value in other.items() if f"negative_{name}" in text}
        return text

    def _read(self, pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the blocks make of texts, in one call, or text by text; then its values are lists."""
        if not self.one_prompt_a_call:
            return pipe.encode_prompt(**given)
        texts = {name: given[name] for name in ("prompt", "negative_prompt") if given.get(name) is not None}
        each = [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
        made = [pipe.encode_prompt(**{**given, **row}) for row in each]
        return {name: [one[name] for one in made] for name in made[0]}

    @property
    def _from_positive(self) -> bool:
        """Whether the guider's scale counts from the positive branch on, so that 0 is off."""
        return bool(getattr(getattr(self.pipe, "guider", None), "use_original_formulation", False))

    def _guiding(self, guidance: float) -> dict[str, Any]:
        """New guiders for the plan's scale: they count steps and hold the scale."""
        guider = getattr(self.pipe, "guider", None)
        if guider is None:
            return {}
        scale = guidance - 1.0 if self._from_positive else guidance
        asked = {"enabled": True, "guidance_scale": scale} if guidance > 1.0 and self._guided else {"enabled": False}
        with leaving_out("Guiders are currently an experimental feature"):
            return {"guider": guider.new(**asked)}

    @override
    def view_attributes(self, guidance: float, width: int, height: int) -> dict[str, Any]:
        return {**super().view_attributes(guidance, width, height), **self._guiding(guidance)}

    @override
    def plan_guidance(self, guidance: float) -> float:
        if not self._guided:
            return guidance
        return max(guidance + 1.0 if self._from_positive else guidance, 1.0)

    @override
    def guidance_weight(self, guidance: float) -> float:
        return guidance - 1.0

    @override
    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        # Where there is no guider, the scale is an input of a block, and embedded.
        return {"guidance_scale": guidance}

    @override
    def stage_arguments(self, text: Mapping[str, Any], guidance: float, width: int, height: int) -> dict[str, Any]:
        made = super().stage_arguments(text, guidance, width, height)
        made = {name: value for name, value in made.items() if name != "negative_prompt"}
        if self.one_prompt_a_call:
            lists = {name: cast("list[Tensor]", value) for name, value in made.items() if isinstance(value, list)}
            made |= {name: torch.cat(value) for name, value in lists.items()}
        return made


def modular_layout(kind: type[Layout], layout: Layout) -> Layout:
    """The layout of a modular pipeline.

    Args:
        kind: The class of the layout of its family.
        layout: That layout, of a `ModularView`.

    Returns:
        One that packs and scales in the same way, and reads text and guides by the pipeline's blocks, with the scale of
        its guider as the family's.
    """
    both = type(kind.__name__, (_ModularLayout, kind), {})
    made: _ModularLayout = both(layout.pipe, layout.family, layout.experimental)
    guider = getattr(layout.pipe, "guider", None)
    if guider is None or layout.family.guidance_kind != "cfg" or not hasattr(guider, "guidance_scale"):
        return made
    scale = made.plan_guidance(float(guider.guidance_scale)) if guider._enabled else 1.0
    return replace(made, family=replace(layout.family, guidance=scale))
