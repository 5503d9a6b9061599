"""Noise levels of models that were trained on betas, and the schedules that visit them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.checks import MAX_STEPS, checked_number, checked_numbers, checked_whole
from mrflow_sched.plan.schedule import (
    Sigmas,
    evenly,
    scaled_linear_betas,
    trailing_steps,
    validate_sigmas,
    ve_of_betas,
)

__all__ = ["STABLE_DIFFUSION", "TrainingBetas", "betas_sigmas", "training_betas"]

_MOST_TRAINING_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class TrainingBetas:
    """The betas of a model's training, one a step.

    Attributes:
        count: Training steps, 2 to 10000.
        first: The first beta, above 0 and below 1; not read by "cosine".
        last: The last beta, likewise.
        spacing: "linear"; "scaled-linear", whose square roots are evenly spaced (Rombach et al. 2022); "cosine" (Nichol
            and Dhariwal 2021, equation 17); "own", the values of `own`.
        own: The betas of "own".
        zero_snr: They are rescaled to zero terminal signal-to-noise ratio (Lin et al. 2023).
        snr_scale: The signal-to-noise ratio of every step is divided by this, 0.01 to 100 (CogVideoX's
            `snr_shift_scale`).

    Raises:
        MrFlowError: A number is out of its range.
    """

    count: int = 1000
    first: float = 0.00085
    last: float = 0.012
    spacing: str = "scaled-linear"
    own: tuple[float, ...] = ()
    zero_snr: bool = False
    snr_scale: float = 1.0

    def __post_init__(self) -> None:
        checked_whole(self.count, "num_train_timesteps", 2, _MOST_TRAINING_STEPS)
        checked_number(self.first, "beta_start", 1e-9, 0.999, "as in the model's own scheduler")
        checked_number(self.last, "beta_end", 1e-9, 0.999, "as in the model's own scheduler")
        checked_number(self.snr_scale, "snr_shift_scale", 0.01, 100.0, "as in the model's own scheduler")
        for beta in self.own:
            checked_number(beta, "trained_betas", 1e-9, 0.99999, "as in the model's own scheduler")

    @property
    def levels(self) -> Sigmas:
        """The sigma_ve of every training step, rising."""
        return _levels(self)


STABLE_DIFFUSION = TrainingBetas()
"""Those of Stable Diffusion 1.5 and XL."""


def training_betas(options: Mapping[str, Any]) -> TrainingBetas:
    """The betas that a diffusers scheduler's configuration names.

    Args:
        options: The configuration.

    Returns:
        The betas.

    Raises:
        MrFlowError: It names none, or impossible ones.
    """
    given = options.get("trained_betas")
    own = () if given is None else checked_numbers(given, "trained_betas", _MOST_TRAINING_STEPS)
    schedule = str(options.get("beta_schedule") or "linear")
    spacing = "own" if own else _SPACINGS.get(schedule)
    if spacing is None:
        known = ", ".join(_SPACINGS)
        raise MrFlowError(f"beta_schedule is {schedule[:40]!r}, whose noise levels are not known; use one of {known}.")
    first, last = options.get("beta_start"), options.get("beta_end")
    if spacing in ("linear", "scaled-linear") and (first is None or last is None):
        raise MrFlowError(
            f"prediction_type is {options.get('prediction_type')!r}, which needs beta_start and beta_end; give the "
            "configuration of the model's own scheduler."
        )
    needed = spacing in ("linear", "scaled-linear")
    return TrainingBetas(
        count=len(own) or int(options.get("num_train_timesteps") or 1000),
        first=float(first) if needed and first is not None else STABLE_DIFFUSION.first,
        last=float(last) if needed and last is not None else STABLE_DIFFUSION.last,
        spacing=spacing,
        own=own,
        zero_snr=bool(options.get("rescale_betas_zero_snr")),
        snr_scale=float(options.get("snr_shift_scale") or 1.0),
    )


_SPACINGS: Mapping[str, str] = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}


def betas_sigmas(steps: int, betas: TrainingBetas) -> Sigmas:
    """The schedule of a model trained on betas, in flow sigma: trailing spacing (Lin et al. 2023, table 2).

    A variance-exploding sigma_ve has the signal-to-noise ratio of the flow sigma sigma_ve / (1 + sigma_ve). The first
    sigma is set to 1.0 (pure noise), which such models meet at their largest sigma_ve.

    Args:
        steps: 1 to 1000, and no more than training steps.
        betas: Of the model's training.

    Returns:
        steps + 1 floats from exactly 1.0 to exactly 0.0.

    Raises:
        MrFlowError: `steps` is out of its range.
    """
    levels = betas.levels
    steps = checked_whole(steps, "steps", 1, min(MAX_STEPS, len(levels)), "ask for fewer steps")
    picked = [levels[step] for step in trailing_steps(len(levels), steps)[1:]]
    return validate_sigmas([1.0, *(ve / (1.0 + ve) for ve in picked), 0.0], "sigmas")


@lru_cache(maxsize=16)
def _levels(betas: TrainingBetas) -> Sigmas:
    if betas.spacing == "own":
        values = list(betas.own)
    elif betas.spacing == "cosine":
        kept = [math.cos((step / betas.count + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(betas.count + 1)]
        values = [min(1.0 - after / before, 0.999) for before, after in pairwise(kept)]
    elif betas.spacing == "linear":
        values = evenly(betas.first, betas.last, betas.count)
    else:
        values = scaled_linear_betas(betas.first, betas.last, betas.count)
    return ve_of_betas(values, zero_snr=betas.zero_snr, snr_scale=betas.snr_scale)
