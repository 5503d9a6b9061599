"""Variants of other pipelines: guided by a hint (ControlNet, FLUX Control, T2I-Adapter) or by perturbed attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from bench.tiny import deep_vae, flux, qwen, stable_diffusion, transformers_on_kl
from bench.tiny.parts import diffusers


def _from(name: str) -> Any:
    """The plain pipeline called `name`."""
    groups = (deep_vae, flux, qwen, stable_diffusion, transformers_on_kl)
    return next(group.PIPELINES[name][1]() for group in groups if name in group.PIPELINES)


def _with(kind: str, name: str, **parts: Any) -> Any:
    """The components of the pipeline called `name` as another class, with further parts."""
    pipe, made = _from(name), getattr(diffusers(), kind)
    known = inspect.signature(made.__init__).parameters
    taken = {key: part for key, part in pipe.components.items() if key in known}
    return made(**{**taken, **{key: part(pipe) if inspect.isfunction(part) else part for key, part in parts.items()}})


def _sd15(kind: str, **parts: Any) -> Any:
    return _with(kind, "sd15", requires_safety_checker=False, **parts)


def _sdxl(kind: str, **parts: Any) -> Any:
    return _with(kind, "sdxl", add_watermarker=False, **parts)


def _changed(part: Any, **values: Any) -> dict[str, Any]:
    """The configuration of a part with other values."""
    config = {name: value for name, value in part.config.items() if not name.startswith("_")}
    return {**config, **values}


def _twice_as_wide(pipe: Any) -> Any:
    return type(pipe.transformer).from_config(_changed(pipe.transformer, in_channels=128, out_channels=64))


def _flux_controlnet(pipe: Any) -> Any:
    return diffusers().FluxControlNetModel.from_config(_changed(pipe.transformer))


def _sd3_controlnet(pipe: Any) -> Any:
    config = _changed(pipe.transformer, num_layers=1, extra_conditioning_channels=0)
    return diffusers().SD3ControlNetModel.from_config(config)


def _qwen_controlnet(pipe: Any) -> Any:
    return diffusers().QwenImageControlNetModel.from_config(_changed(pipe.transformer))


def _sana_controlnet(pipe: Any) -> Any:
    return diffusers().SanaControlNetModel.from_config(_changed(pipe.transformer))


def _z_image_controlnet(pipe: Any) -> Any:
    return diffusers().ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=16,
        add_control_noise_refiner="control_layers",
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )


def _unet_controlnet(pipe: Any) -> Any:
    return diffusers().ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8,) * 4)


def _union_controlnet(pipe: Any) -> Any:
    return diffusers().ControlNetUnionModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8,) * 4)


def _adapter(kind: str, factor: int) -> Any:
    """T2I-Adapter for a network of two levels."""
    return diffusers().T2IAdapter(
        in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=factor, adapter_type=kind
    )


def _attending_first(pipe: Any) -> Any:
    """SD1.5's order of blocks, on which its adapters rely."""
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return type(pipe.unet).from_config(_changed(pipe.unet, **blocks))


PIPELINES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "flux1-control": (
        "FluxControlPipeline",
        lambda: _with("FluxControlPipeline", "flux1-dev", transformer=_twice_as_wide),
    ),
    "flux1-controlnet": (
        "FluxControlNetPipeline",
        lambda: _with("FluxControlNetPipeline", "flux1-dev", controlnet=_flux_controlnet),
    ),
    "flux2-klein-kv": ("Flux2KleinKVPipeline", lambda: _with("Flux2KleinKVPipeline", "flux2-klein")),
    "sd3-controlnet": (
        "StableDiffusion3ControlNetPipeline",
        lambda: _with("StableDiffusion3ControlNetPipeline", "sd3", controlnet=_sd3_controlnet),
    ),
    "sd3-pag": ("StableDiffusion3PAGPipeline", lambda: _with("StableDiffusion3PAGPipeline", "sd3")),
    "qwen-image-controlnet": (
        "QwenImageControlNetPipeline",
        lambda: _with("QwenImageControlNetPipeline", "qwen-image", controlnet=_qwen_controlnet),
    ),
    "sana-controlnet": (
        "SanaControlNetPipeline",
        lambda: _with("SanaControlNetPipeline", "sana", controlnet=_sana_controlnet),
    ),
    "sana-pag": (
        "SanaPAGPipeline",
        lambda: _with("SanaPAGPipeline", "sana", pag_applied_layers="transformer_blocks.0"),
    ),
    "z-image-controlnet": (
        "ZImageControlNetPipeline",
        lambda: _with("ZImageControlNetPipeline", "z-image-turbo", controlnet=_z_image_controlnet),
    ),
    "sd15-controlnet": (
        "StableDiffusionControlNetPipeline",
        lambda: _sd15("StableDiffusionControlNetPipeline", controlnet=_unet_controlnet),
    ),
    "sd15-controlnet-pag": (
        "StableDiffusionControlNetPAGPipeline",
        lambda: _sd15("StableDiffusionControlNetPAGPipeline", controlnet=_unet_controlnet),
    ),
    "sd15-pag": ("StableDiffusionPAGPipeline", lambda: _sd15("StableDiffusionPAGPipeline")),
    "sd15-adapter": (
        "StableDiffusionAdapterPipeline",
        lambda: _sd15("StableDiffusionAdapterPipeline", unet=_attending_first, adapter=_adapter("full_adapter", 8)),
    ),
    "sdxl-controlnet": (
        "StableDiffusionXLControlNetPipeline",
        lambda: _sdxl("StableDiffusionXLControlNetPipeline", controlnet=_unet_controlnet),
    ),
    "sdxl-controlnet-pag": (
        "StableDiffusionXLControlNetPAGPipeline",
        lambda: _sdxl("StableDiffusionXLControlNetPAGPipeline", controlnet=_unet_controlnet),
    ),
    "sdxl-controlnet-union": (
        "StableDiffusionXLControlNetUnionPipeline",
        lambda: _sdxl("StableDiffusionXLControlNetUnionPipeline", controlnet=_union_controlnet),
    ),
    "sdxl-pag": ("StableDiffusionXLPAGPipeline", lambda: _sdxl("StableDiffusionXLPAGPipeline")),
    "sdxl-adapter": (
        "StableDiffusionXLAdapterPipeline",
        lambda: _with("StableDiffusionXLAdapterPipeline", "sdxl", adapter=_adapter("full_adapter_xl", 16)),
    ),
}
