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
    "flux1-kontext": "FluxKontextPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "qwen-image": "QwenImagePipeline",
    "z-image": "ZImagePipeline",
    "z-image-turbo": "ZImagePipeline",
    "flux2-dev": "Flux2Pipeline",
    "flux2-klein-base": "Flux2KleinPipeline",
    "flux2-klein": "Flux2KleinPipeline",
    "chroma": "ChromaPipeline",
    "lumina2": "Lumina2Pipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd15": "StableDiffusionPipeline",
    "sana": "SanaPipeline",
    "auraflow": "AuraFlowPipeline",
    "hunyuan-image": "HunyuanImagePipeline",
    "hunyuan-image-distilled": "HunyuanImagePipeline",
    "hidream": "HiDreamImagePipeline",
    "hidream-dev": "HiDreamImagePipeline",
    "ovis-image": "OvisImagePipeline",
    "prx": "PRXPipeline",
    "krea2": "Krea2Pipeline",
    "lumina": "LuminaPipeline",
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
        for weight in (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).parameters():
            if not weight.any():  # left at 0 by design, it would hide what comes before it: text, say
                torch.nn.init.normal_(weight, std=0.1)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def _has(name: str) -> bool:
    return hasattr(diffusers(), _CLASSES[name])


def diffusers() -> Any:
    """The library, imported so that a torchvision that does not fit cannot break it."""
    from mrflow_sched._runtime.torchvision_ops import ensure_ops

    ensure_ops()
    import diffusers

    return diffusers


def _transformers() -> Any:
    diffusers()
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
        model_input_names=["input_ids", "attention_mask"],
    )


# -------------------------------------------------------------------------------------------------------- text encoders


def _clip(projected: bool = False, length: int = 77, width: int = 16) -> Any:
    config = _transformers().CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=width,
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


def _qwen25_vl(layers: int = 2) -> Any:
    """The text encoder of Qwen-Image and HunyuanImage, with an image tower that nothing here uses."""
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    text = {**_SMALL_LANGUAGE, "num_hidden_layers": layers, "rope_scaling": rope}
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


def _language(kind: str, layers: int, **config: Any) -> Any:
    """A decoder-only model of `layers` blocks: "Qwen3", "Qwen3ForCausalLM", "Gemma2" ..."""
    library = _transformers()
    family = kind.removesuffix("ForCausalLM")
    settings = getattr(library, f"{family}Config")(**{**_SMALL_LANGUAGE, "num_hidden_layers": layers, **config})
    return getattr(library, kind if kind != family else f"{family}Model")(settings)


def _mistral3(layers: int) -> Any:
    """FLUX.2-dev's text encoder, with an image tower that nothing here uses."""
    library = _transformers()
    text = library.MistralConfig(**{**_SMALL_LANGUAGE, "num_hidden_layers": layers})
    vision = library.PixtralVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = library.Mistral3Config(text_config=text, vision_config=vision, image_token_index=3)
    return library.Mistral3ForConditionalGeneration(config)


# ------------------------------------------------------------------------------------------------------------------ VAE


def _kl(channels: int, scaling: float, shift: float | None, *, quant: bool = False, levels: int = 4) -> Any:
    return diffusers().AutoencoderKL(
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
    return diffusers().FlowMatchEulerDiscreteScheduler(**config)


_FLUX_SHIFT = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def _flux1(guidance_embeds: bool, **scheduler: Any) -> Any:
    library = diffusers()
    return library.FluxPipeline(
        scheduler=_flow_euler(**scheduler),
        vae=_kl(16, 0.3611, 0.1159),
        text_encoder=_clip(),
        tokenizer=tokenizer(77, bos=True),
        text_encoder_2=_t5(),
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


def _sd3() -> Any:
    library = diffusers()
    return library.StableDiffusion3Pipeline(
        scheduler=_flow_euler(shift=3.0),
        vae=_kl(16, 1.5305, 0.0609),
        text_encoder=_clip(projected=True),
        tokenizer=tokenizer(77, bos=True),
        text_encoder_2=_clip(projected=True, width=24),
        tokenizer_2=tokenizer(77, bos=True),
        text_encoder_3=_t5(40),
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


def _qwen_image() -> Any:
    library = diffusers()
    return library.QwenImagePipeline(
        scheduler=_flow_euler(
            **{**_FLUX_SHIFT, "shift": 1.0, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
        ),
        vae=library.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=_qwen25_vl(),
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


def _z_image(shift: float) -> Any:
    library = diffusers()
    return library.ZImagePipeline(
        scheduler=_flow_euler(shift=shift),
        vae=_kl(16, 0.3611, 0.1159),
        text_encoder=_language("Qwen3", 2),
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


def _flux2_vae() -> Any:
    import torch

    vae = diffusers().AutoencoderKLFlux2(
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.copy_(torch.randn(128))
    vae.bn.running_var.copy_(torch.rand(128) + 0.5)
    return vae


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
        scheduler=_flow_euler(**_FLUX_SHIFT),
        vae=_flux2_vae(),
        text_encoder=_mistral3(31),
        tokenizer=tokenizer(2048, eos=False),
        transformer=_flux2_transformer(True),
    )


def _flux2_klein(is_distilled: bool) -> Any:
    return diffusers().Flux2KleinPipeline(
        scheduler=_flow_euler(**_FLUX_SHIFT),
        vae=_flux2_vae(),
        text_encoder=_language("Qwen3ForCausalLM", 28),
        tokenizer=tokenizer(2048, eos=False),
        transformer=_flux2_transformer(False),
        is_distilled=is_distilled,
    )


def _chroma() -> Any:
    library = diffusers()
    return library.ChromaPipeline(
        scheduler=_flow_euler(shift=1.0, use_beta_sigmas=False),
        vae=_kl(16, 0.3611, 0.1159),
        text_encoder=_t5(),
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


def _lumina2() -> Any:
    library = diffusers()
    return library.Lumina2Pipeline(
        scheduler=_flow_euler(shift=6.0),
        vae=_kl(16, 0.3611, 0.1159),
        text_encoder=_language("Gemma2", 2),
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


_SCALED_LINEAR = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


_FLOW_SIGMAS: dict[str, Any] = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}


def _unet(context: int, **config: Any) -> Any:
    return diffusers().UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=context,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        **config,
    )


def _sdxl() -> Any:
    library = diffusers()
    return library.StableDiffusionXLPipeline(
        scheduler=library.EulerDiscreteScheduler(**_SCALED_LINEAR),
        vae=_kl(4, 0.13025, None, quant=True),
        text_encoder=_clip(),
        tokenizer=tokenizer(77, bos=True),
        text_encoder_2=_clip(projected=True, width=24),
        tokenizer_2=tokenizer(77, bos=True),
        unet=_unet(
            40,
            sample_size=128,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        ),
        add_watermarker=False,
    )


def _sd15() -> Any:
    library = diffusers()
    return library.StableDiffusionPipeline(
        scheduler=library.PNDMScheduler(**_SCALED_LINEAR, skip_prk_steps=True),
        vae=_kl(4, 0.18215, None, quant=True),
        text_encoder=_clip(),
        tokenizer=tokenizer(77, bos=True),
        unet=_unet(16, sample_size=64),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sana() -> Any:
    library = diffusers()
    widths = (8, 8, 8, 8, 16, 32)
    return library.SanaPipeline(
        scheduler=library.DPMSolverMultistepScheduler(**_FLOW_SIGMAS),
        vae=library.AutoencoderDC(
            latent_channels=32,
            attention_head_dim=4,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((),) * 6,
            decoder_qkv_multiscales=((),) * 6,
            scaling_factor=0.41407,
        ),
        text_encoder=_language("Gemma2", 1),
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


def _auraflow() -> Any:
    library, texts = diffusers(), _transformers()
    t5 = texts.UMT5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return library.AuraFlowPipeline(
        scheduler=_flow_euler(shift=1.73),
        vae=_kl(4, 0.13025, None, quant=True),
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


def _hunyuan_image(distilled: bool) -> Any:
    library = diffusers()
    from diffusers.guiders.adaptive_projected_guidance_mix import AdaptiveProjectedMixGuidance

    pipe = library.HunyuanImagePipeline(
        scheduler=_flow_euler(shift=5.0),
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
        text_encoder=_qwen25_vl(3),
        tokenizer=tokenizer(2048, eos=False),
        text_encoder_2=_t5(),
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


def _hidream(scheduler: Any) -> Any:
    library = diffusers()
    return library.HiDreamImagePipeline(
        scheduler=scheduler,
        vae=_kl(16, 0.3611, 0.1159),
        text_encoder=_clip(projected=True, length=248),
        tokenizer=tokenizer(248, bos=True),
        text_encoder_2=_clip(projected=True, length=248),
        tokenizer_2=tokenizer(248, bos=True),
        text_encoder_3=_t5(),
        tokenizer_3=tokenizer(512),
        text_encoder_4=_language("LlamaForCausalLM", 2),
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
        scheduler=_flow_euler(**_FLUX_SHIFT),
        vae=_kl(16, 0.3611, 0.1159),
        text_encoder=_language("Qwen3", 1),
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
    library, texts = diffusers(), _transformers()
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    module = texts.T5GemmaModuleConfig(**_SMALL_LANGUAGE)
    config = texts.T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
    pipe = library.PRXPipeline(
        scheduler=_flow_euler(shift=3.0),
        vae=_kl(16, 0.3611, 0.1159),
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


def _krea2() -> Any:
    library, texts = diffusers(), _transformers()
    text = {**_SMALL_LANGUAGE, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    config = texts.Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    return library.Krea2Pipeline(
        scheduler=_flow_euler(**_FLUX_SHIFT),
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
            num_text_layers=2,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
        text_encoder_select_layers=(1, 2),
    )


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
        scheduler=_flow_euler(),
        vae=_kl(4, 0.13025, None, quant=True),
        text_encoder=_language("Gemma", 2),
        tokenizer=tokenizer(2048, bos=True, eos=False),
        transformer=transformer,
    )


_BUILDERS: dict[str, Callable[[], Any]] = {
    "flux1-dev": lambda: _flux1(True, **_FLUX_SHIFT),
    "flux1-schnell": lambda: _flux1(False, shift=1.0),
    "flux1-kontext": lambda: diffusers().FluxKontextPipeline(**_flux1(True, **_FLUX_SHIFT).components),
    "sd3": _sd3,
    "qwen-image": _qwen_image,
    "z-image": lambda: _z_image(6.0),
    "z-image-turbo": lambda: _z_image(3.0),
    "flux2-dev": _flux2_dev,
    "flux2-klein-base": lambda: _flux2_klein(False),
    "flux2-klein": lambda: _flux2_klein(True),
    "chroma": _chroma,
    "lumina2": _lumina2,
    "sdxl": _sdxl,
    "sd15": _sd15,
    "sana": _sana,
    "auraflow": _auraflow,
    "hunyuan-image": lambda: _hunyuan_image(False),
    "hunyuan-image-distilled": lambda: _hunyuan_image(True),
    "hidream": lambda: _hidream(diffusers().UniPCMultistepScheduler(**_FLOW_SIGMAS)),
    "hidream-dev": lambda: _hidream(diffusers().FlowMatchLCMScheduler(shift=6.0)),
    "ovis-image": _ovis_image,
    "prx": _prx,
    "krea2": _krea2,
    "lumina": _lumina,
}
