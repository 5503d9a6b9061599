"""How overlapping tiles are blended: weights that fall across the overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def feathered(parts: Sequence[tuple[int, int]], scale: int = 1) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """The blending weights of overlapping tiles along one axis.

    Across each overlap the outer quarter of a tile has weight 0, because it lacks context there, and the weight rises
    linearly over the middle half.

    Args:
        parts: (start, stop) of each tile in input pixels, in order, as `plan.tiles.spans` gives them.
        scale: Output pixels per input pixel.

    Yields:
        Each span with its weights, float32 of length (stop - start) * scale: 1 where no neighbour overlaps it.
    """
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


def _ramp(length: int) -> Tensor:
    """From 0 to 1 over the middle half of `length`; the outer quarters are 0 and 1."""
    import torch

    return (((torch.arange(length) + 0.5) / max(length, 1) - 0.25) * 2).clamp(0, 1)
