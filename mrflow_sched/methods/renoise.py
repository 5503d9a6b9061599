"""Noise drawn anew after each step, as samplers of consistency-distilled models do (LCM, TCD).

A network that was distilled to jump to the image from any noise level is sampled by jumping there and adding noise of
the next level: arXiv 2303.01469, algorithm 1, and 2310.04378. Trajectory consistency (arXiv 2402.19159, "gamma") goes
only part of the way by the noise that it has, and draws the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mrflow_sched.sampling.method import Wrapper
from mrflow_sched.sampling.noise import draw_noise, model_sigmas, stage_seed

if TYPE_CHECKING:
    from mrflow_sched.sampling.method import StageRun

__all__ = ["Renoise"]

_STREAM = 1000
"""First of the numbers, one a step, that keep this noise apart from a run's other noise."""


@dataclass(frozen=True)
class Renoise(Wrapper):
    """Stage 1 with the share `Stage.renoise` of its noise drawn anew after each step; all else is left to `inner`.

    The noise of a step follows from the image's seed, so a run repeats, and a batch equals its images alone.
    """

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        """Sample stage 1 step by step.

        Args:
            run: The stage; its solver is "euler".
            latents: (B, *latent_shape), float32, at its first sigma.

        Returns:
            Clean latents in the shape of `latents`, float32.
        """
        stage = run.stage
        if not stage.renoise:
            return self.inner.stage(run, latents)
        guidance = None if stage.always_guided else stage.guidance_at
        family, state = run.engine.family, latents
        flow, largest = family.prediction == "flow", family.shift.largest_ve
        for step in range(stage.steps):
            after = run.sample(state, guidance=guidance, steps=range(step, step + 1))
            sigma, aim = stage.sigmas[step], stage.sigmas[step + 1]
            if aim == 0.0:
                return after
            seeds = [stage_seed(seed, 0, _STREAM + step, "hash") for seed in run.seeds]
            fresh = draw_noise(latents.shape[1:], seeds, device=latents.device)
            kept = (1.0 - stage.renoise) * aim
            if flow:
                slope = (state - after) / (sigma - aim)
                clean = state - sigma * slope
                reached = clean + kept * slope  # where its own noise leads: sigma `kept`
                scale = (1.0 - aim) / (1.0 - kept)
                state = scale * reached + math.sqrt(aim**2 - (scale * kept) ** 2) * fresh
                continue
            level, near, short = model_sigmas((sigma, aim, kept), family.prediction, largest)
            slope = (state - after) / (level - near)
            reached = state - (level - short) * slope
            state = reached + math.sqrt(near**2 - short**2) * fresh
        return state
