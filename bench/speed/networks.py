"""The networks of a family in their true sizes, with random weights: time does not depend on the weights.

`build("flux1-dev")` gives a diffusers pipeline without text encoders, `embeddings` random text of the true length, and
`make_encoder` the text encoders one by one, since most GPUs do not hold all parts at once. With `small=True` the same
classes are a few channels wide, to run every line without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from mrflow_sched.plan.families import get_family

Arguments = Mapping[str, Any]

_KL: Arguments = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_SMALL_KL: Arguments = {"block_out_channels": (16, 16, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
_DYNAMIC: Arguments = {"use_dynamic_shifting": True, "shift": 3.0}


@dataclass(frozen=True)
class Encoder:
    """A text encoder: class and configuration of transformers by name, true-size arguments, and tokens of a prompt."""

    title: str
    model: str
    config: str
    arguments: Arguments
    tokens: int


def _clip(title: str, model: str, width: int, layers: int, heads: int) -> Encoder:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    return Encoder(
        title, model, "CLIPTextConfig", {**sizes, "num_hidden_layers": layers, "num_attention_heads": heads}, 77
    )


_CLIP_L = _clip("CLIP-L", "CLIPTextModel", 768, 12, 12)
_CLIP_G = _clip("CLIP-G", "CLIPTextModelWithProjection", 1280, 32, 20)
_T5: Arguments = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
_T5_512 = Encoder("T5-XXL", "T5EncoderModel", "T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}, 512)
_T5_256 = Encoder("T5-XXL", "T5EncoderModel", "T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}, 256)
_QWEN25 = Encoder(
    "Qwen2.5-VL-7B, its text part",
    "Qwen2Model",
    "Qwen2Config",
    {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    98,  # 34 of the template before the prompt's own
)
_QWEN3 = Encoder(
    "Qwen3-4B",
    "Qwen3Model",
    "Qwen3Config",
    {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    64,
)
_SMALLER: Arguments = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim", "d_model", "d_ff"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_key_value_heads"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 2),
    **dict.fromkeys(("d_kv", "head_dim"), 16),
    "vocab_size": 1000,
}
"""Arguments that shrink an encoder of any kind."""


@dataclass(frozen=True)
class Recipe:
    """How one family is built: classes of diffusers by name, their true-size arguments, and those that shrink them.

    `text(config, batch, device, dtype)` gives the pipeline's keyword arguments in place of a prompt; text widths
    follow the network's own arguments.
    """

    pipeline: str
    network: str
    arguments: Arguments
    small: Arguments
    text: Callable[[Any, int, torch.device, torch.dtype], dict[str, Any]]
    vae: str = "AutoencoderKL"
    vae_arguments: Arguments = field(default_factory=lambda: _KL)
    vae_small: Arguments = field(default_factory=lambda: _SMALL_KL)
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    scheduler_arguments: Arguments = field(default_factory=lambda: _DYNAMIC)
    encoders: tuple[Encoder, ...] = ()

    @property
    def part(self) -> str:
        """The pipeline's name for its network."""
        return "unet" if "UNet" in self.network else "transformer"


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def _flux_text(config: Any, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "prompt_embeds": _random(
            (batch, get_family("flux1-dev").text_tokens, config.joint_attention_dim), device, dtype
        ),
        "pooled_prompt_embeds": _random((batch, config.pooled_projection_dim), device, dtype),
    }


def _qwen_text(config: Any, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A prompt of the family's usual length and a negative one of 8 tokens, about the length of an empty one."""
    made: dict[str, Any] = {}
    for prefix, length in (("", get_family("qwen-image").text_tokens), ("negative_", 8)):
        made[f"{prefix}prompt_embeds"] = _random((batch, length, config.joint_attention_dim), device, dtype)
        made[f"{prefix}prompt_embeds_mask"] = torch.ones((batch, length), dtype=torch.long, device=device)
    return made


def _zimage_text(config: Any, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds": [_random((length, config.cap_feat_dim), device, dtype) for _ in range(batch)]
        for prefix, length in (("", get_family("z-image").text_tokens), ("negative_", 8))
    }


def _sd3_text(config: Any, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for prefix in ("", "negative_"):
        made[f"{prefix}prompt_embeds"] = _random(
            (batch, get_family("sd35").text_tokens, config.joint_attention_dim), device, dtype
        )
        made[f"{prefix}pooled_prompt_embeds" if not prefix else "negative_pooled_prompt_embeds"] = _random(
            (batch, config.pooled_projection_dim), device, dtype
        )
    return made


def _sdxl_text(config: Any, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    made: dict[str, Any] = {}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    for prefix in ("", "negative_"):
        made[f"{prefix}prompt_embeds"] = _random((batch, 77, config.cross_attention_dim), device, dtype)
        made[f"{prefix}pooled_prompt_embeds"] = _random((batch, pooled), device, dtype)
    return made


RECIPES: Mapping[str, Recipe] = {
    "flux1-dev": Recipe(
        "FluxPipeline",
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        {
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        },
        _flux_text,
        encoders=(_CLIP_L, _T5_512),
    ),
    "qwen-image": Recipe(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {},
        {
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        },
        _qwen_text,
        vae="AutoencoderKLQwenImage",
        vae_arguments={},
        vae_small={"base_dim": 8},
        encoders=(_QWEN25,),
    ),
    "z-image": Recipe(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        {},
        {
            "dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 32,
            "axes_dims": [8, 12, 12],
        },
        _zimage_text,
        scheduler_arguments={"shift": 3.0},
        encoders=(_QWEN3,),
    ),
    "sd35": Recipe(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "attention_head_dim": 64,
            "caption_projection_dim": 2432,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "out_channels": 16,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "caption_projection_dim": 64,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
        },
        _sd3_text,
        vae_arguments={**_KL, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        scheduler_arguments={"shift": 3.0},
        encoders=(_CLIP_L, _CLIP_G, _T5_256),
    ),
    "sdxl": Recipe(
        "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {
            "block_out_channels": (32, 32, 64),
            "transformer_layers_per_block": (1, 1, 1),
            "attention_head_dim": (2, 2, 2),
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
        _sdxl_text,
        vae_arguments={
            **_KL,
            "latent_channels": 4,
            "scaling_factor": 0.13025,
            "shift_factor": None,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
        },
        scheduler="EulerDiscreteScheduler",
        scheduler_arguments={
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "steps_offset": 1,
            "timestep_spacing": "leading",
        },
        encoders=(_CLIP_L, _CLIP_G),
    ),
}


def make_network(name: str, *, small: bool = False) -> Any:
    """The network alone, on the default device and in the default dtype."""
    recipe = RECIPES[name]
    return getattr(diffusers, recipe.network)(**{**recipe.arguments, **(recipe.small if small else {})})


def make_vae(name: str, *, small: bool = False) -> Any:
    """The VAE alone, on the default device and in the default dtype."""
    recipe = RECIPES[name]
    return getattr(diffusers, recipe.vae)(**{**recipe.vae_arguments, **(recipe.vae_small if small else {})})


def make_encoder(encoder: Encoder, device: torch.device, dtype: torch.dtype, *, small: bool = False) -> Any:
    """A text encoder with random weights. Raises AttributeError if the installed transformers is too old."""
    import transformers

    library: Any = transformers
    arguments = {name: _SMALLER.get(name, value) if small else value for name, value in encoder.arguments.items()}
    model, config = getattr(library, encoder.model), getattr(library, encoder.config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model(config(**arguments)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def make_upscaler(*, small: bool = False) -> torch.nn.Module:
    """RRDBNet x2 of 23 blocks (small: one), whose first layer takes 2x2 pixels as channels, like RealESRGAN_x2plus."""
    from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet  # pyright: ignore[reportMissingImports]

    filters, blocks = (8, 1) if small else (64, 23)
    return RRDBNet(in_nc=12, num_filters=filters, num_blocks=blocks, scale=4, shuffle_factor=2)


def build(name: str, device: torch.device, dtype: torch.dtype, *, small: bool = False) -> Any:
    """The family's pipeline without text encoders; weights are the classes' own initial ones, the same each time."""
    recipe = RECIPES[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            network, vae = make_network(name, small=small), make_vae(name, small=small)
    finally:
        torch.set_default_dtype(before)
    parts: dict[str, Any] = {
        recipe.part: network,
        "vae": vae.to(memory_format=torch.channels_last) if recipe.vae == "AutoencoderKL" else vae,
        "scheduler": getattr(diffusers, recipe.scheduler)(**recipe.scheduler_arguments),
    }
    for part in (network, vae):
        part.eval().requires_grad_(False).to(device, dtype)
    kind = getattr(diffusers, recipe.pipeline)
    wanted = {"text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"}
    known = set(kind.__init__.__code__.co_varnames)
    pipe = kind(**parts, **dict.fromkeys(wanted & known))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(name: str, pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Random text embeddings for `batch` images, as keyword arguments of the pipeline's call."""
    network = getattr(pipe, RECIPES[name].part)
    return RECIPES[name].text(network.config, batch, network.device, network.dtype)
