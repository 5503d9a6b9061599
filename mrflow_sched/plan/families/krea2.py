"""Krea 2: Raw and Turbo."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mrflow_sched.plan.families.base import Family, HostFacts, PipelineInfo, Preset, ShiftRule
from mrflow_sched.plan.families.qwen import QWEN_VAE
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    FEWER_CFG_PRESETS,
    SCHEDULER,
    SOLVER_SOURCES,
    sources,
    transformer_flop,
)


def _host(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "Krea2"


def _host_turbo(facts: HostFacts) -> bool:
    return _host(facts) and facts.distilled


def _host_raw(facts: HostFacts) -> bool:
    return _host(facts) and not _host_turbo(facts)


def _distilled(pipe: Any) -> bool:
    return bool(pipe.config.get("is_distilled"))


def _raw(pipe: Any) -> bool:
    return not _distilled(pipe)


_PIPELINE = PipelineInfo(
    classes=r"Krea2Pipeline",
    positions="told",
    titles=(("Krea 2", "Krea2Pipeline"),),
    tells=_raw,
    layout="Krea2Layout",
    text_outputs=("prompt_embeds", "prompt_embeds_mask"),
)
_MATRICES = "matrix sizes in diffusers' Krea2Transformer2DModel; its weights sum to the 12.8 billion of the release"

# A quarter of the heads for keys and values, and a gate of the attention (3.5); gated MLP of width 8/3 (8).
_KREA_LINEAR, _KREA_ATTENTION = transformer_flop(6144, 28, matrices=11.5)
_KREA2 = Family(
    name="krea2",
    title="Krea 2 Raw",
    shift=ShiftRule("exponential", max_tokens=6400),
    guidance_kind="cfg",
    guidance=4.5,
    text_tokens=512,
    native_steps=52,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_KREA_LINEAR,
    attention_cost=_KREA_ATTENTION,
    vae_cost=QWEN_VAE,
    pipeline=_PIPELINE,
    host=_host_raw,
    sources=sources(
        "careful",
        shift=f"{SCHEDULER}: 0.5 at 256 tokens, 1.15 at 6400; diffusers Krea2Pipeline says the same",
        guidance="3.5 on the model card, which counts 1 less than others (diffusers Krea2Pipeline); second-hand",
        text_tokens="padded to 512, diffusers Krea2Pipeline",
        native_steps="documentation of ComfyUI: 52; diffusers' default is 28",
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

_KREA2_TURBO = replace(
    _KREA2,
    name="krea2-turbo",
    title="Krea 2 Turbo",
    shift=ShiftRule("static", shift=math.exp(1.15)),
    guidance_kind="none",
    guidance=1.0,
    native_steps=8,
    presets=(Preset("8+1", 8, 1, 0.12, "not measured; its own 8 steps at the low size"),),
    default_preset="8+1",
    solver="euler",
    pipeline=replace(_PIPELINE, tells=_distilled),
    host=_host_turbo,
    sources=MappingProxyType(
        {
            **_KREA2.sources,
            "shift": "diffusers Krea2Pipeline, is_distilled: mu is 1.15 at every size; also in Forge Neo",
            "guidance": "guidance is distilled away",
            "native_steps": "documentation of ComfyUI and of diffusers Krea2Pipeline: 8",
            "solver": SOLVER_SOURCES["euler"],
        }
    ),
)

FAMILIES = (_KREA2, _KREA2_TURBO)
