"""Tokenizers, text encoders, VAEs and scheduler settings that tiny pipelines are put together from."""

from __future__ import annotations

from typing import Any


def diffusers() -> Any:
    """The library, imported so that a torchvision that does not fit cannot break it."""
    from mrflow_sched._runtime.torchvision_ops import ensure_ops

    ensure_ops()
    import diffusers

    return diffusers


def transformers() -> Any:
    """The other library."""
    diffusers()
    import transformers

    return transformers


# --------------------------------------------------------------------------------------------------------- tokenizers

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
    return transformers().PreTrainedTokenizerFast(
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


# ------------------------------------------------------------------------------------------------------ text encoders


def clip(projected: bool = False, length: int = 77, width: int = 16) -> Any:
    config = transformers().CLIPTextConfig(
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
    kind = transformers().CLIPTextModelWithProjection if projected else transformers().CLIPTextModel
    return kind(config)


def t5(width: int = 16) -> Any:
    config = transformers().T5Config(vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers().T5EncoderModel(config)


SMALL_LANGUAGE = {
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


def qwen25_vl(layers: int = 2) -> Any:
    """The text encoder of Qwen-Image and HunyuanImage, with an image tower that nothing here uses."""
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    text = {**SMALL_LANGUAGE, "num_hidden_layers": layers, "rope_scaling": rope}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    config = transformers().Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=3, vision_end_token_id=3, image_token_id=3
    )
    return transformers().Qwen2_5_VLForConditionalGeneration(config)


def language(kind: str, layers: int, **config: Any) -> Any:
    """A decoder-only model of `layers` blocks: "Qwen3", "Qwen3ForCausalLM", "Gemma2" ..."""
    library = transformers()
    family = kind.removesuffix("ForCausalLM")
    settings = getattr(library, f"{family}Config")(**{**SMALL_LANGUAGE, "num_hidden_layers": layers, **config})
    return getattr(library, kind if kind != family else f"{family}Model")(settings)


def mistral3(layers: int) -> Any:
    """FLUX.2-dev's text encoder, with an image tower that nothing here uses."""
    library = transformers()
    text = library.MistralConfig(**{**SMALL_LANGUAGE, "num_hidden_layers": layers})
    vision = library.PixtralVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = library.Mistral3Config(text_config=text, vision_config=vision, image_token_index=3)
    return library.Mistral3ForConditionalGeneration(config)


# ---------------------------------------------------------------------------------------------------------------- VAE


def kl_vae(channels: int, scaling: float, shift: float | None, *, quant: bool = False, levels: int = 4) -> Any:
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


def flux2_vae() -> Any:
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


def unet(context: int, **config: Any) -> Any:
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


# --------------------------------------------------------------------------------------------------------- schedulers


def flow_euler(**config: Any) -> Any:
    return diffusers().FlowMatchEulerDiscreteScheduler(**config)


FLUX_SHIFT = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}

SCALED_LINEAR = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

FLOW_SIGMAS: dict[str, Any] = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
