"""The scenes that quality is measured on, by kind of picture: half with detail that only the full size holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mrflow_sched.demo.drawing import render
from mrflow_sched.demo.scenes import CATEGORIES, FineKind, Scene, fine_scene

TEST_STREAM, FIRST_SEED = 3, 1000
FINE: dict[str, tuple[FineKind, ...]] = {
    "small letters": ("small letters", "small sign"),
    "tiny letters": ("small letters", "small sign"),
    "large faces": ("faces",),
    "small faces": ("faces",),
    "lines": ("lines",),
    "birds and outlines": ("birds",),
}
"""Kinds with fine detail, and what is drawn for them."""
KINDS: tuple[str, ...] = (*CATEGORIES, *FINE)
"""All kinds of picture."""


def kind_of(scene: Scene) -> str:
    """The scene's kind, one of `KINDS`."""
    if scene.small_word:
        return f"{scene.print} letters"
    if scene.faces:
        return "small faces" if scene.face_size else "large faces"
    return "birds and outlines" if scene.birds else scene.category


def scenes_of(each: int) -> list[Scene]:
    """`each` scenes of every category without fine detail, of a stream that nothing was trained on."""
    from tools.train_demo import data

    found: dict[str, list[Scene]] = {category: [] for category in CATEGORIES}
    index = 0
    while min(len(rows) for rows in found.values()) < each:
        scene = data.scene_at(index, TEST_STREAM)
        if len(found[scene.category]) < each:
            found[scene.category].append(scene)
        index += 1
    return [scene for rows in found.values() for scene in rows]


def fine_scenes_of(each: int) -> list[Scene]:
    """`each` scenes of every kind with fine detail, of a stream that nothing was trained on."""
    rows: list[Scene] = []
    for number, (kind, drawn) in enumerate(FINE.items()):
        found: list[Scene] = []
        index = 0
        while len(found) < each:
            scene = fine_scene(np.random.default_rng([TEST_STREAM, 1 + number, index]), drawn[index % len(drawn)])
            if kind_of(scene) == kind:
                found.append(scene)
            index += 1
        rows += found
    return rows


def all_scenes(each: int) -> list[Scene]:
    """`each` scenes of every category without fine detail, and about as many with it, in equal shares of its kinds."""
    return scenes_of(each) + fine_scenes_of(math.ceil(each * len(CATEGORIES) / len(FINE)))


def next_scenes(each: int) -> list[Scene]:
    """One scene of every kind, none of which is among `all_scenes(each)`."""
    fine = math.ceil(each * len(CATEGORIES) / len(FINE))
    return scenes_of(each + 1)[each :: each + 1] + fine_scenes_of(fine + 1)[fine :: fine + 1]


def rendered(scenes: Sequence[Scene], size: int, draw: int = 0) -> Tensor:
    """The scenes as the generator renders them, (N, 3, size, size) in [0, 1]; every `draw` is another picture of each
    caption."""
    first = FIRST_SEED + 100_000 * draw
    drawn = [torch.from_numpy(render(scene, size, seed=first + row)) for row, scene in enumerate(scenes)]
    return torch.stack(drawn).permute(0, 3, 1, 2).float().contiguous()
