"""Which share of its image tokens a network sees at each step: Just-in-Time sampling, and sparse refining.

Just-in-Time (arXiv 2603.10744) walks one stage at the final size from noise to image, at first on a third of the
tokens; sparse refining runs a later stage on the tokens that have most to gain (docs/sparse.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.plan.checks import MAX_STEPS, checked_number, listed
from mrflow_sched.plan.recipes import read_number

__all__ = ["JIT", "JitMethod", "JitSchedule", "checked_shares", "read_shares", "token_count", "write_shares"]

JitMethod = Literal["jit-4x", "jit-7x"]
Shares = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class JitSchedule:
    """A published schedule of Just-in-Time sampling: equation 6 and the presets of its code.

    Attributes:
        steps: Solver steps.
        tokens: Share of the tokens in each phase, rising to 1.
        ends: Share of the steps after which each phase ends, rising to 1; rounded down to whole steps.
        recipe: The schedule of sigmas (`recipes.sigmas_from_recipe`).
    """

    steps: int
    tokens: Shares
    ends: Shares
    recipe: str

    @property
    def shares(self) -> Shares:
        """Share of the tokens at each step."""
        found: list[float] = []
        for share, end in zip(self.tokens, self.ends, strict=True):
            found += [share] * (int(self.steps * end) - len(found))
        return tuple(found)


JIT: Mapping[str, JitSchedule] = MappingProxyType(
    {
        "jit-4x": JitSchedule(18, (0.35, 0.62, 1.0), (0.4, 0.65, 1.0), "low-beta 18 alpha=1.4 beta=0.425"),
        "jit-7x": JitSchedule(11, (0.32, 0.6, 1.0), (0.4, 0.65, 1.0), "low-beta 11 alpha=1.4 beta=0.425"),
    }
)
"""The schedules by the names that they were published under: "4x" and "7x" against 50 dense steps."""


def checked_shares(shares: object, steps: int) -> Shares:
    """The shares of a stage's tokens, one for each step.

    Args:
        shares: () for all tokens at every step, else `steps` numbers above 0 and at most 1 that never fall: what the
            network has begun to see, it sees to the end.
        steps: Of the stage.

    Returns:
        The shares as floats; () where all are 1.

    Raises:
        MrFlowError: They are none.
    """
    given = listed(shares)
    if not isinstance(shares, (tuple, list)) or (given and len(given) != steps):
        raise MrFlowError(f"shares must hold one share of the tokens for each of {steps} steps, got {quoted(given)}.")
    found = tuple(checked_number(share, "shares", 1e-4, 1.0, "it is a share of the tokens") for share in given)
    if list(found) != sorted(found):
        raise MrFlowError(f"shares must never fall from step to step, got {quoted(given)}.")
    return () if all(share == 1.0 for share in found) else found


def token_count(tokens: int, share: float) -> int:
    """A share of a stage's tokens as a number of tokens.

    Args:
        tokens: Of the stage.
        share: Above 0, at most 1.

    Returns:
        Rounded down as the published code does, but at least 1.
    """
    return max(1, int(share * tokens + 1e-9))


def write_shares(shares: Shares) -> str:
    """Shares as a plan's line holds them.

    Args:
        shares: One for each step.

    Returns:
        "0.35*7/0.62*4/1.0*7", say.
    """
    runs: list[tuple[float, int]] = []
    for share in shares:
        count = runs.pop()[1] if runs and runs[-1][0] == share else 0
        runs.append((share, count + 1))
    return "/".join(f"{share!r}*{count}" for share, count in runs)


def read_shares(text: str) -> Shares:
    """Read what `write_shares` wrote.

    Args:
        text: The text.

    Returns:
        One share for each step.

    Raises:
        MrFlowError: It is none; the sentence stands within another one.
    """
    found: list[float] = []
    for part in text.split("/")[: MAX_STEPS + 1]:
        share, _, count = part.partition("*")
        if not (count.isascii() and count.isdigit() and len(count) < 5) or len(found) + int(count) > MAX_STEPS:
            raise MrFlowError(f"{quoted(text)} is not a list of shares such as 0.35*7/1.0*11")
        found += [read_number(share)] * int(count)
    return tuple(found)
