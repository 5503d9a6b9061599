"""The judge reads what the scenes draw, and captions lead back to their scenes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.drawing import render
from mrflow_sched.demo.judge import FIELDS, WHOLE, Judge, at_reading_size, hits, labels, load_judge, log_probability
from mrflow_sched.demo.parse import scene_of
from mrflow_sched.demo.scenes import CATEGORIES, Scene, Thing, random_scene

# ---------------------------------------------------------------------------------------------------------- captions


@given(st.integers(0, 2**32 - 1), st.sampled_from(CATEGORIES))
def test_a_caption_leads_back_to_its_scene(seed: int, category: Any) -> None:
    scene = random_scene(np.random.default_rng(seed), category)
    assert scene_of(caption(scene)) == scene
    open_sky = replace(scene, sky="") if category == "objects" else scene
    assert scene_of(caption(scene, name_sky=False)) == open_sky


def test_thousands_of_captions_lead_back() -> None:
    scenes = [random_scene(np.random.default_rng([11, index])) for index in range(3000)]
    assert [scene_of(caption(scene)) for scene in scenes] == scenes


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("a red star", Scene("objects", (Thing("red", "plain", "star"),))),
        ("  A Red  STAR over Green hills. ", Scene("objects", (Thing("red", "plain", "star"),), ground="green hills")),
        (
            "a ring and a dotted heart under a night sky, the word AB",
            Scene("objects", (Thing("", "", "ring"), Thing("", "dotted", "heart")), sky="night", word="AB"),
        ),
        ("the word FLOW", Scene("letters", word="FLOW")),
        ("the word FLOW on a red wall", Scene("letters", word="FLOW", wall="red")),
        ("many small bricks", Scene("detail", detail="bricks")),
        ("a smooth sky with a moon", Scene("smooth", light="moon")),
    ],
)
def test_what_a_caption_leaves_open_is_empty(text: str, scene: Scene) -> None:
    assert scene_of(text) == scene
    assert all(index < len(FIELDS[field]) for field, index in labels(scene).items())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photo of a cat",
        "a red star and a cat",
        "the word flow",
        "the word F",
        "the word ABCDEF",
        "a red star, a blue star",
        "a red star over green hills, bokeh",
        "a purple \u017ftar",
        "a red star " * 1000,
        "a\x00red star",
    ],
)
def test_what_the_grammar_does_not_say_is_none(text: str) -> None:
    assert scene_of(text) is None


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [random_scene(np.random.default_rng([5, index]), CATEGORIES[index % 4]) for index in range(16)]


def drawn(scenes: list[Scene], size: int) -> torch.Tensor:
    images = [torch.from_numpy(render(scene, size, seed=row)) for row, scene in enumerate(scenes)]
    return torch.stack(images).permute(0, 3, 1, 2).float().contiguous()


@pytest.mark.parametrize("size", [128, 256])
def test_right_captions_are_surer_than_those_of_others(judge: Judge, scenes: list[Scene], size: int) -> None:
    images = drawn(scenes, size)
    right = log_probability(judge, images, scenes)
    other = log_probability(judge, images, [*scenes[4:], *scenes[:4]])  # of the same category
    assert right.shape == (16,)
    assert bool((right <= 0).all())
    assert float(right.mean()) > -0.1
    assert bool((other < right - 0.5).all())


def test_it_is_the_mean_over_what_the_caption_names(judge: Judge) -> None:
    """One attribute less: the sum shrinks by its logarithm, the count by one."""
    scene = Scene("objects", (Thing("red", "plain", "star"),), ground="green hills", sky="orange", word="AB")
    image = drawn([scene], 128)
    logits = judge.whole(image)
    sky = float(logits["sky"][0].log_softmax(-1)[FIELDS["sky"].index("orange")])
    count = sum(labels(scene)[field] >= 0 for field in WHOLE) + 2
    whole = float(log_probability(judge, image, [scene])) * count
    less = float(log_probability(judge, image, [replace(scene, sky="")])) * (count - 1)
    assert whole - less == pytest.approx(sky, abs=1e-4)
    wrong = float(log_probability(judge, image, [replace(scene, word="XB")])) * count
    assert wrong < whole - 2  # one letter


def test_hits_count_what_reads_right(judge: Judge) -> None:
    scene = Scene("letters", word="MAGIC", ink="white", wall="blue")
    image = drawn([scene], 256)
    [found] = hits(judge, image, [replace(scene, word="MAGIX", wall="red")])
    assert found["letters"] == [True, True, True, True, False]
    assert sorted(found["colour"]) == [False, True]
    assert "shape" not in found


def test_every_size_is_read_at_one() -> None:
    tall = torch.zeros(1, 3, 256, 128)
    tall[..., :128, :] = 1
    small = at_reading_size(tall)
    assert small.shape == (1, 3, 128, 128)
    assert small[0, 0, :, 0].tolist() == [1.0] * 64 + [0.0] * 64


def test_a_gradient_reaches_the_image(judge: Judge) -> None:
    scene = Scene("letters", word="AB", ink="white", wall="blue")
    image = drawn([scene], 128).requires_grad_()
    log_probability(judge, image, [scene]).sum().backward()
    assert image.grad is not None
    assert float(image.grad.abs().sum()) > 0
