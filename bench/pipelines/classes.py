"""Which pipeline classes the installed diffusers has, and what each makes from what, read from the classes."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
from dataclasses import dataclass
from typing import Any

from bench.tiny.parts import diffusers
from mrflow_sched.engines.diffusers.layouts.base import parameters


@dataclass(frozen=True)
class PipelineClass:
    """A pipeline class of diffusers.

    Attributes:
        kind: The class.
        makes: "text-to-image", "editing", "inpainting", "image-to-image", "video", "audio" or "other".
        flow: Whether its network predicts flow.
    """

    kind: Any
    makes: str
    flow: bool

    @property
    def name(self) -> str:
        """Name of the class."""
        return self.kind.__name__


TRIED = ("text-to-image", "editing", "inpainting", "image-to-image")
"""What of `PipelineClass.makes` is swept whole; of the others only what `bench.tiny` has."""

NOT_TEXT_TO_IMAGE = {
    "ShapEPipeline": "renders a 3-D object",
}
"""Classes that the rule takes for text-to-image, and why they are not."""

_FLOW_BY_ANOTHER_SAMPLER = {
    "SanaPipeline": "flow by DPM-Solver++",
    "SanaControlNetPipeline": "flow by DPM-Solver++",
    "SanaSprintPipeline": "flow in angles, by SCM",
}
"""Classes whose scheduler's annotation does not say that they are flow, and are."""


@functools.cache
def pipeline_classes() -> tuple[PipelineClass, ...]:
    """Every pipeline class of the installed diffusers that can be called and is not deprecated there.

    Returns:
        By name. Modular pipelines have no parts in their signature and are left out, as are classes that need a package
        that is not installed (`unavailable`).
    """
    kinds = [kind for kind in _named() if "__call__" in dir(kind) and "ModularPipeline" not in kind.__name__]
    return tuple(
        PipelineClass(kind, makes_of(kind), is_flow_class(kind))
        for kind in kinds
        if not _is_deprecated(kind) and kind.__name__ != "DiffusionPipeline"
    )


def unavailable() -> dict[str, list[str]]:
    """The classes that need a package that is not installed.

    Returns:
        The packages by the name of the class.
    """
    wanted = {kind.__name__: list(kind._backends) for kind in _named() if hasattr(kind, "_backends")}
    return {name: [each for each in packages if not _installed(each)] for name, packages in wanted.items()}


def _installed(package: str) -> bool:
    module = {"opencv": "cv2"}.get(package, package)
    return importlib.util.find_spec(module) is not None


def _named() -> list[Any]:
    library = diffusers()
    found = [getattr(library, name) for name in sorted(dir(library)) if re.fullmatch(r"(?!Flax|Onnx)\w+Pipeline", name)]
    return [kind for kind in found if isinstance(kind, type)]


def _is_deprecated(kind: Any) -> bool:
    return ".deprecated" in kind.__module__ or any("Deprecated" in base.__name__ for base in kind.__mro__)


def is_flow_class(kind: Any) -> bool:
    """Whether a class's network predicts flow: its scheduler says so, or it is known.

    Args:
        kind: A pipeline class.
    """
    found = inspect.signature(kind.__init__).parameters.get("scheduler")
    return (found is not None and "FlowM" in str(found.annotation)) or kind.__name__ in _FLOW_BY_ANOTHER_SAMPLER


def makes_of(kind: Any) -> str:
    """What a class makes from what.

    Args:
        kind: A pipeline class.

    Returns:
        A word of `PipelineClass.makes`.
    """
    known = parameters(kind.__call__)
    name, results = kind.__name__, _results(kind)
    needed = {key for key, each in known.items() if each.default is each.empty} - {"self", "prompt"}
    if results & {"audio", "audios"}:
        return "audio" if not results & {"frames", "video"} else "video"
    if results & {"frames", "video"} or "num_frames" in known:
        return "video"
    if not results & {"image", "images"} or "prompt" not in known or name in NOT_TEXT_TO_IMAGE:
        return "other"
    if {"mask_image", "control_mask"} & set(known):
        return "inpainting"
    if "Edit" in name or "Pix2Pix" in name or "Layered" in name:
        return "editing"
    controlled = "ControlNet" in name or "Adapter" in name or "Control" in name
    if (
        "strength" in known
        or re.search("Upscale|Refiner|SuperResolution", name)
        or ("image" in needed and not controlled)
    ):
        return "image-to-image"
    return "other" if needed else "text-to-image"


def _results(kind: Any) -> set[str]:
    """Fields of what the pipeline's call returns."""
    from diffusers.utils import BaseOutput

    module = importlib.import_module(kind.__module__)
    names = set(re.findall(r"\b\w*PipelineOutput\b", inspect.getsource(kind)))
    found = [getattr(module, name, None) for name in names]
    return {
        field
        for each in found
        if isinstance(each, type) and issubclass(each, BaseOutput)
        for field in inspect.signature(each).parameters
    }
