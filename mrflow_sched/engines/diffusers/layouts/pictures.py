"""Which arguments of a pipeline's call take pictures that it edits, read from the call itself."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from mrflow_sched.engines.diffusers.layouts.base import parameter_names, parameters

__all__ = [
    "PictureArguments",
    "edits",
    "edits_as_classic",
    "image_is_optional",
    "is_modular",
    "own_size",
    "picture_arguments",
]

_ONE_REFERENCE = (
    r"FluxKontext(Inpaint)?Pipeline|QwenImageEditPipeline|LongCatImageEditPipeline|JoyImageEditPipeline|"
    r"Flux2KleinInpaintPipeline|Kandinsky5I2IPipeline"
)
"""Classes that take one reference: a list means one for each image of a batch there."""
_ONE_IMAGE = r"QwenImageEdit(Plus|Inpaint)?Pipeline|LongCatImageEditPipeline|JoyImageEdit(Plus)?Pipeline"
"""Classes that make one image at a time, by their own word or as they read one prompt only."""


@dataclass(frozen=True)
class PictureArguments:
    """The arguments of a pipeline's call that take pictures, as far as they are edited; "" for one that it lacks.

    Attributes:
        reference: What its network sees beside the image.
        needed: Whether it cannot be called without one.
        several: Whether it takes a list of references for one image.
        lists: Whether it takes such a list for each prompt.
        read: Whether its text encoder sees the references, or the picture, too.
        singly: Whether it makes one image at a time.
        picture: What is painted anew where the mask says so.
        mask: The mask.
        noised: Whether its loop starts from the picture with noise (it has a `strength`), so that it draws that noise
            itself.
    """

    reference: str = ""
    needed: bool = False
    several: bool = False
    lists: bool = False
    read: bool = False
    singly: bool = False
    picture: str = ""
    mask: str = ""
    noised: bool = False

    @property
    def inpaints(self) -> bool:
        """Whether a picture and a mask are what it starts from."""
        return bool(self.mask)


def picture_arguments(pipe: Any) -> PictureArguments:
    """Which pictures a pipeline's call takes to edit them.

    Args:
        pipe: The pipeline.

    Returns:
        Names of its arguments, and how it takes them.
    """
    return _of_class(pipe.__class__)


def _of_class(kind: Any) -> PictureArguments:
    names, name = parameters(kind.__call__, kind).keys(), kind.__name__
    noised, picture, mask = "strength" in names, "", ""
    if image_is_optional(kind):
        noised = False
    elif {"image", "mask_image"} <= names:
        picture, mask = "image", "mask_image"
    elif {"control_image", "control_mask"} <= names:
        picture, mask = "control_image", "control_mask"
    reference = next((each for each in ("input_images", "image_reference") if each in names), "")
    controlled = {"controlnet", "adapter"} & parameter_names(kind.__init__)
    if not (reference or mask or noised or controlled):
        reference = next((each for each in ("image", "images") if each in names), "")
    encoder = getattr(kind, "encode_prompt", None)
    read = frozenset[str]() if encoder is None else parameter_names(encoder) & {"image", "images"}
    return PictureArguments(
        reference=reference,
        needed=bool(reference) and not mask and "Edit" in name,
        several=re.fullmatch(_ONE_REFERENCE, name) is None,
        lists=name == "OmniGenPipeline",
        read=bool(read) or hasattr(kind, "encode_prompt_multiple_images"),
        singly=re.fullmatch(_ONE_IMAGE, name) is not None,
        picture=picture,
        mask=mask,
        noised=noised and bool(mask),
    )


def edits(kind: type[Any]) -> bool:
    """Whether a pipeline class edits pictures by a mask or a reference.

    Args:
        kind: The pipeline's class.

    Returns:
        False for text-to-image and image-to-image classes.
    """
    found = _of_class(kind)
    return found.inpaints or found.needed


def is_modular(pipe: Any) -> bool:
    """Whether a pipeline is one of diffusers' modular ones.

    Args:
        pipe: The pipeline.

    Returns:
        False for classic pipelines.
    """
    return any(base.__name__ == "ModularPipeline" for base in type(pipe).__mro__)


def edits_as_classic(pipe: Any) -> bool:
    """Whether a modular pipeline's classic counterpart takes its image as a reference.

    Args:
        pipe: The pipeline.

    Returns:
        False where there is none, and for classic pipelines.
    """
    name = type(pipe).__name__.replace("ModularPipeline", "Pipeline")
    classic = getattr(sys.modules.get("diffusers"), name, None) if is_modular(pipe) else None
    return classic is not None and _of_class(classic).reference == "image"


def image_is_optional(kind: type[Any]) -> bool:
    """Whether a class that can start from an image can do without.

    diffusers has a class for each purpose, and the image that it needs has a default of None all the same; community
    pipelines are often for several purposes.

    Args:
        kind: The pipeline's class.

    Returns:
        True where its call needs no image.
    """
    known = parameters(kind.__call__, kind)
    owners = [base for base in kind.__mro__ if "__call__" in vars(base) and not _passes_on(base)]
    image = known.get("image", known.get("init_image"))
    if image is None or not owners:  # a modular pipeline's call names nothing
        return False
    return image.default is None and not owners[0].__module__.startswith("diffusers.pipelines.")


def _passes_on(kind: type[Any]) -> bool:
    """Whether a class's call takes anything and names no image itself."""
    own = inspect.signature(vars(kind)["__call__"]).parameters
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in own.values())
    return anything and not own.keys() & {"image", "init_image"}


def own_size(pipe: Any) -> Callable[[float, float], Any] | None:
    """The function by which a pipeline's call chooses sizes of its own.

    Args:
        pipe: The pipeline.

    Returns:
        (area, ratio) -> (width, height, ...); None where it has none.
    """
    return cast("types.FunctionType", inspect.unwrap(type(pipe).__call__)).__globals__.get("calculate_dimensions")
