"""The `Method` role: how a stage is sampled and how one stage becomes the next. `Plain` is the published method.

Engines know models, methods know mathematics. A method gets a `StageRun`, which holds everything about one stage, and
uses its `sample` to walk the stage's sigmas. Writing a method takes a few lines: see docs/library.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.sampling.answers import float_tensor
from mrflow_sched.sampling.engine import Guidance, capabilities_of
from mrflow_sched.sampling.handoff import encode_images, handoff, stage_noise
from mrflow_sched.sampling.noise import add_noise, model_sigmas, ve_to_sigma
from mrflow_sched.sampling.shrink import shrink_noise
from mrflow_sched.sampling.solvers import evaluations_per_step, get_solver, solver_forwards
from mrflow_sched.upscaling.fit import upscale_to

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import Stage, StagedPlan
    from mrflow_sched.sampling.engine import Engine
    from mrflow_sched.sampling.network import Around
    from mrflow_sched.sampling.progress import Hooks, Tracker
    from mrflow_sched.upscaling.role import PixelUpscaler

__all__ = ["Method", "Plain", "StageRun", "Wrapper", "run_progress"]


@dataclass(frozen=True)
class StageRun:
    """One stage of a run, as a method sees it.

    Attributes:
        engine: Predicts, encodes and decodes.
        plan: The plan of the whole run.
        stage: This stage's size, sigmas, solver and guidance.
        index: Number of the stage, from 0.
        text: Conditioning of the batch, for the engine.
        seeds: Noise seeds of this stage, one per image.
        upscaler: For the handoff; None means Lanczos.
        progress: For each of the stage's sigmas, the fraction of the whole run done when it is reached, from 0 to 1.
        hooks: The caller's functions: cancel, warn, keep.
        tracker: The run's timings and progress.
    """

    engine: Engine
    plan: StagedPlan
    stage: Stage
    index: int
    text: Any
    seeds: tuple[int, ...]
    upscaler: PixelUpscaler | None
    progress: tuple[float, ...]
    hooks: Hooks
    tracker: Tracker

    def sample(
        self,
        latents: Tensor,
        *,
        guidance: Guidance | None = None,
        around: Around | None = None,
        steps: range | None = None,
    ) -> Tensor:
        """Walk the stage's sigmas with its solver: by the engine's own loop where it has one, else step by step.

        Args:
            latents: (B, *latent_shape), float32, noised to the first sigma that is walked.
            guidance: The scale at each flow sigma; None: the stage's own throughout.
            around: Called in place of every call of the network (`mrflow_sched.sampling.network`).
            steps: The steps to walk, counted from 0; None: all. A solver that remembers earlier steps begins anew.

        Returns:
            The state at the end of those steps, in the shape of `latents`, float32.

        Raises:
            MrFlowError: `around` is given for an engine without a network seam.
            Cancelled: The caller stopped the run.
        """
        stage, able = self.stage, capabilities_of(self.engine)
        family = self.engine.family
        part = slice(None) if steps is None else slice(steps.start, steps.stop + 1)
        sigmas = model_sigmas(stage.sigmas, family.prediction, family.shift.largest_ve)[part]
        first = 0 if steps is None else steps.start
        follow = _Following(self, first)
        if around is not None and not able.network_seam:
            raise MrFlowError(
                f"{type(self.engine).__name__} has no seam at its network, which this method needs; use an engine "
                "whose capabilities include network_seam, such as PipelineEngine."
            )
        if able.whole_stages and (guidance is None or able.guidance_per_step):
            engine: Any = self.engine
            answer = engine.sample_stage(
                *(stage.solver, latents, sigmas, self.text),
                guidance=stage.guidance if guidance is None else guidance,
                progress=self.progress[part],
                callback=follow.after_evaluation,
                **({} if around is None else {"around": around}),
                **({"first": first * evaluations_per_step(stage.solver)} if first and able.counts_on else {}),
            )
            return float_tensor(answer, latents.shape, engine, "sample_stage")
        return get_solver(stage.solver)(follow.denoiser(guidance), latents, sigmas, callback=follow.after_step)

    def with_engine(self, engine: Any) -> StageRun:
        """The same stage on another engine.

        Args:
            engine: Takes the place of this one; usually a wrapper around it.

        Returns:
            A copy of this run.
        """
        return replace(self, engine=engine)


@dataclass(frozen=True)
class _Following:
    """What is told of a stage's steps while they are walked, from step `first` on."""

    run: StageRun
    first: int

    def denoiser(self, guidance: Guidance | None) -> Any:
        # The engine's clean estimate in the solvers' calling convention, counting forwards.
        run, stage = self.run, self.run.stage
        flow = run.engine.family.prediction == "flow"
        each = stage.forwards / solver_forwards(stage.solver, stage.steps)
        per_step, made = evaluations_per_step(stage.solver), itertools.count()

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            run.tracker.forwards += each
            scale = stage.guidance
            if guidance is not None:
                value = float(sigma.flatten()[0])
                scale = guidance(value if flow else ve_to_sigma(value))
            answer = run.engine.denoise(x, sigma, run.text, guidance=scale)
            estimate = float_tensor(answer, x.shape, run.engine, "denoise")
            run.tracker.note(self.first + next(made) // per_step + 1, x, estimate)
            return estimate

        return denoise

    def after_evaluation(self, state: dict[str, Any]) -> None:
        # Of an engine's own loop: of all images, or of some where memory is short.
        run, stage = self.run, self.run.stage
        share = state.get("images", len(run.seeds)) / len(run.seeds)
        made = state.get("forwards", stage.forwards / solver_forwards(stage.solver, stage.steps))
        run.tracker.forwards += share * made
        run.tracker.note(self.first + int(state["i"]) + 1, state["x"], state["denoised"])
        self.after_step(state)

    def after_step(self, state: dict[str, Any]) -> None:
        self.run.tracker.report(self.first + int(state["i"]) + 1, state["denoised"])
        self.run.hooks.stop_if_cancelled()


class Method(Protocol):
    """How a run's stages are sampled and joined.

    Attributes:
        gradients: Whether gradients are recorded while it works.
    """

    @property
    def gradients(self) -> bool:
        """Whether gradients are recorded."""
        ...

    def start(self, run: StageRun, image: Tensor | None) -> Tensor:
        """The state at which stage 1 starts.

        Args:
            run: The first stage.
            image: An image to start from, (B, 3, H, W), float32 in [0, 1]; None for pure noise.

        Returns:
            Latents (B, *latent_shape), float32, noised to the stage's first sigma.
        """
        ...

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        """Sample one stage.

        Args:
            run: The stage.
            latents: Where it starts, (B, *latent_shape), float32, at the stage's first sigma.

        Returns:
            Clean latents in the shape of `latents`, float32.
        """
        ...

    def handoff(self, run: StageRun, images: Tensor) -> Tensor | None:
        """How one stage becomes the next.

        Args:
            run: The stage that is to start.
            images: What the stage before produced, (B, 3, h, w), float32 in [0, 1].

        Returns:
            Latents at which `run` starts, noised to its first sigma; None where it has no steps. The upscaled images
            go to `run.hooks.keep`.
        """
        ...


@dataclass(frozen=True)
class Plain:
    """The published method: docs/method.md, section 1.2.

    Stage 1 walks its sigmas from pure noise; every later stage takes the previous image, upscales it in pixel space,
    encodes it, adds a little noise and removes that again.

    Attributes:
        gradients: Record gradients while sampling.
    """

    gradients: bool = False

    def start(self, run: StageRun, image: Tensor | None) -> Tensor:
        """Pure noise, one stream per image, or a given image with noise added.

        Args:
            run: The first stage.
            image: (B, 3, H, W), float32 in [0, 1], of any size; None for pure noise.

        Returns:
            Latents (B, *latent_shape), float32, at the stage's first sigma.
        """
        stage, engine, posterior = run.stage, run.engine, run.plan.posterior
        noise = _first_noise(run, "mode" if image is None else posterior)
        if image is None:
            clean = torch.zeros_like(noise)
        else:
            fitted = upscale_to(image, stage.width, stage.height)
            clean = encode_images(engine, fitted, posterior, run.seeds, warn=run.hooks.say)
        family = engine.family
        return add_noise(clean, noise, stage.start_sigma, family.prediction, family.shift.largest_ve)

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        """Walk the stage's sigmas with its solver, at one guidance scale.

        Args:
            run: The stage.
            latents: (B, *latent_shape), float32, at its first sigma.

        Returns:
            Clean latents in the shape of `latents`, float32.
        """
        return run.sample(latents)

    def handoff(self, run: StageRun, images: Tensor) -> Tensor | None:
        """Upscale, encode, add noise: `mrflow_sched.sampling.handoff`.

        Args:
            run: The stage that is to start.
            images: (B, 3, h, w), float32 in [0, 1].

        Returns:
            Latents (B, *latent_shape), float32, at the stage's first sigma; None where it has no steps.
        """
        result = handoff(
            *(run.engine, images, run.stage, run.upscaler),
            seeds=run.seeds,
            posterior=run.plan.posterior,
            on_part=lambda name: run.tracker.begin(name, run.index),
            on_image=lambda image: _keep(run, image),
            compose=run.hooks.compose,
            cancel=run.hooks.cancel,
        )
        for sentence in result.warnings:
            run.hooks.say(sentence)
        return result.latents


@dataclass(frozen=True)
class Wrapper:
    """A method around another one, to which it leaves all that a subclass does not override.

    Attributes:
        inner: The wrapped method.
    """

    inner: Method = field(default_factory=Plain)

    @property
    def gradients(self) -> bool:
        """Whether the inner method records gradients."""
        return self.inner.gradients

    def start(self, run: StageRun, image: Tensor | None) -> Tensor:
        """Start as the inner method does.

        Args:
            run: The first stage.
            image: (B, 3, H, W), float32 in [0, 1]; None for pure noise.

        Returns:
            Latents (B, *latent_shape), float32, at the stage's first sigma.
        """
        return self.inner.start(run, image)

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        """Sample the stage as the inner method does.

        Args:
            run: The stage.
            latents: (B, *latent_shape), float32, at its first sigma.

        Returns:
            Clean latents in the shape of `latents`, float32.
        """
        return self.inner.stage(run, latents)

    def handoff(self, run: StageRun, images: Tensor) -> Tensor | None:
        """Hand over as the inner method does.

        Args:
            run: The stage that is to start.
            images: (B, 3, h, w), float32 in [0, 1].

        Returns:
            Latents at the stage's first sigma; None where it has no steps.
        """
        return self.inner.handoff(run, images)


def _first_noise(run: StageRun, posterior: str) -> Tensor:
    """Noise of stage 1, (B, *latent_shape): of its own size, or what native sampling would start from, shrunk."""
    engine, own = run.engine, run.engine.latent_shape(run.stage.width, run.stage.height)
    if run.plan.noise == "own":
        return stage_noise(own, posterior, run.seeds, device=engine.device)
    full = engine.latent_shape(run.plan.width, run.plan.height)
    if len(own) != 3:
        raise MrFlowError(
            f"noise='nested' needs latents (C, h, w), and those of {engine.family.title} have the shape {own}; leave "
            "it out."
        )
    return shrink_noise(stage_noise(full, posterior, run.seeds), own[-2], own[-1]).to(engine.device)


def _keep(run: StageRun, image: Tensor) -> None:
    if run.hooks.keep is not None:
        run.hooks.keep(f"stage {run.index + 1} upscaled", image)


def run_progress(first: Sequence[float], sigmas: Sequence[float]) -> tuple[float, ...]:
    """Fraction of a run done at each of `sigmas`, counted in steps of its first stage.

    A later stage starts where the first stage's schedule had the same sigma, linearly interpolated between two of its
    steps, and ends at 1.

    Args:
        first: Sigmas of stage 1, falling to 0.
        sigmas: Those of the stage in question, falling to 0; may be empty.

    Returns:
        As many values from 0 to 1, rising to 1.
    """
    steps = len(first) - 1
    found: list[float] = []
    for sigma in sigmas:
        below = next((index for index, value in enumerate(first) if value <= sigma), steps)
        above = max(below - 1, 0)
        gap = first[above] - first[below]
        within = (first[above] - min(sigma, first[above])) / gap if gap > 0 else 0.0
        found.append((above + within * (below - above)) / steps)
    return tuple(found)
