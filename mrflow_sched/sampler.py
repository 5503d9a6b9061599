"""The staged sampler: the loop that turns a plan into pictures. Read `sample_staged` first, then downwards.

Stage 1 goes from pure noise to a finished low-resolution image. Every later stage takes the image before it, enlarges
it in pixel space, encodes it, adds a little noise and removes that again (`handoff`). Everything is a float tensor on
the engine's device from the first noise to the last image.

The sampler changes nothing that it is given: it installs no hook, sets no attribute, reads no global random state, and
gradient recording is back as it was when it returns or raises.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mrflow_sched.handoff import handoff
from mrflow_sched.noise import add_noise, draw_noise, model_sigmas, stage_seed
from mrflow_sched.solvers import Cancelled, get_solver, solver_forwards

if TYPE_CHECKING:
    from mrflow_sched.engines.base import Engine
    from mrflow_sched.plan import Stage, StagedPlan
    from mrflow_sched.upscale import PixelUpscaler

__all__ = ["Progress", "StageImage", "StageTiming", "StagedResult", "sample_staged"]


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    `fraction` rises from 0 to 1 with the network's cost, so a bar drawn from it moves evenly in time. `stage` (from
    1) of `stages`; `step` of `steps` within it (0 before the first). `name`: the part at work, as in
    `StagedResult.timings`, at last "done". `denoised`: the clean estimate of the step just evaluated, latents (B,
    ...), else None.
    """

    fraction: float
    stage: int
    stages: int
    step: int
    steps: int
    name: str
    denoised: Tensor | None = None


@dataclass(frozen=True)
class StageImage:
    """A picture on the way: "stage 1" (decoded) or "stage 2 upscaled"; `image` (B, 3, H, W) in [0, 1]."""

    name: str
    image: Tensor


@dataclass(frozen=True)
class StageTiming:
    """Wall-clock seconds of one part, measured with the device's queue empty at both ends."""

    name: str
    seconds: float


@dataclass(frozen=True)
class StagedResult:
    """What a run made.

    `images` (B, 3, H, W, float32 in [0, 1], on the engine's device): the pictures, or where `cancelled` the best so
    far. `stages`: the pictures on the way, if asked for. `timings` in order: "text", "stage 1 sample", "stage 1
    decode", "upscale", "encode", "noise", "stage 2 sample", "stage 2 decode", and so on. `seeds`: the stage-1 noise
    seed of each image. `warnings`: sentences for the user. `forwards`: network evaluations per image that were really
    made.
    """

    images: Tensor
    stages: tuple[StageImage, ...]
    timings: tuple[StageTiming, ...]
    plan: StagedPlan
    seeds: tuple[int, ...]
    cancelled: bool
    warnings: tuple[str, ...]
    forwards: int


def sample_staged(
    engine: Engine,
    plan: StagedPlan,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    batch: int = 1,
    upscaler: PixelUpscaler | None = None,
    callback: Callable[[Progress], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    keep_stages: bool = False,
    image: Tensor | None = None,
) -> StagedResult:
    """Make the pictures of `plan` with `engine`: method of arXiv 2607.01642 (spec 1.2); a one-stage plan samples
    natively.

    `prompt`: one for all images of the `batch`, or a sequence with one each. `upscaler`: None means Lanczos.
    `callback` hears every part and step. `cancel` is asked at each of them; where it answers True (or the callback
    raises `Cancelled`) the result is the best picture so far: in stage 1 its clean estimate, after that the last
    decoded or upscaled image. `image` ((3, H, W) or (B, 3, H, W) in [0, 1]) takes the place of stage 1: upscale mode.
    With the plan's seed rule "offset", image i of a batch is what seed + i makes alone. Raises ValueError for
    arguments that do not fit; other exceptions of the engine and KeyboardInterrupt pass through.
    """
    prompts = _one_each(prompt, batch, "prompt")
    run = _Run(engine, plan, len(prompts), upscaler, callback, cancel, keep_stages)
    run.images = None if image is None else _start_images(image, run)
    with torch.no_grad():
        try:
            text = _encode_text(run, prompts, negative_prompt)
            for index in range(0 if image is None else 1, len(plan.stages)):
                latents = _first_noise(run) if index == 0 else _hand_over(run, index)
                if latents is not None:
                    latents = _sample(run, index, latents, text)
                    _decode(run, index, latents)
            run.finish()
        except Cancelled:
            return run.result(cancelled=True)
    return run.result(cancelled=False)


# ------------------------------------------------------------------------------------------------------------ the parts


def _encode_text(run: _Run, prompts: Sequence[str], negative_prompt: str | Sequence[str] | None) -> Any:
    """Conditioning of the whole batch, made once for all stages."""
    negative = None if negative_prompt is None else _one_each(negative_prompt, len(prompts), "negative_prompt")
    run.begin("text", 0 if run.images is None else 1)
    run.stop_if_cancelled()
    return run.engine.encode_text(prompts, negative)


def _first_noise(run: _Run) -> Tensor:
    """Pure noise at the first stage's size, one stream per image."""
    stage = run.plan.stages[0]
    noise = draw_noise(run.engine.latent_shape(stage.width, stage.height), run.seeds(0), device=run.engine.device)
    return add_noise(torch.zeros_like(noise), noise, stage.start_sigma, run.engine.family.prediction)


def _hand_over(run: _Run, index: int) -> Tensor | None:
    """Latents at which stage `index` starts, made from the image before it; None where the stage takes no step."""
    # Only the upscaler is interrupted: once its picture is there, it is worth the wait to have it as the best so far.
    result = handoff(
        run.engine,
        run.best_images(),
        run.plan.stages[index],
        run.upscaler,
        seeds=run.seeds(index),
        posterior=run.plan.posterior,
        on_part=lambda name: run.begin(name, index),
        cancel=lambda: run.part == "upscale" and run.cancel_asked(),
    )
    run.warnings.extend(result.warnings)
    run.keep(f"stage {index + 1} upscaled", result.image)
    run.stop_if_cancelled()
    return result.latents


def _sample(run: _Run, index: int, latents: Tensor, text: Any) -> Tensor:
    """The stage's finished latents: its solver, on its sigma list, with the network as the slope."""
    stage = run.plan.stages[index]
    run.begin(f"stage {index + 1} sample", index)
    run.stop_if_cancelled()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        run.count_forwards(stage)
        return run.engine.denoise(x, sigma, text, guidance=stage.guidance)

    def after_evaluation(state: dict[str, Any]) -> None:
        run.estimate = state["denoised"]
        run.report(int(state["i"]) + 1)
        run.stop_if_cancelled()

    sigmas = model_sigmas(stage.sigmas, run.engine.family.prediction)
    return get_solver(stage.solver)(denoise, latents, sigmas, callback=after_evaluation)


def _decode(run: _Run, index: int, latents: Tensor) -> None:
    """Turn finished latents into the run's images. Not interrupted: the picture is paid for."""
    run.begin(f"stage {index + 1} decode", index)
    images = run.engine.decode(latents)
    for number, picture in enumerate(images, 1):
        if not bool(torch.isfinite(picture).all()):
            run.warnings.append(f"Image {number} of stage {index + 1} holds values that are no numbers; try float32.")
    last = index == len(run.plan.stages) - 1
    run.keep(None if last else f"stage {index + 1}", images)


# ---------------------------------------------------------------------------------------------- what a run remembers


class _Run:
    """State of one run: the best picture so far, the clock, the progress, what to tell the user."""

    def __init__(
        self,
        engine: Engine,
        plan: StagedPlan,
        batch: int,
        upscaler: PixelUpscaler | None,
        callback: Callable[[Progress], object] | None,
        cancel: Callable[[], bool] | None,
        keep_stages: bool,
    ) -> None:
        self.engine, self.plan, self.batch, self.upscaler = engine, plan, batch, upscaler
        self.images: Tensor | None = None
        self.estimate: Tensor | None = None
        self.warnings: list[str] = []
        self.part = ""
        self._callback, self._cancel, self._keep_stages = callback, cancel, keep_stages
        self._stages: list[StageImage] = []
        self._timings: list[StageTiming] = []
        self._started = 0.0
        self._index = 0
        self._first: int | None = None
        self._forwards = 0.0
        if plan.family != engine.family.name:
            self.warnings.append(
                f"The plan is for family {plan.family} but the engine is {engine.family.name}: "
                "its sizes, sigma lists and guidance may not fit."
            )

    def seeds(self, index: int) -> tuple[int, ...]:
        """Noise seeds of stage `index`, one per image."""
        return tuple(stage_seed(self.plan.seed, i, index, self.plan.seed_rule) for i in range(self.batch))

    # --- pictures

    def keep(self, name: str | None, images: Tensor) -> None:
        """`images` are the best so far; under a `name` they are also a stage for those who asked to see them."""
        self.images, self.estimate = images, None
        if self._keep_stages and name is not None:
            self._stages.append(StageImage(name, images))

    def best_images(self) -> Tensor:
        """The best picture there is: the last finished one, else the current clean estimate, else mid grey."""
        if self.images is not None:
            return self.images
        if self.estimate is not None:
            return self.engine.decode(self.estimate)
        stage = self.plan.stages[0]
        self.warnings.append("The run was stopped before its first step: the picture is empty.")
        return torch.full((self.batch, 3, stage.height, stage.width), 0.5, device=self.engine.device)

    # --- clock and progress

    def begin(self, name: str, index: int) -> None:
        """End the part at work, start the part `name` of stage `index`, and say so."""
        self._end_part()
        self.part, self._index = name, index
        self._first = index if self._first is None else self._first
        self._started = time.perf_counter()
        self.report(0)

    def report(self, step: int) -> None:
        """Tell the callback where the run stands: `step` steps of the current stage are evaluated."""
        if self._callback is None:
            return
        stage = self.plan.stages[self._index]
        done = stage.steps if self.part.endswith("decode") else step
        counts = len(self.plan.stages), done, stage.steps
        estimate = self.estimate if step else None
        self._callback(Progress(self._fraction(done), self._index + 1, *counts, self.part, estimate))

    def finish(self) -> None:
        """End the last part and report the whole as done."""
        self._end_part()
        if self._callback is not None:
            stages, steps = len(self.plan.stages), self.plan.stages[-1].steps
            self._callback(Progress(1.0, stages, stages, steps, steps, "done"))

    def _fraction(self, done: int) -> float:
        """Share of the run's network cost that is spent after `done` steps of the current stage."""
        costs = self.plan.stage_costs()[self._first :]
        before = self._index - (self._first or 0)
        within = done / max(self.plan.stages[self._index].steps, 1)
        total = sum(costs)
        return min((sum(costs[:before]) + within * costs[before]) / total, 1.0) if total > 0 else 0.0

    def _end_part(self) -> None:
        if self.part:
            _wait_for(self.engine.device)
            self._timings.append(StageTiming(self.part, time.perf_counter() - self._started))
        self.part = ""

    # --- cancelling and counting

    def cancel_asked(self) -> bool:
        """Whether the caller wants the run to stop."""
        return self._cancel is not None and bool(self._cancel())

    def stop_if_cancelled(self) -> None:
        """Raise Cancelled where the caller wants the run to stop."""
        if self.cancel_asked():
            raise Cancelled

    def count_forwards(self, stage: Stage) -> None:
        """One solver evaluation of `stage`: with classifier-free guidance that is two forwards of the network."""
        self._forwards += stage.forwards / solver_forwards(stage.solver, stage.steps)

    def result(self, *, cancelled: bool) -> StagedResult:
        """The run as its caller gets it."""
        self._end_part()
        return StagedResult(
            images=self.best_images(),
            stages=tuple(self._stages),
            timings=tuple(self._timings),
            plan=self.plan,
            seeds=self.seeds(0),
            cancelled=cancelled,
            warnings=tuple(self.warnings),
            forwards=round(self._forwards),
        )


# -------------------------------------------------------------------------------------------------------------- helpers


def _one_each(text: str | Sequence[str], batch: int, name: str) -> list[str]:
    """One text per image. Raises ValueError where the counts do not fit or nothing is asked for."""
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch!r}; it is the number of images.")
    if isinstance(text, str):
        return [text] * batch
    texts = list(text)
    if not texts or batch not in (1, len(texts)):
        raise ValueError(f"{name} must be one text or one per image, got {len(texts)} for a batch of {batch}.")
    return texts


def _start_images(image: Tensor, run: _Run) -> Tensor:
    """The picture that takes the place of stage 1, as (B, 3, H, W) on the device."""
    if len(run.plan.stages) < 2:
        raise ValueError("image needs a plan of two stages or more, got one stage; plan with stages=2.")
    images = image if image.ndim == 4 else image[None]
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] not in (1, run.batch):
        raise ValueError(
            f"image must be (3, H, W) or ({run.batch}, 3, H, W), got {tuple(image.shape)}; drop any alpha channel."
        )
    if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(f"image must hold floats from 0 to 1, got {image.dtype}; divide 8-bit values by 255.")
    return images.to(run.engine.device, torch.float32).expand(run.batch, -1, -1, -1)


def _wait_for(device: torch.device) -> None:
    """Let the device finish what is queued, so that a clock read now is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()
