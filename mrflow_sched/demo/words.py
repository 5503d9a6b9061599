"""Which words of a prompt the embedded model does not know, and what to say of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mrflow_sched.demo.glyphs import LETTERS
from mrflow_sched.demo.scenes import COLOURS, DETAILS, GROUNDS, LIGHTS, MAX_LETTERS, SHAPES, SKIES, TEXTURES, vocabulary

__all__ = ["unknown_words", "unknown_words_sentence"]

_WORD = re.compile(r"[^\s,.;:!?\"'()\[\]{}“”‘’«»]+")
_LETTERED = re.compile(f"[{''.join(LETTERS)}]{{2,{MAX_LETTERS}}}")
_NAMED = 5
_LONGEST = 24


def unknown_words(prompt: str) -> tuple[str, ...]:
    """The words of a prompt that have no meaning for the embedded model.

    Args:
        prompt: What an image shows, in any language.

    Returns:
        Each such word once, in the prompt's order and spelling. A word to be lettered, 2 to 5 capitals after "word", is
        known.
    """
    known, before, found = frozenset(vocabulary()), "", list[str]()
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
    kinds = (SHAPES, TEXTURES[1:], COLOURS, GROUNDS, tuple(f"{sky} sky" for sky in SKIES), DETAILS, LIGHTS)
    world = "; ".join(", ".join(kind) for kind in kinds)
    return (
        f"The embedded model does not know {named}{more}, so the image will not show {each}. It knows {world}; and "
        f'words of 2 to {MAX_LETTERS} capitals: "a red star over green hills under a blue sky, the word FLOW". For '
        f"anything else {instead}."
    )


def _quoted(word: str) -> str:
    return repr(word if len(word) <= _LONGEST else word[:_LONGEST] + "...")
