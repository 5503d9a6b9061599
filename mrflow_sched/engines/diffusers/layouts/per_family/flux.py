"""FLUX.1 and FLUX.2."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.layouts.base import Layout
from mrflow_sched.engines.diffusers.layouts.per_family.packed import PATCH, PackedLayout
from mrflow_sched.engines.diffusers.quiet import leaving_out
from mrflow_sched.sampling.network import TokenInputs

__all__ = ["Flux2KleinLayout", "Flux2Layout", "Flux2VaeLayout", "FluxLayout"]


class FluxLayout(PackedLayout):
    """FLUX.1 in all its text-to-image pipelines: FluxPipeline, with ControlNet or Control, Kontext."""

    tokens: ClassVar[TokenInputs | None] = TokenInputs(
        "hidden_states", "img_ids", ("controlnet_block_samples", "controlnet_single_block_samples")
    )

    @override
    def cut_prompt(self, prompts: Sequence[str], options: Mapping[str, Any]) -> tuple[int, int] | None:
        # In tokens of T5.
        tokenizer, read = getattr(self.pipe, "tokenizer_2", None), options.get("max_sequence_length")
        if tokenizer is None or read is None:
            return None
        longest = max((len(tokenizer(prompt, verbose=False).input_ids) for prompt in dict.fromkeys(prompts)), default=0)
        return (longest, read) if longest > read else None

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        cut = self.cut_prompt(prompts or (), options) is not None  # then the engine says so
        with leaving_out("part of your input was truncated") if cut else contextlib.nullcontext():
            text = super()._encode_rows(prompts, None, options)
        # Used where the caller also gives true_cfg_scale, which FluxPipeline takes from diffusers 0.32 on.
        if negatives is not None and "negative_prompt_embeds" in self.call_names:
            own = {name: value for name, value in options.items() if not name.endswith("prompt_embeds")}
            other = super()._encode_rows(negatives, None, own)
            text |= {f"negative_{name}": value for name, value in other.items()}
        return text

    @override
    def guided_by_two(self) -> Layout:
        # The plan's scale is then `true_cfg_scale`, which costs two forwards.
        if "true_cfg_scale" not in self.call_names:
            raise MrFlowError(
                f"{type(self.pipe).__name__} of the installed diffusers has no true_cfg_scale, which guidance by a "
                "second branch needs; leave the negative prompt and true_cfg_scale out, or update diffusers."
            )
        return replace(self, family=replace(self.family, guidance_kind="cfg"))

    @override
    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        # The embedded scale; with a second branch, the CFG scale.
        return {"true_cfg_scale" if self._guided else "guidance_scale": guidance}

    @override
    def stage_arguments(self, text: Any, guidance: float, width: int, height: int) -> dict[str, Any]:
        # Kontext needs the area too, or it would render a megapixel whatever the size.
        made = super().stage_arguments(text, guidance, width, height)
        return made | ({"max_area": width * height} if "max_area" in self.call_names else {})


class Flux2VaeLayout(Layout):
    """FLUX.2's VAE: 2x2 patches first, then its running statistics."""

    def _normalise(self, latents: Tensor) -> Tensor:
        batch, channels, rows, columns = latents.shape
        patches = latents.reshape(batch, channels, rows // PATCH, PATCH, columns // PATCH, PATCH)
        merged = patches.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, rows // PATCH, columns // PATCH)
        mean, std = self._statistics(latents)
        return (merged - mean) / std

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        batch, channels, rows, columns = latents.shape
        patches = (latents * std + mean).reshape(batch, channels // PATCH**2, PATCH, PATCH, rows, columns)
        return patches.permute(0, 1, 4, 2, 5, 3).reshape(batch, -1, rows * PATCH, columns * PATCH)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        mean: Tensor = vae.bn.running_mean.view(1, -1, 1, 1).to(like)
        power: Tensor = vae.bn.running_var.view(1, -1, 1, 1) + self._epsilon
        return mean, power.sqrt().to(like)

    @property
    def _epsilon(self) -> float:
        return self.pipe.vae.config.batch_norm_eps


class Flux2Layout(Flux2VaeLayout):
    """FLUX.2 dev: a latent pixel is a token.

    Latents are (128, H/16, W/16), the shape in which the pipeline draws its noise.
    """

    tokens: ClassVar[TokenInputs | None] = TokenInputs("hidden_states", "img_ids")

    @override
    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        # (4C, H/16, W/16): one channel of the VAE's latents is four here.
        self._check_size(width, height)
        grid = self.family.grid
        return (self.family.latent_channels * PATCH * PATCH, height // grid, width // grid)

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    @override
    def unpack(self, state: Tensor, width: int, height: int) -> Tensor:
        return state.transpose(1, 2).reshape(len(state), *self.latent_shape(width, height))

    @override
    def call_latents(self, latents: Tensor) -> Tensor:
        # The pipeline packs them itself.
        return latents


class Flux2KleinLayout(Flux2Layout):
    """FLUX.2 Klein, base (CFG) and distilled (none); the pipeline itself only knows the empty negative prompt."""

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        text = super()._encode_rows(prompts, None, options)
        if not self._guided or "negative_prompt_embeds" in options:
            return text
        own = {name: value for name, value in options.items() if name != "prompt_embeds"}
        other = super()._encode_rows(negatives or [""] * len(text["prompt_embeds"]), None, own)
        return text | {"negative_prompt_embeds": other["prompt_embeds"]}
