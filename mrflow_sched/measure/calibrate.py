"""Which start sigma and how many steps suit a model and an upscaler, measured on the model's own images.

Two powers decide. L is the power of clean latents above the frequencies that the low-resolution image can hold; noise
of that power hides whatever the upscaler put there, which gives the bound s* = sqrt(L) / (1 + sqrt(L)) (arXiv
2607.01642; docs/method.md, section 1.3). E is the power of the upscaler's own error there, which the paper cannot know
and which is measured here, with a bound of the same form. Most of an image is smooth, and what is lost is lost in small
places, a line of lettering or a face: so both are counted where they are (`local_power`), or the smooth rest would
average them away. A small sweep then starts the refine stage at several sigmas and measures the result: the recommended
sigma is the smallest one, from the smaller bound on, that gives the image the fine detail of the model's own images.
Interpolation errs little in smooth images and leaves detail out all the same: there the bound is that of L.

Power is in units of white noise of standard deviation 1, the noise that samplers start from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.cancel import Cancelled, ignore
from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched.measure.metrics import psnr
from mrflow_sched.plan.checks import MAX_STEPS
from mrflow_sched.plan.families import Family, Preset
from mrflow_sched.plan.make import make_native_plan, make_plan
from mrflow_sched.plan.notes import USUAL_SIGMA
from mrflow_sched.sampler import sample_staged
from mrflow_sched.upscaling.fit import upscale_to
from mrflow_sched.upscaling.lanczos import resize_lanczos
from mrflow_sched.upscaling.role import kind_of

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.sampling.engine import Engine
    from mrflow_sched.upscaling.role import PixelUpscaler

__all__ = ["Calibration", "SweepRow", "band_power", "bound", "calibrate", "local_power"]

SWEPT = (0.05, 0.08, 0.1, 0.12, 0.15, 0.18, 0.22, 0.27, 0.33, 0.4, 0.5, 0.6)
LOW_STEPS = (4, 6, 8, 10, 12, 16, 20)
WINDOW = 8
"""Side of the windows of `local_power`, in latent pixels: about a letter, or an eye."""
NEAR_DB = 1.0
"""High-frequency power within this of the model's own counts as the model's own."""
CONVERGED = 32
"""Heun steps that stand for infinitely many."""
PROVEN = 20
"""Euler steps of stage 1 in the paper's larger setting: fewer steps of a more accurate solver are compared with it."""
PRESET = "calibrated"
MAX_PSNR = 100.0
_FORMAT = "mrflow-calibration-1"


@dataclass(frozen=True)
class SweepRow:
    """The refine stage from one start sigma.

    Attributes:
        sigma: Where it starts.
        refine_steps: Its steps.
        detail_db: High-frequency power over the model's own, in dB.
        psnr: Of the result against the image that was downscaled, in dB.
    """

    sigma: float
    refine_steps: int
    detail_db: float
    psnr: float


@dataclass(frozen=True)
class Calibration:
    """What was measured and what follows from it, for one model, one upscaler and one size step.

    Powers are in units of white noise of standard deviation 1; "above" and "below" refer to the Nyquist frequency of
    the low-resolution image.

    Attributes:
        family: Name of the model's family.
        upscaler: Name of the upscaler.
        width: Width of the images in pixels.
        height: Their height.
        factor: Size step between the stages.
        pictures: Number of images measured.
        clean_power: L, power of the clean latents above, where it is (`local_power`).
        error_power: Power of the upscaler's error in the latents above, likewise.
        error_power_low: Its mean below.
        bound: The start sigma whose noise is as strong as L.
        error_bound: The start sigma whose noise is as strong as the error above.
        sweep: The refine stage at several sigmas.
        low_steps_distance: (solver, steps, distance) of stage 1: the RMS distance of its latents from converged ones,
            relative to their RMS.
        sigma: The recommended start sigma.
        low_steps: The recommended number of steps of stage 1.
        refine_steps: The recommended number of refine steps.
    """

    family: str
    upscaler: str
    width: int
    height: int
    factor: float
    pictures: int
    clean_power: float
    error_power: float
    error_power_low: float
    bound: float
    error_bound: float
    sweep: tuple[SweepRow, ...]
    low_steps_distance: tuple[tuple[str, int, float], ...]
    sigma: float
    low_steps: int
    refine_steps: int

    @property
    def preset(self) -> Preset:
        """The recommendation as a preset."""
        return Preset(
            PRESET, self.low_steps, self.refine_steps, self.sigma, f"measured with {self.upscaler}", measured=True
        )

    def apply(self, family: Family) -> Family:
        """A family with the recommendation as its default preset.

        Args:
            family: The family that was measured.

        Returns:
            A copy of it, with a preset named "calibrated" in front.

        Raises:
            MrFlowError: It is another family.
        """
        if family.name != self.family:
            raise MrFlowError(f"the calibration is of family {self.family}, not {family.name}; calibrate this model.")
        kept = tuple(preset for preset in family.presets if preset.name != PRESET)
        return replace(family, presets=(self.preset, *kept), default_preset=PRESET)

    def to_json(self) -> str:
        """The calibration as JSON.

        Returns:
            Text that `from_json` reads back exactly.
        """
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what `to_json` wrote.

        Args:
            text: The contents of a calibration file.

        Returns:
            An equal calibration.

        Raises:
            MrFlowError: `text` is anything else, or a number is out of range.
        """
        try:
            data: dict[str, Any] = dict(json.loads(text))
            if data.pop("format", None) != _FORMAT:
                raise MrFlowError("it is of another format")
            data["sweep"] = tuple(SweepRow(**row) for row in data["sweep"])
            data["low_steps_distance"] = tuple((str(s), int(n), float(d)) for s, n, d in data["low_steps_distance"])
            found = cls(**data)
            found.check()
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            raise MrFlowError(
                f"this is not a calibration ({first_line(error)}); make one with mrflow calibrate."
            ) from error
        return found

    def check(self) -> None:
        """Refuse values that a plan would use and `calibrate` never writes.

        Raises:
            MrFlowError: A name is not text, or a number is out of range; the sentence stands within another one.
        """
        for name in ("family", "upscaler"):
            if type(getattr(self, name)) is not str:
                raise MrFlowError(f"its {name} is not text")
        for name, low in (("low_steps", 1), ("refine_steps", 0)):
            steps: object = getattr(self, name)
            if type(steps) is not int or not low <= steps <= MAX_STEPS:
                raise MrFlowError(f"its {name} is not a whole number from {low} to {MAX_STEPS}")
        if not 0 < self.sigma < 1:
            raise MrFlowError("its sigma does not lie between 0 and 1")


def calibrate(
    engine: Engine,
    upscaler: PixelUpscaler | None,
    *,
    prompts: Sequence[str],
    width: int,
    height: int,
    factor: float | None = None,
    images: Tensor | None = None,
    native_steps: int | None = None,
    seed: int = 0,
    tell: Callable[[str], object] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Calibration:
    """Measure which start sigma and steps suit a model with an upscaler; the module's text says how.

    Args:
        engine: The model.
        upscaler: What upscales; None: Lanczos.
        prompts: One per image to measure.
        width: Width of the images in pixels.
        height: Their height in pixels.
        factor: The size step between the stages; None: the family's.
        images: (B, 3, H, W) in [0, 1], of about the size, one per prompt; None: sampled natively.
        native_steps: Steps of the native images; None: the family's own number.
        seed: Seed of the first image; image i has seed + i.
        tell: Receives a sentence on what is being measured.
        cancel: Polled at every step.

    Returns:
        The measurements and the recommendation.

    Raises:
        MrFlowError: Arguments do not fit together.
        Cancelled: `cancel` answered True.
        MemoryError: Memory ran out.
    """
    if not prompts:
        raise MrFlowError("prompts is empty; give one per image to measure.")
    if images is not None and len(images) != len(prompts):
        raise MrFlowError(f"images must be one per prompt, got {len(images)} for {len(prompts)} prompts.")
    say = tell or ignore
    family = engine.family
    step = family.factor if factor is None else factor
    plan = make_plan(family, width, height, factor=step, seed=seed)
    low, high = plan.stages[0], plan.stages[-1]
    seeds = [seed + index for index in range(len(prompts))]

    def sampled(plan: StagedPlan, **more: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            sample_staged(engine, plan, prompt, upscaler=upscaler, seeds=[own], cancel=cancel, **_row(more, index))
            for index, (prompt, own) in enumerate(zip(prompts, seeds, strict=True))
        ]
        if any(part.cancelled for part in parts):
            raise Cancelled
        if any(part.unfinished for part in parts):
            raise MemoryError("memory ran out while measuring; choose a smaller size or free memory.")
        latents = [part.latents for part in parts if part.latents is not None]
        return torch.cat([part.images for part in parts]), torch.cat(latents)

    with torch.no_grad():
        if images is None:
            say(f"{len(prompts)} native image{'s' * (len(prompts) > 1)} at {high.width}x{high.height}")
            large, _ = sampled(make_native_plan(family, width, height, steps=native_steps, seed=seed))
        else:
            large = upscale_to(images.to(engine.device), high.width, high.height)
        say(f"spectra of the model and of {_name(upscaler)}")
        small = resize_lanczos(large, low.width, low.height).clamp(0, 1)
        clean = torch.cat([engine.encode(each[None]) for each in large])
        upscaled = upscale_to(small, high.width, high.height, upscaler)
        wrong = torch.cat([engine.encode(each[None]) for each in upscaled]) - clean
        detailed = band_power(unfold_patches(clean, family), step)[1]
        error_low = band_power(unfold_patches(wrong, family), step)[0]
        power, error = (local_power(unfold_patches(each, family), step) for each in (clean, wrong))

        def refined(sigma: float, steps: int) -> SweepRow:
            say(f"refining from sigma {sigma:g} in {steps} step{'s' if steps > 1 else ''}")
            started = make_plan(family, width, height, factor=step, sigma=sigma, refine_steps=steps, seed=seed)
            made, latents = sampled(started, image=small)
            detail = band_power(unfold_patches(latents, family), step)[1]
            return SweepRow(sigma, steps, _decibel(detail / detailed), _psnr(made, large))

        unaided = kind_of(upscaler) == "interpolation"
        least = bound(power) if unaided else min(bound(power), bound(error))
        starts = sorted({*SWEPT, round(bound(power), 2), round(bound(error), 2)})
        rows = [refined(start, 1) for start in starts if USUAL_SIGMA[0] <= start <= USUAL_SIGMA[1]]
        best = choose(rows, min(round(least, 2), max(row.sigma for row in rows)))
        rows.append(refined(best.sigma, 2))
        twice = abs(best.detail_db) - abs(rows[-1].detail_db) > NEAR_DB
        say(f"steps at {low.width}x{low.height}")
        distances = _low_distances(family, low.width, low.height, seed, sampled)
    return Calibration(
        family=family.name,
        upscaler=_name(upscaler),
        width=high.width,
        height=high.height,
        factor=step,
        pictures=len(prompts),
        clean_power=power,
        error_power=error,
        error_power_low=error_low,
        bound=bound(power),
        error_bound=bound(error),
        sweep=tuple(rows),
        low_steps_distance=distances,
        sigma=best.sigma,
        low_steps=fewest_steps(distances),
        refine_steps=2 if twice else 1,
    )


def bound(power: float) -> float:
    """The start sigma s whose noise is as strong as a `power` that is scaled by 1 - s: sqrt(L) / (1 + sqrt(L)).

    Source: docs/method.md, section 1.3.

    Args:
        power: L, 0 or more, in units of white noise.

    Returns:
        A sigma in [0, 1).

    Raises:
        MrFlowError: `power` is negative or NaN.
    """
    if not power >= 0:
        raise MrFlowError(f"power must not be negative, got {power!r}.")
    root = math.sqrt(power)
    return root / (1 + root)


def band_power(latents: Tensor, factor: float) -> tuple[float, float]:
    """Mean power per frequency below and above the Nyquist frequency of a coarser grid.

    Args:
        latents: (B, C, h, w).
        factor: How many times coarser that grid is, above 1.

    Returns:
        The power below and above; 1 for white noise of standard deviation 1. The mean value itself is left out.
    """
    fft: Any = torch.fft  # without types
    spectrum: Tensor = fft.fft2(latents.float(), norm="ortho").abs().square().mean((0, 1)).cpu()
    highest = _frequencies(latents)
    above = highest >= 0.5 / factor
    below = ~above & (highest > 0)
    return float(spectrum[below].mean()) if bool(below.any()) else 0.0, float(spectrum[above].mean())


def local_power(latents: Tensor, factor: float) -> float:
    """The power above the Nyquist frequency of a coarser grid, where it is.

    That of each window, averaged with itself as the weight: one place in sixteen that has all of it decides.

    Args:
        latents: (B, C, h, w).
        factor: How many times coarser that grid is, above 1.

    Returns:
        The power per frequency; that of `band_power` where every window has the same.
    """
    fft: Any = torch.fft  # without types
    above = _frequencies(latents) >= 0.5 / factor
    kept = fft.fft2(latents.float(), norm="ortho") * above.to(latents.device)
    detail: Tensor = fft.ifft2(kept, norm="ortho").real
    power = detail.square().mean(1, keepdim=True) / float(above.float().mean())
    sides = [min(WINDOW, side) for side in latents.shape[-2:]]
    windows = functional.avg_pool2d(power, sides, [max(1, side // 2) for side in sides]).double()
    total = float(windows.sum())
    return float(windows.square().sum()) / total if total > 0 else 0.0


def _frequencies(latents: Tensor) -> Tensor:
    """The higher of the two frequencies of every coefficient of latents (B, C, h, w), in cycles per latent pixel."""
    fft: Any = torch.fft  # without types
    down: Tensor = fft.fftfreq(latents.shape[-2]).abs()
    across: Tensor = fft.fftfreq(latents.shape[-1]).abs()
    return torch.maximum(down[:, None], across[None])


def choose(rows: Sequence[SweepRow], least: float) -> SweepRow:
    """The row of the recommended start sigma.

    Args:
        rows: The sweep.
        least: The smallest sigma allowed; where no row has one, all rows count.

    Returns:
        The smallest sigma whose detail is within `NEAR_DB` of the model's own; where none is, the nearest one.
    """
    allowed = [row for row in rows if row.sigma >= least - 1e-9] or list(rows)
    near = [row for row in allowed if abs(row.detail_db) <= NEAR_DB]
    if near:
        return min(near, key=lambda row: row.sigma)
    return min(allowed, key=lambda row: abs(row.detail_db))


# -------------------------------------------------------------------------------------------------------------- helpers


def _low_distances(
    family: Family, width: int, height: int, seed: int, sampled: Callable[[StagedPlan], tuple[Tensor, Tensor]]
) -> tuple[tuple[str, int, float], ...]:
    """How far low images of few steps are from converged ones: of the family's solver, and of the paper's setting."""

    def latents(solver: str, steps: int) -> Tensor:
        return sampled(make_native_plan(family, width, height, steps=steps, solver=solver, seed=seed))[1]

    converged = latents("heun", CONVERGED)
    size = float(converged.square().mean().sqrt())
    wanted = [("euler", PROVEN), *((family.solver, steps) for steps in LOW_STEPS)]
    return tuple(
        (solver, steps, float((latents(solver, steps) - converged).square().mean().sqrt()) / size)
        for solver, steps in dict.fromkeys(wanted)
    )


def fewest_steps(distances: Sequence[tuple[str, int, float]]) -> int:
    """The recommended number of steps of stage 1.

    Args:
        distances: (solver, steps, distance to the converged image); the first row is Euler with `PROVEN` steps.

    Returns:
        The fewest steps that come as near as the first row, or `PROVEN` where none do.
    """
    proven = distances[0][2]
    near = [steps for _, steps, distance in distances[1:] if distance <= proven]
    return min(near) if near else PROVEN


def unfold_patches(latents: Tensor, family: Family) -> Tensor:
    """Latents with one value per latent pixel, so that frequencies are those of pixels.

    Args:
        latents: (B, C, h, w), where FLUX.2 holds a 2x2 patch in its channels.
        family: Its `latent_channels` tells whether there are patches.

    Returns:
        (B, C/4, 2h, 2w) where there are patches, else `latents`.
    """
    batch, channels, rows, columns = latents.shape
    if channels != 4 * family.latent_channels:
        return latents
    patches = latents.reshape(batch, channels // 4, 2, 2, rows, columns).permute(0, 1, 4, 2, 5, 3)
    return patches.reshape(batch, channels // 4, 2 * rows, 2 * columns)


def _row(more: Mapping[str, Tensor], index: int) -> dict[str, Any]:
    return {name: value[index : index + 1] for name, value in more.items()}


def _decibel(ratio: float) -> float:
    return 10 * math.log10(max(ratio, 1e-12))


def _psnr(a: Tensor, b: Tensor) -> float:
    """PSNR of the mean square error over all images; equal ones count as `MAX_PSNR`, as JSON has no infinity."""
    return min(float(psnr(a[None], b[None])), MAX_PSNR)


def _name(upscaler: PixelUpscaler | None) -> str:
    return "Lanczos" if upscaler is None else upscaler.name
