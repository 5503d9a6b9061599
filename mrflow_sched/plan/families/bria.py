"""Bria: 3.2, FIBO and Fibo 2."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.flux1 import FLUX_ATTENTION
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    sources,
    transformer_flop,
)

_CARD_WEIGHTS = "billion weights in diffusers' documentation, each used once for every token; second-hand"
_PAIRS = "FLUX.1's, on whose network it is based, by the ratio of weights; not measured"
_BRIA = Family(
    name="bria",
    title="Bria 3.2",
    shift=ShiftRule("none", sigma_min=0.001, whole=1000, up=True),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=128,
    native_steps=30,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    latent_channels=4,
    solver="careful",
    linear_cost=2.0 * 4e9,
    attention_cost=FLUX_ATTENTION / 3.0,
    pipeline=PipelineInfo(
        classes=r"BriaPipeline",
        positions="told",
        titles=(("Bria 3.2", "BriaPipeline"),),
        tells=always,
        layout="BriaLayout",
        text_outputs=("prompt_embeds", "negative_prompt_embeds", ""),
    ),
    sources=sources(
        "careful",
        shift="diffusers BriaPipeline: whole training steps without dynamic shifting; its scheduler file was not read",
        guidance=DIFFUSERS,
        text_tokens="padded to 128, diffusers BriaPipeline",
        native_steps=DIFFUSERS,
        latent_channels="diffusers' test of BriaPipeline; the pipeline's own VAE holds",
        linear_cost=f"4 {_CARD_WEIGHTS}",
        attention_cost=_PAIRS,
    ),
)

_FIBO = Family(
    name="bria-fibo",
    title="Bria FIBO",
    shift=ShiftRule("exponential"),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=1500,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    vae_factor=16,
    patch=1,
    latent_channels=48,
    solver="careful",
    linear_cost=2.0 * 8e9,
    attention_cost=FLUX_ATTENTION * 2.0 / 3.0,
    vae_cost=None,
    pipeline=PipelineInfo(
        classes=r"BriaFiboPipeline",
        positions="told",
        titles=(("Bria FIBO", "BriaFiboPipeline"),),
        tells=always,
        layout="BriaFiboLayout",
    ),
    sources=sources(
        "careful",
        shift="defaults of diffusers' scheduler, whose numbers BriaFiboPipeline reads; its own file was not read",
        guidance=DIFFUSERS,
        text_tokens="not measured: the documentation speaks of captions of 1000 words and more",
        native_steps="example in diffusers' BriaFiboPipeline",
        patch="none: a token is a latent pixel",
        linear_cost=f"8 {_CARD_WEIGHTS}",
        attention_cost=_PAIRS,
    ),
)

_MATRICES = "matrix sizes in diffusers' BriaFibo2Transformer2DModel"

# 44 blocks and 2 refiner blocks; a gated MLP of width 8/3, so 4 + 8.
_LINEAR, _ATTENTION = transformer_flop(3584, 46)
_FIBO2 = Family(
    name="bria-fibo2",
    title="Bria Fibo 2",
    shift=ShiftRule("exponential"),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=256,
    native_steps=30,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    latent_channels=32,
    solver="careful",
    linear_cost=_LINEAR,
    attention_cost=_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"BriaFibo2Pipeline",
        titles=(("Bria Fibo 2", "BriaFibo2Pipeline"),),
        tells=always,
        layout="BriaFibo2Layout",
    ),
    sources=sources(
        "careful",
        shift="defaults of diffusers' scheduler, whose numbers BriaFibo2Pipeline reads; its own file was not read",
        guidance=DIFFUSERS,
        text_tokens="256 to 512 by the length of the text, diffusers BriaFibo2Transformer2DModel",
        native_steps=DIFFUSERS,
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

FAMILIES = (_BRIA, _FIBO, _FIBO2)
