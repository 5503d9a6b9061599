"""One class for each family whose conventions differ from the plain kind, each named after what it serves.

Source of every convention: the pipeline of the same name in diffusers, and spec 1.6.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mrflow_sched.engines.layouts.base import Layout

__all__ = ["FluxLayout", "QwenImageLayout", "Sd3Layout"]

PATCH = 2


class PackedLayout(Layout):
    """Latents as rows of tokens: each token is a 2x2 patch, channel outermost (FLUX.1's order)."""

    def pack(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents as (B, h/2 * w/2, 4C) tokens."""
        batch, channels, rows, columns = latents.shape
        patches = latents.reshape(batch, channels, rows // PATCH, PATCH, columns // PATCH, PATCH)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)

    def unpack(self, state: Tensor, width: int, height: int) -> Tensor:
        """Inverse of `pack`."""
        channels, rows, columns = self.latent_shape(width, height)
        patches = state.reshape(len(state), rows // PATCH, columns // PATCH, channels, PATCH, PATCH)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(state), channels, rows, columns)


class FluxLayout(PackedLayout):
    """FLUX.1 in all its text-to-image pipelines: FluxPipeline, with ControlNet or Control, Kontext."""

    text_outputs: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds", "")

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        text = super()._encode_rows(prompts, None, options)
        if negatives is not None:  # used where the caller also gives true_cfg_scale
            own = {name: value for name, value in options.items() if not name.endswith("prompt_embeds")}
            other = super()._encode_rows(negatives, None, own)
            text |= {f"negative_{name}": value for name, value in other.items()}
        return text

    def stage_arguments(self, text: Any, guidance: float, width: int, height: int) -> dict[str, Any]:
        """As the base class; Kontext is told the area too, or it would render a megapixel whatever the size."""
        made = super().stage_arguments(text, guidance, width, height)
        return made | ({"max_area": width * height} if "max_area" in self.call_names else {})


class QwenImageLayout(PackedLayout):
    """Qwen-Image: true CFG, a video VAE with one frame, statistics per channel."""

    text_outputs: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_embeds_mask")
    no_prompt: ClassVar[str] = " "

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        text = super()._encode_rows(prompts, None, options)
        own = {name: value for name, value in options.items() if not name.startswith("prompt_embeds")}
        other = super()._encode_rows(negatives or [self.no_prompt] * len(text["prompt_embeds"]), None, own)
        return text | {f"negative_{name}": value for name, value in other.items()}

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """`true_cfg_scale`; a guidance-distilled network reads `guidance_scale` as well."""
        embedded = {"guidance_scale": guidance} if self.pipe.transformer.config.guidance_embeds else {}
        return {"true_cfg_scale": guidance, **embedded}

    def _normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return ((latents - mean) * (1.0 / std))[:, :, 0]

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents[:, :, None] / (1.0 / std) + mean  # the pipeline's own order of operations

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        rows = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        mean, std = (row.to(like) for row in rows)
        return mean, std

    def _to_vae_image(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, None]

    def _from_vae_image(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, 0]


class Sd3Layout(Layout):
    """Stable Diffusion 3 and 3.5: latents as they are."""

    text_outputs: ClassVar[tuple[str, ...]] = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
