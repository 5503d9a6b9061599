"""How a job's time compares with sampling natively: measured after it, expected before it.

Both sides are counted alike: the same model, final size and guidance, the VAE's decoder on both. What only MrFlow needs
(the other decoder and encoder runs, the upscaler, loading in between) counts on its side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mrflow_sched.apps.webui.controls import Controls
from mrflow_sched.apps.webui.host import ModelInfo
from mrflow_sched.apps.webui.recipe import Recipe
from mrflow_sched.apps.webui.upscaler import is_interpolation, scale_in_name
from mrflow_sched.plan.cost import UPSCALER_FLOP, Speeds
from mrflow_sched.plan.families import Family

__all__ = ["LEAST", "TYPICAL", "Expected", "expect", "learn", "phrase", "steps_beside", "times_as_long"]

LEAST = 1.2
"""The least ratio that is called faster: below it the differences between two equal runs are larger."""

# Measured by `python -m bench.speed.parts` on one H100 (80 GB), torch 2.11: FLUX.1-dev's network, VAE and RRDBNet x2 in
# their true sizes with random weights, in 16 bits, at 512 to 2048 pixels a side.
TYPICAL = Speeds(network=2.10e-15, forward=0.0260, decode=8.58e-15, encode=1.01e-14, upscale=1.74e-14)
"""Speeds of a GPU that holds all parts at once. Only their ratios matter: other GPUs are slower in all of them."""

_USUAL_STEPS = 20
"""What the WebUI's page starts with."""
_LARGEST = 4096
"""The longest side that is proposed, in pixels."""
_GRID = 64

_learned: dict[tuple[str, str], Speeds] = {}
"""Speeds of this machine in the last clean run, by family and upscaler, while the WebUI runs."""


@dataclass(frozen=True)
class Expected:
    """How much faster a job is expected to be.

    Attributes:
        faster: Seconds of native sampling over those of the job.
        than_steps: Steps of native sampling.
        pays_from: (width, height) in pixels of about the smallest image of this shape that gains; None: this one does,
            or none up to 4096 pixels.
    """

    faster: float
    than_steps: int
    pays_from: tuple[int, int] | None = None


def steps_beside(model: ModelInfo, steps: int | None) -> int:
    """Return the native steps to compare with: the user's, but no more than the model needs.

    Args:
        model: The model.
        steps: Steps on the page; None: 20.

    Returns:
        A number of steps.
    """
    asked = _USUAL_STEPS if steps is None else steps
    return min(asked, model.family.native_steps) if model.known else asked


# ------------------------------------------------------------------------------------------------------------- expected


@dataclass(frozen=True)
class _Work:
    """A job at any size of one shape, beside native sampling.

    Attributes:
        family: The model's family.
        upscaler: FLOP of the upscaler per pixel of the small image.
        share: Area of the low-resolution image over that of the final one.
        low: (steps, evaluations of the network per step) of stage 1.
        refine: The same of the refine stage.
        native: The same of native sampling.
    """

    family: Family
    upscaler: float
    share: float
    low: tuple[int, int]
    refine: tuple[int, int]
    native: tuple[int, int]

    def faster(self, pixels: float, speeds: Speeds) -> float:
        """Compare the two for one size of the final image.

        Args:
            pixels: Its width times its height.
            speeds: Of the machine.

        Returns:
            Seconds of native sampling over those of the job.
        """
        vae, small = self.family.vae_cost, self.share * pixels
        decode = 0.0 if vae is None else speeds.decode * vae.decode.flop(round(pixels))
        between = speeds.upscale * self.upscaler * small
        if vae is not None:
            between += speeds.decode * vae.decode.flop(round(small)) + speeds.encode * vae.encode.flop(round(pixels))
        ours = self._sampling(small, self.low, speeds) + between + self._sampling(pixels, self.refine, speeds) + decode
        return (self._sampling(pixels, self.native, speeds) + decode) / ours

    def _sampling(self, pixels: float, work: tuple[int, int], speeds: Speeds) -> float:
        steps, evaluations = work
        flop = self.family.forward_cost(max(round(pixels / self.family.grid**2), 1))
        return steps * evaluations * (speeds.network * flop + speeds.forward)


def expect(
    recipe: Recipe, model: ModelInfo, controls: Controls, steps: int | None = None, guidance: float | None = None
) -> Expected | None:
    """Compare a job with native sampling before it runs: by this machine's last run, else by a typical GPU's speeds.

    Args:
        recipe: All numbers of the job.
        model: The model.
        controls: What the user chose.
        steps: "Sampling steps" on the page; None: 20.
        guidance: The CFG scale on the page; None: the family's.

    Returns:
        The comparison; None for a model whose cost is not known.
    """
    family = model.family
    if not model.known:
        return None
    first = _evaluations(family.guidance if guidance is None and family.guidance_kind == "cfg" else guidance)
    refine = {"same": first, "off": 1, "value": _evaluations(controls.refine_cfg_value)}[controls.refine_cfg]
    beside, pixels = steps_beside(model, steps), recipe.width * recipe.height
    work = _Work(
        family=family,
        upscaler=_upscaler_flop(recipe.upscaler),
        share=recipe.low_width * recipe.low_height / pixels,
        low=(recipe.low_steps, first),
        refine=(recipe.refine_steps, refine),
        native=(beside, first),
    )
    speeds = _learned.get((family.name, recipe.upscaler), TYPICAL)
    faster = work.faster(pixels, speeds)
    return Expected(faster, beside, None if faster >= LEAST else _pays_from(work, recipe, speeds))


def _evaluations(guidance: float | None) -> int:
    """Return how often hosts ask the network per step: twice with guidance, at a CFG scale other than 1."""
    return 1 if guidance in (None, 1) else 2


def _upscaler_flop(name: str) -> float:
    if is_interpolation(name):
        return UPSCALER_FLOP["lanczos"]
    return UPSCALER_FLOP["x4" if scale_in_name(name) == 4 else "x2"]


def _pays_from(work: _Work, recipe: Recipe, speeds: Speeds) -> tuple[int, int] | None:
    longest = max(recipe.width, recipe.height)
    for side in range((longest // _GRID + 1) * _GRID, _LARGEST + 1, _GRID):
        width, height = (max(round(each * side / longest / _GRID), 1) * _GRID for each in (recipe.width, recipe.height))
        if work.faster(width * height, speeds) >= LEAST:
            return width, height
    return None


def phrase(expected: Expected) -> str:
    """Say what to expect.

    Args:
        expected: The comparison.

    Returns:
        The end of the line about a job.
    """
    steps = expected.than_steps
    if expected.faster >= LEAST:
        faster = f"{expected.faster:.{1 if expected.faster < 9.95 else 0}f}"
        return f"about {faster}× faster than {steps} steps"
    if expected.pays_from is None:
        return f"no faster than {steps} steps at this size"
    width, height = expected.pays_from
    return f"no faster than {steps} steps at this size; pays from about {width}×{height} up"


# ------------------------------------------------------------------------------------------------------------- measured


def times_as_long(recipe: Recipe, model: ModelInfo, seconds: Mapping[str, float], steps: int) -> float | None:
    """Compare a finished job with native sampling by its own seconds, summed over its batches.

    Args:
        recipe: All numbers of the job.
        model: The model.
        seconds: Seconds by part, see `job.Run`. The guidance must have been the same in both passes.
        steps: Steps of native sampling.

    Returns:
        Seconds of native sampling over those of the job; None where a part was not measured or was disturbed.
    """
    if not _clean(recipe, model, seconds):
        return None
    each = seconds["network"] / recipe.refine_steps
    native = seconds["before"] + steps * each + seconds["decode"]
    return native / _spent(seconds)


def _spent(seconds: Mapping[str, float]) -> float:
    return seconds["start"] + seconds["upscale"] + seconds["refine"]


def _clean(recipe: Recipe, model: ModelInfo, seconds: Mapping[str, float]) -> bool:
    """Return whether the two passes took times that a plan explains.

    A step of stage 1 is never slower than one of the refine stage, and not much faster than their FLOP say: small
    forwards use a device worse than large ones. Loading, and other users of the device, break one or the other.
    """
    if any(name not in seconds for name in ("before", "first", "network", "decode", "start", "upscale", "refine")):
        return False
    low, high = recipe.plan.stages[0].tokens, recipe.plan.stages[-1].tokens
    least = 0.6 * model.family.forward_cost(low) / model.family.forward_cost(high)
    first, refine = seconds["first"] / recipe.low_steps, seconds["network"] / recipe.refine_steps
    return 0 < least * refine <= first <= refine  # NaN, from a pass that did not end, is none of these


def learn(recipe: Recipe, model: ModelInfo, seconds: Mapping[str, float], images: int, guidance: float) -> None:
    """Keep this machine's speeds from a finished job for `expect`, if its seconds can be used.

    Args:
        recipe: All numbers of the job.
        model: The model.
        seconds: As in `times_as_long`.
        images: Images that were made.
        guidance: The CFG scale of both passes.
    """
    family, vae = model.family, model.family.vae_cost
    low, high = recipe.plan.stages[0], recipe.plan.stages[-1]
    if not model.known or vae is None or low.tokens >= high.tokens or not _clean(recipe, model, seconds):
        return
    calls = images * _evaluations(guidance)
    works = [family.forward_cost(stage.tokens) for stage in (low, high)]
    times = seconds["first"] / recipe.low_steps / calls, seconds["network"] / recipe.refine_steps / calls
    network = (times[1] - times[0]) / (works[1] - works[0])
    network = min(network, times[0] / works[0])  # else a forward would take less than no time beside its FLOP
    decode = seconds["decode"] / images / vae.decode.flop(high.width * high.height)
    inside = sum(seconds[name] for name in ("before", "first", "network", "decode"))
    between = (_spent(seconds) - inside) / images - decode * vae.decode.flop(low.width * low.height)
    usual = TYPICAL.upscale * _upscaler_flop(recipe.upscaler) * low.width * low.height
    usual += TYPICAL.encode * vae.encode.flop(high.width * high.height)
    slower = max(between, 0.0) / usual
    _learned[family.name, recipe.upscaler] = Speeds(
        network=network,
        forward=times[0] - network * works[0],
        decode=decode,
        encode=slower * TYPICAL.encode,
        upscale=slower * TYPICAL.upscale,
    )
