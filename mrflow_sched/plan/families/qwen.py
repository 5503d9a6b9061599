"""Qwen-Image, Qwen-Image-2512, Qwen-Image 2.1 and 2.1 Turbo."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mrflow_sched.plan.families.base import (
    Family,
    HostFacts,
    NetworkCost,
    PipelineInfo,
    PixelCost,
    Preset,
    ShiftRule,
    VaeCost,
    named_distilled,
)
from mrflow_sched.plan.families.shared import (
    ASSUMED_PRESETS,
    FEWER_CFG_PRESETS,
    FEWER_PRESETS,
    OFFICIAL,
    OFFICIAL_PRESETS,
    SOLVER_SOURCES,
    sources,
    transformer_flop,
)


def _host_21(facts: HostFacts) -> bool:
    # The latents of Qwen-Image have 16 channels.
    marked = "21" in facts.engine or "qwen-image-2.1" in facts.repository or facts.latent_channels == 64
    return facts.flow and facts.engine.startswith("Qwen") and marked


def _host_first(facts: HostFacts) -> bool:
    return facts.flow and facts.engine.startswith("Qwen") and not _host_21(facts) and "2512" not in facts.name


def _host_2512(facts: HostFacts) -> bool:
    # Nothing but the name tells: network and configuration are Qwen-Image's.
    return facts.flow and facts.engine.startswith("Qwen") and not _host_21(facts) and "2512" in facts.name


def _named_2512(pipe: Any) -> bool:
    return "2512" in str(getattr(pipe, "name_or_path", None)).replace("\\", "/").rstrip("/").rpartition("/")[2]


def _not_named_2512(pipe: Any) -> bool:
    return not _named_2512(pipe)


def _has_own_sigmas(pipe: Any) -> bool:
    return bool(pipe.config.get("sample_sigmas"))


def _has_no_sigmas(pipe: Any) -> bool:
    return not _has_own_sigmas(pipe)


def _host_21_turbo(facts: HostFacts) -> bool:
    # CFG does not tell: the undistilled model is used without it too.
    return _host_21(facts) and named_distilled(facts.name) is True


def _host_21_base(facts: HostFacts) -> bool:
    return _host_21(facts) and not _host_21_turbo(facts)


QWEN_VAE = VaeCost(PixelCost(1.0748e7, 0.375, 3460.0), PixelCost(6.657e6, 0.375, 1935.0), 1.269e8)
_SHIFT = ShiftRule("exponential", max_tokens=8192, max_shift=0.9, terminal=0.02)
_PIPELINE = PipelineInfo(
    classes=r"QwenImage(ControlNet|Edit|EditPlus)?(Inpaint)?Pipeline",
    titles=(("Qwen-Image", "QwenImagePipeline"),),
    tells=_not_named_2512,
    layout="QwenImageLayout",
    text_outputs=("prompt_embeds", "prompt_embeds_mask"),
)
_QWEN_LINEAR, _QWEN_ATTENTION = transformer_flop(3072, 60)
_QWEN_IMAGE = Family(
    name="qwen-image",
    title="Qwen-Image",
    shift=_SHIFT,
    guidance_kind="cfg",
    guidance=4.0,
    text_tokens=64,
    native_steps=50,
    presets=OFFICIAL_PRESETS + FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_QWEN_LINEAR,
    attention_cost=_QWEN_ATTENTION,
    network_cost=NetworkCost(2.043e10, 9.31e4),
    vae_cost=QWEN_VAE,
    pipeline=_PIPELINE,
    host=_host_first,
    sources=sources(
        "careful",
        shift="docs/method.md, section 1.5: 0.5 at 256 tokens, 0.9 at 8192, stretched to 0.02",
        guidance=OFFICIAL,
        text_tokens="not measured; prompts are not padded, a short one is assumed",
        native_steps="the paper's native baseline (docs/method.md, section 2.1)",
    ),
)

_QWEN_IMAGE_2512 = replace(
    _QWEN_IMAGE,
    name="qwen-image-2512",
    title="Qwen-Image-2512",
    presets=tuple(
        replace(preset, source=f"not measured; Qwen-Image's: {preset.source}") for preset in _QWEN_IMAGE.presets
    ),
    pipeline=replace(_PIPELINE, tells=_named_2512),
    host=_host_2512,
    sources=MappingProxyType(
        {
            **_QWEN_IMAGE.sources,
            "shift": "second-hand: its scheduler file has Qwen-Image's numbers; ComfyUI's template shifts by 3.1",
            "guidance": "template of ComfyUI: 4",
            "native_steps": "template of ComfyUI: 50",
        }
    ),
)

_MATRICES = "matrix sizes in diffusers' QwenImage21Transformer2DModel; its weights sum to the 7 billion of the card"

_PIPELINE_21 = PipelineInfo(
    classes=r"QwenImage21Pipeline",
    titles=(("Qwen-Image 2.1", "QwenImage21Pipeline"),),
    tells=_has_no_sigmas,
    layout="QwenImage21Layout",
    text_outputs=("prompt_embeds", "prompt_embeds_mask", ""),
)

# Attention 4, gated MLP of width 3 (9).
_QWEN21_LINEAR, _QWEN21_ATTENTION = transformer_flop(4096, 32, matrices=13.0)
_QWEN_IMAGE_21 = Family(
    name="qwen-image-2.1",
    title="Qwen-Image 2.1",
    grid=32,
    vae_factor=16,
    patch=1,
    latent_channels=64,
    shift=_SHIFT,
    guidance_kind="cfg",
    guidance=1.0,
    text_tokens=64,
    native_size=(2048, 2048),
    native_steps=40,
    presets=ASSUMED_PRESETS + FEWER_PRESETS,
    linear_cost=_QWEN21_LINEAR,
    attention_cost=_QWEN21_ATTENTION,
    vae_cost=None,
    pipeline=_PIPELINE_21,
    host=_host_21_base,
    sources=sources(
        "multistep",
        grid="diffusers QwenImage21Pipeline: a slot of its sequence is 2x2 tokens",
        patch="none: a token is a latent pixel (diffusers QwenImage21Pipeline)",
        shift="Qwen-Image's: the line as in Forge Neo; the stretch second-hand, its scheduler file was not read",
        guidance="documentation of diffusers: the authors recommend no guidance",
        text_tokens="not measured; prompts are not padded, a short one is assumed",
        native_steps="documentation of diffusers: 40, the authors' recommendation",
        native_size="the authors recommend 2K; second-hand, their page was not read",
        linear_cost=_MATRICES,
        attention_cost=_MATRICES,
    ),
)

_TURBO_SIGMAS = (1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568, 0.0)
_QWEN_IMAGE_21_TURBO = replace(
    _QWEN_IMAGE_21,
    name="qwen-image-2.1-turbo",
    title="Qwen-Image 2.1 Turbo",
    shift=ShiftRule("list", lists=(_TURBO_SIGMAS,)),
    guidance_kind="none",
    native_steps=8,
    presets=(Preset("8+1", 8, 1, 0.12, "not measured; the model has sigmas for 8 steps only"),),
    default_preset="8+1",
    solver="euler",
    pipeline=replace(_PIPELINE_21, tells=_has_own_sigmas),
    host=_host_21_turbo,
    sources=MappingProxyType(
        {
            **_QWEN_IMAGE_21.sources,
            "shift": "sample_sigmas in its model_index.json, as ComfyUI's template quotes them; not shifted",
            "guidance": "guidance is distilled away",
            "native_steps": "the number of its sigmas",
            "solver": SOLVER_SOURCES["euler"],
        }
    ),
)

FAMILIES = (_QWEN_IMAGE, _QWEN_IMAGE_2512, _QWEN_IMAGE_21, _QWEN_IMAGE_21_TURBO)
