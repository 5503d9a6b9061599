"""Schedules: the sigmas of a stage, as plain floats.

A schedule is a tuple of N + 1 noise fractions for N solver steps. It falls strictly and ends in exactly 0.0.

* Schedules of stage 1 start at exactly 1.0 (pure noise). They follow the model's own schedule: `native_sigmas`,
  `beta_sigmas` and, for variance-exploding models, `scaled_linear_sigmas` and `edm_sigmas`. Their `shift` is always an
  explicit argument.
* Refine schedules start at a chosen `start_sigma` below 1: `refine_sigmas`. Nothing ever shifts them. Schedulers
  that do (docs/method.md, section 1.5) run FLUX.1's 0.12 at 0.301 and Qwen-Image's 0.12 at 0.020.

`recipes` has the short texts that stand for schedules. Nothing here needs torch.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from statistics import NormalDist
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.plan.checks import (
    MAX_STEPS,
    check_choice,
    checked_number,
    checked_numbers,
    checked_whole,
    is_number,
    plain,
)

__all__ = [
    "LOGIT_NORMAL_LARGEST",
    "beta_sigmas",
    "edm_sigmas",
    "logit_normal_sigmas",
    "low_beta_sigmas",
    "mu_flux2",
    "mu_for_tokens",
    "native_sigmas",
    "refine_sigmas",
    "scaled_linear_sigmas",
    "shift_sigma",
    "stretch_to_terminal",
    "unshift_sigma",
    "validate_sigmas",
]

Sigmas = tuple[float, ...]

# exp(20) squeezes all but the last step into the topmost billionth: no schedule beyond it means anything.
MAX_MU = 20.0
MAX_SHIFTED_STEPS = 125
"""From 126 steps on, the first sigmas of the shifted refine curve are too near to each other for a float."""
MAX_SHIFT_TOKENS = 2**31


# ---------------------------------------------------------------------------------------------------------------- shift


def shift_sigma(sigma: float, shift: float) -> float:
    """Warp a noise fraction towards 1 (shift > 1) or towards 0 (shift < 1): s·t / (1 + (s-1)·t).

    Source: Esser et al. 2024 (Stable Diffusion 3), eq. 23.

    Args:
        sigma: Noise fraction t in [0, 1]; 0 and 1 stay where they are.
        shift: s, above 0; exp(mu) for FLUX's "exponential" shift.

    Returns:
        The warped noise fraction, in [0, 1].

    Raises:
        MrFlowError: A number is out of its range.
    """
    sigma, shift = _unit(sigma, "sigma"), _positive_shift(shift)
    if sigma == 1.0:
        return 1.0
    return min(shift * sigma / (1.0 + (shift - 1.0) * sigma), 1.0)  # rounding must not leave the range


def unshift_sigma(sigma: float, shift: float) -> float:
    """The inverse of `shift_sigma`: which noise fraction the shift turned into `sigma`.

    Args:
        sigma: Shifted noise fraction in [0, 1].
        shift: Above 0.

    Returns:
        The noise fraction before the shift, in [0, 1].

    Raises:
        MrFlowError: A number is out of its range.
    """
    sigma, shift = _unit(sigma, "sigma"), _positive_shift(shift)
    if sigma == 1.0:
        return 1.0
    return min(sigma / (shift + (1.0 - shift) * sigma), 1.0)


def mu_for_tokens(
    tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """The mu = log(shift) of an image size, on the straight line through two known points.

    The defaults are FLUX.1's: 0.63 at 1024 tokens (512 px), 1.15 at 4096 (1024 px).
    Source: black-forest-labs/flux `sampling.py`; diffusers FluxPipeline.

    Args:
        tokens: Image tokens, 1 or more; the line goes on beyond both points.
        base_tokens: Tokens of the first point.
        max_tokens: Tokens of the second point.
        base_shift: Value of mu at the first point.
        max_shift: Value of mu at the second point.

    Returns:
        The logarithm of the shift.

    Raises:
        MrFlowError: `tokens` is below 1, or the two points make no line.
    """
    tokens = checked_whole(tokens, "tokens", 1, MAX_SHIFT_TOKENS)
    base_tokens = checked_whole(base_tokens, "base_tokens", 1, MAX_SHIFT_TOKENS)
    max_tokens = checked_whole(max_tokens, "max_tokens", 1, MAX_SHIFT_TOKENS)
    base_shift = checked_number(base_shift, "base_shift", -MAX_MU, MAX_MU, "it is a mu")
    max_shift = checked_number(max_shift, "max_shift", -MAX_MU, MAX_MU, "it is a mu")
    if base_tokens == max_tokens:
        raise MrFlowError(f"max_tokens must differ from base_tokens, got {max_tokens} for both.")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (tokens - base_tokens)


# FLUX.2's fitted constants (diffusers `pipeline_flux2_klein.py`, `compute_empirical_mu`): mu is a straight line in
# tokens, one line measured at 10 steps, one at 200, and is interpolated in the step count between them.
_FLUX2_AT_10_STEPS = (8.73809524e-05, 1.89833333)
_FLUX2_AT_200_STEPS = (0.00016927, 0.45666666)
_FLUX2_LARGE_TOKENS = 4300


def mu_flux2(tokens: int, steps: int) -> float:
    """FLUX.2's empirical mu = log(shift), which depends on the step count too.

    1.974 at 1024 tokens and 12 steps; 2.031 at 1024 and 4. Above 4300 tokens the step count no longer matters.
    Source: constants of diffusers `Flux2KleinPipeline`.

    Args:
        tokens: Image tokens, 1 or more.
        steps: Solver steps, 1 to 1000.

    Returns:
        The logarithm of the shift.

    Raises:
        MrFlowError: `tokens` or `steps` is out of its range.
    """
    tokens = checked_whole(tokens, "tokens", 1, MAX_SHIFT_TOKENS)
    steps = checked_whole(steps, "steps", 1, MAX_STEPS)
    few = _FLUX2_AT_10_STEPS[0] * tokens + _FLUX2_AT_10_STEPS[1]
    many = _FLUX2_AT_200_STEPS[0] * tokens + _FLUX2_AT_200_STEPS[1]
    if tokens > _FLUX2_LARGE_TOKENS:
        return many
    return many + (many - few) * (steps - 200) / 190


# --------------------------------------------------------------------------------------------------- stage-1 schedules


def stretch_to_terminal(sigmas: Sequence[float], terminal: float) -> Sigmas:
    """Stretch a schedule about 1 so that its last sigma above zero becomes `terminal`; the final 0 stays.

    Qwen-Image's scheduler does this with 0.02. A schedule of one step has nothing to stretch and comes back as it is.
    Source: diffusers FlowMatchEulerDiscreteScheduler, `shift_terminal`.

    Args:
        sigmas: A schedule that starts at 1.0.
        terminal: Noise fraction, 0 < terminal < 1.

    Returns:
        A schedule of as many values.

    Raises:
        MrFlowError: `sigmas` is not such a schedule, or `terminal` is out of its range.
    """
    checked = validate_sigmas(sigmas, "sigmas")
    if checked[0] != 1.0:
        raise MrFlowError(f"sigmas must start at 1.0 to be stretched, got {checked[0]!r}; refine schedules never are.")
    terminal = _between(terminal, "terminal", "Qwen-Image uses 0.02")
    return validate_sigmas([*stretched(checked[:-1], terminal), 0.0], "sigmas")


def stretched(above_zero: Sequence[float], terminal: float) -> list[float]:
    """Sigmas without their final 0, stretched about 1 until the last one is `terminal`.

    Args:
        above_zero: Falling values in (0, 1].
        terminal: What the last value becomes; where that is 1 already, nothing is stretched.

    Returns:
        As many values.
    """
    if above_zero[-1] >= 1.0:
        return list(above_zero)
    scale = (1.0 - terminal) / (1.0 - above_zero[-1])
    return [*(1.0 - (1.0 - sigma) * scale for sigma in above_zero[:-1]), terminal]


def evenly(first: float, last: float, count: int) -> list[float]:
    """Evenly spaced values, both ends included.

    Args:
        first: The first value.
        last: The last value.
        count: How many; one value is `first`.

    Returns:
        `count` values, none outside the two ends.
    """
    spacing, (low, high) = (first - last) / max(count - 1, 1), sorted((first, last))
    return [min(max(first - index * spacing, low), high) for index in range(count)]  # rounding must not leave the range


def native_sigmas(
    steps: int,
    *,
    mu: float = 0.0,
    terminal: float | None = None,
    sigma_min: float | None = None,
    beta: float | None = None,
    roots: float | None = None,
    ahead: float | None = None,
    whole: int | None = None,
    up: bool = False,
) -> Sigmas:
    """A flow model's own schedule: evenly spaced noise fractions from 1, shifted, then a final 0.

    Source: diffusers FluxPipeline (sigmas), FlowMatchEulerDiscreteScheduler (shift, terminal, beta, roots),
    CogView4Pipeline (whole), BriaPipeline (up) and GlmImagePipeline (ahead).

    Args:
        steps: 1 to 1000.
        mu: Logarithm of the shift.
        terminal: The last sigma above zero that the shifted schedule is stretched to, see `stretch_to_terminal`.
        sigma_min: The last fraction above zero before the shift (None: 1/steps, which spaces all steps evenly).
        beta: Space the finished schedule anew between its ends, at quantiles of Beta(beta, beta).
        roots: Space it anew so that its roots of this order are evenly spaced, 1 to 100; 0: its logarithms.
        ahead: Without `sigma_min`: the fraction before the shift that one more step would reach (None: 0).
        whole: Fractions before the shift are rounded down to multiples of 1/whole, 1000 to 10000.
        up: They are rounded up instead.

    Returns:
        steps + 1 floats from exactly 1.0 to exactly 0.0.

    Raises:
        MrFlowError: A number is out of its range.
    """
    steps, shift = checked_whole(steps, "steps", 1, MAX_STEPS), _shift_of(mu)
    if sigma_min is not None:
        last, more = _between(sigma_min, "sigma_min", "leave it out for even spacing"), 0
    elif ahead is not None:
        last, more = _between(ahead, "ahead", "leave it out for 0"), 1
    else:
        last, more = 1.0 / steps, 0
    if whole is None:
        spaced = evenly(1.0, last, steps + more)[:steps]
    else:
        parts = checked_whole(whole, "whole", MAX_STEPS, 10 * MAX_STEPS)
        end = round(last * parts)
        if up:
            counts = [parts - count for count in _rounded_down(0, parts - end, steps + more)]
        else:
            counts = _rounded_down(parts, end, steps + more)
        spaced = [count / parts for count in counts[:steps]]
    sigmas = validate_sigmas([1.0, *(shift_sigma(sigma, shift) for sigma in spaced[1:]), 0.0], "sigmas")
    if terminal is not None:
        sigmas = stretch_to_terminal(sigmas, terminal)
    if roots is not None:
        between = spaced_by_rho(sigmas[0], sigmas[-2], steps, roots or None)[1:-1]
        sigmas = validate_sigmas([1.0, *between, *sigmas[-2:]] if steps > 1 else sigmas, "sigmas")
    return sigmas if beta is None else validate_sigmas([*spaced_by_beta(sigmas[:-1], beta), 0.0], "sigmas")


def _rounded_down(first: int, last: int, count: int) -> list[int]:
    """Evenly spaced whole numbers, rounded down after the same operations as in NumPy's linspace."""
    width = (last - first) / max(count - 1, 1)
    return [*(math.floor(index * width + first) for index in range(count - 1)), last if count > 1 else first]


def logit_normal_sigmas(steps: int, *, mu: float, std: float) -> Sigmas:
    """A flow model's schedule at evenly spaced quantiles of a logit-normal distribution (Ideogram 4).

    Its logits are those of Normal(mu, std). The first sigma is set to 1.0 (pure noise); the model itself is told
    `LOGIT_NORMAL_LARGEST` there.
    Source: diffusers Ideogram4Pipeline.

    Args:
        steps: 1 to 1000.
        mu: Mean of the logits of the sigmas.
        std: Their standard deviation, 0.1 to 10.

    Returns:
        steps + 1 floats from exactly 1.0 to exactly 0.0.

    Raises:
        MrFlowError: A number is out of its range.
    """
    steps = checked_whole(steps, "steps", 1, MAX_STEPS)
    mu = checked_number(mu, "mu", -MAX_MU, MAX_MU, "it is a mean of logits")
    std = checked_number(std, "std", 0.1, 10.0, "the published value is 1.5")
    normal = NormalDist(mu, std)
    inner = [1.0 / (1.0 + math.exp(-normal.inv_cdf(1.0 - index / steps))) for index in range(1, steps)]
    kept = [min(max(sigma, _LOGIT_NORMAL_SMALLEST), LOGIT_NORMAL_LARGEST) for sigma in inner]
    return validate_sigmas([1.0, *kept, 0.0], "sigmas")


# The ends of diffusers' Ideogram4Pipeline, which cuts the logits of its sigmas off at 9 and -7.5.
LOGIT_NORMAL_LARGEST = 1.0 - 1.0 / (1.0 + math.exp(9.0))
_LOGIT_NORMAL_SMALLEST = 1.0 - 1.0 / (1.0 + math.exp(-7.5))


def spaced_by_beta(above_zero: Sequence[float], beta: float = 0.6) -> list[float]:
    """As many sigmas between the same two ends, at quantiles of Beta(beta, beta).

    Source: Lee et al. 2024 (arXiv 2407.12173), with both ends on the schedule as diffusers' schedulers have it.

    Args:
        above_zero: Falling sigmas, of which the two ends and the count matter.
        beta: Both parameters of the distribution, 0.2 to 10.

    Returns:
        As many sigmas, without a final 0.
    """
    top, bottom, count = above_zero[0], above_zero[-1], len(above_zero)
    quantiles = beta_sigmas(count - 1, alpha=beta, beta=beta) if count > 1 else (1.0,)
    inner = [bottom + quantile * (top - bottom) for quantile in quantiles[1:-1]]
    return [top, *inner, bottom] if count > 1 else [top]


def beta_sigmas(steps: int, *, alpha: float = 0.6, beta: float = 0.6, mu: float = 0.0) -> Sigmas:
    """Sigmas at evenly spaced quantiles of a Beta(alpha, beta) distribution, then shifted by exp(mu).

    With both below 1 the steps crowd at the two ends.
    Source: Lee et al. 2024, "Beta Sampling is All You Need" (arXiv 2407.12173), which uses 0.6 and 0.6.

    Args:
        steps: 1 to 1000.
        alpha: First parameter of the distribution, 0.2 to 10.
        beta: Second parameter, 0.2 to 10.
        mu: Logarithm of the shift.

    Returns:
        steps + 1 floats from exactly 1.0 to exactly 0.0.

    Raises:
        MrFlowError: A number is out of its range.
    """
    steps, shift = checked_whole(steps, "steps", 1, MAX_STEPS), _shift_of(mu)
    alpha = checked_number(alpha, "alpha", 0.2, 10.0, "the published value is 0.6")
    beta = checked_number(beta, "beta", 0.2, 10.0, "the published value is 0.6")
    inner = [shift_sigma(_beta_quantile(1.0 - index / steps, alpha, beta), shift) for index in range(1, steps)]
    return validate_sigmas([1.0, *inner, 0.0], "sigmas")


def low_beta_sigmas(steps: int, *, alpha: float = 1.4, beta: float = 0.425) -> Sigmas:
    """Sigmas between 1 and 1 / steps, at evenly spaced quantiles of a Beta(alpha, beta) distribution, then 0.

    Most steps are noisy ones, where a few tokens stand for all. No shift is applied.
    Source: Just-in-Time sampling (arXiv 2603.10744): 1.4 with 0.42 in its text, 0.425 in its code.

    Args:
        steps: 2 to 1000.
        alpha: First parameter of the distribution, 0.2 to 10.
        beta: Second parameter, 0.2 to 10.

    Returns:
        steps + 1 floats from exactly 1.0 to exactly 0.0.

    Raises:
        MrFlowError: A number is out of its range.
    """
    steps = checked_whole(steps, "steps", 2, MAX_STEPS)
    low = 1.0 / steps
    quantiles = beta_sigmas(steps - 1, alpha=alpha, beta=beta)
    return validate_sigmas([*(low + (1.0 - low) * quantile for quantile in quantiles), 0.0], "sigmas")


# ---------------------------------------------------------------------------------------- variance-exploding schedules


def scaled_linear_sigmas(steps: int, *, zero_snr: bool = False) -> Sigmas:
    """The schedule of SD1.5 and SDXL in flow sigma: scaled-linear betas, trailing spacing.

    A variance-exploding sigma_ve has the signal-to-noise ratio of the flow sigma sigma_ve / (1 + sigma_ve).
    The first sigma is set to 1.0 (pure noise), which these models meet at their largest sigma_ve.
    Source: Rombach et al. 2022 training betas 0.00085..0.012; trailing spacing and zero SNR of Lin et al. 2023
    (arXiv 2305.08891).

    Args:
        steps: 1 to 1000.
        zero_snr: The betas are rescaled to zero terminal SNR: the largest sigma_ve is 4096 instead of 14.6.

    Returns:
        steps + 1 floats from exactly 1.0 to exactly 0.0.

    Raises:
        MrFlowError: `steps` is out of its range.
    """
    steps = checked_whole(steps, "steps", 1, MAX_STEPS)
    table = scaled_linear_ve(zero_snr)
    if steps > len(table):
        raise MrFlowError(f"steps must be at most {len(table)} for this schedule, got {steps!r}; ask for fewer steps.")
    picked = [table[step] for step in trailing_steps(len(table), steps)[1:]]
    return validate_sigmas([1.0, *(ve / (1.0 + ve) for ve in picked), 0.0], "sigmas")


def edm_sigmas(steps: int, *, largest: float, smallest: float, rho: float | None = 7.0) -> Sigmas:
    """The schedule of EDM models (Playground 2.5, CosXL) in flow sigma, as in `scaled_linear_sigmas`.

    Source: Karras et al. 2022 (arXiv 2206.00364), equation 5.

    Args:
        steps: 1 to 1000.
        largest: The sigma_ve of pure noise, up to 1e6, for data of standard deviation 1: EDM's sigma_max / sigma_data.
        smallest: The sigma_ve before 0, at least 1e-6 and below `largest`: sigma_min / sigma_data.
        rho: Roots of this order are evenly spaced, 1 to 100; None: logarithms are.

    Returns:
        steps + 1 floats from exactly 1.0 to exactly 0.0.

    Raises:
        MrFlowError: A number is out of its range.
    """
    steps = checked_whole(steps, "steps", 1, MAX_STEPS)
    largest = checked_number(largest, "largest", 1e-6, 1e6, "the published value is 160")
    smallest = checked_number(smallest, "smallest", 1e-6, 1e6, "the published value is 0.004")
    if smallest >= largest:
        raise MrFlowError(f"smallest must be below largest, got {smallest!r} and {largest!r}.")
    picked = spaced_by_rho(largest, smallest, steps, rho)[1:]
    return validate_sigmas([1.0, *(ve / (1.0 + ve) for ve in picked), 0.0], "sigmas")


def spaced_by_rho(largest: float, smallest: float, count: int, rho: float | None) -> list[float]:
    """Falling values between two ends, the roots of which are evenly spaced (Karras et al. 2022, equation 5).

    Args:
        largest: The first.
        smallest: The last, above 0.
        count: How many, 1 or more.
        rho: Order of the roots, 1 to 100; None: the logarithms are evenly spaced.

    Returns:
        `count` values.

    Raises:
        MrFlowError: `rho` is out of its range.
    """
    if rho is None:
        return [math.exp(exponent) for exponent in evenly(math.log(largest), math.log(smallest), count)]
    rho = checked_number(rho, "rho", 1.0, 100.0, "the published value is 7")
    return [root**rho for root in evenly(largest ** (1.0 / rho), smallest ** (1.0 / rho), count)]


def trailing_steps(training: int, count: int) -> list[int]:
    """Training steps to visit with "trailing" spacing (Lin et al. 2023, table 2).

    Args:
        training: Number of training steps.
        count: Number of sampling steps.

    Returns:
        `count` training steps, falling from the last one.
    """
    return [round(training - index * training / count) - 1 for index in range(count)]


@lru_cache(maxsize=2)
def scaled_linear_ve(zero_snr: bool = False) -> Sigmas:
    """The sigma_ve of each of the 1000 training steps of SD1.5 and SDXL.

    Args:
        zero_snr: As in `scaled_linear_sigmas`.

    Returns:
        1000 values, rising.
    """
    return ve_of_betas(scaled_linear_betas(0.00085, 0.012, 1000), zero_snr=zero_snr)


def scaled_linear_betas(first: float, last: float, count: int) -> list[float]:
    """Betas whose square roots are evenly spaced (Rombach et al. 2022).

    Args:
        first: Beta of the first training step.
        last: Beta of the last.
        count: Number of training steps.

    Returns:
        `count` values.
    """
    return [root**2 for root in evenly(math.sqrt(first), math.sqrt(last), count)]


def ve_of_betas(betas: Sequence[float], *, zero_snr: bool = False, snr_scale: float = 1.0) -> Sigmas:
    """The sigma_ve of every training step: sqrt((1 - abar) / abar), where abar is the product of 1 - beta.

    Args:
        betas: One value per training step.
        zero_snr: Shift and scale the roots of abar so that the last is 0 (Lin et al. 2023, algorithm 1). It is then set
            to 2^-24, as in diffusers, so that its sigma_ve is finite: 4096. Steps before it that would lie above are
            lowered to just below.
        snr_scale: The signal-to-noise ratio of every step is divided by this before it is rescaled (CogView3-Plus).

    Returns:
        As many values, rising.
    """
    kept: list[float] = list(accumulate((1.0 - beta for beta in betas), operator.mul))
    if snr_scale != 1.0:
        kept = [each / (snr_scale + (1.0 - snr_scale) * each) for each in kept]
    if zero_snr:
        roots = [math.sqrt(each) for each in kept]
        scale = roots[0] / (roots[0] - roots[-1])
        kept = [((root - roots[-1]) * scale) ** 2 for root in roots[:-1]] + [2.0**-24]
    table = [math.sqrt((1.0 - each) / each) if each > 0.0 else math.inf for each in kept]
    for step in range(len(table) - 2, -1, -1):
        table[step] = min(table[step], table[step + 1] * (1.0 - 1e-9))
    return tuple(table)


# ---------------------------------------------------------------------------------------------------- refine schedules


def refine_sigmas(start_sigma: float, steps: int, curve: str = "linear") -> Sigmas:
    """The schedule of a later stage: from `start_sigma`, which is the flow noise fraction itself, to 0.

    No model's shift enters. For one step every curve is (start_sigma, 0).
    Source: docs/method.md, section 1.4 (a) and (b); the official code's direct refine schedule and its ComfyUI node.

    Args:
        start_sigma: Noise fraction, 0 < start_sigma < 1.
        steps: 1 to 1000; 1 to 125 on the "shifted" curve.
        curve: "linear" falls in equal steps; "shifted" takes shorter steps first, more so with more steps, by an inner
            shift of 0.25·(steps-1) that never moves the two ends.

    Returns:
        steps + 1 floats.

    Raises:
        MrFlowError: A number is out of its range, or the curve is unknown.
    """
    start_sigma = _between(start_sigma, "start_sigma", "0.12 is the usual value")
    check_choice(curve, "refine_curve", ("linear", "shifted"))
    shifted = curve == "shifted"
    advice = "the curve 'linear' takes up to 1000" if shifted else ""
    steps = checked_whole(steps, "refine_steps", 1, MAX_SHIFTED_STEPS if shifted else MAX_STEPS, advice)
    fractions = [1.0 - index / steps for index in range(1, steps)]
    if shifted:
        shift = math.exp(0.25 * (steps - 1))
        # Both ends are pulled in by 1e-6 and the result rescaled, as in the source of this curve.
        bottom, top = shift_sigma(1e-6, shift), shift_sigma(1.0 - 1e-6, shift)
        fractions = [(shift_sigma(fraction, shift) - bottom) / (top - bottom) for fraction in fractions]
    sigmas = [start_sigma, *(start_sigma * fraction for fraction in fractions), 0.0]
    if any(after >= before for before, after in pairwise(sigmas)):
        raise MrFlowError(
            f"start_sigma must be larger for {steps} steps, got {start_sigma!r}; 0.12 is the usual value."
        )
    return validate_sigmas(sigmas, "sigmas")


def validate_sigmas(sigmas: Sequence[float], name: str = "sigmas") -> Sigmas:
    """The same values as a tuple of floats, if they are a schedule.

    Args:
        sigmas: At least two values, strictly falling, all in [0, 1], the last exactly 0.
        name: The argument's name, for the refusal.

    Returns:
        The schedule.

    Raises:
        MrFlowError: `sigmas` is anything else.
    """
    values = checked_numbers(sigmas, name, MAX_STEPS + 1)
    if len(values) < 2:
        raise MrFlowError(f"{name} must hold at least two values (a start and 0), got {quoted(sigmas)}.")
    wrong = next((value for value in values if not 0.0 <= value <= 1.0), None)
    if wrong is not None:
        raise MrFlowError(f"{name} must hold only numbers from 0 to 1, got {wrong!r}.")
    rise = next((pair for pair in pairwise(values) if pair[1] >= pair[0]), None)
    if rise is not None:
        raise MrFlowError(f"{name} must fall from each value to the next, got {rise[1]!r} after {rise[0]!r}.")
    if values[-1] != 0.0:
        raise MrFlowError(f"{name} must end in exactly 0, got {values[-1]!r} at the end.")
    return values


# ------------------------------------------------------------------------------------------------------------- helpers


def _shift_of(mu: float) -> float:
    return math.exp(checked_number(mu, "mu", -MAX_MU, MAX_MU, "it is the logarithm of the shift"))


def _unit(value: float, name: str) -> float:
    number: Any = plain(value)
    if not (is_number(number) and 0.0 <= number <= 1.0):
        raise MrFlowError(f"{name} must lie between 0 and 1, got {quoted(value)}; it is the fraction of noise.")
    return float(number)


def _between(value: float, name: str, advice: str) -> float:
    number: Any = plain(value)
    if not (is_number(number) and 0.0 < number < 1.0):
        raise MrFlowError(f"{name} must lie between 0 and 1, got {quoted(value)}; {advice}.")
    return float(number)


def _positive_shift(shift: float) -> float:
    number: Any = plain(shift)
    if not (is_number(number) and 0.0 < number <= sys.float_info.max):
        raise MrFlowError(f"shift must be a positive number, got {quoted(shift)}; 1 means no shift.")
    return float(number)


def _beta_quantile(probability: float, alpha: float, beta: float) -> float:
    """The x at which the Beta(alpha, beta) distribution function reaches `probability`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if _beta_cdf(middle, alpha, beta) < probability:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def _beta_cdf(x: float, alpha: float, beta: float) -> float:
    """Regularised incomplete beta function (NIST DLMF 8.17.22), from the side on which its fraction converges fast."""
    if x > (alpha + 1.0) / (alpha + beta + 2.0):
        return 1.0 - _beta_cdf(1.0 - x, beta, alpha)
    if x <= 0.0:
        return 0.0
    gammas, terms = _beta_terms(alpha, beta)
    log_front = alpha * math.log(x) + beta * math.log1p(-x) - math.log(alpha) - gammas
    fraction = 1.0
    for top, bottom in terms:
        fraction = 1.0 + top * x / bottom / fraction
    return math.exp(log_front) / fraction


@lru_cache(maxsize=16)
def _beta_terms(alpha: float, beta: float) -> tuple[float, tuple[tuple[float, float], ...]]:
    """The logarithm of the beta function, and the terms of the fraction over and under its line, innermost first."""
    terms: list[tuple[float, float]] = []
    # 60 terms are far more than double precision needs on this side.
    for term in range(60, 0, -1):
        half, odd = divmod(term, 2)
        top = -(alpha + half) * (alpha + beta + half) if odd else half * (beta - half)
        terms.append((top, (alpha + term - 1) * (alpha + term)))
    return math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta), tuple(terms)
