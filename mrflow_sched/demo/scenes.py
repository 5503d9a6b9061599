"""Scenes whose every attribute is known: the world that the demo model is trained on and measured in.

A `Scene` says what is to be seen, `caption` says it in words, `render` draws it at any size. Four categories:

======== =====================================================================================================
objects  one or two coloured, textured shapes over a ground, sometimes with a word on a sign
letters  a word in large capitals on a wall
detail   an image full of small things: tiles, flowers, windows, bricks
smooth   a landscape of soft gradients with a sun or a moon
======== =====================================================================================================

Drawing is done with signed distances on the unit square (x to the right, y down), so a scene has the same content at
every size and edges are one pixel wide. numpy only; the same seed gives the same image on every machine up to
float rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.demo.glyphs import GLYPHS, GRID_HEIGHT, GRID_WIDTH, LETTERS

Array = NDArray[Any]
Category = Literal["objects", "letters", "detail", "smooth"]

CATEGORIES: tuple[Category, ...] = ("objects", "letters", "detail", "smooth")
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
GROUNDS = ("green hills", "blue waves", "grey mountains", "yellow dunes", "white snow", "a dark city")
SKIES = ("blue", "pink", "orange", "night")
DETAILS = ("tiles", "flowers", "windows", "bricks")
LIGHTS = ("sun", "moon")
SIDES = ("left", "right")
MAX_LETTERS = 5
SIGN_GLYPH_HEIGHT = 0.125
SIGN_CENTRE = 0.87
WALL_GLYPH_HEIGHT = 0.18
SCATTER = 0.012  # of the centre of a thing, in image sides: captions fix where things are, seeds only nudge them
TURN = 0.05  # radians
GROWTH = 0.04  # of a thing's radius, relative

_SKY_COLOURS = {
    "blue": ((0.36, 0.62, 0.92), (0.80, 0.90, 0.98)),
    "pink": ((0.78, 0.46, 0.70), (0.99, 0.82, 0.84)),
    "orange": ((0.90, 0.45, 0.20), (1.00, 0.86, 0.58)),
    "night": ((0.05, 0.07, 0.20), (0.20, 0.22, 0.42)),
}


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes:
        colour: A key of `COLOURS`.
        texture: One of `TEXTURES`.
        shape: One of `SHAPES`.
    """

    colour: str
    texture: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """All that a caption says of an image. Fields that a category does not use keep their empty default.

    Attributes:
        category: One of `CATEGORIES`.
        things: The objects, from left to right.
        ground: One of `GROUNDS`.
        sky: One of `SKIES`.
        word: The word on the sign or the wall, 2 to `MAX_LETTERS` capitals.
        ink: Colour of the letters or of the small things.
        wall: Colour of what is behind them.
        detail: One of `DETAILS`.
        light: One of `LIGHTS`.
        side: Where the light is, one of `SIDES`.
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


@dataclass(frozen=True)
class Mark:
    """Where one nameable part of a scene was drawn: a box in units of the image's side, x to the right, y down.

    Attributes:
        kind: "thing", "letter" or "light".
        index: Number of the thing, or of the letter in the word, from 0.
        left: Left edge.
        top: Upper edge.
        right: Right edge.
        bottom: Lower edge.
    """

    kind: Literal["thing", "letter", "light"]
    index: int
    left: float
    top: float
    right: float
    bottom: float


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
    """Draw a scene at random.

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


# ----------------------------------------------------------------------------------------------------------- its words


def _article(word: str) -> tuple[str, str]:
    return ("an" if word[0] in "aeiou" else "a"), "glue"


def _thing_words(thing: Thing, index: int) -> list[tuple[str, str]]:
    words = [_article(thing.colour), (thing.colour, f"colour{index}")]
    if thing.texture != "plain":
        words.append((thing.texture, f"texture{index}"))
    return [*words, (thing.shape, f"shape{index}")]


def caption_words(scene: Scene, *, name_sky: bool = True) -> list[tuple[str, str]]:
    """The caption as words with their roles.

    Args:
        scene: What to describe.
        name_sky: Name the sky of an objects scene.

    Returns:
        (word, role) pairs; a comma stands with the word before it. Roles are "glue", the fields of `Scene`, and those
            of
        `Thing` with the thing's number: "colour0", "shape1".
    """
    out: list[tuple[str, str]] = []
    if scene.category == "objects":
        for index, thing in enumerate(scene.things):
            out += ([("and", "glue")] if index else []) + _thing_words(thing, index)
        out += [("over", "glue"), *((part, "ground") for part in scene.ground.split())]
        if name_sky:
            out += [("under", "glue"), _article(scene.sky), (scene.sky, "sky"), ("sky", "glue")]
        if scene.word:
            out[-1] = (out[-1][0] + ",", out[-1][1])
            out += [("the", "glue"), ("word", "glue"), (scene.word, "word")]
    elif scene.category == "letters":
        out = [
            ("the", "glue"),
            ("word", "glue"),
            (scene.word, "word"),
            ("in", "glue"),
            (scene.ink, "ink"),
            ("letters", "glue"),
        ]
        out += [("on", "glue"), _article(scene.wall), (scene.wall, "wall"), ("wall", "glue")]
    elif scene.category == "detail":
        out = [
            ("many", "glue"),
            ("small", "glue"),
            (scene.ink, "ink"),
            (scene.detail, "detail"),
            ("on", "glue"),
            (scene.wall, "wall"),
        ]
        for index, thing in enumerate(scene.things):
            out += [("behind", "glue"), *_thing_words(thing, index)]
    else:
        out = [("a", "glue"), ("smooth", "glue"), (scene.sky, "sky"), ("sky", "glue"), ("over", "glue")]
        out += [
            *((part, "ground") for part in scene.ground.split()),
            ("with", "glue"),
            ("a", "glue"),
            (scene.light, "light"),
        ]
        out += [("on", "glue"), ("the", "glue"), (scene.side, "side")]
    return out


def caption(scene: Scene, *, name_sky: bool = True) -> str:
    """The scene in one line.

    Args:
        scene: What to describe.
        name_sky: Name the sky of an objects scene.

    Returns:
        Without the sky, for instance, "a red striped circle over green hills, the word FLOW".
    """
    return " ".join(word for word, _ in caption_words(scene, name_sky=name_sky))


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can contain.

    Returns:
        Sorted words, without those that are lettered.
    """
    glue = ("a", "an", "and", "over", "under", "sky", "the", "word", "in", "letters", "on", "wall", "many", "small")
    glue += ("behind", "smooth", "with")
    grounds = [part for ground in GROUNDS for part in ground.split()]
    return tuple(sorted({*glue, *COLOURS, *SHAPES, *TEXTURES, *SKIES, *DETAILS, *LIGHTS, *SIDES, *grounds}))


# -------------------------------------------------------------------------------------------------------------- drawing


def _clip(x: Any, low: float | int, high: float | int) -> Array:
    return np.minimum(np.maximum(x, low), high)


class _Canvas:
    """An RGB image in [0, 1] with painters that work in unit coordinates.

    Args:
        size: Side in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.pixels: Array = np.zeros((size, size, 3), np.float32)
        self.marks: list[Mark] = []
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.x, self.y = np.meshgrid(axis, axis)

    def cover(self, distance: Array) -> Array:
        """Coverage of each pixel, with an edge of one pixel.

        Args:
            distance: Signed distance in unit lengths, negative inside.

        Returns:
            Values in [0, 1].
        """
        return _clip(0.5 - distance * self.size, 0.0, 1.0)

    def box(self, cx: float, cy: float, rx: float, ry: float) -> tuple[slice, slice]:
        low, high = (
            np.floor((np.array([cy - ry, cx - rx])) * self.size) - 2,
            np.ceil(np.array([cy + ry, cx + rx]) * self.size) + 2,
        )
        low, high = _clip(low, 0, self.size).astype(int), _clip(high, 0, self.size).astype(int)
        return slice(low[0], high[0]), slice(low[1], high[1])

    def mark(
        self, kind: Literal["thing", "letter", "light"], index: int, box: tuple[float, float, float, float]
    ) -> None:
        self.marks.append(Mark(kind, index, *(float(edge) for edge in box)))

    def paint(self, where: tuple[slice, slice], alpha: Array, colour: Any) -> None:
        part = self.pixels[where]
        part += alpha[..., None] * (np.asarray(colour, np.float32) - part)


def _full() -> tuple[slice, slice]:
    return slice(None), slice(None)


def _mix(a: Any, b: Any, t: float) -> Array:
    return (np.asarray(a, np.float32) * (1 - t) + np.asarray(b, np.float32) * t).astype(np.float32)


def _tint(name: str, rng: np.random.Generator) -> Array:
    return _clip(np.asarray(COLOURS[name]) + rng.normal(0, 0.02, 3), 0, 1).astype(np.float32)


def _second_tone(colour: Array) -> Array:
    """The colour that a texture alternates with: darker, or lighter where the colour is dark already."""
    return _mix(colour, (1, 1, 1), 0.62) if float(colour.mean()) < 0.36 else _mix(colour, (0, 0, 0), 0.55)


def _segments(x: Array, y: Array, line: Sequence[tuple[float, float]]) -> Array:
    """Distance of each point to a polyline."""
    best = np.full(x.shape, np.inf, np.float32)
    for (ax, ay), (bx, by) in pairwise(line):
        dx, dy = bx - ax, by - ay
        t = _clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
        best = np.minimum(best, (x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2)
    return np.sqrt(best)


def _polygon(x: Array, y: Array, corners: Sequence[tuple[float, float]]) -> Array:
    """Signed distance to a simple polygon, negative inside (even-odd rule)."""
    inside = np.zeros(x.shape, bool)
    closed = [*corners, corners[0]]
    for (ax, ay), (bx, by) in pairwise(closed):
        if ay != by:
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return np.where(inside, -1, 1).astype(np.float32) * _segments(x, y, closed)


def _star_corners(points: int, inner: float) -> list[tuple[float, float]]:
    angles = [np.pi * k / points - np.pi / 2 for k in range(2 * points)]
    return [
        (float(np.cos(a) * r), float(np.sin(a) * r))
        for k, a in enumerate(angles)
        for r in [1.0 if k % 2 == 0 else inner]
    ]


def _shape_distance(shape: str, x: Array, y: Array) -> Array:
    """Signed distance of a shape of radius about 1 around the origin."""
    if shape == "circle":
        return np.hypot(x, y) - 0.95
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.24
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.82
    if shape == "cross":
        bar = np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.32)
        return np.minimum(bar, np.maximum(np.abs(x) - 0.32, np.abs(y) - 0.95))
    if shape == "triangle":
        return _polygon(x, y, [(0, -0.98), (0.98, 0.75), (-0.98, 0.75)])
    if shape == "star":
        return _polygon(x, y, _star_corners(5, 0.42))
    t = np.linspace(0, 2 * np.pi, 33)[:-1]
    heart_x = 16 * np.sin(t) ** 3
    heart_y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return _polygon(x, y, list(zip((heart_x / 16).tolist(), (heart_y / 16 - 0.1).tolist(), strict=True)))


def _texture_mask(texture: str, x: Array, y: Array, pixel: float) -> Array:
    """Coverage of the second tone; x, y in units of the image, relative to the object's centre."""
    period = 0.062
    if texture == "striped":
        phase = (x + y) / period % 1.0
        return _clip(0.5 + (0.25 - np.abs(phase - 0.5)) * period / pixel / np.sqrt(2), 0, 1)
    if texture == "dotted":
        u, v = (x / period + 0.5) % 1.0 - 0.5, (y / period + 0.5) % 1.0 - 0.5
        return _clip(0.5 + (0.27 - np.hypot(u, v)) * period / pixel, 0, 1)
    if texture == "checkered":
        u = _clip(np.abs((x / period) % 2 - 1) * 2 - 1, -1, 1) * period / pixel
        v = _clip(np.abs((y / period) % 2 - 1) * 2 - 1, -1, 1) * period / pixel
        return (0.5 + 0.5 * _clip(u, -1, 1) * _clip(v, -1, 1)).astype(np.float32)
    return np.zeros(x.shape, np.float32)


def _draw_thing(
    canvas: _Canvas, thing: Thing, cx: float, cy: float, radius: float, turn: float, rng: np.random.Generator
) -> None:
    earlier = sum(mark.kind == "thing" for mark in canvas.marks)
    canvas.mark("thing", earlier, (cx - radius, cy - radius, cx + radius, cy + radius))
    where = canvas.box(cx, cy, radius * 1.3, radius * 1.3)
    x, y = canvas.x[where] - cx, canvas.y[where] - cy
    u, v = (x * np.cos(turn) + y * np.sin(turn)) / radius, (y * np.cos(turn) - x * np.sin(turn)) / radius
    alpha = canvas.cover(_shape_distance(thing.shape, u, v) * radius)
    base = _tint(thing.colour, rng)
    mask = _texture_mask(thing.texture, x, y, 1.0 / canvas.size)[..., None]
    shade = 1.0 - 0.12 * _clip(v, -1, 1)[..., None]
    tones = _clip((base * (1 - mask) + _second_tone(base) * mask) * shade, 0, 1)
    canvas.paint(where, alpha, tones)


def _place_thing(canvas: _Canvas, thing: Thing, cx: float, cy: float, radius: float, rng: np.random.Generator) -> None:
    nudge = rng.uniform(-SCATTER, SCATTER, 2)
    grown = radius * (1 + rng.uniform(-GROWTH, GROWTH))
    _draw_thing(canvas, thing, cx + nudge[0], cy + nudge[1], grown, rng.uniform(-TURN, TURN), rng)


def letter_boxes(word: str, cx: float, cy: float, height: float) -> list[tuple[float, float, float, float]]:
    """Where the letters of a word are drawn.

    Args:
        word: Capitals.
        cx: Centre of the word, in units of the image's side.
        cy: Likewise, from the top.
        height: Height of a letter.

    Returns:
        (left, top, right, bottom) of every letter.
    """
    unit = height / GRID_HEIGHT
    pitch = (GRID_WIDTH + 1.7) * unit
    left = cx - (pitch * (len(word) - 1) + GRID_WIDTH * unit) / 2
    return [
        (left + k * pitch, cy - height / 2, left + k * pitch + GRID_WIDTH * unit, cy + height / 2)
        for k in range(len(word))
    ]


def word_boxes(scene: Scene) -> list[tuple[float, float, float, float]]:
    """Where the letters of a scene's word are drawn, whatever the seed.

    Args:
        scene: A scene with a word, of the category "letters" or "objects".

    Returns:
        As `letter_boxes`.
    """
    if scene.category == "letters":
        return letter_boxes(scene.word, 0.5, 0.5, WALL_GLYPH_HEIGHT)
    return letter_boxes(scene.word, 0.5, SIGN_CENTRE, SIGN_GLYPH_HEIGHT)


def _draw_word(canvas: _Canvas, word: str, cx: float, cy: float, height: float, colour: Any) -> None:
    unit = height / GRID_HEIGHT
    for index, (letter, box) in enumerate(zip(word, letter_boxes(word, cx, cy, height), strict=True)):
        x0, y0 = box[:2]
        canvas.mark("letter", index, box)
        where = canvas.box(x0 + 2 * unit, cy, 3 * unit, 4 * unit)
        x, y = (canvas.x[where] - x0) / unit, (canvas.y[where] - y0) / unit
        distance = np.stack([_segments(x, y, line) for line in GLYPHS[letter]]).min(0)
        canvas.paint(where, canvas.cover((distance - 0.52) * unit), colour)


def _draw_sky(canvas: _Canvas, sky: str, rng: np.random.Generator) -> None:
    top, bottom = _SKY_COLOURS[sky]
    t = _clip(canvas.y / 0.75, 0, 1)[..., None]
    canvas.pixels[:] = np.asarray(top, np.float32) * (1 - t) + np.asarray(bottom, np.float32) * t
    if sky == "night":
        for cx, cy in rng.random((28, 2)) * (1.0, 0.6):
            where = canvas.box(cx, cy, 0.01, 0.01)
            spot = np.hypot(canvas.x[where] - cx, canvas.y[where] - cy) - rng.uniform(0.002, 0.0045)
            canvas.paint(where, canvas.cover(spot), (0.95, 0.95, 0.85))


def _ridge(rng: np.random.Generator, x: Array, level: float, amplitude: float, rough: float) -> Array:
    phases = rng.random(3) * 2 * np.pi
    waves = [np.sin(2 * np.pi * f * rough * x + p) / f for f, p in zip((1.0, 2.3, 4.1), phases, strict=True)]
    return (level + amplitude * np.sum(waves, axis=0)).astype(np.float32)


def _jagged(rng: np.random.Generator, x: Array, level: float, amplitude: float) -> Array:
    knots = np.linspace(-0.1, 1.1, 10)
    heights = level + amplitude * (rng.random(10) - 0.5) * 2 * np.where(np.arange(10) % 2, 1, -0.6)
    return np.interp(x, knots, heights).astype(np.float32)


def _draw_layers(
    canvas: _Canvas, rng: np.random.Generator, colours: Sequence[Any], amplitude: float, rough: float
) -> None:
    for index, colour in enumerate(colours):
        edge = _ridge(rng, canvas.x[0], 0.62 + 0.13 * index, amplitude, rough)
        depth = canvas.y - edge
        shade = (1.08 - 0.5 * _clip(depth, 0, 0.5))[..., None]
        canvas.paint(_full(), canvas.cover(-depth), _clip(np.asarray(colour, np.float32) * shade, 0, 1))


def _draw_waves(canvas: _Canvas, rng: np.random.Generator) -> None:
    canvas.paint(_full(), canvas.cover(0.62 - canvas.y), (0.12, 0.38, 0.66))
    for row in range(8):
        y0 = 0.65 + 0.047 * row
        crest = y0 + 0.010 * np.sin(2 * np.pi * (canvas.x * (9 - 0.4 * row) + rng.random()))
        canvas.paint(_full(), canvas.cover(np.abs(canvas.y - crest) - 0.004) * 0.85, (0.72, 0.86, 0.96))


def _draw_mountains(canvas: _Canvas, rng: np.random.Generator) -> None:
    edge = _jagged(rng, canvas.x[0], 0.56, 0.11)
    depth = canvas.y - edge
    canvas.paint(_full(), canvas.cover(-depth), (0.46, 0.48, 0.53))
    canvas.paint(_full(), canvas.cover(-depth) * canvas.cover(depth - 0.05), (0.92, 0.94, 0.97))
    near = canvas.y - _jagged(rng, canvas.x[0], 0.78, 0.05)
    canvas.paint(_full(), canvas.cover(-near), (0.32, 0.35, 0.40))


def _draw_city(canvas: _Canvas, rng: np.random.Generator) -> None:
    left = -0.02
    while left < 1.0:
        width, top = rng.uniform(0.09, 0.16), rng.uniform(0.52, 0.70)
        block = np.maximum(np.abs(canvas.x - left - width / 2) - width / 2, top - canvas.y)
        tone = rng.uniform(0.10, 0.20)
        canvas.paint(_full(), canvas.cover(block), (tone, tone, tone + 0.05))
        u, v = (canvas.x - left) / 0.03 % 1.0, (canvas.y - top) / 0.045 % 1.0
        cell = np.floor((canvas.x - left) / 0.03) * 7.13 + np.floor((canvas.y - top) / 0.045) * 3.71 + left * 97
        lit = (np.sin(cell * 12.9898) * 43758.547) % 1.0 > 0.45
        pane = np.maximum(np.abs(u - 0.5) * 0.03 - 0.0075, np.abs(v - 0.5) * 0.045 - 0.012)
        inside = canvas.cover(block + 0.012)
        canvas.paint(_full(), canvas.cover(pane) * inside * lit, (0.98, 0.86, 0.50))
        left += width


def _draw_ground(canvas: _Canvas, ground: str, rng: np.random.Generator) -> None:
    if ground == "green hills":
        _draw_layers(canvas, rng, ((0.38, 0.66, 0.34), (0.25, 0.55, 0.25), (0.16, 0.43, 0.18)), 0.035, 1.0)
    elif ground == "yellow dunes":
        _draw_layers(canvas, rng, ((0.95, 0.82, 0.50), (0.90, 0.72, 0.38), (0.82, 0.61, 0.28)), 0.03, 0.7)
    elif ground == "white snow":
        _draw_layers(canvas, rng, ((0.90, 0.94, 0.99), (0.97, 0.98, 1.0)), 0.02, 0.6)
    elif ground == "blue waves":
        _draw_waves(canvas, rng)
    elif ground == "grey mountains":
        _draw_mountains(canvas, rng)
    else:
        _draw_city(canvas, rng)


def _draw_sign(canvas: _Canvas, word: str) -> None:
    cx, cy = 0.5, SIGN_CENTRE
    unit = SIGN_GLYPH_HEIGHT / GRID_HEIGHT
    half = ((GRID_WIDTH + 1.7) * unit * len(word)) / 2 + 0.02
    where = canvas.box(cx, cy, half + 0.03, 0.12)
    board = np.maximum(np.abs(canvas.x[where] - cx) - half, np.abs(canvas.y[where] - cy) - 0.095)
    canvas.paint(where, canvas.cover(board), (0.35, 0.22, 0.12))
    canvas.paint(where, canvas.cover(board + 0.012), (0.98, 0.96, 0.90))
    _draw_word(canvas, word, cx, cy, SIGN_GLYPH_HEIGHT, (0.10, 0.08, 0.10))


def _draw_objects(canvas: _Canvas, scene: Scene, rng: np.random.Generator) -> None:
    _draw_sky(canvas, scene.sky, rng)
    _draw_ground(canvas, scene.ground, rng)
    centres = (0.5,) if len(scene.things) == 1 else (0.27, 0.73)
    radius = 0.23 if len(scene.things) == 1 else 0.19
    for cx, thing in zip(centres, scene.things, strict=True):
        _place_thing(canvas, thing, cx, 0.40, radius, rng)
    if scene.word:
        _draw_sign(canvas, scene.word)


def _draw_letters(canvas: _Canvas, scene: Scene, rng: np.random.Generator) -> None:
    wall = _tint(scene.wall, rng)
    light = 1.0 + 0.10 * (canvas.y - 0.5)[..., None] * rng.choice((-1, 1))
    canvas.pixels[:] = _clip(wall * light, 0, 1)
    _draw_word(canvas, scene.word, 0.5, 0.5, WALL_GLYPH_HEIGHT, _tint(scene.ink, rng))


def _draw_tiles(canvas: _Canvas, ink: Array, wall: Array, rng: np.random.Generator) -> None:
    count = int(rng.integers(11, 15))
    cell = 1.0 / count
    u, v = canvas.x / cell % 1.0, canvas.y / cell % 1.0
    rows, columns = (canvas.y / cell).astype(int), (canvas.x / cell).astype(int)
    tone = rng.uniform(0.7, 1.15, (count + 1, count + 1)).astype(np.float32)[rows, columns]
    edge = (np.maximum(np.abs(u - 0.5), np.abs(v - 0.5)) - 0.40) * cell
    canvas.paint(_full(), canvas.cover(edge), _clip(ink * tone[..., None], 0, 1))


def _draw_flowers(canvas: _Canvas, ink: Array, wall: Array, rng: np.random.Generator) -> None:
    side = 10
    cells = np.array([(x, y) for y in range(side) for x in range(side)])
    grid: Array = (cells + rng.uniform(0.2, 0.8, cells.shape)) / side
    for cx, cy in grid:
        radius = rng.uniform(0.018, 0.03)
        where = canvas.box(cx, cy, radius * 1.4, radius * 1.4)
        x, y = canvas.x[where] - cx, canvas.y[where] - cy
        petals = np.hypot(x, y) - radius * (0.78 + 0.3 * np.cos(5 * np.arctan2(y, x) + rng.random() * 6))
        canvas.paint(where, canvas.cover(petals), _clip(ink * rng.uniform(0.85, 1.1), 0, 1))
        canvas.paint(where, canvas.cover(np.hypot(x, y) - radius * 0.33), _second_tone(ink))


def _draw_windows(canvas: _Canvas, ink: Array, wall: Array, rng: np.random.Generator) -> None:
    columns, rows = int(rng.integers(9, 13)), int(rng.integers(8, 11))
    u, v = canvas.x * columns % 1.0, canvas.y * rows % 1.0
    frame = np.maximum((np.abs(u - 0.5) - 0.28) / columns, (np.abs(v - 0.5) - 0.34) / rows)
    bars = np.minimum(np.abs(u - 0.5) / columns, np.abs(v - 0.5) / rows) - 0.0035
    lit = rng.uniform(0.75, 1.1, (rows + 1, columns + 1)).astype(np.float32)
    tone = lit[(canvas.y * rows).astype(int), (canvas.x * columns).astype(int)]
    canvas.paint(_full(), canvas.cover(frame), _clip(ink * tone[..., None], 0, 1))
    canvas.paint(_full(), canvas.cover(np.maximum(frame, bars)), _mix(wall, (0, 0, 0), 0.25))


def _draw_bricks(canvas: _Canvas, ink: Array, wall: Array, rng: np.random.Generator) -> None:
    rows, columns = int(rng.integers(13, 17)), int(rng.integers(6, 8))
    row = (canvas.y * rows).astype(int)
    u = (canvas.x * columns + 0.5 * (row % 2)) % 1.0
    column = (canvas.x * columns + 0.5 * (row % 2)).astype(int)
    v = canvas.y * rows % 1.0
    edge = np.maximum((np.abs(u - 0.5) - 0.455) / columns, (np.abs(v - 0.5) - 0.40) / rows)
    tone = rng.uniform(0.78, 1.12, (rows + 1, columns + 2)).astype(np.float32)[row, column]
    canvas.paint(_full(), canvas.cover(edge), _clip(ink * tone[..., None], 0, 1))


def _draw_detail(canvas: _Canvas, scene: Scene, rng: np.random.Generator) -> None:
    ink, wall = _tint(scene.ink, rng), _tint(scene.wall, rng)
    canvas.pixels[:] = wall
    painters = {"tiles": _draw_tiles, "flowers": _draw_flowers, "windows": _draw_windows, "bricks": _draw_bricks}
    painters[scene.detail](canvas, ink, wall, rng)
    for thing in scene.things:
        _place_thing(canvas, thing, 0.5, 0.5, 0.24, rng)


def _draw_smooth(canvas: _Canvas, scene: Scene, rng: np.random.Generator) -> None:
    _draw_sky(canvas, scene.sky, rng)
    cx = (0.25 if scene.side == "left" else 0.75) + rng.uniform(-SCATTER, SCATTER)
    cy, radius = 0.27 + rng.uniform(-SCATTER, SCATTER), 0.085 * (1 + rng.uniform(-GROWTH, GROWTH))
    canvas.mark("light", 0, (cx - radius, cy - radius, cx + radius, cy + radius))
    away = np.hypot(canvas.x - cx, canvas.y - cy)
    colour = (1.0, 0.90, 0.45) if scene.light == "sun" else (0.93, 0.94, 0.98)
    canvas.paint(_full(), (0.55 * np.exp(-((away / 0.19) ** 2))).astype(np.float32), colour)
    disc = away - radius
    if scene.light == "moon":
        disc = np.maximum(disc, radius * 0.92 - np.hypot(canvas.x - cx - radius * 0.5, canvas.y - cy + radius * 0.15))
    canvas.paint(_full(), canvas.cover(disc), colour)
    _draw_ground(canvas, scene.ground, rng)


def render(scene: Scene, size: int, seed: int) -> Array:
    """Draw a scene.

    Args:
        scene: What to draw.
        size: Side of the image in pixels, 8 or more.
        seed: Fixes what the caption leaves open (positions, tints, ridges), equally at every size.

    Returns:
        Float32 array of shape (size, size, 3), RGB in [0, 1].
    """
    return _draw(scene, size, seed).pixels


def layout(scene: Scene, seed: int) -> tuple[Mark, ...]:
    """Where `render` puts the scene's things, letters and light.

    Args:
        scene: What to draw.
        seed: As in `render`.

    Returns:
        One mark for each, in the order of drawing; the same at every size.
    """
    return tuple(_draw(scene, 8, seed).marks)


def _draw(scene: Scene, size: int, seed: int) -> _Canvas:
    if size < 8:
        raise MrFlowError(f"size must be 8 pixels or more, got {size}.")
    canvas = _Canvas(size)
    rng = np.random.default_rng(seed)
    painters = {"objects": _draw_objects, "letters": _draw_letters, "detail": _draw_detail, "smooth": _draw_smooth}
    painters[scene.category](canvas, scene, rng)
    return canvas
