"""Anima, on the network of Cosmos-Predict2 2B. diffusers has it as a modular pipeline only."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, HostFacts, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.qwen import QWEN_VAE
from mrflow_sched.plan.families.shared import ASSUMED_PRESETS, FEWER_CFG_PRESETS, sources, transformer_flop


def _host(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "Anima"


_CARD = "the model card's 30 to 50 steps at CFG 4 to 5, second-hand; ComfyUI's template takes these values"
_MATRICES = "sizes in Forge Neo's loader (width 2048, 28 blocks); the text of the cross attention is left out"

# Self attention 4, the queries and outputs of cross attention 2, MLP of width 4 (8).
_ANIMA_LINEAR, _ANIMA_ATTENTION = transformer_flop(2048, 28, matrices=14.0)
_ANIMA = Family(
    name="anima",
    title="Anima",
    shift=ShiftRule("static", shift=3.0),
    guidance_kind="cfg",
    guidance=4.0,
    text_tokens=0,
    native_steps=30,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_ANIMA_LINEAR,
    attention_cost=_ANIMA_ATTENTION,
    vae_cost=QWEN_VAE,
    pipeline=PipelineInfo(
        classes=r"AnimaModularPipeline",
        titles=(("Anima", "AnimaModularPipeline"),),
        tells=always,
        layout="AnimaLayout",
        text_outputs=("qwen_prompt_embeds", "qwen_attention_mask", "t5_input_ids", "t5_attention_mask"),
    ),
    host=_host,
    sources=sources(
        "careful",
        shift="3.0 in Forge Neo's configuration of it and in ComfyUI; its authors publish no scheduler file",
        guidance=_CARD,
        text_tokens="0: text enters by cross attention",
        native_steps=_CARD,
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

FAMILIES = (_ANIMA,)
