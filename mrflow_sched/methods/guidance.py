"""Guidance by interval: CFG between two sigmas only, set for each step inside the stage's own loop.

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
        inner: What else a run's stages are: starts, handoffs, stages without an interval.
    """

    inner: Method = field(default_factory=Plain)

    @property
    def gradients(self) -> bool:
        """As the method inside."""
        return self.inner.gradients

    def start(self, run: StageRun, image: Tensor | None) -> Tensor:
        """As the method inside."""
        return self.inner.start(run, image)

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        """The stage with its guidance at each sigma."""
        if run.stage.always_guided:
            return self.inner.stage(run, latents)
        return run.sample(latents, guidance=run.stage.guidance_at)

    def handoff(self, run: StageRun, images: Tensor) -> Tensor | None:
        """As the method inside."""
        return self.inner.handoff(run, images)
