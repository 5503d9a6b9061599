"""Upscaling to an exact size with a model of any scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.cancel import Cancel, Warn, ignore, stop_if
from mrflow_sched._runtime.errors import shown
from mrflow_sched._runtime.memory import free_memory, is_memory_error
from mrflow_sched.images.alpha import split_alpha
from mrflow_sched.plan.sizes import fit_box
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.upscaling.lanczos import LanczosUpscaler, resize_lanczos
from mrflow_sched.upscaling.model import ModelUpscaler
from mrflow_sched.upscaling.role import PixelUpscaler, check_images, check_result, check_upscaler

NO_MODEL = (
    "no super-resolution model was given, so the image was upscaled with Lanczos, which leaves fine detail soft; "
    "give an ESRGAN-type file (.safetensors or .pth) for sharper results."
)
ONLY_CLEANS = (
    "the upscaler {name} does not enlarge (x1): it cleaned the image, which was then enlarged with bicubic resampling; "
    "give a x2 or x4 file for sharper results."
)


# ---------------------------------------------------------------------------------------------------- exact target size


def upscale_to(
    images: Tensor,
    width: int,
    height: int,
    upscaler: PixelUpscaler | None = None,
    *,
    cancel: Cancel | None = None,
    warn: Warn | None = None,
) -> Tensor:
    """Upscale images to an exact size.

    The model runs until its result is nearest to the needed factor (on a ratio scale); bicubic resizing with
    antialiasing, in float32, does the rest, up or down. Where the shapes differ, the image fills the target and is
    cropped at the centre (`plan.fit_box`). Transparency is resized by itself, with Lanczos, and colour that it hides is
    filled in from its neighbours first, so that edges get no fringe.

    Args:
        images: (B, 3, h, w) float in [0, 1], or (B, 4, h, w) with transparency.
        width: Width of the result in pixels, 1 or more.
        height: Its height.
        upscaler: What upscales; None and `LanczosUpscaler` resize with Lanczos, and `warn` receives `NO_MODEL`.
        cancel: Polled before every run of the model and every tile.
        warn: Receives one sentence at a time.

    Returns:
        (B, 3, height, width) float32 in [0, 1], on the device of `images`; with transparency (B, 4, height, width).

    Raises:
        MrFlowError: `images`, a size or the upscaler is not as above, or the upscaler returns what it must not
            (`role.check_result`).
        MemoryError: One image, or the smallest tile of one, does not fit into memory.
        Cancelled: `cancel` answered True.
    """
    if images.ndim == 4 and images.shape[1] == 4:
        check_images(images[:, :3])
        large = upscale_to(split_alpha(images)[0], width, height, upscaler, cancel=cancel, warn=warn)
        return torch.cat([large, _fitted(images[:, 3:], width, height)], dim=1)
    check_images(images)
    check_upscaler(upscaler)
    say = warn or ignore
    now_height, now_width = images.shape[-2:]
    wide, high, left, top = fit_box(now_width, now_height, width, height)
    stop_if(cancel)
    result = images.float()
    if upscaler is None or isinstance(upscaler, LanczosUpscaler):
        if wide > now_width or high > now_height:
            say(NO_MODEL)
        result = resize_lanczos(result, wide, high)
    else:
        if upscaler.scale == 1 and (wide > now_width or high > now_height):
            say(ONLY_CLEANS.format(name=shown(upscaler.name)))
        for _ in range(_passes(max(wide / now_width, high / now_height), upscaler.scale)):
            stop_if(cancel)
            result = _apply(upscaler, result, cancel, say)
        result = _resize_bicubic(result, wide, high)
    return result[..., top : top + height, left : left + width].clamp(0, 1).contiguous()


def fit_like(channel: Tensor, images: Tensor, plan: StagedPlan) -> Tensor:
    """Another channel of an image that a run started from, resized as the run's images were.

    Args:
        channel: (B, 1, h, w) float in [0, 1], at the size of the image that was given.
        images: (B, 3, H, W), what came out: of the size that was asked for, or of an earlier stage.
        plan: The run's plan.

    Returns:
        (B, 1, H, W) in [0, 1]: filled and cropped at the centre, never stretched.
    """
    area = plan.asked_area
    height, width = images.shape[-2:]
    final = (height, width) == tuple(side.stop - side.start for side in area)
    width, height = (plan.width, plan.height) if final else (width, height)
    fitted = _fitted(channel, width, height)
    return fitted[(..., *area)] if final else fitted


def _fitted(channel: Tensor, width: int, height: int) -> Tensor:
    """A channel resized with Lanczos to fill the size, and cropped at the centre."""
    wide, high, left, top = fit_box(channel.shape[-1], channel.shape[-2], width, height)
    return resize_lanczos(channel, wide, high)[..., top : top + height, left : left + width].clamp(0, 1)


def _apply(upscaler: PixelUpscaler, images: Tensor, cancel: Cancel | None, say: Warn) -> Tensor:
    if isinstance(upscaler, ModelUpscaler):
        return upscaler.run(images, cancel=cancel, warn=say)
    return _whole_or_one_by_one(upscaler, images, cancel)


def _whole_or_one_by_one(upscaler: PixelUpscaler, images: Tensor, cancel: Cancel | None) -> Tensor:
    """Run another upscaler than ours: a batch that does not fit into memory is upscaled image by image."""
    for size in dict.fromkeys((len(images), 1)):
        try:
            done: list[Tensor] = []
            for first in range(0, len(images), size):
                stop_if(cancel)
                part = images[first : first + size]
                done.append(check_result(upscaler, part, upscaler(part.clone())))
            return torch.cat(done)
        except Exception as error:
            if not is_memory_error(error):
                raise
        free_memory(images.device)
    height, width = images.shape[-2:]
    raise MemoryError(
        f"memory ran out while the upscaler {shown(upscaler.name)} upscaled {width}x{height} pixels; free memory, or "
        "choose a smaller size or upscaler."
    )


def _passes(factor: float, scale: int) -> int:
    """How often to run a model of `scale` for `factor`.

    Once for any factor above 1, then again while the remaining factor exceeds sqrt(scale): overshooting and downscaling
    stays sharp, undershooting and upscaling is soft. A restoration model (scale 1) runs once, before the resize.
    """
    if scale == 1:
        return 1
    if factor <= 1:
        return 0
    passes = 1
    while factor / scale**passes > math.sqrt(scale):
        passes += 1
    return passes


def _resize_bicubic(images: Tensor, width: int, height: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    return functional.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)
