"""A class for each family whose conventions differ from the plain kind, which is `Layout` itself. Names of what a
pipeline takes and gives stand in the family's file.

Source of every convention: the pipeline of the same name in diffusers, and docs/method.md, section 1.6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.layouts.base import Layout
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
    """(B, C, h, w) latents as (B, h/p * w/p, p * p * C) tokens: each is a patch of p x p, channel outermost."""
    batch, channels, rows, columns = latents.shape
    patches = latents.reshape(batch, channels, rows // patch, patch, columns // patch, patch)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpack(tokens: Tensor, rows: int, columns: int, patch: int = PATCH) -> Tensor:
    """Inverse of `pack`: (B, h/p * w/p, p * p * C) tokens as (B, C, h, w) latents of `rows` x `columns`."""
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, rows // patch, columns // patch, features // patch**2, patch, patch)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // patch**2, rows, columns)


class PackedLayout(Layout):
    """Latents as rows of tokens: each token is a patch of p x p, channel outermost (FLUX.1's order)."""

    def pack(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents as (B, h/p * w/p, p * p * C) tokens."""
        return pack(latents, self.family.patch)

    def unpack(self, state: Tensor, width: int, height: int) -> Tensor:
        """Inverse of `pack`."""
        _, rows, columns = self.latent_shape(width, height)
        return unpack(state, rows, columns, self.family.patch)


class FluxLayout(PackedLayout):
    """FLUX.1 in all its text-to-image pipelines: FluxPipeline, with ControlNet or Control, Kontext."""

    tokens: ClassVar[TokenInputs | None] = TokenInputs(
        "hidden_states", "img_ids", ("controlnet_block_samples", "controlnet_single_block_samples")
    )

    def cut_prompt(self, prompts: Sequence[str], options: Mapping[str, Any]) -> tuple[int, int] | None:
        """By T5's tokens."""
        tokenizer, read = getattr(self.pipe, "tokenizer_2", None), options.get("max_sequence_length")
        if tokenizer is None or read is None:
            return None
        longest = max((len(tokenizer(prompt, verbose=False).input_ids) for prompt in dict.fromkeys(prompts)), default=0)
        return (longest, read) if longest > read else None

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        text = super()._encode_rows(prompts, None, options)
        # Used where the caller also gives true_cfg_scale, which FluxPipeline takes from diffusers 0.32 on.
        if negatives is not None and "negative_prompt_embeds" in self.call_names:
            own = {name: value for name, value in options.items() if not name.endswith("prompt_embeds")}
            other = super()._encode_rows(negatives, None, own)
            text |= {f"negative_{name}": value for name, value in other.items()}
        return text

    def guided_by_two(self) -> Layout:
        """Guided by a second branch: the plan's scale is `true_cfg_scale`, which costs two forwards."""
        return replace(self, family=replace(self.family, guidance_kind="cfg"))

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """The scale that the network reads, or with a second branch that of the branches."""
        return {"true_cfg_scale" if self._guided else "guidance_scale": guidance}

    def stage_arguments(self, text: Any, guidance: float, width: int, height: int) -> dict[str, Any]:
        """As the base class; Kontext is told the area too, or it would render a megapixel whatever the size."""
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
        """A mask that hides nothing comes back as none, which the call would warn about."""
        text = super()._named(found)
        embeds: Tensor = text["prompt_embeds"]
        return {"prompt_embeds_mask": torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device), **text}

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """`true_cfg_scale`; a guidance-distilled network reads `guidance_scale` as well."""
        embedded = {"guidance_scale": guidance} if self.pipe.transformer.config.guidance_embeds else {}
        return {"true_cfg_scale": guidance, **embedded}


class Flux2Layout(Layout):
    """FLUX.2 dev: 2x2 patches first, then the VAE's running statistics; a latent pixel is a token.

    Latents are (128, H/16, W/16), the shape in which the pipeline draws its noise.
    """

    tokens: ClassVar[TokenInputs | None] = TokenInputs("hidden_states", "img_ids")

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """(4C, H/16, W/16): what is one channel of the VAE's latents is four here."""
        self._check_size(width, height)
        grid = self.family.grid
        return (self.family.latent_channels * PATCH * PATCH, height // grid, width // grid)

    def pack(self, latents: Tensor) -> Tensor:
        """(B, 4C, h, w) latents as (B, h * w, 4C) tokens."""
        return latents.flatten(2).transpose(1, 2)

    def unpack(self, state: Tensor, width: int, height: int) -> Tensor:
        """Inverse of `pack`."""
        return state.transpose(1, 2).reshape(len(state), *self.latent_shape(width, height))

    def call_latents(self, latents: Tensor) -> Tensor:
        """As they are: the pipeline packs them itself."""
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
    """Z-Image and Z-Image-Turbo: text as one tensor per image, and 0 is its word for guidance that is off.

    The pipeline's scale g means p + g (p - n): its 5.0 is what others call a CFG scale of 6. Plans keep its numbers.
    """

    def plan_guidance(self, guidance: float) -> float:
        """0 and below are off, which a plan calls 1."""
        return 1.0 if guidance <= 0.0 else guidance

    def guidance_weight(self, guidance: float) -> float:
        """The pipeline makes p + g (p - n), which leads g + 1 from the negative branch and g from the positive one."""
        return 0.0 if guidance == 1.0 else guidance

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """The pipeline's scale; 0.0 for the plan's 1 (off)."""
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

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """The embedded scale of a distilled network; elsewhere the guider has it: see `view_attributes`."""
        return {} if self._guided else {"distilled_guidance_scale": guidance}

    def view_attributes(self, guidance: float, width: int, height: int) -> dict[str, Any]:
        """Guiders of its own for each stage: they count steps, and the scale is theirs."""
        made: dict[str, Any] = {}
        for name in ("guider", "ocr_guider"):
            guider = getattr(self.pipe, name, None)
            if guider is not None:
                asked = {} if guidance == self.family.guidance else {"guidance_scale": guidance}
                made[name] = guider.new(enabled=False) if guidance == 1.0 else guider.new(**asked)
        return made


class HiDreamLayout(Layout):
    """HiDream-I1: four text encoders, at most the tokens that its network was made for."""

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """(C, h, w). Raises ValueError off the grid, and above the network's longest sequence."""
        made = super().latent_shape(width, height)
        longest, tokens = int(self.pipe.transformer.max_seq), made[1] * made[2] // self.family.patch**2
        if tokens > longest:
            raise MrFlowError(
                f"size is {width}x{height}, which is {tokens} tokens; this HiDream reads at most {longest}: choose a "
                f"smaller size."
            )
        return made

    def select_text(self, text: Any, rows: Any) -> dict[str, Any]:
        """As the base class; Llama's states are (layer, row, token, channel)."""
        moved = {name: value.transpose(0, 1) if "llama3" in name else value for name, value in text.items()}
        picked = super().select_text(moved, rows)
        return {name: value.transpose(0, 1) if "llama3" in name else value for name, value in picked.items()}

    def take_rows(self, inputs: Mapping[str, Any], rows: slice, count: int) -> dict[str, Any]:
        """As the base class; Llama's states are (layer, row, token, channel)."""
        taken = super().take_rows(inputs, rows, count)
        return {name: inputs[name][:, rows] if "llama3" in name else value for name, value in taken.items()}

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """0 where the plan says 1: either is off."""
        return {"guidance_scale": 0.0 if guidance == 1.0 else guidance}

    def view_attributes(self, guidance: float, width: int, height: int) -> dict[str, Any]:
        """The pipeline scales every size to the area of its default one: make that the stage's, and a hair more."""
        return {"default_sample_size": (width * height) ** 0.5 / self.pipe.vae_scale_factor * (1 + 1e-6)}


class StableDiffusionLayout(Layout):
    """Stable Diffusion 1.5 and its kin: a U-Net of variance-exploding noise, carried over by equal signal-to-noise."""

    def finish(self, images: Tensor) -> Tensor:
        """Black where the pipeline has a safety checker that says so."""
        if getattr(self.pipe, "safety_checker", None) is None:
            return images
        with torch.no_grad():
            found = self.pipe.run_safety_checker(2 * images - 1, self.device, self.pipe.unet.dtype)[1]
        return torch.stack([image * (not bad) for image, bad in zip(images, found, strict=True)])

    def _normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) * self.pipe.vae.config.scaling_factor / std

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std / self.pipe.vae.config.scaling_factor + mean

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

    def finish(self, images: Tensor) -> Tensor:
        """With the pipeline's invisible watermark, where it has one."""
        watermark = getattr(self.pipe, "watermark", None)
        if watermark is None:
            return images
        marked: Tensor = watermark.apply_watermark(2 * images.cpu() - 1)
        return (marked.to(images) / 2 + 0.5).clamp(0, 1)
