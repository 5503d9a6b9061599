"""AuraFlow."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, HostFacts, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    MASKED_CFG_TEXT,
    SCHEDULER,
    sources,
    transformer_flop,
)


def _host(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "AuraFlow"


# 4 double and 32 single blocks; the gated MLP of 8/3 width has three matrices, so 4 + 8 again.
_AURA_LINEAR, _AURA_ATTENTION = transformer_flop(3072, 36)
_AURAFLOW = Family(
    name="auraflow",
    title="AuraFlow",
    latent_channels=4,
    shift=ShiftRule("static", shift=1.73, sigma_min=0.001728738),
    guidance_kind="cfg",
    guidance=3.5,
    text_tokens=256,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_AURA_LINEAR,
    attention_cost=_AURA_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"AuraFlowPipeline",
        titles=(("AuraFlow", "AuraFlowPipeline"),),
        tells=always,
        even_list=False,
        text_outputs=MASKED_CFG_TEXT,
    ),
    host=_host,
    sources=sources(
        "careful",
        shift=f"{SCHEDULER} (1.73), recalled; diffusers ends the schedule at the shifted 1/1000",
        guidance=DIFFUSERS,
        text_tokens="padded to 256, diffusers AuraFlowPipeline",
        native_steps=DIFFUSERS,
    ),
)

FAMILIES = (_AURAFLOW,)
