"""The methods that make a preview: `Nested` and `Chain`. Read `Chain.stage` first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.methods.previews.down import (
    DOWNS,
    Estimate,
    Head,
    Switched,
    averaged,
    in_pixels,
    lower_sigmas,
    select_phase,
    selected,
)
from mrflow_sched.sampling.answers import float_tensor
from mrflow_sched.sampling.handoff import encode_images
from mrflow_sched.sampling.method import StageRun, Wrapper
from mrflow_sched.sampling.noise import add_noise, denoised_to_velocity, draw_noise
from mrflow_sched.sampling.shrink import shrink_noise
from mrflow_sched.sampling.solvers import get_solver

__all__ = ["Chain", "CommutatorGuidance", "Nested", "euler_tail", "guided"]


# ------------------------------------------------------------------------------------------------------------- guidance


@dataclass(frozen=True)
class CommutatorGuidance:
    """Commutator-zero guidance: x <- x - alpha (T - u(x)), in each of a few steps after the switch.

    T is the target velocity, stored at the switch. In t-form, where v = -u, the update reads x + alpha (T_v - v).

    Attributes:
        alpha: 0 or more; the paper takes 0.04 for FLUX.1-dev, 0.01 for SD3.5.
        steps: m, how many steps are guided; 0 turns it off. The paper takes 5.
        first: The first guided step after the switch, from 0.
        again: Evaluate the velocity once more at the moved state (variant R); False: the step goes on with the one that
            it has (variant S), which costs nothing.
        after: Move after the Euler step, by the velocity found there; in variant S that velocity is not there, and the
            move is the same before and after.

    Raises:
        MrFlowError: A value out of its range.
    """

    alpha: float = 0.04
    steps: int = 5
    first: int = 0
    again: bool = False
    after: bool = False

    def __post_init__(self) -> None:
        for name in ("alpha", "steps", "first"):
            if not getattr(self, name) >= 0:
                raise MrFlowError(f"{name} must be 0 or more, got {getattr(self, name)!r}.")

    def acts(self, step: int) -> bool:
        """Whether a step is guided.

        Args:
            step: Number of the step after the switch, from 0.

        Returns:
            True for `steps` steps from `first` on, unless `alpha` is 0.
        """
        return self.alpha > 0 and self.first <= step < self.first + self.steps


def guided(estimate: Estimate, switched: Switched, guidance: CommutatorGuidance) -> Estimate:
    """The clean estimates of a small run whose Euler steps are guided.

    Args:
        estimate: Evaluates the model.
        switched: Where the small run starts. Its estimate, if it has one, stands for the first evaluation.
        guidance: What is done in which steps.

    Returns:
        To be called once for each step by `solvers.sample_euler`, whose step then goes where the guided step ends.
    """
    counted, sigmas, alpha = itertools.count(), switched.sigmas, guidance.alpha

    def velocity(x: Tensor, level: float) -> Tensor:
        sigma = x.new_full((len(x),), level)
        return denoised_to_velocity(estimate(x, sigma), x, sigma)

    def made(x: Tensor, sigma: Tensor) -> Tensor:
        step = next(counted)
        denoised = estimate(x, sigma) if step or switched.estimate is None else switched.estimate
        if not guidance.acts(step):
            return denoised
        level, following = sigmas[step], sigmas[step + 1]
        width, slope = following - level, (x - denoised) / level
        if not guidance.again:
            end = x + width * slope - alpha * (switched.target - slope)
        elif not guidance.after:
            moved = x - alpha * (switched.target - slope)
            end = moved + width * velocity(moved, level)
        elif following > 0.0:
            end = x + width * slope
            end = end - alpha * (switched.target - velocity(end, following))
        else:
            return denoised
        return x - level * ((end - x) / width)

    return made


def euler_tail(estimate: Estimate, switched: Switched, guidance: CommutatorGuidance, callback: Any = None) -> Tensor:
    """The small run from the switch to sigma 0, in Euler steps.

    Args:
        estimate: Evaluates the model.
        switched: Where it starts.
        guidance: What is done in its first steps.
        callback: As the solvers call it, after each evaluation that opens a step.

    Returns:
        Clean latents in the shape of `switched.state`.
    """
    return get_solver("euler")(guided(estimate, switched, guidance), switched.state, switched.sigmas, callback=callback)


# -------------------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Nested(Wrapper):
    """A small run from the shrunk noise of the full size (`shrink_noise`); all else is left to `inner`.

    Attributes:
        full: (width, height) in pixels of the run that is previewed.
    """

    full: tuple[int, int] = field(kw_only=True)

    def start(self, run: StageRun, image: Tensor | None) -> Tensor:
        """The noise of the full run's seeds, shrunk.

        Args:
            run: The stage, of the preview's size.
            image: Must be None.

        Returns:
            Latents (B, *latent_shape), float32, at the stage's first sigma.

        Raises:
            MrFlowError: There is an image, or the preview is larger than the run.
        """
        if image is not None:
            raise MrFlowError("a preview starts from the noise of the run that it previews; leave the image out.")
        stage, engine, family = run.stage, run.engine, run.engine.family
        noise = _small_noise(run, draw_noise(engine.latent_shape(*self.full), run.seeds, device=engine.device))
        clean = torch.zeros_like(noise)
        return add_noise(clean, noise, stage.start_sigma, family.prediction, family.shift.largest_ve)


@dataclass(frozen=True)
class Chain(Nested):
    """The commutator-zero chain, with the down-map of your choice; flow models, Euler steps.

    Attributes:
        down: "pixels": the clean estimate, shrunk as an image. "average": block means at their own noise level.
            "polyphase": the paper's selectors.
        switch: n_D, steps at the full size before D; None: a third of the steps. One evaluation more is made there.
        phase: For "polyphase", k of D_k for all images; None: each image's own, of the smallest commutator.
        size: s, the side of the run over that of the preview.
        guidance: The steps after the switch.
        positions: Position ids of the small run: "native". The "strided" ids of the full grid are refused.

    Raises:
        MrFlowError: A value out of its range.
    """

    down: str = "pixels"
    switch: int | None = None
    phase: int | None = None
    size: int = 2
    guidance: CommutatorGuidance = CommutatorGuidance()
    positions: str = "native"

    def __post_init__(self) -> None:
        if self.down not in DOWNS:
            raise MrFlowError(f"down must be one of {', '.join(DOWNS)}, got {self.down!r}.")
        if self.switch is not None and self.switch < 0:
            raise MrFlowError(f"switch must be 0 or more, got {self.switch!r}.")
        if self.positions != "native":
            raise MrFlowError(
                f"positions is {self.positions!r}; only 'native' is allowed: strided position ids make the commutator "
                "smaller and the image worse."
            )

    def evaluations(self, sigmas: Sequence[float]) -> tuple[int, int]:
        """How often one image's network is evaluated.

        Args:
            sigmas: Of the native plan.

        Returns:
            Evaluations at the full size, and at the preview's.
        """
        switch = self._switch_of(sigmas)
        left = len(sigmas) - 1 - switch
        if self.down == "average":
            left = len(lower_sigmas(sigmas[switch:], self.size)) - 1
        chosen = self.size**2 - 1 if self.down == "polyphase" and self.phase is None and switch else 0
        acting = range(left - 1 if self.guidance.after else left)
        again = sum(self.guidance.acts(step) for step in acting) if self.guidance.again else 0
        return switch + 1, left + chosen + again

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        """Walk to the switch at the full size, shrink, and walk on at the preview's size.

        Args:
            run: The stage: the preview's size, the native run's sigmas.
            latents: The shrunk noise, (B, *latent_shape), float32.

        Returns:
            Clean latents in the shape of `latents`, float32.

        Raises:
            MrFlowError: The model or the solver is of another kind, or the sizes do not fit.
        """
        engine, stage = run.engine, run.stage
        if engine.family.prediction != "flow":
            raise MrFlowError(
                f"the chain is for flow models, and {engine.family.name} predicts {engine.family.prediction}; preview "
                "it with few steps, or nested."
            )
        if stage.solver != "euler":
            raise MrFlowError(f"the chain takes Euler steps, and the plan's solver is {stage.solver}; choose euler.")
        switch, estimate = self._switch_of(stage.sigmas), _estimate_of(run)
        noise = draw_noise(engine.latent_shape(*self.full), run.seeds, device=engine.device)
        head = _head(estimate, noise, stage.sigmas, switch, run.tracker.report)
        switched = self._switched(run, head, estimate, latents)

        def follow(state: dict[str, Any]) -> None:
            run.tracker.report(switch + int(state["i"]) + 1, state["denoised"])

        return euler_tail(estimate, switched, self.guidance, follow)

    def _switch_of(self, sigmas: Sequence[float]) -> int:
        steps = len(sigmas) - 1
        switch = round(steps / 3) if self.switch is None else self.switch
        if switch >= steps:
            raise MrFlowError(f"switch is {switch}, and the run has {steps} steps; choose a smaller one.")
        return switch

    def _switched(self, run: StageRun, head: Head, estimate: Estimate, noise: Tensor) -> Switched:
        rows, columns = noise.shape[-2:]
        if self.down == "average":
            return averaged(head, rows, columns)
        if self.down == "pixels":
            return in_pixels(head, lambda clean: _by_pixels(run, clean), noise)
        found = None
        phases = [self.phase or 0] * len(noise)
        if self.phase is None:
            phases, estimates = select_phase(head, estimate, self.size)
            found = estimates if len(estimates) else None
        switched = selected(head, phases, self.size)._replace(estimate=found)
        if switched.state.shape != noise.shape:
            raise MrFlowError(
                f"the preview has {rows}x{columns} latents, and selectors of size {self.size} make "
                f"{switched.state.shape[-2]}x{switched.state.shape[-1]}; choose a size that halves exactly."
            )
        return switched


# -------------------------------------------------------------------------------------------------------------- helpers


def _small_noise(run: StageRun, noise: Tensor) -> Tensor:
    rows, columns = run.engine.latent_shape(run.stage.width, run.stage.height)[-2:]
    return shrink_noise(noise, rows, columns)


def _by_pixels(run: StageRun, clean: Tensor) -> Tensor:
    """Small latents of clean latents, by way of the image: encode(area(decode(x0)))."""
    image = run.engine.decode(clean)
    small = functional.interpolate(image, (run.stage.height, run.stage.width), mode="area")
    return encode_images(run.engine, small, run.plan.posterior, run.seeds, warn=run.hooks.say)


def _estimate_of(run: StageRun) -> Estimate:
    """The engine's clean estimate with the stage's guidance at each sigma, counted."""
    stage, made = run.stage, itertools.count(1)

    def estimate(x: Tensor, sigma: Tensor) -> Tensor:
        run.hooks.stop_if_cancelled()
        scale = stage.guidance_at(float(sigma[0]))
        answer = run.engine.denoise(x, sigma, run.text, guidance=scale)
        found = float_tensor(answer, x.shape, run.engine, "denoise")
        run.tracker.forwards += stage.forwards / stage.steps
        run.tracker.note(next(made), x, found)
        return found

    return estimate


def _head(
    estimate: Estimate, noise: Tensor, sigmas: Sequence[float], switch: int, tell: Callable[[int], object]
) -> Head:
    """The full run up to the switch, and its velocity there."""

    def follow(step: dict[str, Any]) -> None:
        tell(int(step["i"]) + 1)

    state = get_solver("euler")(estimate, noise, sigmas[: switch + 1], callback=follow) if switch else noise
    sigma = state.new_full((len(state),), sigmas[switch])
    velocity = denoised_to_velocity(estimate(state, sigma), state, sigma)
    return Head(state, velocity, noise, tuple(sigmas[switch:]))
