"""What to say of a prompt that the embedded model does not know: of its words, and of a sentence of known words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

from mrflow_sched.demo.captions import vocabulary
from mrflow_sched.demo.glyphs import LETTERS
from mrflow_sched.demo.parse import scene_of
from mrflow_sched.demo.paths import weights_path
from mrflow_sched.demo.scenes import (
    COLOURS,
    COUNTS,
    DETAILS,
    EYES,
    GAPS,
    GROUNDS,
    HAIRS,
    LIGHTS,
    MAX_LETTERS,
    MOODS,
    OUTLINED,
    PATTERNS,
    PRINTS,
    SHAPES,
    SKIES,
    TEXTURES,
)

__all__ = ["known_words", "prompt_notes", "unknown_words", "unknown_words_sentence", "unread", "world"]

_WORD = re.compile(r"[^\s,.;:!?\"'()\[\]{}“”‘’«»]+")
_LETTERED = re.compile(f"[{''.join(LETTERS)}]{{2,{MAX_LETTERS}}}")
_NAMED = 5
_LONGEST = 24
_LONGEST_PROMPT = 120
_WORD_START = "\u2581"
"""What a piece of the tokenizer's vocabulary begins with where it begins a word."""
_WORLD: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("{}", SHAPES),
    ("{}", TEXTURES[1:]),
    ("{}", (OUTLINED,)),
    ("{}", tuple(COLOURS)),
    ("{}", GROUNDS),
    ("{} sky", SKIES),
    ("{}", DETAILS),
    ("{}", LIGHTS),
    ("{} birds", COUNTS),
    ("{} face", MOODS),
    ("{} hair", HAIRS),
    ("{} eyes", EYES),
    ("thin {}", PATTERNS),
    ("{} apart", tuple(GAPS)),
    ("the {} word", tuple(PRINTS)),
)
"""Phrases of captions, by kind, and what can stand in them."""
_OWN_MODEL = "use a model of your own (--model DIR; in Python, MrFlow)"
_FORMS = (
    ("one or two things", "a red star and a blue ring over green hills under a night sky, the word FLOW"),
    ("a word", "the word FLOW in white letters on a blue wall"),
    ("many small things", "many small yellow windows on purple"),
    ("a landscape", "a smooth pink sky over blue waves with a sun on the left"),
    ("one or two faces", "a happy face with red hair and blue eyes"),
    ("hairlines", "thin red lines three apart on white"),
)
"""A caption of every form, and what it is of."""


def known_words() -> frozenset[str]:
    """The words that the embedded model knows, in small letters.

    Returns:
        Those of `vocabulary()` that the tokenizer beside the weights holds whole: the weights were trained on them.
    """
    return _whole_words(weights_path()) & frozenset(vocabulary())


@cache
def _whole_words(weights: Path) -> frozenset[str]:
    """The words for which the text encoder of single words has one number each."""
    tokenizer = json.loads((weights / "tokenizer_2" / "tokenizer.json").read_text("utf-8"))
    pieces: list[tuple[str, float]] = tokenizer["model"]["vocab"]
    return frozenset(piece[1:] for piece, _ in pieces if piece.startswith(_WORD_START))


def world() -> tuple[tuple[str, ...], ...]:
    """What the embedded model knows, as phrases that captions are made of.

    Returns:
        The phrases ("star", "green hills", "pink sky"), by kind. Lettered words are not among them.
    """
    return tuple(tuple(phrase.format(value) for value in values) for phrase, values in _known_kinds())


def _known_kinds() -> list[tuple[str, tuple[str, ...]]]:
    known = known_words()
    return [
        (phrase, values)
        for phrase, values in _WORLD
        if all(word in known for value in values for word in phrase.format(value).split())
    ]


def unknown_words(prompt: str) -> tuple[str, ...]:
    """The words of a prompt that have no meaning for the embedded model.

    Args:
        prompt: What an image shows, in any language.

    Returns:
        Each such word once, in the prompt's order and spelling. A word to be lettered, 2 to 5 capitals after "word", is
        known.
    """
    known, before, found = known_words(), "", list[str]()
    for word in _WORD.findall(prompt):
        lettered = before == "word" and _LETTERED.fullmatch(word) is not None
        before = word.lower()
        if not lettered and before not in known:
            found.append(word)
    return tuple(dict.fromkeys(found))


def unknown_words_sentence(prompts: Iterable[str], *, instead: str = _OWN_MODEL) -> str | None:
    """What the user should know of the words that the embedded model does not know.

    Args:
        prompts: The prompts of a run.
        instead: What to do for anything that the embedded model does not know.

    Returns:
        One sentence, or None where all words are known.
    """
    words = list(dict.fromkeys(word for prompt in prompts for word in unknown_words(prompt)))
    if not words:
        return None
    named = ", ".join(_quoted(word) for word in words[:_NAMED])
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    each = "it" if len(words) == 1 else "them"
    kinds = "; ".join(phrase.format(_either(values)) for phrase, values in _known_kinds())
    return (
        f"The embedded model does not know {named}{more}, so the image will not show {each}. It knows {kinds}; and "
        f'words of 2 to {MAX_LETTERS} capitals: "a red star over green hills under a blue sky, the word FLOW". For '
        f"anything else {instead}."
    )


def prompt_notes(prompts: Iterable[str], *, instead: str = _OWN_MODEL) -> tuple[str, ...]:
    """What the user should know of prompts that the embedded model does not know.

    Args:
        prompts: The prompts of a run.
        instead: What to do for anything that the embedded model does not know.

    Returns:
        `unknown_words_sentence`, if there is one, and a sentence on the first prompt whose words are all known and
        which is no caption all the same.
    """
    prompts = tuple(dict.fromkeys(prompts))
    words = unknown_words_sentence(prompts, instead=instead)
    unclear = [(prompt, why) for prompt in prompts if (why := unread(prompt)) is not None]
    notes = [] if words is None else [words]
    if unclear:
        prompt, why = unclear[0]
        more = f", nor {len(unclear) - 1} more of the prompts" if len(unclear) > 1 else ""
        forms = "; ".join(f'{what}, "{text}"' for what, text in _FORMS if not unknown_words(text))
        notes.append(
            f"The embedded model does not understand {_quoted(prompt, _LONGEST_PROMPT)}{more}, though it knows the "
            f"words, so the image may show anything: {why}. It draws {forms}; docs/demo-model.md has all forms. For "
            f"anything else {instead}."
        )
    return tuple(notes)


def unread(prompt: str) -> str | None:
    """Why a prompt is no caption for the embedded model although all its words are known.

    Args:
        prompt: What an image shows.

    Returns:
        A part of a sentence; None where the prompt is a caption, is empty, or has words that are not known.
    """
    words = _WORD.findall(prompt)
    if not words or unknown_words(prompt):
        return None
    # The network ignores the case of "A" at the beginning, and of no other word.
    first = 1 if words[0] == "A" else 0
    raised = list[str]()
    for before, word in list(pairwise(["", *words]))[first:]:
        lettered = before.lower() == "word"
        if lettered and _LETTERED.fullmatch(word) is None:
            return f"a word to be written has 2 to {MAX_LETTERS} capitals, unlike {_quoted(word)}"
        if not lettered and word != word.lower():
            raised.append(word)
    if raised:
        named = ", ".join(_quoted(word) for word in [*dict.fromkeys(raised)][:_NAMED])
        return f"capitals are letters to be written, so write {named} in lower case"
    starts = [" ".join(words[:count]) for count in range(len(words), 0, -1)]
    start = next((text for text in starts if scene_of(text) is not None), None)
    if start == starts[0]:
        return None
    return "no caption has that form" if start is None else f"{_quoted(start, _LONGEST_PROMPT)} alone is a caption"


def _either(values: Sequence[str]) -> str:
    return " or ".join([*filter(None, [", ".join(values[:-1])]), values[-1]])


def _quoted(text: str, most: int = _LONGEST) -> str:
    return repr(text if len(text) <= most else text[:most] + "...")
