"""What a caption says: the inverse of `mrflow_sched.demo.captions.caption`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mrflow_sched.demo.glyphs import LETTERS
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
    SIDES,
    SKIES,
    TEXTURES,
    Category,
    Face,
    Scene,
    Thing,
)

__all__ = ["scene_of"]


def scene_of(caption: str) -> Scene | None:
    """The scene that a caption describes.

    What a caption leaves out is open, and empty in the scene, but for what is there or not: without birds there are
    none, a coloured thing without a texture is plain (one without both has both open), a face without a size is large,
    and objects over a named ground without a word have no sign. Where objects have neither, their empty word is open.
    `left_open(scene)` is what `scene_of(caption(left_open(scene)))` gives.

    Args:
        caption: A prompt in the grammar of `mrflow_sched.demo.captions.caption`, in any of its wordings. Commas, a full
            stop at the end and the case of letters do not count, but for a lettered word, which is in capitals. A
            ground is also known by its noun: "hills" are green hills.

    Returns:
        The scene, or None where the caption says anything that the grammar does not.
    """
    if len(caption) > _LONGEST:
        return None
    words = re.sub(r"[\s,]+", " ", caption).strip(" .")
    for category, pattern in _PATTERNS:
        found = pattern.fullmatch(words)
        if found is not None:
            return _scene(category, {name: value or "" for name, value in found.groupdict().items()})
    return None


_LONGEST = 1000
"""Characters; the longest caption has a seventh of them."""
_NAMED = ("sky", "ink", "wall", "detail", "light", "side", "print", "birds", "pattern", "gap")
_GROUND_OF = {ground.split()[-1]: ground for ground in GROUNDS}


def _scene(category: Category, said: dict[str, str]) -> Scene:
    lettered = {name: said.pop(name, "") for name in ("word", "small_word")}
    said = {name: value.lower() for name, value in said.items()}
    fields = {name: said.get(name, "") for name in _NAMED} | lettered
    ground = said.get("ground", "")
    return Scene(
        category,
        things=tuple(_thing(said, index) for index in range(2) if said.get(f"shape{index}")),
        ground=_GROUND_OF[ground.split()[-1]] if ground else "",
        faces=tuple(_face(said, index) for index in range(2) if said.get(f"face{index}")),
        face_size=said.get("face_size", ""),
        **fields,
    )


def _thing(said: dict[str, str], index: int) -> Thing:
    colour, texture, shape = (said[f"{kind}{index}"] for kind in ("colour", "texture", "shape"))
    return Thing(colour, texture or ("plain" if colour else ""), shape)


def _face(said: dict[str, str], index: int) -> Face:
    return Face(said[f"mood{index}"], said[f"hair{index}"], said[f"eyes{index}"])


# ---------------------------------------------------------------------------------------------------------- the grammar


def _one_of(field: str, options: Iterable[str]) -> str:
    return f"(?P<{field}>{'|'.join(options)})"


def _optional(*parts: str) -> str:
    return f"(?:{''.join(parts)})?"


def _joined(before: str, part: str) -> str:
    """A part that comes after "and" where the field `before` was named, else after "with"."""
    return f"(?({before}) and | with ){part}"


_ARTICLE = _optional("(?:an?|the) ")


def _thing_pattern(index: int) -> str:
    kinds = (("colour", COLOURS), ("texture", (*TEXTURES, OUTLINED)))
    before = "".join(_optional(_one_of(f"{kind}{index}", options), " ") for kind, options in kinds)
    return _ARTICLE + before + _one_of(f"shape{index}", SHAPES)


def _face_pattern(index: int) -> str:
    # Two faces are of one size.
    size = "(?(face_size)small )" if index else _optional(_one_of("face_size", ["small"]), " ")
    kind = _optional(_one_of(f"mood{index}", MOODS), " ") + _one_of(f"face{index}", ["face"])
    hair = _optional(" with ", _one_of(f"hair{index}", HAIRS), " hair")
    return _ARTICLE + size + kind + hair + _optional(_joined(f"hair{index}", _one_of(f"eyes{index}", EYES)), " eyes")


def _ground_pattern(ground: str) -> str:
    *before, noun = ground.split()
    return "".join(_optional(word, " ") for word in before) + noun


def _word_pattern(field: str) -> str:
    return f"word (?-i:(?P<{field}>[{LETTERS}]{{2,{MAX_LETTERS}}}))"


_GROUND = _one_of("ground", map(_ground_pattern, GROUNDS))
_SKY = _optional(_one_of("sky", SKIES), " ") + "sky"
_BIRDS = _one_of("birds", COUNTS) + " birds"
_WALL = _optional(" on ", _ARTICLE, _one_of("wall", COLOURS), " wall")
_WORD = _optional("the ") + _word_pattern("word")
_SMALL_WORD = _optional("the ") + _one_of("print", PRINTS) + " " + _word_pattern("small_word")
_LIGHT = _ARTICLE + _one_of("light", LIGHTS) + _optional(" on the ", _one_of("side", SIDES))
_IN_THE_SKY = _optional(" with ", _LIGHT) + _optional(_joined("light", _BIRDS))
_TEXTS: tuple[tuple[Category, str], ...] = (
    (
        "objects",
        _thing_pattern(0)
        + _optional(" and ", _thing_pattern(1))
        + _optional(" over ", _GROUND)
        + _optional(" under ", _ARTICLE, _SKY)
        + _optional(" with ", _BIRDS)
        + _optional(" (?:", _WORD, "|", _SMALL_WORD, ")"),
    ),
    (
        "letters",
        _WORD + _optional(" in ", _one_of("ink", COLOURS), " letters") + _WALL + _optional(" above ", _SMALL_WORD),
    ),
    (
        "detail",
        "(?:many )?(?:small )?"
        + _optional(_one_of("ink", COLOURS), " ")
        + _one_of("detail", DETAILS)
        + _optional(" on ", _one_of("wall", COLOURS))
        + _optional(" behind ", _thing_pattern(0)),
    ),
    ("smooth", _ARTICLE + "smooth " + _SKY + _optional(" over ", _GROUND) + _IN_THE_SKY),
    ("smooth", _GROUND + " under " + _ARTICLE + _SKY + _IN_THE_SKY),
    ("faces", _face_pattern(0) + _optional(" and ", _face_pattern(1)) + _WALL),
    (
        "lines",
        _ARTICLE
        + "thin "
        + _optional(_one_of("ink", COLOURS), " ")
        + _one_of("pattern", PATTERNS)
        + _optional(" ", _one_of("gap", GAPS), " apart")
        + _optional(" on ", _one_of("wall", COLOURS)),
    ),
)
_PATTERNS: tuple[tuple[Category, re.Pattern[str]], ...] = tuple(
    (category, re.compile(text, re.IGNORECASE | re.ASCII)) for category, text in _TEXTS
)
