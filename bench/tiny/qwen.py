"""Qwen-Image, and Krea 2 on its VAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.tiny.parts import FLUX_SHIFT, SMALL_LANGUAGE, diffusers, flow_euler, qwen25_vl, tokenizer, transformers


def _qwen_image() -> Any:
    library = diffusers()
    return library.QwenImagePipeline(
        scheduler=flow_euler(
            **{**FLUX_SHIFT, "shift": 1.0, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
        ),
        vae=library.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=qwen25_vl(),
        tokenizer=tokenizer(2048, eos=False),
        transformer=library.QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def make_krea2(*, is_distilled: bool, layers: tuple[int, ...] = (1, 2)) -> Any:
    """Krea 2: Raw, or the distilled Turbo, which reads the text encoder's states behind some `layers`."""
    library, texts = diffusers(), transformers()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = {**SMALL_LANGUAGE, "rope_scaling": rope, "num_hidden_layers": max(layers)}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    config = texts.Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    return library.Krea2Pipeline(
        scheduler=flow_euler(**{**FLUX_SHIFT, "max_image_seq_len": 6400}),
        vae=library.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=texts.Qwen3VLModel(config),
        tokenizer=tokenizer(2048, eos=False),
        transformer=library.Krea2Transformer2DModel(
            in_channels=64,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_layers=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            text_intermediate_size=32,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            num_text_layers=len(layers),
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
        text_encoder_select_layers=layers,
        is_distilled=is_distilled,
    )


PIPELINES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "qwen-image": ("QwenImagePipeline", _qwen_image),
    "krea2": ("Krea2Pipeline", lambda: make_krea2(is_distilled=False)),
}
