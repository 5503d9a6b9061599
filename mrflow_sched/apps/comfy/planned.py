"""The plan that travels between nodes, with what is needed to make it anew when a later node changes a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.plan_lines import counted
from mrflow_sched.plan.families import Family
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.notes import image_notes
from mrflow_sched.plan.stages import Stage, StagedPlan

__all__ = ["Fit", "Planned", "given", "planned", "size_like"]


@dataclass(frozen=True)
class Fit:
    """What a model and a VAE must have to run a plan.

    Attributes:
        engine: Name of the model's configuration in ComfyUI.
        channels: Of its latents.
        ratio: Pixels to one latent, along a side.
    """

    engine: str
    channels: int
    ratio: int


@dataclass(frozen=True)
class Planned:
    """What the socket MRFLOW_PLAN carries.

    Attributes:
        plan: All numbers of the run.
        family: The model's, known or made from it.
        size: (width, height) in pixels that was asked for.
        options: Those of `make_plan` that were given.
        fit: Of the model that the plan was made for.
        notes: What to tell of the model, one sentence each.
        cfg: The scale of CFG that was asked for; 0: none was.
        image: (width, height) of the image that takes the place of stage 1; None: there is none.
    """

    plan: StagedPlan
    family: Family
    size: tuple[int, int]
    options: Mapping[str, Any]
    fit: Fit
    notes: tuple[str, ...] = ()
    cfg: float = 0.0
    image: tuple[int, int] | None = None

    def stage(self, number: int) -> Stage:
        """One stage.

        Args:
            number: From 1.

        Returns:
            The stage.

        Raises:
            MrFlowError: The plan has no such stage.
        """
        count = len(self.plan.stages)
        if not 1 <= number <= count:
            raise MrFlowError(f"stage must be from 1 to {count}, which the plan has, got {number}.")
        return self.plan.stages[number - 1]

    def changed(self, options: Mapping[str, Any]) -> Planned:
        """The plan with other options.

        Args:
            options: Of `make_plan`; they take the place of those given before.

        Returns:
            A new one; this one where there are none.

        Raises:
            MrFlowError: The options do not fit.
        """
        if not options:
            return self
        both = {**self.options, **options}
        return replace(self, plan=_made(self.family, self.size, both), options=both)

    def scale(self, number: int) -> float:
        """The scale of CFG in one stage, as the plan has it.

        Args:
            number: Of the stage.

        Returns:
            The scale; 1 is off. Guidance that the model takes as an input is part of the conditioning instead.

        Raises:
            MrFlowError: The plan has no such stage.
        """
        stage = self.stage(number)
        return stage.guidance if self.family.guidance_kind == "cfg" else self.cfg or 1.0

    def refined(self, number: int, sigma: float = 0.0, steps: int = 0, curve: str = "linear") -> Planned:
        """The plan with another schedule in one of its later stages.

        Args:
            number: Of the stage, from 2.
            sigma: Where it starts; 0: where the plan has it.
            steps: Its steps; 0: as many as the plan has.
            curve: "linear" or "shifted".

        Returns:
            A new plan; this one where nothing is changed.

        Raises:
            MrFlowError: The plan has no such stage, or the numbers do not fit.
        """
        self.stage(number)
        later = self.plan.stages[1:]
        starts, counts = [stage.start_sigma for stage in later], [stage.steps for stage in later]
        starts[number - 2] = sigma or starts[number - 2]
        counts[number - 2] = steps or counts[number - 2]
        other = given(sigma=sigma and starts, refine_steps=steps and counts)
        return self.changed({**other, "refine_curve": curve} if curve != "linear" else other)

    @property
    def summary(self) -> str:
        """The run in two sentences: steps, sizes and sigmas of the stages, and what it costs beside a plain run."""
        first, *later = self.plan.stages
        parts = [f"{counted(first.steps, 'step')} at {first.width}x{first.height}"] if self.image is None else []
        for stage in later:
            parts.append(f"upscaled to {stage.width}x{stage.height}")
            if stage.sigmas:
                parts.append(f"{counted(stage.steps, 'step')} from sigma {stage.start_sigma:g}")
        said = f"{', then '.join(parts)}."
        if self.image is None and self.plan.cost_ratio > 1.0:
            native = f"{self.plan.native_steps} steps at {self.plan.width}x{self.plan.height}"
            said += f" The network costs {self.plan.cost_ratio:.1f} times less than {native}."
        return said[0].upper() + said[1:]

    @property
    def sentences(self) -> tuple[str, ...]:
        """What a user should know of the model and the plan."""
        of_plan = self.plan.notes if self.image is None else image_notes(self.plan, *self.image)
        return (*self.notes, *of_plan)


def planned(
    family: Family,
    size: tuple[int, int],
    options: Mapping[str, Any],
    *,
    fit: Fit,
    notes: Sequence[str] = (),
    cfg: float = 0.0,
    image: tuple[int, int] | None = None,
) -> Planned:
    """Make a plan for the sockets.

    Args:
        family: The model's.
        size: (width, height) in pixels.
        options: Of `make_plan`.
        fit: Of the model.
        notes: What to tell of the model.
        cfg: The scale of CFG that was asked for; 0: none was.
        image: (width, height) of the image that takes the place of stage 1.

    Returns:
        The plan.

    Raises:
        MrFlowError: As in `make_plan`.
    """
    return Planned(_made(family, size, options), family, size, options, fit, tuple(notes), cfg, image)


def _made(family: Family, size: tuple[int, int], options: Mapping[str, Any]) -> StagedPlan:
    return make_plan(family, *size, **options)


def given(**values: Any) -> dict[str, Any]:
    """The values that a node's user set.

    Args:
        **values: Of widgets: 0, None and "family" leave a number to the plan.

    Returns:
        The others by name.
    """
    return {name: value for name, value in values.items() if value and value != "family"}


def size_like(width: int, height: int, image: tuple[int, int], factor: float) -> tuple[int, int]:
    """The size of an image's refined version.

    Args:
        width: Pixels; 0: from the image.
        height: Likewise.
        image: (width, height) of the image.
        factor: How many times larger where neither is given.

    Returns:
        (width, height): where one is given, the other has the image's shape.
    """
    if not width and not height:
        return round(image[0] * factor), round(image[1] * factor)
    return (width or round(height * image[0] / image[1]), height or round(width * image[1] / image[0]))
