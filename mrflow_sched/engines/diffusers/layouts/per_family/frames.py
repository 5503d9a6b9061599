"""Models of videos, and images on their networks: latents with an axis of frames, which has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.base import Layout, parameter_defaults
from mrflow_sched.engines.diffusers.layouts.per_family.hunyuan import HunyuanImageLayout
from mrflow_sched.engines.diffusers.layouts.per_family.packed import VideoVaeLayout, pack, unpack
from mrflow_sched.plan.checks import checked_number

__all__ = ["AnimaLayout", "FrameLayout", "HunyuanVideo15Layout", "HunyuanVideoLayout", "LtxLayout", "WanLayout"]


class FrameLayout(Layout):
    """Loop and VAE have an axis of frames: (B, C, 1, h, w). The VAE's latents are scaled by a factor."""

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return latents[:, :, None]

    @override
    def unpack(self, state: Tensor, width: int, height: int) -> Tensor:
        return state[:, :, 0]

    def _normalise(self, latents: Tensor) -> Tensor:
        return super()._normalise(latents)[:, :, 0]

    def _denormalise(self, latents: Tensor) -> Tensor:
        return super()._denormalise(latents[:, :, None])

    def _to_vae_image(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, None]

    def _from_vae_image(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, 0]


class WanLayout(VideoVaeLayout, FrameLayout):
    """Wan 2.1 and 2.2: statistics per channel."""


class AnimaLayout(WanLayout):
    """Anima: Qwen-Image's VAE, which is Wan's, and Cosmos' network."""


class HunyuanVideoLayout(FrameLayout):
    """HunyuanVideo: guidance is an input of the network."""


class HunyuanVideo15Layout(FrameLayout, HunyuanImageLayout):
    """HunyuanVideo 1.5: guidance is a component of the pipeline."""


@dataclass(frozen=True)
class LtxLayout(FrameLayout):
    """LTX-Video: a token is a latent pixel. Some decoders are told how much noise is left, and given that much.

    Attributes:
        told: Fraction of noise that such a decoder is told; None: the default of the pipeline's call.
        noise: Fraction of noise that is added before; None: as it is told.
    """

    told: float | None = None
    noise: float | None = None

    @override
    def for_arguments(self, arguments: Mapping[str, Any]) -> Layout:
        # Both are arguments of the pipeline's call.
        found = {
            field: checked_number(arguments[word], word, 0, 1)
            for field, word in (("told", "decode_timestep"), ("noise", "decode_noise_scale"))
            if arguments.get(word) is not None
        }
        return replace(self, **found)

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return pack(latents, 1)

    @override
    def unpack(self, state: Tensor, width: int, height: int) -> Tensor:
        _, rows, columns = self.latent_shape(width, height)
        return unpack(state, rows, columns, 1)

    def _normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return ((latents - mean) * self.pipe.vae.config.scaling_factor / std)[:, :, 0]

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents[:, :, None] * std / self.pipe.vae.config.scaling_factor + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            row.view(1, -1, 1, 1, 1).to(like) for row in (self.pipe.vae.latents_mean, self.pipe.vae.latents_std)
        )
        return mean, std

    def _decoded(self, vae: Any, latents: Tensor) -> Tensor:
        if not vae.config.timestep_conditioning:
            return super()._decoded(vae, latents)
        said = parameter_defaults(self.pipe.__call__).get("decode_timestep") or 0.0
        told = float(said) if self.told is None else self.told
        left = told if self.noise is None else self.noise
        drawn = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
        noisy = (1 - left) * latents + left * drawn
        return vae.decode(noisy, torch.tensor([told]).to(latents), return_dict=False)[0]
