"""Models trained on betas, besides Stable Diffusion: Kolors, PixArt, Hunyuan-DiT, CogView3-Plus, LCM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.tiny.parts import SCALED_LINEAR, VOCABULARY, clip, diffusers, kl_vae, t5, tokenizer, transformers, unet


def _kolors(pag: bool) -> Any:
    library = diffusers()
    from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline

    kind: Any = KolorsPipeline
    more: dict[str, Any] = {}
    if pag:
        from diffusers.pipelines.pag.pipeline_pag_kolors import KolorsPAGPipeline

        kind, more = KolorsPAGPipeline, {"pag_applied_layers": ["mid"]}
    betas = {**SCALED_LINEAR, "beta_end": 0.014, "num_train_timesteps": 1100}
    return kind(
        scheduler=library.EulerDiscreteScheduler(**betas),
        vae=kl_vae(4, 0.13025, None, quant=True),
        text_encoder=_chat_glm(),
        tokenizer=_chat_glm_tokenizer(),
        unet=unet(
            16,
            sample_size=128,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
        **more,
    )


def _chat_glm() -> Any:
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
    from torch.nn import init

    model = ChatGLMModel(
        ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_hidden_size=32,
            kv_channels=8,
            num_attention_heads=2,
            seq_length=512,
            rmsnorm=True,
            post_layer_norm=True,
            add_qkv_bias=True,
            original_rope=True,
            multi_query_attention=True,
            multi_query_group_num=2,
        )
    )
    for weight in model.parameters():  # the class leaves them as memory was found
        init.normal_(weight, mean=1.0 if weight.ndim == 1 else 0.0, std=0.1)
    return model


def _chat_glm_tokenizer() -> Any:
    """The real one needs sentencepiece; like it, this one also says where each token stands behind the padding."""
    fast = transformers().PreTrainedTokenizerFast

    class ChatGlmTokenizer(fast):  # type: ignore[misc, valid-type]
        def __call__(self, *values: Any, **named: Any) -> Any:
            made = super().__call__(*values, **named)
            made["position_ids"] = (made["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            return made

    reader = tokenizer(256, bos=True, eos=False, side="left")
    reader.__class__ = ChatGlmTokenizer
    return reader


def _pixart(kind: str, **more: Any) -> Any:
    library = diffusers()
    return getattr(library, kind)(
        scheduler=library.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        vae=kl_vae(4, 0.18215, None, quant=True),
        text_encoder=t5(),
        tokenizer=tokenizer(300),
        transformer=library.PixArtTransformer2DModel(
            in_channels=4,
            out_channels=8,
            num_attention_heads=3,
            attention_head_dim=8,
            num_layers=1,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=128,
            patch_size=2,
            interpolation_scale=2,
            use_additional_conditions=kind == "PixArtAlphaPipeline",
        ),
        **more,
    )


_HUNYUAN_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 128,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "cross_attention_dim": 16,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 8,
    "text_len": 77,
    "text_len_t5": 256,
    "use_style_cond_and_image_meta_size": False,
}


def _hunyuan_dit(kind: str, **more: Any) -> Any:
    library, texts = diffusers(), transformers()
    reads = texts.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=80,
    )
    return getattr(library, kind)(
        scheduler=library.DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.018,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            steps_offset=1,
            clip_sample=False,
        ),
        vae=kl_vae(4, 0.13025, None, quant=True),
        text_encoder=texts.BertModel(reads),
        tokenizer=tokenizer(77, bos=True),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(256),
        transformer=library.HunyuanDiT2DModel(num_layers=2, **_HUNYUAN_DIT),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )


def _hunyuan_dit_control() -> Any:
    led = diffusers().HunyuanDiT2DControlNetModel(**_HUNYUAN_DIT, transformer_num_layers=2)
    return _hunyuan_dit("HunyuanDiTControlNetPipeline", controlnet=led)


def _cogview3() -> Any:
    library = diffusers()
    return library.CogView3PlusPipeline(
        scheduler=library.CogVideoXDDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            set_alpha_to_one=True,
            snr_shift_scale=4.0,
        ),
        vae=kl_vae(16, 1.0, None),
        text_encoder=t5(),
        tokenizer=tokenizer(224),
        transformer=library.CogView3PlusTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=32,
            sample_size=32,
        ),
    )


def _lcm() -> Any:
    library = diffusers()
    betas = {name: value for name, value in SCALED_LINEAR.items() if name.startswith("beta")}
    return library.LatentConsistencyModelPipeline(
        scheduler=library.LCMScheduler(**betas),
        vae=kl_vae(4, 0.18215, None, quant=True),
        text_encoder=clip(),
        tokenizer=tokenizer(77, bos=True),
        unet=unet(16, sample_size=96, time_cond_proj_dim=32),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


PIPELINES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "kolors": ("KolorsPipeline", lambda: _kolors(False)),
    "pixart-alpha": ("PixArtAlphaPipeline", lambda: _pixart("PixArtAlphaPipeline")),
    "pixart-sigma": ("PixArtSigmaPipeline", lambda: _pixart("PixArtSigmaPipeline")),
    "hunyuan-dit": ("HunyuanDiTPipeline", lambda: _hunyuan_dit("HunyuanDiTPipeline")),
    "cogview3-plus": ("CogView3PlusPipeline", _cogview3),
    "lcm": ("LatentConsistencyModelPipeline", _lcm),
}

VARIANTS: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "kolors-pag": ("KolorsPAGPipeline", lambda: _kolors(True)),
    "pixart-sigma-pag": (
        "PixArtSigmaPAGPipeline",
        lambda: _pixart("PixArtSigmaPAGPipeline", pag_applied_layers=["blocks.0"]),
    ),
    "hunyuan-dit-pag": (
        "HunyuanDiTPAGPipeline",
        lambda: _hunyuan_dit("HunyuanDiTPAGPipeline", pag_applied_layers=["blocks.1"]),
    ),
    "hunyuan-dit-controlnet": ("HunyuanDiTControlNetPipeline", _hunyuan_dit_control),
}
"""Guided by a hint or by perturbed attention."""
