"""The embedded model guided by two forwards, as families without embedded guidance are.

At an embedded scale of 1 the network predicts without guidance, with a caption or without one. It was trained to give
classifier-free guidance of these two predictions in one forward. So questions about CFG can be measured on it too.
FLUX.1's pipeline calls this true CFG.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.quality.ways import FAMILY, Way, planned
from mrflow_sched import get_family, make_plan
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

CFG = replace(get_family(FAMILY), guidance_kind="cfg")


def guided_by_two(engine: PipelineEngine) -> PipelineEngine:
    """The model of `engine` with an embedded scale of 1, guided by a second branch without a caption."""
    return PipelineEngine(engine.pipe, family=FAMILY, arguments={"guidance_scale": 1.0}, guided_by_two=True)


def guided(size: int, name: str, **numbers: Any) -> Way:
    """The staged way with guidance by two forwards, with `numbers` of `make_plan`."""
    plan = make_plan(CFG, size, size, "12+1", **numbers)
    return planned(name, "guided by two", plan, around=guided_by_two, negative="")
