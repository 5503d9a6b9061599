"""The embedded model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mrflow_sched.plan.families.base import Family, HostFacts, NetworkCost, PixelCost, Preset, ShiftRule, VaeCost
from mrflow_sched.plan.families.flux1 import PIPELINE
from mrflow_sched.plan.families.shared import sources, transformer_flop

_MEASURED = "docs/quality.md: of all start sigmas, one refine step from 0.6 is best, whatever upscales"

_TURBO = "tools/train_demo/turbo.py: the few-step LoRA is trained for four steps"


def _demo(pipe: Any) -> bool:
    scale = bool(pipe.transformer.config.guidance_embeds)
    return scale and 2 ** (len(pipe.vae.config.block_out_channels) - 1) == 4


def _host(facts: HostFacts) -> bool:
    return facts.flow and facts.engine == "DemoFlux"


# The embedded model. Its cost depends on the width of the shipped network: change both here and nowhere else.
_DEMO_LINEAR, _DEMO_ATTENTION = transformer_flop(256, 6)
_DEMO = Family(
    name="demo",
    title="embedded demo model",
    grid=8,
    vae_factor=4,
    shift=ShiftRule("exponential", base_tokens=64, max_tokens=1024),
    guidance_kind="embedded",
    guidance=3.5,
    text_tokens=32,
    native_size=(256, 256),
    native_steps=50,
    min_low_side=128,
    presets=(
        Preset("12+1", 12, 1, 0.6, _MEASURED, measured=True),
        Preset("20+1", 20, 1, 0.6, _MEASURED, measured=True),
        Preset("8+1", 8, 1, 0.6, _MEASURED, measured=True),
        Preset("6+1", 6, 1, 0.6, _MEASURED, measured=True),
        Preset("turbo", 4, 1, 0.6, _TURBO, few_step=True),
    ),
    linear_cost=_DEMO_LINEAR,
    attention_cost=_DEMO_ATTENTION,
    network_cost=NetworkCost(9.24e6, 9.36e3),
    vae_cost=VaeCost(PixelCost(7.0055e4, 0.0, 146.0), PixelCost(2.7288e4, 0.0, 102.0), 3.8e5),
    usual_upscaler="demo",
    pipeline=replace(PIPELINE, titles=(), tells=_demo, max_sequence_length=32),
    host=_host,
    sources=sources(
        "multistep",
        vae_factor="tools/train_demo",
        patch="tools/train_demo",
        latent_channels="tools/train_demo",
        shift="chosen in training: FLUX.1's 0.5 and 1.15 at the tokens of 64 px and 256 px",
        guidance="distilled in training, as FLUX.1-dev",
        usual_upscaler="the upscaler that the package ships",
        text_tokens="tools/train_demo: length of the tokenizer's output",
        native_size="tools/train_demo",
        native_steps="as FLUX.1-dev",
        factor="128 to 256",
        min_low_side="trained at 128 and 256",
    ),
)

FAMILIES = (_DEMO,)
