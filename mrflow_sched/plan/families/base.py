"""What is known of a kind of model: the values that one file of this folder fills in for its families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.schedule import scaled_linear_ve, validate_sigmas

__all__ = [
    "TIERS",
    "Family",
    "GuidanceKind",
    "HostFacts",
    "NetworkCost",
    "PipelineInfo",
    "PixelCost",
    "Prediction",
    "Preset",
    "ShiftRule",
    "VaeCost",
]

Prediction = Literal["flow", "epsilon", "v"]
GuidanceKind = Literal["embedded", "cfg", "none"]
ShiftKind = Literal["none", "static", "exponential", "flux2", "beta", "scaled-linear", "zero-snr", "list"]

TIERS = ("fast", "balanced", "best")
"""Names that every family has a preset for; "balanced" is its default."""


# ---------------------------------------------------------------------------------------------------------- schedules


@dataclass(frozen=True, slots=True)
class ShiftRule:
    """How a family makes the sigmas of stage 1. Refine schedules never meet it.

    `kind`: "none" evenly spaced; "static" a fixed `shift` >= 1; "exponential" exp(mu) with mu on a line through
    (`base_tokens`, `base_shift`) and (`max_tokens`, `max_shift`); "flux2" its empirical mu of tokens and steps;
    "beta" Beta(0.6, 0.6) quantiles, then the static `shift`; "scaled-linear" the training betas of SD1.5 and SDXL;
    "zero-snr" the same, rescaled to zero terminal SNR.
    `terminal` stretches the schedule so that its last sigma above 0 is this one. `sigma_min` is the last sigma before
    the shift (None: 1/steps). `beta` spaces the finished schedule anew between its ends, at quantiles of
    Beta(beta, beta). "list": a distilled model's own sigmas, one of `lists` by step count, each from 1 to 0.
    """

    kind: ShiftKind
    shift: float = 1.0
    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    terminal: float | None = None
    sigma_min: float | None = None
    beta: float | None = None
    lists: tuple[tuple[float, ...], ...] = ()

    @property
    def largest_ve(self) -> float:
        """The sigma_ve that pure noise is told as to models of variance-exploding noise: 14.6, or 4096."""
        return scaled_linear_ve(self.kind == "zero-snr")[-1]

    def __post_init__(self) -> None:
        if (self.kind == "list") != bool(self.lists):
            raise MrFlowError(f"lists must be given for the shift rule 'list' and no other, got {self.lists!r}.")
        for sigmas in self.lists:
            if validate_sigmas(sigmas, "lists")[0] != 1.0:
                raise MrFlowError(f"lists must start at 1, which is pure noise, got {sigmas!r}.")


@dataclass(frozen=True, slots=True)
class Preset:
    """A named choice: "12+1" is `low_steps` = 12 at the low size and `refine_steps` = 1 from noise fraction `sigma`."""

    name: str
    low_steps: int
    refine_steps: int
    sigma: float
    source: str


# --------------------------------------------------------------------------------------------------------------- cost


@dataclass(frozen=True, slots=True)
class PixelCost:
    """A part that works on pixels: FLOP per pixel (`linear`) and per squared pixel (`squared`), and bytes of tensors
    alive at once per pixel in 16 bits (`alive`)."""

    linear: float
    squared: float
    alive: float

    def flop(self, pixels: int) -> float:
        """FLOP for an image of that many pixels."""
        return self.linear * pixels + self.squared * pixels**2


@dataclass(frozen=True, slots=True)
class VaeCost:
    """Decoder and encoder of a VAE, and its number of weights."""

    decode: PixelCost
    encode: PixelCost
    weights: float


@dataclass(frozen=True, slots=True)
class NetworkCost:
    """Weights of a network, and bytes alive at once per token, text included, while it runs in 16 bits."""

    weights: float
    alive: float


# ------------------------------------------------------------------------------------------- where a family is found


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineInfo:
    """The diffusers pipelines of a family and their conventions.

    `classes`: a regular expression that the names of the text-to-image classes match. `titles`: pairs of a name for
    people and the class it stands for, as `mrflow doctor` shows them. `tells(pipe)`: whether a loaded pipeline of these
    classes is of this family. `layout`: the class of `engines.diffusers.layouts` that packs, scales and decodes its
    latents ("Layout": the plain kind). `even_list`: the pipeline hands its scheduler evenly spaced sigmas; False: the
    scheduler makes its own. `text_outputs`: what `encode_prompt` returns, in order, by the names that the pipeline's
    call takes ("": not passed on). `casts_latents`: the pipeline brings given latents to its network's dtype by itself.
    `positive_first`: the order of its doubled CFG batch, [positive, negative] in place of [negative, positive].
    `max_sequence_length`: text tokens to ask the pipeline for; None: its own default is right.
    """

    classes: str
    titles: tuple[tuple[str, str], ...]
    tells: Callable[[Any], bool]
    layout: str = "Layout"
    even_list: bool = True
    text_outputs: tuple[str, ...] = ()
    casts_latents: bool = True
    positive_first: bool = False
    max_sequence_length: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What a WebUI tells of its loaded checkpoint.

    `engine`: the name of the class that holds the model. `text`: names of the checkpoint and of the repository it is
    configured by, in lower case. `flow`: it predicts a velocity. `guidance`: the job's CFG scale; None: no job.
    `distilled_scale`: the network reads a guidance scale. `is_sd3`, `is_sdxl`: the host's own marks.
    """

    engine: str
    text: str = ""
    flow: bool = True
    guidance: float | None = None
    distilled_scale: bool = True
    is_sd3: bool = False
    is_sdxl: bool = False


def never(facts: Any) -> bool:
    """For families that only the user can name."""
    return False


def always(facts: Any) -> bool:
    """For families whose classes tell them already."""
    return True


# --------------------------------------------------------------------------------------------------------- the family

# FLOP, bytes and weights of diffusers' AutoencoderKL with a factor of 8, as FLUX.1 has it.
KL_VAE = VaeCost(PixelCost(9.463e6, 0.5, 1537.0), PixelCost(4.132e6, 0.5, 1286.0), 8.38e7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of model. Sizes are in pixels, steps and guidance are those of native sampling.

    `grid` = `vae_factor` x `patch`: sides must be multiples of it and one token covers grid x grid pixels.
    `guidance_kind`: "embedded" (the scale is an input, one forward per step), "cfg" (two forwards per step) or "none".
    `text_tokens` counts the text that shares the network's sequence (0 where text enters by cross attention).
    `default_size`: the staged image where no size is asked for (None: `native_size`). `factor`: size step between
    stages. `min_low_side`: an image of less area than a square of this side is outside the model's trained range.
    `linear_cost` and `attention_cost`: FLOP of one forward per token, and per squared token, of image and text
    together. `network_cost` and `vae_cost`: memory and work of the parts; None: not counted. `usual_upscaler`: the name
    in `cost.UPSCALER_FLOP` that its cost is counted with. `pipeline`: its diffusers pipelines; None: probed. `host`:
    whether a WebUI's checkpoint is of this family. `sources` maps each field to where its value comes from.
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
    network_cost: NetworkCost | None = None
    vae_cost: VaeCost | None = KL_VAE
    usual_upscaler: str = "x2"
    pipeline: PipelineInfo | None = None
    host: Callable[[HostFacts], bool] = never
    sources: Mapping[str, str] = field(default_factory=dict[str, str], compare=False)

    def get_preset(self, name: str | None = None) -> Preset:
        """The preset of that name or tier.

        Args:
            name: a preset's name, or one of `TIERS`: "fast" is the family's preset of fewest low steps, "best" that of
                most; None or "balanced": the default.

        Raises:
            MrFlowError: with the names there are.
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
