"""The schedule that a diffusers scheduler's configuration asks for.

The formulas are those of `schedule`; here is which of them an option selects, and in which order. `options` is always
such a configuration, each option under diffusers' name.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.betas import training_betas
from mrflow_sched.plan.checks import checked_number
from mrflow_sched.plan.schedule import (
    Sigmas,
    evenly,
    shift_sigma,
    spaced_by_beta,
    spaced_by_rho,
    stretched,
    trailing_steps,
)

CONVERSIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def step_count(steps: int | None, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None) -> int:
    """How many steps the arguments of `set_timesteps` ask for.

    Args:
        steps: `num_inference_steps`.
        sigmas: Own sigmas, of which those above 0 count.
        timesteps: Own timesteps.

    Returns:
        1 or more.

    Raises:
        MrFlowError: None of the three is given, or the counts disagree.
    """
    counts = {
        "num_inference_steps": steps,
        "sigmas": None if sigmas is None else sum(1 for sigma in sigmas if float(sigma) > 0.0),
        "timesteps": None if timesteps is None else len(timesteps),
    }
    told = {name: count for name, count in counts.items() if count is not None}
    if not told or len(set(told.values())) > 1 or min(told.values()) < 1:
        raise MrFlowError(f"set_timesteps needs one count of 1 or more from its arguments, got {told or 'none'}.")
    return next(iter(told.values()))


# ------------------------------------------------------------------------------------------------------- flow schedules


def shift_in_force(options: Mapping[str, Any], mu: float | None) -> float:
    """The shift that a configuration applies, for `shift_sigma`.

    Args:
        options: The scheduler's configuration.
        mu: What the pipeline computed for the image's size; needed with `use_dynamic_shifting` only.

    Returns:
        A factor; 1 is no shift.

    Raises:
        MrFlowError: The shift depends on the image's size and `mu` is None.
    """
    if not options["use_dynamic_shifting"]:
        return float(options["flow_shift"] if options["use_flow_sigmas"] else options["shift"])
    if mu is None:
        raise MrFlowError("mu is None with use_dynamic_shifting; give set_timesteps the mu of the image's size.")
    return math.exp(mu) if options["time_shift_type"] == "exponential" else float(mu)


def flow_sigmas(
    options: Mapping[str, Any],
    count: int,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
    mu: float | None,
    sigma_min: float,
) -> Sigmas:
    """The schedule of FlowMatchEulerDiscreteScheduler, or of a multistep scheduler with `use_flow_sigmas`.

    Args:
        options: The scheduler's configuration.
        count: Number of steps.
        sigmas: Own sigmas before the shift, with or without a final 0; None: made from `options`.
        timesteps: Own timesteps before the shift, used where `sigmas` is None.
        mu: As in `shift_in_force`.
        sigma_min: The last of the evenly spaced sigmas before the shift.

    Returns:
        A schedule that ends in 0.

    Raises:
        MrFlowError: The shift depends on the image's size and `mu` is None.
    """
    training = float(options["num_train_timesteps"])
    if sigmas is not None:
        raw = [float(sigma) for sigma in sigmas if float(sigma) > 0.0]
    elif timesteps is not None:
        raw = [float(time) / training for time in timesteps]
    elif options["use_flow_sigmas"]:
        raw = [1.0 - index / count * (1.0 - 1.0 / training) for index in range(count)]
    else:
        raw = evenly(1.0, sigma_min, count)
    shift = shift_in_force(options, mu)
    shifted = [shift_sigma(sigma, shift) for sigma in raw]
    if options["shift_terminal"]:
        shifted = stretched(shifted, float(options["shift_terminal"]))
    return _ended(_converted(options, shifted))


def _converted(options: Mapping[str, Any], sigmas: Sequence[float]) -> list[float]:
    """As many sigmas between the same ends, spaced by the formula that the options name, if they name one."""
    if not any(options[name] for name in CONVERSIONS):
        return list(sigmas)
    count = len(sigmas)
    top = float(options.get("sigma_max") or sigmas[0])
    bottom = float(options.get("sigma_min") or sigmas[-1])
    if not options["use_beta_sigmas"]:
        return spaced_by_rho(top, bottom, count, 7.0 if options["use_karras_sigmas"] else None)
    return spaced_by_beta([top, *sigmas[1:-1], bottom] if count > 1 else [top])


def _ended(sigmas: Sequence[float]) -> Sigmas:
    """The schedule with its final 0; sigmas that are 0 already (some pipelines ask for that) become that one."""
    return (*(sigma for sigma in sigmas if sigma > 0.0), 0.0)


# ----------------------------------------------------------------------------------------- variance-exploding schedules


@dataclass(frozen=True, slots=True)
class EdmLevels:
    """Noise levels of an EDM model (Karras et al. 2022), for data of standard deviation 1.

    Attributes:
        data: Standard deviation of the model's own latents, above 0; a pipeline's state is this times ours.
        largest: The sigma_ve of pure noise.
        smallest: The sigma_ve of the last step before 0.
        rho: Spacing, as in `spaced_by_rho`.
    """

    data: float
    largest: float
    smallest: float
    rho: float | None

    def time(self, sigma: float) -> float:
        """What the network is told for a sigma_ve: a quarter of the logarithm of the noise in its own latents.

        Args:
            sigma: Above 0.

        Returns:
            The time, often negative.
        """
        return 0.25 * math.log(sigma * self.data)

    def spaced(self, count: int) -> Sigmas:
        """A schedule of EDMEulerScheduler.

        Args:
            count: Number of steps.

        Returns:
            The sigma_ve of each step, with a final 0.
        """
        return (*spaced_by_rho(self.largest, self.smallest, count, self.rho), 0.0)

    def told(self, times: Sequence[float]) -> Sigmas:
        """The schedule at which the network is told given times.

        Args:
            times: As of `time`, falling.

        Returns:
            The sigma_ve of each, with a final 0.
        """
        return (*(math.exp(4.0 * float(time)) / self.data for time in times), 0.0)


def edm_levels(options: Mapping[str, Any]) -> EdmLevels | None:
    """The noise levels in a scheduler's configuration: EDM's own ones, and what Cosmos-Predict2 writes into its own.

    Args:
        options: The scheduler's configuration.

    Returns:
        The levels; None where it is no EDM model's.

    Raises:
        MrFlowError: Values that no model has.
    """
    if options.get("sigma_data") is None or options.get("prediction_type") == "trigflow":
        return None
    data, largest, smallest = (
        checked_number(options.get(name), name, 1e-4, 1e4, "as in the model's own scheduler")
        for name in ("sigma_data", "sigma_max", "sigma_min")
    )
    if smallest >= largest:
        raise MrFlowError(f"sigma_min must be below sigma_max, got {smallest!r} and {largest!r}.")
    logarithms = options.get("sigma_schedule") == "exponential" or options.get("use_exponential_sigmas")
    rho = None if logarithms else float(options.get("rho") or 7.0)
    return EdmLevels(data, largest / data, smallest / data, rho)


def training_sigmas(options: Mapping[str, Any]) -> Sigmas:
    """The sigma_ve of every training step, see `betas.TrainingBetas`.

    Args:
        options: The scheduler's configuration.

    Returns:
        One value per training step, rising.

    Raises:
        MrFlowError: The configuration names no betas.
    """
    return training_betas(options).levels


def ve_sigmas(
    options: Mapping[str, Any],
    table: Sigmas,
    count: int,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
) -> tuple[Sigmas, dict[float, float]]:
    """The schedule of EulerDiscreteScheduler, and the timestep of each sigma.

    Args:
        options: The scheduler's configuration.
        table: The sigma_ve of every training step, from `training_sigmas`.
        count: Number of steps.
        sigmas: Own values of sigma_ve; None: made from `options`.
        timesteps: Own timesteps, used where `sigmas` is None.

    Returns:
        The sigma_ve of each step with a final 0, and a table from sigma to timestep, which is empty for own sigmas and
        for those that `options` spaces anew.
    """
    if sigmas is not None:
        return _ended([float(sigma) for sigma in sigmas]), {}
    times = _spaced_times(options, count) if timesteps is None else [float(time) for time in timesteps]
    found = [_sigma_at(time, table) for time in times]
    if any(options[name] for name in CONVERSIONS):
        return _ended(_converted(options, found)), {}
    return _ended(found), dict(zip(found, times, strict=True))


def _spaced_times(options: Mapping[str, Any], count: int) -> list[float]:
    """Training steps to visit, falling: the three spacings of Lin et al. 2023, table 2."""
    training = int(options["num_train_timesteps"])
    if options["timestep_spacing"] == "linspace":
        return evenly(training - 1.0, 0.0, count)
    if options["timestep_spacing"] == "leading":
        return [float(training // count * index + options["steps_offset"]) for index in reversed(range(count))]
    return [float(step) for step in trailing_steps(training, count)]


def _sigma_at(time: float, table: Sigmas) -> float:
    """Value of sigma_ve at a training step, interpolated linearly between two of them."""
    low = min(max(int(time), 0), len(table) - 2)
    share = min(max(time - low, 0.0), 1.0)
    return table[low] + share * (table[low + 1] - table[low])


def time_of(sigma: float, table: Sigmas) -> float:
    """The training step of a sigma_ve, interpolated on the line in log sigma, as k-diffusion does.

    Args:
        sigma: A sigma_ve above 0.
        table: The sigma_ve of every training step, from `training_sigmas`.

    Returns:
        A training step from 0, not always whole.
    """
    low = min(max(bisect_right(table, sigma) - 1, 0), len(table) - 2)
    below, above = math.log(table[low]), math.log(table[low + 1])
    return low + min(max((math.log(sigma) - below) / (above - below), 0.0), 1.0)


def adds_noise(config: Mapping[str, Any], name: str = "") -> bool:
    """Whether a sampler draws noise at every step, as far as its configuration and the name of its class tell.

    Args:
        config: Of a scheduler.
        name: Of its class; "" where only the configuration is known.

    Returns:
        True for LCM, TCD, ancestral and SDE samplers.
    """
    asked = bool(config.get("stochastic_sampling")) or str(config.get("algorithm_type", "")).startswith("sde")
    named = any(word in name for word in ("LCM", "TCD", "SCM", "Ancestral", "SDE"))
    return asked or named or "timestep_scaling" in config  # the last is an option of LCM and TCD alone
