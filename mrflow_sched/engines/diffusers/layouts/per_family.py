"""A class for each family whose conventions differ from the plain kind, which is `Layout` itself.

Argument names of a pipeline are in the family's file. Source of every convention: the pipeline of the same name in
diffusers, and docs/method.md, section 1.6.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.layouts.base import Layout
from mrflow_sched.engines.diffusers.quiet import leaving_out
from mrflow_sched.sampling.network import TokenInputs

__all__ = [
    "Flux2KleinLayout",
    "Flux2Layout",
    "FluxLayout",
    "HiDreamLayout",
    "HunyuanImageLayout",
    "Layout",
    "PackedLayout",
    "QwenImageLayout",
    "StableDiffusionLayout",
    "StableDiffusionXLLayout",
    "VideoVaeLayout",
    "ZImageLayout",
    "pack",
    "unpack",
]

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


class QwenImageLayout(VideoVaeLayout, PackedLayout):
    """Qwen-Image: true CFG, a video VAE with one frame, statistics per channel."""

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        text = super()._encode_rows(prompts, None, options)
        if "negative_prompt_embeds" in options:
            return text  # ready, and its text encoder may be gone
        own = {name: value for name, value in options.items() if not name.startswith("prompt_embeds")}
        other = super()._encode_rows(negatives or [" "] * len(text["prompt_embeds"]), None, own)
        return text | {f"negative_{name}": value for name, value in other.items()}

    def _named(self, found: Any) -> dict[str, Any]:
        """A mask that hides nothing is returned as None, which the call would warn about; it becomes one of ones."""
        text = super()._named(found)
        embeds: Tensor = text["prompt_embeds"]
        return {"prompt_embeds_mask": torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device), **text}

    @override
    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        # A guidance-distilled network reads `guidance_scale` as well.
        embedded = {"guidance_scale": guidance} if self.pipe.transformer.config.guidance_embeds else {}
        return {"true_cfg_scale": guidance, **embedded}


class Flux2Layout(Layout):
    """FLUX.2 dev: 2x2 patches first, then the VAE's running statistics; a latent pixel is a token.

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
        power: Tensor = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
        return mean, power.sqrt().to(like)


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


class ZImageLayout(Layout):
    """Z-Image and Z-Image-Turbo: text as one tensor per image, and guidance 0 is off.

    The pipeline's scale g means p + g (p - n): its 5.0 is what others call a CFG scale of 6. Plans keep its numbers.
    """

    @override
    def plan_guidance(self, guidance: float) -> float:
        # 0 and below are off, which is 1 in a plan.
        return 1.0 if guidance <= 0.0 else guidance

    @override
    def guidance_weight(self, guidance: float) -> float:
        # The pipeline computes p + g (p - n): g from the positive branch, g + 1 from the negative one.
        return 0.0 if guidance == 1.0 else guidance

    @override
    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        # 0.0 for the plan's 1 (off).
        return {"guidance_scale": 0.0 if guidance == 1.0 else guidance}

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        if prompts is not None:
            return super()._encode_rows(prompts, negatives, options)
        # Its encode_prompt cannot be without prompts.
        text = {name: options[name] for name in self.text_outputs if name in options}
        if self._guided and "negative_prompt_embeds" not in text:
            own = {name: value for name, value in options.items() if name not in text}
            other = super()._encode_rows(negatives or [""] * len(text["prompt_embeds"]), None, own)
            text["negative_prompt_embeds"] = other["prompt_embeds"]
        return text

    def _named(self, found: Any) -> dict[str, Any]:
        return {name: value for name, value in super()._named(found).items() if value}


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


class StableDiffusionLayout(Layout):
    """Stable Diffusion 1.5 and similar models: a variance-exploding U-Net, used at equal signal-to-noise ratio."""

    @override
    def finish(self, images: Tensor) -> tuple[Tensor, tuple[bool, ...] | None]:
        # Images that the pipeline's safety checker rejects become black.
        if getattr(self.pipe, "safety_checker", None) is None:
            return images, None
        with torch.no_grad():
            found = self.pipe.run_safety_checker(2 * images - 1, self.device, self.pipe.unet.dtype)[1]
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
