"""HiDream-I1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.layouts.base import Layout

__all__ = ["HiDreamLayout"]


class HiDreamLayout(Layout):
    """HiDream-I1: four text encoders, and at most as many tokens as its network was made for."""

    @override
    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        # Also refuses sizes above the network's longest sequence.
        made = super().latent_shape(width, height)
        longest, tokens = int(self.pipe.transformer.max_seq), made[1] * made[2] // self.family.patch**2
        if tokens > longest:
            raise MrFlowError(
                f"size is {width}x{height}, which is {tokens} tokens; this HiDream reads at most {longest}: choose a "
                f"smaller size."
            )
        return made

    @override
    def select_text(self, text: Any, rows: Any) -> dict[str, Any]:
        # Llama's states are (layer, row, token, channel).
        moved = {name: value.transpose(0, 1) if "llama3" in name else value for name, value in text.items()}
        picked = super().select_text(moved, rows)
        return {name: value.transpose(0, 1) if "llama3" in name else value for name, value in picked.items()}

    @override
    def take_rows(self, inputs: Mapping[str, Any], rows: slice, count: int) -> dict[str, Any]:
        # Llama's states are (layer, row, token, channel).
        taken = super().take_rows(inputs, rows, count)
        return {name: inputs[name][:, rows] if "llama3" in name else value for name, value in taken.items()}

    @override
    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        # 0 where the plan says 1: both are off.
        return {"guidance_scale": 0.0 if guidance == 1.0 else guidance}

    @override
    def view_attributes(self, guidance: float, width: int, height: int) -> dict[str, Any]:
        # The pipeline scales every size to the area of its default one: make that the stage's, and slightly more.
        return {"default_sample_size": (width * height) ** 0.5 / self.pipe.vae_scale_factor * (1 + 1e-6)}
