"""Captions say what scenes hold and no more, and lead back to them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mrflow_sched.demo import example_prompts
from mrflow_sched.demo.captions import ADDED_WORDS, caption, caption_words, vocabulary
from mrflow_sched.demo.judge import FIELDS, labels, load_judge, log_probability
from mrflow_sched.demo.parse import scene_of
from mrflow_sched.demo.paths import weights_path
from mrflow_sched.demo.scenes import (
    CATEGORIES,
    FINE_KINDS,
    MAX_LETTERS,
    OUTLINED,
    Face,
    Scene,
    Thing,
    fine_scene,
    left_open,
    random_scene,
)

KINDS = (*CATEGORIES, *FINE_KINDS)
WORDINGS = [{"ground_first": first, "bare_ground": bare} for first, bare in product((False, True), repeat=2)]


def scene_at(seed: int, kind: Any) -> Scene:
    rng = np.random.default_rng(seed)
    return random_scene(rng, kind) if kind in CATEGORIES else fine_scene(rng, kind)


# ------------------------------------------------------------------------------------------------------------ captions


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (
            Scene(
                "objects", (Thing("red", "striped", "circle"), Thing("blue", "plain", "star")), "green hills", "orange"
            ),
            "a red striped circle and a blue star over green hills under an orange sky",
        ),
        (Scene("letters", word="AB", ink="red", wall="orange"), "the word AB in red letters on an orange wall"),
        (
            Scene("letters", word="AB", ink="red", small_word="CD", print="tiny"),
            "the word AB in red letters above the tiny word CD",
        ),
        (
            Scene("objects", (Thing("red", OUTLINED, "ring"),), birds="two", small_word="CD", print="small"),
            "a red outlined ring with two birds, the small word CD",
        ),
        (Scene("smooth", light="sun", birds="six"), "a smooth sky with a sun and six birds"),
        (
            Scene("faces", faces=(Face("sad", "", "blue"), Face("", "red", "")), face_size="small", wall="orange"),
            "a small sad face with blue eyes and a small face with red hair on an orange wall",
        ),
        (Scene("lines", ink="red", pattern="grid", gap="three", wall="white"), "a thin red grid three apart on white"),
        (Scene("lines", pattern="lines"), "thin lines"),
    ],
)
def test_captions_of_examples(scene: Scene, text: str) -> None:
    assert caption(scene) == text
    assert scene_of(text) == scene


@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_captions_stay_in_the_vocabulary_and_name_every_attribute(seed: int, kind: str) -> None:
    scene = scene_at(seed, kind)
    words = [word.rstrip(",") for word, role in caption_words(scene) if role not in {"word", "small_word"}]
    assert set(words) <= set(vocabulary())
    for thing in scene.things:
        assert {thing.colour, thing.shape} <= set(words)
        assert (thing.texture in words) == (thing.texture != "plain")
    named = {*scene.ground.split(), scene.sky, scene.ink, scene.wall, scene.detail, scene.light, scene.side}
    named |= {scene.print, scene.birds, scene.face_size, scene.pattern, scene.gap}
    named |= {value for face in scene.faces for value in (face.mood, face.hair, face.eyes)}
    assert named - {""} <= set(words)
    for word in (scene.word, scene.small_word):
        assert (word in caption(scene).split()) == bool(word)
        assert len(word) <= MAX_LETTERS


def test_words_that_were_added_come_last_and_keep_their_numbers() -> None:
    """Weights are trained on a word's number."""
    first = vocabulary()[: -len(ADDED_WORDS)]
    assert vocabulary()[len(first) :] == ADDED_WORDS
    assert list(first) == sorted(first)
    expected = (
        *("above", "tiny", "birds", "two", "three", "four", "five", "six", "face", "hair", "eyes"),
        *("happy", "sad", "calm", "surprised", "thin", "apart", "lines", "grid", "hatching", "outlined"),
    )
    assert expected == ADDED_WORDS
    tokenizer = json.loads((weights_path() / "tokenizer_2" / "tokenizer.json").read_text("utf-8"))
    shipped = [piece[1:] for piece, _ in tokenizer["model"]["vocab"] if len(piece) > 1 and piece[0] == "\u2581"]
    assert tuple(shipped) in {first, vocabulary()}


# ------------------------------------------------------------------------------------------------------------ and back


@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS), st.sampled_from(WORDINGS))
def test_a_caption_leads_back_to_what_it_names(seed: int, kind: str, wording: dict[str, bool]) -> None:
    scene = scene_at(seed, kind)
    for named in (scene, left_open(scene, np.random.default_rng(seed))):
        assert scene_of(caption(named, **wording)) == named
    if scene.category == "objects":
        assert scene_of(caption(scene, name_sky=False, **wording)) == replace(scene, sky="")


def test_thousands_of_captions_lead_back() -> None:
    rng = np.random.default_rng(12)
    scenes = [left_open(fine_scene(rng) if rng.random() < 0.5 else random_scene(rng), rng) for _ in range(3000)]
    assert [scene_of(caption(scene)) for scene in scenes] == scenes


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("a star", Scene("objects", (Thing("", "", "star"),))),
        ("a red star", Scene("objects", (Thing("red", "plain", "star"),))),
        ("a plain star", Scene("objects", (Thing("", "plain", "star"),))),
        ("A Star under a Sky with Two Birds", Scene("objects", (Thing("", "", "star"),), birds="two")),
        ("a star over hills", Scene("objects", (Thing("", "", "star"),), "green hills")),
        ("a star over a city", Scene("objects", (Thing("", "", "star"),), "a dark city")),
        ("hills under a sky", Scene("smooth", ground="green hills")),
        ("a dark city under a night sky", Scene("smooth", ground="a dark city", sky="night")),
        ("a smooth sky with six birds", Scene("smooth", birds="six")),
        ("word AB above tiny word CD", Scene("letters", word="AB", small_word="CD", print="tiny")),
        ("a face", Scene("faces", faces=(Face("", "", ""),))),
        ("a small face", Scene("faces", faces=(Face("", "", ""),), face_size="small")),
        ("thin hatching", Scene("lines", pattern="hatching")),
    ],
)
def test_what_a_caption_leaves_open_is_empty(text: str, scene: Scene) -> None:
    assert scene_of(text) == scene


@pytest.mark.parametrize(
    "text",
    [
        "a small face and a large face",
        "a small face and a face",
        "a face with red hair with blue eyes",
        "a green face",
        "a smooth sky and three birds",
        "a smooth sky with seven birds",
        "a star over blue hills",
        "hills",
        "red lines",
        "thin lines five apart",
        "the word AB above the word CD",
        "a star, the word AB, the tiny word CD",
    ],
)
def test_what_the_grammar_does_not_say_is_none(text: str) -> None:
    assert scene_of(text) is None


def test_the_page_of_the_model_shows_captions_that_are_in_the_grammar() -> None:
    page = (Path(__file__).parents[2] / "docs" / "demo-model.md").read_text("utf-8")
    understood = page.split("## What it understands")[1].split("### What it does not understand")[0]
    rows = [line for line in understood.splitlines() if line.startswith("|")]
    found = {text for row in rows for text in re.findall("`(.+?)`", row)} - {"hills", "small"}
    assert len(found) > 20
    assert [text for text in found if scene_of(text) is None] == []
    prompts = [text for kind in ("full", "open", "fine") for text in example_prompts(kind)]
    assert [text for text in prompts if scene_of(text) is None] == []


# -------------------------------------------------------------------------------------------- what a judge may ask for


@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_labels_are_those_that_a_caption_names(seed: int, kind: str) -> None:
    scene = scene_at(seed, kind)
    whole, named = labels(scene), labels(left_open(scene, np.random.default_rng(seed)))
    assert set(whole) == set(named) == set(FIELDS)
    if not any(thing.texture == OUTLINED for thing in scene.things):
        assert all(index in {-1, whole[field]} for field, index in named.items())
    assert all(-1 <= index < len(FIELDS[field]) for field, index in whole.items())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a star", {"category": "objects", "shape0": "star"}),
        ("a star, the word AB", {"category": "objects", "shape0": "star", "length": "2"}),
        ("a star over hills", {"category": "objects", "shape0": "star", "ground": "green hills", "length": "0"}),
        ("a star over hills, the tiny word AB", {"category": "objects", "shape0": "star", "ground": "green hills"}),
        ("a red outlined star under a blue sky", {"category": "objects", "sky": "blue"}),
        ("the word AB above the tiny word CD", {"category": "letters", "length": "2"}),
        ("a happy face with red hair on a red wall", {"wall": "red"}),
        ("thin red lines three apart on white", {}),
    ],
)
def test_labels_leave_out_what_is_open_and_what_the_judge_cannot_read(text: str, named: dict[str, str]) -> None:
    scene = scene_of(text)
    assert scene is not None
    found = {field: FIELDS[field][index] for field, index in labels(scene).items() if index >= 0}
    assert {field: value for field, value in found.items() if field[:-1] != "letter"} == named


def test_a_scene_of_which_nothing_can_be_read_is_neither_likely_nor_unlikely() -> None:
    lines, star = scene_of("thin lines"), scene_of("a star")
    assert lines is not None
    assert star is not None
    found = log_probability(load_judge(), torch.zeros(2, 3, 128, 128), [lines, star])
    assert float(found[0]) == 0.0
    assert float(found[1]) < 0.0
