"""HunyuanImage 2.1."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mrflow_sched.plan.families.base import Family, HostFacts, PipelineInfo, Preset, ShiftRule
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    CARD,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    SCHEDULER,
    SOLVER_SOURCES,
    sources,
    transformer_flop,
)


def _distilled(pipe: Any) -> bool:
    return bool(pipe.transformer.config.guidance_embeds)


def _base(pipe: Any) -> bool:
    return not _distilled(pipe)


def _host_distilled(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "HunyuanImage21" and bool(facts.config.get("guidance_embed"))


def _host_base(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "HunyuanImage21" and not _host_distilled(facts)


_PIPELINE = PipelineInfo(
    classes=r"HunyuanImagePipeline",
    titles=(("HunyuanImage", "HunyuanImagePipeline"),),
    tells=_base,
    layout="HunyuanImageLayout",
    text_outputs=("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2"),
)

# 20 double and 40 single blocks of a 4x MLP.
_HUNYUAN_LINEAR, _HUNYUAN_ATTENTION = transformer_flop(3584, 20 + 40)
_HUNYUAN_IMAGE = Family(
    name="hunyuan-image",
    title="HunyuanImage 2.1",
    grid=32,
    vae_factor=32,
    patch=1,
    latent_channels=64,
    shift=ShiftRule("static", shift=5.0),
    guidance_kind="cfg",
    guidance=3.5,
    text_tokens=192,
    native_size=(2048, 2048),
    native_steps=50,
    min_low_side=1024,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_HUNYUAN_LINEAR,
    attention_cost=_HUNYUAN_ATTENTION,
    vae_cost=None,
    pipeline=_PIPELINE,
    host=_host_base,
    sources=sources(
        "careful",
        patch="none: a token is a latent pixel",
        shift=f"{SCHEDULER}: 5.0; recalled, not read again",
        guidance="the pipeline's guider; recalled, not read again",
        text_tokens="128 of ByT5 and a short prompt, diffusers HunyuanImagePipeline",
        native_steps=DIFFUSERS,
        min_low_side="not measured; half of its native side",
    ),
)

_HUNYUAN_IMAGE_DISTILLED = replace(
    _HUNYUAN_IMAGE,
    name="hunyuan-image-distilled",
    title="HunyuanImage 2.1 (distilled)",
    guidance_kind="embedded",
    guidance=3.25,
    native_steps=8,
    presets=(Preset("8+1", 8, 1, 0.12, "not measured"),),
    default_preset="8+1",
    solver="euler",
    pipeline=replace(_PIPELINE, tells=_distilled),
    host=_host_distilled,
    sources=MappingProxyType(
        {
            **_HUNYUAN_IMAGE.sources,
            "guidance": DIFFUSERS,
            "native_steps": CARD,
            "solver": SOLVER_SOURCES["euler"],
        }
    ),
)

FAMILIES = (
    _HUNYUAN_IMAGE,
    _HUNYUAN_IMAGE_DISTILLED,
)
