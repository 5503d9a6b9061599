"""Pictures that a pipeline edits: references that its network sees, and a picture of which a mask is painted anew.

Which arguments a pipeline has for them is read from its call (`picture_arguments`). `Pictures` holds what a caller
gave, and gives each stage its own: references of about as many pixels as the stage, the picture and its mask at the
stage's size.

Some pipelines prepare references at a size of their own, whatever the image's. They are told the stage's by a copy of
their function that finds another function under one global name (`with_globals`); nothing of diffusers is changed.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.layouts.base import Layout, parameter_names
from mrflow_sched.engines.diffusers.layouts.pictures import own_size, picture_arguments
from mrflow_sched.images.convert import to_pil
from mrflow_sched.plan.sizes import fit_box
from mrflow_sched.upscaling.lanczos import resize_lanczos

__all__ = ["Pictures", "starting_at", "texts_as_given", "with_globals"]

_AREA = 1024 * 1024
"""Pixels that the editing pipelines of diffusers give a reference; a stage that is no smaller leaves it to them."""
_GRID, _SHORTEST = 16, 64
Reference = Callable[[int, int], Any] | Sequence[Image.Image]


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of a call, for every size at which a stage needs them.

    Attributes:
        references: PIL images, or a function (width, height) -> image or images; None for none.
        picture: (1 or B, 3, H, W), float32 in [0, 1], on the model's grid: what is painted anew in part; None for none.
        mask: (1 or B, 1, H, W), 1 where it is painted anew, 0 where it stays; None where `picture` is.
        sizes: (width, height) of every stage, from the first; () where only one size is asked for.
    """

    references: Reference | None = None
    picture: Tensor | None = None
    mask: Tensor | None = None
    sizes: tuple[tuple[int, int], ...] = ()

    def __bool__(self) -> bool:
        return self.references is not None or self.picture is not None

    def arguments(self, pipe: Any, width: int, height: int, rows: range, batch: int) -> dict[str, Any]:
        """Arguments of a pipeline's call for one stage.

        Args:
            pipe: The pipeline.
            width: Of the stage in pixels.
            height: Likewise.
            rows: Which images of the batch the stage is for.
            batch: Images of the whole batch.

        Returns:
            Values by name; empty where there are no pictures.
        """
        takes, names = picture_arguments(pipe), parameter_names(pipe.__call__)
        made: dict[str, Any] = {}
        if self.picture is not None and self.mask is not None:
            picture, mask = self.at(width, height)
            made[takes.picture] = _rows_of(picture, rows, batch)
            if own_size(pipe):
                made[takes.picture] = to_pil(made[takes.picture][0])  # it asks for `size` as PIL images have it
            made[takes.mask] = _rows_of(mask, rows, batch)
            if takes.noised:
                made["strength"] = 1.0  # the stage's own sigmas say where it starts
        if takes.inpaints and "_auto_resize" in names:
            made["_auto_resize"] = False  # or it would run at a size of its own
        own = _asked_area(pipe) or own_size(pipe) is not None
        found = self.references_at(width, height, own=own, always=takes.inpaints)
        if found:
            made[takes.reference] = found if takes.several else found[0]
            if takes.lists:
                made[takes.reference] = [found] * len(rows)
            if "_auto_resize" in names and width * height < _AREA:
                made["_auto_resize"] = False
            if _asked_area(pipe):
                made["output_resolution"] = min(math.isqrt(width * height), math.isqrt(_AREA))
        return made

    def references_at(self, width: int, height: int, *, own: bool = False, always: bool = False) -> list[Image.Image]:
        """The references for a stage: of at most its pixels, in their own shape.

        Args:
            width: Of the stage.
            height: Likewise.
            own: The pipeline resizes them itself.
            always: Also for a stage of a megapixel or more, at which most pipelines do so themselves.

        Returns:
            PIL images; empty for none.
        """
        if self.references is None:
            return []
        if callable(self.references):
            return list(self.references(width, height))
        if own or (width * height >= _AREA and not always):
            return list(self.references)
        return [_shrunk(each, min(width * height, _AREA)) for each in self.references]

    def at(self, width: int, height: int) -> tuple[Tensor, Tensor]:
        """Picture and mask at a size; there must be some.

        A stage's result fills the next stage's size and is cropped there. They are made smaller by the opposite way:
        with their edges repeated where that crop is. So what a stage paints lands where it belongs.

        Args:
            width: In pixels.
            height: Likewise.

        Returns:
            (N, 3, `height`, `width`) and (N, 1, `height`, `width`), both in [0, 1]. A mask that is made smaller masks
            every pixel that holds something masked.
        """
        picture, mask = cast("Tensor", self.picture), cast("Tensor", self.mask)
        between = [size for size in self.sizes if size[0] * size[1] > width * height]
        for wide, high in (*reversed(between), (width, height)):
            picture, mask = _before_handoff(picture, mask, wide, high)
        return picture, mask

    def composed(self, images: Tensor, *, blend: bool = True) -> Tensor:
        """Images with the given picture outside the mask.

        Args:
            images: (B, 3, h, w) in [0, 1].
            blend: Mix both where the mask is between 0 and 1; else `images` are taken there, to be mixed at the end.

        Returns:
            In the same shape. Where the mask is 0 values are the picture's own, where it is 1 those of `images`.
        """
        if self.picture is None:
            return images
        picture, mask = (each.to(images) for each in self.at(int(images.shape[-1]), int(images.shape[-2])))
        if not blend:
            return torch.where(mask <= 0, picture, images)
        mixed = torch.lerp(picture.expand_as(images), images, mask)
        return torch.where(mask <= 0, picture, torch.where(mask >= 1, images, mixed))

    def call_of(self, view: Any, width: int, height: int, *, graph: bool) -> Callable[..., Any] | None:
        """The call of a view that keeps to a stage's size, where the pipeline takes no argument for that.

        Args:
            view: A stage's copy of the pipeline.
            width: Of the stage in pixels.
            height: Likewise.
            graph: Keep a graph; else gradients are off, as in the pipeline's own call.

        Returns:
            A function to call in place of the view; None where the view is right as it is.
        """
        if self.picture is not None and hasattr(view, "_get_raw_image_size"):
            call = functools.partial(with_globals(type(view).__call__, math=_NO_SHRINKING), view)
            return call if graph else torch.no_grad()(call)
        own = own_size(view)
        if own is None or _asked_area(view) or (self.references is None and self.picture is None):
            return None
        # Without a size in its call, or with one that it does not read, it makes images of the size it chooses.
        sized = self.picture is None and {"width", "height"} <= parameter_names(view.__call__)
        if sized and width * height >= _AREA:
            return None

        def dimensions(area: float, ratio: float) -> Any:
            found = own(min(area, width * height), ratio)
            return found if sized else (width, height, *found[2:])

        call = functools.partial(with_globals(type(view).__call__, calculate_dimensions=dimensions), view)
        return call if graph else torch.no_grad()(call)


def texts_as_given(layout: Layout, prompts: Sequence[str], negatives: Sequence[str] | None) -> dict[str, Any]:
    """Prompts for a pipeline's call as texts, where its text encoder is to see pictures beside them.

    Args:
        layout: The pipeline's.
        prompts: One text per image.
        negatives: As many, or None.

    Returns:
        Arguments of the pipeline's call.
    """
    text: dict[str, Any] = {"prompt": list(prompts)}
    if layout.family.guidance_kind == "cfg" and "negative_prompt" in layout.call_names:
        # A space is what Qwen-Image's makers give where there is none.
        text["negative_prompt"] = list(negatives or [" "] * len(prompts))
    return text


def with_globals(function: Any, **names: Any) -> Any:
    """A function as it would be if its module had other globals.

    Args:
        function: A function, perhaps in a decorator that keeps it as `__wrapped__`.
        **names: Globals that it is to find.

    Returns:
        A copy of the innermost function.
    """
    inner = cast("types.FunctionType", inspect.unwrap(function))
    made = types.FunctionType(
        inner.__code__, {**inner.__globals__, **names}, inner.__name__, inner.__defaults__, inner.__closure__
    )
    made.__kwdefaults__ = inner.__kwdefaults__
    return made


def starting_at(view: Any, start: Tensor) -> Callable[..., Any]:
    """A view's `prepare_latents` that begins with a given state where the pipeline noises the picture itself.

    It is called as the pipeline does without latents, but for the noise, of which none is drawn: the scheduler knows
    it (`MrFlowScheduler.scale_noise`).

    Args:
        view: A stage's copy of the pipeline.
        start: The state in the layout of the pipeline's loop.

    Returns:
        A function with the method's signature, which returns what it returns with `start` in the first place.
    """
    prepare: Any = with_globals(view.__class__.prepare_latents, randn_tensor=_no_noise)

    def prepared(*values: Any, **named: Any) -> Any:
        made: Any = prepare(view, *values, **named)
        first: Tensor = made[0]
        if first.shape != start.shape:
            raise MrFlowError(
                f"pipe is {type(view).__name__}, whose latents of shape {tuple(first.shape)} are packed in a way that "
                "is not known; use another inpainting pipeline."
            )
        return (start.to(first), *made[1:])

    return prepared


def _root(value: float) -> float:
    return max(1.0, math.sqrt(value))


_NO_SHRINKING = types.SimpleNamespace(sqrt=_root)
"""What `math` is to the FLUX.2 Klein inpainting call, which scales a picture of more than a megapixel by a root below 1
and would run at that size."""


def _no_noise(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
    return torch.zeros(tuple(shape), device=device, dtype=dtype)


def _asked_area(pipe: Any) -> bool:
    """Whether the call itself takes the size of references."""
    return "output_resolution" in parameter_names(pipe.__call__)


def _before_handoff(picture: Tensor, mask: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Picture and mask at the size of the stage before, from which a hand-off (`upscale_to`) would make them."""
    now_high, now_wide = picture.shape[-2:]
    if (now_wide, now_high) == (width, height):
        return picture, mask
    wide, high, left, top = fit_box(width, height, now_wide, now_high)
    edges = (left, wide - now_wide - left, top, high - now_high - top)
    picture, mask = (functional.pad(each, edges, mode="replicate") for each in (picture, mask))
    shrunk = resize_lanczos(picture, width, height).clamp(0, 1)
    if height <= high and width <= wide:
        return shrunk, functional.adaptive_max_pool2d(mask, (height, width))
    return shrunk, functional.interpolate(mask, (height, width), mode="bilinear", align_corners=False)


def _shrunk(picture: Image.Image, area: int) -> Image.Image:
    """A reference of at most `area` pixels, in its own shape, its sides multiples of 16."""
    width, height = picture.size
    scale = math.sqrt(area / (width * height))
    if scale >= 1.0:
        return picture
    wide, high = (max(_SHORTEST, round(side * scale / _GRID) * _GRID) for side in (width, height))
    return picture.resize((wide, high), Image.Resampling.LANCZOS)


def _rows_of(images: Tensor, rows: range, batch: int) -> Tensor:
    """One row for each image of a stage."""
    if len(images) == batch:
        return images[rows.start : rows.stop]
    return images.expand(len(rows), -1, -1, -1)
