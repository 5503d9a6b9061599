"""The scenes of the demo model: what is in them at random, and what open captions leave out of them."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mrflow_sched.demo.scenes import (
    CATEGORIES,
    FINE_KINDS,
    GAPS,
    PRINTS,
    Face,
    Scene,
    Thing,
    fine_scene,
    left_open,
    luminance,
    random_scene,
)

KINDS = (*CATEGORIES, *FINE_KINDS)


def scene_at(seed: int, kind: Any) -> Scene:
    rng = np.random.default_rng(seed)
    return random_scene(rng, kind) if kind in CATEGORIES else fine_scene(rng, kind)


def test_the_same_seed_draws_the_same_scenes_in_all_categories() -> None:
    first = [random_scene(np.random.default_rng([3, k])) for k in range(200)]
    assert first == [random_scene(np.random.default_rng([3, k])) for k in range(200)]
    assert {scene.category for scene in first} == set(CATEGORIES)


def test_fine_scenes_hold_the_detail_that_they_are_asked_for() -> None:
    found = {kind: [scene_at(seed, kind) for seed in range(60)] for kind in FINE_KINDS}
    assert all(scene.is_fine for scenes in found.values() for scene in scenes)
    assert {scene.category for scene in found["small letters"]} == {"letters"}
    assert (
        {scene.print for scene in found["small letters"]} == {scene.print for scene in found["small sign"]} == {*PRINTS}
    )
    assert all(scene.small_word and not scene.word for scene in found["small sign"])
    assert {scene.category for scene in found["birds"] if scene.birds} == {"objects", "smooth"}
    assert {len(scene.faces) for scene in found["faces"]} == {1, 2}
    assert all(scene.face_size == "small" for scene in found["faces"] if len(scene.faces) == 2)
    assert {scene.gap for scene in found["lines"]} == {*GAPS}
    contrasts = [abs(luminance(scene.ink) - luminance(scene.wall)) for scene in found["lines"] + found["small letters"]]
    assert min(contrasts) >= 0.25
    drawn = [fine_scene(np.random.default_rng([4, k])) for k in range(100)]
    assert drawn == [fine_scene(np.random.default_rng([4, k])) for k in range(100)]
    assert not any(random_scene(np.random.default_rng([3, k])).is_fine for k in range(100))


def parts(scene: Scene) -> list[Scene | Thing | Face]:
    return [replace(scene, things=(), faces=()), *scene.things, *scene.faces]


@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_an_open_scene_names_less_and_nothing_else(seed: int, kind: str) -> None:
    scene = scene_at(seed, kind)
    named = left_open(scene, np.random.default_rng(seed))
    assert named == left_open(scene, np.random.default_rng(seed))
    for whole, less in zip(parts(scene), parts(named), strict=True):
        assert all(value in {asdict(whole)[field], ""} for field, value in asdict(less).items())
    for field in ("category", "small_word", "print", "birds", "detail", "face_size", "pattern"):
        assert getattr(named, field) == getattr(scene, field)
    for thing, less in zip(scene.things, named.things, strict=True):
        assert less == thing or not less.colour, "a coloured thing keeps its texture"
        assert less.texture != "plain" or less.colour
    assert named.word == scene.word or not named.ground, "no sign over a named ground means that there is none"
    assert not named.side or named.light


def test_the_share_says_how_much_is_left_open() -> None:
    rng = np.random.default_rng(1)
    scenes = [random_scene(rng, "letters") for _ in range(400)]
    assert all(left_open(scene, rng, 0.0) == scene for scene in scenes)
    assert not any(left_open(scene, rng, 1.0).ink for scene in scenes)
    assert 0.3 < np.mean([bool(left_open(scene, rng).wall) for scene in scenes]) < 0.5
