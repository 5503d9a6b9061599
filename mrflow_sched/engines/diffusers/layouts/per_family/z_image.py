"""Z-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.base import Layout

__all__ = ["ZImageLayout", "ZImageOmniLayout"]


class ZImageLayout(Layout):
    """Z-Image and Z-Image-Turbo: text as one tensor per image, and guidance 0 is off.

    The pipeline's scale g means p + g (p - n): its 5.0 is what others call a CFG scale of 6. Plans keep its numbers.
    """

    @override
    def plan_guidance(self, guidance: float) -> float:
        # 0 and below are off, which is 1 in a plan.
        return 1.0 if guidance <= 0.0 else guidance

    @override
    def guidance_weight(self, guidance: float) -> float:
        # The pipeline computes p + g (p - n): g from the positive branch, g + 1 from the negative one.
        return 0.0 if guidance == 1.0 else guidance

    @override
    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        # 0.0 for the plan's 1 (off).
        return {"guidance_scale": 0.0 if guidance == 1.0 else guidance}

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        if prompts is not None:
            return super()._encode_rows(prompts, negatives, options)
        # Its encode_prompt cannot be without prompts.
        text = {name: options[name] for name in self.text_outputs if name in options}
        if self._guided and "negative_prompt_embeds" not in text:
            own = {name: value for name, value in options.items() if name not in text}
            other = super()._encode_rows(negatives or [""] * len(text["prompt_embeds"]), None, own)
            text["negative_prompt_embeds"] = other["prompt_embeds"]
        return text

    def _named(self, found: Any) -> dict[str, Any]:
        return {name: value for name, value in super()._named(found).items() if value}


class ZImageOmniLayout(ZImageLayout):
    """Z-Image-Omni: each image is a list of pictures, of which the last is the one that is made."""

    @override
    def take_rows(self, inputs: Mapping[str, Any], rows: slice, count: int) -> dict[str, Any]:
        # What is per image is a list of lists.
        made = super().take_rows(inputs, rows, count)
        for name, value in inputs.items():
            if isinstance(value, list) and len(cast("list[Any]", value)) == count:
                made[name] = value[rows]
        return made
