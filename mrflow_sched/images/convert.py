"""Images as callers give them, and as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mrflow_sched._runtime.cancel import Warn
from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched._runtime.values import check_dense, check_unit_range
from mrflow_sched.images.formats import refusing
from mrflow_sched.images.pixels import read_pixels, upright


def from_pictures(pictures: Any, warn: Warn | None = None) -> Tensor:
    """Whatever a caller gives as an image, or several of one size, as a tensor.

    Args:
        pictures: PIL images (turned upright as their EXIF says, of any mode and profile, see `read_pixels`), arrays
            (H, W), (H, W, C) or (B, H, W, C), tensors (C, H, W) or (B, C, H, W), 8 bits or floats in [0, 1], or a list
            of these. C is 1 or 3, and one more with alpha.
        warn: Receives a sentence for whatever a PIL image left open.

    Returns:
        (B, C, H, W) float32 in [0, 1]; transparency is the last channel.

    Raises:
        MrFlowError: `pictures` is anything else.
    """
    if isinstance(pictures, (list, tuple)):
        found = [from_pictures(each, warn) for each in cast("Sequence[Any]", pictures)]
        if not found or any(each.shape[1:] != found[0].shape[1:] for each in found):
            raise MrFlowError("image must be one image or a list of images of one size and mode.")
        return torch.cat(found)
    if isinstance(pictures, Image.Image):
        if pictures.format == "EPS":
            raise MrFlowError("the image is an EPS file, which only another program can draw; save it as PNG first.")
        with refusing("the image"):
            pictures.load()
            return read_pixels(upright(pictures), warn)[None]
    if isinstance(pictures, Tensor):
        check_dense(pictures, "image")
        values = given = pictures
    elif hasattr(pictures, "__array__"):
        values = given = _tensor_of(pictures)
        values = values[..., None] if values.ndim == 2 else values
        values = values.movedim(-1, -3) if values.ndim > 2 else values
    else:
        raise MrFlowError(f"image is {type(pictures).__name__}; give a PIL image, an array or a tensor.")
    values = values if values.ndim == 4 else values[None]
    if values.ndim != 4 or values.shape[1] not in (1, 2, 3, 4) or 0 in values.shape:
        kind = "a tensor" if isinstance(pictures, Tensor) else "an array"
        raise MrFlowError(
            f"image is {kind} of shape {tuple(given.shape)}; give (H, W, C) as an array or (C, H, W) as a tensor."
        )
    if values.dtype == torch.uint8:
        return values.float() / 255
    if not values.is_floating_point():
        raise MrFlowError(f"image must hold floats from 0 to 1 or 8-bit values, got {values.dtype}; scale them first.")
    check_unit_range(values, "image")
    return values.float()


def _tensor_of(array: Any) -> Tensor:
    """An array as a tensor; copied where torch cannot take it as it is: flipped, read-only, of foreign byte order."""
    try:
        values = np.require(array, requirements=["C", "W"])
        return torch.as_tensor(values.astype(values.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError, RuntimeError) as error:  # objects, texts, dtypes and strides that torch lacks
        raise MrFlowError(
            f"image is an array that torch cannot take ({first_line(error)}); give float32 or uint8 values."
        ) from error


def to_pil(image: Tensor) -> Image.Image:
    """A tensor as a Pillow image of 8 bits, rounded to the nearest value.

    Args:
        image: (3, H, W) or, with alpha, (4, H, W) float; values outside [0, 1] are clamped.

    Returns:
        An RGB or RGBA image.
    """
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    return picture_of(pixels)


def picture_of(pixels: Tensor) -> Image.Image:
    """8-bit values as a Pillow image.

    Args:
        pixels: (H, W, 3) or, with alpha, (H, W, 4) uint8, contiguous, on the CPU.

    Returns:
        An RGB or RGBA image.
    """
    height, width, channels = pixels.shape
    return Image.frombytes("RGB" if channels == 3 else "RGBA", (width, height), pixels.numpy().tobytes())


def to_8_bit(image: Tensor) -> Tensor:
    """An image as 8-bit values on the CPU, rounded to the nearest value.

    Args:
        image: (3, H, W) or, with alpha, (4, H, W) float; values outside [0, 1] are clamped.

    Returns:
        (H, W, 3) or (H, W, 4) uint8.

    Raises:
        MrFlowError: `image` has another shape or dtype, or contains NaN or infinity.
    """
    if image.ndim != 3 or image.shape[0] not in (3, 4) or 0 in image.shape or not image.is_floating_point():
        raise MrFlowError(f"image must be a float tensor (3, H, W), got {image.dtype} of shape {tuple(image.shape)}.")
    exact = image.detach().float()
    if not bool(exact.isfinite().all()):
        raise MrFlowError("image contains NaN or infinity; nothing was saved.")
    # Rounded where the image is: one byte a value comes from the device, not four.
    return (exact.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()
