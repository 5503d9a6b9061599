"""Guidance interval: CFG between two sigmas only, set for each step inside the stage's own loop.

Outside the interval the negative branch is not run, which saves a forward (Kynkaanniemi et al. 2024, arXiv 2404.07724).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from mrflow_sched.sampling.method import Plain

if TYPE_CHECKING:
    from mrflow_sched.sampling.method import Method, StageRun

__all__ = ["GuidanceInterval"]


@dataclass(frozen=True)
class GuidanceInterval:
    """CFG where a stage's `guidance_at` says so; stages that are guided throughout go to `inner`.

    Attributes:
        inner: The method for starts, handoffs and stages without an interval.
    """

    inner: Method = field(default_factory=Plain)

    @property
    def gradients(self) -> bool:
        """Whether the inner method records gradients."""
        return self.inner.gradients

    def start(self, run: StageRun, image: Tensor | None) -> Tensor:
        """Start as the inner method does.

        Args:
            run: The first stage.
            image: (B, 3, H, W), float32 in [0, 1]; None for pure noise.

        Returns:
            Latents (B, *latent_shape), float32, at the stage's first sigma.
        """
        return self.inner.start(run, image)

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

    def handoff(self, run: StageRun, images: Tensor) -> Tensor | None:
        """Hand over as the inner method does.

        Args:
            run: The stage that is to start.
            images: (B, 3, h, w), float32 in [0, 1].

        Returns:
            Latents at the stage's first sigma; None where it has no steps.
        """
        return self.inner.handoff(run, images)
