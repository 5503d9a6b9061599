"""Drafts and finished pictures of many seeds of a few prompts, made once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mrflow_sched import demo, load_upscaler, make_native_plan, make_plan, sample_staged
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import CATEGORIES, Scene, Thing, random_scene

SIDE, LOW = 256, 128
FIRST_SEED, TOGETHER = 3000, 8
FINISHED, FULL_DRAFT = "finished", "12 steps"
DRAFT_STEPS: Mapping[str, int] = {FULL_DRAFT: 12, "6 steps": 6, "4 steps": 4}
"""Names and steps of the drafts. That of 12 steps is the plan's own stage 1."""

_FIRST = (
    Scene(
        "objects",
        (Thing("red", "striped", "circle"), Thing("blue", "plain", "star")),
        ground="green hills",
        sky="orange",
        word="FLOW",
    ),
    Scene("detail", (Thing("purple", "checkered", "heart"),), ink="orange", wall="green", detail="flowers"),
    Scene("letters", word="MAGIC", ink="white", wall="blue"),
    Scene("smooth", ground="blue waves", sky="pink", light="sun", side="left"),
)


def scenes(count: int) -> list[Scene]:
    """The first `count` scenes: one of each category, then random ones, in turn."""
    rng = np.random.default_rng(990077)
    more = [random_scene(rng, CATEGORIES[index % 4]) for index in range(max(0, count - len(_FIRST)))]
    return [*_FIRST, *more][:count]


def pictures(scene: Scene, seeds: int, folder: Path) -> dict[str, Tensor]:
    """The pictures of one prompt for `seeds` seeds.

    What `folder` holds already is read, the rest is made and kept there; a run that was stopped goes on.

    Returns:
        "finished" (seeds, 3, SIDE, SIDE) and every name of `DRAFT_STEPS` (seeds, 3, LOW, LOW), floats in [0, 1].
    """
    prompt = caption(scene)
    maker = _Maker()
    home = folder / hashlib.sha256("\n".join((prompt, *maker.settings)).encode()).hexdigest()[:12]
    home.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Tensor]] = []
    for first in range(FIRST_SEED, FIRST_SEED + seeds, TOGETHER):
        file = home / f"{first}.safetensors"
        if not file.exists():
            made = maker.make(prompt, range(first, first + TOGETHER))
            save_file({name: value.half().contiguous() for name, value in made.items()}, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
            print(prompt, first, flush=True)
        found.append(load_file(file))
    return {name: torch.cat([each[name] for each in found])[:seeds].float() for name in found[0]}


class _Maker:
    """The embedded model with the plans of a full run and of its shorter drafts; loaded when it is needed."""

    def __init__(self) -> None:
        self.plan = make_plan("demo", SIDE, SIDE, "12+1")
        shorter = {name: steps for name, steps in DRAFT_STEPS.items() if name != FULL_DRAFT}
        solver = self.plan.stages[0].solver
        self.drafts = {
            n: make_native_plan("demo", LOW, LOW, steps=steps, solver=solver) for n, steps in shorter.items()
        }
        self.settings = [plan.to_string() for plan in (self.plan, *self.drafts.values())]
        self._parts: tuple[Any, Any] | None = None

    def make(self, prompt: str, seeds: Sequence[int]) -> dict[str, Tensor]:
        """The pictures of some seeds, by name."""
        self._parts = self._parts or (demo.load_engine(), load_upscaler(demo.upscaler_path()))
        engine, upscaler = self._parts
        prompts = [prompt] * len(seeds)
        whole = sample_staged(engine, self.plan, prompts, upscaler=upscaler, seeds=seeds, keep_stages=True)
        drafts = {n: sample_staged(engine, p, prompts, seeds=seeds).images for n, p in self.drafts.items()}
        return {FINISHED: whole.images, FULL_DRAFT: whole.stages[0].image, **drafts}
