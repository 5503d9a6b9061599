"""Methods: how a stage is sampled and how one stage becomes the next, one file each; none imports another.

`Plain`, the published method, is part of `mrflow_sched.sampling.method`; a method here is a `Wrapper` around another.
`method_of` gives the method that a plan asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mrflow_sched.methods.few_step import FewStep
from mrflow_sched.methods.guidance import GuidanceInterval
from mrflow_sched.methods.jit import Jit
from mrflow_sched.methods.precision import StagePrecision
from mrflow_sched.methods.renoise import Renoise
from mrflow_sched.methods.sparse_refine import SparseRefine, check_refine_mask
from mrflow_sched.methods.tiled import Tiled, TiledEngine
from mrflow_sched.sampling.method import Method, Plain, StageRun, Wrapper

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import StagedPlan

__all__ = [
    "FewStep",
    "GuidanceInterval",
    "Jit",
    "Method",
    "Plain",
    "Renoise",
    "SparseRefine",
    "StagePrecision",
    "StageRun",
    "Tiled",
    "TiledEngine",
    "Wrapper",
    "method_of",
]


def method_of(plan: StagedPlan, refine_mask: Any = None) -> Method:
    """The method that a plan's numbers ask for.

    Args:
        plan: Its `tile` and its stages are read.
        refine_mask: Where later stages refine (`SparseRefine.mask`); None: by the plan's own shares.

    Returns:
        `Plain`, inside `GuidanceInterval` where a stage is guided in part of its sigmas, inside `Renoise` where stage 1
        draws noise anew, inside `SparseRefine` or `Jit` where a stage runs on part of its tokens, inside `Tiled` where
        `tile` is set.

    Raises:
        MrFlowError: A mask beside what it does not go with.
    """
    method: Method = Plain()
    if not all(stage.always_guided for stage in plan.stages):
        method = GuidanceInterval(method)
    if plan.stages[0].renoise:
        method = Renoise(method)
    if refine_mask is not None:
        check_refine_mask(plan)
    if refine_mask is not None or any(stage.shares for stage in plan.stages[1:]):
        method = SparseRefine(method, mask=refine_mask)
    if plan.stages[0].shares:
        method = Jit(method)
    return Tiled(method) if plan.tile else method
