"""CogView4, CogView3-Plus and GLM-Image."""

from __future__ import annotations

from mrflow_sched.plan.betas import TrainingBetas
from mrflow_sched.plan.families.base import Family, PipelineInfo, ShiftRule, always
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    DIFFUSERS,
    FEWER_CFG_PRESETS,
    sources,
    transformer_flop,
)

_TEXT = ("prompt_embeds", "negative_prompt_embeds")
_SECOND_HAND = "scheduler configuration of the released model as another project copies it"
_SHIFT = f"{_SECOND_HAND}: linear time shift, 0.25 + 0.75 sqrt(tokens / 256) in diffusers' pipeline"
_PADDED = "not measured; texts are padded to multiples of 16, a short one is assumed"

_COGVIEW4_LINEAR, _COGVIEW4_ATTENTION = transformer_flop(4096, 28)
_COGVIEW4 = Family(
    name="cogview4",
    title="CogView4",
    shift=ShiftRule("root", base_shift=0.25, max_shift=0.75, factor=True, sigma_min=0.001, whole=1000),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=64,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_COGVIEW4_LINEAR,
    attention_cost=_COGVIEW4_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"CogView4(Control)?Pipeline",
        titles=(("CogView4", "CogView4Pipeline"),),
        tells=always,
        layout="CogView4Layout",
        text_outputs=_TEXT,
    ),
    sources=sources(
        "careful",
        shift=f"{_SHIFT}; whole training steps from 1000 to 1",
        guidance=DIFFUSERS,
        text_tokens=_PADDED,
        native_steps=DIFFUSERS,
        linear_cost="28 layers of width 4096, recalled; they sum to the 6 billion of its name",
        attention_cost="28 layers of width 4096, recalled",
    ),
)

_GLM_LINEAR, _GLM_ATTENTION = transformer_flop(4096, 30)
_GLM_IMAGE = Family(
    name="glm-image",
    title="GLM-Image",
    shift=ShiftRule("root", base_shift=0.25, max_shift=0.75, factor=True, ahead=0.001, whole=1000),
    guidance_kind="cfg",
    guidance=1.5,
    text_tokens=16,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_GLM_LINEAR,
    attention_cost=_GLM_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"GlmImagePipeline",
        titles=(("GLM-Image", "GlmImagePipeline"),),
        tells=always,
        layout="GlmImageLayout",
        text_outputs=_TEXT,
    ),
    sources=sources(
        "careful",
        shift=f"{_SHIFT}, read for CogView4; whole training steps from 1000, one more would end at 1",
        guidance=DIFFUSERS,
        text_tokens="not measured; only words in quotation marks are encoded, few are assumed",
        native_steps=DIFFUSERS,
        linear_cost="30 layers of width 4096, recalled; they sum to the 7 billion of its card. Its language model of 9 "
        "billion, which runs before, is not counted",
        attention_cost="30 layers of width 4096, recalled",
    ),
)

_COGVIEW3_LINEAR, _COGVIEW3_ATTENTION = transformer_flop(2560, 30)
_COGVIEW3_PLUS = Family(
    name="cogview3-plus",
    title="CogView3-Plus",
    prediction="v",
    shift=ShiftRule("betas", betas=TrainingBetas(zero_snr=True, snr_scale=4.0)),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=224,
    native_steps=50,
    presets=ASSUMED_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_COGVIEW3_LINEAR,
    attention_cost=_COGVIEW3_ATTENTION,
    pipeline=PipelineInfo(
        classes=r"CogView3PlusPipeline",
        titles=(("CogView3-Plus (experimental)", "CogView3PlusPipeline"),),
        tells=always,
        layout="CogView3Layout",
        text_outputs=_TEXT,
        casts_latents=False,
    ),
    sources=sources(
        "careful",
        prediction="v with zero terminal SNR; carried over at equal signal-to-noise ratio, untested",
        shift="scheduler_config.json of the released model (CogVideoXDDIMScheduler, snr_shift_scale 4), recalled",
        guidance=DIFFUSERS,
        text_tokens="padded to 224, diffusers CogView3PlusPipeline",
        native_steps=DIFFUSERS,
        linear_cost="30 layers of width 2560, defaults of diffusers' class; they sum to the 3 billion of its name",
        attention_cost="30 layers of width 2560, defaults of diffusers' class",
    ),
)

FAMILIES = (_COGVIEW4, _GLM_IMAGE, _COGVIEW3_PLUS)
