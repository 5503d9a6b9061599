"""Images to make: their keys, their names, and the units in which they are handed out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mrflow_sched.plan.cost import part_costs
from mrflow_sched.plan.families import Family
from mrflow_sched.plan.stages import StagedPlan

__all__ = ["Item", "Kind", "Unit", "key_of", "plan_cost"]

Kind = Literal["image", "draft"]
"""What a file holds: a whole run's image, or stage 1's with its latents."""

_KEY_LETTERS = 20
"""80 bits: among a million images two share a key with a chance of 4e-13."""


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        key: Made of all that decides the image (`key_of`).
        row: Line of the table that it comes from.
        plan: All numbers of its run; the seed is its own.
        prompt: What it shows.
        negative: What it should not show, or None.
        refine_prompt: What the later stages show instead, or None.
        refine_negative: What those should not show instead, or None.
        loras: The LoRAs on the model, each FILE or FILE:SCALE.
        name: What the table calls it, or None.
    """

    key: str
    row: int
    plan: StagedPlan
    prompt: str
    negative: str | None = None
    refine_prompt: str | None = None
    refine_negative: str | None = None
    loras: tuple[str, ...] = ()
    name: str | None = None

    def file(self, kind: Kind, suffix: str) -> str:
        """The name under which it is kept.

        Args:
            kind: Of the file.
            suffix: Ending of finished images; a draft is a PNG.

        Returns:
            A file name that no other image has.
        """
        if kind == "draft":
            return f"draft-{self.plan.seed}-{self.key}.png"
        return f"mrflow-{self.plan.seed}-{self.key}{suffix}"


@dataclass(frozen=True)
class Unit:
    """What a worker is given at once.

    Attributes:
        items: What is sampled together: one prompt, with seeds that follow each other.
        wanted: Which of them are kept, counted from 0; the others are there already.
        kind: What is made.
        cost: Work in FLOP, or in another measure that is one for all units.
        finishes: The later stages of a draft that is in the store.
    """

    items: tuple[Item, ...]
    wanted: tuple[int, ...]
    kind: Kind
    cost: float
    finishes: bool = False


def key_of(inputs: Mapping[str, Any]) -> str:
    """The key of an image.

    Args:
        inputs: All that decides it, as JSON can write it.

    Returns:
        Twenty hexadecimal digits, the same for the same inputs on every machine.
    """
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:_KEY_LETTERS]


def plan_cost(plan: StagedPlan, family: Family | None, part: Literal["whole", "draft", "finish"] = "whole") -> float:
    """What one image costs.

    Args:
        plan: Of its run.
        family: The model's, where its network was counted; None: the known one of its name.
        part: All stages, the first alone, or those after it.

    Returns:
        FLOP; tokens times steps for a family that was never counted.
    """
    if part == "finish":
        return max(plan_cost(plan, family) - plan_cost(plan, family, "draft"), 0.0)
    plan = replace(plan, stages=plan.stages[:1]) if part == "draft" else plan
    costs = part_costs(plan, family)
    if costs is None:
        return float(sum(stage.tokens * stage.steps for stage in plan.stages))
    return sum(each.flop for each in costs)
