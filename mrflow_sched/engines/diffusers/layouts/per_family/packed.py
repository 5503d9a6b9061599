"""Latents as rows of tokens, and VAEs of one video frame: what several families share."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.base import Layout

__all__ = ["PATCH", "PackedLayout", "VideoVaeLayout", "pack", "unpack"]


PATCH = 2


def pack(latents: Tensor, patch: int = PATCH) -> Tensor:
    """Latents as rows of tokens: each is a patch of p x p, channel outermost (FLUX.1's order).

    Args:
        latents: (B, C, h, w), h and w multiples of `patch`.
        patch: p.

    Returns:
        (B, h/p * w/p, C * p * p).
    """
    batch, channels, rows, columns = latents.shape
    patches = latents.reshape(batch, channels, rows // patch, patch, columns // patch, patch)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpack(tokens: Tensor, rows: int, columns: int, patch: int = PATCH) -> Tensor:
    """Inverse of `pack`.

    Args:
        tokens: (B, h/p * w/p, C * p * p).
        rows: h.
        columns: w.
        patch: p.

    Returns:
        (B, C, h, w).
    """
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, rows // patch, columns // patch, features // patch**2, patch, patch)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // patch**2, rows, columns)


class PackedLayout(Layout):
    """Latents as rows of tokens: each token is a patch of p x p, channel outermost (FLUX.1's order)."""

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return pack(latents, self.family.patch)

    @override
    def unpack(self, state: Tensor, width: int, height: int) -> Tensor:
        _, rows, columns = self.latent_shape(width, height)
        return unpack(state, rows, columns, self.family.patch)


class VideoVaeLayout(Layout):
    """A video VAE with one frame and statistics per channel."""

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
