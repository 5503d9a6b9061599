"""Which layout a pipeline has: read from its class, its components and their configurations."""

from __future__ import annotations

import re
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

from mrflow_sched._runtime.errors import MrFlowError, shown
from mrflow_sched.engines.diffusers.layouts import per_family
from mrflow_sched.engines.diffusers.layouts.base import Layout, parameter_names, parameters
from mrflow_sched.engines.diffusers.layouts.generic import follows_its_own, generic_layout
from mrflow_sched.engines.diffusers.layouts.modular import modular_layout
from mrflow_sched.engines.diffusers.layouts.numbers import check_numbers
from mrflow_sched.engines.diffusers.layouts.pictures import edits, image_is_optional, own_size
from mrflow_sched.engines.diffusers.layouts.shift import is_flow, renoise_of, ve_rule
from mrflow_sched.engines.diffusers.modular_view import ModularView, as_pipeline
from mrflow_sched.plan.families import FAMILIES, Family, Prediction, ShiftRule, family_of_pipeline, get_family
from mrflow_sched.plan.scheduler_config import edm_levels

__all__ = ["find_layout"]

_LARGEST_FACTOR = 256
_STARTS_FROM_AN_IMAGE = frozenset({"strength", "mask_image", "control_mask"})
"""Arguments of image-to-image calls, and of inpainting ones without a picture."""
_IMAGE_WORDS = ("Edit", "Inpaint", "Img2Img", "ImageToImage")

_VIDEO_FROM_PICTURES = re.compile(r"(Image|Video)(To|2)Video|[IV]2V|VACE|Animate|LTX\w*(Condition|InContext)|Framepack")
"""Names of classes that make a video from something else than text."""


def find_layout(pipe: Any, family: str | None = None) -> Layout:
    """The layout of a loaded diffusers text-to-image pipeline.

    The shift rule is that of the pipeline's own scheduler configuration; sizes are those of its VAE and network.

    Args:
        pipe: The pipeline.
        family: Name of its family, where you know better than its class and configuration.

    Returns:
        The layout.

    Raises:
        MrFlowError: It is no such pipeline, lacks a component, has numbers that no model has, or a scheduler that no
            plan can follow.
    """
    pipe = as_pipeline(pipe)
    modular = isinstance(pipe, ModularView)
    _check_pipeline(pipe)
    check_numbers(pipe)
    family = family or pipe.config.get("_mrflow_family")
    told = family_of_pipeline(pipe)
    if told is None or told.pipeline is None:
        if not is_flow(pipe.scheduler):
            raise MrFlowError(
                f"pipe is {type(pipe).__name__} with {type(pipe.scheduler).__name__}, which is not a flow scheduler; "
                "use a flow model, or StableDiffusionPipeline or StableDiffusionXLPipeline with a model of theirs."
            )
        if modular:
            raise MrFlowError(
                f"pipe is {type(pipe).__name__}, a modular pipeline of no known family; give the model's classic "
                "pipeline, or ask for it to be added."
            )
        return generic_layout(pipe, family)
    found = told if family is None else _named(pipe, family)
    info = found.pipeline or told.pipeline
    layout: type[Layout] = getattr(per_family, info.layout)
    experimental, flow = told.prediction != "flow", is_flow(pipe.scheduler)
    if experimental and (not flow or edm_levels(dict(pipe.scheduler.config)) is not None):
        rule = ve_rule(pipe.scheduler, found.shift)
        # A flow that its pipeline counts in sigma_ve has the same states in another scale: nothing is approximated.
        own = layout(pipe, _measured(pipe, replace(found, prediction=_prediction(pipe)), layout, rule), not flow)
        return modular_layout(layout, own) if modular else own
    if not is_flow(pipe.scheduler):
        raise MrFlowError(
            f"pipe.scheduler is {type(pipe.scheduler).__name__}, which is not a flow scheduler; {type(pipe).__name__} "
            f"needs one such as FlowMatchEulerDiscreteScheduler."
        )
    rule = layout.stage_one_rule(pipe, found)
    measured = _measured(pipe, replace(found, prediction="flow"), layout, rule)
    own = layout(pipe, measured, experimental or info.experimental)
    if modular:
        return modular_layout(layout, own)
    return own if not _overrides(cast("Any", type(pipe))) or follows_its_own(own) else generic_layout(pipe, family)


def _overrides(kind: type[Any]) -> bool:
    """Whether a class overrides what its class of diffusers does, apart from how it is built and reads text."""
    own: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith("diffusers."):
            return any(callable(getattr(base, name, None)) for name in own - {"__init__", "encode_prompt"})
        own |= vars(base).keys()
    return False


def _named(pipe: Any, name: str) -> Family:
    """The family called `name`, if the pipeline is of a class that it knows. Raises MrFlowError otherwise."""
    found = get_family(name)
    kinds = [base.__name__ for base in type(pipe).__mro__]
    if found.pipeline is None or not any(re.fullmatch(found.pipeline.classes, kind) for kind in kinds):
        raise MrFlowError(
            f"family is {name!r}, but {kinds[0]} is not one of its pipelines; leave family out, or name the right one."
        )
    return found


def _prediction(pipe: Any) -> Prediction:
    """What a U-Net of a variance-exploding model predicts, by its scheduler."""
    said = pipe.scheduler.config.get("prediction_type", "epsilon")
    edm = edm_levels(dict(pipe.scheduler.config)) is not None and not is_flow(pipe.scheduler)
    kinds: dict[str, Prediction] = {"epsilon": "edm" if edm else "epsilon", "v_prediction": "v"}
    if said not in kinds:
        raise MrFlowError(
            f"pipe.scheduler has prediction_type={said!r}; staged sampling supports {', '.join(kinds)} and flow."
        )
    return kinds[said]


def _measured(pipe: Any, family: Family, layout: type[Layout], rule: ShiftRule) -> Family:
    """The family with the numbers of this very pipeline where they differ from the table's."""
    factor, channels = layout.latent_numbers(pipe, family)
    if not 1 <= factor <= _LARGEST_FACTOR:
        raise MrFlowError(
            f"pipe.vae makes latents of 1/{shown(factor)} of a side, which no model does; download the model again."
        )
    tokens_a_side = family.grid // (family.vae_factor * family.patch)
    reads = family.pipeline is not None and family.pipeline.reads_patch
    patch = int(pipe.transformer.config.patch_size) if reads else family.patch
    grid = factor * patch * tokens_a_side
    renoise = renoise_of(getattr(pipe, "scheduler", None))
    numbers: dict[str, Any] = {"vae_factor": factor, "patch": patch, "grid": grid, "latent_channels": channels}
    own = replace(family, shift=rule, renoise=renoise, **numbers)
    if own == family:
        return family
    sources = {
        **family.sources,
        "shift": "pipe.scheduler.config",
        "vae_factor": "pipe.vae",
        "latent_channels": "pipe.vae.config",
    }
    return replace(own, sources=MappingProxyType(sources))


def check_from_text(kind: type[Any]) -> None:
    """Refuse a pipeline class that starts from an image, unless it paints a mask or edits a reference.

    Args:
        kind: A pipeline's class.

    Raises:
        MrFlowError: It does.
    """
    name, known = kind.__name__, parameters(kind.__call__, kind)
    asked = bool(known.keys() & _STARTS_FROM_AN_IMAGE) and not image_is_optional(kind)
    if not edits(kind) and (asked or any(word in name for word in _IMAGE_WORDS)):
        raise MrFlowError(f"pipe is {name}, which starts from an image; give the family's text-to-image pipeline.")


def _check_video(pipe: Any) -> None:
    """Refuse a pipeline of videos that makes no picture from text alone. Raises MrFlowError."""
    name = type(pipe).__name__
    if _VIDEO_FROM_PICTURES.search(name):
        raise MrFlowError(
            f"pipe is {name}, which makes a video from pictures or another video; give the model's pipeline that makes "
            "one from text."
        )
    if getattr(pipe, "audio_vae", None) is not None:
        raise MrFlowError(f"pipe is {name}, which makes sound with its video; stages cannot be run with it.")


def _check_pipeline(pipe: Any) -> None:
    name = type(pipe).__name__
    if not callable(pipe) or not hasattr(pipe, "components"):
        raise MrFlowError(f"pipe is {name}; give a loaded diffusers text-to-image pipeline.")
    _check_video(pipe)
    needed = (("scheduler",), ("transformer", "unet"))
    for parts in needed if _on_pixels(type(pipe)) else (("vae",), *needed):
        if any(getattr(pipe, part, None) is not None for part in parts):
            continue
        taken = parameter_names(type(pipe).__init__) & set(parts)
        advice = "load it with all of its components" if taken else "pipelines of its kind cannot be run in stages"
        raise MrFlowError(f"pipe is {name} without {' or '.join(parts)}; {advice}.")
    for part in sorted(parameter_names(type(pipe).__init__) & {"controlnet", "adapter"}):
        if getattr(pipe, part, None) is None:
            raise MrFlowError(f"pipe is {name} without {part}; load it with one, or give the pipeline that has none.")
    known = parameter_names(pipe.__call__)
    check_from_text(type(pipe))
    if callable(getattr(pipe, "prepare_latents", None)):
        known |= {"latents"}  # `Layout.gives_state`
    # LongCat's editing pipeline takes no size, but a size can be had of it.
    sized = () if edits(type(pipe)) and own_size(pipe) is not None else ("width", "height")
    for argument in ("latents", *sized, "prompt", "num_inference_steps"):
        if argument not in known:
            raise MrFlowError(f"pipe is {name}, whose call takes no {argument}; stages cannot be run with it.")


def _on_pixels(kind: type[Any]) -> bool:
    """Whether a family says of a pipeline's class that pixels are its latents."""
    names = [base.__name__ for base in kind.__mro__]
    infos = [family.pipeline for family in FAMILIES.values() if family.pipeline is not None]
    found = [info for info in infos if any(re.fullmatch(info.classes, name) for name in names)]
    return any(getattr(per_family, info.layout).pixels for info in found)
