"""Sizes of images: on the model's grid, from stage to stage, and how an image fills a box of another shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.plan.checks import MAX_STAGES, checked_side, checked_whole
from mrflow_sched.plan.families import Family

MAX_PICTURE_SIDE = 2**31
"""The largest side of a picture that formats can hold."""

# ------------------------------------------------------------------------------------------------------------- sizes


def fit_box(src_w: int, src_h: int, dst_w: int, dst_h: int) -> tuple[int, int, int, int]:
    """How to fill a box with an image without stretching it.

    Args:
        src_w: Width of the image in pixels, 1 to 2^31.
        src_h: Its height.
        dst_w: Width of the box in pixels, likewise.
        dst_h: Its height.

    Returns:
        (resize_w, resize_h, left, top) in pixels: scale the image to that size, which covers the box and keeps the
        image's shape to half a pixel, then cut the box out at (left, top), centred.

    Raises:
        MrFlowError: A side is out of range.
    """
    sides = (("src_w", src_w), ("src_h", src_h), ("dst_w", dst_w), ("dst_h", dst_h))
    src_w, src_h, dst_w, dst_h = (checked_whole(side, name, 1, MAX_PICTURE_SIDE) for name, side in sides)
    if dst_w * src_h >= dst_h * src_w:
        width, height = dst_w, (2 * src_h * dst_w + src_w) // (2 * src_w)
    else:
        width, height = (2 * src_w * dst_h + src_h) // (2 * src_h), dst_h
    return width, height, (width - dst_w) // 2, (height - dst_h) // 2


def snap(side: float, grid: int) -> int:
    """A side rounded to the grid.

    Args:
        side: Pixels, above 0.
        grid: Pixels of which the result is a multiple.

    Returns:
        The nearest multiple of `grid`, halves upwards, at least one grid.
    """
    return max(math.floor(side / grid + 0.5), 1) * grid


def covering_size(family: Family, width: int, height: int) -> tuple[int, int]:
    """The size on a family's grid at which an image is made; what is too much of it is cropped in the end.

    Args:
        family: The model's family.
        width: Pixels, 1 to 32768.
        height: Likewise.

    Returns:
        (width, height), each the next multiple of the grid.

    Raises:
        MrFlowError: A side is out of range.
    """
    width, height = checked_side(width, "width"), checked_side(height, "height")
    return math.ceil(width / family.grid) * family.grid, math.ceil(height / family.grid) * family.grid


def tokens_of(family: Family, size: tuple[int, int]) -> int:
    """Image tokens of a size; a last row or column that is not whole counts.

    Args:
        family: Its grid is the side of the square that one token covers.
        size: (width, height) in pixels.

    Returns:
        Tokens, without those of the text.
    """
    return math.ceil(size[0] / family.grid) * math.ceil(size[1] / family.grid)


def stage_sizes(family: Family, width: int, height: int, factors: Sequence[float]) -> list[tuple[int, int]]:
    """The size of every stage: the final size, which covers what is asked for, over the factors after it.

    Args:
        family: Its grid.
        width: Width of the final image in pixels.
        height: Its height.
        factors: One size factor per handoff, first to last.

    Returns:
        (width, height) of each stage, first to last; one more than there are factors.

    Raises:
        MrFlowError: A side is out of range.
    """
    final = covering_size(family, width, height)
    sizes = [final]
    for index in range(len(factors) - 1, -1, -1):
        over = math.prod(factors[index:])
        sizes.insert(0, (snap(final[0] / over, family.grid), snap(final[1] / over, family.grid)))
    return sizes


def handoff_factors(
    family: Family, factor: float | None, factors: Sequence[float] | None, stages: int | None
) -> tuple[float, ...]:
    """One size factor per handoff, from the three options that can ask for them.

    Args:
        family: Its `factor` is the default.
        factor: One factor for all handoffs.
        factors: A factor for each handoff; excludes `factor`.
        stages: Number of stages, 2 by default.

    Returns:
        One factor less than there are stages.

    Raises:
        MrFlowError: `factors` is empty, too long, or given beside another option that it contradicts.
    """
    if factors is not None:
        if factor is not None or (stages is not None and stages != len(factors) + 1):
            raise MrFlowError(f"factors={quoted(tuple(factors))} gives every size step; leave factor and stages out.")
        if not factors:
            raise MrFlowError("factors must hold at least one size step, got none; for one stage use native=True.")
        checked_whole(len(factors), "the count of factors", 1, MAX_STAGES - 1)
        return tuple(factors)
    return (family.factor if factor is None else factor,) * ((2 if stages is None else stages) - 1)


def size_step(family: Family, options: Mapping[str, Any]) -> float:
    """How many times larger the final image is than stage 1's.

    Args:
        family: Its `factor` is the default.
        options: Options of a plan; `factor`, `factors` and `stages` count.

    Returns:
        Final side over the side of stage 1.

    Raises:
        MrFlowError: As in `handoff_factors`.
    """
    return math.prod(handoff_factors(family, options.get("factor"), options.get("factors"), options.get("stages")))
