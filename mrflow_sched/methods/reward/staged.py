"""From a refined image back to stage 1: what the hand-off between two stages lets through of a reward's gradient.

A staged run refines x = (1 - s) G(low) + s noise, where G decodes, upscales and encodes. Following the gradient through
G is exact and costs its memory ("vjp"); linear upsampling of the latents in its place costs nothing ("up"); "none" lets
nothing through, so that only the refine steps learn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.methods.reward.trajectory import Leg, Rollout, Velocity, euler_weights, pinned, walk

__all__ = ["Through", "handed_over", "refined_back"]

Through = Literal["none", "up", "vjp"]


def handed_over(
    low: Tensor, value: Tensor, through: Through, carry: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The encoded latents of the upscaled image, with the gradients that the hand-off lets through.

    Args:
        low: The latents of stage 1, (B, C, h, w), with a graph.
        value: What decoding, upscaling and encoding made of them, (B, C, H, W).
        through: What is let through.
        carry: For "vjp": decodes, upscales and encodes with a graph.

    Returns:
        (B, C, H, W) of the values of `value`.

    Raises:
        MrFlowError: `through` is unknown, or "vjp" without `carry`.
    """
    if through not in get_args(Through):
        raise MrFlowError(f"through must be one of {', '.join(get_args(Through))}, got {through!r}.")
    if through == "none":
        return value.detach()
    if through == "up":
        made = functional.interpolate(low, value.shape[-2:], mode="bilinear", align_corners=False)
    elif carry is None:
        raise MrFlowError("through is 'vjp', which follows gradients through the hand-off; give carry too.")
    else:
        made = carry(low)
    return pinned(made, value.detach())


def refined_back(
    rollout: Rollout, velocity: Velocity, handed: Tensor, *, coupling: float = 1.0, active: bool = True
) -> Tensor:
    """The refined latents with a graph to the refine steps and to what was handed over.

    Args:
        rollout: The refine steps as they were sampled.
        velocity: The network at the full size.
        handed: From `handed_over`.
        coupling: How much of the gradient goes on through the network's input of the first refine step, 0 to 1.
        active: The refine steps are run with a graph; False: they count as constants.

    Returns:
        (B, C, H, W) of the sampled values.
    """
    steps = range(rollout.steps)
    legs = [
        Leg(step, euler_weights(rollout.sigmas, step, step + 1), frozenset([step] if active else []), step + 1)
        for step in steps
    ]
    start = pinned((1.0 - rollout.sigmas[0]) * handed, rollout.states[0])
    return walk(rollout, velocity, legs, coupling, start=start)[0]
