"""Microsoft's Lens and Lens-Turbo."""

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
    return facts.flow and facts.engine == "Lens"


def _host_turbo(facts: HostFacts) -> bool:
    return _host(facts) and facts.distilled


def _host_base(facts: HostFacts) -> bool:
    return _host(facts) and not _host_turbo(facts)


_TEMPLATE = "ComfyUI's template, second-hand; the same in third-party scripts for its release"
_MATRICES = "ComfyUI's class of it (width 1536, 48 blocks of two streams); an MLP of width 4 is assumed"

_LENS_LINEAR, _LENS_ATTENTION = transformer_flop(1536, 48)
_LENS = Family(
    name="lens",
    title="Lens",
    vae_factor=16,
    patch=1,
    latent_channels=128,
    native_size=(1440, 1440),
    shift=ShiftRule("flux2"),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=64,
    native_steps=20,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_LENS_LINEAR,
    attention_cost=_LENS_ATTENTION,
    host=_host_base,
    sources=sources(
        "careful",
        vae_factor="ComfyUI's latent format of it, FLUX.2's, which counts the VAE's packing as part of it",
        patch="none: a token is a packed latent pixel",
        latent_channels="ComfyUI's latent format of it, FLUX.2's: 32 of the VAE, packed 2x2",
        native_size="ComfyUI's shift of it is said to be that of 1440x1440",
        shift="ComfyUI's fixed mu of 1.829 is FLUX.2's line at 1440x1440; that it holds at other sizes is assumed",
        guidance=f"{_TEMPLATE}: 5",
        text_tokens="not measured; prompts are not padded, a short one is assumed",
        native_steps=f"{_TEMPLATE}: 20",
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

_LENS_TURBO = replace(
    _LENS,
    name="lens-turbo",
    title="Lens-Turbo",
    guidance_kind="none",
    guidance=1.0,
    native_steps=4,
    presets=(Preset("4+1", 4, 1, 0.12, "not measured; its own 4 steps at the low size"),),
    default_preset="4+1",
    solver="euler",
    host=_host_turbo,
    sources=MappingProxyType(
        {
            **_LENS.sources,
            "guidance": "guidance is distilled away",
            "native_steps": f"{_TEMPLATE}: 4",
            "solver": SOLVER_SOURCES["euler"],
        }
    ),
)

FAMILIES = (_LENS, _LENS_TURBO)
