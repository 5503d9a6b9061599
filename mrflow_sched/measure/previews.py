"""Previews of native runs: what the full-size image of a prompt and seed will look like, small and for less.

A preview is of the *native* image. The staged image of the same seed is another image, and its preview is its own
first stage (`mrflow draft`); neither says anything of the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.measure.preview_kinds import FEW_STEPS, KINDS
from mrflow_sched.methods.previews import Chain, Nested
from mrflow_sched.plan.checks import checked_whole
from mrflow_sched.plan.make import with_first_steps
from mrflow_sched.plan.sizes import tokens_of
from mrflow_sched.plan.solver_table import solver_evaluations
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import sample_staged

if TYPE_CHECKING:
    from mrflow_sched.plan.families import Family
    from mrflow_sched.sampling.engine import Engine
    from mrflow_sched.sampling.progress import Progress

__all__ = ["Preview", "few_plan", "preview", "preview_plan", "shrunk"]


@dataclass(frozen=True)
class Preview:
    """Previews of native runs.

    Attributes:
        images: (B, 3, h, w), float32 in [0, 1], on the engine's device.
        kind: A key of `preview_kinds.KINDS`.
        steps: Of the kind "few"; else None.
        plan: The native run that is previewed.
        seeds: Its noise seed for each image.
        cost: Work of the network for one image, in evaluations at the full size.
        seconds: Wall-clock seconds for all images, text and decoding included.
        cancelled: The caller stopped the run; the images are what there was.
        warnings: The run's sentences for the user.
    """

    images: Tensor
    kind: str
    steps: int | None
    plan: StagedPlan
    seeds: tuple[int, ...]
    cost: float
    seconds: float
    cancelled: bool
    warnings: tuple[str, ...]

    @property
    def title(self) -> str:
        """The kind with its steps, as in "few, 6 steps"."""
        return self.kind if self.steps is None else f"{self.kind}, {self.steps} steps"


def preview(
    engine: Engine,
    plan: StagedPlan,
    prompt: str | Sequence[str],
    *,
    kind: str = "few",
    steps: int = FEW_STEPS,
    chain: Chain | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    batch: int = 1,
    seeds: Sequence[int] | None = None,
    callback: Callable[[Progress], object] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Preview:
    """Preview native runs: small images of what `sample_staged(engine, plan, prompt)` will give.

    Args:
        engine: Predicts, encodes and decodes.
        plan: The native plan, of one stage.
        prompt: One for all images, or one per image.
        kind: A key of `preview_kinds.KINDS`.
        steps: Steps of the kind "few", 1 to 1000; 4 to 8 are sensible.
        chain: For the kinds that begin with "chain", a chain of your own in place of the default one.
        negative_prompt: One for all images, or one per image; None for none.
        batch: Number of images where `prompt` is a single text.
        seeds: One per image; None: they follow from the plan's seed and seed rule.
        callback: Called with `Progress` at every part and step.
        cancel: Polled at each of them; True stops the run.

    Returns:
        Pictures of half the run's size, on the family's grid.

    Raises:
        MrFlowError: The plan is staged, the kind unknown, or the model or the size is none that the kind can do.
    """
    if len(plan.stages) != 1:
        raise MrFlowError(
            f"the plan has {len(plan.stages)} stages, and a preview is of a native run, which has one: the preview of "
            "a staged run is its first stage (mrflow draft)."
        )
    if kind not in KINDS:
        raise MrFlowError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    small, full = preview_plan(engine.family, plan), (plan.width, plan.height)
    method: Nested | None = None
    if kind == "few":
        run, cost = few_plan(plan, checked_whole(steps, "steps", 1, 1000)), float(steps)
    else:
        method = Nested(full=full) if kind == "nested" else chain or Chain(full=full, down=kind.removeprefix("chain-"))
        run, cost = small, _cost(engine.family, plan, small, method)
    begin = time.perf_counter()
    done = sample_staged(
        *(engine, run, prompt),
        negative_prompt=negative_prompt,
        batch=batch,
        seeds=seeds,
        callback=callback,
        cancel=cancel,
        method=method,
    )
    images = done.images if method else shrunk(done.images, small.requested_width, small.requested_height)
    seconds, own = time.perf_counter() - begin, None if method else steps
    return Preview(images, kind, own, plan, done.seeds, cost, seconds, done.cancelled, done.warnings)


def preview_plan(family: Family, plan: StagedPlan) -> StagedPlan:
    """A native run's sigmas at the size of its previews: half, on the family's grid.

    Args:
        family: The model's family.
        plan: The native plan.

    Returns:
        A plan of one stage; its requested size is that of the previews, without what is cropped of the run's own edges.
    """
    full, grid = plan.stages[0], family.grid
    width, height = (max(1, round(side / 2 / grid)) * grid for side in (full.width, full.height))
    stage = replace(full, width=width, height=height, tokens=tokens_of(family, (width, height)))
    asked = (
        max(1, round(plan.requested_width * width / full.width)),
        max(1, round(plan.requested_height * height / full.height)),
    )
    return replace(plan, stages=(stage,), requested_width=asked[0], requested_height=asked[1], notes=())


def few_plan(plan: StagedPlan, steps: int, name: str = "steps") -> StagedPlan:
    """A native run in few multistep steps: its schedule with fewer points.

    Args:
        plan: The native plan.
        steps: How many, fewer than the run's own.
        name: What the number is called, for the refusal.

    Returns:
        The plan of the preview, at the run's size.

    Raises:
        MrFlowError: The run has no more steps than that.
    """
    full = plan.stages[0]
    if steps >= full.steps:
        raise MrFlowError(f"{name} is {steps}, and the run itself takes {full.steps}; preview it with fewer steps.")
    return replace(with_first_steps(plan, steps, "multistep"), notes=())


def shrunk(images: Tensor, width: int, height: int) -> Tensor:
    """Images made smaller by area means.

    Args:
        images: (B, 3, H, W).
        width: Columns of the result.
        height: Rows.

    Returns:
        (B, 3, height, width).
    """
    return functional.interpolate(images, (height, width), mode="area")


def _cost(family: Family, plan: StagedPlan, small: StagedPlan, method: Nested) -> float:
    """Work of a small run, in evaluations at the full size."""
    stage = small.stages[0]
    each = family.forward_cost(stage.tokens) / family.forward_cost(plan.stages[0].tokens)
    if isinstance(method, Chain):
        full, rest = method.evaluations(stage.sigmas)
        return full + each * rest
    return each * solver_evaluations(stage.solver, stage.steps)
