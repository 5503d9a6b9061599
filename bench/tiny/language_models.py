"""Pipelines that read prompts with a language model: Qwen-Image 2.1, Krea 2 Turbo, ERNIE-Image, LongCat, Nucleus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.tiny.parts import (
    FLUX_SHIFT,
    SMALL_LANGUAGE,
    VOCABULARY,
    diffusers,
    flow_euler,
    flux2_vae,
    kl_vae,
    qwen25_vl,
    tokenizer,
    transformers,
)
from bench.tiny.qwen import make_krea2

_VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_SHIFT = {**FLUX_SHIFT, "shift": 1.0, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
TURBO_SIGMAS = [1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568]
"""`sample_sigmas` in the model_index.json of Qwen-Image-2.1-Turbo."""


def _qwen3_vl(layers: int = 2) -> Any:
    library = transformers()
    text = {
        **SMALL_LANGUAGE,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY + len(_VISION),
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    config = library.Qwen3VLConfig(
        text_config=text,
        vision_config={**vision, "deepstack_visual_indexes": [0]},
        vision_start_token_id=VOCABULARY,
        vision_end_token_id=VOCABULARY + 1,
        image_token_id=VOCABULARY + 2,
        video_token_id=VOCABULARY + 3,
    )
    return library.Qwen3VLForConditionalGeneration(config)


def _qwen_vl_tokenizer() -> Any:
    made = tokenizer(2048, eos=False)
    made.add_tokens(list(_VISION), special_tokens=True)
    return made


def _processor(kind: str) -> Any:
    library = transformers()
    reader = _qwen_vl_tokenizer()
    return getattr(library, f"{kind}Processor")(
        image_processor=library.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112),
        tokenizer=reader,
        video_processor=getattr(library, f"{kind}VideoProcessor")(),
        chat_template=reader.chat_template,
    )


def _qwen_image_21(sigmas: list[float] | None) -> Any:
    library = diffusers()
    # Turbo's own sigmas are not shifted again.
    shift = _QWEN_SHIFT if sigmas is None else {"shift": 1.0}
    return library.QwenImage21Pipeline(
        scheduler=flow_euler(**shift),
        vae=library.AutoencoderKLQwenImage21(
            base_dim=4, decoder_base_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1
        ),
        text_encoder=_qwen3_vl(),
        processor=_processor("Qwen3VL"),
        transformer=library.QwenImage21Transformer2DModel(
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        sample_sigmas=sigmas,
    )


def _ernie_image(shift: float, *, enhancer: bool = False) -> Any:
    library, texts = diffusers(), transformers()
    rope = texts.Ministral3Config().rope_parameters
    rope = {**rope, "original_max_position_embeddings": int(2048 / rope["factor"])}
    small = {**SMALL_LANGUAGE, "rope_parameters": rope}
    text = texts.Ministral3Config(**{**small, "num_hidden_layers": 3})
    vision = texts.PixtralVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    parts: dict[str, Any] = {}
    if enhancer:
        # It writes as many tokens as its tokenizer's longest text has.
        parts = {
            "pe": texts.Ministral3ForCausalLM(texts.Ministral3Config(**small)),
            "pe_tokenizer": tokenizer(24, eos=False),
        }
    return library.ErnieImagePipeline(
        scheduler=flow_euler(shift=shift),
        vae=flux2_vae(),
        text_encoder=texts.Mistral3Model(
            texts.Mistral3Config(text_config=text, vision_config=vision, image_token_index=3)
        ),
        tokenizer=tokenizer(2048, bos=True, eos=False),
        transformer=library.ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=1,
            ffn_hidden_size=64,
            text_in_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        **parts,
    )


def _longcat_image() -> Any:
    library = diffusers()
    pipe = library.LongCatImagePipeline(
        scheduler=flow_euler(**FLUX_SHIFT),
        vae=kl_vae(16, 0.3611, 0.1159),
        text_encoder=qwen25_vl(),
        tokenizer=tokenizer(2048, eos=False),
        text_processor=_processor("Qwen2VL"),
        transformer=library.LongCatImageTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 6, 6],
        ),
    )
    pipe.tokenizer_max_length = 48  # as many tokens are written when it rewrites a prompt
    return pipe


def _nucleus_image() -> Any:
    import torch

    library = diffusers()
    pipe = library.NucleusMoEImagePipeline(
        scheduler=flow_euler(**FLUX_SHIFT),
        vae=library.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=_qwen3_vl(9),  # it reads the eighth state from the end
        processor=_processor("Qwen3VL"),
        transformer=library.NucleusMoEImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=5,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
            num_experts=4,
            moe_intermediate_dim=16,
            capacity_factors=2.0,
        ),
    )
    for name, weight in pipe.transformer.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):  # left as memory was found
            torch.nn.init.normal_(weight, std=0.1)
    return pipe


PIPELINES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "qwen-image-2.1": ("QwenImage21Pipeline", lambda: _qwen_image_21(None)),
    "qwen-image-2.1-turbo": ("QwenImage21Pipeline", lambda: _qwen_image_21(TURBO_SIGMAS)),
    "krea2-turbo": ("Krea2Pipeline", lambda: make_krea2(is_distilled=True)),
    "ernie-image": ("ErnieImagePipeline", lambda: _ernie_image(4.0)),
    "ernie-image-turbo": ("ErnieImagePipeline", lambda: _ernie_image(3.0)),
    "longcat-image": ("LongCatImagePipeline", _longcat_image),
    "nucleus-image": ("NucleusMoEImagePipeline", _nucleus_image),
}

VARIANTS: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "ernie-image-enhancer": ("ErnieImagePipeline", lambda: _ernie_image(4.0, enhancer=True)),
}
