"""Sana."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, PipelineInfo, PixelCost, ShiftRule, VaeCost, always
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    MASKED_CFG_TEXT,
    SCHEDULER,
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

FAMILIES = (_SANA,)
