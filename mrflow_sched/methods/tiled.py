"""A refine stage made of overlapping tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mrflow_sched.sampling.engine import Engine
from mrflow_sched.plan.tiles import cells
from mrflow_sched.upscaling.blend import feathered


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
        down, across = (cells(int(side) // each * grid, self._tile, grid) for side in x.shape[-2:])
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
