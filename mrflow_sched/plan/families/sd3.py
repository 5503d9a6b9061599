"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mrflow_sched.plan.families.base import Family, HostFacts, NetworkCost, PipelineInfo, ShiftRule
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    CARD,
    COUNTED,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    POOLED_CFG_TEXT,
    SCHEDULER,
    sources,
    transformer_flop,
)


def _large(pipe: Any) -> bool:
    # 24 layers are 3 and 3.5 medium, 38 are 3.5 large.
    return int(pipe.transformer.config.num_layers) >= 38


def _medium(pipe: Any) -> bool:
    return not _large(pipe)


def _host_large(facts: HostFacts) -> bool:
    if facts.number("depth"):
        return _host(facts) and facts.number("depth") >= 38
    said = f"{facts.name} {facts.repository}"
    return _host(facts) and "large" in said and "3.5" in said.replace("35", "3.5").replace("3_5", "3.5")


def _host_medium(facts: HostFacts) -> bool:
    return _host(facts) and not _host_large(facts)


def _host(facts: HostFacts) -> bool:
    return facts.flow and (facts.engine in ("StableDiffusion3", "SD3") or facts.is_sd3)


_PIPELINE = PipelineInfo(
    classes=r"StableDiffusion3(ControlNet|PAG)?(Inpaint|Inpainting)?Pipeline",
    titles=(("SD3, SD3.5", "StableDiffusion3Pipeline"),),
    tells=_medium,
    even_list=False,
    text_outputs=POOLED_CFG_TEXT,
)

_SD3_LINEAR, _SD3_ATTENTION = transformer_flop(1536, 24)
_SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 medium",
    shift=ShiftRule("static", shift=3.0, sigma_min=0.002994),
    guidance_kind="cfg",
    guidance=7.0,
    text_tokens=333,
    native_steps=28,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_SD3_LINEAR,
    attention_cost=_SD3_ATTENTION,
    pipeline=_PIPELINE,
    host=_host_medium,
    sources=sources(
        "careful",
        shift=f"{SCHEDULER} (3.0); diffusers ends the schedule at the shifted 1/1000",
        guidance=DIFFUSERS,
        text_tokens="77 of CLIP and 256 of T5, diffusers StableDiffusion3Pipeline",
        native_steps=DIFFUSERS,
        linear_cost=COUNTED,
        attention_cost=COUNTED,
    ),
)

_SD35_LINEAR, _SD35_ATTENTION = transformer_flop(2432, 38)
_SD35 = replace(
    _SD3,
    name="sd35",
    title="Stable Diffusion 3.5 large",
    guidance=3.5,
    linear_cost=_SD35_LINEAR,
    attention_cost=_SD35_ATTENTION,
    network_cost=NetworkCost(8.06e9, 6.25e4),
    pipeline=replace(_PIPELINE, tells=_large),
    host=_host_large,
    sources=MappingProxyType({**_SD3.sources, "guidance": CARD}),
)

FAMILIES = (
    _SD3,
    _SD35,
)
