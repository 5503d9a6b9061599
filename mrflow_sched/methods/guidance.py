"""Guidance interval: CFG between two sigmas only, set for each step inside the stage's own loop.

Outside the interval the negative branch is not run, which saves a forward (Kynkaanniemi et al. 2024, arXiv 2404.07724).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mrflow_sched.sampling.method import Wrapper

if TYPE_CHECKING:
    from mrflow_sched.sampling.method import StageRun

__all__ = ["GuidanceInterval"]


@dataclass(frozen=True)
class GuidanceInterval(Wrapper):
    """CFG where a stage's `guidance_at` says so; stages that are guided throughout go to `inner`."""

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        """Sample the stage with the guidance that its interval gives at each sigma.

        Args:
            run: The stage.
            latents: (B, *latent_shape), float32, at its first sigma.

        Returns:
            Clean latents in the shape of `latents`, float32.
        """
        if run.stage.always_guided:
            return self.inner.stage(run, latents)
        return run.sample(latents, guidance=run.stage.guidance_at)
