"""Z-Image, Z-Image-Turbo and Z-Image-Omni."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mrflow_sched.plan.families.base import (
    Family,
    HostFacts,
    NetworkCost,
    PipelineInfo,
    Preset,
    ShiftRule,
    always,
    never,
)
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    OFFICIAL,
    SCHEDULER,
    sources,
    transformer_flop,
)


def _turbo(pipe: Any) -> bool:
    # Same network, same class; the released schedulers differ: shift 3 is Turbo, 6 the base model.
    return float(pipe.scheduler.config.get("shift") or 1.0) <= 3.0


def _base(pipe: Any) -> bool:
    return not _turbo(pipe)


def _host(facts: HostFacts) -> bool:
    return facts.flow and facts.engine.lower() == "zimage"


def _host_turbo(facts: HostFacts) -> bool:
    return _host(facts) and facts.distilled


def _host_base(facts: HostFacts) -> bool:
    return _host(facts) and not _host_turbo(facts)


_PIPELINE = PipelineInfo(
    classes=r"ZImage(ControlNet)?(Inpaint)?Pipeline",
    titles=(("Z-Image", "ZImagePipeline"),),
    tells=_base,
    layout="ZImageLayout",
    text_outputs=("prompt_embeds", "negative_prompt_embeds"),
    positive_first=True,
)

# 30 blocks and 2 refiner blocks; the gated MLP of 8/3 width has three matrices, so 4 + 8 again.
_ZIMAGE_LINEAR, _ZIMAGE_ATTENTION = transformer_flop(3840, 32)
Z_IMAGE = Family(
    name="z-image",
    title="Z-Image",
    shift=ShiftRule("static", shift=6.0),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=64,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_ZIMAGE_LINEAR,
    attention_cost=_ZIMAGE_ATTENTION,
    network_cost=NetworkCost(6.15e9, 1.215e5),
    pipeline=_PIPELINE,
    host=_host_base,
    sources=sources(
        "careful",
        shift="6.0 in the released scheduler (3.0 in Turbo's), as InvokeAI's pull request 8799 tells the two apart",
        guidance=DIFFUSERS,
        text_tokens="not measured; padding is dropped, a short prompt is assumed",
        native_steps=DIFFUSERS,
    ),
)

_PORTS = "community ports (docs/method.md, section 4); the official script gives 0 or 0.2727 by diffusers version"
_Z_IMAGE_TURBO = replace(
    Z_IMAGE,
    name="z-image-turbo",
    title="Z-Image-Turbo",
    shift=ShiftRule("static", shift=3.0),
    guidance_kind="none",
    guidance=1.0,
    native_steps=9,
    presets=(Preset("8+1", 8, 1, 0.11, _PORTS), Preset("9+1", 9, 1, 0.11, _PORTS)),
    default_preset="8+1",
    solver="euler",
    pipeline=replace(_PIPELINE, tells=_turbo),
    host=_host_turbo,
    sources=sources(
        "euler",
        shift=f"{SCHEDULER}: 3.0 (docs/method.md, section 1.5)",
        guidance="guidance is distilled away (0.0 in diffusers means off; here off is 1)",
        text_tokens="not measured; padding is dropped, a short prompt is assumed",
        native_steps=OFFICIAL,
    ),
)

_Z_IMAGE_OMNI = replace(
    Z_IMAGE,
    name="z-image-omni",
    title="Z-Image-Omni",
    pipeline=replace(
        _PIPELINE,
        classes=r"ZImageOmniPipeline",
        titles=(("Z-Image-Omni", "ZImageOmniPipeline"),),
        tells=always,
        layout="ZImageOmniLayout",
    ),
    host=never,
    sources=MappingProxyType(
        {**Z_IMAGE.sources, "shift": "that of Z-Image is assumed; its scheduler file was not read"}
    ),
)

FAMILIES = (
    Z_IMAGE,
    _Z_IMAGE_TURBO,
    _Z_IMAGE_OMNI,
)
