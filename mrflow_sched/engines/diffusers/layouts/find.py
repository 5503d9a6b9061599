"""Which layout a pipeline has: read from its class, its components and their configurations."""

from __future__ import annotations

import re
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError, shown
from mrflow_sched.engines.diffusers.layouts import per_family
from mrflow_sched.engines.diffusers.layouts.base import Layout, parameter_names
from mrflow_sched.engines.diffusers.layouts.generic import generic_layout
from mrflow_sched.engines.diffusers.layouts.numbers import check_numbers
from mrflow_sched.engines.diffusers.layouts.shift import is_flow, shift_rule, ve_rule
from mrflow_sched.plan.families import Family, Prediction, ShiftRule, family_of_pipeline, get_family

__all__ = ["find_layout"]

_LARGEST_FACTOR = 256
_STARTS_FROM_AN_IMAGE = frozenset({"strength", "mask_image", "control_mask"})
"""Arguments of image-to-image and inpainting calls, ControlNet's among them."""


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
        return generic_layout(pipe, family)
    found = told if family is None else _named(pipe, family)
    info = found.pipeline or told.pipeline
    layout: type[Layout] = getattr(per_family, info.layout)
    experimental = told.prediction != "flow"
    if experimental and not is_flow(pipe.scheduler):
        rule = ve_rule(pipe.scheduler, found.shift)
        return layout(pipe, _measured(pipe, replace(found, prediction=_prediction(pipe)), rule), True)
    if not is_flow(pipe.scheduler):
        raise MrFlowError(
            f"pipe.scheduler is {type(pipe.scheduler).__name__}, which is not a flow scheduler; {type(pipe).__name__} "
            f"needs one such as FlowMatchEulerDiscreteScheduler."
        )
    rule = shift_rule(pipe.scheduler, found.shift, even_list=info.even_list)
    return layout(pipe, _measured(pipe, replace(found, prediction="flow"), rule), experimental)


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
    edm = pipe.scheduler.config.get("sigma_data") is not None
    kinds: dict[str, Prediction] = {"epsilon": "edm" if edm else "epsilon", "v_prediction": "v"}
    if said not in kinds:
        raise MrFlowError(
            f"pipe.scheduler has prediction_type={said!r}; staged sampling supports {', '.join(kinds)} and flow."
        )
    return kinds[said]


def _measured(pipe: Any, family: Family, rule: ShiftRule) -> Family:
    """The family with the numbers of this very pipeline where they differ from the table's."""
    config = pipe.vae.config
    # Where the VAE tells by itself: FluxPipeline's number was twice as large up to diffusers 0.31.
    plain = type(pipe.vae).__name__ == "AutoencoderKL"
    factor = 2 ** (len(config.block_out_channels) - 1) if plain else int(pipe.vae_scale_factor)
    if not 1 <= factor <= _LARGEST_FACTOR:
        raise MrFlowError(
            f"pipe.vae makes latents of 1/{shown(factor)} of a side, which no model does; download the model again."
        )
    channels = int(getattr(config, "latent_channels", None) or getattr(config, "z_dim", None) or family.latent_channels)
    own = replace(family, shift=rule, vae_factor=factor, grid=factor * family.patch, latent_channels=channels)
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
    """Refuse a pipeline class that starts from an image.

    Args:
        kind: A pipeline's class.

    Raises:
        MrFlowError: It does.
    """
    name, known = kind.__name__, parameter_names(kind.__call__)
    if known & _STARTS_FROM_AN_IMAGE or "Edit" in name or "Inpaint" in name:
        raise MrFlowError(f"pipe is {name}, which starts from an image; give the family's text-to-image pipeline.")


def _check_pipeline(pipe: Any) -> None:
    name = type(pipe).__name__
    if not callable(pipe) or not hasattr(pipe, "components"):
        raise MrFlowError(f"pipe is {name}; give a loaded diffusers text-to-image pipeline.")
    for parts in (("vae",), ("scheduler",), ("transformer", "unet")):
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
    for argument in ("latents", "width", "height", "prompt", "num_inference_steps"):
        if argument not in known:
            raise MrFlowError(f"pipe is {name}, whose call takes no {argument}; stages cannot be run with it.")
