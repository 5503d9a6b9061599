"""One batch of a tuning run: sampled without gradients, rewarded, and the reward led back to the LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mrflow_sched.methods.reward import (
    Surrogate,
    Through,
    handed_over,
    refined_back,
    roll_out,
    velocity_of,
)
from mrflow_sched.sampling.noise import add_noise, draw_noise, stage_seed
from mrflow_sched.tuning.rewards import rewarded
from mrflow_sched.upscaling.fit import upscale_to

if TYPE_CHECKING:
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
    from mrflow_sched.measure.scores import Score
    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.upscaling.role import PixelUpscaler

__all__ = ["Batch", "Teacher"]


@dataclass(frozen=True)
class Batch:
    """Images of an update.

    Attributes:
        prompts: What each shows.
        seeds: Of each, as a run of its own would have it.
        draws: Seed of what the surrogate path picks.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    draws: int

    def parts(self, size: int) -> list[Batch]:
        """The same images, so many at once.

        Args:
            size: Most images of a part.

        Returns:
            The parts, in order.
        """
        starts = range(0, len(self.seeds), size)
        return [
            Batch(self.prompts[first : first + size], self.seeds[first : first + size], self.draws) for first in starts
        ]


@dataclass(frozen=True)
class Teacher:
    """What samples images and leads their reward back.

    Attributes:
        engine: With the LoRA on its network.
        plan: Of stage 1, whose schedule is walked in Euler's steps; with `through`, of a refine stage too.
        reward: What is raised.
        upscaler: Of the hand-off; None: Lanczos.
        through: How the reward of the final image is followed through the hand-off; None: stage 1's image is rewarded.
        target: Rewards above it count no more; None: no limit.
    """

    engine: PipelineEngine
    plan: StagedPlan
    reward: Score
    upscaler: PixelUpscaler | None
    through: Through | None
    target: float | None

    def loss(self, batch: Batch, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
        """The loss of a batch.

        Args:
            batch: What is sampled.
            surrogate: How the reward is led back.

        Returns:
            (the mean loss, with a graph; the rewards of the batch, (B,), without one).
        """
        engine, stage = self.engine, self.plan.stages[0]
        with torch.no_grad():
            text = engine.encode_text(list(batch.prompts))
        noise = self._noise(batch, 0)
        velocity = velocity_of(engine, text, stage.sigmas, stage.guidance)
        rollout = roll_out(velocity, noise, stage.sigmas)
        end = surrogate.backward(rollout, velocity, torch.Generator().manual_seed(batch.draws))
        latents = end.latents if self.through is None else self._refined(end.latents, batch, text)
        copies = len(latents) // len(batch.prompts)
        values = rewarded(self.reward, engine.decode(latents), batch.prompts * copies)
        wanted = values if self.target is None else values.clamp(max=self.target)
        rows = values.detach()[: len(batch.prompts)]
        return -(wanted * end.weights).sum() / len(batch.prompts), rows

    def _refined(self, low: Tensor, batch: Batch, text: Any) -> Tensor:
        """The refined latents of those of stage 1, with the graph that `through` lets pass."""
        engine, stage, through = self.engine, self.plan.stages[1], self.through
        assert through is not None

        def carry(latents: Tensor) -> Tensor:
            return engine.encode(upscale_to(engine.decode(latents), stage.width, stage.height, self.upscaler))

        with torch.no_grad():
            value = carry(low.detach())
            start = add_noise(value, self._noise(batch, 1), stage.sigmas[0])
            velocity = velocity_of(engine, text, stage.sigmas, stage.guidance)
            rollout = roll_out(velocity, start, stage.sigmas)
        return refined_back(rollout, velocity, handed_over(low, value, through, carry))

    def _noise(self, batch: Batch, number: int) -> Tensor:
        stage, plan = self.plan.stages[number], self.plan
        shape = self.engine.latent_shape(stage.width, stage.height)
        seeds: Sequence[int] = [stage_seed(seed, 0, number, plan.seed_rule) for seed in batch.seeds]
        return draw_noise(shape, seeds, device=self.engine.device)
