"""Sana and SANA-Sprint."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from mrflow_sched.plan.families.base import Family, PipelineInfo, PixelCost, Preset, ShiftRule, VaeCost, always
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    MASKED_CFG_TEXT,
    SCHEDULER,
    SOLVER_SOURCES,
    sources,
    transformer_flop,
)

# Linear attention: no cost per pair. Per block 4 + 2 of self and cross attention and 7.5 of the gated convolution.
_SANA_LINEAR, _ = transformer_flop(2240, 20, matrices=13.5)
_SANA = Family(
    name="sana",
    title="Sana",
    grid=32,
    vae_factor=32,
    patch=1,
    latent_channels=32,
    shift=ShiftRule("static", shift=3.0),
    guidance_kind="cfg",
    guidance=4.5,
    text_tokens=0,
    native_steps=20,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_SANA_LINEAR,
    attention_cost=0.0,
    vae_cost=VaeCost(PixelCost(7.981e6, 0.0, 1666.0), PixelCost(4.94e6, 0.0, 1798.0), 3.123e8),
    pipeline=PipelineInfo(
        classes=r"Sana(PAG|ControlNet)?Pipeline",
        positions="none",
        titles=(("Sana", "SanaPipeline"),),
        tells=always,
        even_list=False,
        text_outputs=MASKED_CFG_TEXT,
    ),
    sources=sources(
        "careful",
        patch="none: a token is a latent pixel",
        shift=f"{SCHEDULER}: flow_shift 3.0; recalled, not read again",
        guidance=DIFFUSERS,
        text_tokens="0: text enters by cross attention",
        native_steps=DIFFUSERS,
        attention_cost="linear attention",
    ),
)

_SPRINT = "not measured; its own steps at the low size"
_SANA_SPRINT = replace(
    _SANA,
    name="sana-sprint",
    title="SANA-Sprint",
    shift=ShiftRule("trigflow", middle=1.3),
    guidance_kind="embedded",
    native_steps=2,
    presets=(
        Preset("2+1", 2, 1, 0.12, _SPRINT),
        Preset("1+1", 1, 1, 0.12, _SPRINT),
        Preset("4+1", 4, 1, 0.12, _SPRINT),
    ),
    default_preset="2+1",
    solver="euler",
    pipeline=PipelineInfo(
        classes=r"SanaSprintPipeline",
        positions="none",
        titles=(("SANA-Sprint", "SanaSprintPipeline"),),
        tells=always,
        layout="SanaSprintLayout",
        text_outputs=("prompt_embeds", "prompt_attention_mask"),
    ),
    sources=MappingProxyType(
        {
            **_SANA.sources,
            "shift": "diffusers SanaSprintPipeline: angles from pi/2 to 0, 1.3 in the middle of two steps",
            "solver": SOLVER_SOURCES["euler"],
        }
    ),
)

FAMILIES = (_SANA, _SANA_SPRINT)
