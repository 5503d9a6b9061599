"""The words that the embedded model knows, and what to say of those in a prompt that it does not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from mrflow_sched.demo.captions import vocabulary
from mrflow_sched.demo.glyphs import LETTERS
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

__all__ = ["known_words", "unknown_words", "unknown_words_sentence", "world"]

_WORD = re.compile(r"[^\s,.;:!?\"'()\[\]{}“”‘’«»]+")
_LETTERED = re.compile(f"[{''.join(LETTERS)}]{{2,{MAX_LETTERS}}}")
_NAMED = 5
_LONGEST = 24
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


def unknown_words_sentence(
    prompts: Iterable[str], *, instead: str = "use a model of your own (--model DIR; in Python, MrFlow)"
) -> str | None:
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


def _either(values: Sequence[str]) -> str:
    return " or ".join([*filter(None, [", ".join(values[:-1])]), values[-1]])


def _quoted(word: str) -> str:
    return repr(word if len(word) <= _LONGEST else word[:_LONGEST] + "...")
