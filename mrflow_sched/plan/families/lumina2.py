"""Lumina-Image 2.0 and Lumina-Next."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, HostFacts, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    MASKED_CFG_TEXT,
    sources,
    transformer_flop,
)


def _host(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "Lumina2"


# 26 blocks and 2 refiner blocks; 8 of 24 heads for keys and values (8/3), gated MLP of width 4 (12).
_LUMINA_LINEAR, _LUMINA_ATTENTION = transformer_flop(2304, 28, matrices=8 / 3 + 12)
_LUMINA2 = Family(
    name="lumina2",
    title="Lumina-Image 2.0",
    shift=ShiftRule("static", shift=6.0),
    guidance_kind="cfg",
    guidance=4.0,
    text_tokens=256,
    native_steps=30,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_LUMINA_LINEAR,
    attention_cost=_LUMINA_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"Lumina(2|2Text2Img)Pipeline",
        titles=(("Lumina2", "Lumina2Pipeline"),),
        tells=always,
        casts_latents=False,
        text_outputs=MASKED_CFG_TEXT,
    ),
    host=_host,
    sources=sources(
        "careful",
        shift="6.0 in third-party inference code; its scheduler file was not read",
        guidance=DIFFUSERS,
        text_tokens="padded to 256, diffusers Lumina2Pipeline",
        native_steps=DIFFUSERS,
    ),
)

_MATRICES = "Lumina-Next-SFT: 24 blocks of width 2304, 8 of 32 heads for keys and values; recalled, not read again"

# Attention to image and text (2.5 + 2), gated MLP of width 8/3 (8).
_NEXT_LINEAR, _NEXT_ATTENTION = transformer_flop(2304, 24, matrices=12.5)
_LUMINA_NEXT = Family(
    name="lumina-next",
    title="Lumina-Next",
    shift=ShiftRule("none"),
    guidance_kind="cfg",
    guidance=4.0,
    text_tokens=0,
    native_steps=30,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    latent_channels=4,
    solver="careful",
    linear_cost=_NEXT_LINEAR,
    attention_cost=_NEXT_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"Lumina(Text2Img)?Pipeline",
        titles=(("Lumina-Next", "LuminaPipeline"),),
        tells=always,
        layout="LuminaNextLayout",
        even_list=False,
        casts_latents=False,
        positive_first=True,
        text_outputs=MASKED_CFG_TEXT,
    ),
    sources=sources(
        "careful",
        shift="none, the default of diffusers' scheduler; its scheduler file was not read",
        guidance=DIFFUSERS,
        text_tokens="0: text enters by cross attention",
        native_steps=DIFFUSERS,
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

FAMILIES = (_LUMINA2, _LUMINA_NEXT)
