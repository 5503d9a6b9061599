"""Ideas that may beat staged 12+1, each as a way at about the same cost.

`opened` is the staged way with replaceable parts; without replacements its images equal those of `ways.staged` bit for
bit. An idea enters the package only if this benchmark shows a gain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.quality.ways import FAMILY, Made, Model, Way, native, planned, staged
from mrflow_sched import make_plan
from mrflow_sched.measure.calibrate import band_power, bound, local_power
from mrflow_sched.sampling.method import Method, Plain, StageRun
from mrflow_sched.sampling.noise import add_noise, draw_noise
from mrflow_sched.upscaling.fit import upscale_to

FITTED_ON = 64  # training scenes that corrections are fitted on


@dataclass(frozen=True)
class Parts:
    """What may be replaced. Every function except `final` gets the model first.

    `low_noise(seeds, shape)`: noise of stage 1, and `high_noise(seeds, shape)` of the refine stage. `encoded(latents)`:
    the upscaled image's latents, corrected. `sigma(low)`: start sigma of each image, (B,). `final(low, upscaled,
    refined)`: the final image.
    """

    low_noise: Callable[[Model, Sequence[int], Sequence[int]], Tensor] | None = None
    high_noise: Callable[[Model, Sequence[int], Sequence[int]], Tensor] | None = None
    encoded: Callable[[Model, Tensor], Tensor] | None = None
    sigma: Callable[[Model, Tensor], Tensor] | None = None
    final: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Opened(Plain):
    """The published method with `parts` in place of its own, for one batch."""

    model: Any = None
    parts: Parts = Parts()
    sigmas: list[Tensor] = field(default_factory=list[Tensor])

    def start(self, run: StageRun, image: Tensor | None) -> Tensor:
        own = self.parts.low_noise or _own_noise
        return own(self.model, run.seeds, run.engine.latent_shape(run.stage.width, run.stage.height))

    def handoff(self, run: StageRun, images: Tensor) -> Tensor:
        parts, model = self.parts, self.model
        upscaled = upscale_to(images, run.stage.width, run.stage.height, run.upscaler)
        if run.hooks.keep:
            run.hooks.keep(f"stage {run.index + 1} upscaled", upscaled)
        clean = run.engine.encode(upscaled)
        clean = clean if parts.encoded is None else parts.encoded(model, clean)
        noise = (parts.high_noise or _own_noise)(model, run.seeds, clean.shape[1:])
        if parts.sigma is None:
            return add_noise(clean, noise, run.stage.start_sigma)
        self.sigmas[:] = [parts.sigma(model, images)]
        return add_noise(clean, noise, self.sigmas[0])

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        if run.index == 0 or not self.sigmas:
            return super().stage(run, latents)
        # One step to 0 is the clean estimate.
        return run.engine.denoise(latents, self.sigmas[0], run.text, guidance=run.stage.guidance)


def opened(size: int, name: str, parts: Parts | None = None, **numbers: object) -> Way:
    """The staged way of `make_plan(..., "12+1", **numbers)` with `parts` in place of its own."""
    plan = make_plan(FAMILY, size, size, "12+1", **numbers)  # type: ignore[arg-type]
    changed = parts or Parts()

    def method(model: Model, seeds: Sequence[int]) -> Method:
        return Opened(model=model, parts=changed)

    way = planned(name, "ideas", plan, method=method)
    if changed.final is None:
        return way
    final = changed.final

    def make(model: Model, prompts: Sequence[str], seeds: Sequence[int]) -> Made:
        made = way.make(model, prompts, seeds)
        assert made.low is not None
        assert made.upscaled is not None
        return replace(made, images=final(made.low, made.upscaled, made.images))

    return replace(way, make=make)


def _own_noise(model: Model, seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    return draw_noise(shape, seeds)


# ---------------------------------------------------------------------------------------------------------- the ideas


def nested_noise(model: Model, seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The final size's noise, averaged over 2x2 and scaled back to standard deviation 1, for the low size: a native
    image of the same seed starts from the same coarse noise."""
    channels, rows, columns = shape
    return 2 * functional.avg_pool2d(draw_noise((channels, 2 * rows, 2 * columns), seeds), 2)


def native_noise(model: Model, seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The noise that a native image of the same seed starts from, for the refine stage."""
    return draw_noise(shape, [seed - 1 for seed in seeds])


def sigma_of_error(model: Model, low: Tensor) -> Tensor:
    """A start sigma for every image: its noise is as strong as the upscaler's error in the latents where that is,
    measured where the ground truth is known, on the low-resolution image halved and upscaled again."""
    half = functional.interpolate(low, scale_factor=0.5, mode="area")
    again = upscale_to(half, low.shape[-1], low.shape[-2], model.upscalers["SR"])
    wrong = model.engine.encode(again) - model.engine.encode(low)
    return torch.tensor([min(max(bound(local_power(each[None], 2)), 0.05), 0.6) for each in wrong])


def whole_colours(low: Tensor, upscaled: Tensor, refined: Tensor) -> Tensor:
    """The refined image with the low-resolution image's mean of every colour channel."""
    return (refined + low.mean((2, 3), keepdim=True) - refined.mean((2, 3), keepdim=True)).clamp(0, 1)


def local_colours(low: Tensor, upscaled: Tensor, refined: Tensor) -> Tensor:
    """The refined image with the low-resolution image's colours at scales above 8 of its pixels."""
    coarse = functional.avg_pool2d(low, 8) - functional.avg_pool2d(refined, 8 * refined.shape[-1] // low.shape[-1])
    shift = functional.interpolate(coarse, refined.shape[-2:], mode="bilinear", align_corners=False)
    return (refined + shift).clamp(0, 1)


def where_it_varies(low: Tensor, upscaled: Tensor, refined: Tensor) -> Tensor:
    """Refined where the upscaled image varies within 9x9 pixels, the upscaled image elsewhere, blended."""
    grey = upscaled.mean(1, keepdim=True)
    mean, square = (functional.avg_pool2d(each, 9, 1, 4, count_include_pad=False) for each in (grey, grey**2))
    variance = (square - mean**2).clamp(min=0)
    share = (variance.sqrt() / 0.04).clamp(0, 1)
    return share * refined + (1 - share) * upscaled


@cache
def _pairs(model: Model) -> tuple[Tensor, Tensor]:
    """Latents of training scenes that were downscaled and upscaled, and of the scenes themselves, (N, C, h, w)."""
    from tools.train_demo import data

    engine = model.engine
    scenes = [torch.from_numpy(data.picture_at(index, size=model.size)) for index in range(FITTED_ON)]
    large = torch.stack(scenes).permute(0, 3, 1, 2).float().contiguous()
    small = functional.interpolate(large, scale_factor=0.5, mode="area")
    low = torch.cat([engine.decode(engine.encode(part)) for part in small.split(8)])
    upscaled = [upscale_to(part, model.size, model.size, model.upscalers["SR"]) for part in low.split(8)]
    return torch.cat([engine.encode(part) for part in upscaled]), engine.encode(large)


@cache
def _least_squares(model: Model, side: int) -> tuple[Tensor, Tensor]:
    """The convolution (C, C, side, side) and shift (C,) that bring upscaled latents nearest to those of the scenes."""
    made, true = _pairs(model)
    channels = made.shape[1]
    rows = functional.unfold(made, side, padding=side // 2).transpose(1, 2).flatten(0, 1).double()
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    wanted = true.flatten(2).transpose(1, 2).flatten(0, 1).double()
    gram = rows.T @ rows + 1e-4 * len(rows) * torch.eye(rows.shape[1], dtype=torch.float64)
    fitted = torch.linalg.solve(gram, rows.T @ wanted).float()
    return fitted[:-1].T.reshape(channels, channels, side, side).contiguous(), fitted[-1].contiguous()


def least_squares(side: int) -> Callable[[Model, Tensor], Tensor]:
    """Upscaled latents through a convolution that was fitted on training scenes."""

    def corrected(model: Model, latents: Tensor) -> Tensor:
        kernel, shift = _least_squares(model, side)
        return functional.conv2d(latents, kernel, shift, padding=side // 2)

    return corrected


@cache
def _gains(model: Model) -> Tensor:
    """Factor of every channel and frequency (C, h, w / 2 + 1), 0.5 to 2, that gives upscaled latents the scenes' mean
    power."""
    made, true = (torch.fft.rfft2(each).abs().square().mean(0) for each in _pairs(model))
    ratio = functional.avg_pool2d(true, 5, 1, 2) / functional.avg_pool2d(made, 5, 1, 2).clamp(min=1e-9)
    return ratio.sqrt().clamp(0.5, 2.0)


def same_power(model: Model, latents: Tensor) -> Tensor:
    """Upscaled latents with the scenes' mean power at every frequency."""
    return torch.fft.irfft2(torch.fft.rfft2(latents) * _gains(model), s=latents.shape[-2:])


def same_detail(model: Model, latents: Tensor) -> Tensor:
    """Upscaled latents with the scenes' mean power above the low-resolution image's Nyquist frequency: one factor."""
    made, true = (band_power(each, 2)[1] for each in _pairs(model))
    spectrum = torch.fft.rfft2(latents)
    down, across = torch.fft.fftfreq(latents.shape[-2]).abs(), torch.fft.rfftfreq(latents.shape[-1]).abs()
    above = torch.maximum(down[:, None], across) >= 0.25
    return torch.fft.irfft2(torch.where(above, (true / made) ** 0.5, 1.0) * spectrum, s=latents.shape[-2:])


@cache
def _upscaled_by(model: Model, upscaler: str) -> Model:
    return replace(model, upscalers={**model.upscalers, "SR": model.upscalers[upscaler]})


def upscaled_by(upscaler: str, way: Way) -> Way:
    """A way with another upscaler in place of our own, wherever that is used."""
    return replace(way, make=lambda model, prompts, seeds: way.make(_upscaled_by(model, upscaler), prompts, seeds))


def compared(size: int, upscaler: str) -> list[Way]:
    """12+1, native sampling, and all ideas, with an upscaler."""
    every = [staged(size), native(size, 20, "multistep"), *ideas(size)]
    return [upscaled_by(upscaler, way) for way in every]


def ideas(size: int) -> list[Way]:
    """All ideas, some of them plain options of `make_plan`."""
    return [
        opened(size, "nested noise", Parts(low_noise=nested_noise)),
        opened(size, "nested noise in both stages", Parts(low_noise=nested_noise, high_noise=native_noise)),
        opened(size, "sigma per image", Parts(sigma=sigma_of_error)),
        opened(size, "colour guard, whole image", Parts(final=whole_colours)),
        opened(size, "colour guard, local", Parts(final=local_colours)),
        opened(size, "refined where it varies", Parts(final=where_it_varies)),
        opened(size, "latents corrected, 1x1 fit", Parts(encoded=least_squares(1))),
        opened(size, "latents corrected, 3x3 fit", Parts(encoded=least_squares(3))),
        opened(size, "latents corrected, same power", Parts(encoded=same_power)),
        opened(size, "latents corrected, same detail", Parts(encoded=same_detail)),
        staged(size, "12+1", "8+2, euler", low_steps=8, refine_steps=2, solver="euler"),
        staged(size, "12+1", "6+2 from 0.45", low_steps=6, refine_steps=2, sigma=0.45),
        staged(size, "12+1", "6+2 from 0.6", low_steps=6, refine_steps=2, sigma=0.6),
        staged(size, "12+1", "8+2, multistep, shifted", low_steps=8, refine_steps=2, refine_curve="shifted"),
        staged(size, "12+1", "8+2 from 0.75", low_steps=8, refine_steps=2, sigma=0.75),
        staged(size, "12+1", "8+2 from 0.45", low_steps=8, refine_steps=2, sigma=0.45),
        staged(size, "12+1", "6+4 from 0.6", low_steps=6, refine_steps=4, sigma=0.6),
        staged(size, "12+1", "6+4 from 0.75", low_steps=6, refine_steps=4, sigma=0.75),
        staged(size, "12+1", "6+6 from 0.75, shifted", low_steps=6, refine_steps=6, sigma=0.75, refine_curve="shifted"),
    ]
