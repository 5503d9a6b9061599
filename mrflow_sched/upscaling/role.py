"""The `PixelUpscaler` role: anything that upscales RGB images by a whole factor."""

from __future__ import annotations

import os
from numbers import Integral
from typing import Any, Protocol, cast

from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError, shown
from mrflow_sched._runtime.values import check_dense
from mrflow_sched.plan.checks import UpscalerKind

MOST_SHIFT = 0.25
"""Change of an image's mean that no upscaler makes, of 1; real networks move it by up to 0.04."""
LEAST_CONTRAST = 0.3
"""Share of an image's standard deviation that every upscaler keeps."""


class PixelUpscaler(Protocol):
    """Anything that upscales RGB images by a whole factor."""

    @property
    def name(self) -> str:
        """Its name in metadata and messages."""
        ...

    @property
    def scale(self) -> int:
        """Output side over input side, 1 for restoration models."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Upscale a batch.

        Args:
            images: (B, 3, h, w) float32 in [0, 1].

        Returns:
            (B, 3, h*scale, w*scale) float32 in [0, 1], on the same device.
        """
        ...


def kind_of(upscaler: object) -> UpscalerKind:
    """The kind of an upscaler, as `make_plan(upscaler_kind=...)` takes it.

    Args:
        upscaler: A `PixelUpscaler`, or None, which is Lanczos. One of your own that only interpolates says so with an
            attribute `kind` of "interpolation".

    Returns:
        "interpolation" for None, Lanczos and models of scale 1, after which bicubic resampling enlarges; "network" for
        every other one.
    """
    plain = upscaler is None or getattr(upscaler, "kind", None) == "interpolation"
    return "interpolation" if plain or getattr(upscaler, "scale", None) == 1 else "network"


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of RGB images.

    Args:
        images: A tensor to upscale.

    Raises:
        MrFlowError: `images` is not a float tensor (B, 3, h, w), or is empty.
    """
    check_dense(images, "images")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
        raise MrFlowError(
            f"images must be a float tensor (B, 3, h, w) of RGB in [0, 1], got {images.dtype} of shape "
            f"{tuple(images.shape)}; drop alpha and repeat grey three times before."
        )


def check_upscaler(upscaler: Any) -> None:
    """Refuse what cannot be a `PixelUpscaler`, before anything is made for it.

    Args:
        upscaler: What was given as one; None is Lanczos.

    Raises:
        MrFlowError: It is a path, or has no name, no whole scale of 1 or more, or cannot be called.
    """
    if upscaler is None:
        return
    kind = type(upscaler).__name__
    if isinstance(upscaler, type):
        raise MrFlowError(f"upscaler is the class {upscaler.__name__}; give an object of it: {upscaler.__name__}(...).")
    if isinstance(upscaler, (str, bytes, os.PathLike)):
        raise MrFlowError(
            f"upscaler is a file name, {shown(repr(cast('object', upscaler)))}; "
            "load it first: upscaler=load_upscaler(path)."
        )
    name, scale = getattr(upscaler, "name", None), getattr(upscaler, "scale", None)
    if not callable(upscaler) or not isinstance(name, str) or scale is None:
        raise MrFlowError(
            f"upscaler is of type {shown(kind)}, which is no upscaler; give what load_upscaler returns, or an object "
            "with a name and a scale that takes images (B, 3, h, w) when called."
        )
    if type(scale) is bool or not isinstance(scale, Integral) or int(scale) < 1:
        raise MrFlowError(
            f"the scale of the upscaler {shown(repr(name))} must be a whole number of at least 1, "
            f"got {shown(repr(scale))}."
        )


def check_result(upscaler: PixelUpscaler, images: Tensor, result: object) -> Tensor:
    """Refuse what an upscaler must not return.

    Args:
        upscaler: Whose result it is.
        images: What it was given, (B, 3, h, w) in [0, 1].
        result: What it returned.

    Returns:
        `result`, of the right shape, on the device and in the dtype of `images`.

    Raises:
        MrFlowError: `result` is no float tensor, or of another shape than the scale promises, or holds values far
            outside [0, 1], or NaN or infinity where `images` held none, or its mean is far from that of `images`.
    """
    who = f"the upscaler {shown(upscaler.name)}"
    if not isinstance(result, Tensor) or not result.is_floating_point():
        kind = str(result.dtype) if isinstance(result, Tensor) else type(result).__name__
        raise MrFlowError(f"{who} returned {kind} instead of a float tensor in [0, 1].")
    expected = (*images.shape[:2], *(side * upscaler.scale for side in images.shape[-2:]))
    if result.shape != expected:
        raise MrFlowError(
            f"{who} gave shape {tuple(result.shape)} where its scale {upscaler.scale} asks for {expected}."
        )
    if not bool(result.isfinite().all()):
        if bool(images.isfinite().all()):
            raise MrFlowError(f"{who} returned NaN or infinity.")
    elif float(result.min()) < -1 or float(result.max()) > 2:
        raise MrFlowError(
            f"{who} returned values from {float(result.min()):.3g} to {float(result.max()):.3g} instead of 0 to 1."
        )
    elif upscaler.scale > 1:  # restoration models may be made to change the light
        _check_likeness(who, images, result.to(images))
    return result.to(images)


def _check_likeness(who: str, images: Tensor, result: Tensor) -> None:
    """Refuse a result that is not its input enlarged: of quite another mean, or without its contrast."""
    (mean, contrast), (now, left) = ((each.mean((1, 2, 3)), each.std((1, 2, 3))) for each in (images, result))
    wrong = ((now - mean).abs() > MOST_SHIFT) | (left < LEAST_CONTRAST * contrast)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise MrFlowError(
            f"{who} returned another image: its mean is {float(now[row]):.2f}, not {float(mean[row]):.2f}, and its "
            f"contrast {float(left[row]):.2f}, not {float(contrast[row]):.2f}."
        )
