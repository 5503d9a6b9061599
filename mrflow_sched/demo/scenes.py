"""Scenes whose every attribute is known: the world that the demo model is trained on and measured in.

A `Scene` says what is to be seen, `captions.caption` says it in words, `drawing.render` draws it at any size.
Categories:

======== =====================================================================================================
objects  one or two coloured, textured shapes over a ground, sometimes with a word on a sign
letters  a word in large capitals on a wall
detail   an image full of small things: tiles, flowers, windows, bricks
smooth   a landscape of soft gradients with a sun or a moon
faces    one or two faces before a wall, large or small
lines    hairlines, a grid of them or hatching, a few pixels apart
======== =====================================================================================================

The last two, small lettering, birds and outlined shapes are fine detail: an image of 256 pixels holds it, one of 128
does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mrflow_sched.demo.glyphs import LETTERS

Category = Literal["objects", "letters", "detail", "smooth", "faces", "lines"]

CATEGORIES: tuple[Category, ...] = ("objects", "letters", "detail", "smooth")
"""Those of scenes without fine detail."""
FINE_SIZE = 256
"""Side in pixels of an image to which the pixels of fine detail belong."""
FineKind = Literal["small letters", "small sign", "birds", "faces", "lines"]
FINE_KINDS: tuple[FineKind, ...] = ("small letters", "small sign", "birds", "faces", "lines")

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.97, 0.55, 0.10),
    "yellow": (0.98, 0.88, 0.20),
    "green": (0.13, 0.60, 0.24),
    "blue": (0.14, 0.32, 0.84),
    "purple": (0.55, 0.20, 0.68),
    "white": (0.96, 0.96, 0.95),
    "black": (0.08, 0.08, 0.09),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")
TEXTURES = ("plain", "striped", "dotted", "checkered")
OUTLINED = "outlined"
"""The texture of fine detail: only the edge of a shape, two pixels wide."""
GROUNDS = ("green hills", "blue waves", "grey mountains", "yellow dunes", "white snow", "a dark city")
SKIES = ("blue", "pink", "orange", "night")
DETAILS = ("tiles", "flowers", "windows", "bricks")
LIGHTS = ("sun", "moon")
SIDES = ("left", "right")
MAX_LETTERS = 5
PRINTS = {"small": 12, "tiny": 8}
"""Heights of small letters in pixels of `FINE_SIZE`."""
COUNTS = ("two", "three", "four", "five", "six")
PATTERNS = ("lines", "grid", "hatching")
GAPS = {"three": 3, "six": 6}
"""From one hairline to the next, in pixels of `FINE_SIZE`.

Two or four would be the same in every latent of 4x4 pixels. A decoder that enlarges by repeating pixels makes a plain
surface of latents that do not vary, so no image of this model could show them.
"""
MOODS = ("happy", "sad", "calm", "surprised")
EYES = ("blue", "green", "black")
HAIRS = ("red", "orange", "yellow", "black", "white", "purple")

_LEAST_CONTRAST = 0.25
"""Of luminance, between fine things and what is behind them."""


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes:
        colour: A key of `COLOURS`.
        texture: One of `TEXTURES`, or `OUTLINED`.
        shape: One of `SHAPES`.
    """

    colour: str
    texture: str
    shape: str


@dataclass(frozen=True)
class Face:
    """One face.

    Attributes:
        mood: One of `MOODS`: what its mouth says.
        hair: One of `HAIRS`.
        eyes: One of `EYES`.
    """

    mood: str
    hair: str
    eyes: str


@dataclass(frozen=True)
class Scene:
    """All that a caption says of an image. Fields that a category does not use keep their empty default.

    A scene to be drawn has every field that its category uses. Where a caption leaves something open, the scene that it
    names has that field empty.

    Attributes:
        category: One of `Category`.
        things: The objects, from left to right.
        ground: One of `GROUNDS`.
        sky: One of `SKIES`.
        word: The word on the sign or the wall, 2 to `MAX_LETTERS` capitals.
        ink: Colour of the letters or of the small things.
        wall: Colour of what is behind them.
        detail: One of `DETAILS`.
        light: One of `LIGHTS`.
        side: Where the light is, one of `SIDES`.
        small_word: A word in small letters: below the large one, or on a sign of its own.
        print: How small, a key of `PRINTS`.
        birds: How many, one of `COUNTS`; empty for none.
        faces: The faces, from left to right.
        face_size: "small", or empty for a large one.
        pattern: One of `PATTERNS`.
        gap: How far apart its lines are, a key of `GAPS`.
    """

    category: Category
    things: tuple[Thing, ...] = ()
    ground: str = ""
    sky: str = ""
    word: str = ""
    ink: str = ""
    wall: str = ""
    detail: str = ""
    light: str = ""
    side: str = ""
    small_word: str = ""
    print: str = ""
    birds: str = ""
    faces: tuple[Face, ...] = ()
    face_size: str = ""
    pattern: str = ""
    gap: str = ""

    @property
    def is_fine(self) -> bool:
        """Whether it holds detail that an image of half of `FINE_SIZE` cannot show."""
        outlined = any(thing.texture == OUTLINED for thing in self.things)
        return bool(self.small_word or self.birds or self.faces or self.pattern or outlined)


# --------------------------------------------------------------------------------------------------- what is in a scene


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _word(rng: np.random.Generator) -> str:
    return "".join(_pick(rng, LETTERS) for _ in range(int(rng.integers(2, MAX_LETTERS + 1))))


def _thing(rng: np.random.Generator, *, avoid: str = "") -> Thing:
    colours = [name for name in COLOURS if name != avoid]
    texture = "plain" if rng.random() < 0.4 else _pick(rng, TEXTURES[1:])
    return Thing(_pick(rng, colours), texture, _pick(rng, SHAPES))


def random_scene(rng: np.random.Generator, category: Category | None = None) -> Scene:
    """Draw a scene without fine detail at random.

    Args:
        rng: Source of the randomness.
        category: One of `CATEGORIES`; None: objects, letters, detail or smooth at 40, 25, 20 and 15 %.

    Returns:
        A scene of that category.
    """
    kind = category or CATEGORIES[int(rng.choice(4, p=(0.40, 0.25, 0.20, 0.15)))]
    if kind == "objects":
        first = _thing(rng)
        things = (first, _thing(rng, avoid=first.colour)) if rng.random() < 0.6 else (first,)
        word = _word(rng) if rng.random() < 0.35 else ""
        return Scene(kind, things, _pick(rng, GROUNDS), _pick(rng, SKIES), word)
    if kind == "letters":
        ink = _pick(rng, tuple(COLOURS))
        wall = _pick(rng, [name for name in COLOURS if name != ink])
        return Scene(kind, word=_word(rng), ink=ink, wall=wall)
    if kind == "detail":
        ink = _pick(rng, tuple(COLOURS))
        wall = _pick(rng, [name for name in COLOURS if name != ink])
        things = (_thing(rng, avoid=ink),) if rng.random() < 0.3 else ()
        return Scene(kind, things, ink=ink, wall=wall, detail=_pick(rng, DETAILS))
    return Scene(
        kind, ground=_pick(rng, GROUNDS[:5]), sky=_pick(rng, SKIES), light=_pick(rng, LIGHTS), side=_pick(rng, SIDES)
    )


def luminance(colour: str) -> float:
    """How bright a colour is.

    Args:
        colour: A key of `COLOURS`.

    Returns:
        0 to 1, the luma of ITU-R BT.601.
    """
    return float(np.dot(COLOURS[colour], (0.299, 0.587, 0.114)))


def _ink_and_wall(rng: np.random.Generator) -> tuple[str, str]:
    """Two colours of unlike brightness: images, like eyes, keep fine detail in brightness only."""
    ink = _pick(rng, tuple(COLOURS))
    apart = [name for name in COLOURS if abs(luminance(name) - luminance(ink)) >= _LEAST_CONTRAST]
    return ink, _pick(rng, apart)


def fine_scene(rng: np.random.Generator, kind: FineKind | None = None) -> Scene:
    """Draw a scene with fine detail at random.

    Args:
        rng: Source of the randomness.
        kind: One of `FINE_KINDS`; None: 30, 15, 15, 25 and 15 % of them.

    Returns:
        "small letters": a word on a wall above one in small letters; "small sign": objects and a sign in small letters;
        "birds": objects or a landscape with birds in the sky, shapes often outlined; "faces" and "lines": of that
        category.
    """
    kind = kind or FINE_KINDS[int(rng.choice(5, p=(0.30, 0.15, 0.15, 0.25, 0.15)))]
    if kind == "small letters":
        ink, wall = _ink_and_wall(rng)
        size = _pick(rng, tuple(PRINTS))
        return Scene("letters", word=_word(rng), ink=ink, wall=wall, small_word=_word(rng), print=size)
    if kind == "small sign":
        scene = replace(_with_outlines(random_scene(rng, "objects"), rng), word="")
        return replace(scene, small_word=_word(rng), print=_pick(rng, tuple(PRINTS)))
    if kind == "birds":
        scene = random_scene(rng, "objects" if rng.random() < 0.6 else "smooth")
        return replace(_with_outlines(scene, rng), birds=_pick(rng, COUNTS))
    if kind == "faces":
        face_size = "small" if rng.random() < 0.6 else ""
        count = 2 if face_size and rng.random() < 0.5 else 1
        faces = tuple(Face(_pick(rng, MOODS), _pick(rng, HAIRS), _pick(rng, EYES)) for _ in range(count))
        return Scene("faces", faces=faces, face_size=face_size, wall=_pick(rng, tuple(COLOURS)))
    ink, wall = _ink_and_wall(rng)
    pattern = _pick(rng, PATTERNS)
    # Diagonals closer than that are nothing that a latent of 4x4 pixels can say.
    gap = "six" if pattern == "hatching" else _pick(rng, tuple(GAPS))
    return Scene("lines", ink=ink, wall=wall, pattern=pattern, gap=gap)


def _with_outlines(scene: Scene, rng: np.random.Generator) -> Scene:
    """Some of its things outlined, those whose lines stand out from the sky."""
    sky = 0.15 if scene.sky == "night" else 0.72
    things = tuple(
        replace(thing, texture=OUTLINED)
        if rng.random() < 0.5 and abs(luminance(thing.colour) - sky) >= _LEAST_CONTRAST
        else thing
        for thing in scene.things
    )
    return replace(scene, things=things)


# ------------------------------------------------------------------------------------------------- what is left unsaid


def left_open(scene: Scene, rng: np.random.Generator, share: float = 0.6) -> Scene:
    """The scene with some of its fields empty, as an open caption names it.

    What a caption does not name has a meaning: a thing without a texture is plain, objects without a sign have no
    word, a sky without birds is empty. So a texture is left open only together with its colour and a sign only
    together with the ground, which no full caption leaves out; birds, small words and second things are never left
    open.

    Args:
        scene: What is to be seen.
        rng: Chooses what is left out.
        share: How likely each field is left out, 0 to 1.

    Returns:
        A scene to be named, not drawn.
    """

    def kept(value: str, chance: float = share) -> str:
        return "" if rng.random() < chance else value

    def thing_of(thing: Thing) -> Thing:
        if kept(thing.colour):
            return thing
        texture = "" if thing.texture == "plain" else kept(thing.texture, 0.5)
        return Thing("", texture, thing.shape)

    things = tuple(thing_of(thing) for thing in scene.things)
    if scene.category == "objects":
        ground = kept(scene.ground)
        word = scene.word if ground else kept(scene.word, 0.4)
        return replace(scene, things=things, ground=ground, sky=kept(scene.sky), word=word)
    if scene.category == "letters":
        return replace(scene, ink=kept(scene.ink), wall=kept(scene.wall))
    if scene.category == "detail":
        return replace(scene, things=things, ink=kept(scene.ink), wall=kept(scene.wall))
    if scene.category == "faces":
        faces = tuple(Face(kept(face.mood), kept(face.hair), kept(face.eyes)) for face in scene.faces)
        return replace(scene, faces=faces, wall=kept(scene.wall))
    if scene.category == "lines":
        return replace(scene, ink=kept(scene.ink), wall=kept(scene.wall), gap=kept(scene.gap, 0.4))
    light = kept(scene.light, 0.4)
    side = kept(scene.side, 0.5) if light else ""
    return replace(scene, ground=kept(scene.ground, 0.5), sky=kept(scene.sky), light=light, side=side)
