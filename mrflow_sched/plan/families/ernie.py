"""ERNIE-Image and ERNIE-Image-Turbo."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mrflow_sched.plan.families.base import Family, HostFacts, PipelineInfo, Preset, ShiftRule
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    SOLVER_SOURCES,
    sources,
    transformer_flop,
)


def _host(facts: HostFacts) -> bool:
    return facts.flow and facts.engine.lower() in ("ernieimage", "ernie")


def _host_turbo(facts: HostFacts) -> bool:
    return _host(facts) and facts.distilled


def _host_base(facts: HostFacts) -> bool:
    return _host(facts) and not _host_turbo(facts)


def _turbo(pipe: Any) -> bool:
    # Same network, same class; the released schedulers differ: shift 3 is Turbo, 4 the base model.
    return float(pipe.scheduler.config.get("shift") or 1.0) <= 3.0


def _base(pipe: Any) -> bool:
    return not _turbo(pipe)


_PIPELINE = PipelineInfo(
    classes=r"ErnieImagePipeline",
    titles=(("ERNIE-Image", "ErnieImagePipeline"),),
    tells=_base,
    layout="ErnieImageLayout",
    text_outputs=("prompt_embeds",),
    casts_latents=False,
)
_MATRICES = "matrix sizes in the released config.json of its transformer; they sum to the 8 billion of the card"

# Attention 4, gated MLP of width 3 (9).
_ERNIE_LINEAR, _ERNIE_ATTENTION = transformer_flop(4096, 36, matrices=13.0)
_ERNIE_IMAGE = Family(
    name="ernie-image",
    title="ERNIE-Image",
    vae_factor=16,
    patch=1,
    latent_channels=128,
    shift=ShiftRule("static", shift=4.0),
    guidance_kind="cfg",
    guidance=4.0,
    text_tokens=64,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_ERNIE_LINEAR,
    attention_cost=_ERNIE_ATTENTION,
    pipeline=_PIPELINE,
    host=_host_base,
    sources=sources(
        "careful",
        vae_factor="diffusers ErnieImagePipeline, which counts the VAE's own packing as part of it",
        patch="none: a token is a packed latent pixel",
        latent_channels="diffusers ErnieImagePipeline: 32 of the VAE, packed 2x2",
        shift="4.0 in a copy of the authors' scheduler_config.json; Forge Neo and ComfyUI have 3.0",
        guidance=DIFFUSERS,
        text_tokens="not measured; prompts are not padded, a short one is assumed",
        native_steps=DIFFUSERS,
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

_ERNIE_IMAGE_TURBO = replace(
    _ERNIE_IMAGE,
    name="ernie-image-turbo",
    title="ERNIE-Image-Turbo",
    shift=ShiftRule("static", shift=3.0),
    guidance_kind="none",
    guidance=1.0,
    native_steps=8,
    presets=(Preset("8+1", 8, 1, 0.12, "not measured; its own 8 steps at the low size"),),
    default_preset="8+1",
    solver="euler",
    pipeline=replace(_PIPELINE, tells=_turbo),
    host=_host_turbo,
    sources=MappingProxyType(
        {
            **_ERNIE_IMAGE.sources,
            "shift": "3.0 in Forge Neo, whose settings are Turbo's, and in ComfyUI; its scheduler file was not read",
            "guidance": "guidance is distilled away",
            "native_steps": "its model card: 8",
            "solver": SOLVER_SOURCES["euler"],
        }
    ),
)

FAMILIES = (_ERNIE_IMAGE, _ERNIE_IMAGE_TURBO)
