"""Ways of making an image, each as a function of prompts and seeds: native, staged, and common alternatives."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from bench import reference
from bench.quality import foreign
from mrflow_sched import demo, load_upscaler, make_native_plan, make_plan
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.images.convert import from_pictures, to_pil
from mrflow_sched.plan.schedule import native_sigmas, shift_sigma, unshift_sigma
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import sample_staged
from mrflow_sched.sampling.method import Method, Plain, StageRun
from mrflow_sched.sampling.noise import add_noise, draw_noise
from mrflow_sched.upscaling.fit import upscale_to
from mrflow_sched.upscaling.lanczos import LanczosUpscaler

FAMILY = "demo"
REGRESSED = Path(__file__).parent / "regressed_x2.safetensors"
"""An upscaler like the embedded one, trained without a discriminator: the weight average that
`train_demo.sr.train(work, UpscalerSettings(seconds=400, gan_from=1.0, pool=1500))` writes, in 16 bits."""


@dataclass(frozen=True)
class Twice:
    """A x2 network run twice as a x4 one; `upscale_to` then downscales its result, as with x4 models."""

    once: Any
    scale: int = 4

    @property
    def name(self) -> str:
        return f"{self.once.name} twice"

    def __call__(self, images: Tensor) -> Tensor:
        return self.once(self.once(images))


@dataclass(frozen=True)
class Damaged:
    """Another upscaler that gets pictures out of JPEG files of `quality`, as most pictures on the web are."""

    then: Any
    quality: int = 60

    @property
    def scale(self) -> int:
        return self.then.scale

    @property
    def name(self) -> str:
        return f"{self.then.name} of JPEG {self.quality}"

    def __call__(self, images: Tensor) -> Tensor:
        return self.then(torch.cat([self._damaged(image) for image in images]).to(images.device))

    def _damaged(self, image: Tensor) -> Tensor:
        file = io.BytesIO()
        to_pil(image).save(file, "JPEG", quality=self.quality)
        return from_pictures(Image.open(file))


UPSCALERS = ("SR", "regressed", "SR twice, halved", "SR of a damaged low picture", *foreign.NETWORKS, "Lanczos")
"""Every upscaler by name: our own, those of others (`foreign`), and none."""
NOT_OURS = (*foreign.NETWORKS, "Lanczos")
AUTHORS_SIGMA = 0.12
"""Where the authors' refine step starts; the embedded model's own presets start higher."""


@dataclass(frozen=True, eq=False)
class Model:
    """The embedded model and its upscalers, loaded once; `size` is the final side in pixels.

    `upscalers` holds those of `UPSCALERS` that are on this machine.
    """

    engine: Any
    upscalers: dict[str, Any]
    size: int

    @classmethod
    def load(cls, size: int) -> Model:
        gan, regressed = load_upscaler(demo.upscaler_path()), load_upscaler(REGRESSED)
        own = {"SR": gan, "regressed": regressed, "SR twice, halved": Twice(gan), "Lanczos": LanczosUpscaler()}
        damaged = {"SR of a damaged low picture": Damaged(gan)}
        others = {name: foreign.loaded(file) for name, file in foreign.installed().items()}
        return cls(demo.load_engine(), {**own, **damaged, **others}, size)

    @property
    def guidance(self) -> float:
        return self.engine.family.guidance


@dataclass(frozen=True)
class Made:
    """Final images (N, 3, H, W) and, if there are any, the images of the low stage and the upscaled ones."""

    images: Tensor
    low: Tensor | None = None
    upscaled: Tensor | None = None


@dataclass(frozen=True)
class Way:
    """One way. `cost` is its work in the network, in forwards at the final size; `kind` groups it in the plot;
    `upscaler` is the one that it needs."""

    name: str
    kind: str
    cost: float
    make: Callable[[Model, Sequence[str], Sequence[int]], Made]
    upscaler: str = "SR"


def planned(
    name: str,
    kind: str,
    plan: StagedPlan,
    upscaler: str = "SR",
    *,
    around: Callable[[Any], Any] = lambda engine: engine,
    method: Callable[[Model, Sequence[int]], Method] | None = None,
    negative: str | None = None,
) -> Way:
    """A way that the sampler runs, on the engine that `around` makes of the model's, with the seeds' `method`."""

    def make(model: Model, prompts: Sequence[str], seeds: Sequence[int]) -> Made:
        engine, upscale = around(model.engine), _upscaler(model, upscaler)
        how = None if method is None else method(model, seeds)
        asked: dict[str, Any] = {"upscaler": upscale, "seeds": seeds, "keep_stages": True, "method": how}
        done = sample_staged(engine, plan, prompts, negative_prompt=negative, **asked)
        on_the_way = {stage.name: stage.image for stage in done.stages}
        return Made(done.images, on_the_way.get("stage 1"), on_the_way.get("stage 2 upscaled"))

    return Way(name, kind, sum(plan.stage_costs()), make, upscaler)


def _upscaler(model: Model, name: str) -> Any:
    if name == "reference":
        return reference.Tiles(model.upscalers["SR"], rounded=True)
    if name not in model.upscalers:
        raise MrFlowError(f"the upscaler {name!r} is not installed; {foreign.COMMAND}.")
    return model.upscalers[name]


def not_installed(ways: Sequence[Way]) -> dict[str, str]:
    """The ways whose upscaler is not on this machine, and the command that installs it, by the way's name."""
    missing = set(foreign.NETWORKS) - set(foreign.installed())
    return {way.name: foreign.COMMAND for way in ways if way.upscaler in missing}


def native(size: int, steps: int, solver: str = "euler") -> Way:
    """Plain sampling at the final size."""
    plan = make_native_plan(FAMILY, size, size, steps=steps, solver=solver)
    return planned(f"native {steps}" + ("" if solver == "euler" else f" {solver}"), "native", plan)


def staged(size: int, preset: str = "12+1", name: str = "", upscaler: str = "SR", **numbers: Any) -> Way:
    """Our method, with `numbers` of `make_plan`."""
    plan = make_plan(FAMILY, size, size, preset, **numbers)
    return planned(name or f"staged {plan.preset}", "staged", plan, upscaler)


def refined_and_not(size: int, upscaler: str, name: str = "") -> list[Way]:
    """ "NAME 12+1" and "NAME 12+0" with an upscaler: a pair that the bench must tell apart (known.py)."""
    return [
        staged(size, "12+1", f"{name or upscaler} 12+{steps}", upscaler=upscaler, refine_steps=steps)
        for steps in (1, 0)
    ]


@dataclass(frozen=True)
class FromLatents(Plain):
    """The handoff by `upscale(latents, images)` of stage 1's latents and decoded images, with noise of `seeds` in place
    of the stage's own."""

    upscale: Callable[[Tensor, Tensor], Tensor] = lambda latents, images: latents
    seeds: Sequence[int] = ()
    kept: list[Tensor] = field(default_factory=list[Tensor])

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        made = super().stage(run, latents)
        self.kept[:] = [made]
        return made

    def handoff(self, run: StageRun, images: Tensor) -> Tensor:
        clean = self.upscale(self.kept[0], images)
        return add_noise(clean, draw_noise(clean.shape[1:], self.seeds), run.stage.start_sigma)


def hires_fix(size: int, steps: int, hires_steps: int, denoise: float, latent: bool) -> Way:
    """What WebUIs call hires fix, from half size: the host's fixed shift in both passes; denoising strength and that
    shift give the second pass's start sigma.

    In pixels the same network upscales the image, through 8 bits; latents are upscaled bilinearly. The second pass has
    the first one's seed.
    """
    shift = math.exp(host_mu())
    walked = int(hires_steps / denoise)
    tail = [shift_sigma((hires_steps - i) / walked, shift) for i in range(hires_steps)] + [0.0]

    def method(model: Model, seeds: Sequence[int]) -> Method:
        def upscaled(latents: Tensor, images: Tensor) -> Tensor:
            if latent:
                return functional.interpolate(latents, scale_factor=2, mode="bilinear", align_corners=False)
            large = upscale_to((images * 255).floor() / 255, size, size, model.upscalers["SR"])
            return model.engine.encode((large * 255).floor() / 255)

        return FromLatents(upscale=upscaled, seeds=seeds)

    word = "latent" if latent else "pixel"
    name = f"hires fix, {word}, {steps}+{hires_steps}, denoise {denoise:g} (sigma {tail[0]:.2f})"
    return planned(name, "hires fix", _two_stages(size, native_sigmas(steps, mu=host_mu()), tail), method=method)


def midway(size: int, steps: int, until: int, high_steps: int) -> Way:
    """Latents upscaled midway, as in Bottleneck Sampling and RALU: `until` of `steps` low steps, the clean estimate
    upscaled (nearest), noise at the sigma that was reached, then `high_steps` at the final size."""
    low, high = (make_native_plan(FAMILY, side, side, steps=steps) for side in (size // 2, size))
    sigmas = low.stages[0].sigmas
    reached = sigmas[until]
    mu = high.stages[0].mu or 0.0
    begin = unshift_sigma(reached, math.exp(mu))
    tail = [shift_sigma(begin * (1 - i / high_steps), math.exp(mu)) for i in range(high_steps)] + [0.0]

    def method(model: Model, seeds: Sequence[int]) -> Method:
        def upscaled(latents: Tensor, images: Tensor) -> Tensor:
            return functional.interpolate(latents, scale_factor=2, mode="nearest")

        return FromLatents(upscale=upscaled, seeds=[seed + 1 for seed in seeds])

    # Euler's step to 0 gives the clean estimate of the last sigma before it.
    plan = _two_stages(size, (*sigmas[:until], 0.0), tail)
    name = f"latents upscaled midway, {until} low + {high_steps} (sigma {reached:.2f})"
    return planned(name, "midway", plan, method=method)


def _two_stages(size: int, first: Sequence[float], second: Sequence[float]) -> StagedPlan:
    """Half size and full size by Euler, each with its own sigmas."""
    plan = make_plan(FAMILY, size, size, sigmas=first, solver="euler", refine_steps=len(second) - 1)
    low, high = plan.stages
    return replace(plan, stages=(low, replace(high, sigmas=tuple(second), recipe="")))


def host_mu() -> float:
    """mu of WebUI hosts: that of the model's full size, for images of every size."""
    return make_native_plan(FAMILY, 256, 256, steps=1).stages[0].mu or 0.0


def equal_cost(size: int) -> list[Way]:
    """The ways that the trade-off plot compares."""
    return [
        *(native(size, steps) for steps in (50, 20, 12, 8, 4)),
        *(native(size, steps, "multistep") for steps in (20, 12, 8, 4)),
        *(staged(size, preset) for preset in ("20+1", "12+1", "8+1", "6+1")),
        staged(size, low_steps=4),
        *(staged(size, "12+1", f"staged 12+1 {solver}", solver=solver) for solver in ("euler", "careful", "dpmpp_2m")),
        staged(size, "12+1", "staged 6+1 heun", solver="heun", low_steps=6),
        staged(size, name="staged 6+2 from 0.45", low_steps=6, refine_steps=2, sigma=0.45),
        staged(size, name="staged 6+4 from 0.6", low_steps=6, refine_steps=4, sigma=0.6, refine_curve="shifted"),
        staged(size, "12+1", "no refine, 12+0", refine_steps=0),
        *refined_and_not(size, "Lanczos", "no SR network,"),
        *(way for name in foreign.NETWORKS for way in refined_and_not(size, name)),
        staged(size, "12+1", f"staged 12+1 from {AUTHORS_SIGMA:g}", sigma=AUTHORS_SIGMA),
        *(staged(size, "12+1", f"{name} 12+1 from {AUTHORS_SIGMA:g}", name, sigma=AUTHORS_SIGMA) for name in NOT_OURS),
        *(staged(size, "12+1", f"{name} 12+4 from 0.75", name, refine_steps=4, sigma=0.75) for name in NOT_OURS),
        staged(
            size,
            "12+1",
            "reference procedure, 12+1",
            "reference",
            solver="euler",
            posterior="sample",
            sigma=AUTHORS_SIGMA,
        ),
        hires_fix(size, 12, 1, 0.12, latent=False),
        hires_fix(size, 12, 4, 0.12, latent=False),
        hires_fix(size, 12, 1, 0.32, latent=False),
        hires_fix(size, 12, 1, 0.12, latent=True),
        hires_fix(size, 12, 1, 0.32, latent=True),
        hires_fix(size, 12, 4, 0.5, latent=True),
        midway(size, 12, 8, 2),
        midway(size, 12, 6, 4),
    ]
