"""Pipelines with VAEs that compress sides by 32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.tiny.parts import FLOW_SIGMAS, diffusers, flow_euler, language, qwen25_vl, t5, tokenizer


def deep_compression_vae() -> Any:
    widths = (8, 8, 8, 8, 16, 32)
    return diffusers().AutoencoderDC(
        latent_channels=32,
        attention_head_dim=4,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    )


def _sana() -> Any:
    library = diffusers()
    return library.SanaPipeline(
        scheduler=library.DPMSolverMultistepScheduler(**FLOW_SIGMAS),
        vae=deep_compression_vae(),
        text_encoder=language("Gemma2", 1),
        tokenizer=tokenizer(2048, bos=True, eos=False),
        transformer=library.SanaTransformer2DModel(
            in_channels=32,
            out_channels=32,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=32,
        ),
    )


def _hunyuan_image(distilled: bool) -> Any:
    library = diffusers()
    from diffusers.guiders.adaptive_projected_guidance_mix import AdaptiveProjectedMixGuidance

    pipe = library.HunyuanImagePipeline(
        scheduler=flow_euler(shift=5.0),
        vae=library.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=64,
            block_out_channels=(32, 32, 32, 32, 32, 128),
            layers_per_block=1,
            spatial_compression_ratio=32,
            sample_size=256,
            scaling_factor=0.75289,
        ),
        text_encoder=qwen25_vl(3),
        tokenizer=tokenizer(2048, eos=False),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(512),
        transformer=library.HunyuanImageTransformer2DModel(
            in_channels=64,
            out_channels=64,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            guidance_embeds=distilled,
            use_meanflow=distilled,
            text_embed_dim=16,
            text_embed_2_dim=16,
            rope_axes_dim=(8, 8),
        ),
        guider=None if distilled else AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
        ocr_guider=None if distilled else AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
    )
    pipe.tokenizer_max_length = 256  # four times faster
    return pipe


PIPELINES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "sana": ("SanaPipeline", _sana),
    "hunyuan-image": ("HunyuanImagePipeline", lambda: _hunyuan_image(False)),
    "hunyuan-image-distilled": ("HunyuanImagePipeline", lambda: _hunyuan_image(True)),
}
