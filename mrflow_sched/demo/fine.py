"""Fine detail: what an image of 256 pixels holds and one of 128 does not. Lengths are in pixels of the former."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mrflow_sched.demo.canvas import Array, Box, Canvas, MarkKind, clip, draw_letters, everywhere, segments, tint
from mrflow_sched.demo.glyphs import GRID_HEIGHT, GRID_WIDTH
from mrflow_sched.demo.scenes import COUNTS, FINE_SIZE, GAPS, PRINTS, Face, Scene

__all__ = [
    "OUTLINE",
    "draw_birds",
    "draw_faces",
    "draw_lines",
    "draw_small_sign",
    "face_boxes",
    "hairlines",
    "small_word_boxes",
]

_PIXEL = 1 / FINE_SIZE
OUTLINE = 2 * _PIXEL
"""Width of an outlined shape's edge."""
_CELLS = {"small": 16, "tiny": 8}
"""Side of the square that a small letter stands in the middle of, by its print."""
_WALL_TOP, _SIGN_TOP = 168, 216
"""Where those squares begin below a word on a wall, and on a sign."""
_WIDTHS = {3: 1, 6: 2}
"""Of a hairline, by its gap."""
_FACE, _SMALL_FACE = 0.30, 0.09
"""Radius of a face, in image sides."""
_SCATTER = 0.012
_SKINS = ((0.98, 0.84, 0.72), (0.90, 0.70, 0.52), (0.68, 0.46, 0.31), (0.42, 0.28, 0.20))
_DARK = (0.10, 0.10, 0.12)
_EYE_COLOURS = {"blue": (0.15, 0.40, 0.90), "green": (0.10, 0.62, 0.25), "black": (0.06, 0.05, 0.05)}


def small_word_boxes(scene: Scene) -> list[Box]:
    """Where the letters of a scene's small word are drawn, whatever the seed.

    Args:
        scene: A scene with a small word.

    Returns:
        (left, top, right, bottom) of every letter, in units of the image's side.
    """
    height, cell, count = PRINTS[scene.print], _CELLS[scene.print], len(scene.small_word)
    # On a raster of eight pixels, as small type on a screen is.
    left = FINE_SIZE // 2 - cell * ((count + 1) // 2)
    width = GRID_WIDTH * height / GRID_HEIGHT
    top = (_WALL_TOP if scene.category == "letters" else _SIGN_TOP) + (cell - height) / 2
    starts = [left + cell * k + (cell - width) / 2 for k in range(count)]
    return [(x * _PIXEL, top * _PIXEL, (x + width) * _PIXEL, (top + height) * _PIXEL) for x in starts]


def draw_small_sign(canvas: Canvas, scene: Scene) -> None:
    """Draw a board with a scene's small word.

    Args:
        canvas: Where.
        scene: A scene of objects with a small word.
    """
    boxes = small_word_boxes(scene)
    cx, cy = (boxes[0][0] + boxes[-1][2]) / 2, (boxes[0][1] + boxes[0][3]) / 2
    half_width = (boxes[-1][2] - boxes[0][0]) / 2 + 5 * _PIXEL
    half_height = (PRINTS[scene.print] / 2 + 5) * _PIXEL
    where = canvas.box(cx, cy, half_width + 0.02, half_height + 0.02)
    board = np.maximum(np.abs(canvas.x[where] - cx) - half_width, np.abs(canvas.y[where] - cy) - half_height)
    canvas.paint(where, canvas.cover(board), (0.35, 0.22, 0.12))
    canvas.paint(where, canvas.cover(board + 2 * _PIXEL), (0.98, 0.96, 0.90))
    draw_letters(canvas, scene.small_word, boxes, (0.10, 0.08, 0.10), "small letter")


def draw_birds(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    """Draw a scene's birds in a row at the top of its sky.

    Args:
        canvas: Where.
        scene: A scene with birds.
        rng: Nudges them.
    """
    count = COUNTS.index(scene.birds) + 2
    colour = (0.95, 0.95, 0.90) if scene.sky == "night" else _DARK
    for k in range(count):
        cx = 0.5 + (k - (count - 1) / 2) * 0.12 + rng.uniform(-0.012, 0.012)
        cy = 0.075 + rng.uniform(-0.015, 0.015)
        span, lift = 7 * _PIXEL, 3 * _PIXEL
        wings = [(cx - span, cy), (cx - span / 2, cy - lift), (cx, cy), (cx + span / 2, cy - lift), (cx + span, cy)]
        canvas.mark("bird", k, (cx - span, cy - lift, cx + span, cy + _PIXEL))
        where = canvas.box(cx, cy, 1.3 * span, 2 * span)
        away = segments(canvas.x[where], canvas.y[where], wings)
        canvas.paint(where, canvas.cover(away - 0.8 * _PIXEL), colour)


# ------------------------------------------------------------------------------------------------------------ hairlines


def hairlines(gap: int, size: int) -> Array:
    """Coverage of parallel lines along an axis across them; the first begins at the edge.

    Args:
        gap: From one line to the next, in pixels of 256.
        size: Pixels of the axis.

    Returns:
        (size,), 0 to 1.
    """
    width = _WIDTHS[gap]
    edges = np.arange(size + 1) * (FINE_SIZE / size)
    covered = np.floor(edges / gap) * width + np.minimum(edges % gap, width)
    return (np.diff(covered) * (size / FINE_SIZE)).astype(np.float32)


def draw_lines(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    """Draw hairlines from edge to edge: upright, crossed or slanted.

    Args:
        canvas: Where.
        scene: A scene of lines.
        rng: Chooses tints, light and where hatching begins.
    """
    ink, wall, gap = tint(scene.ink, rng), tint(scene.wall, rng), GAPS[scene.gap]
    light = 1.0 + 0.10 * (canvas.y - 0.5)[..., None] * rng.choice((-1, 1))
    canvas.pixels[:] = clip(wall * light, 0, 1)
    if scene.pattern == "hatching":
        across = ((canvas.x + canvas.y) / np.sqrt(2) * FINE_SIZE + int(rng.integers(0, gap))) % gap
        away = np.abs(across - gap / 2) - _WIDTHS[gap] / 2
        alpha = canvas.cover(away * _PIXEL)
    else:
        alpha = np.broadcast_to(hairlines(gap, canvas.size)[None], (canvas.size,) * 2)
        if scene.pattern == "grid":
            rows = hairlines(gap, canvas.size)[:, None]
            alpha = alpha + rows - alpha * rows
    canvas.paint(everywhere(), alpha, ink)


# ---------------------------------------------------------------------------------------------------------------- faces


def face_boxes(scene: Scene) -> list[Box]:
    """Where the faces of a scene are: small ones whatever the seed, a large one give or take a nudge.

    Args:
        scene: A scene of faces.

    Returns:
        (left, top, right, bottom) of every face, in units of the image's side.
    """
    radius = _SMALL_FACE if scene.face_size else _FACE
    # Two on a raster of eight pixels, as small letters are: mouths of few pixels are learnt there.
    centres = (0.5,) if len(scene.faces) == 1 else (80 * _PIXEL, 176 * _PIXEL)
    return [(cx - radius, 0.5 - radius, cx + radius, 0.5 + radius) for cx in centres]


def draw_faces(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    """Draw faces before a wall.

    Args:
        canvas: Where.
        scene: A scene of faces.
        rng: Chooses skins and tints, and nudges a large face.
    """
    wall = tint(scene.wall, rng)
    light = 1.0 + 0.10 * (canvas.y - 0.5)[..., None] * rng.choice((-1, 1))
    canvas.pixels[:] = clip(wall * light, 0, 1)
    for index, (face, box) in enumerate(zip(scene.faces, face_boxes(scene), strict=True)):
        nudge = (0.0, 0.0) if scene.face_size else rng.uniform(-_SCATTER, _SCATTER, 2)
        radius = (box[2] - box[0]) / 2
        centre = (box[0] + box[2]) / 2 + nudge[0], (box[1] + box[3]) / 2 + nudge[1]
        _draw_face(canvas, face, index, centre, radius, rng)


def _draw_face(
    canvas: Canvas, face: Face, index: int, centre: tuple[float, float], radius: float, rng: np.random.Generator
) -> None:
    skin = clip(np.asarray(_SKINS[int(rng.integers(len(_SKINS)))]) + rng.normal(0, 0.015, 3), 0, 1)
    hair = tint(face.hair, rng)
    cx, cy = centre
    where = canvas.box(cx, cy, radius * 1.3, radius * 1.4)
    # In units of the radius, around the centre of the face.
    x, y = (canvas.x[where] - cx) / radius, (canvas.y[where] - cy) / radius

    def paint(distance: Array, colour: object) -> None:
        canvas.paint(where, canvas.cover(distance * radius), colour)

    def mark(kind: MarkKind, left: float, top: float, right: float, bottom: float) -> None:
        box = (cx + left * radius, cy + top * radius, cx + right * radius, cy + bottom * radius)
        canvas.mark(kind, index, box)

    mark("face", -1, -1.1, 1, 1)
    paint(np.hypot(x, (y + 0.15) / 1.02) - 1.0, hair)
    head = (np.hypot(x / 0.80, (y - 0.02) / 0.95) - 1.0) * 0.8
    paint(head, skin)
    paint(np.maximum(head, y + 0.48 - 0.12 * np.cos(3 * x)), hair)
    for side in (-1, 1):
        ex, ey = 0.36 * side, -0.08
        mark("eye", ex - 0.18, ey - 0.18, ex + 0.18, ey + 0.18)
        paint(np.hypot(x - ex, y - ey) - 0.18, (0.97, 0.97, 0.97))
        paint(np.hypot(x - ex, y - ey) - 0.11, _EYE_COLOURS[face.eyes])
    mark("mouth", -0.36, 0.32, 0.36, 0.66)
    _paint_mouth(paint, face.mood, x, y)


def _paint_mouth(paint: Callable[[Array, object], None], mood: str, x: Array, y: Array) -> None:
    colour = (0.55, 0.12, 0.15)
    if mood == "surprised":
        paint(np.hypot(x / 0.8, y - 0.48) - 0.15, colour)
        return
    bend = {"happy": -0.20, "sad": 0.20, "calm": 0.0}[mood]
    line = [(t, 0.48 + bend * ((t / 0.32) ** 2 - 0.5)) for t in np.linspace(-0.32, 0.32, 9).tolist()]
    paint(segments(x, y, line) - 0.055, colour)
