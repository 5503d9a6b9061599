"""Ideogram 4."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from mrflow_sched.engines.diffusers.layouts.per_family.flux import Flux2Layout
from mrflow_sched.engines.diffusers.layouts.per_family.packed import PATCH
from mrflow_sched.engines.diffusers.layouts.per_family.text_in_call import TextInCall
from mrflow_sched.plan.schedule import LOGIT_NORMAL_LARGEST, shift_sigma
from mrflow_sched.sampling.network import TokenInputs

__all__ = ["Ideogram4Layout"]


class Ideogram4Layout(TextInCall, Flux2Layout):
    """Ideogram 4: FLUX.2's VAE with the channels of a patch innermost, and a second network without text."""

    tokens: ClassVar[TokenInputs | None] = None
    always_guided: ClassVar[bool] = True
    # What `encode_prompt` makes of it depends on the size of the image.
    remembered: ClassVar[str | None] = "_get_text_encoder_hidden_states"

    @property
    @override
    def network_names(self) -> tuple[str, ...]:
        # The second is that of the negative branch.
        return ("transformer", "unconditional_transformer")

    @override
    def stage_sigmas(self, sigmas: tuple[float, ...]) -> tuple[float, ...]:
        # Pure noise is just below 1 in its schedule.
        largest = shift_sigma(LOGIT_NORMAL_LARGEST, math.exp(self.family.shift.base_shift))
        return (largest, *sigmas[1:]) if sigmas[0] == 1.0 and sigmas[1] < largest else sigmas

    @override
    def call_latents(self, latents: Tensor) -> Tensor:
        return self.pack(latents)

    @override
    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        # One scale in place of the call's own list of 48.
        return {"guidance_scale": guidance, "guidance_schedule": None}

    def _normalise(self, latents: Tensor) -> Tensor:
        batch, channels, rows, columns = latents.shape
        patches = latents.reshape(batch, channels, rows // PATCH, PATCH, columns // PATCH, PATCH)
        merged = patches.permute(0, 3, 5, 1, 2, 4).reshape(batch, -1, rows // PATCH, columns // PATCH)
        mean, std = self._statistics(latents)
        return (merged - mean) / std

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        batch, channels, rows, columns = latents.shape
        patches = (latents * std + mean).reshape(batch, PATCH, PATCH, channels // PATCH**2, rows, columns)
        return patches.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, rows * PATCH, columns * PATCH)
