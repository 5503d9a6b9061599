"""What a number of a plan may be, and the sentence for one that may not."""

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
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise MrFlowError(f"{name} must be a whole number {span}, got {value!r}{f'; {advice}' if advice else ''}.")


def check_side(value: object, name: str) -> None:
    check_whole(value, name, 1, MAX_SIDE, "it is a side of the image in pixels")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if not (is_number(low) and is_number(high) and 0.0 <= low < high <= 1.0):
        raise MrFlowError(f"guidance_interval must be two sigmas, 0 <= low < high <= 1, got {interval!r}.")
    return float(low), float(high)


def check_tile(tile: int, family: Family | None = None) -> None:
    """A tile is a side in pixels, or 0; with a `family`, one that its network can see something in."""
    check_whole(tile, "tile", 0, MAX_SIDE)
    least = LEAST_TILE if family is None else max(LEAST_TILE, round(family.min_low_side / 2))
    if 0 < tile < least:
        raise MrFlowError(f"tile must be 0 (none) or {least} pixels and more a side, got {tile!r}.")


def check_number(value: object, name: str, low: float, high: float) -> None:
    """Raise MrFlowError unless `value` is a number from `low` to `high`; NaN and infinity are none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise MrFlowError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}.")


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise MrFlowError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}.")
