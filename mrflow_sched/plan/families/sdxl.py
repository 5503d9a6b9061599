"""Stable Diffusion XL and 1.5: variance-exploding models, expressed in flow sigma of equal signal-to-noise ratio."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from mrflow_sched.plan.families.base import Family, HostFacts, NetworkCost, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    CARD,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    POOLED_CFG_TEXT,
    sources,
)

_SD15_ENGINES = ("StableDiffusion", "StableDiffusion2", "SD15", "SD20")
# ComfyUI's names of SDXL and of the smaller networks that were distilled from it.
_SDXL_ENGINES = ("StableDiffusionXL", "SDXL", "SSD1B", "Segmind_Vega", "KOALA_700M", "KOALA_1B")


def _host_xl(facts: HostFacts) -> bool:
    marked = facts.engine in _SDXL_ENGINES or facts.is_sdxl
    return not facts.flow and marked and facts.engine not in _SD15_ENGINES


def _host_sd15(facts: HostFacts) -> bool:
    # A WebUI, which gives no configuration, has no third kind; ComfyUI has many.
    marked = facts.engine in _SD15_ENGINES or not facts.config
    return not facts.flow and marked and not _host_xl(facts)


_PIPELINE = PipelineInfo(
    classes=r"StableDiffusionXL(ControlNet|ControlNetUnion|PAG|ControlNetPAG|Adapter)?(Inpaint)?Pipeline",
    positions="none",
    titles=(("SDXL (experimental)", "StableDiffusionXLPipeline"),),
    tells=always,
    layout="StableDiffusionXLLayout",
    casts_latents=False,
    text_outputs=POOLED_CFG_TEXT,
)
_SD15_PIPELINE = PipelineInfo(
    classes=r"StableDiffusion(ControlNet|PAG|ControlNetPAG|Adapter)?(Inpaint)?Pipeline",
    positions="none",
    titles=(("SD1.5 (experimental)", "StableDiffusionPipeline"),),
    tells=always,
    layout="StableDiffusionLayout",
    casts_latents=False,
    text_outputs=("prompt_embeds", "negative_prompt_embeds"),
)

_UNET_COST = "FLOP count of diffusers' UNet2DConditionModel at five sizes, least squares; within 8 %"
SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    prediction="epsilon",
    grid=8,
    patch=1,
    latent_channels=4,
    shift=ShiftRule("scaled-linear"),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=0,
    native_steps=50,
    factor=4 / 3,
    min_low_side=768,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=3.859e8,
    attention_cost=2.341e3,
    network_cost=NetworkCost(2.567e9, 1.01e4),
    pipeline=_PIPELINE,
    host=_host_xl,
    sources=sources(
        "careful",
        prediction="epsilon; carried over at equal signal-to-noise ratio, untested (docs/method.md, section 5.1)",
        patch="none: a U-Net on latent pixels",
        shift="training betas 0.00085..0.012, scaled linear",
        guidance=DIFFUSERS,
        text_tokens="0: text enters by cross attention",
        native_steps=DIFFUSERS,
        factor="our choice, not measured: 1024 from 768, the least side that is in its range",
        min_low_side="not measured; 512 px is off its training sizes (docs/method.md, section 5.1)",
        linear_cost=_UNET_COST,
        attention_cost=_UNET_COST,
    ),
)

SD15 = replace(
    SDXL,
    name="sd15",
    title="Stable Diffusion 1.5",
    guidance=7.5,
    native_size=(512, 512),
    default_size=(1024, 1024),
    factor=2.0,
    min_low_side=512,
    linear_cost=1.672e8,
    attention_cost=7.244e3,
    network_cost=None,
    pipeline=_SD15_PIPELINE,
    host=_host_sd15,
    sources=MappingProxyType(
        {
            **SDXL.sources,
            "min_low_side": "docs/method.md, section 5.1: no use below 512 px, so targets start at 1024",
            "native_size": CARD,
            "default_size": "docs/method.md, section 5.1: targets start at 1024",
            "factor": "512, its training size, to 1024 (docs/method.md, section 5.1); not measured",
        }
    ),
)

FAMILIES = (
    SDXL,
    SD15,
)
