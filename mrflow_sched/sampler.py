"""The staged sampler: the loop that turns a plan into images. Read `sample_staged` first.

Stage 1 goes from pure noise to a finished low-resolution image. Every later stage takes the image before it, upscales
it in pixel space, encodes it, adds a little noise and removes that again. How each of these is done is a method's
(`mrflow_sched.methods`); what predicts, encodes and decodes is an engine's (`mrflow_sched.engines`). Everything is a
float tensor on the engine's device from the first noise to the last image.

The sampler changes nothing that it is given: it installs no hook, sets no attribute, reads no global random state, and
gradient recording is back as it was when it returns or raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched._runtime.memory import is_memory_error
from mrflow_sched.methods import method_of
from mrflow_sched.plan.recipes import explicit_recipe
from mrflow_sched.sampling.memory import within_memory
from mrflow_sched.sampling.method import StageRun, run_progress
from mrflow_sched.sampling.noise import stage_seed
from mrflow_sched.sampling.progress import Hooks, Progress, StageTiming, Tracker
from mrflow_sched.sampling.solvers import solver_forwards

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import Stage, StagedPlan
    from mrflow_sched.sampling.engine import Engine
    from mrflow_sched.sampling.method import Method
    from mrflow_sched.upscaling.role import PixelUpscaler

__all__ = ["Progress", "StageImage", "StageTiming", "StagedResult", "sample_staged"]

# img2img: sigmas of stage 1's schedule closer to the start than this factor are left out.
_SHORTEST_STEP = 0.98


@dataclass(frozen=True)
class StageImage:
    """An intermediate image of a run.

    Attributes:
        name: "stage 1" (decoded) or "stage 2 upscaled", and so on.
        image: (B, 3, H, W), float32 in [0, 1], on the engine's device.
    """

    name: str
    image: Tensor


@dataclass(frozen=True)
class StagedResult:
    """What a run produced.

    Attributes:
        images: (B, 3, H, W), float32 in [0, 1], on the engine's device; where `unfinished`, the best so far.
        stages: The intermediate images; empty unless `keep_stages` was set.
        timings: In order: "text", "stage 1 sample", "stage 1 decode", "upscale", "encode", "noise", "stage 2 sample",
            "stage 2 decode", and so on.
        plan: The plan that was run.
        seeds: The stage-1 noise seed of each image.
        cancelled: The caller stopped the run.
        warnings: One sentence each, for the user.
        forwards: Network evaluations per image that were made.
        unfinished: Cancelled, or out of memory after the first image (`warnings` says which).
        latents: (B, *latent_shape), float32: the result of the last stage's sampling; None where `images` were not
            decoded from it.
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
    method: Method | None = None,
) -> StagedResult:
    """Make the images of a plan (arXiv 2607.01642; docs/method.md, section 1.2); a plan of one stage samples natively.

    Args:
        engine: Predicts, encodes and decodes.
        plan: All numbers of the run.
        prompt: One for all images of the batch, or one per image.
        negative_prompt: Likewise; None for none.
        batch: Number of images where `prompt` is a single text.
        upscaler: Super-resolution between stages; None means Lanczos.
        callback: Called with `Progress` at every part and step; may raise `Cancelled`.
        cancel: Polled at each of them. Once it returns True, the result is the best image so far: in stage 1 its clean
            estimate, after that the last decoded or upscaled image.
        keep_stages: Keep the intermediate images in the result.
        image: (3, H, W) or (B, 3, H, W), floats in [0, 1]: replaces stage 1, to be upscaled and refined.
        start_sigma: With `image`, above 0 and at most 1: stage 1 starts from that image, resized and noised to this
            sigma, and runs the part of its schedule below it.
        seeds: One per image; if None, they follow from the plan's seed and seed rule. With the rule "offset", image i
            of a batch is what seed + i makes alone.
        method: How stages are sampled and joined; None: what the plan asks for (`mrflow_sched.methods.method_of`).

    Returns:
        The images with timings and warnings. If memory runs out after the first image, the best image so far is
        returned with a warning, as if cancelled.

    Raises:
        MrFlowError: Arguments that do not fit. Other exceptions of the engine and KeyboardInterrupt pass through.
    """
    prompts = _texts(prompt, batch, "prompt")
    negatives = None if negative_prompt is None else _texts(negative_prompt, len(prompts), "negative_prompt")
    given = None if image is None else _start_images(image, engine, len(prompts))
    stages, costs = _stages_of(plan, start_sigma, given)
    own_seeds = _checked_seeds(seeds, len(prompts))
    method = method_of(plan) if method is None else method
    first = 0 if given is None or start_sigma is not None else 1
    kept = _Kept(keep_stages, given if first else None)
    track = Tracker(stages, costs, engine.device, callback)
    hooks = Hooks(cancel, kept.warnings.append, kept.finished)
    cancelled = False
    _warn_of_family(engine, plan, hooks)
    with torch.set_grad_enabled(method.gradients):
        try:
            track.begin("text", first)
            hooks.stop_if_cancelled()
            text = engine.encode_text(prompts, negatives)
            for index in range(first, len(stages)):
                stage, noise = stages[index], _noise_seeds(plan, own_seeds, index, len(prompts))
                behind = run_progress(stages[0].sigmas, stage.sigmas)
                run = StageRun(engine, plan, stage, index, text, noise, upscaler, behind, hooks, track)
                state = method.start(run, given) if index == 0 else method.handoff(run, kept.best())
                hooks.stop_if_cancelled()
                if state is not None:
                    track.begin(f"stage {index + 1} sample", index)
                    hooks.stop_if_cancelled()
                    _decode(run, method.stage(run, state), kept, last=index == len(stages) - 1)
            track.finish()
        except Cancelled:
            cancelled = True
        except Exception as error:
            if not is_memory_error(error) or kept.images is None:
                raise
            kept.warn_of_memory(track)
        track.end()
        images = _best_so_far(kept, track, engine, len(prompts))
    return StagedResult(
        images=images,
        stages=tuple(kept.stages),
        timings=tuple(track.timings),
        plan=plan,
        seeds=_noise_seeds(plan, own_seeds, 0, len(prompts)),
        cancelled=cancelled,
        warnings=tuple(kept.warnings),
        forwards=round(track.forwards),
        unfinished=cancelled or kept.unfinished,
        latents=kept.latents,
    )


# ------------------------------------------------------------------------------------------------------------ the parts


def _decode(run: StageRun, latents: Tensor, kept: _Kept, *, last: bool) -> None:
    """Turn finished latents into the run's images. Not interrupted: they are paid for."""
    stage, number = run.stage, run.index + 1
    run.tracker.begin(f"stage {number} decode", run.index)
    images = within_memory(
        lambda able, part: able.decode(latents[part]),
        run.engine,
        len(latents),
        f"decoding one image of {stage.width}x{stage.height}",
        warn=run.hooks.say,
    )
    for image, values in enumerate(images, 1):
        if not bool(torch.isfinite(values).all()):
            run.hooks.say(f"Image {image} of stage {number} contains NaN or infinity; try float32.")
    kept.finished(None if last else f"stage {number}", images)
    kept.latents = latents if last else None


@dataclass
class _Kept:
    """What a run has made so far: the best images, the intermediate ones if they are kept, warnings for the user."""

    keep_stages: bool
    images: Tensor | None = None
    latents: Tensor | None = None
    stages: list[StageImage] = field(default_factory=list[StageImage])
    warnings: list[str] = field(default_factory=list[str])
    unfinished: bool = False

    def finished(self, name: str | None, images: Tensor) -> None:
        """Take `images` as the best so far.

        Args:
            name: What to keep them as among the stages; None: they are the result, no intermediate image.
            images: (B, 3, H, W), float32 in [0, 1].
        """
        self.images = images
        if self.keep_stages and name is not None:
            self.stages.append(StageImage(name, images))

    def best(self) -> Tensor:
        """The images of the stage before.

        Returns:
            (B, 3, H, W), float32 in [0, 1].

        Raises:
            RuntimeError: A method left stage 1 without any.
        """
        if self.images is None:
            raise RuntimeError("stage 1 made no image; a method's start must not return None.")
        return self.images

    def warn_of_memory(self, track: Tracker) -> None:
        """Note that memory ran out in the current part, so the best images so far are the result.

        Args:
            track: Knows the current part and stage.
        """
        self.unfinished = True
        self.warnings.append(
            f"Memory ran out in {track.part!r} of stage {track.index + 1}: this is the best image before it; choose a "
            "smaller size or batch, or free memory."
        )


def _best_so_far(kept: _Kept, track: Tracker, engine: Engine, batch: int) -> Tensor:
    """The last finished images, else the current clean estimate decoded, else mid grey."""
    if kept.images is not None:
        return kept.images
    if track.estimate is not None:
        return engine.decode(track.estimate)
    kept.warnings.append("The run was stopped before its first step: the image is empty.")
    stage = track.stages[0]
    return torch.full((batch, 3, stage.height, stage.width), 0.5, device=engine.device)


# ---------------------------------------------------------------------------------------------------- what is asked for


def _texts(text: str | Sequence[str], batch: int, name: str) -> list[str]:
    """One text per image. Raises MrFlowError where the counts do not fit or nothing is asked for."""
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


def _noise_seeds(plan: StagedPlan, own: tuple[int, ...] | None, stage: int, batch: int) -> tuple[int, ...]:
    """Noise seeds of a stage, one per image."""
    if own is not None:
        return tuple(stage_seed(seed, 0, stage, plan.seed_rule) for seed in own)
    return tuple(stage_seed(plan.seed, image, stage, plan.seed_rule) for image in range(batch))


def _start_images(image: Tensor, engine: Engine, batch: int) -> Tensor:
    """The image that replaces stage 1, as (B, 3, H, W) on the device."""
    images = image if image.ndim == 4 else image[None]
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] not in (1, batch):
        raise MrFlowError(
            f"image must be (3, H, W) or ({batch}, 3, H, W), got {tuple(image.shape)}; drop any alpha channel."
        )
    if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
        raise MrFlowError(f"image must hold floats from 0 to 1, got {image.dtype}; divide 8-bit values by 255.")
    return images.to(engine.device, torch.float32).expand(batch, -1, -1, -1)


def _stages_of(
    plan: StagedPlan, start_sigma: float | None, image: Tensor | None
) -> tuple[tuple[Stage, ...], tuple[float, ...]]:
    """The stages that are run and their costs: the plan's, the first starting at `start_sigma` if one is given."""
    stages, costs = plan.stages, plan.stage_costs()
    if start_sigma is None:
        if image is not None and len(stages) < 2:
            raise MrFlowError("image needs a plan of two stages or more, got one stage; plan with stages=2.")
        return stages, costs
    if image is None:
        raise MrFlowError(f"start_sigma={start_sigma!r} needs an image to start from; give image too, or leave it out.")
    if not 0.0 < start_sigma <= 1.0:
        raise MrFlowError(
            f"start_sigma must be above 0 and at most 1, got {start_sigma!r}; it is the fraction of noise."
        )
    first = stages[0]
    # A first step of almost no length would cost a forward and change nothing.
    below = tuple(sigma for sigma in first.sigmas if sigma < _SHORTEST_STEP * start_sigma)
    sigmas = (float(start_sigma), *below) if start_sigma < 1.0 else first.sigmas
    share = solver_forwards(first.solver, len(sigmas) - 1) / solver_forwards(first.solver, first.steps)
    begun = replace(
        first, sigmas=sigmas, forwards=round(first.forwards * share), recipe=explicit_recipe(sigmas), mu=None
    )
    return (begun, *stages[1:]), (costs[0] * share, *costs[1:])


def _warn_of_family(engine: Engine, plan: StagedPlan, hooks: Hooks) -> None:
    if plan.family != engine.family.name:
        hooks.say(
            f"The plan is for family {plan.family} but the engine is {engine.family.name}: its sizes, sigmas and "
            "guidance may not fit."
        )
