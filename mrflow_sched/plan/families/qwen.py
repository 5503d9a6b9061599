"""Qwen-Image."""

from __future__ import annotations

from mrflow_sched.plan.families.base import (
    Family,
    HostFacts,
    NetworkCost,
    PipelineInfo,
    PixelCost,
    ShiftRule,
    VaeCost,
    always,
)
from mrflow_sched.plan.families.shared import FEWER_CFG_PRESETS, OFFICIAL, OFFICIAL_PRESETS, sources, transformer_flop


def _host(facts: HostFacts) -> bool:
    return facts.flow and facts.engine.startswith("QwenImage")


_QWEN_LINEAR, _QWEN_ATTENTION = transformer_flop(3072, 60)
_QWEN_IMAGE = Family(
    name="qwen-image",
    title="Qwen-Image",
    shift=ShiftRule("exponential", max_tokens=8192, max_shift=0.9, terminal=0.02),
    guidance_kind="cfg",
    guidance=4.0,
    text_tokens=64,
    native_steps=50,
    presets=OFFICIAL_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_QWEN_LINEAR,
    attention_cost=_QWEN_ATTENTION,
    network_cost=NetworkCost(2.043e10, 9.31e4),
    vae_cost=VaeCost(PixelCost(1.0748e7, 0.375, 3460.0), PixelCost(6.657e6, 0.375, 1935.0), 1.269e8),
    pipeline=PipelineInfo(
        classes=r"QwenImage(ControlNet)?Pipeline",
        titles=(("Qwen-Image", "QwenImagePipeline"),),
        tells=always,
        layout="QwenImageLayout",
        text_outputs=("prompt_embeds", "prompt_embeds_mask"),
    ),
    host=_host,
    sources=sources(
        "careful",
        shift="docs/method.md, section 1.5: 0.5 at 256 tokens, 0.9 at 8192, stretched to 0.02",
        guidance=OFFICIAL,
        text_tokens="not measured; prompts are not padded, a short one is assumed",
        native_steps="the paper's native baseline (docs/method.md, section 2.1)",
    ),
)

FAMILIES = (_QWEN_IMAGE,)
