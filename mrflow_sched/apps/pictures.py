"""The pictures that a call of `MrFlow` edits: references, or a picture of which a mask is painted anew."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.editing import Pictures
from mrflow_sched.engines.diffusers.layouts.pictures import PictureArguments, is_modular, picture_arguments
from mrflow_sched.images.alpha import split_alpha
from mrflow_sched.images.convert import from_pictures, to_pil
from mrflow_sched.plan.notes import fitting_note
from mrflow_sched.plan.sizes import fit_box
from mrflow_sched.upscaling.fit import upscale_to

if TYPE_CHECKING:
    from mrflow_sched.plan.families import Family
    from mrflow_sched.plan.stages import StagedPlan

__all__ = [
    "Inpainting",
    "Reading",
    "check_pictures",
    "check_references",
    "inpainting_of",
    "reading_of",
    "references_of",
    "size_like",
]

_REFUSED = {
    "padding_mask_crop": "crop the picture and the mask yourself, and put the result back",
    "masked_image_latents": "inpaint_image and mask_image say all that is needed",
}
_LUMA = (0.299, 0.587, 0.114)
_SHORTEST, _LONGEST_SHAPE = 16, 16
"""Shortest side of a reference in pixels, and longer over shorter side: less is no token of some pipelines."""
_SHORTEST_CHECKED, _LONGEST_SHAPE_CHECKED = 64, 8
"""Likewise where a pipeline checks its references itself: FLUX.2, Z-Image-Omni."""
_SHAPE_SLACK = 0.02
"""How far, as a fraction, the shape of a mask may be from that of its picture: what rounding of sides leaves."""


def check_pictures(pipe: Any, own: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Refuse pictures that a pipeline has no use for, or lacks, or that go by another name here.

    Args:
        pipe: The pipeline.
        own: `image`, `reference_image`, `inpaint_image` and `mask_image` of the call; None for what was not given.
        more: The call's other arguments.

    Raises:
        MrFlowError: The first that does not fit.
    """
    takes, kind = picture_arguments(pipe), type(pipe).__name__
    given = {name for name, value in {**own, **more}.items() if value is not None}
    if is_modular(pipe):
        named = next((name for name in ("reference_image", "inpaint_image", "mask_image") if name in given), None)
        if named is not None:
            which = "takes references (FluxKontextPipeline, ...)" if named == "reference_image" else "inpaints"
            raise MrFlowError(
                f"{named} is given, and {kind} is modular, which MrFlow gives no pictures to edit; load the classic "
                f"pipeline of this model that {which}."
            )
    for name in given & set(_REFUSED):
        raise MrFlowError(f"{name} is not taken, as stages differ in size; {_REFUSED[name]}.")
    for theirs, ours in (
        (takes.reference, "reference_image"),
        (takes.picture, "inpaint_image"),
        (takes.mask, "mask_image"),
    ):
        if theirs != ours and theirs in given - set(own):
            raise MrFlowError(f"{theirs} is called {ours} here, for every pipeline; give it by that name.")
    if takes.inpaints:
        if "image" in given:
            raise MrFlowError(
                f"image is what MrFlow upscales and refines, and {kind} paints a masked part anew; give the picture as "
                "inpaint_image and the mask as mask_image."
            )
        lacking = [name for name in ("inpaint_image", "mask_image") if name not in given]
        if lacking:
            raise MrFlowError(
                f"{lacking[0]} is missing; {kind} needs inpaint_image, and mask_image, which is white where that is to "
                "be painted anew."
            )
    else:
        named = next((name for name in ("inpaint_image", "mask_image") if name in given), None)
        if named is not None:
            raise MrFlowError(
                f"{named} is given, and {kind} does not inpaint; load the pipeline of this model whose name has "
                "Inpaint or Fill."
            )
    if "reference_image" in given and not takes.reference:
        raise MrFlowError(f"reference_image is given, and {kind} takes no references; leave it out.")
    if takes.needed and "reference_image" not in given:
        also = ", as image is what MrFlow upscales and refines" if "image" in given else ""
        raise MrFlowError(f"reference_image is missing{also}; {kind} edits a picture: give it as reference_image.")


def check_references(pipe: Any, count: int) -> None:
    """Refuse what the command line cannot give a pipeline, and references that it does not take.

    Args:
        pipe: The pipeline.
        count: Files of --reference.

    Raises:
        MrFlowError: It does not fit.
    """
    takes, kind = picture_arguments(pipe), type(pipe).__name__
    if takes.inpaints:
        raise MrFlowError(
            f"--model is of {kind}, which paints a masked part of an image anew; the command line has no option for a "
            "mask: use MrFlow in Python (docs/diffusers.md, Inpainting)."
        )
    if count and not takes.reference:
        raise MrFlowError(f"--reference is given, and {kind} takes no references; leave it out.")
    if takes.needed and not count:
        raise MrFlowError(
            f"--model is of {kind}, which edits an image; give it with --reference, which only mrflow generate has."
        )


# ---------------------------------------------------------------------------------------------------------- references


def references_of(given: Any, pipe: Any, warn: Callable[[str], object]) -> Any:
    """References as `Pictures` holds them.

    Args:
        given: An image in any form, a list of images of any sizes, or a function (width, height) -> either.
        pipe: Says how many it takes.
        warn: Receives a sentence for whatever a picture left open.

    Returns:
        PIL images, or a function (width, height) -> PIL images; None for None.

    Raises:
        MrFlowError: It is no image, too small or too thin, or there are more than the pipeline takes.
    """
    if given is None:
        return None
    takes = picture_arguments(pipe)
    if callable(given):
        made = cast("Callable[[int, int], Any]", given)

        def at(width: int, height: int) -> list[Any]:
            return _references(made(width, height), takes, pipe, warn)

        return at
    return _references(given, takes, pipe, warn)


def _references(given: Any, takes: PictureArguments, pipe: Any, warn: Callable[[str], object]) -> list[Any]:
    several = cast("list[Any]", given) if isinstance(given, (list, tuple)) else [given]
    found = [image for each in several for image in _read(each, "reference_image", warn)]
    if not found:
        raise MrFlowError("reference_image is an empty list; give an image, or leave it out.")
    if len(found) > 1 and not takes.several:
        raise MrFlowError(
            f"reference_image holds {len(found)} images, and {type(pipe).__name__} takes one; put them side by side in "
            "one image, or call it once for each."
        )
    for image in found:
        _check_shape(image, pipe)
    # Transparent pixels have any colour: on white they have the one that people expect.
    keeps = int(getattr(pipe.vae.config, "input_channels", None) or 3) == 4
    return [to_pil(image if keeps and len(image) == 4 else _on_white(image)) for image in found]


def _check_shape(image: Tensor, pipe: Any) -> None:
    """Refuse a reference (C, H, W) that is too small or too thin for a pipeline. Raises MrFlowError."""
    checked = hasattr(getattr(pipe, "image_processor", None), "check_image_input")
    shortest = _SHORTEST_CHECKED if checked else _SHORTEST
    longest = _LONGEST_SHAPE_CHECKED if checked else _LONGEST_SHAPE
    height, width = image.shape[-2:]
    if min(width, height) < shortest or max(width, height) > longest * min(width, height):
        raise MrFlowError(
            f"reference_image is {width}x{height}; {type(pipe).__name__} needs {shortest} pixels or more on each side, "
            f"and a shape between 1:{longest} and {longest}:1: enlarge, crop or pad it."
        )


def _on_white(image: Tensor) -> Tensor:
    """(C, H, W), perhaps with alpha, as (3, H, W)."""
    if len(image) in (1, 3):
        return image.expand(3, -1, -1)
    colour, alpha = image[:-1], image[-1:]
    return (colour * alpha + 1.0 - alpha).expand(3, -1, -1)


def size_like(
    references: Any, family: Family, width: int | None = None, height: int | None = None
) -> tuple[int, int] | None:
    """The size of an image that is to have the shape of the first reference: about as many pixels as usual.

    Args:
        references: What `references_of` returned.
        family: Knows the usual size and the grid.
        width: In pixels, where it was asked for: the height follows from it.
        height: Likewise.

    Returns:
        (width, height), what was not asked for a multiple of the grid; None where there is no reference, or only a
        function of the size.
    """
    if not references or callable(references):
        return None
    usual = family.default_size or family.native_size
    wide, high = references[0].size
    scale = math.sqrt(usual[0] * usual[1] / (wide * high))
    if width is not None or height is not None:
        scale = height / high if width is None and height is not None else (width or 0) / wide
    rounded = [max(family.grid, round(side * scale / family.grid) * family.grid) for side in (wide, high)]
    return width or rounded[0], height or rounded[1]


# ---------------------------------------------------------------------------------------------------------- inpainting


@dataclass(frozen=True, eq=False)
class Reading:
    """A picture and its mask, as they were given.

    Attributes:
        picture: (N, 1 to 4, H, W) in [0, 1]; transparency is the last channel.
        mask: (M, 1, H, W) in [0, 1], of the picture's size.
    """

    picture: Tensor
    mask: Tensor


def reading_of(
    picture: Any, mask: Any, rows: Callable[[Tensor, str], Tensor], warn: Callable[[str], object]
) -> Reading | None:
    """Picture and mask of a call, checked.

    Args:
        picture: An image in any form, or one per prompt; None for none.
        mask: Likewise, white where the picture is painted anew; transparent counts as black.
        rows: Images for all that are made, from those of each prompt and their argument's name.
        warn: Receives sentences for the user.

    Returns:
        Both; None where there is no picture.

    Raises:
        MrFlowError: One of them is no image, or their shapes differ.
    """
    if picture is None:
        return None
    found = rows(_read(picture, "inpaint_image", warn), "inpaint_image")
    masked = rows(_grey(_read(_counted(mask), "mask_image", warn)), "mask_image")
    if any(0.0 < float(each.max()) < 1.5 / 255 for each in masked):
        warn("mask_image has 1 of 255 as its largest value, which masks nothing; multiply it by 255, or give bool.")
    height, width = found.shape[-2:]
    if masked.shape[-2:] != found.shape[-2:]:
        high, wide = masked.shape[-2:]
        if abs(wide * height / (high * width) - 1.0) > _SHAPE_SLACK:
            raise MrFlowError(
                f"mask_image is {wide}x{high} and inpaint_image {width}x{height}, which is another shape; give a mask "
                "of the picture's size."
            )
        masked = functional.interpolate(masked, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
    if not bool(masked.any()):
        warn("mask_image is black, which masks nothing: the picture comes back as it was given.")
    return Reading(found, masked)


@dataclass(frozen=True, eq=False)
class Inpainting:
    """A picture and its mask at the size of the final image.

    Attributes:
        pictures: Both on the model's grid, for the stages.
        colour: (N, 3, H, W), float32 in [0, 1]: the picture at the size that was asked for, as it was given.
        alpha: (N, 1, H, W); None where the picture is opaque.
        mask: (M, 1, H, W).
    """

    pictures: Pictures
    colour: Tensor
    alpha: Tensor | None
    mask: Tensor

    def finished(self, images: Tensor, rejected: tuple[bool, ...] | None) -> Tensor:
        """A run's images with the picture outside the mask and its alpha.

        Args:
            images: (B, 3, h, w): of the size that was asked for, or of an earlier stage.
            rejected: Which a safety checker made black; those stay.

        Returns:
            (B, 3 or 4, h, w). At the size that was asked for, pixels that the mask leaves are the given ones exactly.
        """
        whole = images.shape[-2:] == self.colour.shape[-2:]
        kept = Pictures(picture=self.colour, mask=self.mask) if whole else self.pictures
        made = kept.composed(images)
        if rejected is not None:
            black = torch.tensor(rejected, device=images.device).view(-1, 1, 1, 1)
            made = torch.where(black, images, made)
        if self.alpha is None:
            return made
        size = (int(images.shape[-2]), int(images.shape[-1]))
        alpha = self.alpha if whole else functional.interpolate(self.alpha, size, mode="bilinear", antialias=True)
        return torch.cat([made, alpha.to(made).expand(len(made), -1, -1, -1)], dim=1)


def inpainting_of(reading: Reading, plan: StagedPlan, warn: Callable[[str], object]) -> Inpainting:
    """Picture and mask for a plan: cropped at the centre where the shape differs, edges repeated on the grid.

    Args:
        reading: As they were given.
        plan: Of the run.
        warn: Receives a sentence where the picture is cropped.

    Returns:
        Both at the plan's sizes.
    """
    rows, columns = plan.asked_area
    size = (columns.stop - columns.start, rows.stop - rows.start)
    width, height = int(reading.picture.shape[-1]), int(reading.picture.shape[-2])
    crop = fitting_note(f"The picture of {width}x{height}", (width, height), size)
    if crop is not None:
        warn(crop)
    filled, alpha = split_alpha(reading.picture)
    given = reading.picture if alpha is None else reading.picture[:, :-1]
    colour, filled = (_fitted(each, *size) for each in (given.expand(-1, 3, -1, -1), filled))
    mask = _fitted(reading.mask, *size)
    edges = (columns.start, plan.width - columns.stop, rows.start, plan.height - rows.stop)
    on_grid = functools.partial(functional.pad, pad=edges, mode="replicate")
    sizes = tuple((stage.width, stage.height) for stage in plan.stages)
    pictures = Pictures(picture=on_grid(filled), mask=on_grid(mask), sizes=sizes)
    return Inpainting(pictures, colour, None if alpha is None else _fitted(alpha, *size), mask)


def _fitted(images: Tensor, width: int, height: int) -> Tensor:
    """(N, C, h, w) at a size, unchanged where it has it."""
    if images.shape[-2:] == (height, width):
        return images
    if images.shape[1] == 3:
        return upscale_to(images, width, height)
    wide, high, left, top = fit_box(int(images.shape[-1]), int(images.shape[-2]), width, height)
    fitted = functional.interpolate(images, (high, wide), mode="bilinear", antialias=True).clamp(0, 1)
    return fitted[..., top : top + height, left : left + width]


# -------------------------------------------------------------------------------------------------------------- helpers


def _read(given: Any, name: str, warn: Callable[[str], object]) -> Tensor:
    """`from_pictures` with the argument's own name in its refusals and warnings."""
    try:
        return from_pictures(given, lambda sentence: warn(sentence.replace("The image", name, 1)))
    except MrFlowError as error:
        raise MrFlowError(str(error).replace("image", name, 1)) from error


def _counted(mask: Any) -> Any:
    """A mask of truth values, or a tensor (H, W), in a form that images have."""
    if isinstance(mask, (list, tuple)):
        return [_counted(each) for each in cast("list[Any]", mask)]
    if isinstance(mask, Tensor):
        mask = mask.float() if mask.dtype == torch.bool else mask
        return mask[None] if mask.ndim == 2 else mask
    return mask.astype("float32") if str(getattr(mask, "dtype", "")) == "bool" else mask


def _grey(images: Tensor) -> Tensor:
    """(N, C, H, W) as brightness (N, 1, H, W); transparent is black."""
    colour, alpha = (images, None) if images.shape[1] in (1, 3) else (images[:, :-1], images[:, -1:])
    grey = colour[:, :1]
    if colour.shape[1] == 3 and not (torch.equal(grey, colour[:, 1:2]) and torch.equal(grey, colour[:, 2:])):
        grey = (colour * colour.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True).clamp(0, 1)
    return grey if alpha is None else grey * alpha
