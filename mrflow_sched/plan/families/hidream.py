"""HiDream-I1."""

from __future__ import annotations

import re
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mrflow_sched.plan.families.base import Family, HostFacts, PipelineInfo, Preset, ShiftRule
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    CARD,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    SCHEDULER,
    SOLVER_SOURCES,
    sources,
    transformer_flop,
)


def _distilled(pipe: Any) -> bool:
    # The distilled ones are released with the scheduler of consistency models.
    return "LCM" in type(pipe.scheduler).__name__


def _full(pipe: Any) -> bool:
    return not _distilled(pipe)


def _host(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "HiDream"


def _host_distilled(facts: HostFacts) -> bool:
    # One network: the names are hidream_i1_full, _dev and _fast.
    if re.search(r"full|(?<![a-z])(dev|fast)(?![a-z])", facts.name):
        return _host(facts) and "full" not in facts.name
    return _host(facts) and facts.guidance == 1


def _host_full(facts: HostFacts) -> bool:
    return _host(facts) and not _host_distilled(facts)


_PIPELINE = PipelineInfo(
    classes=r"HiDreamImagePipeline",
    positions="told",
    titles=(("HiDream", "HiDreamImagePipeline"),),
    tells=_full,
    layout="HiDreamLayout",
    even_list=False,
    casts_latents=False,
    text_outputs=(
        "prompt_embeds_t5",
        "negative_prompt_embeds_t5",
        "prompt_embeds_llama3",
        "negative_prompt_embeds_llama3",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
)

# Per block: attention 4, two of four experts and the shared one of half width, gated: 8 + 8 + 4.
_HIDREAM_LINEAR, _HIDREAM_ATTENTION = transformer_flop(2560, 16 + 32, matrices=24.0)
_HIDREAM = Family(
    name="hidream",
    title="HiDream-I1",
    shift=ShiftRule("static", shift=3.0),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=256,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_HIDREAM_LINEAR,
    attention_cost=_HIDREAM_ATTENTION,
    pipeline=_PIPELINE,
    host=_host_full,
    sources=sources(
        "careful",
        shift=f"{SCHEDULER} of Full: flow_shift 3.0; recalled, not read again",
        guidance=DIFFUSERS,
        text_tokens="128 each of T5 and Llama, diffusers HiDreamImagePipeline",
        native_steps=DIFFUSERS,
    ),
)

_HIDREAM_DEV = replace(
    _HIDREAM,
    name="hidream-dev",
    title="HiDream-I1 Dev and Fast",
    shift=ShiftRule("static", shift=6.0),
    guidance_kind="none",
    guidance=1.0,
    native_steps=28,
    presets=(Preset("12+1", 12, 1, 0.12, "not measured"), Preset("20+1", 20, 1, 0.15, "not measured")),
    solver="euler",
    pipeline=replace(_PIPELINE, tells=_distilled),
    host=_host_distilled,
    sources=MappingProxyType(
        {
            **_HIDREAM.sources,
            "shift": "Dev's scheduler: 6.0, Fast's 3.0; recalled, not read again",
            "guidance": "guidance is distilled away (0.0 in diffusers means off; here off is 1)",
            "native_steps": CARD,
            "solver": SOLVER_SOURCES["euler"],
        }
    ),
)

FAMILIES = (
    _HIDREAM,
    _HIDREAM_DEV,
)
