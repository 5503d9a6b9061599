"""A run's path without gradients, and surrogate paths that lead them back from its end to a few of its steps.

A reward of the final latents X could be followed back through every step. A surrogate (FlowBP, arXiv 2606.11075) keeps
the sampled path's values and changes what gradients flow through: some steps are run again with a graph at the states
that were sampled, the others count as constants, and at the end of every *leg* the value is pinned to the sampled one.

With sigmas s_0 > ... > s_N = 0, states x_i and velocities u_i, Euler's path is x_{i+1} = x_i - (s_i - s_{i+1}) u_i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError

if TYPE_CHECKING:
    from mrflow_sched.sampling.engine import Engine

__all__ = [
    "Leg",
    "Rollout",
    "Velocity",
    "euler_weights",
    "pinned",
    "quadrature_weights",
    "roll_out",
    "scaled",
    "velocity_of",
    "walk",
]

Velocity = Callable[[int, Tensor], Tensor]
"""(step, state (B, *latent_shape)) -> the velocity there, with a graph where gradients are recorded."""


@dataclass(frozen=True)
class Rollout:
    """A sampled path.

    Attributes:
        sigmas: N + 1 values, falling to 0.
        states: N + 1 tensors (B, *latent_shape) without a graph; the last is the result.
        velocities: N of them, at the first N states.
    """

    sigmas: tuple[float, ...]
    states: tuple[Tensor, ...]
    velocities: tuple[Tensor, ...]

    @property
    def steps(self) -> int:
        """N."""
        return len(self.velocities)

    @property
    def result(self) -> Tensor:
        """The final latents."""
        return self.states[-1]


@torch.no_grad()
def roll_out(velocity: Velocity, noise: Tensor, sigmas: Sequence[float]) -> Rollout:
    """Sample by Euler's steps and keep the path.

    Args:
        velocity: The network.
        noise: (B, *latent_shape), the state at the first sigma.
        sigmas: Falling to 0, at least two.

    Returns:
        The path.

    Raises:
        MrFlowError: The sigmas do not fall to 0.
    """
    if len(sigmas) < 2 or sigmas[-1] != 0.0 or any(a <= b for a, b in pairwise(sigmas)):
        raise MrFlowError(f"sigmas must fall to 0, got {tuple(sigmas)}.")
    states, velocities = [noise.detach()], list[Tensor]()
    for step, (sigma, after) in enumerate(pairwise(sigmas)):
        velocities.append(velocity(step, states[-1]).detach())
        states.append(states[-1] - (sigma - after) * velocities[-1])
    return Rollout(tuple(map(float, sigmas)), tuple(states), tuple(velocities))


def velocity_of(engine: Engine, text: Any, sigmas: Sequence[float], guidance: float) -> Velocity:
    """An engine's velocity along a schedule.

    Args:
        engine: A flow model whose capabilities include gradients.
        text: What its `encode_text` returned.
        sigmas: Of the steps.
        guidance: The scale; with CFG gradients flow through both branches.

    Returns:
        A velocity that keeps a graph where gradients are recorded and a weight or the state requires them.
    """

    def velocity(step: int, state: Tensor) -> Tensor:
        sigma = torch.full((len(state),), sigmas[step], device=state.device)
        return (state - engine.denoise(state, sigma, text, guidance=guidance)) / sigmas[step]

    return velocity


# ----------------------------------------------------------------------------------------------------------------- legs


@dataclass(frozen=True)
class Leg:
    """A part of a surrogate path: its end is its start and the weighted velocities of some steps.

    Attributes:
        start: The step that it starts from.
        weights: What the velocity of each of its steps counts, by step; Euler's are s_{i+1} - s_i.
        active: The steps that are run again with a graph.
        scales: By how much the gradient through an active step is multiplied; 1 where absent.
        end: Whose state its end is pinned to; None: it is not pinned.
    """

    start: int
    weights: Mapping[int, float]
    active: frozenset[int]
    end: int | None
    scales: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))


def walk(
    rollout: Rollout, velocity: Velocity, legs: Sequence[Leg], coupling: float, *, start: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The end of a surrogate path.

    Args:
        rollout: The sampled path.
        velocity: The network.
        legs: One after the other. The first starts at a sampled state, each later one where the one before ended.
        coupling: How much of the gradient at a leg's start goes on into the leg before through the network's input, 0
            to 1; all of it goes on through the state itself.
        start: The state that the first leg starts from, with the graph of what led there; None: the sampled one.

    Returns:
        (the end, (B, *latent_shape), with a graph; for each leg, how far its own end is from the sampled state, (B,),
        without one).
    """
    state = rollout.states[legs[0].start] if start is None else start
    apart: list[Tensor] = []
    for number, leg in enumerate(legs):
        total = state
        for step, weight in leg.weights.items():
            speed = rollout.velocities[step]
            if step in leg.active:
                joined = (number > 0 or start is not None) and step == leg.start
                at = scaled(state, coupling) if joined else rollout.states[step]
                speed = scaled(velocity(step, at), leg.scales.get(step, 1.0))
            total = total + weight * speed
        if leg.end is not None:
            apart.append((total - rollout.states[leg.end]).detach().abs().flatten(1).mean(1))
            total = pinned(total, rollout.states[leg.end])
        state = total
    return state, apart


def pinned(path: Tensor, value: Tensor) -> Tensor:
    """A value with the gradients of another one.

    Args:
        path: Has a graph.
        value: Of the same shape; its graph does not count.

    Returns:
        `value`, through which gradients flow as through `path`.
    """
    return path + (value - path).detach()


def scaled(value: Tensor, factor: float) -> Tensor:
    """A value with stronger or weaker gradients.

    Args:
        value: Has a graph.
        factor: 0 stops them, 1 leaves them.

    Returns:
        `value`, through which gradients flow `factor` times as strong.
    """
    return value if factor == 1.0 else value.detach() + factor * (value - value.detach())


def euler_weights(sigmas: Sequence[float], start: int, end: int) -> dict[int, float]:
    """What each step of a leg counts in Euler's path.

    Args:
        sigmas: Of the path.
        start: First step.
        end: The step that the leg leads to.

    Returns:
        The weights by step.
    """
    return {step: sigmas[step + 1] - sigmas[step] for step in range(start, end)}


def quadrature_weights(sigmas: Sequence[float], start: int, end: int, order: int) -> dict[int, float]:
    """Weights of at most `order` steps, evenly spread over a leg, that integrate polynomials in sigma exactly.

    Args:
        sigmas: Of the path.
        start: First step.
        end: The step that the leg leads to.
        order: Largest number of steps that count; 1: the first alone, a leap.

    Returns:
        The weights by step; they sum to sigmas[end] - sigmas[start].
    """
    count = min(order, end - start)
    last = end - 1
    places = [start + round(number * (last - start) / max(count - 1, 1)) for number in range(count)]
    found: dict[int, float] = {}
    for place in dict.fromkeys(places):
        polynomial, others = torch.ones(1, dtype=torch.float64), [each for each in places if each != place]
        for other in others:  # times (sigma - sigma_other) / (sigma_place - sigma_other); coefficients rise in power
            gap = sigmas[place] - sigmas[other]
            risen = torch.cat([torch.zeros(1, dtype=torch.float64), polynomial])
            lowered = torch.cat([polynomial, torch.zeros(1, dtype=torch.float64)])
            polynomial = (risen - sigmas[other] * lowered) / gap
        powers = torch.arange(1, len(polynomial) + 1, dtype=torch.float64)
        ends = sigmas[end] ** powers - sigmas[start] ** powers
        found[place] = float((polynomial * ends / powers).sum())
    return found
