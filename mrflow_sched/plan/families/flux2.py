"""FLUX.2: Klein base and distilled, dev."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mrflow_sched.plan.families.base import Family, HostFacts, PipelineInfo, Preset, ShiftRule, always, named_distilled
from mrflow_sched.plan.families.shared import (
    ASSUMED,
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    FEWER_PRESETS,
    OFFICIAL,
    SOLVER_SOURCES,
    sources,
    transformer_flop,
)


def _distilled(pipe: Any) -> bool:
    # The pipeline that caches its references' keys and values is for the distilled model only.
    return bool(pipe.config.get("is_distilled")) or type(pipe).__name__ == "Flux2KleinKVPipeline"


def _base(pipe: Any) -> bool:
    return not _distilled(pipe)


def _host_dev(facts: HostFacts) -> bool:
    # ComfyUI says how wide the network is: 3072 and 4096 are Klein's two sizes.
    said = "flux.2-dev" in facts.repository or facts.number("hidden_size") >= 6144
    return facts.flow and facts.engine == "Flux2" and said


def _host_klein(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "Flux2" and not _host_dev(facts)


def _host_distilled(facts: HostFacts) -> bool:
    named = named_distilled(facts.name)
    return _host_klein(facts) and (facts.guidance in (None, 1) if named is None else named)


def _host_base(facts: HostFacts) -> bool:
    return _host_klein(facts) and not _host_distilled(facts)


_KLEIN_PIPELINE = PipelineInfo(
    classes=r"Flux2Klein(KV|Inpaint)?Pipeline",
    positions="told",
    titles=(("FLUX.2 Klein", "Flux2KleinPipeline"),),
    tells=_base,
    layout="Flux2KleinLayout",
    text_outputs=("prompt_embeds", ""),
)

_NOMINAL = "nominal value of the official script, whose scheduler made it"
_SCRIPTS = "docs/method.md, section 1.5"

# The 4B model: 5 double and 20 single blocks, gated MLP of width 3, so 4 + 9. The 9B model's cost ratios are close.
_KLEIN_LINEAR, _KLEIN_ATTENTION = transformer_flop(3072, 25, matrices=13.0)
_KLEIN_COST = (
    "4B model: third-party ports of its configuration (width 3072, 5 + 20 blocks); the weights sum to 4 billion"
)
_FLUX2_KLEIN_BASE = Family(
    name="flux2-klein-base",
    title="FLUX.2 Klein base",
    latent_channels=32,
    shift=ShiftRule("flux2"),
    guidance_kind="cfg",
    guidance=4.0,
    text_tokens=512,
    native_steps=50,
    presets=(
        Preset(
            "12+1",
            12,
            1,
            0.12,
            f"{_NOMINAL} 0.578 ({_SCRIPTS})",
        ),
        Preset("20+1", 20, 1, 0.15, ASSUMED),
        *FEWER_CFG_PRESETS,
    ),
    solver="careful",
    linear_cost=_KLEIN_LINEAR,
    attention_cost=_KLEIN_ATTENTION,
    pipeline=_KLEIN_PIPELINE,
    host=_host_base,
    sources=sources(
        "careful",
        shift="diffusers Flux2KleinPipeline, empirical mu",
        guidance=OFFICIAL,
        text_tokens="padded to 512, diffusers Flux2KleinPipeline",
        native_steps=DIFFUSERS,
        linear_cost=_KLEIN_COST,
        attention_cost=_KLEIN_COST,
    ),
)

_FLUX2_KLEIN = replace(
    _FLUX2_KLEIN_BASE,
    name="flux2-klein",
    title="FLUX.2 Klein (distilled)",
    guidance_kind="none",
    guidance=1.0,
    native_steps=4,
    presets=(
        Preset(
            "4+1",
            4,
            1,
            0.25,
            f"{_NOMINAL} 0.770 ({_SCRIPTS})",
        ),
    ),
    default_preset="4+1",
    solver="euler",
    pipeline=replace(_KLEIN_PIPELINE, tells=_distilled),
    host=_host_distilled,
    sources=MappingProxyType(
        {
            **_FLUX2_KLEIN_BASE.sources,
            "guidance": "guidance is distilled away",
            "native_steps": OFFICIAL,
            "solver": SOLVER_SOURCES["euler"],
        }
    ),
)

# Gated MLP of width 3, so 4 + 9 as in Klein; the weights, two sets in the 8 double blocks, sum to 32 billion.
_FLUX2_LINEAR, _FLUX2_ATTENTION = transformer_flop(6144, 8 + 48, matrices=13.0)
_FLUX2_DEV = Family(
    name="flux2-dev",
    title="FLUX.2-dev",
    latent_channels=32,
    shift=ShiftRule("flux2"),
    guidance_kind="embedded",
    guidance=4.0,
    text_tokens=512,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_PRESETS,
    linear_cost=_FLUX2_LINEAR,
    attention_cost=_FLUX2_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"Flux2Pipeline",
        positions="told",
        titles=(("FLUX.2", "Flux2Pipeline"),),
        tells=always,
        layout="Flux2Layout",
        text_outputs=("prompt_embeds", ""),
    ),
    host=_host_dev,
    sources=sources(
        "multistep",
        shift="diffusers Flux2Pipeline, empirical mu",
        guidance=DIFFUSERS,
        text_tokens="padded to 512, diffusers Flux2Pipeline",
        native_steps=DIFFUSERS,
    ),
)

FAMILIES = (
    _FLUX2_KLEIN_BASE,
    _FLUX2_KLEIN,
    _FLUX2_DEV,
)
