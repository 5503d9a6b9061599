"""Listening to a pipeline: what its call was given, and at which noise levels its network was asked."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

_TIME_NAMES = ("timestep", "timesteps", "t", "ts", "timestep_r", "time")
_NETWORKS = ("transformer", "transformer_2", "unet", "prior")
_COSTLY = (*_NETWORKS, "controlnet")


@dataclass
class Heard:
    """One run of a pipeline's loop.

    Attributes:
        arguments: What the pipeline was called with; generators as they were then.
        told: The time that the network was told first at each step of the scheduler.
        start: The latents that a stage started from, (B, C, h, w); None of a run of the pipeline by itself.
        steps: Steps of the scheduler so far.
    """

    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    told: dict[int, float] = field(default_factory=dict[int, float])
    start: Tensor | None = None
    steps: int = 0


@contextlib.contextmanager
def stages(pipe: Any) -> Iterator[list[Heard]]:
    """Note every stage that `MrFlow` runs of the pipeline, in order.

    Args:
        pipe: The pipeline.

    Yields:
        The list that the stages are added to.
    """
    heard: list[Heard] = []
    stage, call = PipelineEngine._stage, PipelineEngine._call

    def noted_stage(self: Any, latents: Tensor, *values: Any, **named: Any) -> Tensor:
        heard.append(Heard(start=latents.clone()))
        return stage(self, latents, *values, **named)

    def noted_call(self: Any, latents: Tensor, asked: Any, scheduler: Any, *values: Any) -> dict[str, Any]:
        arguments = call(self, latents, asked, scheduler, *values)
        heard[-1].arguments = copied(arguments)
        _count_steps(scheduler, heard[-1])
        return arguments

    with _hearing(pipe, heard):
        PipelineEngine._stage, PipelineEngine._call = noted_stage, noted_call  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield heard
        finally:
            PipelineEngine._stage, PipelineEngine._call = stage, call


@contextlib.contextmanager
def by_itself(pipe: Any) -> Iterator[Heard]:
    """Note what the pipeline tells its network in one call of its own.

    Args:
        pipe: The pipeline; its scheduler's `step` stays wrapped.

    Yields:
        What was heard.
    """
    heard = Heard()
    _count_steps(pipe.scheduler, heard)
    with _hearing(pipe, [heard]):
        yield heard


@contextlib.contextmanager
def _hearing(pipe: Any, heard: Sequence[Heard]) -> Iterator[None]:
    """Note the times that the networks are told, in the last of `heard`."""

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = _time_told(module, args, kwargs)
        if heard and time is not None:
            heard[-1].told.setdefault(heard[-1].steps, time)

    parts = [part for name in _NETWORKS if isinstance(part := getattr(pipe, name, None), torch.nn.Module)]
    hooks = [part.register_forward_pre_hook(before, with_kwargs=True) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call with generators in the state in which they are now.

    Args:
        arguments: By name.

    Returns:
        The same values but for the generators.
    """
    return {name: _copied(value) for name, value in arguments.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    if isinstance(value, list) and value and isinstance(value[0], torch.Generator):
        return [_copied(each) for each in value]
    return value


def _count_steps(scheduler: Any, heard: Heard) -> None:
    plain = scheduler.step

    @functools.wraps(plain)
    def step(*args: Any, **kwargs: Any) -> Any:
        heard.steps += 1
        return plain(*args, **kwargs)

    object.__setattr__(scheduler, "step", step)


def _time_told(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | None:
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    value = next((given[name] for name in _TIME_NAMES if given.get(name) is not None), None)
    return None if value is None else float(torch.as_tensor(value, dtype=torch.float64).flatten()[0])


@contextlib.contextmanager
def cheap_network(pipe: Any) -> Iterator[None]:
    """Let the network answer by what it answered the first time: loops of many steps cost next to nothing.

    Args:
        pipe: The pipeline; its networks' `forward` is replaced meanwhile.
    """
    parts = [part for name in _COSTLY if isinstance(part := getattr(pipe, name, None), torch.nn.Module)]

    def cached(plain: Any) -> Any:
        answers: dict[Any, Any] = {}

        def forward(*args: Any, **kwargs: Any) -> Any:
            shapes = tuple(_shape(each) for each in (*args, *kwargs.values()))
            if shapes not in answers:
                answers[shapes] = plain(*args, **kwargs)
            return copy.deepcopy(answers[shapes])

        return functools.wraps(plain)(forward)

    for part in parts:
        part.forward = cached(part.forward)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(_shape(each) for each in value) if isinstance(value, (list, tuple)) else type(value)
