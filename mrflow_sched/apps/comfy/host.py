"""What the nodes ask of ComfyUI's own modules and objects."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "encode",
    "graph_builder",
    "guider",
    "is_interrupt",
    "latent_format",
    "latent_ratio",
    "model_sampling",
    "module",
    "sampler",
    "upscale",
    "zeros",
]


def module(name: str) -> Any:
    """One of ComfyUI's modules, imported when it is first asked for.

    Args:
        name: Such as "comfy.samplers".

    Returns:
        The module.
    """
    return import_module(name)


def is_interrupt(error: BaseException) -> bool:
    """Whether an error is the user's interrupt, which ComfyUI raises from progress bars and layers.

    Args:
        error: Any exception.

    Returns:
        True where it is.
    """
    return isinstance(error, module("comfy.model_management").InterruptProcessingException)


def graph_builder() -> Any:
    """A builder for the graph that a node expands into.

    Returns:
        ComfyUI's `GraphBuilder`.
    """
    return module("comfy_execution.graph_utils").GraphBuilder()


def latent_format(model: Any) -> Any:
    """How a model's latents are made.

    Args:
        model: A MODEL.

    Returns:
        ComfyUI's `LatentFormat`: `latent_channels`, `latent_dimensions`.
    """
    return model.get_model_object("latent_format")


def latent_ratio(model: Any) -> int:
    """Pixels to one of a model's latents, along a side.

    Args:
        model: A MODEL.

    Returns:
        8 for most models.
    """
    kind = latent_format(model)
    # Releases of 2025 do not tell; there these are Chroma Radiance's pixels, HunyuanImage 2.1 and FLUX.2.
    usual = {3: 1, 64: 32, 128: 16}.get(int(kind.latent_channels), 8)
    return int(getattr(kind, "spacial_downscale_ratio", usual))


def model_sampling(model: Any) -> Any:
    """How a model's noise is mixed and its sigmas are read, with what the user's nodes changed of it.

    Args:
        model: A MODEL.

    Returns:
        ComfyUI's `model_sampling`.
    """
    return model.get_model_object("model_sampling")


def zeros(model: Any, width: int, height: int, count: int) -> Tensor:
    """Empty latents of a model.

    Args:
        model: A MODEL.
        width: Pixels.
        height: Pixels.
        count: Images.

    Returns:
        (count, C, h, w), or (count, C, 1, h, w) where the model has an axis of time.
    """
    kind = latent_format(model)
    ratio = latent_ratio(model)
    device = module("comfy.model_management").intermediate_device()
    empty = torch.zeros((count, kind.latent_channels, height // ratio, width // ratio), device=device)
    return module("comfy.sample").fix_empty_latent_channels(model, empty)


def sampler(function: Callable[..., Any]) -> Any:
    """A SAMPLER of a function with k-diffusion's calling convention.

    Args:
        function: The solver.

    Returns:
        ComfyUI's object.
    """
    return module("comfy.samplers").KSAMPLER(function)


def guider(model: Any, positive: Any, negative: Any, cfg: float) -> Any:
    """A GUIDER of one model.

    Args:
        model: A MODEL.
        positive: CONDITIONING.
        negative: CONDITIONING; not evaluated where `cfg` is 1.
        cfg: The scale.

    Returns:
        ComfyUI's object.
    """
    made = module("comfy.samplers").CFGGuider(model)
    made.set_conds(positive, negative)
    made.set_cfg(cfg)
    return made


def upscale(upscale_model: Any, images: Tensor) -> Tensor:
    """Images enlarged by an UPSCALE_MODEL, in tiles that fit into memory.

    Args:
        upscale_model: The model.
        images: (B, h, w, 3), floats in [0, 1].

    Returns:
        (B, h*scale, w*scale, 3).
    """
    return module("comfy_extras.nodes_upscale_model").ImageUpscaleWithModel.execute(upscale_model, images)[0]


def encode(vae: Any, images: Tensor) -> Tensor:
    """Latents of images, encoded one by one: a VAE with an axis of time takes a batch for the frames of a video.

    Args:
        vae: A VAE.
        images: (B, H, W, C), floats in [0, 1].

    Returns:
        (B, C, h, w) or (B, C, 1, h, w).
    """
    return torch.cat([vae.encode(images[at : at + 1]) for at in range(len(images))])
