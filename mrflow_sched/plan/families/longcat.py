"""LongCat-Image."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, HostFacts, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.shared import ASSUMED_PRESETS, DIFFUSERS, FEWER_CFG_PRESETS, sources, transformer_flop


def _host(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "LongCatImage"


_BLOCKS = "FLUX.1's blocks, 10 double and 20 single; recalled, they sum to the 6 billion weights of the report"

_LONGCAT_LINEAR, _LONGCAT_ATTENTION = transformer_flop(3072, 30)
_LONGCAT_IMAGE = Family(
    name="longcat-image",
    title="LongCat-Image",
    shift=ShiftRule("exponential"),
    guidance_kind="cfg",
    guidance=4.5,
    text_tokens=512,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_LONGCAT_LINEAR,
    attention_cost=_LONGCAT_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"LongCatImage(Edit)?Pipeline",
        positions="told",
        titles=(("LongCat-Image", "LongCatImagePipeline"),),
        tells=always,
        layout="LongCatImageLayout",
        text_outputs=("prompt_embeds", ""),
    ),
    host=_host,
    sources=sources(
        "careful",
        shift="defaults of diffusers LongCatImagePipeline: 0.5 at 256 tokens, 1.15 at 4096; its scheduler was not read",
        guidance=f"{DIFFUSERS}; ComfyUI's template has 4",
        text_tokens="padded to 512, diffusers LongCatImagePipeline",
        native_steps=f"{DIFFUSERS}; ComfyUI's template has 20",
        linear_cost=_BLOCKS,
        attention_cost=_BLOCKS,
    ),
)

FAMILIES = (_LONGCAT_IMAGE,)
