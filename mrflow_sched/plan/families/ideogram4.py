"""Ideogram 4."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    sources,
    transformer_flop,
)

_MATRICES = "matrix sizes in diffusers' Ideogram4Transformer2DModel; its blocks sum to 8.7 of the card's 9.3 billion"

# 18 heads of 256; a gated MLP of width 8/3, so 4 + 8.
_LINEAR, _ATTENTION = transformer_flop(4608, 34)
_IDEOGRAM4 = Family(
    name="ideogram4",
    title="Ideogram 4",
    shift=ShiftRule("logit-normal", base_tokens=1024, base_shift=0.0, std=1.5),
    guidance_kind="cfg",
    guidance=7.0,
    text_tokens=2048,
    native_steps=48,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    latent_channels=32,
    native_size=(2048, 2048),
    solver="careful",
    linear_cost=_LINEAR,
    attention_cost=_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"Ideogram4Pipeline",
        positions="told",
        titles=(("Ideogram 4", "Ideogram4Pipeline"),),
        tells=always,
        layout="Ideogram4Layout",
    ),
    sources=sources(
        "careful",
        shift="diffusers Ideogram4Pipeline: mean 0 at 512 px, 0.5 more for each natural logarithm of the area, std 1.5",
        guidance="diffusers Ideogram4Pipeline: 7 at all steps but the last three, where it is 3",
        text_tokens="padded to 2048, diffusers Ideogram4Pipeline; the negative branch has none and so costs less",
        native_steps=DIFFUSERS,
        min_low_side="docs/method.md, section 5.1; the card says 256 to 2048",
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

FAMILIES = (_IDEOGRAM4,)
