"""Noise: how it is drawn and added, and how a network's output becomes a clean estimate.

Four kinds of network output meet here (`prediction`):

* "flow": x = (1 - sigma) x0 + sigma noise, output velocity = noise - x0.
* "epsilon", "v" and "edm" (variance exploding: SD1.5, SDXL, Playground 2.5): x = x0 + sigma_ve noise, in k-diffusion's
  scaling, with x0 of standard deviation 1.

A plan always holds flow sigmas. The sigma_ve with the same signal-to-noise ratio is sigma_ve = sigma / (1 - sigma).
`add_noise` takes the plan's sigma and converts; `to_denoised` takes what the engine was called with, which is sigma_ve
for all but "flow" (`model_sigmas` converts a whole schedule).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TypeVar, get_args

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.families import Prediction
from mrflow_sched.plan.schedule import scaled_linear_ve

__all__ = [
    "add_noise",
    "denoised_to_velocity",
    "draw_noise",
    "model_sigmas",
    "sigma_to_ve",
    "stage_seed",
    "to_denoised",
    "ve_to_sigma",
]

Sigma = TypeVar("Sigma", float, Tensor)

_SEED_RANGE = 2**63


# ------------------------------------------------------------------------------------------------------------ sigmas


def sigma_to_ve(sigma: Sigma) -> Sigma:
    """The sigma_ve with the signal-to-noise ratio of a flow sigma: sigma / (1 - sigma) (docs/method.md, section 1.1).

    Args:
        sigma: Float in [0, 1], or a tensor of values in [0, 1); a tensor is not checked.

    Returns:
        sigma_ve, in the type of `sigma`. The float 1 gives infinity: pure noise, which no finite sigma_ve is.

    Raises:
        MrFlowError: A float outside [0, 1].
    """
    if isinstance(sigma, Tensor):
        return sigma / (1.0 - sigma)
    if not 0.0 <= sigma <= 1.0:
        raise MrFlowError(f"sigma must lie between 0 and 1, got {sigma!r}; it is the fraction of noise.")
    return math.inf if sigma == 1.0 else sigma / (1.0 - sigma)


def ve_to_sigma(sigma_ve: Sigma) -> Sigma:
    """The flow sigma with the signal-to-noise ratio of a sigma_ve: sigma_ve / (1 + sigma_ve), inverse of `sigma_to_ve`.

    Args:
        sigma_ve: Float of 0 or more, infinity included, or a tensor of finite values; a tensor is not checked.

    Returns:
        sigma in [0, 1], in the type of `sigma_ve`.

    Raises:
        MrFlowError: A negative float or NaN.
    """
    if isinstance(sigma_ve, Tensor):
        return sigma_ve / (1.0 + sigma_ve)
    if not sigma_ve >= 0.0:
        raise MrFlowError(f"sigma_ve must not be negative, got {sigma_ve!r}; it is the noise's standard deviation.")
    return 1.0 if math.isinf(sigma_ve) else sigma_ve / (1.0 + sigma_ve)


def model_sigmas(sigmas: Sequence[float], prediction: Prediction, largest: float | None = None) -> tuple[float, ...]:
    """A plan's sigmas in the units of the model: unchanged for "flow", sigma_ve for the others.

    Args:
        sigmas: Flow sigmas in [0, 1].
        prediction: What the network predicts.
        largest: What pure noise (1.0) becomes: the largest sigma_ve that the model was trained with
            (`ShiftRule.largest_ve`); None: 14.6, that of SD1.5 and SDXL.

    Returns:
        As many values.

    Raises:
        MrFlowError: An unknown prediction, or a sigma outside [0, 1] for a variance-exploding model.
    """
    _check_prediction(prediction)
    if prediction == "flow":
        return tuple(float(sigma) for sigma in sigmas)
    top = scaled_linear_ve()[-1] if largest is None else largest
    return tuple(min(sigma_to_ve(float(sigma)), top) for sigma in sigmas)


# ----------------------------------------------------------------------------------------------------------- mixing


def add_noise(
    x0: Tensor,
    noise: Tensor,
    sigma: float | Tensor,
    prediction: Prediction = "flow",
    largest: float | None = None,
) -> Tensor:
    """Clean latents with noise added at the plan's flow sigma.

    "flow": (1 - sigma) x0 + sigma noise. Others: x0 + sigma_ve noise at equal signal-to-noise ratio
    (docs/method.md, section 1.1).

    Args:
        x0: Clean latents (B, ...).
        noise: Standard normal, in the shape of `x0`.
        sigma: Flow sigma in [0, 1]: a number, or (B,).
        prediction: What the network predicts.
        largest: Largest sigma_ve, as in `model_sigmas`.

    Returns:
        Noisy latents in the shape of `x0`, float32 (float64 stays float64).

    Raises:
        MrFlowError: Shapes or sigmas that do not fit, or an unknown prediction.
    """
    _check_prediction(prediction)
    if x0.shape != noise.shape:
        raise MrFlowError(f"noise must have the shape of x0, got {tuple(noise.shape)} for {tuple(x0.shape)}.")
    clean = _state(x0)
    s = _broadcast(sigma, clean)
    if not bool(((s >= 0) & (s <= 1)).all()):
        raise MrFlowError(f"sigma must lie between 0 and 1, got {sigma!r}; it is the fraction of noise.")
    mixed_in = noise.to(clean)
    if prediction == "flow":
        return (1.0 - s) * clean + s * mixed_in
    top = scaled_linear_ve()[-1] if largest is None else largest
    return clean + sigma_to_ve(s).clamp(max=top) * mixed_in


def to_denoised(output: Tensor, x: Tensor, sigma: float | Tensor, prediction: Prediction = "flow") -> Tensor:
    """The clean estimate that a network's raw output stands for.

    "flow": x - sigma v. "epsilon": x - sigma_ve eps. "v": x / (s^2 + 1) - v s / sqrt(s^2 + 1) with s = sigma_ve
    (Salimans and Ho 2022, in variance-exploding scaling). "edm": the same with the other sign of the output (Karras et
    al. 2022, table 1, for data of standard deviation 1).

    Args:
        output: What the network returned, (B, ...).
        x: The noisy latents it was evaluated at, in the same shape.
        sigma: A number or (B,), in the model's units: flow sigma for "flow", sigma_ve for the others.
        prediction: What the network predicts.

    Returns:
        Clean latents in the shape of `x`, float32 (float64 stays float64).

    Raises:
        MrFlowError: An unknown prediction, or a sigma of another shape.
    """
    _check_prediction(prediction)
    state = _state(x)
    s, raw = _broadcast(sigma, state), output.to(state)
    if prediction in ("v", "edm"):
        power = s**2 + 1.0
        slope = raw * s / power.sqrt()
        return state / power + (slope if prediction == "edm" else -slope)
    return state - s * raw


def denoised_to_velocity(denoised: Tensor, x: Tensor, sigma: float | Tensor) -> Tensor:
    """The direction dx/dsigma of the sampling path at `x`: (x - denoised) / sigma.

    For flow models this is the velocity noise - x0; for variance-exploding ones it is the noise.

    Args:
        denoised: The clean estimate, (B, ...).
        x: The noisy latents, in the same shape.
        sigma: Above 0, a number or (B,), in the model's units.

    Returns:
        In the shape of `x`, float32 (float64 stays float64).

    Raises:
        MrFlowError: A sigma of 0 or below, or of another shape.
    """
    state = _state(x)
    s = _broadcast(sigma, state)
    if not bool((s > 0).all()):
        raise MrFlowError(f"sigma must be above 0, got {sigma!r}; a clean image has no velocity.")
    return (state - denoised.to(state)) / s


# ---------------------------------------------------------------------------------------------------------- randomness


def stage_seed(seed: int, image: int, stage: int, rule: str = "offset") -> int:
    """The noise seed of one stage of one image.

    "offset": seed + image + stage, so a refine stage uses the seed after its stage 1, as the official scripts do. Image
    i + 1's stage 1 then shares a seed with image i's stage 2; the tensors differ in shape, which makes this harmless.
    "hash": 63 bits of BLAKE2 of the three numbers, unrelated for every stage and image.

    Args:
        seed: The run's seed.
        image: Number of the image in its batch, from 0.
        stage: Number of the stage, from 0.
        rule: "offset" or "hash".

    Returns:
        An integer from 0 to 2^63 - 1.

    Raises:
        MrFlowError: An unknown rule, or a negative image or stage.
    """
    if image < 0 or stage < 0:
        raise MrFlowError(f"image and stage must be 0 or more, got image {image!r} and stage {stage!r}.")
    if rule == "offset":
        return (seed + image + stage) % _SEED_RANGE
    if rule == "hash":
        digest = hashlib.blake2b(f"{seed}/{image}/{stage}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % _SEED_RANGE
    raise MrFlowError(f"seed_rule must be 'offset' or 'hash', got {rule!r}.")


def draw_noise(
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    after: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise, one sample per seed, each from its own generator.

    Drawn on the CPU in float32 and then moved, so a batch equals its images made one by one, and every device sees the
    same numbers. No global random state is read or changed.

    Args:
        shape: Of one sample, without the batch dimension.
        seeds: One per sample, at least one.
        after: Tensors of this shape to draw and discard first: numbers that were already used from the same seed.
        device: Where the noise is put.
        dtype: What it is converted to.

    Returns:
        (B, *shape).

    Raises:
        MrFlowError: No seeds.
    """
    if not seeds:
        raise MrFlowError("seeds must hold at least one seed, got none; give one seed per image.")
    samples: list[Tensor] = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(after):
            torch.randn(tuple(shape), generator=generator)
        samples.append(torch.randn(tuple(shape), generator=generator, dtype=torch.float32))
    return torch.stack(samples).to(device=device, dtype=dtype)


# -------------------------------------------------------------------------------------------------------------- helpers


def _state(x: Tensor) -> Tensor:
    """`x` in the solver's state precision: float32, or float64 where the caller already uses it."""
    return x if x.dtype == torch.float64 else x.float()


def _broadcast(sigma: float | Tensor, like: Tensor) -> Tensor:
    """`sigma`, one for the batch or one per sample, shaped to multiply `like` (B, ...)."""
    s = torch.as_tensor(sigma, dtype=like.dtype, device=like.device)
    if s.ndim == 0:
        return s
    if s.ndim != 1 or s.shape[0] not in (1, like.shape[0]):
        raise MrFlowError(f"sigma must be a number or hold one per sample, got shape {tuple(s.shape)}.")
    return s.reshape(-1, *([1] * (like.ndim - 1)))


def _check_prediction(prediction: str) -> None:
    if prediction not in get_args(Prediction):
        raise MrFlowError(f"prediction must be one of {', '.join(get_args(Prediction))}, got {prediction!r}.")
