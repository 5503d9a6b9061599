"""The block that `modular_view` puts before the loop of a modular pipeline.

Needs a diffusers that has modular pipelines; importing this module elsewhere raises ImportError.
"""

from __future__ import annotations

from typing import Any, cast

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

from mrflow_sched._runtime.errors import MrFlowError

__all__ = ["StageStart"]


class StageStart(ModularPipelineBlocks):
    """Begins the loop at `start` and with the schedule that the scheduler already has, whatever earlier blocks made."""

    @property
    def description(self) -> str:
        """What diffusers shows for the block."""
        return "Begins the loop at given latents, with the schedule that the scheduler already has."

    @property
    def inputs(self) -> list[InputParam]:
        """`start`, and the latents in whose place it comes."""
        return [
            InputParam("start", required=True, description="State of the loop at the first sigma."),
            InputParam("latents", required=True, description="The noise that an earlier block drew."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """`latents`, `timesteps` and `num_inference_steps`, for the loop."""
        return [
            OutputParam("latents", description="State of the loop."),
            OutputParam("timesteps", description="Time given to the network at each evaluation."),
            OutputParam("num_inference_steps", description="Evaluations of the loop."),
        ]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Leave the loop its first state and its timesteps.

        Args:
            components: The pipeline.
            state: The pipeline's state.

        Returns:
            (components, state), as diffusers' blocks do.

        Raises:
            MrFlowError: An earlier block has made latents of another shape.
        """
        block = cast("Any", self).get_block_state(state)
        if block.start.shape != block.latents.shape:
            raise MrFlowError(
                f"the pipeline's latents have shape {tuple(block.latents.shape)} where the stage's have "
                f"{tuple(block.start.shape)}; its blocks pack them in a way that is not known."
            )
        block.latents = block.start.to(block.latents)
        components.scheduler.set_begin_index(0)
        block.timesteps = components.scheduler.timesteps
        block.num_inference_steps = len(block.timesteps)
        self.set_block_state(state, block)
        return components, state
