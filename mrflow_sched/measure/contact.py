"""A contact sheet: small pictures of many drafts, each with its number, to choose from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from mrflow_sched.measure.fonts import Fonts
from mrflow_sched.measure.sheet import PAPER, QUIET, Pen, wrap

__all__ = ["Tile", "draw_contact"]

_WIDE = 256
"""Pictures narrower than this are shown magnified by a whole factor, wider ones at most 1.5 times as wide."""
_ROWS = ((4, 4), (8, 4), (15, 5), (36, 6))  # up to so many pictures, columns
_MOST_COLUMNS = 8


@dataclass(frozen=True)
class Tile:
    """One picture of a contact sheet.

    Attributes:
        prompt: Its heading; neighbours with the same one share it.
        image: The picture, 8-bit RGB.
        title: The first line below it.
        lines: Further lines.
    """

    prompt: str
    image: Image.Image
    title: str
    lines: tuple[str, ...] = ()


def draw_contact(tiles: Sequence[Tile], fonts: Fonts | None = None) -> Image.Image:
    """Draw pictures in rows, under their prompts.

    Args:
        tiles: At least one; in the order in which they are shown.
        fonts: What to write with; None: the installed fonts.

    Returns:
        An RGB image.
    """
    groups = _by_prompt(tiles)
    fonts = fonts or Fonts()
    side = max(tile.image.width for tile in tiles)
    box = side * max(1, _WIDE // side) if side <= _WIDE else min(side, _WIDE * 3 // 2)
    tall = max(round(tile.image.height * box / tile.image.width) for tile in tiles)
    unit, gap = 16, 14
    below = round((1.6 + 1.4 * max(len(tile.lines) for tile in tiles)) * unit) + gap
    columns = min(_columns(max(map(len, groups))), max(map(len, groups)))
    width = gap + columns * (box + gap)
    pen = Pen(ImageDraw.Draw(Image.new("RGB", (1, 1))), unit, fonts)
    heads = [wrap(pen, f'"{group[0].prompt}"', 1.1, width - 2 * gap, lines=2) for group in groups]
    height = gap + sum(
        round(len(head) * 1.6 * unit) + gap // 2 + math.ceil(len(group) / columns) * (tall + below)
        for head, group in zip(heads, groups, strict=True)
    )
    canvas = Image.new("RGB", (width, height), PAPER)
    pen = Pen(ImageDraw.Draw(canvas), unit, fonts)
    top = gap
    for head, group in zip(heads, groups, strict=True):
        for line in head:
            pen.write((gap, top), line, 1.1)
            top += round(1.6 * unit)
        top += gap // 2
        for number, tile in enumerate(group):
            place = (gap + number % columns * (box + gap), top + number // columns * (tall + below))
            _draw_tile(canvas, pen, tile, place, box, tall)
        top += math.ceil(len(group) / columns) * (tall + below)
    return canvas


def _draw_tile(canvas: Image.Image, pen: Pen, tile: Tile, place: tuple[int, int], box: int, tall: int) -> None:
    size = (box, max(1, round(tile.image.height * box / tile.image.width)))
    whole = box % tile.image.width == 0
    shown = tile.image.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)
    canvas.paste(shown, place)
    left, line = place[0], place[1] + tall + round(0.2 * pen.unit)
    pen.write((left, line), wrap(pen, tile.title, 1.0, box, lines=1)[0])
    for number, text in enumerate(tile.lines):
        below = line + round((1.4 + 1.3 * number) * pen.unit)
        pen.write((left, below), wrap(pen, text, 0.85, box, lines=1)[0], 0.85, QUIET)


def _columns(count: int) -> int:
    return next((columns for most, columns in _ROWS if count <= most), _MOST_COLUMNS)


def _by_prompt(tiles: Sequence[Tile]) -> list[list[Tile]]:
    groups: list[list[Tile]] = []
    for tile in tiles:
        if not groups or groups[-1][0].prompt != tile.prompt:
            groups.append([])
        groups[-1].append(tile)
    return groups
