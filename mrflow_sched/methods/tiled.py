"""Tiled refining: in later stages the network sees overlapping tiles, blended, where the plan says so.

Every evaluation is blended from tiles of the same noisy latents: one noise field, one sigma. After MultiDiffusion
(Bar-Tal et al. 2023, arXiv 2302.08113).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mrflow_sched.plan.notes import own_image_note
from mrflow_sched.plan.tiles import cells
from mrflow_sched.sampling.answers import float_tensor
from mrflow_sched.sampling.engine import Capabilities, capabilities_of
from mrflow_sched.sampling.method import Wrapper
from mrflow_sched.upscaling.blend import feathered

if TYPE_CHECKING:
    from mrflow_sched.sampling.engine import Engine
    from mrflow_sched.sampling.method import StageRun

__all__ = ["Tiled", "TiledEngine"]


@dataclass(frozen=True)
class Tiled(Wrapper):
    """Tiles in the stages that the plan wants tiled (`StagedPlan.tiled`); all else is left to `inner`."""

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        """Sample the stage as the inner method does, on a `TiledEngine` where the plan wants tiles.

        Args:
            run: The stage.
            latents: (B, *latent_shape), float32, at its first sigma.

        Returns:
            Clean latents in the shape of `latents`, float32.
        """
        if not run.plan.tiled(run.index):
            return self.inner.stage(run, latents)
        wanted = run.plan.tile_positions == "whole"
        placed = wanted and capabilities_of(run.engine).places
        known = run.engine.family.pipeline
        if wanted and not placed and (known is None or known.positions != "none"):
            run.hooks.say(own_image_note(run.engine.family))
        tiled = TiledEngine(run.engine, run.plan.tile, placed=placed, cancel=run.hooks.stop_if_cancelled)
        return self.inner.stage(run.with_engine(tiled), latents)


class TiledEngine:
    """An engine whose network sees an image tile by tile; all else is the wrapped engine's own."""

    def __init__(
        self, engine: Engine, tile: int, *, placed: bool = False, cancel: Callable[[], object] | None = None
    ) -> None:
        """Wrap `engine`.

        Args:
            engine: Evaluated for every tile.
            tile: Side in pixels, at least the family's grid.
            placed: The tokens of a tile have the positions that they have in the whole image; False: as if the tile
                were an image. For engines that take a `place` (`Capabilities.places`).
            cancel: Called before each tile; may raise `Cancelled`.
        """
        self._engine, self._tile, self._placed, self._cancel = engine, tile, placed, cancel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def capabilities(self) -> Capabilities:
        """Those of the wrapped engine without its own loop, which sees whole images."""
        own_loop = ("whole_stages", "guidance_per_step", "network_seam", "token_subsets", "precisions", "counts_on")
        return replace(capabilities_of(self._engine), **dict.fromkeys((*own_loop, "few_step"), False))

    def denoise(self, x: Tensor, sigma: Tensor, text: Any, *, guidance: float) -> Tensor:
        """Clean estimate, tile by tile; latents that fit into one tile are evaluated whole.

        Args:
            x: (B, C, h, w), float32.
            sigma: (B,), as in `Engine.denoise`.
            text: What `encode_text` returned.
            guidance: The scale in force.

        Returns:
            Clean latents in the shape of `x`, float32: the tiles' estimates, averaged with weights that fade out at
            tile edges.
        """
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
                tile = x[area].contiguous()
                place: dict[str, Any] = {"place": (top, left)} if self._placed else {}
                answer = self._engine.denoise(tile, sigma, text, guidance=guidance, **place)
                total[area] += mask * float_tensor(answer, tile.shape, self._engine, "denoise")
                weight[area] += mask
        return total / weight
