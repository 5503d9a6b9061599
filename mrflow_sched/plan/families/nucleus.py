"""Nucleus-Image."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.qwen import QWEN_VAE
from mrflow_sched.plan.families.shared import ASSUMED_PRESETS, DIFFUSERS, FEWER_CFG_PRESETS, sources

_NUCLEUS_IMAGE = Family(
    name="nucleus-image",
    title="Nucleus-Image",
    shift=ShiftRule("exponential"),
    guidance_kind="cfg",
    guidance=4.0,
    text_tokens=0,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=4.0e9,
    attention_cost=4.0 * 24 * 2048,
    vae_cost=QWEN_VAE,
    pipeline=PipelineInfo(
        classes=r"NucleusMoEImagePipeline",
        titles=(("Nucleus-Image", "NucleusMoEImagePipeline"),),
        tells=always,
        layout="NucleusImageLayout",
        text_outputs=("prompt_embeds", "prompt_embeds_mask"),
    ),
    sources=sources(
        "careful",
        shift="defaults of NucleusMoEImagePipeline: 0.5 at 256 tokens, 1.15 at 4096; its scheduler was not read",
        guidance=DIFFUSERS,
        text_tokens="text enters by cross attention (diffusers NucleusMoEImagePipeline)",
        native_steps=DIFFUSERS,
        linear_cost="two FLOP for each of the 2 billion weights that meet a token (its model card)",
        attention_cost="24 blocks of width 2048, the defaults of the diffusers class",
    ),
)

FAMILIES = (_NUCLEUS_IMAGE,)
