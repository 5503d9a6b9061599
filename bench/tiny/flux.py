"""FLUX.1, FLUX.2 and Chroma."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.tiny.parts import (
    FLUX_SHIFT,
    clip,
    diffusers,
    flow_euler,
    flux2_vae,
    kl_vae,
    language,
    mistral3,
    t5,
    tokenizer,
)


def _flux1(guidance_embeds: bool, **scheduler: Any) -> Any:
    library = diffusers()
    return library.FluxPipeline(
        scheduler=flow_euler(**scheduler),
        vae=kl_vae(16, 0.3611, 0.1159),
        text_encoder=clip(),
        tokenizer=tokenizer(77, bos=True),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(512),
        transformer=library.FluxTransformer2DModel(
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


def _kontext() -> Any:
    return diffusers().FluxKontextPipeline(**_flux1(True, **FLUX_SHIFT).components)


def _flux2_transformer(guidance_embeds: bool) -> Any:
    return diffusers().Flux2Transformer2DModel(
        in_channels=128,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def _flux2_dev() -> Any:
    return diffusers().Flux2Pipeline(
        scheduler=flow_euler(**FLUX_SHIFT),
        vae=flux2_vae(),
        text_encoder=mistral3(31),
        tokenizer=tokenizer(2048, eos=False),
        transformer=_flux2_transformer(True),
    )


def _flux2_klein(is_distilled: bool) -> Any:
    return diffusers().Flux2KleinPipeline(
        scheduler=flow_euler(**FLUX_SHIFT),
        vae=flux2_vae(),
        text_encoder=language("Qwen3ForCausalLM", 28),
        tokenizer=tokenizer(2048, eos=False),
        transformer=_flux2_transformer(False),
        is_distilled=is_distilled,
    )


def _chroma() -> Any:
    library = diffusers()
    return library.ChromaPipeline(
        scheduler=flow_euler(shift=1.0, use_beta_sigmas=False),
        vae=kl_vae(16, 0.3611, 0.1159),
        text_encoder=t5(),
        tokenizer=tokenizer(512),
        transformer=library.ChromaTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
    )


PIPELINES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "flux1-dev": ("FluxPipeline", lambda: _flux1(True, **FLUX_SHIFT)),
    "flux1-schnell": ("FluxPipeline", lambda: _flux1(False, shift=1.0)),
    "flux1-kontext": (
        "FluxKontextPipeline",
        lambda: diffusers().FluxKontextPipeline(**_flux1(True, **FLUX_SHIFT).components),
    ),
    "flux2-dev": ("Flux2Pipeline", _flux2_dev),
    "flux2-klein-base": ("Flux2KleinPipeline", lambda: _flux2_klein(False)),
    "flux2-klein": ("Flux2KleinPipeline", lambda: _flux2_klein(True)),
    "chroma": ("ChromaPipeline", _chroma),
}
