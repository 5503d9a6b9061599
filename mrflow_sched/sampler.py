"""The staged sampler: the loop that turns a plan into images. Read `sample_staged` first.

Stage 1 goes from pure noise to a finished low-resolution image. Every later stage takes the image before it, upscales
it in pixel space, encodes it, adds a little noise and removes that again. How each of these is done is a method's
(`mrflow_sched.methods`); what predicts, encodes and decodes is an engine's (`mrflow_sched.engines`). Everything is a
float tensor on the engine's device from the first noise to the last image.

The sampler changes nothing that it is given: it installs no hook, sets no attribute, reads no global random state, and
gradient recording is back as it was when it returns or raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.memory import callers_own, is_memory_error
from mrflow_sched.images.alpha import opaque
from mrflow_sched.methods import FewStep, StagePrecision, method_of
from mrflow_sched.plan.checks import checked_flag
from mrflow_sched.sampling.answers import float_tensor
from mrflow_sched.sampling.engine import capabilities_of
from mrflow_sched.sampling.faults import Fault, bad_rows, network_fault
from mrflow_sched.sampling.kept import Kept, StageImage
from mrflow_sched.sampling.memory import within_memory
from mrflow_sched.sampling.method import StageRun, run_progress
from mrflow_sched.sampling.progress import Hooks, Progress, StageTiming, Tracker
from mrflow_sched.sampling.request import check_parts, request_of
from mrflow_sched.upscaling.model import as_upscaler

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import Stage, StagedPlan
    from mrflow_sched.sampling.engine import Engine
    from mrflow_sched.sampling.method import Method
    from mrflow_sched.upscaling.role import PixelUpscaler

__all__ = ["Fault", "Progress", "StageImage", "StageTiming", "StagedResult", "sample_staged"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StagedResult:
    """What a run produced.

    Attributes:
        images: (B, 3, H, W), float32 in [0, 1], on the engine's device, of the size that was asked for; where
            `unfinished`, the best so far, of any size. NaN where a part failed before there was an image. (B, 4, H, W)
            with transparency where the engine's VAE decodes it (`Capabilities.alpha`).
        stages: The intermediate images; empty unless `keep_stages` was set.
        timings: In order: "text", "stage 1 sample", "stage 1 decode", "upscale", "encode", "noise", "stage 2 sample",
            "stage 2 decode", and so on.
        plan: The plan that was run.
        seeds: The stage-1 noise seed of each image.
        cancelled: The caller stopped the run.
        warnings: One sentence each, for the user.
        forwards: Network evaluations per image that were made.
        unfinished: Cancelled, out of memory after the first image, or a part failed for an image (`faults`); `warnings`
            says which.
        latents: (B, *latent_shape), float32: the result of the last stage's sampling, on the model's grid; None where
            `images` were not decoded from it.
        faults: For each image, the first part that returned NaN, infinity or values no image has, and in which stage;
            None for those that are whole.
        unfinished_images: For each image, whether it is unfinished.
        notes: The plan's notes that hold for this run, and what became of `image`.
        empty: The run was stopped before there was anything to show: `images` are mid grey.
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
    faults: tuple[Fault | None, ...] = ()
    unfinished_images: tuple[bool, ...] = ()
    notes: tuple[str, ...] = ()
    empty: bool = False


def sample_staged(
    engine: Engine,
    plan: StagedPlan,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    refine_prompt: str | Sequence[str] | None = None,
    refine_negative_prompt: str | Sequence[str] | None = None,
    refine_lora_scale: float | None = None,
    colour_guard: bool = False,
    batch: int = 1,
    upscaler: PixelUpscaler | None = None,
    callback: Callable[[Progress], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    keep_stages: bool = False,
    image: Tensor | None = None,
    start_sigma: float | None = None,
    seeds: Sequence[int] | None = None,
    latents: Tensor | None = None,
    until: int | None = None,
    compose: Callable[[Tensor], Tensor] | None = None,
    method: Method | None = None,
) -> StagedResult:
    """Make the images of a plan (arXiv 2607.01642; docs/method.md, section 1.2); a plan of one stage samples natively.

    Args:
        engine: Predicts, encodes and decodes.
        plan: All numbers of the run, for the engine's family.
        prompt: One for all images of the batch, or one per image.
        negative_prompt: Likewise; None for none.
        refine_prompt: Likewise, for the stages after the first; None: `prompt`.
        refine_negative_prompt: Likewise; None: `negative_prompt`.
        refine_lora_scale: The scale of all LoRAs in the stages after the first (`Capabilities.lora_scale`); None: as in
            stage 1.
        colour_guard: Take back a shift of the mean colour since stage 1, or since `image`
            (`mrflow_sched.upscaling.colours`).
        batch: Number of images where `prompt` is a single text.
        upscaler: Super-resolution between stages, as `load_upscaler` returns it, or a model that spandrel loaded; None
            means Lanczos. One that fails costs the detail, not the run: Lanczos takes its place, and a warning says so.
        callback: Called with `Progress` at every part and step; may raise `Cancelled`. What else it raises passes
            through.
        cancel: Polled at each of them. Once it returns True, the result is the best image so far: in stage 1 its clean
            estimate, after that the last decoded or upscaled image.
        keep_stages: Keep the intermediate images in the result.
        image: (3, H, W) or (B, 3, H, W), floats in [0, 1]: replaces stage 1, to be upscaled and refined. With
            transparency (4, H, W) or (B, 4, H, W) where the engine's VAE decodes it.
        start_sigma: With `image`, above 0 and at most 1: stage 1 starts from that image, resized and noised to this
            sigma, and runs the part of its schedule below it.
        seeds: One per image; if None, they follow from the plan's seed and seed rule. With the rule "offset", image i
            of a batch is what seed + i makes alone.
        latents: What stage 1 sampled in another run, (*latent_shape) or (B, *latent_shape): `StagedResult.latents` with
            `until=1`. It is decoded, and the later stages go on as they would have there, to the last bit.
        until: The last stage to run, from 1; None: all. With 1 the result is stage 1's image and latents: a draft
            (`mrflow_sched.drafts`).
        compose: Called with the images, (B, 3, H, W) in [0, 1], that were upscaled for a stage; what it returns takes
            their place: a given picture outside a mask, say.
        method: How stages are sampled and joined; None: what the plan asks for (`mrflow_sched.methods.method_of`).

    Returns:
        The images with timings and warnings. If memory runs out after the first image, the best image so far is
        returned with a warning, as if cancelled. An image for which a part returns NaN stays at the one before, while
        the others of the batch are finished.

    Raises:
        MrFlowError: Arguments that do not fit. Other exceptions of the engine and KeyboardInterrupt pass through.
    """
    check_parts(engine, plan, method, callback, cancel)
    upscaler = as_upscaler(upscaler)
    keep_stages, colour_guard = checked_flag(keep_stages, "keep_stages"), checked_flag(colour_guard, "colour_guard")
    refine = (refine_prompt, refine_negative_prompt, refine_lora_scale)
    asked = request_of(engine, plan, prompt, negative_prompt, refine, batch, image, start_sigma, seeds, latents, until)
    method = method_of(plan) if method is None else method
    if any(stage.precision != "own" for stage in plan.stages):
        method = StagePrecision(method)
    if any(stage.few_step for stage in plan.stages):
        method = FewStep(method)
    kept = Kept(asked.batch, keep_stages, asked.image if asked.first else None)
    track = Tracker(asked.stages, asked.costs, engine.device, None if callback is None else callers_own(callback))
    hooks = Hooks(
        None if cancel is None else callers_own(cancel),
        kept.warn,
        lambda name, images: kept.upscaled(name, images, track.index + 1),
        compose,
    )
    logger.info("plan %s", plan.to_string())
    for note in asked.notes:
        logger.info("%s", note)
    track.estimate = asked.latents  # until there is an image
    cancelled = False
    with torch.set_grad_enabled(method.gradients):
        try:
            track.begin("text", asked.first)
            hooks.stop_if_cancelled()
            text = asked.encoded_texts(engine, plan, kept.warn)
            for index in range(asked.first, len(asked.stages)):
                stage, behind = asked.stages[index], run_progress(asked.stages[0].sigmas, asked.stages[index].sigmas)
                noise = asked.noise_seeds(plan, index)
                run = StageRun(engine, plan, stage, index, text[index], noise, upscaler, behind, hooks, track)
                last = index == len(asked.stages) - 1
                if index == 0 and asked.latents is not None:
                    _decode(run, asked.latents, set(), kept, last=last)
                else:
                    _run_stage(run, method, asked.image, kept, last=last)
                if kept.hopeless:
                    break
            if colour_guard:
                kept.guard_colours()
            track.finish()
        except Cancelled:
            cancelled = True
        except Exception as error:
            if not is_memory_error(error) or kept.images is None:
                raise
            kept.warn_of_memory(track)
        track.end()
        images = _best_so_far(kept, track, engine)
    unfinished = tuple(cancelled or kept.out_of_memory or fault is not None for fault in kept.faults)
    result = StagedResult(
        images=_trimmed(images, plan),
        stages=tuple(kept.stages),
        timings=tuple(track.timings),
        plan=plan,
        seeds=asked.noise_seeds(plan, 0),
        cancelled=cancelled,
        notes=asked.notes,
        warnings=tuple(kept.warnings),
        forwards=round(track.forwards),
        unfinished=any(unfinished),
        latents=None if any(kept.faults) else kept.latents,
        faults=tuple(kept.faults),
        unfinished_images=unfinished,
        empty=cancelled and kept.images is None and not kept.hopeless,
    )
    logger.info("seconds: %s", ", ".join(f"{timing.name} {timing.seconds:.3f}" for timing in result.timings))
    return result


# ------------------------------------------------------------------------------------------------------------ the parts


def _run_stage(run: StageRun, method: Method, image: Tensor | None, kept: Kept, *, last: bool) -> None:
    """One stage: how it starts, its sampling, its image; no further than a part that fails for every image."""
    number, stage = run.index + 1, run.stage
    run.tracker.index = run.index
    state = method.start(run, image) if run.index == 0 else method.handoff(run, kept.best())
    run.hooks.stop_if_cancelled()
    if state is None and run.index > 0:
        return
    shape = (kept.batch, *run.engine.latent_shape(stage.width, stage.height))
    state = float_tensor(state, shape, method, "handoff" if run.index else "start")
    kept.blame(dict.fromkeys(bad_rows(state), Fault("encode", number)))
    if kept.hopeless:
        return
    run.tracker.begin(f"stage {number} sample", run.index)
    run.hooks.stop_if_cancelled()
    latents = float_tensor(method.stage(run, state), state.shape, method, "stage")
    bad = bad_rows(latents)
    kept.blame({each: network_fault(number, each, run.tracker.seen, run.text) for each in bad})
    if not kept.hopeless:
        _decode(run, latents, bad, kept, last=last)


def _decode(run: StageRun, latents: Tensor, bad: set[int], kept: Kept, *, last: bool) -> None:
    """Turn finished latents into the run's images. Not interrupted: they are paid for."""
    stage, number = run.stage, run.index + 1
    run.tracker.begin(f"stage {number} decode", run.index)
    images = _decoded(run.engine, latents, stage, run.hooks.say)
    wrong = bad_rows(images)
    kept.blame(dict.fromkeys(wrong, Fault("decode", number)))
    kept.take(None if last else f"stage {number}", images, bad | wrong)
    kept.latents = latents if last else None


def _decoded(engine: Engine, latents: Tensor, stage: Stage, warn: Callable[[str], object]) -> Tensor:
    """Images (B, 3, H, W) of latents within memory."""

    def decode(able: Engine, part: slice) -> Tensor:
        rows = latents[part]
        return float_tensor(able.decode(rows), (len(rows), *_image_shape(engine, stage)), able, "decode")

    what = f"decoding one image of {stage.width}x{stage.height}"
    return within_memory(decode, engine, len(latents), what, warn=warn)


def _best_so_far(kept: Kept, track: Tracker, engine: Engine) -> Tensor:
    """The last finished images, else the current clean estimate decoded, else mid grey."""
    stage, estimate = track.stages[0], track.estimate
    if kept.images is None and estimate is not None:
        bad = bad_rows(estimate)
        kept.blame({each: network_fault(1, each, track.seen, None) for each in bad})
        images = _decoded(engine, estimate, stage, kept.warn)
        kept.take(None, images, bad | bad_rows(images))
    if kept.images is not None:
        return kept.result(kept.images)
    shape = (kept.batch, *_image_shape(engine, stage))
    if kept.hopeless:  # before there was any
        return torch.full(shape, torch.nan, device=engine.device)
    kept.warn("The run was stopped before its first step: the image is empty.")
    grey = torch.full(shape, 0.5, device=engine.device)
    return opaque(grey[:, :3]) if shape[1] == 4 else grey


def _image_shape(engine: Engine, stage: Stage) -> tuple[int, int, int]:
    return (4 if capabilities_of(engine).alpha else 3, stage.height, stage.width)


def _trimmed(images: Tensor, plan: StagedPlan) -> Tensor:
    """Images of the final size without the edges that the model's grid added to what was asked for."""
    return images[(..., *plan.asked_area)] if images.shape[-2:] == (plan.height, plan.width) else images
