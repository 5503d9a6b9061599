"""The published ways to lead a reward's gradient back, as settings of one surrogate path (`trajectory.walk`).

Which path (`Surrogate.path`) a way walks, which steps are active, with what weights, and how two legs are coupled:

=============  =========================================================  ==============================
full           every step a leg, all active, coupling 1                   backpropagation, exact
sparse         one Euler leg, K active steps                              FlowBP-Sparse
bridge         two Euler legs, K active steps, the joint among them       FlowBP-Bridge
lagrange       two legs of interpolated velocities, started anywhere      FlowBP-Lagrange
leap           the same with one velocity a leg                           LeapAlign
clean          the clean estimate of one late step                        ReFL (arXiv 2304.05977)
renoised       the last step, and re-noised copies of the result          DRaFT-LV (arXiv 2309.17400)
detached       one Euler leg that ends in an early clean estimate         DRTune (arXiv 2405.00760)
=============  =========================================================  ==============================

What equals what: sparse with only the last step active is DRaFT-1; bridge with coupling 0 is sparse;
lagrange of order 1 is leap; bridge with coupling 1 over two steps is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.methods.reward.trajectory import (
    Leg,
    Rollout,
    Velocity,
    euler_weights,
    quadrature_weights,
    walk,
)

__all__ = ["Backward", "Path", "Surrogate", "late_biased", "spread_picks"]

Path = Literal["full", "sparse", "bridge", "lagrange", "leap", "clean", "renoised", "detached"]


@dataclass(frozen=True)
class Backward:
    """The end of a surrogate path: what the reward looks at.

    Attributes:
        latents: (B, *latent_shape) with a graph; of "renoised" (B * (copies + 1), *latent_shape).
        weights: How much each row's loss counts, one per row, without a graph.
        active: The steps that were run with a graph.
    """

    latents: Tensor
    weights: Tensor
    active: tuple[int, ...]


@dataclass(frozen=True)
class Surrogate:
    """A way to lead a reward's gradient back.

    Attributes:
        path: See the table of this module.
        count: Active steps of "sparse", "bridge" and "detached".
        late: Steps are picked with a chance proportional to (i + 1) ** late; 0: all alike.
        unbiased: Weight each active step by 1 over its chance: on average "sparse" then is that of all steps active.
        rescale: How far the gradients of the active steps stand for those of all, 0 to 1 (1: their weights sum to all).
        coupling: Of two legs, 0 to 1.
        order: Velocities in a leg of "lagrange".
        least: In "lagrange" and "leap" a row counts 1 / (max(distance, least) of both legs); 0: all rows alike.
        window: "clean" picks among this share of the steps at the end, "detached" ends within it.
        copies: Re-noised copies of "renoised".

    Raises:
        MrFlowError: A value out of range.
    """

    path: Path = "bridge"
    count: int = 3
    late: float = 0.0
    unbiased: bool = False
    rescale: float = 0.0
    coupling: float = 0.5
    order: int = 3
    least: float = 0.1
    window: float = 0.4
    copies: int = 2

    def __post_init__(self) -> None:
        if self.path not in get_args(Path):
            raise MrFlowError(f"path must be one of {', '.join(get_args(Path))}, got {self.path!r}.")
        ranges = {
            "count": (1, 1000),
            "late": (0.0, 20.0),
            "rescale": (0.0, 1.0),
            "coupling": (0.0, 1.0),
            "order": (1, 8),
            "least": (0.0, 1e6),
            "window": (0.0, 1.0),
            "copies": (0, 64),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise MrFlowError(f"{name} must lie from {low} to {high}, got {getattr(self, name)}.")
        if self.unbiased and (self.path != "sparse" or self.rescale):
            raise MrFlowError("unbiased is for the path sparse, with rescale 0; leave one of them out.")

    def backward(self, rollout: Rollout, velocity: Velocity, generator: torch.Generator) -> Backward:
        """Walk the surrogate path of a sampled one.

        Args:
            rollout: The sampled path.
            velocity: The network, with gradients.
            generator: What is picked follows from it.

        Returns:
            The path's end, of the sampled values, with a graph.
        """
        if self.path == "renoised":
            return self._renoised(rollout, velocity, generator)
        legs = getattr(self, f"_{self.path}")(rollout, generator)
        coupling = {"full": 1.0, "sparse": 0.0, "clean": 0.0, "detached": 0.0}.get(self.path, self.coupling)
        latents, apart = walk(rollout, velocity, legs, coupling)
        weights = torch.ones(len(latents), device=latents.device)
        if self.path in ("lagrange", "leap") and self.least:
            weights = 1.0 / torch.stack([each.clamp(min=self.least) for each in apart]).sum(0)
        return Backward(latents, weights, tuple(sorted(step for leg in legs for step in leg.active)))

    # ------------------------------------------------------------------------------------------------------ the paths

    def _full(self, rollout: Rollout, _: torch.Generator) -> list[Leg]:
        return [
            Leg(step, euler_weights(rollout.sigmas, step, step + 1), frozenset([step]), step + 1)
            for step in range(rollout.steps)
        ]

    def _sparse(self, rollout: Rollout, generator: torch.Generator) -> list[Leg]:
        count = rollout.steps
        picked, chances = _picks(range(count), self.count, self.late, generator)
        weights = euler_weights(rollout.sigmas, 0, count)
        scales = {step: 1.0 / chances[step] for step in picked} if self.unbiased else self._scales(weights, picked)
        return [Leg(0, weights, frozenset(picked), count, scales)]

    def _bridge(self, rollout: Rollout, generator: torch.Generator) -> list[Leg]:
        count = rollout.steps
        if count < 2:
            return self._sparse(rollout, generator)
        joint = 1 + _whole(count - 1, generator)
        before = min(max(1, round(self.count * joint / count)), self.count - 1)
        first, _ = _picks(range(joint), before, self.late, generator)
        later, _ = _picks(range(joint + 1, count), self.count - before - 1, self.late, generator)
        second = [joint, *later]
        every = euler_weights(rollout.sigmas, 0, count)
        scales = self._scales(every, [*first, *second])
        legs = [(0, joint, first), (joint, count, second)]
        return [
            Leg(start, euler_weights(rollout.sigmas, start, end), frozenset(picked), end, scales)
            for start, end, picked in legs
        ]

    def _lagrange(self, rollout: Rollout, generator: torch.Generator) -> list[Leg]:
        return self._two_leaps(rollout, generator, self.order)

    def _leap(self, rollout: Rollout, generator: torch.Generator) -> list[Leg]:
        return self._two_leaps(rollout, generator, 1)

    def _two_leaps(self, rollout: Rollout, generator: torch.Generator, order: int) -> list[Leg]:
        count = rollout.steps
        if count < 2:
            return self._sparse(rollout, generator)
        start, joint = sorted(int(each) for each in torch.randperm(count, generator=generator)[:2])
        legs: list[Leg] = []
        for begin, end in ((start, joint), (joint, count)):
            weights = quadrature_weights(rollout.sigmas, begin, end, order)
            active = sorted(weights)[:2]  # the start, and the first in the middle at a quarter of its strength
            scales = self._scales(weights, active)
            scales = {step: scales.get(step, 1.0) * (1.0 if step == begin else 0.25) for step in active}
            legs.append(Leg(begin, weights, frozenset(active), end, scales))
        return legs

    def _clean(self, rollout: Rollout, generator: torch.Generator) -> list[Leg]:
        first = min(math.ceil((1 - self.window) * rollout.steps), rollout.steps - 1)
        step = first + _whole(rollout.steps - first, generator)
        return [Leg(step, {step: -rollout.sigmas[step]}, frozenset([step]), None)]

    def _detached(self, rollout: Rollout, generator: torch.Generator) -> list[Leg]:
        first = min(math.ceil((1 - self.window) * rollout.steps), rollout.steps - 1)
        stop = first + _whole(rollout.steps - first, generator)
        picked = {round(number * stop / max(self.count - 1, 1)) for number in range(self.count)} & set(range(stop + 1))
        weights = {**euler_weights(rollout.sigmas, 0, stop), stop: -rollout.sigmas[stop]}
        return [Leg(0, weights, frozenset(picked), None)]

    def _renoised(self, rollout: Rollout, velocity: Velocity, generator: torch.Generator) -> Backward:
        last, sigma = rollout.steps - 1, rollout.sigmas[-2]
        ends = [rollout.states[last]]
        for _ in range(self.copies):
            noise = torch.randn(rollout.result.shape, generator=generator).to(rollout.result)
            ends.append((1 - sigma) * rollout.result + sigma * noise)
        latents = torch.cat([state - sigma * velocity(last, state) for state in ends])
        weights = torch.full((len(latents),), 1.0 / len(ends), device=latents.device)
        return Backward(latents, weights, (last,))

    def _scales(self, weights: dict[int, float], active: Sequence[int]) -> dict[int, float]:
        if not self.rescale or not active:
            return {}
        every, kept = (sum(abs(weights[step]) for step in steps) for steps in (weights, active))
        return dict.fromkeys(active, 1.0 + self.rescale * (every / kept - 1.0)) if kept else {}


# ------------------------------------------------------------------------------------------------------------ the picks


def late_biased(steps: Sequence[int], late: float) -> Tensor:
    """The chance of each step at one pick.

    Args:
        steps: To pick from.
        late: It is proportional to the step's place, counted from 1, to this power.

    Returns:
        (n,) float64, summing to 1.
    """
    weights = torch.arange(1, len(steps) + 1, dtype=torch.float64) ** late
    return weights / weights.sum()


def spread_picks(chances: Tensor, count: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
    """Pick exactly `count` of several without repeats, each with a chance that is known.

    Systematic sampling: the chances to be picked lie end to end on a line, and points one apart fall on it.

    Args:
        chances: At one pick, (n,), summing to 1.
        count: How many; at most n.
        generator: Where the points fall follows from it.

    Returns:
        (the picked places, rising; the chance of each place to be among them, (n,): `count` times its own, at most 1).
    """
    count = min(count, len(chances))
    inside = torch.zeros_like(chances)
    sure = torch.zeros(len(chances), dtype=torch.bool)
    while True:  # what would be picked more than once is picked for sure, and the rest is shared among the others
        rest = torch.where(sure, 0.0, chances)
        inside = torch.where(sure, 1.0, (count - int(sure.sum())) * rest / rest.sum().clamp(min=1e-300))
        over = inside > 1.0 + 1e-12
        if not bool(over.any()):
            break
        sure |= over
    ends = inside.cumsum(0)
    points = torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(count)
    picked = torch.searchsorted(ends, points, right=True).clamp(max=len(chances) - 1)
    return sorted({int(each) for each in picked}), inside


def _picks(
    steps: Sequence[int], count: int, late: float, generator: torch.Generator
) -> tuple[list[int], dict[int, float]]:
    if count < 1 or not steps:
        return [], {}
    places, inside = spread_picks(late_biased(steps, late), count, generator)
    return [steps[place] for place in places], {step: float(inside[place]) for place, step in enumerate(steps)}


def _whole(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
