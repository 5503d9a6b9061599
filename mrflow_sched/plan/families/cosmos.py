"""Cosmos-Predict2: a flow whose pipeline counts noise as a variance-exploding model does."""

from __future__ import annotations

from mrflow_sched.plan.families.base import Family, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    sources,
    transformer_flop,
)

# Attention 4, cross attention 2 (its keys and values are the text's), MLP 8.
_LINEAR, _ATTENTION = transformer_flop(2048, 28, matrices=14.0)
_COSMOS_PREDICT2 = Family(
    name="cosmos-predict2",
    title="Cosmos-Predict2",
    prediction="epsilon",
    rescaled_flow=True,
    shift=ShiftRule("edm", sigma_max=80.0, sigma_min=0.002, rho=7.0),
    guidance_kind="cfg",
    guidance=7.0,
    text_tokens=0,
    native_steps=35,
    native_size=(1360, 768),
    default_size=(1376, 768),
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_LINEAR,
    attention_cost=_ATTENTION,
    vae_cost=None,
    pipeline=PipelineInfo(
        classes=r"Cosmos2TextToImagePipeline",
        titles=(("Cosmos-Predict2", "Cosmos2TextToImagePipeline"),),
        tells=always,
        layout="CosmosLayout",
        text_outputs=("prompt_embeds", "negative_prompt_embeds"),
    ),
    sources=sources(
        "careful",
        prediction="its pipeline turns the network's flow into noise: x0 + s noise with s = sigma / (1 - sigma)",
        rescaled_flow="diffusers Cosmos2TextToImagePipeline",
        patch="diffusers CosmosTransformer3DModel (1x2x2)",
        shift="diffusers Cosmos2TextToImagePipeline: 80 to 0.002 by Karras' formula",
        guidance=f"{DIFFUSERS}; its scale g means p + g (p - n), one more than elsewhere",
        text_tokens="0: text enters by cross attention",
        native_steps=DIFFUSERS,
        default_size="native_size with sides in multiples of 32, so that half of it is on the grid",
        linear_cost="28 layers of width 2048, the 2B model; recalled",
        attention_cost="28 layers of width 2048, the 2B model; recalled",
    ),
)

FAMILIES = (_COSMOS_PREDICT2,)
