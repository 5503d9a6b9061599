"""FLUX 3 Klein: base and distilled. diffusers has it as modular pipelines only."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from mrflow_sched.plan.families.base import Family, HostFacts, PipelineInfo, Preset, ShiftRule, always, named_distilled
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    FEWER_CFG_PRESETS,
    SOLVER_SOURCES,
    sources,
    transformer_flop,
)


def _host(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "Flux3"


def _host_distilled(facts: HostFacts) -> bool:
    named = named_distilled(facts.name)
    return _host(facts) and (facts.guidance in (None, 1) if named is None else named)


def _host_base(facts: HostFacts) -> bool:
    return _host(facts) and not _host_distilled(facts)


_PIPELINE = PipelineInfo(
    classes=r"Flux3ModularPipeline",
    positions="told",
    titles=(("FLUX 3 Klein base", "Flux3ModularPipeline"),),
    tells=always,
    layout="Flux3Layout",
    text_outputs=("prompt_embeds", "negative_prompt_embeds"),
)

_BLOCKS = "diffusers' Flux3ModularPipeline"
_MATRICES = "defaults of diffusers' Flux3Transformer2DModel (width 3072, 5 + 28 blocks)"

# Attention 4, gated MLP of width 3 (9).
_FLUX3_LINEAR, _FLUX3_ATTENTION = transformer_flop(3072, 33, matrices=13.0)
_FLUX3_KLEIN_BASE = Family(
    name="flux3-klein-base",
    title="FLUX 3 Klein base",
    latent_channels=32,
    shift=ShiftRule("static", shift=6.93),
    guidance_kind="cfg",
    guidance=3.5,
    text_tokens=80,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_FLUX3_LINEAR,
    attention_cost=_FLUX3_ATTENTION,
    pipeline=_PIPELINE,
    host=_host_base,
    sources=sources(
        "careful",
        vae_factor="diffusers AutoencoderKLFlux2, whose 2x2 packing is the patch",
        latent_channels="diffusers AutoencoderKLFlux2",
        shift=f"{_BLOCKS}: 6.93 at every size",
        guidance=f"{_BLOCKS}: 3.5; the makers' README has CFG 4; ComfyUI's template, second-hand, CFG 1 in 15 steps",
        text_tokens=f"{_BLOCKS} pads prompts to multiples of 80; a short one is assumed",
        native_steps=f"{_BLOCKS}: 50",
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

_FLUX3_KLEIN = replace(
    _FLUX3_KLEIN_BASE,
    name="flux3-klein",
    title="FLUX 3 Klein (distilled)",
    guidance_kind="none",
    guidance=1.0,
    native_steps=16,
    presets=(Preset("16+1", 16, 1, 0.12, "not measured; its own 16 steps at the low size"),),
    default_preset="16+1",
    solver="euler",
    pipeline=replace(
        _PIPELINE,
        classes=r"Flux3DistilledModularPipeline",
        positions="told",
        titles=(("FLUX 3 Klein", "Flux3DistilledModularPipeline"),),
        text_outputs=("prompt_embeds",),
    ),
    host=_host_distilled,
    sources=MappingProxyType(
        {
            **_FLUX3_KLEIN_BASE.sources,
            "guidance": "guidance is distilled away",
            "native_steps": "diffusers' Flux3DistilledModularPipeline: 16; ComfyUI's template, second-hand, has 15",
            "solver": f"{SOLVER_SOURCES['euler']}; the network is told where each step ends",
        }
    ),
)

FAMILIES = (_FLUX3_KLEIN_BASE, _FLUX3_KLEIN)
