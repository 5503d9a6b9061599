"""What the page's controls ask for, and the plan that it makes."""

from __future__ import annotations

import contextlib
import re
import secrets
from dataclasses import dataclass, replace
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.apps.ui.studio import Start, Studio, Wish
from mrflow_sched.images.record import MAX_PROMPT
from mrflow_sched.plan.checks import MAX_SEED, UpscalerKind
from mrflow_sched.plan.families import Family
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.sizes import from_an_image, size_step
from mrflow_sched.plan.stages import StagedPlan

RANDOM = "random"
"""The seed that stands for one drawn anew for every run."""
_RANDOM_SEEDS = 2**32  # as WebUIs draw them, so that they are short
_SIZE = re.compile(r"\s*([0-9]{1,6})\s*[x×*]\s*([0-9]{1,6})\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Choices:
    """Values of the page's controls, in their order on the page.

    Attributes:
        prompt: What the image shows.
        negative: What it should not show.
        preset: A preset of the family, or any N+M; empty: the default.
        size: "WIDTHxHEIGHT" of the final image in pixels; empty: the family's usual.
        seed: A whole number, or "random".
        low_steps: Steps of stage 1; empty: the preset's.
        refine_steps: Steps of the later stage; empty: the preset's.
        sigma: Fraction of noise at which refining starts; empty: the preset's.
        nested: Stage 1 starts from the final size's noise, shrunk, which keeps the layout of the seed's native image.
    """

    prompt: str = ""
    negative: str = ""
    preset: str = ""
    size: str = ""
    seed: str = RANDOM
    low_steps: str = ""
    refine_steps: str = ""
    sigma: str = ""
    nested: bool = False

    @classmethod
    def from_page(cls, *values: Any) -> Choices:
        """Take the values of the controls.

        Args:
            *values: One for each attribute; text may be None.

        Returns:
            The choices.
        """
        *texts, nested = values
        return cls(*("" if text is None else str(text) for text in texts), nested=bool(nested))

    def plan(self, family: Family, start: Start | None = None, upscaler_kind: UpscalerKind = "network") -> StagedPlan:
        """Make the plan. A random seed counts as 0: `settled` draws one.

        Args:
            family: The model's.
            start: The image to upscale, which decides the size; or None.
            upscaler_kind: What upscales the image.

        Returns:
            The plan.

        Raises:
            MrFlowError: A value is out of range, or the image is too thin for the model's grid.
        """
        options: dict[str, Any] = {
            "preset": self.preset.strip() or None,
            "low_steps": _number(self.low_steps),
            "refine_steps": _number(self.refine_steps),
            "sigma": _number(self.sigma),
            "noise": "nested" if self.nested and start is None else None,
            "upscaler_kind": upscaler_kind,
        }
        given: Any = {name: value for name, value in options.items() if value is not None}
        width, height = start.size(size_step(family, given)) if start is not None else self._sides(family)
        given = from_an_image(given) if start is not None else given
        plan = make_plan(family, width, height, **given, seed=self._seed() or 0)
        if start is not None:
            start.check_shape(plan)
        return plan

    def settled(self) -> Choices:
        """The same choices with a seed drawn where it is to be random.

        Returns:
            Choices that make one plan only.

        Raises:
            MrFlowError: The seed is neither a number in range nor "random".
        """
        seed = self._seed()
        return replace(self, seed=str(secrets.randbelow(_RANDOM_SEEDS) if seed is None else seed))

    def check_texts(self) -> None:
        """Refuse texts of which no image is made.

        Raises:
            MrFlowError: There is no prompt, or a text is too long for a record.
        """
        if not self.prompt.strip():
            raise MrFlowError("The prompt is empty; write what the image shows.")
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative)):
            if len(text) > MAX_PROMPT:
                raise MrFlowError(f"The {name} has {len(text)} letters; shorten it to {MAX_PROMPT}.")

    def wish(self, studio: Studio, start: Start | None = None) -> Wish:
        """What to make, checked before a job begins.

        Args:
            studio: The model.
            start: The image to upscale, or None.

        Returns:
            The wish; its seed is settled.

        Raises:
            MrFlowError: As in `check_texts` and `plan`, or the run does not fit into memory.
        """
        self.check_texts()
        plan = self.settled().plan(studio.family, start, studio.upscaler_kind)
        studio.check(plan)
        return Wish(plan, self.prompt.strip(), self.negative.strip() or None, start)

    def _seed(self) -> int | None:
        """The seed; None: a random one."""
        text = self.seed.strip().lower()
        if text in ("", RANDOM, "-1"):
            return None
        if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) > MAX_SEED:
            raise MrFlowError(f"The seed is {quoted(self.seed, 40)}; give {RANDOM}, or a number from 0 to {MAX_SEED}.")
        return int(text)

    def _sides(self, family: Family) -> tuple[int, int]:
        if not self.size.strip():
            return family.default_size or family.native_size
        found = _SIZE.fullmatch(self.size)
        if found is None:
            raise MrFlowError(f"The size is {quoted(self.size, 40)}; write WIDTHxHEIGHT, for example 1024x768.")
        return int(found[1]), int(found[2])


def _number(text: str) -> int | float | str | None:
    """A number that was typed; None where there is none. What is no number is left as it is, to be refused."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text.strip() or None


def sizes_of(family: Family) -> tuple[str, ...]:
    """Sizes that the page proposes.

    Args:
        family: The model's.

    Returns:
        The usual size first, then other shapes of about its area, then twice its sides.
    """
    width, height = family.default_size or family.native_size
    step = 2 * family.grid
    shapes = ((1.0, 1.0), (1.25, 0.8), (0.8, 1.25), (2.0, 2.0))
    sides = [(round(width * wide / step) * step, round(height * high / step) * step) for wide, high in shapes]
    return tuple(f"{wide}x{high}" for wide, high in sides)
