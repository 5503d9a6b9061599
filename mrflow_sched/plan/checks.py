"""What a number of a plan may be, and the refusal of one that may not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from mrflow_sched._runtime.errors import MrFlowError, quoted

if TYPE_CHECKING:
    from mrflow_sched.plan.families import Family

SeedRule = Literal["offset", "hash"]
Posterior = Literal["mode", "sample"]
Noise = Literal["own", "nested"]
TilePositions = Literal["whole", "own"]
UpscalerKind = Literal["network", "interpolation"]
Precision = Literal["own", "int8", "int8-dynamic", "fp8", "fp8-dynamic", "int4"]
Number = TypeVar("Number", int, float)

MIN_FACTOR, MAX_FACTOR = 1.25, 4.0
MAX_SIDE = 32768
MAX_FIRST_PIXELS = 2**26
"""The largest stage 1 in pixels, 8192x8192: it starts from noise, whose size is not bounded by any picture."""
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


def plain(value: object) -> object:
    """Numbers, arrays and tensors of other libraries as Python's numbers and lists, so that plans hold only those.

    Args:
        value: Anything; the items of a list or tuple are made plain too.

    Returns:
        What its `tolist` gives where it has one (NumPy, torch), an int or float for another number (a fraction), else
        the value itself.
    """
    if isinstance(value, (list, tuple)):
        items = [_plain(each) for each in cast("Sequence[object]", value)]
        return items if isinstance(value, list) else tuple(items)
    return _plain(value)


def _plain(value: object) -> object:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    try:
        return cast("Any", value).tolist()
    except Exception:  # has none, or holds no values (a tensor on "meta")
        return value


def checked_whole(value: object, name: str, low: int, high: int | None = None, advice: str = "") -> int:
    """A whole number in a range as Python's int.

    Args:
        value: The value that came; True and False are refused.
        name: The argument's name, for the refusal.
        low: The smallest value allowed.
        high: The largest; None: no limit.
        advice: Ends the refusal, after a semicolon.

    Returns:
        The same number.

    Raises:
        MrFlowError: `value` is not a whole number from `low` to `high`.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < low or (high is not None and number > high):
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise MrFlowError(
            f"{name} must be a whole number {span}, got {quoted(value)}{f'; {advice}' if advice else ''}."
        )
    return number


def checked_side(value: object, name: str) -> int:
    """A side of an image as Python's int.

    Args:
        value: Pixels.
        name: The argument's name, for the refusal.

    Returns:
        The same number.

    Raises:
        MrFlowError: `value` is not a whole number from 1 to `MAX_SIDE`.
    """
    return checked_whole(value, name, 1, MAX_SIDE, "it is a side of the image in pixels")


def is_number(value: object) -> bool:
    """Whether a value is an int or a float; True and False are neither.

    Args:
        value: Anything, made `plain` before.

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
    ends = listed(plain(interval))
    low, high = cast("tuple[float, float]", ends if len(ends) == 2 else (None, None))
    if not (is_number(low) and is_number(high) and 0.0 <= low < high <= 1.0):
        raise MrFlowError(f"guidance_interval must be two sigmas, 0 <= low < high <= 1, got {quoted(interval)}.")
    return float(low), float(high)


def checked_tile(tile: object, family: Family | None = None) -> int:
    """The side of a tile as Python's int.

    Args:
        tile: Pixels; 0 means no tiles.
        family: Its `min_low_side` sets the least tile, half of it; None: `LEAST_TILE`.

    Returns:
        The same number.

    Raises:
        MrFlowError: `tile` is above `MAX_SIDE`, or above 0 and too small.
    """
    side = checked_whole(tile, "tile", 0, MAX_SIDE)
    least = LEAST_TILE if family is None else max(LEAST_TILE, round(family.min_low_side / 2))
    if 0 < side < least:
        raise MrFlowError(f"tile must be 0 (none) or {least} pixels and more a side, got {side}.")
    return side


def checked_number(value: object, name: str, low: float, high: float, advice: str = "") -> float:
    """A number in a range as a float; NaN and infinity are in none.

    Args:
        value: The value that came.
        name: The argument's name, for the refusal.
        low: The smallest value allowed.
        high: The largest.
        advice: Ends the refusal, after a semicolon.

    Returns:
        The same number.

    Raises:
        MrFlowError: `value` is not a number from `low` to `high`.
    """
    number = plain(value)
    if not is_number(number) or not low <= cast("float", number) <= high:
        more = f"; {advice}" if advice else ""
        raise MrFlowError(f"{name} must be a number from {low:g} to {high:g}, got {quoted(value)}{more}.")
    return float(cast("float", number))


def listed(value: object) -> Sequence[object]:
    """The items of a list or a tuple.

    Args:
        value: Anything.

    Returns:
        The items in order; none for anything that is no list or tuple.
    """
    return cast("Sequence[object]", value) if isinstance(value, (tuple, list)) else ()


def checked_numbers(values: object, name: str, most: int) -> tuple[float, ...]:
    """Several numbers as floats.

    Args:
        values: A list, a tuple, an array or a tensor of one axis.
        name: The argument's name, for the refusal.
        most: How many there may be.

    Returns:
        The same numbers; NaN and infinity are let through.

    Raises:
        MrFlowError: `values` is no such thing, holds something else than numbers, or too many.
    """
    wrong = MrFlowError(f"{name} must be a list of numbers, got {quoted(values)}.")
    try:
        given = list(islice(cast("Iterable[object]", values), most + 1))
        if isinstance(values, (str, bytes)) or any(isinstance(each, (str, bytes, bool)) for each in given):
            raise wrong
        numbers = tuple(float(cast("float", each)) for each in given)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise wrong from None
    if len(numbers) > most:
        raise MrFlowError(f"{name} must hold at most {most} numbers, got more, beginning {quoted(values)}.")
    return numbers


def checked_flag(value: object, name: str) -> bool:
    """True or False as Python's bool.

    Args:
        value: The value that came.
        name: The argument's name, for the refusal.

    Returns:
        The same value.

    Raises:
        MrFlowError: `value` is neither.
    """
    flag = plain(value)
    if not isinstance(flag, bool):
        raise MrFlowError(f"{name} must be True or False, got {quoted(value)}.")
    return flag


def check_choice(value: object, name: str, choices: Sequence[str]) -> None:
    """Refuse a word that is not one of several.

    Args:
        value: The word that came.
        name: The argument's name, for the refusal.
        choices: The words that are allowed.

    Raises:
        MrFlowError: `value` is not among `choices`.
    """
    if not isinstance(value, str) or value not in choices:
        raise MrFlowError(f"{name} must be {' or '.join(map(repr, choices))}, got {quoted(value)}.")
