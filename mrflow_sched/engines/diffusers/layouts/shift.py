"""The shift rule of stage 1 that a pipeline's scheduler configuration asks for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.plan.betas import STABLE_DIFFUSION, training_betas
from mrflow_sched.plan.families import ShiftRule
from mrflow_sched.plan.schedule import shift_sigma
from mrflow_sched.plan.scheduler_config import adds_noise, edm_levels

__all__ = ["is_flow", "renoise_of", "sampler_note", "shift_rule", "spacing_note", "ve_rule"]


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler samples a flow (velocity, x = (1 - sigma) x0 + sigma noise).

    Args:
        scheduler: Of diffusers, or an `MrFlowScheduler`.

    Returns:
        True for a flow.
    """
    config = _config(scheduler)
    by_config = bool(config.get("use_flow_sigmas")) or config.get("prediction_type") in _FLOW_PREDICTIONS
    # Our own scheduler has `prediction`; it also accepts the configurations of other models.
    return by_config or "FlowMatch" in type(scheduler).__name__ or getattr(scheduler, "prediction", None) == "flow"


_FLOW_PREDICTIONS = ("flow", "flow_prediction", "trigflow")


def shift_rule(scheduler: Any, known: ShiftRule | None, *, even_list: bool = True) -> ShiftRule:
    """The shift rule in a flow scheduler's configuration.

    Args:
        scheduler: The pipeline's.
        known: The family's own rule, whose kind decides where a configuration only says "dynamic", and whose list of
            raw sigmas ("whole" steps, say) is the pipeline's; None for no family.
        even_list: Whether the pipeline gives the scheduler evenly spaced sigmas 1 ... 1/steps, as most do, or leaves
            them to the scheduler, which then ends them at the shifted 1/num_train_timesteps (SD3).

    Returns:
        The rule.

    Raises:
        MrFlowError: A configuration that no plan can follow.
    """
    config = _config(scheduler)
    if config.get("prediction_type") == "trigflow":
        return ShiftRule("trigflow", middle=None if known is None else known.middle)
    if config.get("use_flow_sigmas") and "flow_shift" in config:  # DPMSolverMultistep, UniPC and their kin
        return _static(float(config["flow_shift"]))
    smallest = 1.0 / int(config.get("num_train_timesteps") or 1000)
    dynamic, shift = bool(config.get("use_dynamic_shifting")), float(config.get("shift") or 1.0)
    spacing: dict[str, Any] = {
        "terminal": config.get("shift_terminal") or None,
        "sigma_min": None if even_list else smallest if dynamic else shift_sigma(smallest, shift),
        # What diffusers takes for both numbers of the distribution, and for rho.
        "beta": 0.6 if config.get("use_beta_sigmas") else None,
        "roots": 7.0 if config.get("use_karras_sigmas") else 0.0 if config.get("use_exponential_sigmas") else None,
    }
    if known is not None and known.kind == "logit-normal":
        return replace(known, base_shift=known.base_shift + math.log(shift))  # a shift moves all logits
    if known is not None and known.up and not dynamic:  # Bria's own list, where it has no mu
        spacing |= {"sigma_min": known.sigma_min, "whole": known.whole, "up": True}
    elif known is not None and known.whole is not None and not known.up:
        spacing |= {"sigma_min": known.sigma_min, "ahead": known.ahead, "whole": known.whole}
        _check_undone(config)
    if not dynamic:
        return _static(shift, **spacing)
    spacing["factor"] = config.get("time_shift_type", "exponential") == "linear"
    if known is not None and known.kind == "flux2":
        return replace(known, **spacing)
    root = known is not None and known.kind == "root"
    return ShiftRule(
        "root" if root else "exponential",
        base_tokens=int(config.get("base_image_seq_len") or 256),
        max_tokens=int(config.get("max_image_seq_len") or 4096),
        base_shift=_or(config.get("base_shift"), 0.25 if root else 0.5),
        max_shift=_or(config.get("max_shift"), 0.75 if root else 1.15),
        **spacing,
    )


def _check_undone(config: Mapping[str, Any]) -> None:
    """Refuse what moves a sigma after the shift, where a pipeline tells its network the time before the shift.

    Such a time belongs to a place in the pipeline's own list then, and not to a sigma.

    Raises:
        MrFlowError: The configuration does that.
    """
    for name in ("shift_terminal", "use_beta_sigmas", "use_karras_sigmas", "use_exponential_sigmas"):
        if config.get(name):
            raise MrFlowError(
                f"pipe.scheduler has {name}={quoted(config[name])}, while this pipeline tells its network times of "
                "sigmas that are only shifted; turn it off."
            )


def ve_rule(scheduler: Any, known: ShiftRule) -> ShiftRule:
    """The shift rule of a variance-exploding model's scheduler.

    Args:
        scheduler: The pipeline's.
        known: The family's own rule.

    Returns:
        "scaled-linear" for the betas of Stable Diffusion, "zero-snr" where they are rescaled to zero terminal
        signal-to-noise ratio, "betas" for others, or "edm" of an EDM model (Playground 2.5, CosXL, Cosmos-Predict2).

    Raises:
        MrFlowError: The scheduler has noise levels of no such kind, or impossible ones.
    """
    config, name = _config(scheduler), type(scheduler).__name__
    edm = edm_levels(config)
    if edm is not None:
        spaced = not is_flow(scheduler) or config.get("use_karras_sigmas") or config.get("use_exponential_sigmas")
        if not spaced:
            raise MrFlowError(
                "pipe.scheduler has neither use_karras_sigmas nor use_exponential_sigmas, while its noise levels run "
                f"from {edm.largest:g} to {edm.smallest:g}; turn one of them on, as in the model's own scheduler."
            )
        return ShiftRule("edm", sigma_max=edm.largest, sigma_min=edm.smallest, rho=edm.rho)
    if "beta_start" not in config and not config.get("trained_betas"):
        raise MrFlowError(
            f"pipe.scheduler is {name}, whose noise levels no plan can follow; use the pipeline by itself."
        )
    betas = training_betas(config)
    if betas == STABLE_DIFFUSION:
        return known if known.kind == "scaled-linear" else ShiftRule("scaled-linear")
    return ShiftRule("zero-snr") if betas == _ZERO_SNR else ShiftRule("betas", betas=betas)


_ZERO_SNR = replace(STABLE_DIFFUSION, zero_snr=True)


_TCD_GAMMA = 0.3
"""The share that TCDScheduler draws anew by default."""


def renoise_of(scheduler: Any) -> float:
    """The share of the noise that a scheduler draws anew after each step (`Stage.renoise`).

    Args:
        scheduler: The pipeline's.

    Returns:
        1 for LCM and for flow samplers with stochastic_sampling, TCD's default for TCD; 0 for all others.
    """
    name = type(scheduler).__name__
    if "TCD" in name:
        return _TCD_GAMMA
    return 1.0 if "LCM" in name or _config(scheduler).get("stochastic_sampling") else 0.0


def sampler_note(scheduler: Any) -> str | None:
    """What is lost where our solvers stand in for a pipeline's own sampler.

    Args:
        scheduler: The pipeline's.

    Returns:
        A sentence for the user; None where both solve the same equation.
    """
    name = type(scheduler).__name__
    if name == "MrFlowScheduler" or renoise_of(scheduler) or not adds_noise(_config(scheduler), name):
        return None
    return (
        f"The pipeline's own sampler, {name}, adds noise at every step; stages are sampled without, so images differ "
        "from its own, and those of a model distilled for it may lose detail."
    )


def spacing_note(scheduler: Any, eta: object = None) -> str | None:
    """What a variance-exploding pipeline's scheduler asks for that no plan follows.

    Args:
        scheduler: The pipeline's.
        eta: The argument of that name of the pipeline's call.

    Returns:
        A sentence for the user; None where the plan's schedule is the scheduler's own.
    """
    config = _config(scheduler)
    if edm_levels(config) is not None:
        return None
    asked = [word for option, word in _SPACINGS.items() if config.get(option)]
    if eta and "eta" in inspect.signature(scheduler.step).parameters:
        asked.append(f"noise at every step (eta={quoted(eta)})")
    if not asked:
        return None
    return (
        f"The pipeline asks for {' and '.join(asked)}; plans have the model's own schedule and add no noise between "
        "steps, so images differ from the pipeline's."
    )


_SPACINGS: Mapping[str, str] = {
    "use_karras_sigmas": "Karras sigmas",
    "use_exponential_sigmas": "exponential sigmas",
    "use_beta_sigmas": "Beta sigmas",
    "use_lu_lambdas": "Lu's lambdas",
}


def _static(shift: float, **spacing: Any) -> ShiftRule:
    return ShiftRule("none" if shift == 1.0 else "static", shift=shift, **spacing)


def _or(value: Any, absent: float) -> float:
    return absent if value is None else float(value)


def _config(scheduler: Any) -> Mapping[str, Any]:
    return dict(scheduler.config)
