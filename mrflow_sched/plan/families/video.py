"""Models of videos, of which one frame is made as a picture: Wan, HunyuanVideo, LTX-Video. Experimental.

Stage 1 has the size of a video that the model was trained on. That a frame alone looks as good as one of a video is
nowhere said; nothing here was measured on pictures.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mrflow_sched.plan.families.base import Family, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    FEWER_PRESETS,
    MASKED_CFG_TEXT,
    SCHEDULER,
    sources,
    transformer_flop,
)

_TRAINED = "a size of the videos that the model was trained on"
_TWICE = "twice native_size, so that stage 1 has a trained size"
_MATRICES = "matrix sizes in the diffusers configuration of the largest model"


def _experts(pipe: Any) -> bool:
    """Two networks that share the noise levels: Wan 2.2 A14B."""
    return getattr(pipe, "transformer_2", None) is not None


def _one_network(pipe: Any) -> bool:
    return not _experts(pipe)


_WAN_PIPELINE = PipelineInfo(
    classes=r"(Wan|SkyReelsV2)Pipeline",
    titles=(("Wan", "WanPipeline"),),
    tells=_one_network,
    layout="WanLayout",
    text_outputs=("prompt_embeds", "negative_prompt_embeds"),
    experimental=True,
)

# Self attention 4, the queries and outputs of cross attention 2, MLP of width 2.7 (5.4).
_WAN_LINEAR, _WAN_ATTENTION = transformer_flop(5120, 40, matrices=11.4)
_WAN = Family(
    name="wan",
    title="Wan 2.1",
    shift=ShiftRule("static", shift=3.0),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=0,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    native_size=(832, 480),
    default_size=(1664, 960),
    min_low_side=480,
    solver="careful",
    linear_cost=_WAN_LINEAR,
    attention_cost=_WAN_ATTENTION,
    vae_cost=None,
    pipeline=_WAN_PIPELINE,
    sources=sources(
        "careful",
        shift=f"{SCHEDULER}: 3.0, for 480 lines; diffusers WanPipeline advises 5.0 for 720",
        guidance=DIFFUSERS,
        text_tokens="0: text enters by cross attention",
        native_steps=DIFFUSERS,
        native_size=f"{_TRAINED}; default of the diffusers 0.42 pipeline",
        default_size=_TWICE,
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

_WAN22 = replace(
    _WAN,
    name="wan-2.2",
    title="Wan 2.2",
    guidance=4.0,
    native_steps=40,
    pipeline=replace(_WAN_PIPELINE, tells=_experts),
    sources=MappingProxyType(
        {
            **_WAN.sources,
            "guidance": "4.0 on the model card of A14B, with 3.0 for its second network (guidance_scale_2); recalled",
            "native_steps": "40 on the model card of A14B; recalled",
        }
    ),
)

# Gated 20 double and 40 single blocks of width 3072: attention 4, MLP of width 4 (8).
_HUNYUAN_LINEAR, _HUNYUAN_ATTENTION = transformer_flop(3072, 20 + 40)
_HUNYUAN_VIDEO = Family(
    name="hunyuan-video",
    title="HunyuanVideo",
    shift=ShiftRule("static", shift=7.0),
    guidance_kind="embedded",
    guidance=6.0,
    text_tokens=256,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_PRESETS,
    native_size=(960, 544),
    default_size=(1920, 1088),
    linear_cost=_HUNYUAN_LINEAR,
    attention_cost=_HUNYUAN_ATTENTION,
    vae_cost=None,
    pipeline=PipelineInfo(
        classes=r"HunyuanVideoPipeline",
        titles=(("HunyuanVideo", "HunyuanVideoPipeline"),),
        tells=always,
        layout="HunyuanVideoLayout",
        text_outputs=("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
        experimental=True,
    ),
    sources=sources(
        "multistep",
        shift=f"{SCHEDULER}: 7.0",
        guidance=DIFFUSERS,
        text_tokens="padded to 256, diffusers HunyuanVideoPipeline",
        native_steps=DIFFUSERS,
        native_size=f"{_TRAINED}: 540 lines on the model card; recalled",
        default_size=_TWICE,
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

# 54 double blocks of width 2048: attention 4, MLP of width 4 (8).
_HUNYUAN15_LINEAR, _HUNYUAN15_ATTENTION = transformer_flop(2048, 54)
_HUNYUAN_VIDEO15 = Family(
    name="hunyuan-video-1.5",
    title="HunyuanVideo 1.5",
    shift=ShiftRule("static", shift=5.0),
    guidance_kind="cfg",
    guidance=6.0,
    text_tokens=1000,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    grid=16,
    vae_factor=16,
    patch=1,
    latent_channels=32,
    native_size=(848, 480),
    default_size=(1696, 960),
    min_low_side=480,
    solver="careful",
    linear_cost=_HUNYUAN15_LINEAR,
    attention_cost=_HUNYUAN15_ATTENTION,
    vae_cost=None,
    pipeline=PipelineInfo(
        classes=r"HunyuanVideo15Pipeline",
        titles=(("HunyuanVideo 1.5", "HunyuanVideo15Pipeline"),),
        tells=always,
        layout="HunyuanVideo15Layout",
        text_outputs=("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2"),
        experimental=True,
    ),
    sources=sources(
        "careful",
        shift="5.0 on the model card of the 480p model; recalled; the loaded pipeline's scheduler counts",
        guidance="6.0 on the model card; recalled; the loaded pipeline's guider counts",
        text_tokens="padded to 1000, diffusers HunyuanVideo15Pipeline",
        native_steps=DIFFUSERS,
        patch="diffusers transformer configuration",
        native_size=f"{_TRAINED}: 480 lines",
        default_size=_TWICE,
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

# Self attention 4, the queries and outputs of cross attention 2, MLP of width 4 (8).
_LTX_LINEAR, _LTX_ATTENTION = transformer_flop(2048, 28, matrices=14.0)
_LTX_VIDEO = Family(
    name="ltx-video",
    title="LTX-Video",
    shift=ShiftRule("exponential", base_tokens=1024, max_tokens=4096, base_shift=0.95, max_shift=2.05, terminal=0.1),
    guidance_kind="cfg",
    guidance=3.0,
    text_tokens=0,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    grid=32,
    vae_factor=32,
    patch=1,
    latent_channels=128,
    native_size=(704, 512),
    default_size=(1408, 1024),
    solver="careful",
    linear_cost=_LTX_LINEAR,
    attention_cost=_LTX_ATTENTION,
    vae_cost=None,
    pipeline=PipelineInfo(
        classes=r"LTXPipeline",
        titles=(("LTX-Video", "LTXPipeline"),),
        tells=always,
        layout="LtxLayout",
        text_outputs=MASKED_CFG_TEXT,
        experimental=True,
    ),
    sources=sources(
        "careful",
        shift=f"{SCHEDULER}: 0.95 at 1024 tokens, 2.05 at 4096, stretched to end at 0.1",
        guidance=DIFFUSERS,
        text_tokens="0: text enters by cross attention",
        native_steps=DIFFUSERS,
        patch="diffusers transformer configuration",
        native_size=f"{_TRAINED}; default of the diffusers 0.42 pipeline",
        default_size=_TWICE,
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

FAMILIES = (_WAN, _WAN22, _HUNYUAN_VIDEO, _HUNYUAN_VIDEO15, _LTX_VIDEO)
