"""Modular pipelines: those of models that have no other, and others with the parts of the classic ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.tiny import flux, language_models, qwen, stable_diffusion, transformers_on_kl
from bench.tiny.parts import (
    SMALL_LANGUAGE,
    VOCABULARY,
    diffusers,
    flow_euler,
    flux2_vae,
    language,
    tokenizer,
    transformers,
)

_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}


def _of(classic: Any, kind: str) -> Any:
    """A modular pipeline with the parts of a classic one."""
    pipe = getattr(diffusers(), kind)()
    parts = {name: part for name, part in classic.components.items() if name in pipe.component_names}
    settings = {name: classic.config[name] for name in ("sample_sigmas",) if classic.config.get(name) is not None}
    pipe.update_components(**parts, **settings)
    return pipe


def _flux3(distilled: bool) -> Any:
    """Without the prompt upsampler, as diffusers documents it for prompts that are captions already."""
    library = diffusers()
    blocks = (library.Flux3DistilledAutoBlocks if distilled else library.Flux3AutoBlocks)()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipe = blocks.init_pipeline()
    text = {**SMALL_LANGUAGE, "num_hidden_layers": 32, "rope_scaling": _MROPE}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    config = transformers().Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    reader = tokenizer(8192, eos=False)
    reader.tokenizer = reader  # where the model's processor has its tokenizer
    pipe.update_components(
        text_encoder=transformers().Qwen3VLForConditionalGeneration(config),
        tokenizer=reader,
        vae=flux2_vae(),
        transformer=library.Flux3Transformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8 * 16,
            timestep_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            flow_map=distilled,
        ),
    )
    return pipe


def _anima() -> Any:
    library = diffusers()
    pipe = library.AnimaModularPipeline()
    pipe.update_components(
        text_encoder=language("Qwen3", 2),
        tokenizer=tokenizer(2048, eos=False),
        t5_tokenizer=tokenizer(512),
        text_conditioner=library.AnimaTextConditioner(
            source_dim=16,
            target_dim=16,
            model_dim=16,
            num_layers=1,
            num_attention_heads=2,
            target_vocab_size=VOCABULARY,
            min_sequence_length=512,
        ),
        vae=library.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=flow_euler(shift=3.0),
        transformer=library.CosmosTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=16,
            adaln_lora_dim=8,
            rope_scale=(1.0, 4.0, 4.0),
            extra_pos_embed_type=None,
        ),
    )
    return pipe


def _krea2(is_distilled: bool) -> Any:
    """Which layers its blocks read is no setting."""
    made = qwen.make_krea2(is_distilled=is_distilled, layers=tuple(range(2, 36, 3)))
    return _of(made, "Krea2TurboModularPipeline" if is_distilled else "Krea2ModularPipeline")


def _modular(group: Any, name: str, kind: str) -> tuple[str, Callable[[], Any]]:
    return kind, lambda: _of(group.PIPELINES[name][1](), kind)


PIPELINES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "flux1-dev-modular": _modular(flux, "flux1-dev", "FluxModularPipeline"),
    "flux1-kontext-modular": _modular(flux, "flux1-kontext", "FluxKontextModularPipeline"),
    "flux2-dev-modular": _modular(flux, "flux2-dev", "Flux2ModularPipeline"),
    "flux2-klein-base-modular": _modular(flux, "flux2-klein-base", "Flux2KleinBaseModularPipeline"),
    "flux2-klein-modular": _modular(flux, "flux2-klein", "Flux2KleinModularPipeline"),
    "flux3-klein-base": ("Flux3ModularPipeline", lambda: _flux3(False)),
    "flux3-klein": ("Flux3DistilledModularPipeline", lambda: _flux3(True)),
    "anima": ("AnimaModularPipeline", _anima),
    "qwen-image-modular": _modular(qwen, "qwen-image", "QwenImageModularPipeline"),
    "qwen-image-2.1-modular": _modular(language_models, "qwen-image-2.1", "QwenImage21ModularPipeline"),
    "qwen-image-2.1-turbo-modular": _modular(
        language_models, "qwen-image-2.1-turbo", "QwenImage21TurboModularPipeline"
    ),
    "krea2-modular": ("Krea2ModularPipeline", lambda: _krea2(False)),
    "krea2-turbo-modular": ("Krea2TurboModularPipeline", lambda: _krea2(True)),
    "ernie-image-modular": _modular(language_models, "ernie-image", "ErnieImageModularPipeline"),
    "z-image-turbo-modular": _modular(transformers_on_kl, "z-image-turbo", "ZImageModularPipeline"),
    "z-image-modular": _modular(transformers_on_kl, "z-image", "ZImageModularPipeline"),
    "sd3-modular": _modular(stable_diffusion, "sd3", "StableDiffusion3ModularPipeline"),
    "sdxl-modular": _modular(stable_diffusion, "sdxl", "StableDiffusionXLModularPipeline"),
}
