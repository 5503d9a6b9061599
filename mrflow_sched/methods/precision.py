"""Stages in fewer bits: the network of stage 1, or of the later ones, quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mrflow_sched.sampling.method import Wrapper

if TYPE_CHECKING:
    from mrflow_sched.sampling.method import StageRun

__all__ = ["StagePrecision"]


@dataclass(frozen=True)
class StagePrecision(Wrapper):
    """The network of each stage in the plan's `Stage.precision`; all else is left to `inner`.

    What an image shows is settled in stage 1, at a low size; its last digits are lost where the image is upscaled.
    """

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        """Sample the stage as the inner method does, with the network in its precision.

        Args:
            run: The stage; its engine can run it in that precision (`Capabilities.precisions`).
            latents: (B, *latent_shape), float32, at its first sigma.

        Returns:
            Clean latents in the shape of `latents`, float32.
        """
        if run.stage.precision == "own":
            return self.inner.stage(run, latents)
        engine: Any = run.engine
        return self.inner.stage(run.with_engine(engine.in_precision(run.stage.precision)), latents)
