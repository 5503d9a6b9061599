"""MOSS-Image, which hosts newer than those tried here load: it is chosen by name."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, ShiftRule
from mrflow_sched.plan.families.shared import ASSUMED_PRESETS, FEWER_CFG_PRESETS, sources, transformer_flop

_PORT = "settings that a third-party port gives as the release's, second-hand"
_MATRICES = "about 5 billion weights in 42 blocks, second-hand; 42 plain blocks of width 3072 have as many"

_MOSS_LINEAR, _MOSS_ATTENTION = transformer_flop(3072, 42)
_MOSS = Family(
    name="moss-image",
    title="MOSS-Image",
    vae_factor=16,
    patch=1,
    latent_channels=128,
    shift=ShiftRule("static", shift=5.0),
    guidance_kind="cfg",
    guidance=3.0,
    text_tokens=64,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_MOSS_LINEAR,
    attention_cost=_MOSS_ATTENTION,
    sources=sources(
        "careful",
        vae_factor="it is released with FLUX.2's VAE; hosts count that VAE's packing as part of it",
        patch="none: a token is a packed latent pixel; 4096 tokens at 1024x1024, second-hand",
        latent_channels="it is released with FLUX.2's VAE: 32, packed 2x2",
        shift=f"{_PORT}: 5",
        guidance=f"{_PORT}: 3; ComfyUI's template, second-hand, has 2.5",
        text_tokens="not measured; a short prompt is assumed",
        native_steps=f"{_PORT}: 50; ComfyUI's template, second-hand, has 25",
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

FAMILIES = (_MOSS,)
