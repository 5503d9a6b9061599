"""What a caption says: the inverse of `mrflow_sched.demo.scenes.caption`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mrflow_sched.demo.glyphs import LETTERS
from mrflow_sched.demo.scenes import (
    COLOURS,
    DETAILS,
    GROUNDS,
    LIGHTS,
    MAX_LETTERS,
    SHAPES,
    SIDES,
    SKIES,
    TEXTURES,
    Category,
    Scene,
    Thing,
)

__all__ = ["scene_of"]


def scene_of(caption: str) -> Scene | None:
    """The scene that a caption describes.

    Args:
        caption: A prompt in the grammar of `mrflow_sched.demo.scenes.caption`. Commas, a full stop at the end and the
            case of letters do not count, but for a lettered word, which is in capitals. What follows the first part of
            each kind of scene can be left out ("a red star"), and so can colours.

    Returns:
        The scene; what the caption leaves open is empty in it, but a thing without a texture is plain. None where the
        caption says anything that the grammar does not.
    """
    if len(caption) > _LONGEST:
        return None
    words = re.sub(r"[\s,]+", " ", caption).strip(" .")
    for category, pattern in _PATTERNS.items():
        found = pattern.fullmatch(words)
        if found is not None:
            said = {name: value or "" for name, value in found.groupdict().items()}
            things = tuple(_thing(said, index) for index in range(2) if said.get(f"shape{index}"))
            named = {name: said.get(name, "").lower() for name in _NAMED}
            return Scene(category, things, word=said.get("word", ""), **named)
    return None


_LONGEST = 1000
"""Characters; the longest caption has a tenth of them."""
_NAMED = ("ground", "sky", "ink", "wall", "detail", "light", "side")


def _thing(said: dict[str, str], index: int) -> Thing:
    colour, texture, shape = (said[f"{kind}{index}"].lower() for kind in ("colour", "texture", "shape"))
    return Thing(colour, texture or "plain", shape)


def _one_of(field: str, options: Iterable[str]) -> str:
    return f"(?P<{field}>{'|'.join(options)})"


def _optional(*parts: str) -> str:
    return f"(?:{''.join(parts)})?"


def _thing_pattern(index: int) -> str:
    kinds = (("colour", COLOURS), ("texture", TEXTURES))
    before = "".join(_optional(_one_of(f"{kind}{index}", options), " ") for kind, options in kinds)
    return _ARTICLE + before + _one_of(f"shape{index}", SHAPES)


_ARTICLE = _optional("(?:an?|the) ")
_GROUND = " over " + _one_of("ground", GROUNDS)
_WORD = f"(?:the )?word (?-i:(?P<word>[{LETTERS}]{{2,{MAX_LETTERS}}}))"
_SKY = _one_of("sky", SKIES)
_TEXTS: dict[Category, str] = {
    "objects": _thing_pattern(0)
    + _optional(" and ", _thing_pattern(1))
    + _optional(_GROUND)
    + _optional(" under ", _ARTICLE, _SKY, " sky")
    + _optional(" ", _WORD),
    "letters": _WORD
    + _optional(" in ", _one_of("ink", COLOURS), " letters")
    + _optional(" on ", _ARTICLE, _one_of("wall", COLOURS), " wall"),
    "detail": "(?:many )?(?:small )?"
    + _optional(_one_of("ink", COLOURS), " ")
    + _one_of("detail", DETAILS)
    + _optional(" on ", _one_of("wall", COLOURS))
    + _optional(" behind ", _thing_pattern(0)),
    "smooth": _ARTICLE
    + "smooth "
    + _optional(_SKY, " ")
    + "sky"
    + _optional(_GROUND)
    + _optional(" with ", _ARTICLE, _one_of("light", LIGHTS), _optional(" on the ", _one_of("side", SIDES))),
}
_PATTERNS: dict[Category, re.Pattern[str]] = {
    category: re.compile(text, re.IGNORECASE | re.ASCII) for category, text in _TEXTS.items()
}
