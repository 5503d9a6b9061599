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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched._runtime.memory import is_memory_error
from mrflow_sched.methods.tiled import TiledEngine
from mrflow_sched.plan.recipes import explicit_recipe
from mrflow_sched.sampling.engine import StageEngine
from mrflow_sched.sampling.handoff import encode_images, handoff, stage_noise
from mrflow_sched.sampling.memory import within_memory
from mrflow_sched.sampling.noise import add_noise, draw_noise, model_sigmas, stage_seed, ve_to_sigma
from mrflow_sched.sampling.solvers import get_solver, solver_forwards
from mrflow_sched.upscaling.fit import upscale_to

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import Stage, StagedPlan
    from mrflow_sched.sampling.engine import Engine
    from mrflow_sched.upscaling.role import PixelUpscaler
from mrflow_sched.sampling.progress import Progress, StageTiming, wait_for

# img2img: levels of stage 1's list closer to the start than this factor are left out.
_SHORTEST_STEP = 0.98


@dataclass(frozen=True)
class StageImage:
    """A picture on the way: "stage 1" (decoded) or "stage 2 upscaled"; `image` (B, 3, H, W) in [0, 1]."""

    name: str
    image: Tensor


@dataclass(frozen=True)
class StagedResult:
    """What a run made.

    `images` (B, 3, H, W, float32 in [0, 1], on the engine's device): the pictures, or where `unfinished` the best so
    far. A run is unfinished where it was `cancelled` or memory ran out after its first picture (`warnings` says which).
    `latents` (B, *latent_shape): what the last stage's sampling made of them, None where `images` are not decoded from
    it. `stages`: the pictures on the way, if asked for. `timings` in order: "text", "stage 1 sample", "stage 1 decode",
    "upscale", "encode", "noise", "stage 2 sample", "stage 2 decode", and so on. `seeds`: the stage-1 noise seed of each
    image. `warnings`: sentences for the user. `forwards`: network evaluations per image that were really made.
    """

    images: Tensor
    stages: tuple[StageImage, ...]
    timings: tuple[StageTiming, ...]
    plan: StagedPlan
    seeds: tuple[int, ...]
    cancelled: bool
    warnings: tuple[str, ...]
    forwards: int
    unfinished: bool = False
    latents: Tensor | None = None


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
    start_sigma: float | None = None,
    seeds: Sequence[int] | None = None,
) -> StagedResult:
    """Make the pictures of `plan` with `engine`: method of arXiv 2607.01642 (spec 1.2); a one-stage plan samples
    natively.

    `prompt`: one for all images of the `batch`, or a sequence with one each. `upscaler`: None means Lanczos.
    `callback` hears every part and step. `cancel` is asked at each of them; where it answers True (or the callback
    raises `Cancelled`) the result is the best picture so far: in stage 1 its clean estimate, after that the last
    decoded or upscaled image. `image` ((3, H, W) or (B, 3, H, W) in [0, 1]) takes the place of stage 1: upscale mode.
    With `start_sigma` (0 to 1) as well, stage 1 starts from that image, brought to its size and noised to that level,
    and walks what its sigma list has below it. `seeds` gives each image its own seed; left out, they follow the plan's
    seed by its rule, and with the rule "offset" image i of a batch is what seed + i makes alone.
    Where memory runs out after the first picture, the best picture so far comes back with a warning, as if cancelled.
    Raises ValueError for arguments that do not fit; other exceptions of the engine and KeyboardInterrupt pass through.
    """
    prompts = _one_each(prompt, batch, "prompt")
    run = _Run(engine, plan, len(prompts), upscaler, callback, cancel, keep_stages, seeds)
    first = 0 if image is None or start_sigma is not None else 1
    given = None if image is None else _start_images(image, run)
    if start_sigma is not None:
        run.start_at(start_sigma, given)
    elif given is not None and len(plan.stages) < 2:
        raise MrFlowError("image needs a plan of two stages or more, got one stage; plan with stages=2.")
    run.images = given if first else None
    with torch.no_grad():
        try:
            text = _encode_text(run, prompts, negative_prompt)
            for index in range(first, len(plan.stages)):
                latents = _first_state(run, given) if index == 0 else _hand_over(run, index)
                if latents is not None:
                    latents = _sample(run, index, latents, text)
                    _decode(run, index, latents)
            run.finish()
        except Cancelled:
            return run.result(cancelled=True)
        except Exception as error:
            if not is_memory_error(error) or run.images is None:
                raise
            run.tell_of_memory()
    return run.result(cancelled=False)


# ------------------------------------------------------------------------------------------------------------ the parts


def _encode_text(run: _Run, prompts: Sequence[str], negative_prompt: str | Sequence[str] | None) -> Any:
    """Conditioning of the whole batch, made once for all stages."""
    negative = None if negative_prompt is None else _one_each(negative_prompt, len(prompts), "negative_prompt")
    run.begin("text", 0 if run.images is None else 1)
    run.stop_if_cancelled()
    return run.engine.encode_text(prompts, negative)


def _first_state(run: _Run, image: Tensor | None) -> Tensor:
    """Where the first stage starts: pure noise at its size, one stream per image, or a given image with noise in it."""
    stage, engine = run.stages[0], run.engine
    shape, seeds, posterior = engine.latent_shape(stage.width, stage.height), run.seeds(0), run.plan.posterior
    if image is None:
        noise = draw_noise(shape, seeds, device=engine.device)
        clean = torch.zeros_like(noise)
    else:
        noise = stage_noise(shape, posterior, seeds, device=engine.device)
        fitted = upscale_to(image, stage.width, stage.height)
        clean = encode_images(engine, fitted, posterior, seeds, warn=run.warnings.append)
    return add_noise(clean, noise, stage.start_sigma, engine.family.prediction, engine.family.shift.largest_ve)


def _hand_over(run: _Run, index: int) -> Tensor | None:
    """Latents at which stage `index` starts, made from the image before it; None where the stage takes no step."""
    result = handoff(
        run.engine,
        run.best_images(),
        run.stages[index],
        run.upscaler,
        seeds=run.seeds(index),
        posterior=run.plan.posterior,
        on_part=lambda name: run.begin(name, index),
        on_image=lambda image: run.keep(f"stage {index + 1} upscaled", image),
        cancel=run.cancel_asked,
    )
    run.warnings.extend(result.warnings)
    run.stop_if_cancelled()
    return result.latents


def _sample(run: _Run, index: int, latents: Tensor, text: Any) -> Tensor:
    """The stage's finished latents: its solver, on its sigma list, with the network as the slope."""
    stage, engine = run.stages[index], run.engine
    run.begin(f"stage {index + 1} sample", index)
    run.stop_if_cancelled()

    def guidance_at(sigma: Tensor) -> float:
        if stage.always_guided:
            return stage.guidance  # and no wait for the device
        level = float(sigma.flatten()[0])
        return stage.guidance_at(level if engine.family.prediction == "flow" else ve_to_sigma(level))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        run.count_forwards(stage)
        return engine.denoise(x, sigma, text, guidance=guidance_at(sigma))

    def after_evaluation(state: dict[str, Any]) -> None:
        run.estimate = state["denoised"]
        run.report(int(state["i"]) + 1)
        run.stop_if_cancelled()

    def count_too(state: dict[str, Any]) -> None:
        run.count_forwards(stage, state.get("images", run.batch) / run.batch)
        after_evaluation(state)

    sigmas = model_sigmas(stage.sigmas, engine.family.prediction, engine.family.shift.largest_ve)
    if run.plan.tiled(index):
        engine = TiledEngine(engine, run.plan.tile, cancel=run.stop_if_cancelled)
    elif stage.always_guided and isinstance(engine, StageEngine):
        return engine.sample_stage(stage.solver, latents, sigmas, text, guidance=stage.guidance, callback=count_too)
    return get_solver(stage.solver)(denoise, latents, sigmas, callback=after_evaluation)


def _decode(run: _Run, index: int, latents: Tensor) -> None:
    """Turn finished latents into the run's images. Not interrupted: the picture is paid for."""
    run.begin(f"stage {index + 1} decode", index)
    stage = run.stages[index]
    images = within_memory(
        lambda able, part: able.decode(latents[part]),
        run.engine,
        len(latents),
        f"decoding one image of {stage.width}x{stage.height}",
        warn=run.warnings.append,
    )
    for number, picture in enumerate(images, 1):
        if not bool(torch.isfinite(picture).all()):
            run.warnings.append(f"Image {number} of stage {index + 1} holds values that are no numbers; try float32.")
    last = index == len(run.stages) - 1
    run.keep(None if last else f"stage {index + 1}", images)
    run.latents = latents if last else None


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
        seeds: Sequence[int] | None,
    ) -> None:
        self.engine, self.plan, self.batch, self.upscaler = engine, plan, batch, upscaler
        self.stages = plan.stages
        self.images: Tensor | None = None
        self.latents: Tensor | None = None
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
        self._costs = plan.stage_costs()
        self._unfinished = False
        self._seeds = _checked_seeds(seeds, batch)
        if plan.family != engine.family.name:
            self.warnings.append(
                f"The plan is for family {plan.family} but the engine is {engine.family.name}: "
                "its sizes, sigma lists and guidance may not fit."
            )

    def seeds(self, index: int) -> tuple[int, ...]:
        """Noise seeds of stage `index`, one per image."""
        if self._seeds is not None:
            return tuple(stage_seed(seed, 0, index, self.plan.seed_rule) for seed in self._seeds)
        return tuple(stage_seed(self.plan.seed, i, index, self.plan.seed_rule) for i in range(self.batch))

    def start_at(self, sigma: float, image: Tensor | None) -> None:
        """Let stage 1 begin at `sigma`, where an image is given to begin from."""
        if image is None:
            raise MrFlowError(f"start_sigma={sigma!r} needs an image to start from; give image too, or leave it out.")
        if not 0.0 < sigma <= 1.0:
            raise MrFlowError(f"start_sigma must be above 0 and at most 1, got {sigma!r}; it is the fraction of noise.")
        first = self.stages[0]
        # A first step of no length to speak of would cost a forward and change nothing.
        below = tuple(level for level in first.sigmas if level < _SHORTEST_STEP * sigma)
        sigmas = (float(sigma), *below) if sigma < 1.0 else first.sigmas
        share = solver_forwards(first.solver, len(sigmas) - 1) / solver_forwards(first.solver, first.steps)
        begun = replace(
            first, sigmas=sigmas, forwards=round(first.forwards * share), recipe=explicit_recipe(sigmas), mu=None
        )
        self.stages = (begun, *self.stages[1:])
        self._costs = (self._costs[0] * share, *self._costs[1:])

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
        stage = self.stages[0]
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
        stage = self.stages[self._index]
        done = stage.steps if self.part.endswith("decode") else step
        counts = len(self.stages), done, stage.steps
        estimate = self.estimate if step else None
        self._callback(Progress(self._fraction(done), self._index + 1, *counts, self.part, estimate))

    def finish(self) -> None:
        """End the last part and report the whole as done."""
        self._end_part()
        if self._callback is not None:
            stages, steps = len(self.stages), self.stages[-1].steps
            self._callback(Progress(1.0, stages, stages, steps, steps, "done"))

    def _fraction(self, done: int) -> float:
        """Share of the run's network cost that is spent after `done` steps of the current stage."""
        costs = self._costs[self._first :]
        before = self._index - (self._first or 0)
        within = done / max(self.stages[self._index].steps, 1)
        total = sum(costs)
        return min((sum(costs[:before]) + within * costs[before]) / total, 1.0) if total > 0 else 0.0

    def _end_part(self) -> None:
        if self.part:
            wait_for(self.engine.device)
            self._timings.append(StageTiming(self.part, time.perf_counter() - self._started))
        self.part = ""

    # --- cancelling, memory and counting

    def tell_of_memory(self) -> None:
        """Memory ran out in the part at work: the best picture so far is what the run can give."""
        self._unfinished = True
        self.warnings.append(
            f"Memory ran out in {self.part!r} of stage {self._index + 1}: this is the best picture before it; "
            "choose a smaller size or batch, or free memory."
        )

    def cancel_asked(self) -> bool:
        """Whether the caller wants the run to stop."""
        return self._cancel is not None and bool(self._cancel())

    def stop_if_cancelled(self) -> None:
        """Raise Cancelled where the caller wants the run to stop."""
        if self.cancel_asked():
            raise Cancelled

    def count_forwards(self, stage: Stage, share: float = 1.0) -> None:
        """One evaluation of `stage` for a `share` of the batch: with classifier-free guidance, two forwards."""
        self._forwards += share * stage.forwards / solver_forwards(stage.solver, stage.steps)

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
            unfinished=cancelled or self._unfinished,
            latents=self.latents,
        )


# -------------------------------------------------------------------------------------------------------------- helpers


def _one_each(text: str | Sequence[str], batch: int, name: str) -> list[str]:
    """One text per image. Raises ValueError where the counts do not fit or nothing is asked for."""
    if batch < 1:
        raise MrFlowError(f"batch must be 1 or more, got {batch!r}; it is the number of images.")
    if isinstance(text, str):
        return [text] * batch
    texts = list(text)
    if not texts or batch not in (1, len(texts)):
        raise MrFlowError(f"{name} must be one text or one per image, got {len(texts)} for a batch of {batch}.")
    return texts


def _checked_seeds(seeds: Sequence[int] | None, batch: int) -> tuple[int, ...] | None:
    if seeds is not None and len(seeds) != batch:
        raise MrFlowError(f"seeds must hold one seed per image, got {len(seeds)} for a batch of {batch}.")
    return None if seeds is None else tuple(seeds)


def _start_images(image: Tensor, run: _Run) -> Tensor:
    """The picture that takes the place of stage 1, as (B, 3, H, W) on the device."""
    images = image if image.ndim == 4 else image[None]
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] not in (1, run.batch):
        raise MrFlowError(
            f"image must be (3, H, W) or ({run.batch}, 3, H, W), got {tuple(image.shape)}; drop any alpha channel."
        )
    if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
        raise MrFlowError(f"image must hold floats from 0 to 1, got {image.dtype}; divide 8-bit values by 255.")
    return images.to(run.engine.device, torch.float32).expand(run.batch, -1, -1, -1)
