"""What is known of a kind of model: the values that one file of this folder fills in for its families."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, cast

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.plan.betas import TrainingBetas
from mrflow_sched.plan.checks import MAX_STAGES, MAX_STEPS
from mrflow_sched.plan.schedule import scaled_linear_ve, validate_sigmas

__all__ = [
    "PURPOSES",
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

Prediction = Literal["flow", "epsilon", "v", "edm"]
Positions = Literal["told", "made", "none"]
GuidanceKind = Literal["embedded", "cfg", "none"]
FlowShift = Literal["none", "static", "exponential", "root", "flux2", "beta", "logit-normal", "trigflow", "list"]
ShiftKind = FlowShift | Literal["scaled-linear", "zero-snr", "betas", "edm"]

TIERS = ("fast", "balanced", "best")
"""Names that every family has a preset for; "balanced" is its default."""
PURPOSES = ("text", "detail")
"""Names that every family has a preset for, too: images with lettering, and small things in large images."""
_TEXT_SIGMA = 0.18
_TEXT_SOURCE = "authors' advice of 0.16 to 0.20 for images with lettering (docs/method.md, section 1.5)"
_DETAIL_STEPS, _DETAIL_SIGMA = 4, 0.75
_DETAIL_SOURCE = "python -m bench.quality --kinds on the embedded model (docs/kinds.md); not measured on other families"


# ---------------------------------------------------------------------------------------------------------- schedules


@dataclass(frozen=True, slots=True)
class ShiftRule:
    """How a family makes the sigmas of stage 1. Refine schedules never use it.

    Attributes:
        kind: "none" evenly spaced; "static" a fixed `shift` >= 1; "exponential" exp(mu) with mu on a line through
            (`base_tokens`, `base_shift`) and (`max_tokens`, `max_shift`); "root" the same with mu = `base_shift` +
            `max_shift` * sqrt(tokens / `base_tokens`); "flux2" its empirical mu of tokens and steps; "beta"
            Beta(0.6, 0.6) quantiles, then the static `shift`; "logit-normal" quantiles of a logit-normal distribution
            of deviation `std` and mean `base_shift` at `base_tokens`, 0.5 more for each natural logarithm of tokens
            above; "scaled-linear" the training betas of SD1.5 and SDXL;
            "zero-snr" the same, rescaled to zero terminal SNR; "betas" others, `betas`; "edm" from the sigma_ve
            `sigma_max` to `sigma_min`, spaced by `rho`; "trigflow" evenly spaced angles; "list" a distilled model's own
            sigmas.
        shift: The fixed shift of "static" and "beta"; 1 is no shift.
        base_tokens: Image tokens at the first point of the line of "exponential", and those of "root".
        max_tokens: Image tokens at its second point.
        base_shift: Value of mu at the first point.
        max_shift: Value of mu at the second point.
        factor: What these give is not mu but the shift itself, exp(mu) ("linear" time shift in diffusers).
        terminal: The schedule is stretched so that its last sigma above 0 is this one; None: it is not stretched.
        sigma_min: The last sigma before the shift; None: 1/steps. For "edm" the last sigma_ve.
        sigma_max: The first sigma_ve of "edm".
        rho: Roots of this order are evenly spaced in "edm"; None: logarithms are.
        beta: The finished schedule is spaced anew between its ends, at quantiles of Beta(beta, beta); None: it is not.
        roots: It is spaced anew so that its roots of this order are evenly spaced (0: its logarithms); None: it is not.
        ahead: The sigma before the shift that one more step would reach; None: 0. Not used with `sigma_min`.
        whole: Sigmas before the shift are rounded down to multiples of 1/whole; None: they are not.
        up: They are rounded up instead.
        betas: The training betas of "betas".
        std: Standard deviation of the logits of "logit-normal".
        middle: The angle in the middle of two steps of "trigflow"; None: half the way.
        lists: The schedules of "list", each from 1 to 0; the step count selects one.

    Raises:
        MrFlowError: `lists` is given for another kind, is missing for "list", or does not start at 1; likewise
            `betas`, and `sigma_max` and `sigma_min` for "edm".
    """

    kind: ShiftKind
    shift: float = 1.0
    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    factor: bool = False
    terminal: float | None = None
    sigma_min: float | None = None
    beta: float | None = None
    roots: float | None = None
    ahead: float | None = None
    whole: int | None = None
    up: bool = False
    betas: TrainingBetas | None = None
    std: float | None = None
    middle: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    lists: tuple[tuple[float, ...], ...] = ()

    @property
    def largest_ve(self) -> float:
        """The sigma_ve at which variance-exploding models are given pure noise: 14.6 for SD1.5 and SDXL."""
        if self.sigma_max is not None:
            return self.sigma_max
        if self.betas is not None:
            return self.betas.levels[-1]
        return scaled_linear_ve(self.kind == "zero-snr")[-1]

    def __post_init__(self) -> None:
        if (self.kind == "list") != bool(self.lists):
            raise MrFlowError(f"lists must be given for the shift rule 'list' and no other, got {self.lists!r}.")
        if (self.kind == "betas") != (self.betas is not None):
            raise MrFlowError(f"betas must be given for the shift rule 'betas' and no other, got {self.betas!r}.")
        if (self.kind == "edm") != (self.sigma_max is not None) or (self.kind == "edm" and self.sigma_min is None):
            raise MrFlowError(f"sigma_max and sigma_min must be given for the shift rule 'edm', got {self!r}.")
        for sigmas in self.lists:
            if validate_sigmas(sigmas, "lists")[0] != 1.0:
                raise MrFlowError(f"lists must start at 1, which is pure noise, got {sigmas!r}.")


@dataclass(frozen=True, slots=True)
class Preset:
    """A named choice of step counts and start sigma.

    Attributes:
        name: Such as "12+1".
        low_steps: Steps of stage 1.
        refine_steps: Steps of every later stage.
        sigma: Fraction of noise at which refining starts.
        source: Where the numbers come from.
        measured: They were measured on this family with the upscaler that is used or with every kind, so they hold
            whatever its kind; False: they are for an upscaler that is a network (`refining.for_upscaler`).
        few_step: Stage 1 runs with the few-step LoRA that comes with the model.
    """

    name: str
    low_steps: int
    refine_steps: int
    sigma: float
    source: str
    measured: bool = False
    few_step: bool = False


def steps_in(name: str) -> tuple[int, ...]:
    """The step counts that a preset's name spells out.

    Args:
        name: "10+1", or "10+1+2" with a count for every later stage.

    Returns:
        The counts, that of stage 1 from 1 and the others from 0 to `MAX_STEPS`; () for any other name.
    """
    if not re.fullmatch(r"[0-9]{1,4}(\+[0-9]{1,4}){1,7}", name):
        return ()
    steps = tuple(map(int, name.split("+")))
    return steps if steps[0] > 0 and max(steps) <= MAX_STEPS else ()


# --------------------------------------------------------------------------------------------------------------- cost


@dataclass(frozen=True, slots=True)
class PixelCost:
    """The cost of a part that works on pixels.

    Attributes:
        linear: FLOP per pixel.
        squared: FLOP per squared pixel, of attention over the whole image.
        alive: Bytes of tensors alive at once per pixel, in 16 bits.
    """

    linear: float
    squared: float
    alive: float

    def flop(self, pixels: int) -> float:
        """FLOP for one image.

        Args:
            pixels: Width times height.

        Returns:
            linear * pixels + squared * pixels^2.
        """
        return self.linear * pixels + self.squared * pixels**2


@dataclass(frozen=True, slots=True)
class VaeCost:
    """The cost of a VAE.

    Attributes:
        decode: Cost of its decoder.
        encode: Cost of its encoder.
        weights: Number of its weights.
    """

    decode: PixelCost
    encode: PixelCost
    weights: float


@dataclass(frozen=True, slots=True)
class NetworkCost:
    """The memory of a network.

    Attributes:
        weights: Number of its weights.
        alive: Bytes of tensors alive at once per token, text included, while it runs in 16 bits.
    """

    weights: float
    alive: float


# ------------------------------------------------------------------------------------------- where a family is found


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineInfo:
    """The diffusers pipelines of a family and their conventions.

    Attributes:
        classes: A regular expression that the names of the text-to-image classes match.
        titles: Pairs of a name for people and the class it stands for, as `mrflow doctor` shows them.
        tells: Whether a loaded pipeline of these classes is of this family.
        positions: What the network knows of where a token lies: it is "told", it is "made" by the network from the size
            of what it is given, or "none" (convolutions see their surroundings only).
        layout: The class of `engines.diffusers.layouts` that packs, scales and decodes its latents ("Layout": the plain
            kind).
        even_list: The pipeline gives its scheduler evenly spaced sigmas; False: the scheduler makes its own.
        text_outputs: What `encode_prompt` returns, in order, by the names that the pipeline's call takes ("": not
            passed on).
        casts_latents: The pipeline casts given latents to its network's dtype by itself.
        positive_first: Its doubled CFG batch is [positive, negative] instead of [negative, positive].
        max_sequence_length: Text tokens to ask the pipeline for; None: its own default is right.
        reads_patch: The family's models differ in patch size: that of the network's configuration holds.
        experimental: The method has not been tried on such a model.
    """

    classes: str
    titles: tuple[tuple[str, str], ...]
    tells: Callable[[Any], bool]
    positions: Positions = "made"
    layout: str = "Layout"
    even_list: bool = True
    text_outputs: tuple[str, ...] = ()
    casts_latents: bool = True
    positive_first: bool = False
    max_sequence_length: int | None = None
    reads_patch: bool = False
    experimental: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What a host, a WebUI or ComfyUI, says of its loaded model.

    Attributes:
        engine: Name of the class that holds the model; in ComfyUI that of its configuration, such as "FluxSchnell".
        name: The checkpoint's name, in lower case: for what the model itself cannot tell.
        repository: The repository that its configuration names, in lower case.
        flow: It predicts a velocity.
        guidance: The CFG scale that is asked for; None: none is.
        distilled_scale: The network reads a guidance scale.
        is_sd3: The host's own mark of SD3.
        is_sdxl: The host's own mark of SDXL.
        config: What ComfyUI found out about the network, such as its "depth" or "hidden_size"; empty in a WebUI.
        latent_channels: Channels of the latents; None: the host does not say.
    """

    engine: str
    name: str = ""
    repository: str = ""
    flow: bool = True
    guidance: float | None = None
    distilled_scale: bool = True
    is_sd3: bool = False
    is_sdxl: bool = False
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    latent_channels: int | None = None

    @property
    def distilled(self) -> bool:
        """Whether it is distilled to few steps, of two models that share one network: by its name, else by a CFG of 1.

        Hosts configure both alike.
        """
        named = named_distilled(self.name)
        return self.guidance == 1 if named is None else named

    def number(self, key: str) -> int:
        """A whole number of `config`.

        Args:
            key: Such as "depth".

        Returns:
            The number; 0 where there is none.
        """
        value = self.config.get(key)
        return value if isinstance(value, int) else 0


def named_distilled(name: str) -> bool | None:
    """Whether a checkpoint's name says that it is distilled to few steps, where two models share one network.

    Args:
        name: The name in lower case.

    Returns:
        True for names such as "z_image_turbo", False for those such as "krea2-raw"; None where it says neither.
    """
    if re.search(r"turbo|(?<!un)(?<!un[-_ ])(?<!de)(?<!de[-_ ])distill|lightning|(?<![0-9])[1-9][-_ ]?steps?", name):
        return True
    return False if re.search(r"base|distill|(?<![a-z])raw(?![a-z])", name) else None


def never(facts: Any) -> bool:
    """Match nothing: for families that only the user can name.

    Args:
        facts: A pipeline or `HostFacts`; not read.

    Returns:
        False.
    """
    return False


def always(facts: Any) -> bool:
    """Match everything: for families that their classes identify already.

    Args:
        facts: A pipeline or `HostFacts`; not read.

    Returns:
        True.
    """
    return True


# --------------------------------------------------------------------------------------------------------- the family

# FLOP, bytes and weights of diffusers' AutoencoderKL with a factor of 8, as FLUX.1 has it.
KL_VAE = VaeCost(PixelCost(9.463e6, 0.5, 1537.0), PixelCost(4.132e6, 0.5, 1286.0), 8.38e7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of model. Sizes are in pixels, steps and guidance are those of native sampling.

    Attributes:
        name: Such as "flux1-dev".
        title: Its name for people.
        shift: How it makes the sigmas of stage 1.
        guidance_kind: "embedded" (the scale is an input, one forward per step), "cfg" (two forwards per step) or
            "none".
        guidance: The usual scale; 1 is off.
        text_tokens: Text tokens that share the network's sequence (0 where text enters by cross attention).
        native_steps: Usual number of steps.
        presets: Its presets, the default one among them.
        prediction: What the network predicts: velocity ("flow"), noise ("epsilon"), "v", or as in EDM
            ("edm").
        rescaled_flow: It is a flow that its pipeline counts in sigma_ve, so converting sigmas approximates nothing.
        grid: Sides must be multiples of it: mostly of a token's side, `vae_factor` x `patch`, else of some tokens'.
        vae_factor: Pixels per latent pixel along a side.
        patch: Latent pixels per token along a side.
        latent_channels: Channels of the VAE's latents.
        native_size: (width, height) that it is trained for.
        default_size: The staged image where no size is asked for; None: `native_size`.
        factor: Size step between stages.
        min_low_side: An image of less area than a square of this side is outside its trained range.
        default_preset: Name of the preset where none is asked for.
        solver: Solver of staged plans where none is asked for.
        renoise: Share of the noise that stage 1 draws anew after each step, as the model's own sampler does; 0: none.
        linear_cost: FLOP of one forward per token of image and text.
        attention_cost: FLOP of one forward per squared token.
        network_cost: Memory of the network; None: not counted.
        vae_cost: Work and memory of the VAE; None: not counted.
        usual_upscaler: The name in `cost.UPSCALER_FLOP` that its cost is counted with.
        pipeline: Its diffusers pipelines; None: rehearsed.
        host: Whether a host's loaded model is of this family.
        sources: Where the value of each field comes from; not part of equality.
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
    rescaled_flow: bool = False
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
    renoise: float = 0.0
    linear_cost: float = 1.0
    attention_cost: float = 0.0
    network_cost: NetworkCost | None = None
    vae_cost: VaeCost | None = KL_VAE
    usual_upscaler: str = "x2"
    pipeline: PipelineInfo | None = None
    host: Callable[[HostFacts], bool] = never
    sources: Mapping[str, str] = field(default_factory=dict[str, str], compare=False)

    def __reduce__(self) -> tuple[Callable[..., Family], tuple[dict[str, Any], dict[str, str]]]:
        # A read-only mapping can be neither copied nor pickled.
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "sources"}
        return _remade, (values, dict(self.sources))

    @property
    def preset_names(self) -> tuple[str, ...]:
        """Every name that `get_preset` knows, step counts apart: `TIERS`, `PURPOSES`, then its own presets."""
        return tuple(dict.fromkeys((*TIERS, *PURPOSES, *(preset.name for preset in self.presets))))

    def get_preset(self, name: str | None = None) -> Preset:
        """The preset of a name or tier.

        Args:
            name: A preset's name, or one of `TIERS`: "fast" is the family's preset of fewest low steps, "best" that of
                most; None or "balanced": the default. Or one of `PURPOSES`: the default with a refine stage for it,
                unless the family has a preset of that name. Or "N+M", the steps of stage 1 and of the later ones, with
                the default preset's sigma unless the family has a preset of that name. Upper case is the same as lower.

        Returns:
            The preset.

        Raises:
            MrFlowError: The name is unknown; the sentence lists those that exist.
        """
        text = cast("object", self.default_preset if name is None else name)
        wanted = text.lower() if isinstance(text, str) else ""
        if wanted in ("fast", "best"):
            choose = min if wanted == "fast" else max
            own = [preset for preset in self.presets if not preset.few_step]
            return choose(own, key=lambda preset: preset.low_steps)
        if wanted == "balanced":
            wanted = self.default_preset
        for preset in self.presets:
            if preset.name == wanted:
                return preset
        if wanted in PURPOSES:
            return self._preset_for(wanted)
        steps = steps_in(wanted)
        if len(steps) == 2:
            low, refine = steps
            return Preset(f"{low}+{refine}", low, refine, self.get_preset().sigma, "step counts of the user")
        if re.fullmatch(r"[0-9]+(\+[0-9]+)+", wanted):
            raise MrFlowError(
                f"preset {quoted(name)} must have 1 to {MAX_STEPS} steps in stage 1, and 0 to {MAX_STEPS} in each "
                f"of up to {MAX_STAGES - 1} later stages."
            )
        raise MrFlowError(
            f"preset {quoted(name)} is not one of family {self.name!r}; choose from {', '.join(self.preset_names)}, or "
            f"any low-size steps + full-size steps such as 10+1, up to {MAX_STEPS} each."
        )

    def _preset_for(self, purpose: str) -> Preset:
        """The default preset with the refine stage of one of `PURPOSES`.

        Detail that stage 1 has no pixels for takes several steps from much noise; a model distilled to few steps is
        given at most half of them.
        """
        usual = self.get_preset()
        if purpose == "text" and usual.sigma >= _TEXT_SIGMA:
            return replace(usual, name=purpose)
        if purpose == "text":
            return replace(usual, name=purpose, sigma=_TEXT_SIGMA, source=_TEXT_SOURCE)
        steps = max(usual.refine_steps, min(_DETAIL_STEPS, self.native_steps // 2))
        return replace(usual, name=purpose, refine_steps=steps, sigma=_DETAIL_SIGMA, source=_DETAIL_SOURCE)

    def forward_cost(self, tokens: int) -> float:
        """FLOP of one forward on one sample.

        Args:
            tokens: Image tokens; those of the text are added.

        Returns:
            linear_cost * n + attention_cost * n^2 for n tokens in all.
        """
        total = tokens + self.text_tokens
        return self.linear_cost * total + self.attention_cost * total**2


def _remade(values: dict[str, Any], sources: dict[str, str]) -> Family:
    return Family(**values, sources=MappingProxyType(sources))
