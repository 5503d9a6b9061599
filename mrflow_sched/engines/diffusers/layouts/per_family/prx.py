"""PRX, on latents and on pixels."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.base import Layout
from mrflow_sched.plan.families import Family

__all__ = ["PrxLayout", "PrxPixelLayout"]


class PrxLayout(Layout):
    """PRX: its call makes one image at a time where it guides, as it has one time for each branch."""

    @override
    def runs_together(self, text: Mapping[str, Any]) -> bool:
        return False

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        text = super()._encode_rows(prompts, negatives, options)
        if not self._guided or "negative_prompt_embeds" in text:
            return text
        # Its encode_prompt makes no negative embeddings where the others are given.
        own = {name: value for name, value in options.items() if not name.startswith("prompt_")}
        other = super()._encode_rows(negatives or [""] * len(text["prompt_embeds"]), None, own)
        return text | {f"negative_{name}": other[name] for name in ("prompt_embeds", "prompt_attention_mask")}


class PrxPixelLayout(PrxLayout):
    """PRX Pixel: latents are pixels from -1 to 1 over the deviation of its noise, which is not 1."""

    pixels: ClassVar[bool] = True

    @classmethod
    @override
    def latent_numbers(cls, pipe: Any, family: Family) -> tuple[int, int]:
        return 1, int(pipe.transformer.config.in_channels)

    @property
    @override
    def keeps_alpha(self) -> bool:
        return False

    @property
    @override
    def vae_dtype(self) -> torch.dtype:
        return torch.float32

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return latents * self.pipe.config.noise_scale

    @override
    def unpack(self, state: Tensor, width: int, height: int) -> Tensor:
        return state / self.pipe.config.noise_scale

    def _normalise(self, latents: Tensor) -> Tensor:
        return latents / self.pipe.config.noise_scale

    def _denormalise(self, latents: Tensor) -> Tensor:
        return latents * self.pipe.config.noise_scale

    @contextlib.contextmanager
    def _vae(self) -> Generator[tuple[Any, torch.device, torch.dtype], None, None]:
        yield _Pixels(), self.device, torch.float32


class _Pixels:
    """In the place of a VAE: pixels as they are."""

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=pixels)

    def decode(self, latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (latents,)
