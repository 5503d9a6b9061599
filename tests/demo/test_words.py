"""Words outside the embedded model's world are named; those inside are not."""

from __future__ import annotations

import numpy as np
import pytest

from mrflow_sched import demo
from mrflow_sched.demo.scenes import caption, random_scene
from mrflow_sched.demo.words import unknown_words, unknown_words_sentence


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a cat on a sofa", ("cat", "sofa")),
        ("A Red star, over GREEN hills!", ()),
        ("the word FLOW in red letters on a blue wall", ()),
        ('the word "FLOW" on a blue wall', ()),
        ("the word flow", ("flow",)),
        ("the word LONGER", ("LONGER",)),
        ("FLOW", ("FLOW",)),
        ("🐱🚀 звезда 星 a star", ("🐱🚀", "звезда", "星")),
        ("stars and stars", ("stars",)),
        ("", ()),
    ],
)
def test_unknown_words(prompt: str, unknown: tuple[str, ...]) -> None:
    assert unknown_words(prompt) == unknown
    assert (unknown_words_sentence([prompt]) is None) == (not unknown)


def test_every_caption_and_example_is_known() -> None:
    rng = np.random.default_rng(5)
    prompts = [*demo.example_prompts(), *(caption(random_scene(rng)) for _ in range(300))]
    assert unknown_words_sentence(prompts) is None


def test_the_sentence_names_a_few_words_shortly_and_the_way_out() -> None:
    sentence = unknown_words_sentence(["a cat on a sofa", "x" * 5000 + "\x1b one two three four"])
    assert sentence is not None
    assert sentence.startswith("The embedded model does not know 'cat', 'sofa', 'xxxxxxxxxxxxxxxxxxxxxxxx...', ")
    assert " and 2 more, " in sentence
    assert "circle" in sentence
    assert "--model DIR" in sentence
    assert sentence.isprintable()
    assert len(sentence) < 700


def test_the_engine_notes_what_it_does_not_know_and_only_that() -> None:
    engine = demo.load_engine(device="cpu", dtype="float32")
    assert engine.encode_text(["a red star over green hills"]).notes == ()
    (note,) = engine.encode_text(["a cat on a sofa"]).notes
    assert "does not know 'cat', 'sofa', so" in note
    assert engine.capabilities.whole_stages
