"""Flow pipelines whose loops count noise in another way: CogView4, GLM-Image, Cosmos-Predict2, OmniGen, SANA-Sprint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.tiny.deep_vae import deep_compression_vae
from bench.tiny.parts import VOCABULARY, diffusers, flow_euler, kl_vae, language, t5, tokenizer, transformers

_ROOT_SHIFT = {
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.25,
    "max_shift": 0.75,
    "time_shift_type": "linear",
}


def _cogview4(control: bool) -> Any:
    library = diffusers()
    return (library.CogView4ControlPipeline if control else library.CogView4Pipeline)(
        scheduler=flow_euler(**_ROOT_SHIFT),
        vae=kl_vae(16, 1.0, 0.0),
        text_encoder=language("Glm", 2),
        tokenizer=tokenizer(1024, bos=True, eos=False, side="left"),
        transformer=library.CogView4Transformer2DModel(
            in_channels=32 if control else 16,
            out_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            rope_axes_dim=(256, 256),
        ),
    )


_GLM_CHAT = (
    "{% for message in messages %}<|user|>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _glm_image() -> Any:
    from torch import nn

    library, texts = diffusers(), transformers()
    reader = tokenizer(2048, eos=False, side="left")
    marks = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
    reader.add_special_tokens({"additional_special_tokens": list(marks.values())})
    for name, mark in marks.items():
        setattr(reader, name, mark)
    codes = 16
    config = texts.GlmImageConfig(
        text_config={
            "vocab_size": len(reader) + codes,
            "vision_vocab_size": codes + 8,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "eos_token_id": codes + 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "image_size": 64},
        vq_config={"embed_dim": 8, "num_embeddings": codes, "latent_channels": 16},
        image_token_id=reader.convert_tokens_to_ids("<|image|>"),
        image_start_token_id=codes,
        image_end_token_id=codes + 1,
    )
    writer = texts.GlmImageForConditionalGeneration(config)
    writer.generation_config.eos_token_id = None  # random weights would end the picture at any token
    for weight in (*writer.model.language_model.parameters(), writer.lm_head.weight):
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.4)  # smaller ones hardly heed the prompt
    return library.GlmImagePipeline(
        scheduler=flow_euler(**_ROOT_SHIFT),
        vae=_with_statistics(kl_vae(16, 1.0, 0.0)),
        text_encoder=t5(),
        tokenizer=tokenizer(2048),
        vision_language_encoder=writer,
        processor=texts.GlmImageProcessor(texts.GlmImageImageProcessor(), reader, chat_template=_GLM_CHAT),
        transformer=library.GlmImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            prior_vq_quantizer_codebook_size=codes + 8,
        ),
    )


def _with_statistics(vae: Any) -> Any:
    channels = vae.config.latent_channels
    vae.register_to_config(
        latents_mean=[0.1 * number - 0.5 for number in range(channels)],
        latents_std=[0.8 + 0.05 * number for number in range(channels)],
    )
    return vae


class ContentGuard:
    """Cosmos' safety checker, without the models behind it: it refuses the word "forbidden", and black pictures."""

    def to(self, _device: Any) -> ContentGuard:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return "forbidden" not in prompt

    def check_video_safety(self, frames: Any) -> Any:
        return frames if frames.any() else None


def _cosmos() -> Any:
    library = diffusers()
    return library.Cosmos2TextToImagePipeline(
        scheduler=flow_euler(use_karras_sigmas=True),
        vae=library.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=t5(),
        tokenizer=tokenizer(512),
        transformer=library.CosmosTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            mlp_ratio=2,
            text_embed_dim=16,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            patch_size=(1, 2, 2),
            rope_scale=(1.0, 4.0, 4.0),
            concat_padding_mask=True,
            extra_pos_embed_type=None,
        ),
        safety_checker=ContentGuard(),
    )


def _omnigen() -> Any:
    library = diffusers()
    return library.OmniGenPipeline(
        scheduler=flow_euler(invert_sigmas=True),
        vae=kl_vae(4, 0.13025, None, quant=True),
        tokenizer=tokenizer(4096, bos=True, eos=False, side="left"),
        transformer=library.OmniGenTransformer2DModel(
            in_channels=4,
            patch_size=2,
            hidden_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            num_layers=1,
            pad_token_id=0,
            vocab_size=VOCABULARY,
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
            rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
            time_step_dim=16,
        ),
    )


def _sana_sprint() -> Any:
    library = diffusers()
    return library.SanaSprintPipeline(
        scheduler=library.SCMScheduler(sigma_data=0.5),
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
            qk_norm="rms_norm_across_heads",
            guidance_embeds=True,
            timestep_scale=1000.0,
        ),
    )


PIPELINES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "cogview4": ("CogView4Pipeline", lambda: _cogview4(False)),
    "glm-image": ("GlmImagePipeline", _glm_image),
    "cosmos-predict2": ("Cosmos2TextToImagePipeline", _cosmos),
    "omnigen": ("OmniGenPipeline", _omnigen),
    "sana-sprint": ("SanaSprintPipeline", _sana_sprint),
}

VARIANTS: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "cogview4-control": ("CogView4ControlPipeline", lambda: _cogview4(True)),
}
"""Guided by a hint or by perturbed attention."""
