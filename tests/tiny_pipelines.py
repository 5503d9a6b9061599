"""Tiny random-weight diffusers pipelines of the real classes, built offline in a second each: `make("flux1-dev")`.

Widths are a few channels, but everything that conventions depend on is real: VAE factors, patch sizes, latent
channels, statistics, schedulers with the released configurations, tokenizers with chat templates where the family has
one. The same name always gives the same weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_CLASSES = {
    "flux1-dev": "FluxPipeline",
    "flux1-schnell": "FluxPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "qwen-image": "QwenImagePipeline",
}

NAMES = tuple(_CLASSES)
"""Every pipeline that `make` can build where the installed diffusers has its class."""


def available() -> list[str]:
    """The names whose pipeline class the installed diffusers has."""
    return [name for name in NAMES if _has(name)]


def make(name: str) -> Any:
    """A fresh pipeline called `name`; skips the test where the installed diffusers has no such class."""
    import torch

    if not _has(name):
        pytest.skip(f"the installed diffusers has no {_CLASSES[name]}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        pipe = _BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def _has(name: str) -> bool:
    return hasattr(_diffusers(), _CLASSES[name])


def _diffusers() -> Any:
    from mrflow_sched._torchvision_ops import ensure_ops

    ensure_ops()
    import diffusers

    return diffusers


def _transformers() -> Any:
    _diffusers()
    import transformers

    return transformers


# ----------------------------------------------------------------------------------------------------------- tokenizers

_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{{ message['content'][0]['text'] }}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>")
VOCABULARY = len(_SPECIAL) + 256


def tokenizer(length: int, *, bos: bool = False, eos: bool = True, side: str = "right") -> Any:
    """A byte-level tokenizer without merges: every byte is a token, so any prompt has its own ids."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*_SPECIAL, *letters))}
    inner = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    shape = " ".join(["<bos>"] * bos + ["$A"] + ["<eos>"] * eos)
    inner.post_processor = processors.TemplateProcessing(single=shape, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=length,
        padding_side=side,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=_CHAT,
    )


# -------------------------------------------------------------------------------------------------------- text encoders


def _clip(projected: bool = False) -> Any:
    config = _transformers().CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    kind = _transformers().CLIPTextModelWithProjection if projected else _transformers().CLIPTextModel
    return kind(config)


def _t5(width: int = 16) -> Any:
    config = _transformers().T5Config(vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return _transformers().T5EncoderModel(config)


_SMALL_LANGUAGE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _qwen25_vl() -> Any:
    """Qwen-Image's text encoder, with an image tower that nothing here uses."""
    text = {**_SMALL_LANGUAGE, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    config = _transformers().Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=3, vision_end_token_id=3, image_token_id=3
    )
    return _transformers().Qwen2_5_VLForConditionalGeneration(config)


# ------------------------------------------------------------------------------------------------------------------ VAE


def _kl(channels: int, scaling: float, shift: float | None, *, quant: bool = False, levels: int = 4) -> Any:
    return _diffusers().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        mid_block_add_attention=False,
    )


# ------------------------------------------------------------------------------------------------------------ pipelines


def _flow_euler(**config: Any) -> Any:
    return _diffusers().FlowMatchEulerDiscreteScheduler(**config)


_FLUX_SHIFT = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def _flux1(guidance_embeds: bool, **scheduler: Any) -> Any:
    diffusers = _diffusers()
    return diffusers.FluxPipeline(
        scheduler=_flow_euler(**scheduler),
        vae=_kl(16, 0.3611, 0.1159),
        text_encoder=_clip(),
        tokenizer=tokenizer(77, bos=True),
        text_encoder_2=_t5(),
        tokenizer_2=tokenizer(512),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        ),
    )


def _sd3() -> Any:
    diffusers = _diffusers()
    return diffusers.StableDiffusion3Pipeline(
        scheduler=_flow_euler(shift=3.0),
        vae=_kl(16, 1.5305, 0.0609),
        text_encoder=_clip(projected=True),
        tokenizer=tokenizer(77, bos=True),
        text_encoder_2=_clip(projected=True),
        tokenizer_2=tokenizer(77, bos=True),
        text_encoder_3=_t5(32),
        tokenizer_3=tokenizer(512),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=192,
        ),
    )


def _qwen_image() -> Any:
    diffusers = _diffusers()
    return diffusers.QwenImagePipeline(
        scheduler=_flow_euler(
            **{**_FLUX_SHIFT, "shift": 1.0, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
        ),
        vae=diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=_qwen25_vl(),
        tokenizer=tokenizer(2048, eos=False),
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
    )


_BUILDERS: dict[str, Callable[[], Any]] = {
    "flux1-dev": lambda: _flux1(True, **_FLUX_SHIFT),
    "flux1-schnell": lambda: _flux1(False, shift=1.0),
    "sd3": _sd3,
    "qwen-image": _qwen_image,
}
