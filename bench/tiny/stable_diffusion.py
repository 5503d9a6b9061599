"""Stable Diffusion 1.5, XL and 3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.tiny.parts import SCALED_LINEAR, clip, diffusers, flow_euler, kl_vae, t5, tokenizer, unet


def _sd15() -> Any:
    library = diffusers()
    return library.StableDiffusionPipeline(
        scheduler=library.PNDMScheduler(**SCALED_LINEAR, skip_prk_steps=True),
        vae=kl_vae(4, 0.18215, None, quant=True),
        text_encoder=clip(),
        tokenizer=tokenizer(77, bos=True),
        unet=unet(16, sample_size=64),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    library = diffusers()
    return library.StableDiffusionXLPipeline(
        scheduler=library.EulerDiscreteScheduler(**SCALED_LINEAR),
        vae=kl_vae(4, 0.13025, None, quant=True),
        text_encoder=clip(),
        tokenizer=tokenizer(77, bos=True),
        text_encoder_2=clip(projected=True, width=24),
        tokenizer_2=tokenizer(77, bos=True),
        unet=unet(
            40,
            sample_size=128,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        ),
        add_watermarker=False,
    )


def _sd3() -> Any:
    library = diffusers()
    return library.StableDiffusion3Pipeline(
        scheduler=flow_euler(shift=3.0),
        vae=kl_vae(16, 1.5305, 0.0609),
        text_encoder=clip(projected=True),
        tokenizer=tokenizer(77, bos=True),
        text_encoder_2=clip(projected=True, width=24),
        tokenizer_2=tokenizer(77, bos=True),
        text_encoder_3=t5(40),
        tokenizer_3=tokenizer(512),
        transformer=library.SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=40,
            caption_projection_dim=16,
            pooled_projection_dim=40,
            pos_embed_max_size=192,
        ),
    )


PIPELINES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "sd15": ("StableDiffusionPipeline", _sd15),
    "sdxl": ("StableDiffusionXLPipeline", _sdxl),
    "sd3": ("StableDiffusion3Pipeline", _sd3),
}
