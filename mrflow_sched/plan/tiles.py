"""Where overlapping tiles lie."""

from __future__ import annotations

import math

from mrflow_sched._runtime.errors import MrFlowError

OVERLAP = 0.25
"""Share of a refine stage's tile that it has in common with its neighbour."""


def spans(length: int, side: int, overlap: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Evenly spread tiles along one axis.

    Args:
        length: What they cover, in any unit, 0 or more.
        side: The longest tile allowed, 1 or more.
        overlap: What neighbours share at least, about, 0 or more; limited to half of `side`, and to what leaves a
            `multiple`.
        multiple: Starts are multiples of it, so that models which fold pixels into channels fold every tile alike; 1 or
            more. A side below it becomes one `multiple`.

    Returns:
        (start, stop) of each tile, in order; one tile of the whole length where that is at most `side`.

    Raises:
        MrFlowError: An argument is out of range.
    """
    if min(side, multiple) < 1 or min(length, overlap) < 0:
        raise MrFlowError(
            f"side and multiple must be 1 or more, length and overlap 0 or more, got {side}, {multiple}, {length} and "
            f"{overlap}."
        )
    if length > side:
        side = max(side // multiple, 1) * multiple
    if length <= side:
        return [(0, length)]
    shared = min(overlap, side // 2, side - multiple)
    count = math.ceil((length - shared) / (side - shared))
    starts = [math.ceil(index * (length - side) / (count - 1) / multiple) * multiple for index in range(count)]
    return [(start, min(start + side, length)) for start in starts]


def tile_sides(width: int, height: int, tile: int, grid: int) -> list[tuple[int, int]]:
    """The size of every tile of a stage.

    Args:
        width: Width of the stage in pixels.
        height: Its height.
        tile: Side of a tile in pixels.
        grid: The family's grid in pixels.

    Returns:
        (width, height) in pixels of each tile, row by row; one, the stage's own, where the stage fits into a tile.
    """
    across, down = (cells(side, tile, grid) for side in (width, height))
    return [((right - left) * grid, (bottom - top) * grid) for top, bottom in down for left, right in across]


def cells(side: int, tile: int, grid: int) -> list[tuple[int, int]]:
    """The tiles of a stage along one axis, overlapping by `OVERLAP`.

    Args:
        side: Side of the stage in pixels.
        tile: Side of a tile in pixels.
        grid: The family's grid in pixels.

    Returns:
        (start, stop) of each tile, in cells of the grid.
    """
    cells = max(tile // grid, 1)
    return spans(side // grid, cells, math.ceil(OVERLAP * cells))
