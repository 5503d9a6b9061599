"""What a number of a plan may be, and the refusal of one that may not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.families import Family

SeedRule = Literal["offset", "hash"]
Posterior = Literal["mode", "sample"]
Number = TypeVar("Number", int, float)

MIN_FACTOR, MAX_FACTOR = 1.25, 4.0
MAX_SIDE = 32768
LEAST_TILE = 64
MAX_STEPS = 1000
MAX_STAGES = 8
MAX_GUIDANCE = 100
MAX_SEED = 2**63 - 1
# Plans are read from image metadata, which anyone can write: no number there may be larger than a real plan's.
MAX_TOKENS = MAX_SIDE**2
MAX_FORWARDS = 1_000_000
MAX_SCALE = 1000.0


# ------------------------------------------------------------------------------------------------------------- checks


def check_whole(value: object, name: str, low: int, high: int | None = None, advice: str = "") -> None:
    """Refuse what is not a whole number in a range.

    Args:
        value: The value that came; True and False are refused.
        name: The argument's name, for the refusal.
        low: The smallest value allowed.
        high: The largest; None: no limit.
        advice: Ends the refusal, after a semicolon.

    Raises:
        MrFlowError: `value` is not a whole number from `low` to `high`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise MrFlowError(f"{name} must be a whole number {span}, got {value!r}{f'; {advice}' if advice else ''}.")


def check_side(value: object, name: str) -> None:
    """Refuse what cannot be a side of an image.

    Args:
        value: Pixels.
        name: The argument's name, for the refusal.

    Raises:
        MrFlowError: `value` is not a whole number from 1 to `MAX_SIDE`.
    """
    check_whole(value, name, 1, MAX_SIDE, "it is a side of the image in pixels")


def is_number(value: object) -> bool:
    """Whether a value is an int or a float; True and False are neither.

    Args:
        value: Anything.

    Returns:
        True also for NaN and infinity.
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """The two ends of a range of sigma as floats.

    Args:
        interval: (low, high), with 0 <= low < high <= 1.

    Returns:
        The same two numbers.

    Raises:
        MrFlowError: `interval` is anything else.
    """
    low, high = interval
    if not (is_number(low) and is_number(high) and 0.0 <= low < high <= 1.0):
        raise MrFlowError(f"guidance_interval must be two sigmas, 0 <= low < high <= 1, got {interval!r}.")
    return float(low), float(high)


def check_tile(tile: int, family: Family | None = None) -> None:
    """Refuse what cannot be the side of a tile.

    Args:
        tile: Pixels; 0 means no tiles.
        family: Its `min_low_side` sets the least tile, half of it; None: `LEAST_TILE`.

    Raises:
        MrFlowError: `tile` is above `MAX_SIDE`, or above 0 and too small.
    """
    check_whole(tile, "tile", 0, MAX_SIDE)
    least = LEAST_TILE if family is None else max(LEAST_TILE, round(family.min_low_side / 2))
    if 0 < tile < least:
        raise MrFlowError(f"tile must be 0 (none) or {least} pixels and more a side, got {tile!r}.")


def check_number(value: object, name: str, low: float, high: float) -> None:
    """Refuse what is not a number in a range; NaN and infinity are refused.

    Args:
        value: The value that came.
        name: The argument's name, for the refusal.
        low: The smallest value allowed.
        high: The largest.

    Raises:
        MrFlowError: `value` is not an int or a float from `low` to `high`.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise MrFlowError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}.")


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    """Refuse a word that is not one of several.

    Args:
        value: The word that came.
        name: The argument's name, for the refusal.
        choices: The words that are allowed.

    Raises:
        MrFlowError: `value` is not among `choices`.
    """
    if value not in choices:
        raise MrFlowError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}.")
