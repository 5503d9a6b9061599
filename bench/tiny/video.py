"""Models of videos, of which one frame is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.tiny.parts import FLOW_SIGMAS, clip, diffusers, flow_euler, language, qwen25_vl, t5, tokenizer


def _wan_transformer(channels: int = 16) -> Any:
    return diffusers().WanTransformer3DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=64,
    )


def _wan_vae() -> Any:
    return diffusers().AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def _wan(**parts: Any) -> Any:
    library = diffusers()
    return library.WanPipeline(
        scheduler=library.UniPCMultistepScheduler(**FLOW_SIGMAS),
        **{"vae": _wan_vae(), "transformer": _wan_transformer(), **parts},
        text_encoder=t5(),
        tokenizer=tokenizer(512),
    )


def _wan22_small() -> Any:
    """The 5B model: a VAE of 16 pixels a side, and a time for every token."""
    vae = diffusers().AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.01 * number for number in range(48)],
        latents_std=[1.0 + 0.01 * number for number in range(48)],
    )
    return _wan(vae=vae, transformer=_wan_transformer(48), expand_timesteps=True)


def _hunyuan_video() -> Any:
    library = diffusers()
    return library.HunyuanVideoPipeline(
        scheduler=flow_euler(shift=7.0),
        vae=library.AutoencoderKLHunyuanVideo(
            latent_channels=16,
            block_out_channels=(8,) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_add_attention=False,
        ),
        text_encoder=language("Llama", 3),
        tokenizer=tokenizer(2048, bos=True, eos=False),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(77, bos=True),
        transformer=library.HunyuanVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 4, 4),
        ),
    )


def _hunyuan_video15() -> Any:
    library = diffusers()
    from diffusers.guiders import ClassifierFreeGuidance

    return library.HunyuanVideo15Pipeline(
        scheduler=flow_euler(shift=5.0),
        vae=library.AutoencoderKLHunyuanVideo15(block_out_channels=(32, 32, 32, 32, 64), layers_per_block=1),
        text_encoder=qwen25_vl(3).model.language_model,
        tokenizer=tokenizer(2048, eos=False),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(512),
        transformer=library.HunyuanVideo15Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=16,
            image_embed_dim=8,
            rope_axes_dim=(4, 4, 4),
            task_type="t2v",
        ),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )


LTX_SHIFT = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}


def _ltx(told: bool) -> Any:
    """With a decoder that is told how much noise is left, or without."""
    library = diffusers()
    levels: dict[str, Any] = {"block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5}
    vae = library.AutoencoderKLLTXVideo(
        **levels,
        decoder_block_out_channels=(8,) * 4,
        decoder_layers_per_block=(1,) * 5,
        timestep_conditioning=told,
    )
    import torch

    vae.latents_mean.copy_(torch.randn(128) / 4)
    vae.latents_std.copy_(torch.rand(128) + 0.5)
    return library.LTXPipeline(
        scheduler=flow_euler(**LTX_SHIFT),
        vae=vae,
        text_encoder=t5(),
        tokenizer=tokenizer(128),
        transformer=library.LTXVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=1,
            caption_channels=16,
        ),
    )


PIPELINES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "wan": ("WanPipeline", _wan),
    "wan-2.2": ("WanPipeline", lambda: _wan(transformer_2=_wan_transformer(), boundary_ratio=0.875)),
    "wan-2.2-5b": ("WanPipeline", _wan22_small),
    "hunyuan-video": ("HunyuanVideoPipeline", _hunyuan_video),
    "hunyuan-video-1.5": ("HunyuanVideo15Pipeline", _hunyuan_video15),
    "ltx-video": ("LTXPipeline", lambda: _ltx(False)),
    "ltx-video-told": ("LTXPipeline", lambda: _ltx(True)),
}
