"""Gradients of a reward through a sampled run: a path without gradients, then a surrogate that leads them back.

`roll_out` samples and keeps the path; a `Surrogate` walks it again with a graph at a few steps; what a reward says of
the result is followed back from there. FlowBP (arXiv 2606.11075) and what came before it are settings of one path.
"""

from __future__ import annotations

from mrflow_sched.methods.reward.staged import Through, handed_over, refined_back
from mrflow_sched.methods.reward.trajectory import Leg, Rollout, Velocity, roll_out, velocity_of, walk
from mrflow_sched.methods.reward.variants import Backward, Path, Surrogate

__all__ = [
    "Backward",
    "Leg",
    "Path",
    "Rollout",
    "Surrogate",
    "Through",
    "Velocity",
    "handed_over",
    "refined_back",
    "roll_out",
    "velocity_of",
    "walk",
]
