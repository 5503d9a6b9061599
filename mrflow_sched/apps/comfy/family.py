"""What model is loaded, as far as ComfyUI's objects tell."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError, shown
from mrflow_sched.apps.comfy import host
from mrflow_sched.apps.comfy.planned import Fit, Planned, given, planned, size_like
from mrflow_sched.plan.families import (
    Family,
    HostFacts,
    families_alike,
    family_of_host,
    get_family,
    unknown_flow,
)
from mrflow_sched.sampling.noise import ve_to_sigma

__all__ = ["AUTO", "UNKNOWN", "first_sigmas", "fit_of", "mixes_as_flow", "model_family", "model_mu", "planned_for"]

AUTO = "auto"
"""Find the family out."""
UNKNOWN = "flow"
"""Any flow model: its shift and sizes are read from it, its presets are assumed."""

# Names of ComfyUI's configurations, which their classes have.
_VIDEOS = re.compile(
    r"WAN|Wan|HunyuanVideo|LTX|GenmoMochi|Cosmos(?!T2IPredict2)|CogVideo|MiniMaxH3|SeedVR|Kandinsky5$|SVD"
)
_NO_PICTURES = re.compile(
    r"Hunyuan3D|Trellis|TripoSplat|Zero123|Audio|ACEStep|Music|RT_DETR|DepthAnything|SAM\d|SUPIR|PiD|Refiner"
)
_FLOWS = ("FLOW", "FLUX", "FLOW_COSMOS")
_DISCRETE = ("EPS", "V_PREDICTION")
_PLAIN = "use ComfyUI's own sampling nodes for it"


def fit_of(model: Any) -> Fit:
    """What a plan for a model needs.

    Args:
        model: A MODEL.

    Returns:
        Its facts.
    """
    channels = int(host.latent_format(model).latent_channels)
    return Fit(type(model.model.model_config).__name__, channels, host.latent_ratio(model))


def mixes_as_flow(model: Any) -> bool:
    """Whether a model's noisy latents are (1 - sigma) image + sigma noise; found by mixing.

    Args:
        model: A MODEL.

    Returns:
        False where they are image + sigma noise: SD1.5, SDXL, Cosmos-Predict2.
    """
    one, none = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    share = host.model_sampling(model).noise_scaling(torch.tensor([0.5]), none, one)
    return abs(float(share.flatten()[0]) - 0.5) < 1e-3


def model_family(model: Any, asked: str = AUTO, cfg: float = 0.0) -> tuple[Family, tuple[str, ...]]:
    """The family of a loaded model.

    Args:
        model: A MODEL.
        asked: A family's name that the user chose, `AUTO` or `UNKNOWN`.
        cfg: The scale of CFG that was asked for, which tells distilled models where nothing else does; 0: none.

    Returns:
        The family, and what to tell the user of how it was found.

    Raises:
        MrFlowError: The model cannot be sampled in stages.
    """
    facts, kind = _facts(model, cfg)
    _check_kind(facts, kind, asked, host.latent_format(model).latent_dimensions)
    if asked not in (AUTO, UNKNOWN):
        return _chosen(get_family(asked), facts)
    found = family_of_host(facts) if asked == AUTO else None
    if found is not None:
        return found, _assumed(found, facts)
    if kind not in _FLOWS:
        known = family_of_host(facts) is not None
        rest = f"; choose {AUTO!r} as the family" if known else f", and neither SD1.5 nor SDXL; {_PLAIN}"
        raise MrFlowError(f"the model is {shown(facts.engine)}, which is no flow model{rest}.")
    form = host.latent_format(model)
    made = unknown_flow(
        facts.engine or "flow model",
        shift=math.exp(model_mu(model) or 0.0),
        vae_factor=host.latent_ratio(model),
        latent_channels=int(form.latent_channels),
        guidance_kind="embedded" if facts.config.get("guidance_embed") else "cfg",
    )
    return made, (
        f"The model is {shown(facts.engine)}, of which MrFlow knows no settings: its shift is taken from ComfyUI, its "
        "presets are assumed; set cfg and the steps that its makers give.",
    )


def model_mu(model: Any) -> float | None:
    """The shift that a model has in ComfyUI, with the user's ModelSampling nodes.

    Args:
        model: A MODEL.

    Returns:
        log(shift); None where it has none.
    """
    sampling = host.model_sampling(model)
    found = getattr(sampling, "shift", None)
    if not isinstance(found, (int, float)):
        return None
    # There the number is log(shift) itself.
    exponent = any(base.__name__ == "ModelSamplingFlux" for base in type(sampling).__mro__)
    return float(found) if exponent else math.log(max(float(found), 1e-6))


def first_sigmas(sigmas: Tensor, model: Any) -> tuple[float, ...]:
    """SIGMAS of a whole stage 1 as fractions of noise.

    Args:
        sigmas: As a scheduler's node gave them, for this model.
        model: The MODEL.

    Returns:
        From 1, which is pure noise, to 0.

    Raises:
        MrFlowError: They do not fall from the model's pure noise to 0.
    """
    values = [float(value) for value in sigmas.flatten()]
    top = float(host.model_sampling(model).sigma_max)
    if len(values) < 2 or not 0.999 <= values[0] / top <= 1.001 or values[-1] != 0.0:
        given_list = " ".join(f"{value:g}" for value in values[:8]) or "none"
        raise MrFlowError(
            f"low_sigmas must fall from the model's pure noise, which is sigma {top:g}, to 0, got {given_list}; take "
            "the whole list of a scheduler, with denoise 1."
        )
    fractions = values if mixes_as_flow(model) else [ve_to_sigma(value) for value in values]
    return (1.0, *fractions[1:])


def planned_for(
    model: Any,
    image: Any,
    vae: Any,
    width: int,
    height: int,
    *,
    preset: str,
    cfg: float,
    family: str,
    factor: float,
    shift: str,
    seed: int,
    low_sigmas: Tensor | None = None,
    **values: Any,
) -> Planned:
    """The plan of a run with a loaded model.

    Args:
        model: A MODEL.
        image: The image that takes the place of stage 1, (B, H, W, C), or None.
        vae: The VAE that is going to be used, or None.
        width: Pixels.
        height: Pixels.
        preset: Its name.
        cfg: The scale of CFG; 0: the family's.
        family: As in `model_family`.
        factor: Size step between stages; with `image` and no size, how many times larger. 0: the family's.
        shift: "low", "final" or "model".
        seed: Of the first image.
        low_sigmas: SIGMAS of one's own for stage 1, or None.
        **values: Further options of the plan, as the widgets have them.

    Returns:
        The plan for the sockets.

    Raises:
        MrFlowError: The model cannot be sampled in stages, the VAE is another model's, or the numbers do not fit.
    """
    found, notes = model_family(model, family, cfg)
    fit = fit_of(model)
    _check_vae(vae, fit)
    step = factor if image is None else 0.0  # no stage comes before an image
    options = {"preset": preset, "seed": seed, **given(factor=step, **values)}
    if cfg and found.guidance_kind != "embedded":
        options["guidance"] = cfg
    if low_sigmas is not None:
        options["sigmas"] = first_sigmas(low_sigmas, model)
    if shift == "model":
        options["mu"] = _own_mu(model, found)
    elif shift != "low":
        options["shift_tokens"] = shift
    size = None if image is None else (int(image.shape[2]), int(image.shape[1]))
    target = (width, height) if size is None else size_like(width, height, size, factor or found.factor)
    told = (*notes, *_sigma_notes(model), *_guidance_notes(found, cfg))
    return planned(found, target, options, fit=fit, notes=told, cfg=cfg, image=size)


# -------------------------------------------------------------------------------------------------------------- helpers


def _facts(model: Any, cfg: float) -> tuple[HostFacts, str]:
    settings, kind = model.model.model_config, _kind(model)
    config: Mapping[str, Any] = dict(getattr(settings, "unet_config", None) or {})
    facts = HostFacts(
        engine=type(settings).__name__,
        name=_file_name(model),
        flow=kind in _FLOWS,
        guidance=cfg or None,
        config=config,
        latent_channels=int(host.latent_format(model).latent_channels),
    )
    return facts, kind


def _kind(model: Any) -> str:
    return str(getattr(getattr(model.model, "model_type", None), "name", ""))


def _file_name(model: Any) -> str:
    """Name of the file that the model was loaded from, in lower case; "" where its loader does not tell."""
    made = getattr(model, "cached_patcher_init", None)
    first = made[1][0] if made and made[1] else None
    return PurePath(first).stem.lower() if isinstance(first, str) else ""


def _check_kind(facts: HostFacts, kind: str, asked: str, dimensions: int) -> None:
    name = shown(facts.engine)
    if _NO_PICTURES.search(facts.engine) or dimensions < 2:
        raise MrFlowError(f"the model is {name}, which makes no images from text; {_PLAIN}.")
    if kind not in (*_FLOWS, *_DISCRETE):
        raise MrFlowError(
            f"the model is {name}, of the kind {shown(kind or 'unknown')}, which cannot be sampled in stages; {_PLAIN}."
        )
    if _VIDEOS.match(facts.engine) and asked != UNKNOWN:
        raise MrFlowError(
            f"the model is {name}, which makes videos; to make single images with it, which is not tested, choose "
            f"{UNKNOWN!r} as the family."
        )
    if facts.engine == "Ideogram4" and asked == AUTO:
        raise MrFlowError(
            "the model is Ideogram4, which guides with two models; connect its own guider to MrFlow's single nodes, "
            "with 'flow' as the family."
        )


def _chosen(family: Family, facts: HostFacts) -> tuple[Family, tuple[str, ...]]:
    """A family that the user named, unless its latents or noise are another model's."""
    if (family.prediction == "flow") != facts.flow or family.latent_channels != facts.latent_channels:
        raise MrFlowError(
            f"family {family.name} has other latents or another kind of noise than the model, which is "
            f"{shown(facts.engine)}; choose {AUTO!r}."
        )
    return family, ()


def _sigma_notes(model: Any) -> tuple[str, ...]:
    if mixes_as_flow(model):
        return ()
    return ("The model counts noise as a standard deviation: sigma s is s / (1 - s) at its network, .12 is .136.",)


def _guidance_notes(family: Family, cfg: float) -> tuple[str, ...]:
    if family.guidance_kind != "embedded":
        return ()
    own = "The model's guidance is what the conditioning holds: that of FluxGuidance, or the model's usual one."
    if cfg in (0.0, 1.0):
        return (own,)
    return (own, f"cfg {cfg:g} evaluates the model twice a step, which is not counted here; cfg 1 is usual for it.")


def _assumed(family: Family, facts: HostFacts) -> tuple[str, ...]:
    others = families_alike(facts)
    if not others:
        return ()
    names = " or ".join(each.name for each in others)
    by_cfg = "" if facts.guidance is None else f", as cfg is {facts.guidance:g}"
    return (f"Nothing in the model tells whether it is {family.name} or {names}; {family.name} is assumed{by_cfg}.",)


def _own_mu(model: Any, family: Family) -> float:
    mu = model_mu(model)
    if mu is None or family.prediction != "flow":
        raise MrFlowError(f"shift is 'model', and {family.title} has no shift in ComfyUI; choose 'low' or 'final'.")
    return mu


def _check_vae(vae: Any, fit: Fit) -> None:
    """Refuse a VAE that is certainly another model's, before anything is sampled."""
    own = getattr(vae, "latent_channels", None)
    # 4 stands in ComfyUI's class, for whatever kind of VAE does not tell.
    told = isinstance(own, int) and (own != 4 or fit.channels in (4, 16))
    if told and own != fit.channels:
        raise MrFlowError(
            f"the VAE makes latents of {own} channels, and the model's have {fit.channels}; connect the VAE of the "
            "model."
        )
    ratio = vae.spacial_compression_encode() if hasattr(vae, "spacial_compression_encode") else None
    if isinstance(ratio, int) and ratio != fit.ratio:
        raise MrFlowError(
            f"the VAE makes one latent of {ratio} pixels, and the model's stand for {fit.ratio}; connect the VAE of "
            "the model."
        )
