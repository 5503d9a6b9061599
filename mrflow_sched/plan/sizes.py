"""Sizes of images: on the model's grid, from stage to stage, and how an image fills a box of another shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.plan.checks import MAX_FACTOR, MAX_STAGES, checked_side, checked_whole
from mrflow_sched.plan.families import Family
from mrflow_sched.plan.families.base import steps_in

MAX_PICTURE_SIDE = 2**31
"""The largest side of a picture that formats can hold."""
UPSCALER_STEP = 2.0
"""The size step of the upscaler files that most people have: what they make needs no further resizing."""
_LEAST_STEP = 4 / 3  # a step below this costs a stage and gains little
_MOST_LATER = 3  # stages after the first, where their number is chosen
_OF_SIZES = ("factor", "factors", "stages")
# Rounding to the grid may change a size by this share before it counts as another.
_SLACK = 0.05
# Two stages of the usual factor are kept where stage 1 has at most this many times the native area.
_MOST_AREA = 1.15
# How far a stage's sides may move from where its size step puts them, so that it has the final image's shape.
_SHAPE_ROOM = 0.1

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
        family: A token covers a square of `vae_factor` x `patch` pixels a side.
        size: (width, height) in pixels.

    Returns:
        Tokens, without those of the text.
    """
    side = family.vae_factor * family.patch
    return math.ceil(size[0] / side) * math.ceil(size[1] / side)


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


# ------------------------------------------------------------------------------------------------ sizes that are chosen


def chosen_sizes(family: Family, width: int, height: int, options: Mapping[str, Any]) -> list[tuple[int, int]] | None:
    """The sizes of stages for an image so large that two stages of the usual factor would begin beyond the model.

    Stage 1 gets the area of the family's native size: at most a tenth more, and up to a fifth less where the grid has
    the final image's shape there. Two kinds of images get less. Just beyond what two stages reach it is down to 0.53
    times, as the step before the last would else be too small to be worth a stage. Of a long strip stage 1 gets no side
    above twice the native one, down to the least area that the model knows.

    The last size step is `UPSCALER_STEP` or slightly less; there are as many stages as it takes for no step to be
    larger, but at most four, and no more than the model has room for. A stage may be some per cent off its size step
    for the shape of the final image.

    Args:
        family: Its grid, native size and least size.
        width: Width of the final image in pixels.
        height: Its height.
        options: Of the plan. `factor`, `factors` and `stages` leave nothing to choose; a preset such as "10+1+1" sets
            the number of stages.

    Returns:
        (width, height) of each stage, first to last; None where nothing is to be chosen: half the image has at most
        1.15 times the native area, or the options say it.

    Raises:
        MrFlowError: A side is out of range.
    """
    final = covering_size(family, width, height)
    if any(options.get(name) is not None for name in _OF_SIZES):
        return None
    side, longest = math.sqrt(math.prod(final)), max(final)
    native, reach = math.sqrt(math.prod(family.native_size)), 2.0 * max(family.native_size)
    most = 2.0 * math.sqrt(_MOST_AREA)
    if side <= most * native and longest <= most * reach:
        return None
    over = max(side / native, min(longest / reach, side / family.min_low_side))
    counts = steps_in(options.get("preset") or "")
    if len(counts) > 2:
        later = len(counts) - 1
    else:
        later = min(math.ceil(math.log2(over / (1.0 + _SLACK))), _MOST_LATER)
        if later < 2:  # a strip so thin that stage 1 can hardly be smaller
            return None
        split = max(over, UPSCALER_STEP * _LEAST_STEP ** (later - 1))
        if side / split >= (1.0 - _SLACK) * family.min_low_side:
            over = split
        else:  # a model of one size: no room for a stage more
            later -= 1
    first = over if later < 2 else min((over / UPSCALER_STEP) ** (1 / (later - 1)), MAX_FACTOR)
    if first < _LEAST_STEP * (1.0 - _SLACK):  # more stages were asked for than there is room for
        return None
    overs = [first ** (later - 1 - index) * (UPSCALER_STEP if later > 1 else first) for index in range(later)]
    # A model without sizes below its native one begins slightly above it.
    below = family.min_low_side <= (1.0 - _SHAPE_ROOM) * native
    rooms = [(1.0 - _SHAPE_ROOM, 1.0) if below else (1.0, 1.0 + _SLACK), *[(1.0, 1.0 + _SHAPE_ROOM)] * (later - 1)]
    # Neither the shape nor the grid may lead out of the model's range.
    leasts = [(1.0 - 2.0 * _SLACK) * family.min_low_side, *[0.0] * (later - 1)]
    parts = zip(overs, rooms, leasts, strict=True)
    return [*(_shaped(family, final, each, room, least) for each, room, least in parts), final]


def _shaped(
    family: Family, final: tuple[int, int], over: float, room: tuple[float, float], least: float
) -> tuple[int, int]:
    """The size near `final` / `over`, within `room` of it, that has the final image's shape best, and is nearest.

    Where there is one, it has at least the area of a square of side `least`.
    """
    grid, wanted = family.grid, final[0] / over
    nearest = snap(wanted, grid)
    widths = {nearest, *range(snap(wanted * room[0], grid), snap(wanted * room[1], grid) + 1, grid)}

    def misfit(size: tuple[int, int]) -> tuple[float, int]:
        shape = abs(math.log(size[0] * final[1] / (size[1] * final[0])))
        return round(shape, 6), abs(size[0] - nearest)

    sizes = [(each, snap(each * final[1] / final[0], grid)) for each in widths]
    return min([size for size in sizes if math.sqrt(math.prod(size)) >= least] or sizes, key=misfit)


def from_an_image(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a plan whose stage 1 is a given image, as large as it is: there is no size to choose for it.

    Args:
        options: Of the plan.

    Returns:
        The same options; with two stages where they do not say otherwise.
    """
    told = (
        any(options.get(name) is not None for name in ("native", *_OF_SIZES))
        or len(steps_in(options.get("preset") or "")) > 2
    )
    return {**options} if told else {**options, "stages": 2}
