"""PRX, and PRX Pixel, which has no VAE."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    FEWER_CFG_PRESETS,
    MASKED_CFG_TEXT,
    sources,
    transformer_flop,
)

_DOCUMENTED = "table of models in diffusers' documentation: 28 steps, cfg 5.0"
_SHIFT = "3.0; recalled from the conversion script in diffusers, not read again"
_MATRICES = "matrix sizes in diffusers' PRXTransformer2DModel"

# 4 of attention, a gated MLP of width 3.5.
_LINEAR, _ATTENTION = transformer_flop(1792, 16, matrices=14.5)
_PRX = Family(
    name="prx",
    title="PRX",
    shift=ShiftRule("static", shift=3.0),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=0,
    native_steps=28,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_LINEAR,
    attention_cost=_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"PRXPipeline",
        titles=(("PRX", "PRXPipeline"),),
        tells=always,
        layout="PrxLayout",
        even_list=False,
        casts_latents=False,
        text_outputs=MASKED_CFG_TEXT,
        reads_patch=True,
    ),
    sources=sources(
        "careful",
        shift=_SHIFT,
        guidance=_DOCUMENTED,
        text_tokens="0: text is keys and values of the attention, and no tokens of its own",
        native_steps=_DOCUMENTED,
        native_size="1024 of its newest model; others are made for 256 and 512",
        patch="the network's configuration: 2 with FLUX.1's VAE",
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

_PIXEL_WEIGHTS = "7 billion weights in diffusers' documentation, each used once for every token"
_PRX_PIXEL = Family(
    name="prx-pixel",
    title="PRX Pixel",
    shift=ShiftRule("static", shift=3.0),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=0,
    native_steps=28,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    vae_factor=1,
    patch=16,
    latent_channels=3,
    solver="careful",
    linear_cost=2.0 * 7e9,
    attention_cost=0.0,
    vae_cost=None,
    pipeline=PipelineInfo(
        classes=r"PRXPixelPipeline",
        titles=(("PRX Pixel", "PRXPixelPipeline"),),
        tells=always,
        layout="PrxPixelLayout",
        even_list=False,
        casts_latents=False,
        text_outputs=MASKED_CFG_TEXT,
        reads_patch=True,
    ),
    sources=sources(
        "careful",
        shift="that of PRX is assumed; its scheduler file was not read",
        guidance=_DOCUMENTED,
        text_tokens="0: text is keys and values of the attention, and no tokens of its own",
        native_steps=_DOCUMENTED,
        vae_factor="1: pixels are the latents",
        patch="not read: 16 is assumed; the network's configuration holds",
        latent_channels="red, green and blue",
        linear_cost=_PIXEL_WEIGHTS,
        attention_cost="not counted: its width is not known",
        vae_cost="there is no VAE",
    ),
)

FAMILIES = (_PRX, _PRX_PIXEL)
