"""A block for diffusers' modular pipelines: the loop walks a stage's own schedule.

Put it before the block that loops, and give the pipeline `stage_sigmas`:

    blocks = pipe.blocks
    core = blocks.sub_blocks["denoise"].sub_blocks
    core.insert("stage_timesteps", StageTimesteps(), list(core).index("denoise"))

`MrFlow` runs whole pipelines without it (`modular_view`). Needs a diffusers that has modular pipelines (0.35 or newer);
importing this module elsewhere raises ImportError.
"""

from __future__ import annotations

from typing import Any, cast

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler

__all__ = ["StageTimesteps"]


class StageTimesteps(ModularPipelineBlocks):
    """Makes the pipeline's `MrFlowScheduler` walk exactly `stage_sigmas`, whatever schedule an earlier block has made.

    Without `stage_sigmas` the earlier schedule stays.
    """

    @property
    def description(self) -> str:
        """What diffusers shows for the block."""
        return "Sets the schedule of one stage: exactly the given sigmas, without any shift."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The scheduler, which must be an `MrFlowScheduler`."""
        return [ComponentSpec("scheduler", MrFlowScheduler)]

    @property
    def inputs(self) -> list[InputParam]:
        """`stage_sigmas`, and the two values that the block may replace."""
        meaning = "Sigmas of the stage, falling, usually to 0: flow sigma, or sigma_ve for variance-exploding models."
        return [
            InputParam("stage_sigmas", description=meaning),
            InputParam("timesteps", description="Time given to the network at each evaluation."),
            InputParam("num_inference_steps", description="Evaluations of the loop."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """`timesteps` and `num_inference_steps`, for the loop."""
        return [
            OutputParam("timesteps", description="Time given to the network at each evaluation."),
            OutputParam("num_inference_steps", description="Evaluations of the loop."),
        ]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Set the schedule, and leave its timesteps for the loop.

        Args:
            components: The pipeline; its `scheduler` is set.
            state: The pipeline's state; `stage_sigmas` is read, `timesteps` and `num_inference_steps` are written.

        Returns:
            (components, state), as diffusers' blocks do.

        Raises:
            MrFlowError: The scheduler is of another class, or the schedule does not fall.
        """
        block = cast("Any", self).get_block_state(state)
        if block.stage_sigmas is not None:
            scheduler = components.scheduler
            if not isinstance(scheduler, MrFlowScheduler):
                raise MrFlowError(
                    f"scheduler is a {type(scheduler).__name__}; update_components with "
                    "MrFlowScheduler.from_config(scheduler.config) first."
                )
            scheduler.set_stage(block.stage_sigmas, components._execution_device)
            scheduler.set_begin_index(0)
            block.timesteps = scheduler.timesteps
            block.num_inference_steps = len(scheduler.timesteps)
        self.set_block_state(state, block)
        return components, state
