"""Which layout a pipeline has: read from its class, its components and their configurations."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.layouts import known
from mrflow_sched.engines.diffusers.layouts.base import Layout, takes
from mrflow_sched.engines.diffusers.layouts.generic import generic_layout
from mrflow_sched.engines.diffusers.layouts.shift import is_flow, shift_rule
from mrflow_sched.plan.families import Family, Prediction, ShiftRule, get_family

__all__ = ["find_layout"]


@dataclass(frozen=True)
class _Kind:
    """One kind of pipeline: `classes` matches the names of its text-to-image classes."""

    classes: str
    layout: type[Layout]
    family: Callable[[Any], str]
    # Whether the pipeline hands its scheduler an even list of levels; the scheduler makes its own otherwise.
    even_list: bool = True


def _flux1(pipe: Any) -> str:
    if pipe.transformer.config.guidance_embeds:
        return "demo" if 2 ** (len(pipe.vae.config.block_out_channels) - 1) == 4 else "flux1-dev"
    return "flux1-schnell"


def _sd3(pipe: Any) -> str:
    # 24 layers are 3 and 3.5 medium, 38 are 3.5 large; 3.5 has normalised queries and keys.
    config = pipe.transformer.config
    return "sd35" if config.num_layers >= 38 else "sd3"


def _z_image(pipe: Any) -> str:
    # Same network, same class; the released schedulers differ: shift 3 is Turbo, 6 the base model.
    return "z-image-turbo" if float(pipe.scheduler.config.get("shift") or 1.0) <= 3.0 else "z-image"


def _klein(pipe: Any) -> str:
    return "flux2-klein" if pipe.config.get("is_distilled") else "flux2-klein-base"


def _hunyuan(pipe: Any) -> str:
    return "hunyuan-image-distilled" if pipe.transformer.config.guidance_embeds else "hunyuan-image"


def _hidream(pipe: Any) -> str:
    # The distilled ones are released with the scheduler of consistency models.
    return "hidream-dev" if "LCM" in type(pipe.scheduler).__name__ else "hidream"


def _named(name: str) -> Callable[[Any], str]:
    return lambda pipe: name


_KINDS = (
    _Kind(r"Flux(ControlNet|Control|Kontext)?Pipeline", known.FluxLayout, _flux1),
    _Kind(r"Flux2Pipeline", known.Flux2Layout, _named("flux2-dev")),
    _Kind(r"Flux2Klein(KV)?Pipeline", known.Flux2KleinLayout, _klein),
    _Kind(r"QwenImage(ControlNet)?Pipeline", known.QwenImageLayout, _named("qwen-image")),
    _Kind(r"StableDiffusion3(ControlNet|PAG)?Pipeline", known.Sd3Layout, _sd3, even_list=False),
    _Kind(r"ZImage(ControlNet)?Pipeline", known.ZImageLayout, _z_image),
    _Kind(r"ChromaPipeline", known.ChromaLayout, _named("chroma")),
    _Kind(r"Lumina(2|2Text2Img)Pipeline", known.Lumina2Layout, _named("lumina2")),
    _Kind(r"AuraFlowPipeline", known.AuraFlowLayout, _named("auraflow"), even_list=False),
    _Kind(r"HunyuanImagePipeline", known.HunyuanImageLayout, _hunyuan),
    _Kind(r"HiDreamImagePipeline", known.HiDreamLayout, _hidream, even_list=False),
    _Kind(r"Sana(PAG|ControlNet)?Pipeline", known.SanaLayout, _named("sana")),
    _Kind(
        r"StableDiffusionXL(ControlNet|PAG|ControlNetPAG|Adapter)?Pipeline",
        known.StableDiffusionXLLayout,
        _named("sdxl"),
    ),
    _Kind(
        r"StableDiffusion(ControlNet|PAG|ControlNetPAG|Adapter)?Pipeline", known.StableDiffusionLayout, _named("sd15")
    ),
)

_UNETS = ("sdxl", "sd15")


def find_layout(pipe: Any, family: str | None = None) -> Layout:
    """The `Layout` of a loaded diffusers text-to-image pipeline; `family` names the family where you know better.

    The shift rule is that of the pipeline's own scheduler configuration; sizes are those of its VAE and network.
    Raises ValueError, one sentence, for what is no such pipeline or lacks something.
    """
    _check_pipeline(pipe)
    family = family or pipe.config.get("_mrflow_family")
    kind = _kind_of(pipe)
    if kind is None:
        if not is_flow(pipe.scheduler):
            raise MrFlowError(
                f"pipe is {type(pipe).__name__} with {type(pipe.scheduler).__name__}, which is no flow; use a flow "
                f"model, Stable Diffusion 1.5 or XL."
            )
        return generic_layout(pipe, family)
    found = get_family(family or kind.family(pipe))
    if issubclass(kind.layout, known.StableDiffusionLayout) and not is_flow(pipe.scheduler):
        return kind.layout(pipe, _measured(pipe, replace(found, prediction=_prediction(pipe)), found.shift), True)
    if not is_flow(pipe.scheduler):
        raise MrFlowError(
            f"pipe.scheduler is {type(pipe.scheduler).__name__}, which samples no flow; {type(pipe).__name__} needs a "
            f"flow scheduler such as FlowMatchEulerDiscreteScheduler."
        )
    rule = shift_rule(pipe.scheduler, found.shift, even_list=kind.even_list)
    return kind.layout(pipe, _measured(pipe, replace(found, prediction="flow"), rule), found.name in _UNETS)


def _kind_of(pipe: Any) -> _Kind | None:
    for base in type(pipe).__mro__:
        for kind in _KINDS:
            if re.fullmatch(kind.classes, base.__name__):
                return kind
    return None


def _prediction(pipe: Any) -> Prediction:
    """What a U-Net of variance-exploding noise predicts, as its scheduler knows."""
    said = pipe.scheduler.config.get("prediction_type", "epsilon")
    kinds: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}
    if said not in kinds:
        raise MrFlowError(
            f"pipe.scheduler has prediction_type={said!r}; stages can be run for {' and '.join(kinds)} or a flow."
        )
    return kinds[said]


def _measured(pipe: Any, family: Family, rule: ShiftRule) -> Family:
    """The family with the numbers of this very pipeline where they differ from the table's."""
    config = pipe.vae.config
    # Where the VAE tells by itself: FluxPipeline's number was twice as large up to diffusers 0.31.
    plain = type(pipe.vae).__name__ == "AutoencoderKL"
    factor = 2 ** (len(config.block_out_channels) - 1) if plain else int(pipe.vae_scale_factor)
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


def _check_pipeline(pipe: Any) -> None:
    name = type(pipe).__name__
    if not callable(pipe) or not hasattr(pipe, "components"):
        raise MrFlowError(f"pipe is {name}; give a loaded diffusers text-to-image pipeline.")
    for part in ("vae", "scheduler"):
        if getattr(pipe, part, None) is None:
            raise MrFlowError(f"pipe is {name} without {part}; load it with all of its components.")
    if getattr(pipe, "transformer", None) is None and getattr(pipe, "unet", None) is None:
        raise MrFlowError(f"pipe is {name} without transformer or unet; load it with all of its components.")
    known = takes(pipe.__call__)
    if known & {"strength", "mask_image"} or "Edit" in name:
        raise MrFlowError(f"pipe is {name}, which starts from an image; give the family's text-to-image pipeline.")
    for argument in ("latents", "width", "height", "prompt", "num_inference_steps"):
        if argument not in known:
            raise MrFlowError(f"pipe is {name}, whose call takes no {argument}; stages cannot be run with it.")
