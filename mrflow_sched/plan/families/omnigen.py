"""OmniGen."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    SCHEDULER,
    sources,
    transformer_flop,
)

# Attention 4, gated MLP of 8/3 width (8).
_LINEAR, _ATTENTION = transformer_flop(3072, 32)
_OMNIGEN = Family(
    name="omnigen",
    title="OmniGen",
    latent_channels=4,
    shift=ShiftRule("none"),
    guidance_kind="cfg",
    guidance=2.5,
    text_tokens=64,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_LINEAR,
    attention_cost=_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"OmniGenPipeline",
        positions="told",
        titles=(("OmniGen", "OmniGenPipeline"),),
        tells=always,
        layout="OmniGenLayout",
        text_outputs=("prompt",),
        positive_first=True,
    ),
    sources=sources(
        "careful",
        shift=f"{SCHEDULER} (shift 1, invert_sigmas), recalled",
        guidance=DIFFUSERS,
        text_tokens="not measured; prompts are not padded, a short one is assumed",
        native_steps=DIFFUSERS,
        linear_cost="32 layers of width 3072, defaults of diffusers' class",
        attention_cost="32 layers of width 3072, defaults of diffusers' class",
    ),
)

FAMILIES = (_OMNIGEN,)
