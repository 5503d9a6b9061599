"""Transformers on the VAE of FLUX.1 or of Stable Diffusion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.tiny.parts import (
    FLOW_SIGMAS,
    FLUX_SHIFT,
    SMALL_LANGUAGE,
    VOCABULARY,
    clip,
    diffusers,
    flow_euler,
    kl_vae,
    language,
    t5,
    tokenizer,
    transformers,
)


def _z_image(shift: float) -> Any:
    library = diffusers()
    return library.ZImagePipeline(
        scheduler=flow_euler(shift=shift),
        vae=kl_vae(16, 0.3611, 0.1159),
        text_encoder=language("Qwen3", 2),
        tokenizer=tokenizer(2048, eos=False),
        transformer=library.ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        ),
    )


def _lumina2() -> Any:
    library = diffusers()
    return library.Lumina2Pipeline(
        scheduler=flow_euler(shift=6.0),
        vae=kl_vae(16, 0.3611, 0.1159),
        text_encoder=language("Gemma2", 2),
        tokenizer=tokenizer(2048, bos=True, eos=False),
        transformer=library.Lumina2Transformer2DModel(
            sample_size=128,
            in_channels=16,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(300, 64, 64),
            cap_feat_dim=16,
        ),
    )


def _auraflow() -> Any:
    library, texts = diffusers(), transformers()
    t5 = texts.UMT5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return library.AuraFlowPipeline(
        scheduler=flow_euler(shift=1.73),
        vae=kl_vae(4, 0.13025, None, quant=True),
        text_encoder=texts.UMT5EncoderModel(t5),
        tokenizer=tokenizer(512),
        transformer=library.AuraFlowTransformer2DModel(
            sample_size=64,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pos_embed_max_size=1024,
        ),
    )


def _hidream(scheduler: Any) -> Any:
    library = diffusers()
    return library.HiDreamImagePipeline(
        scheduler=scheduler,
        vae=kl_vae(16, 0.3611, 0.1159),
        text_encoder=clip(projected=True, length=248),
        tokenizer=tokenizer(248, bos=True),
        text_encoder_2=clip(projected=True, length=248),
        tokenizer_2=tokenizer(248, bos=True),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(512),
        text_encoder_4=language("LlamaForCausalLM", 2),
        tokenizer_4=tokenizer(512, bos=True, eos=False),
        transformer=library.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[16, 16],
            text_emb_dim=32,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=[0, 1],
        ),
    )


def _ovis_image() -> Any:
    library = diffusers()
    return library.OvisImagePipeline(
        scheduler=flow_euler(**FLUX_SHIFT),
        vae=kl_vae(16, 0.3611, 0.1159),
        text_encoder=language("Qwen3", 1),
        tokenizer=tokenizer(2048, eos=False),
        transformer=library.OvisImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def _prx() -> Any:
    library, texts = diffusers(), transformers()
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    module = texts.T5GemmaModuleConfig(**SMALL_LANGUAGE)
    config = texts.T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
    pipe = library.PRXPipeline(
        scheduler=flow_euler(shift=3.0),
        vae=kl_vae(16, 0.3611, 0.1159),
        text_encoder=T5GemmaEncoder(config.encoder),
        tokenizer=tokenizer(256),
        transformer=library.PRXTransformer2DModel(
            patch_size=2,
            in_channels=16,
            context_in_dim=16,
            hidden_size=32,
            num_heads=2,
            depth=1,
            axes_dim=[8, 8],
        ),
        default_sample_size=512,
    )
    # Cleaning prompts needs a package that nothing here is about.
    pipe.text_preprocessor.clean_text = str
    return pipe


def _lumina() -> Any:
    import torch

    library = diffusers()
    transformer = library.LuminaNextDiT2DModel(
        sample_size=32,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    torch.nn.init.zeros_(transformer.pad_token)  # left as memory was found
    return library.LuminaPipeline(
        scheduler=flow_euler(),
        vae=kl_vae(4, 0.13025, None, quant=True),
        text_encoder=language("Gemma", 2),
        tokenizer=tokenizer(2048, bos=True, eos=False),
        transformer=transformer,
    )


PIPELINES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "z-image": ("ZImagePipeline", lambda: _z_image(6.0)),
    "z-image-turbo": ("ZImagePipeline", lambda: _z_image(3.0)),
    "lumina2": ("Lumina2Pipeline", _lumina2),
    "auraflow": ("AuraFlowPipeline", _auraflow),
    "hidream": ("HiDreamImagePipeline", lambda: _hidream(diffusers().UniPCMultistepScheduler(**FLOW_SIGMAS))),
    "hidream-dev": ("HiDreamImagePipeline", lambda: _hidream(diffusers().FlowMatchLCMScheduler(shift=6.0))),
    "ovis-image": ("OvisImagePipeline", _ovis_image),
    "prx": ("PRXPipeline", _prx),
    "lumina-next": ("LuminaPipeline", _lumina),
}
