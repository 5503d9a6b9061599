"""Kandinsky 5 Image."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    sources,
    transformer_flop,
)

_MATRICES = "the paper (arXiv 2511.14993): 50 blocks of 5.3 billion weights, a width of about 2560; second-hand"

# Self and cross attention, and an MLP of width 4: 4 + 2 + 8.
_LINEAR, _ATTENTION = transformer_flop(2560, 50, matrices=14.0)
_KANDINSKY5 = Family(
    name="kandinsky5",
    title="Kandinsky 5 Image",
    shift=ShiftRule("static", shift=3.0),
    guidance_kind="cfg",
    guidance=3.5,
    text_tokens=0,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_LINEAR,
    attention_cost=_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"Kandinsky5T2IPipeline",
        titles=(("Kandinsky 5 Image", "Kandinsky5T2IPipeline"),),
        tells=always,
        layout="Kandinsky5Layout",
        even_list=False,
        text_outputs=("prompt_embeds_qwen", "prompt_embeds_clip", "prompt_cu_seqlens"),
    ),
    sources=sources(
        "careful",
        shift="3.0 in ComfyUI; its scheduler file was not read",
        guidance=DIFFUSERS,
        text_tokens="0: text enters by cross attention",
        native_steps=DIFFUSERS,
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

FAMILIES = (_KANDINSKY5,)
