"""Pipelines that edit pictures: Qwen-Image-Edit and Z-Image-Omni with references, inpainting of every family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from bench.tiny import flux, language_models, qwen, stable_diffusion, transformers_on_kl
from bench.tiny.parts import SMALL_LANGUAGE, VOCABULARY, diffusers, tokenizer, transformers

_VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _like(name: str, kind: str, **other: Any) -> Any:
    """A pipeline of another class around the parts of the tiny one called `name`."""
    groups = (flux, language_models, qwen, stable_diffusion, transformers_on_kl)
    made = next(group.PIPELINES[name][1] for group in groups if name in group.PIPELINES)()
    target = getattr(diffusers(), kind)
    taken = inspect.signature(target.__init__).parameters
    parts = {part: value for part, value in made.components.items() if part in taken}
    return target(**{**parts, **other})


def _fill() -> Any:
    library = diffusers()
    network = dict(flux.PIPELINES["flux1-dev"][1]().transformer.config)
    network = {key: value for key, value in network.items() if not key.startswith("_")}
    return _like(
        "flux1-dev",
        "FluxFillPipeline",
        transformer=library.FluxTransformer2DModel(**{**network, "in_channels": 384, "out_channels": 64}),
    )


def _nine_channels(name: str, kind: str) -> Any:
    """Stable Diffusion's own inpainting models: the mask and the masked picture are inputs of the U-Net."""
    made = _like(name, kind)
    config = {key: value for key, value in dict(made.unet.config).items() if not key.startswith("_")}
    network = diffusers().UNet2DConditionModel(**{**config, "in_channels": 9})
    made.register_modules(unet=network)
    return made


def _chroma_inpaint() -> Any:
    made = _like("chroma", "ChromaInpaintPipeline")
    made.transformer.register_to_config(guidance_embeds=False)  # the released configuration has it
    return made


# ------------------------------------------------------------------------------------------------------ Qwen-Image-Edit


def _processor() -> Any:
    library = transformers()
    reader = tokenizer(8192, eos=False)
    reader.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *_VISION]})
    return library.Qwen2_5_VLProcessor(
        image_processor=library.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=28 * 28 * 16384),
        tokenizer=reader,
        video_processor=library.Qwen2VLVideoProcessor(),
    )


def _seeing(processor: Any) -> Any:
    """Qwen2.5-VL with the image tower that Qwen-Image itself does not use."""
    ids = processor.tokenizer.convert_tokens_to_ids
    text = {
        **SMALL_LANGUAGE,
        "vocab_size": VOCABULARY + len(_VISION),
        "max_position_embeddings": 8192,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    config = transformers().Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
    )
    return transformers().Qwen2_5_VLForConditionalGeneration(config)


def _qwen_edit(kind: str) -> Any:
    processor = _processor()
    encoder = _seeing(processor)
    return _like("qwen-image", kind, text_encoder=encoder, tokenizer=processor.tokenizer, processor=processor)


def _longcat_edit() -> Any:
    processor = _processor()
    return _like(
        "longcat-image",
        "LongCatImageEditPipeline",
        text_encoder=_seeing(processor),
        tokenizer=processor.tokenizer,
        text_processor=processor,
    )


def _qwen_21_edit() -> Any:
    made = _like("qwen-image-2.1", "QwenImage21Pipeline")
    reader = transformers().Qwen2VLImageProcessor
    made.processor.image_processor = reader(min_pixels=64 * 64, max_pixels=16 * 16 * 16384, patch_size=16)
    return made


def _controlled(name: str, kind: str, network: str, **config: Any) -> Any:
    """A pipeline with a ControlNet that takes the masked picture and its mask."""
    base = _like(name, {"qwen-image": "QwenImagePipeline", "sd3": "StableDiffusion3Pipeline"}[name])
    shared = {key: value for key, value in dict(base.transformer.config).items() if not key.startswith("_")}
    taken = inspect.signature(getattr(diffusers(), network).__init__).parameters
    shared = {key: value for key, value in shared.items() if key in taken}
    return _like(name, kind, controlnet=getattr(diffusers(), network)(**{**shared, **config}))


PIPELINES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "flux1-inpaint": ("FluxInpaintPipeline", lambda: _like("flux1-dev", "FluxInpaintPipeline")),
    "flux1-kontext-inpaint": ("FluxKontextInpaintPipeline", lambda: _like("flux1-dev", "FluxKontextInpaintPipeline")),
    "flux1-fill": ("FluxFillPipeline", _fill),
    "flux2-klein-inpaint": (
        "Flux2KleinInpaintPipeline",
        lambda: _like("flux2-klein", "Flux2KleinInpaintPipeline", is_distilled=True),
    ),
    "sd3-inpaint": ("StableDiffusion3InpaintPipeline", lambda: _like("sd3", "StableDiffusion3InpaintPipeline")),
    "chroma-inpaint": ("ChromaInpaintPipeline", _chroma_inpaint),
    "z-image-inpaint": ("ZImageInpaintPipeline", lambda: _like("z-image-turbo", "ZImageInpaintPipeline")),
    "longcat-image-edit": ("LongCatImageEditPipeline", _longcat_edit),
    "qwen-image-2.1-edit": ("QwenImage21Pipeline", _qwen_21_edit),
    "qwen-image-inpaint": ("QwenImageInpaintPipeline", lambda: _like("qwen-image", "QwenImageInpaintPipeline")),
    "qwen-image-edit": ("QwenImageEditPipeline", lambda: _qwen_edit("QwenImageEditPipeline")),
    "qwen-image-edit-plus": ("QwenImageEditPlusPipeline", lambda: _qwen_edit("QwenImageEditPlusPipeline")),
    "qwen-image-edit-inpaint": ("QwenImageEditInpaintPipeline", lambda: _qwen_edit("QwenImageEditInpaintPipeline")),
    "qwen-image-controlnet-inpaint": (
        "QwenImageControlNetInpaintPipeline",
        lambda: _controlled(
            "qwen-image", "QwenImageControlNetInpaintPipeline", "QwenImageControlNetModel", extra_condition_channels=4
        ),
    ),
    "sd3-controlnet-inpaint": (
        "StableDiffusion3ControlNetInpaintingPipeline",
        lambda: _controlled(
            "sd3", "StableDiffusion3ControlNetInpaintingPipeline", "SD3ControlNetModel", extra_conditioning_channels=1
        ),
    ),
    "sd15-inpaint": (
        "StableDiffusionInpaintPipeline",
        lambda: _nine_channels("sd15", "StableDiffusionInpaintPipeline"),
    ),
    "sd15-inpaint-plain": ("StableDiffusionInpaintPipeline", lambda: _like("sd15", "StableDiffusionInpaintPipeline")),
    "sdxl-inpaint": (
        "StableDiffusionXLInpaintPipeline",
        lambda: _nine_channels("sdxl", "StableDiffusionXLInpaintPipeline"),
    ),
    "sdxl-inpaint-plain": (
        "StableDiffusionXLInpaintPipeline",
        lambda: _like("sdxl", "StableDiffusionXLInpaintPipeline"),
    ),
}
