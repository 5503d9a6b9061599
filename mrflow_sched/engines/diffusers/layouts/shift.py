"""The shift rule of stage 1 that a pipeline's scheduler configuration asks for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError, quoted, shown
from mrflow_sched.plan.families import ShiftRule
from mrflow_sched.plan.schedule import shift_sigma
from mrflow_sched.plan.scheduler_config import edm_levels

__all__ = ["adds_noise", "is_flow", "sampler_note", "shift_rule", "spacing_note", "ve_rule"]

_REFUSED = ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas")


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler samples a flow (velocity, x = (1 - sigma) x0 + sigma noise).

    Args:
        scheduler: Of diffusers, or an `MrFlowScheduler`.

    Returns:
        True for a flow.
    """
    config = _config(scheduler)
    by_config = bool(config.get("use_flow_sigmas")) or config.get("prediction_type") in ("flow", "flow_prediction")
    # Our own scheduler has `prediction`; it also accepts the configurations of other models.
    return by_config or "FlowMatch" in type(scheduler).__name__ or getattr(scheduler, "prediction", None) == "flow"


def shift_rule(scheduler: Any, known: ShiftRule | None, *, even_list: bool = True) -> ShiftRule:
    """The shift rule in a flow scheduler's configuration.

    Args:
        scheduler: The pipeline's.
        known: The family's own rule, whose kind decides where a configuration only says "dynamic"; None for no family.
        even_list: Whether the pipeline gives the scheduler evenly spaced sigmas 1 ... 1/steps, as most do, or leaves
            them to the scheduler, which then ends them at the shifted 1/num_train_timesteps (SD3).

    Returns:
        The rule.

    Raises:
        MrFlowError: A configuration that no plan can follow.
    """
    config = _config(scheduler)
    for name in _REFUSED:
        if config.get(name):
            raise MrFlowError(f"pipe.scheduler has {name}={config[name]!r}, which no plan can follow; turn it off.")
    if config.get("use_flow_sigmas") and "flow_shift" in config:  # DPMSolverMultistep, UniPC and their kin
        return _static(float(config["flow_shift"]), None, None)
    beta = 0.6 if config.get("use_beta_sigmas") else None  # what diffusers takes for both of its numbers
    terminal = config.get("shift_terminal") or None
    dynamic, shift = bool(config.get("use_dynamic_shifting")), float(config.get("shift") or 1.0)
    smallest = 1.0 / int(config.get("num_train_timesteps") or 1000)
    sigma_min = None if even_list else smallest if dynamic else shift_sigma(smallest, shift)
    if not dynamic:
        return _static(shift, terminal, sigma_min, beta)
    if known is not None and known.kind == "flux2":
        return replace(known, terminal=terminal, beta=beta)
    if config.get("time_shift_type", "exponential") != "exponential":
        # Such models (CogView4) are told the unshifted time of a shifted sigma, which only their own schedules know.
        raise MrFlowError(
            f"pipe.scheduler has time_shift_type={config['time_shift_type']!r}, which no plan can follow; models with "
            f"'exponential' or a fixed shift can be run in stages."
        )
    return ShiftRule(
        "exponential",
        base_tokens=int(config.get("base_image_seq_len") or 256),
        max_tokens=int(config.get("max_image_seq_len") or 4096),
        base_shift=_or(config.get("base_shift"), 0.5),
        max_shift=_or(config.get("max_shift"), 1.15),
        terminal=terminal,
        sigma_min=sigma_min,
        beta=beta,
    )


def ve_rule(scheduler: Any, known: ShiftRule) -> ShiftRule:
    """The shift rule of a variance-exploding model's scheduler.

    Args:
        scheduler: The pipeline's.
        known: The family's own rule.

    Returns:
        `known`, the rule "zero-snr" where the betas are rescaled to zero terminal signal-to-noise ratio, or the rule
        "edm" of an EDM model (Playground 2.5, CosXL).

    Raises:
        MrFlowError: The scheduler's noise levels are not those of Stable Diffusion, which the plan's are.
    """
    config, name = _config(scheduler), type(scheduler).__name__
    edm = edm_levels(config)
    if edm is not None:
        return ShiftRule("edm", sigma_max=edm.largest, sigma_min=edm.smallest, rho=edm.rho)
    if "beta_start" not in config:
        raise MrFlowError(
            f"pipe.scheduler is {name}, whose noise levels no plan can follow; use the pipeline by itself."
        )
    for option, value in _SD_BETAS.items():
        if config.get(option, value) != value:
            raise MrFlowError(
                f"pipe.scheduler has {option}={shown(repr(config[option]))}, while plans for such models have "
                f"{value!r}; give the model's own scheduler, or use the pipeline by itself."
            )
    return ShiftRule("zero-snr") if config.get("rescale_betas_zero_snr") else known


_SD_BETAS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
}
"""Noise levels of training of Stable Diffusion 1.5 and XL (Rombach et al. 2022), which `scaled_linear_ve` has."""


def adds_noise(config: Mapping[str, Any], name: str = "") -> bool:
    """Whether a sampler draws noise at every step, as far as its configuration and the name of its class tell.

    Args:
        config: Of a scheduler.
        name: Of its class; "" where only the configuration is known.

    Returns:
        True for LCM, TCD, ancestral and SDE samplers.
    """
    asked = bool(config.get("stochastic_sampling")) or str(config.get("algorithm_type", "")).startswith("sde")
    named = any(word in name for word in ("LCM", "TCD", "Ancestral", "SDE"))
    return asked or named or "timestep_scaling" in config  # the last is an option of LCM and TCD alone


def sampler_note(scheduler: Any) -> str | None:
    """What is lost where our solvers stand in for a pipeline's own sampler.

    Args:
        scheduler: The pipeline's.

    Returns:
        A sentence for the user; None where both solve the same equation.
    """
    name = type(scheduler).__name__
    if name == "MrFlowScheduler" or not adds_noise(_config(scheduler), name):
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


def _static(shift: float, terminal: float | None, sigma_min: float | None, beta: float | None = None) -> ShiftRule:
    kind = "none" if shift == 1.0 else "static"
    return ShiftRule(kind, shift=shift, terminal=terminal, sigma_min=sigma_min, beta=beta)


def _or(value: Any, absent: float) -> float:
    return absent if value is None else float(value)


def _config(scheduler: Any) -> Mapping[str, Any]:
    return dict(scheduler.config)
