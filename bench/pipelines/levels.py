"""Noise levels of diffusers' schedulers as flow sigmas, and Euler schedulers that walk a plan's levels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from bench.tiny.parts import diffusers


def flow_levels(scheduler: Any) -> list[float]:
    """The flow sigma at each step of a schedule that a pipeline has set.

    Args:
        scheduler: As the pipeline's call left it.

    Returns:
        One number a step, from 0 to 1: the share of noise where signal and noise sum to 1.
    """
    times = scheduler.timesteps
    if type(scheduler).__name__ == "SCMScheduler":  # angles: signal cos, noise sin
        angles = times.double()[:-1]
        return (angles.sin() / (angles.sin() + angles.cos())).tolist()
    if hasattr(scheduler, "sigmas") and len(scheduler.sigmas) >= len(times):
        sigmas = torch.as_tensor(scheduler.sigmas, dtype=torch.float64)[: len(times)]
        if scheduler.config.get("invert_sigmas"):
            sigmas = 1 - sigmas
        return (sigmas if bool((sigmas <= 1.0001).all()) and _is_flow(scheduler) else sigmas / (1 + sigmas)).tolist()
    kept = scheduler.alphas_cumprod[times.long().cpu()].double()
    noise = ((1 - kept) / kept).sqrt()
    return (noise / (1 + noise)).tolist()


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    return "FlowM" in type(scheduler).__name__ or bool(config.get("use_flow_sigmas"))


def is_plain_euler(scheduler: Any) -> bool:
    """Whether a flow pipeline's own sampler is Euler's method without noise.

    Args:
        scheduler: The pipeline's own.
    """
    return type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and not scheduler.config.get(
        "stochastic_sampling"
    )


def walking(scheduler: Any, sigmas: Sequence[float]) -> Any:
    """diffusers' Euler scheduler on given noise levels, whatever a pipeline asks it for.

    Args:
        scheduler: The pipeline's own.
        sigmas: Falling to 0: flow sigma, or sigma_ve where the model is variance exploding.

    Returns:
        The scheduler: flow matching for flow models, in angles where the pipeline counts in them, and the one of Karras
        et al. for the others.
    """
    levels = [float(each) for each in sigmas]
    if type(scheduler).__name__ == "SCMScheduler":
        return _in_angles(scheduler, levels)
    if type(scheduler).__name__ == "LCMScheduler":
        return _preserving(scheduler, levels)
    library = diffusers()
    config: Mapping[str, Any] = scheduler.config
    flow = _is_flow(scheduler) or config.get("prediction_type") == "flow_prediction"
    kind = library.FlowMatchEulerDiscreteScheduler if flow else library.EulerDiscreteScheduler

    class Walking(kind):
        init_noise_sigma = 1.0 if flow else levels[0]

        def set_timesteps(
            self,
            num_inference_steps: Any = None,
            device: Any = None,
            timesteps: Any = None,
            sigmas: Any = None,
            **_others: Any,
        ) -> None:
            self.num_inference_steps = len(levels) - 1
            self.sigmas = torch.tensor(levels, dtype=torch.float32)
            self.timesteps = self.sigmas[:-1] * 1000 if flow else _times(scheduler, levels)
            self._step_index, self._begin_index = None, 0

    walker = Walking() if flow else Walking.from_config(config)
    walker.set_timesteps()
    return walker


def _times(scheduler: Any, levels: Sequence[float]) -> Tensor:
    """Training times of sigma_ve, between the whole ones as diffusers' Euler scheduler has them."""
    kept = scheduler.alphas_cumprod.double().clamp(min=2**-24)
    trained = ((1 - kept) / kept).sqrt().log().numpy()
    times = numpy.interp(numpy.log(levels[:-1]), trained, numpy.arange(len(trained)))
    return torch.tensor(times, dtype=torch.float32)


def _preserving(scheduler: Any, levels: Sequence[float]) -> Any:
    """Euler's method on a state of unit variance, for a pipeline that hands its network the state as it is."""

    class Walking(type(scheduler)):
        def set_timesteps(
            self, num_inference_steps: Any = None, device: Any = None, original_inference_steps: Any = None, **_: Any
        ) -> None:
            self.num_inference_steps = len(levels) - 1
            self.timesteps = _times(scheduler, levels)
            self._step_index, self._begin_index = None, 0

        def step(
            self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            now, then = levels[self._step_index or 0], levels[(self._step_index or 0) + 1]
            clean = sample * math.hypot(1, now) - now * model_output
            self._step_index = (self._step_index or 0) + 1
            return (clean + then * model_output) / math.hypot(1, then), clean

    return Walking.from_config(scheduler.config)


def _in_angles(scheduler: Any, levels: Sequence[float]) -> Any:
    """SCM without its noise, which is Euler's method on the flow."""

    class Walking(type(scheduler)):
        def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **_others: Any) -> None:
            self.num_inference_steps = len(levels) - 1
            self.timesteps = torch.tensor([math.atan2(level, 1 - level) for level in levels])
            self._step_index, self._begin_index = None, 0

        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **_others: Any) -> tuple[Tensor, Tensor]:
            now, then = self.timesteps[self._step_index or 0], self.timesteps[(self._step_index or 0) + 1]
            clean = now.cos() * sample - now.sin() * model_output
            noise = now.sin() * sample + now.cos() * model_output
            self._step_index = (self._step_index or 0) + 1
            return then.cos() * clean + then.sin() * noise, clean

    return Walking.from_config(scheduler.config)
