"""A run of another program, and the values that are taken from its texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mrflow_sched._runtime.errors import quoted
from mrflow_sched.plan.checks import MAX_GUIDANCE, MAX_SIDE
from mrflow_sched.plan.families import Family
from mrflow_sched.plan.options import PlanOptions

__all__ = ["ForeignRun", "NodeSettings", "scale", "sides", "text", "unusable", "whole"]


@dataclass(frozen=True)
class NodeSettings:
    """What MrFlow's own nodes in ComfyUI were set to, where they made an image.

    Attributes:
        options: The options of the plan that were set, each in its range; without the seed and guidance.
        cfg: The scale of CFG; None: the family's.
        refine_cfg: The scale of CFG of the later stages; None: that of the first.
        family: The family that was chosen; None: the one that ComfyUI's model tells.
        batch: Images of the run. The file does not say which of them it is.
        from_image: Another image took the place of stage 1.
        refine_prompt: The prompt of the later stages, where they had another one.
        left: What else made the image and cannot be read from the file, in words.
    """

    options: PlanOptions = field(default_factory=PlanOptions)
    cfg: float | None = None
    refine_cfg: float | None = None
    family: str | None = None
    batch: int = 1
    from_image: bool = False
    refine_prompt: str | None = None
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class ForeignRun:
    """How another program made an image, as far as its texts say.

    Attributes:
        program: "A1111" (which Forge and others write like) or "ComfyUI".
        prompt: What was asked for.
        negative: The negative prompt; None where there was none.
        seed: The image's seed, 0 to 2^63 - 1.
        width: Of its first pass in pixels, 1 to 32768; of the final image where `nodes` are MrFlow's.
        height: Likewise.
        steps: Steps of its first pass, 1 to 1000.
        guidance: The guidance scale, 0 to 100; the embedded one where the model has one.
        unusable: What the texts say of seed and size that is out of range or no number, as in "the seed '-1'".
        nodes: What MrFlow's nodes in ComfyUI were set to; None where the image was made without them. `guidance` is
            the embedded scale alone then.
    """

    program: str
    prompt: str
    negative: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    unusable: tuple[str, ...] = ()
    nodes: NodeSettings | None = None

    def options_for(self, family: Family) -> PlanOptions:
        """The options of the plan that make the run of MrFlow's nodes with a model.

        Args:
            family: The model's.

        Returns:
            Options of `make_plan`, the seed among them; the seed alone where other nodes or another program made it.
        """
        options = PlanOptions() if self.seed is None else PlanOptions(seed=self.seed)
        if self.nodes is None:
            return options
        options |= self.nodes.options
        embedded = family.guidance_kind == "embedded"
        guidance = self.guidance if embedded else self.nodes.cfg
        if guidance is not None:
            options["guidance"] = guidance
        if family.guidance_kind == "cfg" and self.nodes.refine_cfg is not None:
            options["refine_guidance"] = self.nodes.refine_cfg
        return options


def text(value: Any) -> str | None:
    """Take text that can be written as UTF-8.

    Args:
        value: What came.

    Returns:
        The text, or None.
    """
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        return None
    return value


def whole(value: Any, low: int, high: int) -> int | None:
    """Take a whole number, or its digits.

    Args:
        value: What came.
        low: The least that is allowed.
        high: The most.

    Returns:
        The number, or None.
    """
    if isinstance(value, str):
        value = int(value) if re.fullmatch(r"[0-9]{1,20}", value) else None
    return value if type(value) is int and low <= value <= high else None


def sides(size: str | None) -> tuple[int, int] | tuple[None, None]:
    """Take a size in pixels.

    Args:
        size: Such as "1024x768".

    Returns:
        (width, height), or two None.
    """
    width, _, height = (size or "").partition("x")
    found = whole(width, 1, MAX_SIDE), whole(height, 1, MAX_SIDE)
    return (None, None) if found[0] is None or found[1] is None else (found[0], found[1])


def scale(value: Any) -> float | None:
    """Take a guidance scale, or its digits.

    Args:
        value: What came.

    Returns:
        The scale, or None.
    """
    if isinstance(value, str):
        value = float(value) if re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,20})?", value) else None
    return float(value) if type(value) in (int, float) and 0 <= value <= MAX_GUIDANCE else None


def unusable(values: Mapping[str, tuple[Any, Any]]) -> tuple[str, ...]:
    """Say what was given and not taken.

    Args:
        values: By name, as in "the seed": what was given, and what was taken of it.

    Returns:
        A few words for each that was given and is None all the same.
    """
    return tuple(
        f"{name} {quoted(given, 40)}" for name, (given, taken) in values.items() if given is not None and taken is None
    )
