"""Scenes in words: the language of the demo model, in which every word has one meaning."""

from __future__ import annotations

import numpy as np

from mrflow_sched.demo.scenes import (
    COLOURS,
    COUNTS,
    DETAILS,
    GROUNDS,
    LIGHTS,
    MOODS,
    OUTLINED,
    PATTERNS,
    SHAPES,
    SIDES,
    SKIES,
    TEXTURES,
    Face,
    Scene,
    Thing,
    random_scene,
)

__all__ = ["ADDED_WORDS", "caption", "caption_words", "random_captions", "vocabulary"]

Words = list[tuple[str, str]]

ADDED_WORDS = (
    *("above", "tiny", "birds", *COUNTS, "face", "hair", "eyes"),
    *(*MOODS, "thin", "apart", *PATTERNS, OUTLINED),
)
"""The words that fine detail added; the text encoders number them after all others, in this order."""


def _article(word: str) -> tuple[str, str]:
    return ("an" if word[0] in "aeiou" else "a"), "glue"


def _glue(words: str) -> Words:
    return [(word, "glue") for word in words.split()]


def _named(value: str, role: str) -> Words:
    return [(part, role) for part in value.split()]


def _with_article(words: Words) -> Words:
    return [_article(words[0][0]), *words]


def _thing_words(thing: Thing, index: int) -> Words:
    texture = "" if thing.texture == "plain" else thing.texture
    words = _named(thing.colour, f"colour{index}") + _named(texture, f"texture{index}")
    return _with_article([*words, (thing.shape, f"shape{index}")])


def _face_words(face: Face, index: int, size: str) -> Words:
    words = _named(size, "face_size") + _named(face.mood, f"mood{index}") + _glue("face")
    traits = [_named(face.hair, f"hair{index}") + _glue("hair")] if face.hair else []
    traits += [_named(face.eyes, f"eyes{index}") + _glue("eyes")] if face.eyes else []
    return _with_article(words) + [word for trait in _joined(traits, "with") for word in trait]


def _joined(parts: list[Words], first: str) -> list[Words]:
    """Parts that follow each other: the first after `first`, each further one after "and"."""
    return [_glue(first if index == 0 else "and") + part for index, part in enumerate(parts)]


def _ground(scene: Scene, *, bare: bool) -> Words:
    parts = [word for word in scene.ground.split() if word != "a"]
    words = [(word, "ground") for word in (parts[-1:] if bare else parts)]
    return [("a", "ground"), *words] if scene.ground.startswith("a ") else words


def _sky(scene: Scene) -> Words:
    return _with_article(_named(scene.sky, "sky") + _glue("sky"))


def caption_words(
    scene: Scene, *, name_sky: bool = True, ground_first: bool = False, bare_ground: bool = False
) -> list[tuple[str, str]]:
    """The caption as words with their roles.

    Args:
        scene: What to describe; what is empty in it is left open.
        name_sky: Name the sky of an objects scene.
        ground_first: Begin a smooth scene with its ground, if it has one: "green hills under a pink sky".
        bare_ground: Name the ground in one word: "hills".

    Returns:
        (word, role) pairs; a comma stands with the word before it. Roles are "glue", the fields of `Scene`, and those
        of `Thing` and `Face` with their number: "colour0", "shape1", "hair0".
    """
    if scene.category == "objects":
        return _objects_words(scene, name_sky=name_sky, bare_ground=bare_ground)
    if scene.category == "letters":
        ink = [*_glue("in"), (scene.ink, "ink"), *_glue("letters")] if scene.ink else []
        wall = [*_glue("on"), *_with_article([(scene.wall, "wall"), *_glue("wall")])] if scene.wall else []
        small = _glue("above") + _small_word(scene) if scene.small_word else []
        return [*_glue("the word"), (scene.word, "word"), *ink, *wall, *small]
    if scene.category == "detail":
        words = [*_glue("many small"), *_named(scene.ink, "ink"), (scene.detail, "detail")]
        words += [*_glue("on"), (scene.wall, "wall")] if scene.wall else []
        for index, thing in enumerate(scene.things):
            words += _glue("behind") + _thing_words(thing, index)
        return words
    if scene.category == "faces":
        faces = [_face_words(face, index, scene.face_size) for index, face in enumerate(scene.faces)]
        words = [word for index, face in enumerate(faces) for word in (_glue("and") if index else []) + face]
        return words + ([*_glue("on"), *_with_article([(scene.wall, "wall"), *_glue("wall")])] if scene.wall else [])
    if scene.category == "lines":
        words = _glue("a thin" if scene.pattern == "grid" else "thin") + _named(scene.ink, "ink")
        words += [(scene.pattern, "pattern")]
        words += [(scene.gap, "gap"), *_glue("apart")] if scene.gap else []
        return words + ([*_glue("on"), (scene.wall, "wall")] if scene.wall else [])
    return _smooth_words(scene, ground_first=ground_first, bare_ground=bare_ground)


def _small_word(scene: Scene) -> Words:
    return [*_glue("the"), (scene.print, "print"), *_glue("word"), (scene.small_word, "small_word")]


def _objects_words(scene: Scene, *, name_sky: bool, bare_ground: bool) -> Words:
    words: Words = []
    for index, thing in enumerate(scene.things):
        words += (_glue("and") if index else []) + _thing_words(thing, index)
    if scene.ground:
        words += _glue("over") + _ground(scene, bare=bare_ground)
    if name_sky and scene.sky:
        words += _glue("under") + _sky(scene)
    if scene.birds:
        words += [*_glue("with"), (scene.birds, "birds"), *_glue("birds")]
    if scene.word or scene.small_word:
        words[-1] = (words[-1][0] + ",", words[-1][1])
        words += _small_word(scene) if scene.small_word else [*_glue("the word"), (scene.word, "word")]
    return words


def _smooth_words(scene: Scene, *, ground_first: bool, bare_ground: bool) -> Words:
    ground = _ground(scene, bare=bare_ground) if scene.ground else []
    if ground and ground_first:
        words = ground + _glue("under") + _sky(scene)
    else:
        words = [*_glue("a smooth"), *_named(scene.sky, "sky"), *_glue("sky")]
        words += _glue("over") + ground if ground else []
    extras: list[Words] = []
    if scene.light:
        side = [*_glue("on the"), (scene.side, "side")] if scene.side else []
        extras.append([*_glue("a"), (scene.light, "light"), *side])
    if scene.birds:
        extras.append([(scene.birds, "birds"), *_glue("birds")])
    return words + [word for extra in _joined(extras, "with") for word in extra]


def caption(scene: Scene, *, name_sky: bool = True, ground_first: bool = False, bare_ground: bool = False) -> str:
    """The scene in one line.

    Args:
        scene: What to describe; what is empty in it is left open.
        name_sky: Name the sky of an objects scene.
        ground_first: Begin a smooth scene with its ground, if it has one.
        bare_ground: Name the ground in one word.

    Returns:
        Without the sky, for instance, "a red striped circle over green hills, the word FLOW".
    """
    words = caption_words(scene, name_sky=name_sky, ground_first=ground_first, bare_ground=bare_ground)
    return " ".join(word for word, _ in words)


def random_captions(count: int, seed: int = 0) -> tuple[str, ...]:
    """Captions of random scenes without fine detail, all different.

    Args:
        count: How many.
        seed: They follow from it.

    Returns:
        The captions.
    """
    rng, found = np.random.default_rng(seed), dict[str, None]()
    while len(found) < count:
        found[caption(random_scene(rng))] = None
    return tuple(found)


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can contain.

    Returns:
        The words of scenes without fine detail, sorted, then `ADDED_WORDS`; without those that are lettered.
    """
    glue = ("a", "an", "and", "over", "under", "sky", "the", "word", "in", "letters", "on", "wall", "many", "small")
    glue += ("behind", "smooth", "with")
    grounds = [part for ground in GROUNDS for part in ground.split()]
    first = sorted({*glue, *COLOURS, *SHAPES, *TEXTURES, *SKIES, *DETAILS, *LIGHTS, *SIDES, *grounds})
    return (*first, *ADDED_WORDS)
