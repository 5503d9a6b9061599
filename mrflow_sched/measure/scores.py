"""Scores of images, by which drafts are ordered: higher is better.

A score is any function of images and their prompts. Those of this file read pixels; `similarity` asks a CLIP-type model
of a local folder; "judge" asks the networks that read what the embedded model draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched._runtime.values import check_dense, check_unit_range
from mrflow_sched.images.alpha import on_white

__all__ = ["NAMES", "Measure", "Score", "get_score"]

Measure = Callable[[Tensor, Sequence[str]], Tensor]
"""Images (B, 3, H, W), float32 in [0, 1], and their B prompts -> (B,)."""

READING_SIDE = 128
"""Pixels of the shorter side at which sharpness is read, so that a draft and a finished image can be compared."""
READING_BLUR = 1.0
"""Standard deviation in pixels of the Gaussian before the Laplacian: without it fine grain decides, which a draft says
little of (bench/results/ranks.md, on whose prompts it was chosen)."""


@dataclass(frozen=True)
class Score:
    """A named score.

    Attributes:
        name: As the user spells it.
        measure: What gives the values.
        least_first: The smallest value counts as the best.
    """

    name: str
    measure: Measure
    least_first: bool = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images.

        Args:
            images: (B, 3, H, W), floats in [0, 1]; with transparency (B, 4, H, W), seen on white.
            prompts: What each should show, B texts.

        Returns:
            (B,), float64 on the CPU, all finite, higher is better.

        Raises:
            MrFlowError: The arguments do not fit, or the score gave anything but one finite number for each image.
        """
        _check(images, prompts)
        with torch.no_grad():
            given: Any = self.measure(on_white(images.float()), prompts)
        try:
            values = torch.as_tensor(given).detach().to("cpu", torch.float64)
        except Exception as error:  # whatever a score of the user's returned
            raise MrFlowError(
                f"score {quoted(self.name)} gave {quoted(given)}; it must give a tensor of {len(images)} numbers."
            ) from error
        if values.shape != (len(images),):
            raise MrFlowError(
                f"score {quoted(self.name)} gave values of shape {tuple(values.shape)} for {len(images)} images; it "
                f"must give ({len(images)},), one number for each."
            )
        for index, value in enumerate(values):
            if not math.isfinite(float(value)):
                raise MrFlowError(
                    f"score {quoted(self.name)} gave {float(value)} for image {index + 1} of {len(images)}, which has "
                    "no place in an order; leave that image out, or use another score."
                )
        return -values if self.least_first else values


def get_score(spec: object, *, device: str | torch.device = "cpu") -> Score:
    """The score of a name.

    Args:
        spec: One of `NAMES`, "clip:FOLDER" (a local folder of a CLIP, SigLIP or BLIP model, or of a preference model of
            the same structure), any of them after "-" (least first), or a function of images and prompts (`Measure`).
        device: Where a model of a folder runs.

    Returns:
        The score.

    Raises:
        MrFlowError: There is no such score, or its model cannot be loaded.
    """
    if isinstance(spec, Score):
        return spec
    if callable(spec):
        name = getattr(spec, "name", None) or getattr(spec, "__name__", None) or type(spec).__name__
        return Score(str(name), cast("Measure", spec))
    if not isinstance(spec, str):
        raise MrFlowError(f"score is {quoted(spec)}; give {_ALLOWED}, or a function of images and prompts.")
    named = spec.strip()
    least_first = named.startswith("-")
    return Score(named, _measure_of(named.removeprefix("-"), spec, device), least_first)


def _measure_of(name: str, spec: str, device: str | torch.device) -> Measure:
    if name in _PIXELS:
        read = _PIXELS[name]
        return lambda images, _: read(images)
    if name == "judge":
        return _judge()
    kind, colon, folder = name.partition(":")
    if kind == "clip" and colon and folder:
        from mrflow_sched.measure.similarity import load_similarity

        return load_similarity(folder, device=device)
    raise MrFlowError(f"score is {quoted(spec)}, which is unknown; give {_ALLOWED}, with - before it for least first.")


def _check(images: Tensor, prompts: Sequence[str]) -> None:
    if (
        not isinstance(cast("object", images), Tensor)
        or images.ndim != 4
        or images.shape[1] not in (3, 4)
        or not len(images)
    ):
        came = tuple(images.shape) if isinstance(cast("object", images), Tensor) else quoted(images)
        raise MrFlowError(f"images must be a tensor (B, 3, H, W) of at least one image, got {came}.")
    if not images.is_floating_point():
        raise MrFlowError(f"images must be floats from 0 to 1, got {images.dtype}; divide bytes by 255.")
    check_dense(images, "images")
    check_unit_range(images, "images")
    if isinstance(prompts, str) or len(prompts) != len(images):
        came = "one text" if isinstance(prompts, str) else str(len(prompts))
        raise MrFlowError(f"prompts must be a list of {len(images)} texts, one for each image, got {came}.")


# --------------------------------------------------------------------------------------------------------------- pixels


def _luma(images: Tensor) -> Tensor:
    """Brightness (B, 1, H, W) by ITU-R BT.601."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def _at_side(images: Tensor, side: int) -> Tensor:
    """Images whose shorter side has `side` pixels: averaged down, or enlarged by bicubic interpolation."""
    height, width = images.shape[-2:]
    if min(height, width) == side:
        return images
    size = tuple(max(1, round(each * side / min(height, width))) for each in (height, width))
    if min(height, width) > side:
        return functional.interpolate(images, size, mode="area")
    return functional.interpolate(images, size, mode="bicubic", align_corners=False)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, 1, H, W), edges repeated."""
    radius = math.ceil(3 * sigma)
    axis = torch.arange(-radius, radius + 1.0, device=images.device)
    taps = torch.exp(-(axis**2) / (2 * sigma**2))
    taps = taps / taps.sum()
    wide = functional.pad(images, [radius] * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(wide, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))


def _sharpness(images: Tensor) -> Tensor:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000) of the smoothed brightness in bytes, at the reading side."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], device=images.device)
    small = _blurred(_at_side(_luma(images * 255), READING_SIDE), READING_BLUR)
    return functional.conv2d(small, kernel.view(1, 1, 3, 3)).flatten(1).var(1, unbiased=False)


def _colourfulness(images: Tensor) -> Tensor:
    """M3 of Hasler and Suesstrunk (2003), "Measuring colourfulness in natural images", on values in [0, 255]."""
    red, green, blue = (images * 255).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)
    spread, mean = opponents.var(2, unbiased=False).sum(1).sqrt(), opponents.mean(2).square().sum(1).sqrt()
    return spread + 0.3 * mean


def _contrast(images: Tensor) -> Tensor:
    """Root mean square contrast: standard deviation of the brightness (Peli 1990)."""
    return _luma(images).flatten(1).std(1, unbiased=False)


def _brightness(images: Tensor) -> Tensor:
    return _luma(images).flatten(1).mean(1)


def _saturation(images: Tensor) -> Tensor:
    """Mean of the largest less the smallest colour value (the chroma of HSV)."""
    return (images.amax(1) - images.amin(1)).flatten(1).mean(1)


_PIXELS: dict[str, Callable[[Tensor], Tensor]] = {
    "sharpness": _sharpness,
    "colourfulness": _colourfulness,
    "contrast": _contrast,
    "brightness": _brightness,
    "saturation": _saturation,
}
NAMES = (*_PIXELS, "judge")
"""Scores that need no folder."""
_ALLOWED = f"{', '.join(NAMES)} or clip:FOLDER"


# ---------------------------------------------------------------------------------------------------------------- judge


def _judge() -> Measure:
    """How sure the embedded judge is that an image shows what its caption says."""
    from mrflow_sched.demo.judge import load_judge, log_probability
    from mrflow_sched.demo.parse import scene_of

    judge = load_judge()

    def read(images: Tensor, prompts: Sequence[str]) -> Tensor:
        scenes = [scene_of(prompt) for prompt in prompts]
        for prompt, scene in zip(prompts, scenes, strict=True):
            if scene is None:
                raise MrFlowError(
                    f"score 'judge' reads only what the embedded model draws, which {quoted(prompt)} does not describe"
                    '; write like "a red star over green hills under a blue sky, the word FLOW", or use another score '
                    f"({', '.join(_PIXELS)}, clip:FOLDER)."
                )
        return log_probability(judge, images.cpu(), [scene for scene in scenes if scene is not None])

    return read
