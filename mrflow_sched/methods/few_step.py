"""Stages with the model's few-step LoRA on, as its preset "turbo" has them: stage 1 in few steps, refining as ever."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mrflow_sched.sampling.method import Wrapper

if TYPE_CHECKING:
    from mrflow_sched.sampling.method import StageRun

__all__ = ["FewStep"]


@dataclass(frozen=True)
class FewStep(Wrapper):
    """The network with its few-step LoRA where the plan's `Stage.few_step` says so; all else is left to `inner`."""

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        """Sample the stage as the inner method does, with the LoRA on.

        Args:
            run: The stage; its engine has such a LoRA (`Capabilities.few_step`).
            latents: (B, *latent_shape), float32, at its first sigma.

        Returns:
            Clean latents in the shape of `latents`, float32.
        """
        if not run.stage.few_step:
            return self.inner.stage(run, latents)
        engine: Any = run.engine
        return self.inner.stage(run.with_engine(engine.in_few_steps()), latents)
