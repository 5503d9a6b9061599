"""Sizes of images: on the model's grid, from stage to stage, and how one fills another."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.checks import MAX_STAGES, check_side, check_whole
from mrflow_sched.plan.families import Family

# ------------------------------------------------------------------------------------------------------------- sizes


def fit_box(src_w: int, src_h: int, dst_w: int, dst_h: int) -> tuple[int, int, int, int]:
    """How to fill a box of `dst_w` x `dst_h` pixels with an image of `src_w` x `src_h` without stretching it.

    Returns:
        (resize_w, resize_h, left, top) in pixels: scale the image to that size, which covers the box and keeps the
        image's shape to half a pixel, then cut the box out at (left, top), centred.

    Raises:
        MrFlowError: for sides below 1.
    """
    for name, side in (("src_w", src_w), ("src_h", src_h), ("dst_w", dst_w), ("dst_h", dst_h)):
        check_whole(side, name, 1)
    if dst_w * src_h >= dst_h * src_w:
        width, height = dst_w, (2 * src_h * dst_w + src_w) // (2 * src_w)
    else:
        width, height = (2 * src_w * dst_h + src_h) // (2 * src_h), dst_h
    return width, height, (width - dst_w) // 2, (height - dst_h) // 2


def snap(side: float, grid: int) -> int:
    """The nearest multiple of `grid`, halves upwards, at least one grid."""
    return max(math.floor(side / grid + 0.5), 1) * grid


def snap_size(family: Family, width: int, height: int) -> tuple[int, int]:
    check_side(width, "width")
    check_side(height, "height")
    return snap(width, family.grid), snap(height, family.grid)


def tokens_of(family: Family, size: tuple[int, int]) -> int:
    """Image tokens of a size; a last row or column that is not whole counts."""
    return math.ceil(size[0] / family.grid) * math.ceil(size[1] / family.grid)


def stage_sizes(family: Family, width: int, height: int, factors: Sequence[float]) -> list[tuple[int, int]]:
    """Sizes from first to last. Each is the final size over the product of the factors after it, to the grid."""
    final = snap_size(family, width, height)
    sizes = [final]
    for index in range(len(factors) - 1, -1, -1):
        over = math.prod(factors[index:])
        sizes.insert(0, (snap(final[0] / over, family.grid), snap(final[1] / over, family.grid)))
    return sizes


def handoff_factors(
    family: Family, factor: float | None, factors: Sequence[float] | None, stages: int | None
) -> tuple[float, ...]:
    """One size factor per handoff, from the three ways to ask for them."""
    if factors is not None:
        if factor is not None or (stages is not None and stages != len(factors) + 1):
            raise MrFlowError(
                f"factors={tuple(factors)!r} gives all size steps; leave factor and stages out beside it."
            )
        if not factors:
            raise MrFlowError("factors must hold at least one size step, got none; for one stage use native=True.")
        check_whole(len(factors), "the count of factors", 1, MAX_STAGES - 1)
        return tuple(factors)
    return (family.factor if factor is None else factor,) * ((2 if stages is None else stages) - 1)
