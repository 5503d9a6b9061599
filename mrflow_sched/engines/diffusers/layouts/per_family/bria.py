"""Bria 3.2, FIBO and Fibo 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.per_family.flux import Flux2VaeLayout
from mrflow_sched.engines.diffusers.layouts.per_family.packed import PATCH, PackedLayout, VideoVaeLayout
from mrflow_sched.engines.diffusers.layouts.per_family.text_in_call import RowByRow, TextInCall

__all__ = ["BriaFibo2Layout", "BriaFiboLayout", "BriaLayout"]


class BriaLayout(RowByRow, PackedLayout):
    """Bria 3.2: FLUX.1's packing; an empty negative prompt is embeddings of zeros."""


class BriaFiboLayout(TextInCall, VideoVaeLayout):
    """Bria FIBO: Wan 2.2's VAE with one frame; a token is a latent pixel."""

    @override
    def take_rows(self, inputs: Mapping[str, Any], rows: slice, count: int) -> dict[str, Any]:
        # The text encoder's layers are a list of tensors with a row for each sample, however many layers there are.
        taken = super().take_rows(inputs, rows, count)
        return {**taken, "text_encoder_layers": [layer[rows] for layer in inputs["text_encoder_layers"]]}

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    @override
    def unpack(self, state: Tensor, width: int, height: int) -> Tensor:
        return state.transpose(1, 2).reshape(len(state), *self.latent_shape(width, height))


class BriaFibo2Layout(TextInCall, Flux2VaeLayout):
    """Bria Fibo 2: FLUX.2's VAE, whose patches are taken apart again."""

    def _normalise(self, latents: Tensor) -> Tensor:
        return torch.pixel_shuffle(super()._normalise(latents), PATCH)

    def _denormalise(self, latents: Tensor) -> Tensor:
        return super()._denormalise(torch.pixel_unshuffle(latents, PATCH))
