"""Work in overlapping tiles: where they lie, how they are blended, and a refine stage that is made of them.

A tile's outermost quarter of what it shares with a neighbour does not count at all, as that is where it misses its
surroundings; across the middle half its weight falls linearly. Weights of neighbours sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mrflow_sched.engines.base import Engine

__all__ = ["OVERLAP", "TiledEngine", "feathered", "spans", "tile_sides"]

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


def feathered(parts: Sequence[tuple[int, int]], scale: int = 1) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Each span with its weights (span * scale): 1 inside, falling to 0 across what it shares with its neighbours."""
    import torch

    for index, (start, stop) in enumerate(parts):
        weight = torch.ones((stop - start) * scale)
        if index > 0:
            ramp = _ramp((parts[index - 1][1] - start) * scale)
            weight[: len(ramp)] *= ramp
        if index + 1 < len(parts):
            ramp = _ramp((stop - parts[index + 1][0]) * scale)
            weight[len(weight) - len(ramp) :] *= ramp.flip(0)
        yield (start, stop), weight


def tile_sides(width: int, height: int, tile: int, grid: int) -> list[tuple[int, int]]:
    """(width, height) in pixels of every tile of a stage; one, the stage's own, where it fits into a tile."""
    across, down = (_cells(side, tile, grid) for side in (width, height))
    return [((right - left) * grid, (bottom - top) * grid) for top, bottom in down for left, right in across]


def _cells(side: int, tile: int, grid: int) -> list[tuple[int, int]]:
    """Spans of one side, in cells of the family's grid."""
    cells = max(tile // grid, 1)
    return spans(side // grid, cells, math.ceil(OVERLAP * cells))


class TiledEngine:
    """An engine whose network sees a picture tile by tile; all else is the engine's own.

    Every evaluation is made of overlapping tiles of the same noisy latents, blended: one noise field, one sigma. Each
    tile has positions of its own, from 0 on, as at the sizes that the network was trained at. After MultiDiffusion
    (Bar-Tal et al. 2023).
    """

    def __init__(self, engine: Engine, tile: int, *, cancel: Callable[[], object] | None = None) -> None:
        """`tile`: side in pixels, at least the family's grid. `cancel` is called before each tile and may raise."""
        self._engine, self._tile, self._cancel = engine, tile, cancel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def denoise(self, x: Tensor, sigma: Tensor, text: Any, *, guidance: float) -> Tensor:
        """Clean estimate of `x` (B, C, h, w), as `Engine.denoise`; latents that fit into a tile pass as they are."""
        grid = self._engine.family.grid
        each = int(self._engine.latent_shape(grid, grid)[-1])  # latents a side of one cell of the grid
        down, across = (_cells(int(side) // each * grid, self._tile, grid) for side in x.shape[-2:])
        total, weight = x.new_zeros(x.shape), x.new_zeros((1, 1, *x.shape[-2:]))
        for (top, bottom), rows in feathered(down, each):
            for (left, right), columns in feathered(across, each):
                if self._cancel is not None:
                    self._cancel()
                area = (..., slice(top * each, bottom * each), slice(left * each, right * each))
                mask = (rows[:, None] * columns).to(x)
                total[area] += mask * self._engine.denoise(x[area].contiguous(), sigma, text, guidance=guidance)
                weight[area] += mask
        return total / weight


def _ramp(length: int) -> Tensor:
    """From 0 to 1 over the middle half of `length`; the outer quarters are 0 and 1."""
    import torch

    return (((torch.arange(length) + 0.5) / max(length, 1) - 0.25) * 2).clamp(0, 1)
