"""FLUX.1: dev, schnell and Krea."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mrflow_sched.plan.families.base import Family, HostFacts, NetworkCost, PipelineInfo, Preset, ShiftRule, never
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    CARD,
    COUNTED,
    FEWER_PRESETS,
    OFFICIAL,
    OFFICIAL_PRESETS,
    sources,
    transformer_flop,
)


def _reads_scale(pipe: Any) -> bool:
    return bool(pipe.transformer.config.guidance_embeds)


def _dev(pipe: Any) -> bool:
    # A VAE of factor 4 is the embedded model's, which otherwise has FLUX.1's layout.
    return _reads_scale(pipe) and 2 ** (len(pipe.vae.config.block_out_channels) - 1) != 4


def _schnell(pipe: Any) -> bool:
    return not _reads_scale(pipe)


def _host_schnell(facts: HostFacts) -> bool:
    said = "schnell" in f"{facts.name} {facts.repository}"
    # ComfyUI's name for every network of this layout that reads no scale, whoever's text it reads: schnell's is T5's.
    like = facts.engine == "FluxSchnell" and facts.config.get("context_in_dim", 4096) == 4096
    return facts.flow and (like or (facts.engine == "Flux" and (said or not facts.distilled_scale)))


def _host_krea(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "Flux" and not _host_schnell(facts) and "krea" in facts.name


def _host_dev(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "Flux" and not _host_schnell(facts) and not _host_krea(facts)


PIPELINE = PipelineInfo(
    classes=r"Flux(ControlNet|Control|Kontext)?(Inpaint)?Pipeline|FluxFillPipeline",
    positions="told",
    titles=(("FLUX.1", "FluxPipeline"), ("FLUX.1 Kontext", "FluxKontextPipeline")),
    tells=_dev,
    layout="FluxLayout",
    text_outputs=("prompt_embeds", "pooled_prompt_embeds", ""),
    max_sequence_length=512,
)

FLUX_LINEAR, FLUX_ATTENTION = transformer_flop(3072, 19 + 38)
_FLUX1_DEV = Family(
    name="flux1-dev",
    title="FLUX.1-dev",
    shift=ShiftRule("exponential"),
    guidance_kind="embedded",
    guidance=3.5,
    text_tokens=512,
    native_steps=50,
    presets=OFFICIAL_PRESETS + FEWER_PRESETS,
    linear_cost=FLUX_LINEAR,
    attention_cost=FLUX_ATTENTION,
    network_cost=NetworkCost(1.19e10, 1.059e5),
    pipeline=PIPELINE,
    host=_host_dev,
    sources=sources(
        "multistep",
        shift="black-forest-labs/flux sampling.py: 0.5 at 256 tokens, 1.15 at 4096",
        guidance=OFFICIAL,
        text_tokens="T5 padded to 512, diffusers FluxPipeline",
        native_steps="the paper's native baseline (docs/method.md, section 2.1)",
        linear_cost=COUNTED,
        attention_cost=COUNTED,
    ),
)

_FLUX1_KREA = replace(
    _FLUX1_DEV,
    name="flux1-krea",
    title="FLUX.1-Krea-dev",
    guidance=4.5,
    native_steps=28,
    presets=ASSUMED_PRESETS + FEWER_PRESETS,
    pipeline=replace(PIPELINE, tells=never),
    host=_host_krea,
    sources=MappingProxyType({**_FLUX1_DEV.sources, "guidance": CARD, "native_steps": CARD}),
)

_FLUX1_SCHNELL = replace(
    _FLUX1_DEV,
    name="flux1-schnell",
    title="FLUX.1-schnell",
    shift=ShiftRule("none"),
    guidance_kind="none",
    guidance=1.0,
    text_tokens=256,
    native_steps=4,
    solver="euler",
    presets=(
        Preset("4+1", 4, 1, 0.12, "not measured"),
        Preset("2+1", 2, 1, 0.12, "not measured"),
        Preset("1+1", 1, 1, 0.12, "step counts: paper (docs/method.md, section 2.2); sigma not measured"),
    ),
    default_preset="4+1",
    pipeline=replace(PIPELINE, tells=_schnell, max_sequence_length=256),
    host=_host_schnell,
    sources=sources(
        "euler",
        shift="black-forest-labs/flux sampling.py: schnell is not shifted",
        guidance="guidance is distilled away",
        text_tokens="T5 padded to 256 for schnell, black-forest-labs/flux",
        native_steps="black-forest-labs/flux: 4 for schnell",
        linear_cost=COUNTED,
        attention_cost=COUNTED,
    ),
)

FAMILIES = (
    _FLUX1_DEV,
    _FLUX1_SCHNELL,
    _FLUX1_KREA,
)
