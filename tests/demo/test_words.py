"""Words outside the embedded model's world are named; those inside are not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mrflow_sched import demo
from mrflow_sched.demo import example_prompts, words
from mrflow_sched.demo.captions import ADDED_WORDS, caption, random_captions, vocabulary
from mrflow_sched.demo.scenes import fine_scene, left_open, random_scene
from mrflow_sched.demo.words import (
    known_words,
    prompt_notes,
    unknown_words,
    unknown_words_sentence,
    unread,
    world,
)


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
    scenes += [fine_scene(np.random.default_rng([7, index])) for index in range(300)]
    wordings: list[dict[str, bool]] = [{}, {"ground_first": True}, {"bare_ground": True}]
    prompts = [
        caption(named, **wording)
        for scene in scenes
        for named in (scene, left_open(scene, rng))
        for wording in wordings
    ]
    prompts += [*random_captions(100), *(text for kind in ("full", "open", "fine") for text in example_prompts(kind))]
    assert unknown_words_sentence(prompts) is None
    assert prompt_notes(prompts) == ()
    assert prompt_notes(["", " "]) == ()


def test_the_prompts_of_the_pages_are_understood() -> None:
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *(root / "docs").rglob("*.md")]
    asked = r'(?:mrflow (?:generate|draft|compare|preview|calibrate)|mrflow\(|generate\() ?"(.+?)"'
    prompts = {text for page in pages for text in re.findall(asked, page.read_text("utf-8"))}
    # Each is of a model of the user's, or a caption of the embedded one.
    known = [text for text in sorted(prompts) if not unknown_words(text)]
    assert len(known) >= 8
    assert [text for text in known if unread(text) is not None] == []


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("A STAR", "capitals are letters to be written, so write 'STAR' in lower case"),
        ("STAR", "so write 'STAR' in lower case"),
        ("SAD FACE", "so write 'SAD', 'FACE' in lower case"),
        ("A Red star, over GREEN hills!", "so write 'Red', 'GREEN' in lower case"),
        ("The word FLOW", "so write 'The' in lower case"),
        ("the word FLOWERS", "a word to be written has 2 to 5 capitals, unlike 'FLOWERS'"),
        ("the word A", "unlike 'A'"),
        ("a star, the word hills", "unlike 'hills'"),
        ("the small word SLOW", "no caption has that form"),
        ("hills", "no caption has that form"),
        ("mountains", "no caption has that form"),
        ("a pink star", "no caption has that form"),
        ("a happy sad face", "no caption has that form"),
        ("a red blue star", "no caption has that form"),
        ("a star, a circle, a heart and a ring over green hills", "'a star' alone is a caption"),
        ("a star and a ring and a heart", "'a star and a ring' alone is a caption"),
        ("a face with red hair with blue eyes", "'a face with red hair' alone is a caption"),
        ("A red star over green hills.", None),
        ("A star, the word FLOW!", None),
        ('the word "FLOW" on a blue wall', None),
        ("a pink cat", None),
        ("", None),
    ],
)
def test_a_sentence_of_known_words_that_is_no_caption_is_told(prompt: str, why: str | None) -> None:
    found = unread(prompt)
    assert (found is None) == (why is None)
    assert (why or "") in (found or "")


def test_the_note_on_a_sentence_says_why_and_what_forms_there_are() -> None:
    first, second = prompt_notes(["a star", "hills", "a cat", "mountains", "hills"], instead="do that")
    assert "does not know 'cat'" in first
    assert second.startswith("The embedded model does not understand 'hills', nor 1 more of the prompts, though it")
    assert "no caption has that form. It draws one or two things" in second
    assert second.endswith("docs/demo-model.md has all forms. For anything else do that.")
    [long] = prompt_notes(["a star " * 500])
    assert len(long) < 950


def test_the_forms_of_the_note_are_captions_and_of_words_that_are_known(tokenizer: str) -> None:
    [note] = prompt_notes(["hills"])
    forms = re.findall('"(.+?)"', note)
    assert len(forms) == {"all": 6, "first": 4}[tokenizer]
    assert [text for text in forms if unknown_words(text) or unread(text) is not None] == []


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
    (note,) = engine.encode_text(["A STAR"]).notes
    assert "does not understand 'A STAR', though" in note
    assert engine.capabilities.whole_stages
