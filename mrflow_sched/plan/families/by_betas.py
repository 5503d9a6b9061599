"""Kolors, PixArt, Hunyuan-DiT and LCM: trained on betas, expressed in flow sigma of equal signal-to-noise ratio."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from mrflow_sched.plan.betas import TrainingBetas
from mrflow_sched.plan.families.base import Family, PipelineInfo, Preset, ShiftRule, always, never
from mrflow_sched.plan.families.sdxl import SD15, SDXL
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    CARD,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    MASKED_CFG_TEXT,
    POOLED_CFG_TEXT,
    SCHEDULER,
    SOLVER_SOURCES,
    sources,
    transformer_flop,
)

_UNTESTED = "carried over at equal signal-to-noise ratio, untested (docs/method.md, section 5.1)"
_CROSS = "0: text enters by cross attention"

_KOLORS = replace(
    SDXL,
    name="kolors",
    title="Kolors",
    shift=ShiftRule("betas", betas=TrainingBetas(count=1100, last=0.014)),
    pipeline=PipelineInfo(
        classes=r"Kolors(PAG)?Pipeline",
        positions="none",
        titles=(("Kolors (experimental)", "KolorsPipeline"),),
        tells=always,
        layout="StableDiffusionLayout",
        casts_latents=False,
        text_outputs=POOLED_CFG_TEXT,
    ),
    host=never,
    sources=MappingProxyType(
        {
            **SDXL.sources,
            "shift": f"{SCHEDULER}: betas 0.00085..0.014, scaled linear, 1100 training steps; recalled, not read again",
        }
    ),
)

# Attention 4, cross attention 2 (its keys and values are the text's), MLP 8.
_PIXART_LINEAR, _PIXART_ATTENTION = transformer_flop(1152, 28, matrices=14.0)
_PIXART_ALPHA = Family(
    name="pixart-alpha",
    title="PixArt-alpha",
    prediction="epsilon",
    latent_channels=4,
    shift=ShiftRule("betas", betas=TrainingBetas(first=0.0001, last=0.02, spacing="linear")),
    guidance_kind="cfg",
    guidance=4.5,
    text_tokens=0,
    native_steps=20,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_PIXART_LINEAR,
    attention_cost=_PIXART_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"PixArtAlphaPipeline",
        titles=(("PixArt-alpha (experimental)", "PixArtAlphaPipeline"),),
        tells=always,
        casts_latents=False,
        text_outputs=MASKED_CFG_TEXT,
    ),
    sources=sources(
        "careful",
        prediction=f"epsilon, its variance is cut off; {_UNTESTED}",
        shift=f"{SCHEDULER}: betas 0.0001..0.02, linear; recalled, not read again",
        guidance=DIFFUSERS,
        text_tokens=_CROSS,
        native_steps=DIFFUSERS,
    ),
)
_PIXART_SIGMA = replace(
    _PIXART_ALPHA,
    name="pixart-sigma",
    title="PixArt-Sigma",
    pipeline=PipelineInfo(
        classes=r"PixArtSigma(PAG)?Pipeline",
        titles=(("PixArt-Sigma (experimental)", "PixArtSigmaPipeline"),),
        tells=always,
        casts_latents=False,
        text_outputs=MASKED_CFG_TEXT,
    ),
)

# Attention 4, cross attention 2, MLP 8.7; half of the blocks join an earlier one's tokens (2).
_HUNYUAN_LINEAR, _HUNYUAN_ATTENTION = transformer_flop(1408, 40, matrices=15.7)
_HUNYUAN_DIT = Family(
    name="hunyuan-dit",
    title="Hunyuan-DiT",
    prediction="v",
    latent_channels=4,
    shift=ShiftRule("betas", betas=TrainingBetas(last=0.018)),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=0,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_HUNYUAN_LINEAR,
    attention_cost=_HUNYUAN_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"HunyuanDiT(PAG|ControlNet)?Pipeline",
        titles=(("Hunyuan-DiT (experimental)", "HunyuanDiTPipeline"),),
        tells=always,
        layout="HunyuanDitLayout",
        casts_latents=False,
        text_outputs=(
            "prompt_embeds",
            "negative_prompt_embeds",
            "prompt_attention_mask",
            "negative_prompt_attention_mask",
        ),
    ),
    sources=sources(
        "careful",
        prediction=f"v; {_UNTESTED}",
        shift=f"{SCHEDULER} of version 1.2: betas 0.00085..0.018, scaled linear; recalled, not read again",
        guidance=DIFFUSERS,
        text_tokens=_CROSS,
        native_steps=DIFFUSERS,
        linear_cost="40 layers of width 1408, recalled; they sum to nearly the 1.5 billion of its card",
        attention_cost="40 layers of width 1408, recalled",
    ),
)

_OWN_STEPS = "not measured; its own steps at the low size"
_LCM = replace(
    SD15,
    name="lcm",
    title="LCM",
    guidance_kind="embedded",
    guidance=8.5,
    native_steps=4,
    native_size=(768, 768),
    presets=(Preset("4+1", 4, 1, 0.12, _OWN_STEPS), Preset("8+1", 8, 1, 0.12, _OWN_STEPS)),
    default_preset="4+1",
    solver="euler",
    pipeline=PipelineInfo(
        classes=r"LatentConsistencyModelPipeline",
        positions="none",
        titles=(("LCM (experimental)", "LatentConsistencyModelPipeline"),),
        tells=always,
        layout="LatentConsistencyLayout",
        casts_latents=False,
        text_outputs=("prompt_embeds", ""),
    ),
    host=never,
    sources=MappingProxyType(
        {
            **SD15.sources,
            "native_size": CARD,
            "guidance": f"{DIFFUSERS}; the network is told the scale less 1",
            "native_steps": DIFFUSERS,
            "solver": SOLVER_SOURCES["euler"],
        }
    ),
)

FAMILIES = (_KOLORS, _PIXART_ALPHA, _PIXART_SIGMA, _HUNYUAN_DIT, _LCM)
