"""Scenes as images.

Drawing is done with signed distances on the unit square (x to the right, y down), so a scene has the same content at
every size and edges are one pixel wide. Fine detail is drawn at 256 pixels or more and averaged down, as a photograph
would show it. numpy only; the same seed gives the same image on every machine up to float rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.demo import fine
from mrflow_sched.demo.canvas import (
    Array,
    Box,
    Canvas,
    Mark,
    clip,
    draw_letters,
    everywhere,
    letter_boxes,
    mix,
    polygon,
    second_tone,
    tint,
)
from mrflow_sched.demo.glyphs import GRID_HEIGHT, GRID_WIDTH
from mrflow_sched.demo.scenes import FINE_SIZE, OUTLINED, Scene, Thing

__all__ = ["layout", "render", "word_boxes"]

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


def word_boxes(scene: Scene) -> list[Box]:
    """Where the letters of a scene's word are drawn, whatever the seed.

    Args:
        scene: A scene with a word in capitals of full size, of the category "letters" or "objects".

    Returns:
        As `letter_boxes`.
    """
    if scene.category == "letters":
        return letter_boxes(scene.word, 0.5, 0.5, WALL_GLYPH_HEIGHT)
    return letter_boxes(scene.word, 0.5, SIGN_CENTRE, SIGN_GLYPH_HEIGHT)


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
        return polygon(x, y, [(0, -0.98), (0.98, 0.75), (-0.98, 0.75)])
    if shape == "star":
        return polygon(x, y, _star_corners(5, 0.42))
    t = np.linspace(0, 2 * np.pi, 33)[:-1]
    heart_x = 16 * np.sin(t) ** 3
    heart_y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return polygon(x, y, list(zip((heart_x / 16).tolist(), (heart_y / 16 - 0.1).tolist(), strict=True)))


def _texture_mask(texture: str, x: Array, y: Array, pixel: float) -> Array:
    """Coverage of the second tone; x, y in units of the image, relative to the object's centre."""
    period = 0.062
    if texture == "striped":
        phase = (x + y) / period % 1.0
        return clip(0.5 + (0.25 - np.abs(phase - 0.5)) * period / pixel / np.sqrt(2), 0, 1)
    if texture == "dotted":
        u, v = (x / period + 0.5) % 1.0 - 0.5, (y / period + 0.5) % 1.0 - 0.5
        return clip(0.5 + (0.27 - np.hypot(u, v)) * period / pixel, 0, 1)
    if texture == "checkered":
        u = clip(np.abs((x / period) % 2 - 1) * 2 - 1, -1, 1) * period / pixel
        v = clip(np.abs((y / period) % 2 - 1) * 2 - 1, -1, 1) * period / pixel
        return (0.5 + 0.5 * clip(u, -1, 1) * clip(v, -1, 1)).astype(np.float32)
    return np.zeros(x.shape, np.float32)


def _draw_thing(
    canvas: Canvas, thing: Thing, cx: float, cy: float, radius: float, turn: float, rng: np.random.Generator
) -> None:
    earlier = sum(mark.kind == "thing" for mark in canvas.marks)
    canvas.mark("thing", earlier, (cx - radius, cy - radius, cx + radius, cy + radius))
    where = canvas.box(cx, cy, radius * 1.3, radius * 1.3)
    x, y = canvas.x[where] - cx, canvas.y[where] - cy
    u, v = (x * np.cos(turn) + y * np.sin(turn)) / radius, (y * np.cos(turn) - x * np.sin(turn)) / radius
    distance = _shape_distance(thing.shape, u, v) * radius
    if thing.texture == OUTLINED:
        distance = np.abs(distance + fine.OUTLINE / 2) - fine.OUTLINE / 2
    alpha = canvas.cover(distance)
    base = tint(thing.colour, rng)
    mask = _texture_mask(thing.texture, x, y, 1.0 / canvas.size)[..., None]
    shade = 1.0 - 0.12 * clip(v, -1, 1)[..., None]
    tones = clip((base * (1 - mask) + second_tone(base) * mask) * shade, 0, 1)
    canvas.paint(where, alpha, tones)


def _place_thing(canvas: Canvas, thing: Thing, cx: float, cy: float, radius: float, rng: np.random.Generator) -> None:
    nudge = rng.uniform(-SCATTER, SCATTER, 2)
    grown = radius * (1 + rng.uniform(-GROWTH, GROWTH))
    _draw_thing(canvas, thing, cx + nudge[0], cy + nudge[1], grown, rng.uniform(-TURN, TURN), rng)


def _draw_sky(canvas: Canvas, sky: str, rng: np.random.Generator) -> None:
    top, bottom = _SKY_COLOURS[sky]
    t = clip(canvas.y / 0.75, 0, 1)[..., None]
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
    canvas: Canvas, rng: np.random.Generator, colours: Sequence[Any], amplitude: float, rough: float
) -> None:
    for index, colour in enumerate(colours):
        edge = _ridge(rng, canvas.x[0], 0.62 + 0.13 * index, amplitude, rough)
        depth = canvas.y - edge
        shade = (1.08 - 0.5 * clip(depth, 0, 0.5))[..., None]
        canvas.paint(everywhere(), canvas.cover(-depth), clip(np.asarray(colour, np.float32) * shade, 0, 1))


def _draw_waves(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.paint(everywhere(), canvas.cover(0.62 - canvas.y), (0.12, 0.38, 0.66))
    for row in range(8):
        y0 = 0.65 + 0.047 * row
        crest = y0 + 0.010 * np.sin(2 * np.pi * (canvas.x * (9 - 0.4 * row) + rng.random()))
        canvas.paint(everywhere(), canvas.cover(np.abs(canvas.y - crest) - 0.004) * 0.85, (0.72, 0.86, 0.96))


def _draw_mountains(canvas: Canvas, rng: np.random.Generator) -> None:
    edge = _jagged(rng, canvas.x[0], 0.56, 0.11)
    depth = canvas.y - edge
    canvas.paint(everywhere(), canvas.cover(-depth), (0.46, 0.48, 0.53))
    canvas.paint(everywhere(), canvas.cover(-depth) * canvas.cover(depth - 0.05), (0.92, 0.94, 0.97))
    near = canvas.y - _jagged(rng, canvas.x[0], 0.78, 0.05)
    canvas.paint(everywhere(), canvas.cover(-near), (0.32, 0.35, 0.40))


def _draw_city(canvas: Canvas, rng: np.random.Generator) -> None:
    left = -0.02
    while left < 1.0:
        width, top = rng.uniform(0.09, 0.16), rng.uniform(0.52, 0.70)
        block = np.maximum(np.abs(canvas.x - left - width / 2) - width / 2, top - canvas.y)
        tone = rng.uniform(0.10, 0.20)
        canvas.paint(everywhere(), canvas.cover(block), (tone, tone, tone + 0.05))
        u, v = (canvas.x - left) / 0.03 % 1.0, (canvas.y - top) / 0.045 % 1.0
        cell = np.floor((canvas.x - left) / 0.03) * 7.13 + np.floor((canvas.y - top) / 0.045) * 3.71 + left * 97
        lit = (np.sin(cell * 12.9898) * 43758.547) % 1.0 > 0.45
        pane = np.maximum(np.abs(u - 0.5) * 0.03 - 0.0075, np.abs(v - 0.5) * 0.045 - 0.012)
        inside = canvas.cover(block + 0.012)
        canvas.paint(everywhere(), canvas.cover(pane) * inside * lit, (0.98, 0.86, 0.50))
        left += width


def _draw_ground(canvas: Canvas, ground: str, rng: np.random.Generator) -> None:
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


def _draw_sign(canvas: Canvas, word: str) -> None:
    cx, cy = 0.5, SIGN_CENTRE
    unit = SIGN_GLYPH_HEIGHT / GRID_HEIGHT
    half = ((GRID_WIDTH + 1.7) * unit * len(word)) / 2 + 0.02
    where = canvas.box(cx, cy, half + 0.03, 0.12)
    board = np.maximum(np.abs(canvas.x[where] - cx) - half, np.abs(canvas.y[where] - cy) - 0.095)
    canvas.paint(where, canvas.cover(board), (0.35, 0.22, 0.12))
    canvas.paint(where, canvas.cover(board + 0.012), (0.98, 0.96, 0.90))
    draw_letters(canvas, word, letter_boxes(word, cx, cy, SIGN_GLYPH_HEIGHT), (0.10, 0.08, 0.10))


def _draw_objects(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    _draw_sky(canvas, scene.sky, rng)
    _draw_ground(canvas, scene.ground, rng)
    centres = (0.5,) if len(scene.things) == 1 else (0.27, 0.73)
    radius = 0.23 if len(scene.things) == 1 else 0.19
    for cx, thing in zip(centres, scene.things, strict=True):
        _place_thing(canvas, thing, cx, 0.40, radius, rng)
    if scene.birds:
        fine.draw_birds(canvas, scene, rng)
    if scene.word:
        _draw_sign(canvas, scene.word)
    elif scene.small_word:
        fine.draw_small_sign(canvas, scene)


def _draw_letters(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    wall = tint(scene.wall, rng)
    light = 1.0 + 0.10 * (canvas.y - 0.5)[..., None] * rng.choice((-1, 1))
    canvas.pixels[:] = clip(wall * light, 0, 1)
    ink = tint(scene.ink, rng)
    draw_letters(canvas, scene.word, word_boxes(scene), ink)
    if scene.small_word:
        draw_letters(canvas, scene.small_word, fine.small_word_boxes(scene), ink, "small letter")


def _draw_tiles(canvas: Canvas, ink: Array, wall: Array, rng: np.random.Generator) -> None:
    count = int(rng.integers(11, 15))
    cell = 1.0 / count
    u, v = canvas.x / cell % 1.0, canvas.y / cell % 1.0
    rows, columns = (canvas.y / cell).astype(int), (canvas.x / cell).astype(int)
    tone = rng.uniform(0.7, 1.15, (count + 1, count + 1)).astype(np.float32)[rows, columns]
    edge = (np.maximum(np.abs(u - 0.5), np.abs(v - 0.5)) - 0.40) * cell
    canvas.paint(everywhere(), canvas.cover(edge), clip(ink * tone[..., None], 0, 1))


def _draw_flowers(canvas: Canvas, ink: Array, wall: Array, rng: np.random.Generator) -> None:
    side = 10
    cells = np.array([(x, y) for y in range(side) for x in range(side)])
    grid: Array = (cells + rng.uniform(0.2, 0.8, cells.shape)) / side
    for cx, cy in grid:
        radius = rng.uniform(0.018, 0.03)
        where = canvas.box(cx, cy, radius * 1.4, radius * 1.4)
        x, y = canvas.x[where] - cx, canvas.y[where] - cy
        petals = np.hypot(x, y) - radius * (0.78 + 0.3 * np.cos(5 * np.arctan2(y, x) + rng.random() * 6))
        canvas.paint(where, canvas.cover(petals), clip(ink * rng.uniform(0.85, 1.1), 0, 1))
        canvas.paint(where, canvas.cover(np.hypot(x, y) - radius * 0.33), second_tone(ink))


def _draw_windows(canvas: Canvas, ink: Array, wall: Array, rng: np.random.Generator) -> None:
    columns, rows = int(rng.integers(9, 13)), int(rng.integers(8, 11))
    u, v = canvas.x * columns % 1.0, canvas.y * rows % 1.0
    frame = np.maximum((np.abs(u - 0.5) - 0.28) / columns, (np.abs(v - 0.5) - 0.34) / rows)
    bars = np.minimum(np.abs(u - 0.5) / columns, np.abs(v - 0.5) / rows) - 0.0035
    lit = rng.uniform(0.75, 1.1, (rows + 1, columns + 1)).astype(np.float32)
    tone = lit[(canvas.y * rows).astype(int), (canvas.x * columns).astype(int)]
    canvas.paint(everywhere(), canvas.cover(frame), clip(ink * tone[..., None], 0, 1))
    canvas.paint(everywhere(), canvas.cover(np.maximum(frame, bars)), mix(wall, (0, 0, 0), 0.25))


def _draw_bricks(canvas: Canvas, ink: Array, wall: Array, rng: np.random.Generator) -> None:
    rows, columns = int(rng.integers(13, 17)), int(rng.integers(6, 8))
    row = (canvas.y * rows).astype(int)
    u = (canvas.x * columns + 0.5 * (row % 2)) % 1.0
    column = (canvas.x * columns + 0.5 * (row % 2)).astype(int)
    v = canvas.y * rows % 1.0
    edge = np.maximum((np.abs(u - 0.5) - 0.455) / columns, (np.abs(v - 0.5) - 0.40) / rows)
    tone = rng.uniform(0.78, 1.12, (rows + 1, columns + 2)).astype(np.float32)[row, column]
    canvas.paint(everywhere(), canvas.cover(edge), clip(ink * tone[..., None], 0, 1))


def _draw_detail(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    ink, wall = tint(scene.ink, rng), tint(scene.wall, rng)
    canvas.pixels[:] = wall
    painters = {"tiles": _draw_tiles, "flowers": _draw_flowers, "windows": _draw_windows, "bricks": _draw_bricks}
    painters[scene.detail](canvas, ink, wall, rng)
    for thing in scene.things:
        _place_thing(canvas, thing, 0.5, 0.5, 0.24, rng)


def _draw_smooth(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    _draw_sky(canvas, scene.sky, rng)
    cx = (0.25 if scene.side == "left" else 0.75) + rng.uniform(-SCATTER, SCATTER)
    cy, radius = 0.27 + rng.uniform(-SCATTER, SCATTER), 0.085 * (1 + rng.uniform(-GROWTH, GROWTH))
    canvas.mark("light", 0, (cx - radius, cy - radius, cx + radius, cy + radius))
    away = np.hypot(canvas.x - cx, canvas.y - cy)
    colour = (1.0, 0.90, 0.45) if scene.light == "sun" else (0.93, 0.94, 0.98)
    canvas.paint(everywhere(), (0.55 * np.exp(-((away / 0.19) ** 2))).astype(np.float32), colour)
    disc = away - radius
    if scene.light == "moon":
        disc = np.maximum(disc, radius * 0.92 - np.hypot(canvas.x - cx - radius * 0.5, canvas.y - cy + radius * 0.15))
    canvas.paint(everywhere(), canvas.cover(disc), colour)
    _draw_ground(canvas, scene.ground, rng)
    if scene.birds:
        fine.draw_birds(canvas, scene, rng)


def render(scene: Scene, size: int, seed: int) -> Array:
    """Draw a scene.

    Args:
        scene: What to draw.
        size: Side of the image in pixels, 8 or more.
        seed: Fixes what the caption leaves open (positions, tints, ridges), equally at every size.

    Returns:
        Float32 array of shape (size, size, 3), RGB in [0, 1].

    Raises:
        MrFlowError: The size is below 8.
    """
    if size < 8:
        raise MrFlowError(f"size must be 8 pixels or more, got {size}.")
    factor = -(-FINE_SIZE // size) if scene.is_fine else 1
    pixels = _draw(scene, size * factor, seed).pixels
    return np.reshape(pixels, (size, factor, size, factor, 3)).mean((1, 3)) if factor > 1 else pixels


def layout(scene: Scene, seed: int) -> tuple[Mark, ...]:
    """Where `render` puts the scene's things, letters and light.

    Args:
        scene: What to draw.
        seed: As in `render`.

    Returns:
        One mark for each, in the order of drawing; the same at every size.
    """
    return tuple(_draw(scene, 8, seed).marks)


def _draw(scene: Scene, size: int, seed: int) -> Canvas:
    canvas = Canvas(size)
    rng = np.random.default_rng(seed)
    painters = {
        "objects": _draw_objects,
        "letters": _draw_letters,
        "detail": _draw_detail,
        "smooth": _draw_smooth,
        "faces": fine.draw_faces,
        "lines": fine.draw_lines,
    }
    painters[scene.category](canvas, scene, rng)
    return canvas
