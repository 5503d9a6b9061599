"""What the demo scenes are drawn with: a canvas that covers pixels by signed distance, and simple forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mrflow_sched.demo.glyphs import GLYPHS, GRID_HEIGHT, GRID_WIDTH
from mrflow_sched.demo.scenes import COLOURS

Array = NDArray[Any]
Box = tuple[float, float, float, float]
MarkKind = Literal["thing", "letter", "light", "small letter", "bird", "face", "eye", "mouth"]


@dataclass(frozen=True)
class Mark:
    """Where one nameable part of a scene was drawn: a box in units of the image's side, x to the right, y down.

    Attributes:
        kind: One of `MarkKind`.
        index: Number of the thing, the face or the bird, or of the letter in its word, from 0.
        left: Left edge.
        top: Upper edge.
        right: Right edge.
        bottom: Lower edge.
    """

    kind: MarkKind
    index: int
    left: float
    top: float
    right: float
    bottom: float


def clip(x: Any, low: float | int, high: float | int) -> Array:
    """Keep values in a range.

    Args:
        x: Values of any shape.
        low: Least value.
        high: Largest value.

    Returns:
        Of the same shape.
    """
    return np.minimum(np.maximum(x, low), high)


class Canvas:
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
        return clip(0.5 - distance * self.size, 0.0, 1.0)

    def box(self, cx: float, cy: float, rx: float, ry: float) -> tuple[slice, slice]:
        """Rows and columns of a rectangle, with two pixels around it.

        Args:
            cx: Centre, in units of the image's side.
            cy: Likewise, from the top.
            rx: Half its width.
            ry: Half its height.

        Returns:
            Slices, cut off at the image's edges.
        """
        low, high = (
            np.floor((np.array([cy - ry, cx - rx])) * self.size) - 2,
            np.ceil(np.array([cy + ry, cx + rx]) * self.size) + 2,
        )
        low, high = clip(low, 0, self.size).astype(int), clip(high, 0, self.size).astype(int)
        return slice(low[0], high[0]), slice(low[1], high[1])

    def mark(self, kind: MarkKind, index: int, box: Box) -> None:
        """Note where a part is drawn.

        Args:
            kind: One of `MarkKind`.
            index: Its number.
            box: (left, top, right, bottom), in units of the image's side.
        """
        self.marks.append(Mark(kind, index, *(float(edge) for edge in box)))

    def paint(self, where: tuple[slice, slice], alpha: Array, colour: Any) -> None:
        """Lay a colour over a part of the image.

        Args:
            where: Rows and columns.
            alpha: Coverage of those pixels, 0 to 1.
            colour: RGB in [0, 1], one or one for each pixel.
        """
        part = self.pixels[where]
        part += alpha[..., None] * (np.asarray(colour, np.float32) - part)


def everywhere() -> tuple[slice, slice]:
    """All rows and columns.

    Returns:
        Slices for `Canvas.paint`.
    """
    return slice(None), slice(None)


def mix(a: Any, b: Any, t: float) -> Array:
    """Between two colours.

    Args:
        a: RGB in [0, 1].
        b: RGB in [0, 1].
        t: 0 gives `a`, 1 gives `b`.

    Returns:
        RGB, float32.
    """
    return (np.asarray(a, np.float32) * (1 - t) + np.asarray(b, np.float32) * t).astype(np.float32)


def tint(name: str, rng: np.random.Generator) -> Array:
    """A colour as it happens to be in one image.

    Args:
        name: A key of `COLOURS`.
        rng: Moves it a little.

    Returns:
        RGB in [0, 1], float32.
    """
    return clip(np.asarray(COLOURS[name]) + rng.normal(0, 0.02, 3), 0, 1).astype(np.float32)


def second_tone(colour: Array) -> Array:
    """The colour that a texture alternates with.

    Args:
        colour: RGB in [0, 1].

    Returns:
        A darker one, or a lighter one where the colour is dark already.
    """
    return mix(colour, (1, 1, 1), 0.62) if float(colour.mean()) < 0.36 else mix(colour, (0, 0, 0), 0.55)


def segments(x: Array, y: Array, line: Sequence[tuple[float, float]]) -> Array:
    """Distance of points to a polyline.

    Args:
        x: Their first coordinates.
        y: Their second ones, of the same shape.
        line: Two or more corners.

    Returns:
        Of the same shape.
    """
    best = np.full(x.shape, np.inf, np.float32)
    for (ax, ay), (bx, by) in pairwise(line):
        dx, dy = bx - ax, by - ay
        t = clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
        best = np.minimum(best, (x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2)
    return np.sqrt(best)


def polygon(x: Array, y: Array, corners: Sequence[tuple[float, float]]) -> Array:
    """Signed distance of points to a simple polygon.

    Args:
        x: Their first coordinates.
        y: Their second ones, of the same shape.
        corners: Three or more.

    Returns:
        Of the same shape, negative inside (even-odd rule).
    """
    inside = np.zeros(x.shape, bool)
    closed = [*corners, corners[0]]
    for (ax, ay), (bx, by) in pairwise(closed):
        if ay != by:
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return np.where(inside, -1, 1).astype(np.float32) * segments(x, y, closed)


def letter_boxes(word: str, cx: float, cy: float, height: float) -> list[Box]:
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


def draw_letters(canvas: Canvas, word: str, boxes: Sequence[Box], colour: Any, kind: MarkKind = "letter") -> None:
    """Draw a word.

    Args:
        canvas: Where.
        word: Capitals.
        boxes: Where each letter goes.
        colour: RGB in [0, 1].
        kind: What the letters are marked as.
    """
    for index, (letter, box) in enumerate(zip(word, boxes, strict=True)):
        x0, y0, _, y1 = box
        unit = (y1 - y0) / GRID_HEIGHT
        canvas.mark(kind, index, box)
        where = canvas.box(x0 + 2 * unit, (y0 + y1) / 2, 3 * unit, 4 * unit)
        x, y = (canvas.x[where] - x0) / unit, (canvas.y[where] - y0) / unit
        distance = np.stack([segments(x, y, line) for line in GLYPHS[letter]]).min(0)
        canvas.paint(where, canvas.cover((distance - 0.52) * unit), colour)
