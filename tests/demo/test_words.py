"""Words outside the embedded model's world are named; those inside are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mrflow_sched import demo
from mrflow_sched.demo import words
from mrflow_sched.demo.captions import ADDED_WORDS, caption, vocabulary
from mrflow_sched.demo.scenes import fine_scene, left_open, random_scene
from mrflow_sched.demo.words import known_words, unknown_words, unknown_words_sentence, world


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
        ("a star", ()),
        ("hills under a sky", ()),
        ("the word FLOW", ()),
        ("", ()),
    ],
)
def test_unknown_words(prompt: str, unknown: tuple[str, ...]) -> None:
    assert unknown_words(prompt) == unknown
    assert (unknown_words_sentence([prompt]) is None) == (not unknown)


def test_every_caption_and_example_is_known() -> None:
    scenes = [random_scene(np.random.default_rng([5, index])) for index in range(300)]
    rng = np.random.default_rng(5)
    prompts = [caption(named) for scene in scenes for named in (scene, left_open(scene, rng))]
    prompts += [*demo.example_prompts(), *demo.example_prompts("open")]
    assert unknown_words_sentence(prompts) is None


@pytest.fixture(params=["first", "all"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tokenizer beside weights that know the words of fine detail ("all"), or beside ones that do not ("first")."""
    count = len(vocabulary()) - (len(ADDED_WORDS) if request.param == "first" else 0)
    pieces = [
        ["<unk>", 0.0],
        ["\u2581", -3.0],
        ["x", -9.0],
        *(["\u2581" + word, -2.0] for word in vocabulary()[:count]),
    ]
    folder = tmp_path / "tokenizer_2"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": pieces}}), "utf-8")
    monkeypatch.setattr(words, "weights_path", lambda: tmp_path)
    return str(request.param)


def test_words_of_fine_detail_are_known_where_the_tokenizer_holds_them(tokenizer: str) -> None:
    fine = [*demo.example_prompts("fine"), "a face", "a happy face", "thin lines", "the tiny word AB"]
    fine += [caption(fine_scene(np.random.default_rng([6, index]))) for index in range(100)]
    if tokenizer == "all":
        assert known_words() == set(vocabulary())
        assert unknown_words_sentence(fine) is None
        assert "happy, sad, calm or surprised face" in (unknown_words_sentence(["a cat"]) or "")
    else:
        assert known_words() == set(vocabulary()) - set(ADDED_WORDS)
        assert unknown_words("a happy face and a tiny star") == ("happy", "face", "tiny")
        assert all(unknown_words(text) for text in fine[:9])
        assert "face" not in (unknown_words_sentence(["a cat"]) or "")


def test_the_world_is_what_is_known(tokenizer: str) -> None:
    phrases = [phrase for kind in world() for phrase in kind]
    assert not any(unknown_words(phrase) for phrase in phrases)
    assert len(set(phrases)) == len(phrases)
    named = {word for phrase in phrases for word in phrase.split()}
    glue = {"an", "and", "over", "under", "in", "letters", "on", "wall", "many", "behind", "smooth", "with", "plain"}
    assert known_words() - named <= glue | {"left", "right", "above", "small", "word", "the"}


def test_the_shipped_weights_say_which_words_they_know() -> None:
    """Of all that were added, or of none."""
    assert len(known_words() & set(ADDED_WORDS)) in {0, len(ADDED_WORDS)}
    assert set(vocabulary()) - set(ADDED_WORDS) <= known_words()


def test_the_sentence_names_a_few_words_shortly_and_the_way_out() -> None:
    sentence = unknown_words_sentence(["a cat on a sofa", "x" * 5000 + "\x1b one seven eight nine"])
    assert sentence is not None
    assert sentence.startswith("The embedded model does not know 'cat', 'sofa', 'xxxxxxxxxxxxxxxxxxxxxxxx...', ")
    assert " and 2 more, " in sentence
    assert "circle" in sentence
    assert "--model DIR" in sentence
    assert sentence.isprintable()
    assert len(sentence) < 950


def test_the_engine_notes_what_it_does_not_know_and_only_that() -> None:
    engine = demo.load_engine(device="cpu", dtype="float32")
    assert engine.encode_text(["a red star over green hills"]).notes == ()
    (note,) = engine.encode_text(["a cat on a sofa"]).notes
    assert "does not know 'cat', 'sofa', so" in note
    assert engine.capabilities.whole_stages
