"""Chroma."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, HostFacts, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.flux1 import FLUX_ATTENTION, FLUX_LINEAR
from mrflow_sched.plan.families.shared import ASSUMED_PRESETS, DIFFUSERS, FEWER_CFG_PRESETS, sources


def _host(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "Chroma"


_CHROMA = Family(
    name="chroma",
    title="Chroma",
    shift=ShiftRule("beta"),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=512,
    native_steps=35,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=FLUX_LINEAR,
    attention_cost=FLUX_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"Chroma(Inpaint)?Pipeline",
        positions="told",
        titles=(("Chroma", "ChromaPipeline"),),
        tells=always,
        layout="PackedLayout",
        text_outputs=(
            "prompt_embeds",
            "",
            "prompt_attention_mask",
            "negative_prompt_embeds",
            "",
            "negative_prompt_attention_mask",
        ),
    ),
    host=_host,
    sources=sources(
        "careful",
        shift="not measured; its users often take Beta 0.6/0.6 without shift; its scheduler file was not read",
        guidance=DIFFUSERS,
        text_tokens="T5 padded to 512, diffusers ChromaPipeline",
        native_steps=DIFFUSERS,
    ),
)

FAMILIES = (_CHROMA,)
