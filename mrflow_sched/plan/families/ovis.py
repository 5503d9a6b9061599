"""Ovis-Image."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, HostFacts, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.shared import ASSUMED_PRESETS, FEWER_CFG_PRESETS, sources, transformer_flop


def _host(facts: HostFacts) -> bool:
    # ComfyUI takes it for a FLUX without guidance; its text encoder is another.
    return facts.flow and facts.engine == "FluxSchnell" and facts.number("context_in_dim") == 2048


_OVIS_LINEAR, _OVIS_ATTENTION = transformer_flop(3072, 6 + 27)
_OVIS_IMAGE = Family(
    name="ovis-image",
    title="Ovis-Image",
    shift=ShiftRule("exponential"),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=256,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_OVIS_LINEAR,
    attention_cost=_OVIS_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"OvisImagePipeline",
        positions="told",
        titles=(("Ovis-Image", "OvisImagePipeline"),),
        tells=always,
        layout="PackedLayout",
        text_outputs=("prompt_embeds", "negative_prompt_embeds", "", ""),
    ),
    host=_host,
    sources=sources(
        "careful",
        shift="defaults of diffusers OvisImagePipeline: 0.5 at 256 tokens, 1.15 at 4096; its scheduler was not read",
        guidance="example in diffusers OvisImagePipeline",
        text_tokens="padded to 256, diffusers OvisImagePipeline",
        native_steps="example in diffusers OvisImagePipeline",
    ),
)

FAMILIES = (_OVIS_IMAGE,)
