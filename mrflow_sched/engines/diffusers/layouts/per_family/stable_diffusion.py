"""Stable Diffusion 1.5 and XL, and EDM models on their networks."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.base import Layout

__all__ = ["StableDiffusionLayout", "StableDiffusionXLLayout"]


class StableDiffusionLayout(Layout):
    """Stable Diffusion 1.5 and similar models: a variance-exploding U-Net, used at equal signal-to-noise ratio."""

    @override
    def finish(self, images: Tensor) -> tuple[Tensor, tuple[bool, ...] | None]:
        # Images that the pipeline's safety checker rejects become black.
        if getattr(self.pipe, "safety_checker", None) is None:
            return images, None
        with torch.no_grad():
            found = self.pipe.run_safety_checker(2 * images - 1, self.device, self.dtype)[1]
        rejected = tuple(bool(bad) for bad in found)
        return torch.stack([image * (not bad) for image, bad in zip(images, rejected, strict=True)]), rejected

    # EDM models (Playground 2.5) have latents of another standard deviation than 1, which sigma is counted in.

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return latents * self._deviation

    @override
    def unpack(self, state: Tensor, width: int, height: int) -> Tensor:
        return state / self._deviation

    @property
    def _deviation(self) -> float:
        return float(self.pipe.scheduler.config.get("sigma_data") or 1.0)

    def _normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) * (self.pipe.vae.config.scaling_factor / self._deviation) / std

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std / (self.pipe.vae.config.scaling_factor / self._deviation) + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Per channel, where a VAE has them (Playground 2.5); 0 and 1 elsewhere."""
        config = self.pipe.vae.config
        pair = (getattr(config, "latents_mean", None), getattr(config, "latents_std", None))
        if pair[0] is None or pair[1] is None:
            return like.new_zeros(1), like.new_ones(1)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(like) for values in pair)
        return mean, std


class StableDiffusionXLLayout(StableDiffusionLayout):
    """Stable Diffusion XL."""

    @override
    def finish(self, images: Tensor) -> tuple[Tensor, tuple[bool, ...] | None]:
        # The pipeline's invisible watermark, where it has one.
        watermark = getattr(self.pipe, "watermark", None)
        if watermark is None:
            return images, None
        marked: Tensor = watermark.apply_watermark(2 * images.cpu() - 1)
        return (marked.to(images) / 2 + 0.5).clamp(0, 1), None
