"""DreamLite, base and mobile."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from mrflow_sched.plan.families.base import Family, PipelineInfo, Preset, ShiftRule, always
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    SOLVER_SOURCES,
    sources,
)

_PIPELINE = PipelineInfo(
    classes=r"DreamLitePipeline",
    positions="none",
    titles=(("DreamLite", "DreamLitePipeline"),),
    tells=always,
    layout="DreamLiteLayout",
)
_WEIGHTS = "0.39 billion weights (arXiv 2603.28713), each used for a latent pixel, an empty half beside it; not counted"
_DREAMLITE = Family(
    name="dreamlite",
    title="DreamLite",
    shift=ShiftRule("exponential", max_shift=1.16),
    guidance_kind="cfg",
    guidance=3.5,
    text_tokens=0,
    native_steps=30,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    latent_channels=4,
    solver="careful",
    linear_cost=2.0 * 0.39e9 * 2.0,
    attention_cost=0.0,
    vae_cost=None,
    pipeline=_PIPELINE,
    sources=sources(
        "careful",
        shift="defaults of diffusers' DreamLitePipeline; its scheduler file was not read",
        guidance=DIFFUSERS,
        text_tokens="0: text enters by cross attention",
        native_steps=DIFFUSERS,
        patch="diffusers DreamLitePipeline counts four latent pixels as a token",
        linear_cost=_WEIGHTS,
        attention_cost="not counted",
        vae_cost="AutoencoderTiny, 1.2 million weights: not counted",
    ),
)

_DREAMLITE_MOBILE = replace(
    _DREAMLITE,
    name="dreamlite-mobile",
    title="DreamLite Mobile",
    guidance_kind="none",
    guidance=1.0,
    native_steps=4,
    presets=(Preset("4+1", 4, 1, 0.12, "not measured; its own 4 steps at the low size"),),
    default_preset="4+1",
    solver="euler",
    pipeline=replace(
        _PIPELINE,
        classes=r"DreamLiteMobilePipeline",
        positions="none",
        titles=(("DreamLite Mobile", "DreamLiteMobilePipeline"),),
        layout="DreamLiteMobileLayout",
    ),
    sources=MappingProxyType(
        {
            **_DREAMLITE.sources,
            "guidance": "guidance is distilled away",
            "native_steps": DIFFUSERS,
            "solver": SOLVER_SOURCES["euler"],
        }
    ),
)

FAMILIES = (_DREAMLITE, _DREAMLITE_MOBILE)
