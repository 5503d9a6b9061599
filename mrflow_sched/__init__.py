"""Staged sampling for flow models: few low-resolution steps, pixel super-resolution, noise, one full-resolution step.

    import mrflow_sched as mf
    plan = mf.make_plan("flux1-dev", 1024, 1024, "12+1")
    print(plan.to_string(), plan.cost_ratio)

Names are looked up in their room when first used, so that importing the package costs nothing and needs no torch.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the user's program asks to see it

if TYPE_CHECKING:
    from mrflow_sched._runtime.errors import MrFlowError
    from mrflow_sched.apps.pipeline import MrFlow, MrFlowOutput
    from mrflow_sched.drafts import Draft, draft, finish
    from mrflow_sched.engines import Engine, MrFlowScheduler
    from mrflow_sched.plan.families import FAMILIES, Family, Preset, ShiftRule, get_family
    from mrflow_sched.plan.make import make_native_plan, make_plan
    from mrflow_sched.plan.schedule import native_sigmas, refine_sigmas
    from mrflow_sched.plan.stages import Stage, StagedPlan
    from mrflow_sched.sampler import StagedResult, sample_staged
    from mrflow_sched.upscaling.load import load_upscaler

# Public name -> the module it lives in.
_ROOMS = {
    "FAMILIES": "plan.families",
    "Family": "plan.families",
    "Preset": "plan.families",
    "ShiftRule": "plan.families",
    "get_family": "plan.families",
    "Stage": "plan",
    "StagedPlan": "plan",
    "make_native_plan": "plan",
    "make_plan": "plan",
    "native_sigmas": "plan.schedule",
    "refine_sigmas": "plan.schedule",
    "Engine": "engines",
    "MrFlow": "apps.pipeline",
    "MrFlowError": "_runtime.errors",
    "MrFlowOutput": "apps.pipeline",
    "MrFlowScheduler": "engines",
    "Draft": "drafts",
    "draft": "drafts",
    "finish": "drafts",
    "load_upscaler": "upscaling",
    "sample_staged": "sampler",
    "StagedResult": "sampler",
}

__all__ = [
    "FAMILIES",
    "Draft",
    "Engine",
    "Family",
    "MrFlow",
    "MrFlowError",
    "MrFlowOutput",
    "MrFlowScheduler",
    "Preset",
    "ShiftRule",
    "Stage",
    "StagedPlan",
    "StagedResult",
    "draft",
    "finish",
    "get_family",
    "load_upscaler",
    "make_native_plan",
    "make_plan",
    "native_sigmas",
    "refine_sigmas",
    "sample_staged",
]


def __getattr__(name: str) -> Any:
    room = _ROOMS.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
