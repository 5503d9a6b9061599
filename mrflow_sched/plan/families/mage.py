"""Microsoft's Mage-Flow and its Turbo."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from mrflow_sched.plan.families.base import Family, HostFacts, Preset, ShiftRule
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    FEWER_CFG_PRESETS,
    SOLVER_SOURCES,
    sources,
    transformer_flop,
)


def _host(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "MageFlow"


def _host_turbo(facts: HostFacts) -> bool:
    return _host(facts) and facts.distilled


def _host_base(facts: HostFacts) -> bool:
    return _host(facts) and not _host_turbo(facts)


_README = "the authors' README"
_MATRICES = "ComfyUI's class of it (width 3072, 12 blocks of two streams, MLP of width 4)"

_MAGE_LINEAR, _MAGE_ATTENTION = transformer_flop(3072, 12)
_MAGE = Family(
    name="mage-flow",
    title="Mage-Flow",
    vae_factor=16,
    patch=1,
    latent_channels=128,
    shift=ShiftRule("static", shift=6.0),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=64,
    native_steps=30,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_MAGE_LINEAR,
    attention_cost=_MAGE_ATTENTION,
    vae_cost=None,
    host=_host_base,
    sources=sources(
        "careful",
        vae_factor="ComfyUI's latent format of it: one latent pixel is 16x16 pixels",
        patch="none: a token is a latent pixel",
        latent_channels="ComfyUI's latent format of it",
        min_low_side=f"{_README}: trained from 512 to 2048",
        shift="6.0 in ComfyUI",
        guidance="ComfyUI's template, second-hand: 5",
        text_tokens="not measured; prompts are not padded, a short one is assumed",
        native_steps=f"{_README}: 30 of the base model, 20 of the aligned one",
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
        vae_cost="not counted; its authors say a twelfth to a twentieth of FLUX.2's",
    ),
)

_MAGE_TURBO = replace(
    _MAGE,
    name="mage-flow-turbo",
    title="Mage-Flow-Turbo",
    guidance_kind="none",
    guidance=1.0,
    native_steps=4,
    presets=(Preset("4+1", 4, 1, 0.12, "not measured; its own 4 steps at the low size"),),
    default_preset="4+1",
    solver="euler",
    host=_host_turbo,
    sources=MappingProxyType(
        {
            **_MAGE.sources,
            "guidance": "guidance is distilled away",
            "native_steps": f"{_README}: 4",
            "solver": SOLVER_SOURCES["euler"],
        }
    ),
)

FAMILIES = (_MAGE, _MAGE_TURBO)
