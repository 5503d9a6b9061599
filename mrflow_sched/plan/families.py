"""What is known of each kind of model: one table, every number with its source.

`FAMILIES` maps a name such as "flux1-dev" to a `Family`; `get_family` finds one or says which exist.
A source is a file, a paper, a model card or a section of the method's specification ("spec 1.5"). Where nobody has
published or measured a number, its source says "not measured" and what the value was chosen from.
Nothing here needs torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.schedule import validate_sigmas

__all__ = ["FAMILIES", "TIERS", "Family", "GuidanceKind", "Prediction", "Preset", "ShiftRule", "get_family"]

Prediction = Literal["flow", "epsilon", "v"]
GuidanceKind = Literal["embedded", "cfg", "none"]


@dataclass(frozen=True, slots=True)
class ShiftRule:
    """How a family warps its stage-1 sigma list. Refine lists never meet it.

    `kind`: "none" evenly spaced; "static" a fixed `shift` >= 1; "exponential" exp(mu) with mu on a line through
    (`base_tokens`, `base_shift`) and (`max_tokens`, `max_shift`); "flux2" its empirical mu of tokens and steps;
    "beta" Beta(0.6, 0.6) quantiles, then the static `shift`; "scaled-linear" the training betas of SD1.5 and SDXL.
    `terminal` stretches the list so that its last level above 0 is this one. `sigma_min` is the last level before the
    shift (None: 1/steps). "list": a distilled model's own sigmas, one of `lists` by step count, each from 1 to 0.
    """

    kind: Literal["none", "static", "exponential", "flux2", "beta", "scaled-linear", "list"]
    shift: float = 1.0
    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    terminal: float | None = None
    sigma_min: float | None = None
    lists: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if (self.kind == "list") != bool(self.lists):
            raise MrFlowError(f"lists must be given for the shift rule 'list' and no other, got {self.lists!r}.")
        for sigmas in self.lists:
            if validate_sigmas(sigmas, "lists")[0] != 1.0:
                raise MrFlowError(f"lists must start at 1, which is pure noise, got {sigmas!r}.")


TIERS = ("fast", "balanced", "best")
"""Names that every family has a preset for; "balanced" is its default."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A named choice: "12+1" is `low_steps` = 12 at the low size and `refine_steps` = 1 from noise fraction `sigma`."""

    name: str
    low_steps: int
    refine_steps: int
    sigma: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of model. Sizes are in pixels, steps and guidance are those of native sampling.

    `grid` = `vae_factor` x `patch`: sides must be multiples of it and one token covers grid x grid pixels.
    `guidance_kind`: "embedded" (the scale is an input, one forward per step), "cfg" (two forwards per step) or "none".
    `text_tokens` counts the text that shares the network's sequence (0 where text enters by cross attention).
    `default_size`: the staged picture where no size is asked for (None: `native_size`). `factor`: size step between
    stages. `min_low_side`: an image of less area than a square of this side is outside the model's trained range.
    `linear_cost` and `attention_cost`: FLOP of one forward per token, and per squared token, of image and text
    together. `sources` maps each field to where its value comes from.
    """

    name: str
    title: str
    shift: ShiftRule
    guidance_kind: GuidanceKind
    guidance: float
    text_tokens: int
    native_steps: int
    presets: tuple[Preset, ...]
    prediction: Prediction = "flow"
    grid: int = 16
    vae_factor: int = 8
    patch: int = 2
    latent_channels: int = 16
    native_size: tuple[int, int] = (1024, 1024)
    default_size: tuple[int, int] | None = None
    factor: float = 2.0
    min_low_side: int = 512
    default_preset: str = "12+1"
    solver: str = "multistep"
    linear_cost: float = 1.0
    attention_cost: float = 0.0
    sources: Mapping[str, str] = field(default_factory=dict[str, str], compare=False)

    def get_preset(self, name: str | None = None) -> Preset:
        """The preset called `name`, or of that tier (:data:`TIERS`; None: the default one).

        "fast" is the family's preset of fewest low steps, "best" that of most. Raises ValueError listing the presets
        there are.
        """
        wanted = self.default_preset if name in (None, "balanced") else name
        if wanted in TIERS:
            choose = min if wanted == "fast" else max
            return choose(self.presets, key=lambda preset: preset.low_steps)
        for preset in self.presets:
            if preset.name == wanted:
                return preset
        known = ", ".join((*(preset.name for preset in self.presets), *TIERS))
        raise MrFlowError(
            f"preset {name!r} is not one of family {self.name!r}; choose from {known}, or set the step counts yourself."
        )

    def forward_cost(self, tokens: int) -> float:
        """FLOP of one forward on one sample of `tokens` image tokens."""
        total = tokens + self.text_tokens
        return self.linear_cost * total + self.attention_cost * total**2


def get_family(name: str) -> Family:
    """The family called `name`. Raises ValueError with the nearest known name and the list of all."""
    family = FAMILIES.get(name)
    if family is None:
        near = difflib.get_close_matches(str(name), FAMILIES, n=1)
        hint = f"did you mean {near[0]!r}? Known families are" if near else "known families are"
        raise MrFlowError(f"family {name!r} is unknown; {hint} {', '.join(FAMILIES)}.")
    return family


# ------------------------------------------------------------------------------------------------------ shared sources

_ASSUMED = "not measured; the values of FLUX.1-dev"
_OFFICIAL = "official MrFlow scripts (spec 1.5)"
_COMFY = "official ComfyUI preset (spec 1.5); the official scripts went from 0.15 to 0.12 here"
_TEXT_TIP = "authors' advice of 0.16 to 0.20 for images with lettering (spec 1.5)"
_FEWER = "not measured on this family; on a small FLUX-layout network 6 steps of multistep are as true as 10 of Euler"
_MEASURED = "docs/quality.md: composites of 6+1 to 20+1 lie within 0.004 of each other and 0.005 of native 50's"
_FEWER_CFG = "not measured on this family; on Gaussian mixtures with CFG 8 steps of careful are truer than 20 of Euler"
_DIFFUSERS = "default of the diffusers 0.42 pipeline"
_CARD = "example on the model card; recalled, not read again"
_SCHEDULER = "scheduler_config.json of the released model"

_OFFICIAL_PRESETS = (
    Preset("12+1", 12, 1, 0.12, _OFFICIAL),
    Preset("20+1", 20, 1, 0.15, _COMFY),
    Preset("text", 12, 1, 0.18, _TEXT_TIP),
)
_FEWER_PRESETS = (Preset("8+1", 8, 1, 0.12, _FEWER), Preset("6+1", 6, 1, 0.12, _FEWER))
_FEWER_CFG_PRESETS = (Preset("8+1", 8, 1, 0.12, _FEWER_CFG),)
_ASSUMED_PRESETS = (Preset("12+1", 12, 1, 0.12, _ASSUMED), Preset("20+1", 20, 1, 0.15, _ASSUMED))

_SHARED_SOURCES = {
    "prediction": "the family's paper or card",
    "grid": "vae_factor x patch",
    "vae_factor": "diffusers VAE configuration",
    "patch": "diffusers pipeline (2x2 packing)",
    "latent_channels": "diffusers VAE configuration",
    "native_size": "diffusers pipeline default",
    "default_size": "native_size",
    "factor": "paper: 512 to 1024 (spec 1.1)",
    "min_low_side": "spec 5.1: about 512 px for models of one megapixel; not measured",
    "presets": "each preset carries its own source",
    "linear_cost": "matrix sizes in the diffusers configuration",
    "attention_cost": "matrix sizes in the diffusers configuration",
}
_COUNTED = "matrix sizes in the diffusers configuration; agrees with a FLOP count of the class at 1024 and 4096 tokens"
_SOLVER_SOURCES = {
    "multistep": "second order at no extra forward; on a small FLUX-layout network 10 steps are truer than 20 of Euler",
    "careful": "multistep guarded by its own error estimate: with CFG the first steps are too curved to extrapolate",
    "euler": "distilled for steps of Euler; higher order not measured",
}


def _sources(solver: str, **own: str) -> Mapping[str, str]:
    """Sources of one family: its own on top of the shared ones."""
    return MappingProxyType({**_SHARED_SOURCES, "solver": _SOLVER_SOURCES[solver], **own})


def _transformer_flop(width: int, layers: int, matrices: float = 12.0) -> tuple[float, float]:
    """(linear_cost, attention_cost) of `layers` transformer blocks of `width`.

    Each token meets matrices * width^2 weights per block (12 in a plain block: 4 of attention, 8 of a 4x MLP), two FLOP
    per weight; each pair of tokens costs 4 * width FLOP per block (scores and weighted sum).
    """
    return 2.0 * matrices * layers * width**2, 4.0 * layers * width


# ----------------------------------------------------------------------------------------------------------- the table

_FLUX_LINEAR, _FLUX_ATTENTION = _transformer_flop(3072, 19 + 38)
_FLUX1_DEV = Family(
    name="flux1-dev",
    title="FLUX.1-dev",
    shift=ShiftRule("exponential"),
    guidance_kind="embedded",
    guidance=3.5,
    text_tokens=512,
    native_steps=50,
    presets=_OFFICIAL_PRESETS + _FEWER_PRESETS,
    linear_cost=_FLUX_LINEAR,
    attention_cost=_FLUX_ATTENTION,
    sources=_sources(
        "multistep",
        shift="black-forest-labs/flux sampling.py: 0.5 at 256 tokens, 1.15 at 4096",
        guidance=_OFFICIAL,
        text_tokens="T5 padded to 512, diffusers FluxPipeline",
        native_steps="the paper's native baseline (spec 2.1)",
        linear_cost=_COUNTED,
        attention_cost=_COUNTED,
    ),
)

_FLUX1_KREA = replace(
    _FLUX1_DEV,
    name="flux1-krea",
    title="FLUX.1-Krea-dev",
    guidance=4.5,
    native_steps=28,
    presets=_ASSUMED_PRESETS + _FEWER_PRESETS,
    sources=MappingProxyType({**_FLUX1_DEV.sources, "guidance": _CARD, "native_steps": _CARD}),
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
        Preset("1+1", 1, 1, 0.12, "step counts: paper (spec 2.2); sigma not measured"),
    ),
    default_preset="4+1",
    sources=_sources(
        "euler",
        shift="black-forest-labs/flux sampling.py: schnell is not shifted",
        guidance="guidance is distilled away",
        text_tokens="T5 padded to 256 for schnell, black-forest-labs/flux",
        native_steps="black-forest-labs/flux: 4 for schnell",
        linear_cost=_COUNTED,
        attention_cost=_COUNTED,
    ),
)

_QWEN_LINEAR, _QWEN_ATTENTION = _transformer_flop(3072, 60)
_QWEN_IMAGE = Family(
    name="qwen-image",
    title="Qwen-Image",
    shift=ShiftRule("exponential", max_tokens=8192, max_shift=0.9, terminal=0.02),
    guidance_kind="cfg",
    guidance=4.0,
    text_tokens=64,
    native_steps=50,
    presets=_OFFICIAL_PRESETS + _FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_QWEN_LINEAR,
    attention_cost=_QWEN_ATTENTION,
    sources=_sources(
        "careful",
        shift="spec 1.5: 0.5 at 256 tokens, 0.9 at 8192, stretched to 0.02",
        guidance=_OFFICIAL,
        text_tokens="not measured; prompts are not padded, a short one is assumed",
        native_steps="the paper's native baseline (spec 2.1)",
    ),
)

_SD3_LINEAR, _SD3_ATTENTION = _transformer_flop(1536, 24)
_SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 medium",
    shift=ShiftRule("static", shift=3.0, sigma_min=0.002994),
    guidance_kind="cfg",
    guidance=7.0,
    text_tokens=333,
    native_steps=28,
    presets=_ASSUMED_PRESETS + _FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_SD3_LINEAR,
    attention_cost=_SD3_ATTENTION,
    sources=_sources(
        "careful",
        shift=f"{_SCHEDULER} (3.0); diffusers ends the list at the shifted 1/1000",
        guidance=_DIFFUSERS,
        text_tokens="77 of CLIP and 256 of T5, diffusers StableDiffusion3Pipeline",
        native_steps=_DIFFUSERS,
        linear_cost=_COUNTED,
        attention_cost=_COUNTED,
    ),
)

_SD35_LINEAR, _SD35_ATTENTION = _transformer_flop(2432, 38)
_SD35 = replace(
    _SD3,
    name="sd35",
    title="Stable Diffusion 3.5 large",
    guidance=3.5,
    linear_cost=_SD35_LINEAR,
    attention_cost=_SD35_ATTENTION,
    sources=MappingProxyType({**_SD3.sources, "guidance": _CARD}),
)

# 30 blocks and 2 refiner blocks; the gated MLP of 8/3 width has three matrices, so 4 + 8 again.
_ZIMAGE_LINEAR, _ZIMAGE_ATTENTION = _transformer_flop(3840, 32)
_Z_IMAGE = Family(
    name="z-image",
    title="Z-Image",
    shift=ShiftRule("static", shift=6.0),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=64,
    native_steps=50,
    presets=_ASSUMED_PRESETS + _FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_ZIMAGE_LINEAR,
    attention_cost=_ZIMAGE_ATTENTION,
    sources=_sources(
        "careful",
        shift="6.0 in the released scheduler (3.0 in Turbo's), as InvokeAI's pull request 8799 tells the two apart",
        guidance=_DIFFUSERS,
        text_tokens="not measured; padding is dropped, a short prompt is assumed",
        native_steps=_DIFFUSERS,
    ),
)

_PORTS = "community ports (spec 4); the official script's strength ends at sigma 0 or 0.2727 by diffusers version"
_Z_IMAGE_TURBO = replace(
    _Z_IMAGE,
    name="z-image-turbo",
    title="Z-Image-Turbo",
    shift=ShiftRule("static", shift=3.0),
    guidance_kind="none",
    guidance=1.0,
    native_steps=9,
    presets=(Preset("8+1", 8, 1, 0.11, _PORTS), Preset("9+1", 9, 1, 0.11, _PORTS)),
    default_preset="8+1",
    solver="euler",
    sources=_sources(
        "euler",
        shift=f"{_SCHEDULER}: 3.0 (spec 1.5)",
        guidance="guidance is distilled away (0.0 in diffusers means off; here off is 1)",
        text_tokens="not measured; padding is dropped, a short prompt is assumed",
        native_steps=_OFFICIAL,
    ),
)

# The 4B model: 5 double and 20 single blocks, gated MLP of width 3, so 4 + 9. The 9B model's cost ratios are close.
_KLEIN_LINEAR, _KLEIN_ATTENTION = _transformer_flop(3072, 25, matrices=13.0)
_KLEIN_COST = (
    "4B model: third-party ports of its configuration (width 3072, 5 + 20 blocks); the weights sum to 4 billion"
)
_FLUX2_KLEIN_BASE = Family(
    name="flux2-klein-base",
    title="FLUX.2 Klein base",
    latent_channels=32,
    shift=ShiftRule("flux2"),
    guidance_kind="cfg",
    guidance=4.0,
    text_tokens=512,
    native_steps=50,
    presets=(
        Preset("12+1", 12, 1, 0.12, "nominal value of the official script, whose scheduler made it 0.578 (spec 1.5)"),
        Preset("20+1", 20, 1, 0.15, _ASSUMED),
        *_FEWER_CFG_PRESETS,
    ),
    solver="careful",
    linear_cost=_KLEIN_LINEAR,
    attention_cost=_KLEIN_ATTENTION,
    sources=_sources(
        "careful",
        shift="diffusers Flux2KleinPipeline, empirical mu",
        guidance=_OFFICIAL,
        text_tokens="padded to 512, diffusers Flux2KleinPipeline",
        native_steps=_DIFFUSERS,
        linear_cost=_KLEIN_COST,
        attention_cost=_KLEIN_COST,
    ),
)

_FLUX2_KLEIN = replace(
    _FLUX2_KLEIN_BASE,
    name="flux2-klein",
    title="FLUX.2 Klein (distilled)",
    guidance_kind="none",
    guidance=1.0,
    native_steps=4,
    presets=(
        Preset("4+1", 4, 1, 0.25, "nominal value of the official script, whose scheduler made it 0.770 (spec 1.5)"),
    ),
    default_preset="4+1",
    solver="euler",
    sources=MappingProxyType(
        {
            **_FLUX2_KLEIN_BASE.sources,
            "guidance": "guidance is distilled away",
            "native_steps": _OFFICIAL,
            "solver": _SOLVER_SOURCES["euler"],
        }
    ),
)

# Gated MLP of width 3, so 4 + 9 as in Klein; the weights, two sets in the 8 double blocks, sum to 32 billion.
_FLUX2_LINEAR, _FLUX2_ATTENTION = _transformer_flop(6144, 8 + 48, matrices=13.0)
_FLUX2_DEV = Family(
    name="flux2-dev",
    title="FLUX.2-dev",
    latent_channels=32,
    shift=ShiftRule("flux2"),
    guidance_kind="embedded",
    guidance=4.0,
    text_tokens=512,
    native_steps=50,
    presets=_ASSUMED_PRESETS + _FEWER_PRESETS,
    linear_cost=_FLUX2_LINEAR,
    attention_cost=_FLUX2_ATTENTION,
    sources=_sources(
        "multistep",
        shift="diffusers Flux2Pipeline, empirical mu",
        guidance=_DIFFUSERS,
        text_tokens="padded to 512, diffusers Flux2Pipeline",
        native_steps=_DIFFUSERS,
    ),
)

_CHROMA = Family(
    name="chroma",
    title="Chroma",
    shift=ShiftRule("beta"),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=512,
    native_steps=35,
    presets=_ASSUMED_PRESETS + _FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_FLUX_LINEAR,
    attention_cost=_FLUX_ATTENTION,
    sources=_sources(
        "careful",
        shift="not measured; its users often take Beta 0.6/0.6 without shift; its scheduler file was not read",
        guidance=_DIFFUSERS,
        text_tokens="T5 padded to 512, diffusers ChromaPipeline",
        native_steps=_DIFFUSERS,
    ),
)

# 26 blocks and 2 refiner blocks; 8 of 24 heads for keys and values (8/3), gated MLP of width 4 (12).
_LUMINA_LINEAR, _LUMINA_ATTENTION = _transformer_flop(2304, 28, matrices=8 / 3 + 12)
_LUMINA2 = Family(
    name="lumina2",
    title="Lumina-Image 2.0",
    shift=ShiftRule("static", shift=6.0),
    guidance_kind="cfg",
    guidance=4.0,
    text_tokens=256,
    native_steps=30,
    presets=_ASSUMED_PRESETS + _FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_LUMINA_LINEAR,
    attention_cost=_LUMINA_ATTENTION,
    sources=_sources(
        "careful",
        shift="6.0 in third-party inference code; its scheduler file was not read",
        guidance=_DIFFUSERS,
        text_tokens="padded to 256, diffusers Lumina2Pipeline",
        native_steps=_DIFFUSERS,
    ),
)

# Linear attention: no cost per pair. Per block 4 + 2 of self and cross attention and 7.5 of the gated convolution.
_SANA_LINEAR, _ = _transformer_flop(2240, 20, matrices=13.5)
_SANA = Family(
    name="sana",
    title="Sana",
    grid=32,
    vae_factor=32,
    patch=1,
    latent_channels=32,
    shift=ShiftRule("static", shift=3.0),
    guidance_kind="cfg",
    guidance=4.5,
    text_tokens=0,
    native_steps=20,
    presets=_ASSUMED_PRESETS + _FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_SANA_LINEAR,
    attention_cost=0.0,
    sources=_sources(
        "careful",
        patch="none: a token is a latent pixel",
        shift=f"{_SCHEDULER}: flow_shift 3.0; recalled, not read again",
        guidance=_DIFFUSERS,
        text_tokens="0: text enters by cross attention",
        native_steps=_DIFFUSERS,
        attention_cost="linear attention",
    ),
)

# 4 double and 32 single blocks; the gated MLP of 8/3 width has three matrices, so 4 + 8 again.
_AURA_LINEAR, _AURA_ATTENTION = _transformer_flop(3072, 36)
_AURAFLOW = Family(
    name="auraflow",
    title="AuraFlow",
    latent_channels=4,
    shift=ShiftRule("static", shift=1.73, sigma_min=0.001728738),
    guidance_kind="cfg",
    guidance=3.5,
    text_tokens=256,
    native_steps=50,
    presets=_ASSUMED_PRESETS + _FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_AURA_LINEAR,
    attention_cost=_AURA_ATTENTION,
    sources=_sources(
        "careful",
        shift=f"{_SCHEDULER} (1.73), recalled; diffusers ends the list at the shifted 1/1000",
        guidance=_DIFFUSERS,
        text_tokens="padded to 256, diffusers AuraFlowPipeline",
        native_steps=_DIFFUSERS,
    ),
)

# 20 double and 40 single blocks of a 4x MLP.
_HUNYUAN_LINEAR, _HUNYUAN_ATTENTION = _transformer_flop(3584, 20 + 40)
_HUNYUAN_IMAGE = Family(
    name="hunyuan-image",
    title="HunyuanImage 2.1",
    grid=32,
    vae_factor=32,
    patch=1,
    latent_channels=64,
    shift=ShiftRule("static", shift=5.0),
    guidance_kind="cfg",
    guidance=3.5,
    text_tokens=192,
    native_size=(2048, 2048),
    native_steps=50,
    min_low_side=1024,
    presets=_ASSUMED_PRESETS + _FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_HUNYUAN_LINEAR,
    attention_cost=_HUNYUAN_ATTENTION,
    sources=_sources(
        "careful",
        patch="none: a token is a latent pixel",
        shift=f"{_SCHEDULER}: 5.0; recalled, not read again",
        guidance="the pipeline's guider; recalled, not read again",
        text_tokens="128 of ByT5 and a short prompt, diffusers HunyuanImagePipeline",
        native_steps=_DIFFUSERS,
        min_low_side="not measured; half of its native side",
    ),
)

_HUNYUAN_IMAGE_DISTILLED = replace(
    _HUNYUAN_IMAGE,
    name="hunyuan-image-distilled",
    title="HunyuanImage 2.1 (distilled)",
    guidance_kind="embedded",
    guidance=3.25,
    native_steps=8,
    presets=(Preset("8+1", 8, 1, 0.12, "not measured"),),
    default_preset="8+1",
    solver="euler",
    sources=MappingProxyType(
        {
            **_HUNYUAN_IMAGE.sources,
            "guidance": _DIFFUSERS,
            "native_steps": _CARD,
            "solver": _SOLVER_SOURCES["euler"],
        }
    ),
)

# Per block: attention 4, two of four experts and the shared one of half width, gated: 8 + 8 + 4.
_HIDREAM_LINEAR, _HIDREAM_ATTENTION = _transformer_flop(2560, 16 + 32, matrices=24.0)
_HIDREAM = Family(
    name="hidream",
    title="HiDream-I1",
    shift=ShiftRule("static", shift=3.0),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=256,
    native_steps=50,
    presets=_ASSUMED_PRESETS + _FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=_HIDREAM_LINEAR,
    attention_cost=_HIDREAM_ATTENTION,
    sources=_sources(
        "careful",
        shift=f"{_SCHEDULER} of Full: flow_shift 3.0; recalled, not read again",
        guidance=_DIFFUSERS,
        text_tokens="128 each of T5 and Llama, diffusers HiDreamImagePipeline",
        native_steps=_DIFFUSERS,
    ),
)

_HIDREAM_DEV = replace(
    _HIDREAM,
    name="hidream-dev",
    title="HiDream-I1 Dev and Fast",
    shift=ShiftRule("static", shift=6.0),
    guidance_kind="none",
    guidance=1.0,
    native_steps=28,
    presets=(Preset("12+1", 12, 1, 0.12, "not measured"), Preset("20+1", 20, 1, 0.15, "not measured")),
    solver="euler",
    sources=MappingProxyType(
        {
            **_HIDREAM.sources,
            "shift": "Dev's scheduler: 6.0, Fast's 3.0; recalled, not read again",
            "guidance": "guidance is distilled away (0.0 in diffusers means off; here off is 1)",
            "native_steps": _CARD,
            "solver": _SOLVER_SOURCES["euler"],
        }
    ),
)

_UNET_COST = "FLOP count of diffusers' UNet2DConditionModel at five sizes, least squares; within 8 %"
_SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    prediction="epsilon",
    grid=8,
    patch=1,
    latent_channels=4,
    shift=ShiftRule("scaled-linear"),
    guidance_kind="cfg",
    guidance=5.0,
    text_tokens=0,
    native_steps=50,
    factor=4 / 3,
    min_low_side=768,
    presets=_ASSUMED_PRESETS + _FEWER_CFG_PRESETS,
    solver="careful",
    linear_cost=3.859e8,
    attention_cost=2.341e3,
    sources=_sources(
        "careful",
        prediction="epsilon; carried over by equal signal-to-noise ratio (spec 5.1), not tested by the authors",
        patch="none: a U-Net on latent pixels",
        shift="training betas 0.00085..0.012, scaled linear",
        guidance=_DIFFUSERS,
        text_tokens="0: text enters by cross attention",
        native_steps=_DIFFUSERS,
        factor="our choice, not measured: 1024 from 768, the least side that is in its range",
        min_low_side="not measured; 512 px is off its training sizes (spec 5.1)",
        linear_cost=_UNET_COST,
        attention_cost=_UNET_COST,
    ),
)

_SD15 = replace(
    _SDXL,
    name="sd15",
    title="Stable Diffusion 1.5",
    guidance=7.5,
    native_size=(512, 512),
    default_size=(1024, 1024),
    factor=2.0,
    min_low_side=512,
    linear_cost=1.672e8,
    attention_cost=7.244e3,
    sources=MappingProxyType(
        {
            **_SDXL.sources,
            "min_low_side": "spec 5.1: no use below 512 px, so targets start at 1024",
            "native_size": _CARD,
            "default_size": "spec 5.1: targets start at 1024",
            "factor": "512, its training size, to 1024 (spec 5.1); not measured",
        }
    ),
)

# The embedded model. Its cost depends on the width of the shipped network: change both here and nowhere else.
_DEMO_LINEAR, _DEMO_ATTENTION = _transformer_flop(256, 6)
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
        Preset("12+1", 12, 1, 0.12, _MEASURED),
        Preset("20+1", 20, 1, 0.15, _MEASURED),
        Preset("8+1", 8, 1, 0.12, _MEASURED),
        Preset("6+1", 6, 1, 0.12, _MEASURED),
    ),
    linear_cost=_DEMO_LINEAR,
    attention_cost=_DEMO_ATTENTION,
    sources=_sources(
        "multistep",
        vae_factor="tools/train_demo",
        patch="tools/train_demo",
        latent_channels="tools/train_demo",
        shift="chosen in training: FLUX.1's 0.5 and 1.15 at the tokens of 64 px and 256 px",
        guidance="distilled in training, as FLUX.1-dev",
        text_tokens="tools/train_demo: length of the tokenizer's output",
        native_size="tools/train_demo",
        native_steps="as FLUX.1-dev",
        factor="128 to 256",
        min_low_side="trained at 128 and 256",
    ),
)

_ALL = (
    _FLUX1_DEV,
    _FLUX1_SCHNELL,
    _FLUX1_KREA,
    _QWEN_IMAGE,
    _SD3,
    _SD35,
    _Z_IMAGE,
    _Z_IMAGE_TURBO,
    _FLUX2_KLEIN_BASE,
    _FLUX2_KLEIN,
    _FLUX2_DEV,
    _CHROMA,
    _LUMINA2,
    _SANA,
    _AURAFLOW,
    _HUNYUAN_IMAGE,
    _HUNYUAN_IMAGE_DISTILLED,
    _HIDREAM,
    _HIDREAM_DEV,
    _SDXL,
    _SD15,
    _DEMO,
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in _ALL})
