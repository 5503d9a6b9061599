"""HunyuanImage 2.1."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.base import Layout

__all__ = ["HunyuanImageLayout"]


class HunyuanImageLayout(Layout):
    """HunyuanImage 2.1: guidance is a component of the pipeline (base) or an input of the network (distilled)."""

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        count = {"batch_size": len(options["prompt_embeds"] if prompts is None else prompts)}
        text = super()._encode_rows(prompts, None, options | count)
        if not self._guided or "negative_prompt_embeds" in options:
            return text
        own = {name: value for name, value in options.items() if not name.startswith("prompt_embeds")}
        other = super()._encode_rows(negatives or [""] * count["batch_size"], None, own | count)
        return text | {f"negative_{name}": value for name, value in other.items()}

    @override
    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        # The embedded scale of a distilled network; otherwise the guider has it: see `view_attributes`.
        return {} if self._guided else {"distilled_guidance_scale": guidance}

    @override
    def view_attributes(self, guidance: float, width: int, height: int) -> dict[str, Any]:
        # New guiders for each stage: they count steps and hold the scale.
        made: dict[str, Any] = {}
        for name in ("guider", "ocr_guider"):
            guider = getattr(self.pipe, name, None)
            if guider is not None:
                asked = {} if guidance == self.family.guidance else {"guidance_scale": guidance}
                made[name] = guider.new(enabled=False) if guidance == 1.0 else guider.new(**asked)
        return made
