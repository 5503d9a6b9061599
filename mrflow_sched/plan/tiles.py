"""Where overlapping tiles lie."""

from __future__ import annotations

import math

OVERLAP = 0.25
"""Share of a refine stage's tile that it has in common with its neighbour."""


def spans(length: int, side: int, overlap: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Evenly spread (start, stop) of at most `side` that cover `length`, neighbours sharing about `overlap` or more.

    Starts are multiples of `multiple`, so that models which fold pixels into channels fold every tile alike.
    """
    if length <= side:
        return [(0, length)]
    side = max(side // multiple, 1) * multiple
    shared = min(overlap, side // 2)
    count = math.ceil((length - shared) / (side - shared))
    starts = [math.ceil(index * (length - side) / (count - 1) / multiple) * multiple for index in range(count)]
    return [(start, min(start + side, length)) for start in starts]


def tile_sides(width: int, height: int, tile: int, grid: int) -> list[tuple[int, int]]:
    """(width, height) in pixels of every tile of a stage; one, the stage's own, where it fits into a tile."""
    across, down = (cells(side, tile, grid) for side in (width, height))
    return [((right - left) * grid, (bottom - top) * grid) for top, bottom in down for left, right in across]


def cells(side: int, tile: int, grid: int) -> list[tuple[int, int]]:
    """Spans of one side, in cells of the family's grid."""
    cells = max(tile // grid, 1)
    return spans(side // grid, cells, math.ceil(OVERLAP * cells))
