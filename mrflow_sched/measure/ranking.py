"""Ordering drafts by scores, and what an order of drafts is worth once they are finished.

Everything is counted on the scores at hand. The rule for normal distributions, correlation x E[largest of n], is not
used: for skewed scores it promises twice of what there is (bench/results/ranks.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError, quoted, shown
from mrflow_sched.plan.checks import checked_whole

if TYPE_CHECKING:
    from mrflow_sched.measure.scores import Score

__all__ = ["Gain", "RankReport", "best_first", "expected_gain", "order", "report", "spearman", "tied"]

_FEW = 10
"""Pictures below which a rank correlation is mostly chance."""


@dataclass(frozen=True)
class Gain:
    """What choosing the best of `n` by its draft gives, on average over all sets of `n` of the pictures.

    Attributes:
        n: Drafts to choose from.
        gain: The chosen picture's finished score over the mean of all, in the score's own unit.
        oracle: The same for a choice by the finished scores themselves.
        spread: Standard deviation of the finished scores.
        agreement: In which share of the sets both choices have the same finished score.
    """

    n: int
    gain: float
    oracle: float
    spread: float
    agreement: float

    @property
    def share(self) -> float | None:
        """`gain` / `oracle`; None where there is nothing to gain."""
        return self.gain / self.oracle if self.oracle > 1e-9 * self.spread else None  # above what rounding leaves

    @property
    def deviations(self) -> float | None:
        """`gain` in standard deviations; None where all scores are equal."""
        return self.gain / self.spread if self.spread > 0 else None


@dataclass(frozen=True)
class RankReport:
    """How far the scores of drafts tell those of the finished pictures.

    Attributes:
        score: Name of the score.
        count: Number of drafts.
        finished: Finished scores are known; otherwise the gains are those of the drafts' own scores, an upper bound.
        tied_drafts: Drafts that share their score with another.
        tied_finished: Likewise of the finished pictures; 0 where they are not known.
        correlation: Spearman's rank correlation; None without finished scores, or where one side is all equal.
        same_best: The best draft became the best picture; None without finished scores.
        gains: For sets of 2, 4, 8 ... drafts.
    """

    score: str
    count: int
    finished: bool
    tied_drafts: int
    tied_finished: int
    correlation: float | None
    same_best: bool | None
    gains: tuple[Gain, ...]

    def lines(self) -> list[str]:
        """The report in words.

        Returns:
            One or more sentences, one a line.
        """
        name, count = shown(self.score), self.count
        if not self.finished:
            said = [f"{name}: {count} drafts, {_ties(self.tied_drafts)}."]
            for each in self.gains:
                said.append(
                    f"Finishing the best of {each.n} gains at most {_amount(each)} over one at random, if finishing "
                    "kept the order."
                )
            return said
        if self.correlation is None:
            agree = "no rank correlation, as all scores of one side are equal"
        else:
            agree = f"rank correlation {self.correlation:+.2f}"
        few = f" (of {count} pictures: mostly chance)" if count < _FEW else ""
        best = "is" if self.same_best else "is not"
        said = [
            f"{name}: {count} drafts against their finished pictures: {agree}{few}; the best draft {best} the best "
            f"picture; {_ties(self.tied_drafts)} among the drafts, {_ties(self.tied_finished)} among the pictures."
        ]
        for each in self.gains:
            share = "" if each.share is None else f", {each.share:.0%} of the gain of a choice after finishing all"
            said.append(
                f"Finishing the best of {each.n} gains {_amount(each)} over one at random{share}; the same choice in "
                f"{each.agreement:.0%} of all sets of {each.n}."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values.

        Returns:
            What `json` can write.
        """
        gains = [{**asdict(each), "share": each.share, "deviations": each.deviations} for each in self.gains]
        return {**asdict(self), "gains": gains}


def _ties(count: int) -> str:
    return f"{count} tied" if count else "none tied"


def _amount(gain: Gain) -> str:
    deviations = "" if gain.deviations is None else f" ({gain.deviations:.2f} standard deviations)"
    return f"{gain.gain:.3g}{deviations}"


# ---------------------------------------------------------------------------------------------------------------- order


def order(
    images: Tensor, prompts: Sequence[str], scores: Sequence[Score]
) -> tuple[tuple[tuple[float, ...], ...], tuple[int, ...]]:
    """Score images and put them in order.

    Args:
        images: (B, 3, H, W), floats in [0, 1].
        prompts: What each should show, B texts.
        scores: At least one; several count alike, by the mean of an image's ranks.

    Returns:
        For every image its values, one for each score; and the numbers of the images, best first. Images that tie stay
        in the order in which they came.

    Raises:
        MrFlowError: There is no score, the arguments do not fit, or a score gave no finite number.
    """
    if not scores:
        raise MrFlowError("scores is empty; give at least one score to order by.")
    columns = [score(images, prompts) for score in scores]
    rows = tuple(tuple(float(column[row]) for column in columns) for row in range(len(images)))
    return rows, best_first(rows)


def best_first(rows: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Put images in the order of scores that are known.

    Args:
        rows: For every image its values, one for each score, higher is better.

    Returns:
        As the second value of `order`.
    """
    values = torch.tensor([list(row) for row in rows], dtype=torch.float64)
    place = torch.stack([_ranks(column) for column in values.T]).mean(0)
    return tuple(sorted(range(len(place)), key=lambda index: -float(place[index])))


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties at the mean of theirs (N,)."""
    less = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return less.double() + (equal.double() - 1) / 2


def tied(values: Sequence[float] | Tensor) -> int:
    """How many values share theirs with another.

    Args:
        values: N numbers.

    Returns:
        From 0 to N.
    """
    checked = _checked(values, "values", 1)
    return int(((checked[None] == checked[:, None]).sum(1) > 1).sum())


# --------------------------------------------------------------------------------------------------------------- report


def spearman(a: Sequence[float] | Tensor, b: Sequence[float] | Tensor) -> float | None:
    """Spearman's rank correlation; ties have the mean of their ranks.

    Args:
        a: N finite numbers, 2 or more.
        b: As many.

    Returns:
        From -1 to 1; None where all numbers of one side are equal.

    Raises:
        MrFlowError: The numbers are too few, not finite or not as many.
    """
    first, second = _pair(a, b, ("a", "b"))
    x, y = (_ranks(each) - (len(first) - 1) / 2 for each in (first, second))
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / scale if scale > 0 else None


def expected_gain(draft_scores: Sequence[float] | Tensor, finished_scores: Sequence[float] | Tensor, n: int) -> Gain:
    """What finishing the best of n drafts gives, over all sets of n of the drafts at hand.

    Exact: the chance that a draft is the best of a random set follows from how many drafts lie below it and how many
    tie with it, of which one is then drawn.

    Args:
        draft_scores: N finite numbers, 2 or more.
        finished_scores: As many, in the same order.
        n: 1 to N.

    Returns:
        The mean over all sets.

    Raises:
        MrFlowError: The numbers do not fit.
    """
    drafts, finished = _pair(draft_scores, finished_scores, ("draft_scores", "finished_scores"))
    size = checked_whole(n, "n", 1, len(drafts))
    every = torch.ones(len(drafts), len(drafts), dtype=torch.bool)
    no_better = finished[None] <= finished[:, None]
    above = finished - finished[0]  # equal scores are then exactly nothing
    return Gain(
        n=size,
        gain=float((_chosen(drafts, size, every) * above).sum() - above.mean()),
        oracle=float((_chosen(finished, size, every) * above).sum() - above.mean()),
        spread=float(above.std()),
        agreement=float(_chosen(drafts, size, no_better).sum()),
    )


def _chosen(values: Tensor, n: int, among: Tensor) -> Tensor:
    """Chance of each to be the largest of a random set of n whose other members j all have `among[i, j]`."""
    count = len(values)
    others = among & ~torch.eye(count, dtype=torch.bool)
    less = ((values[None] < values[:, None]) & others).sum(1).double()
    equal = ((values[None] == values[:, None]) & others).sum(1).double()
    total, chance = (
        _log_ways(torch.tensor(float(count), dtype=torch.float64), n),
        torch.zeros(count, dtype=torch.float64),
    )
    for ties in range(min(n - 1, int(equal.max())) + 1):
        chance += (_log_ways(equal, ties) + _log_ways(less, n - 1 - ties) - total).exp() / (ties + 1)
    return chance


def _log_ways(pool: Tensor, taken: int) -> Tensor:
    """Logarithm of the binomial coefficients; -inf where more are taken than there are."""
    left = pool - taken
    ways = torch.lgamma(pool + 1) - torch.lgamma(left.clamp_min(0) + 1) - math.lgamma(taken + 1)
    return torch.where(left >= 0, ways, -torch.inf)


def report(
    draft_scores: Sequence[float] | Tensor,
    finished_scores: Sequence[float] | Tensor | None = None,
    *,
    score: str = "score",
) -> RankReport:
    """What is known of an order of drafts.

    Args:
        draft_scores: N finite numbers, 2 or more, as a `Score` gives them: higher is better.
        finished_scores: Of the finished pictures, in the same order; None before anything is finished.
        score: Name of the score.

    Returns:
        With finished scores, how far the drafts told them; without, the gain that the drafts promise at most.

    Raises:
        MrFlowError: The numbers do not fit.
    """
    told = draft_scores if finished_scores is None else finished_scores
    drafts, finished = _pair(draft_scores, told, ("draft_scores", "finished_scores"))
    known, count = finished_scores is not None, len(drafts)
    sizes = [2**power for power in range(1, count.bit_length()) if 2**power <= count]
    return RankReport(
        score=score,
        count=count,
        finished=known,
        tied_drafts=tied(drafts),
        tied_finished=tied(finished) if known else 0,
        correlation=spearman(drafts, finished) if known else None,
        same_best=bool(finished[drafts.argmax()] == finished.max()) if known else None,
        gains=tuple(expected_gain(drafts, finished, size) for size in sizes),
    )


def _pair(a: Sequence[float] | Tensor, b: Sequence[float] | Tensor, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    first, second = _checked(a, names[0], 2), _checked(b, names[1], 2)
    if len(first) != len(second):
        raise MrFlowError(
            f"{names[1]} has {len(second)} numbers and {names[0]} {len(first)}; give one for each picture."
        )
    return first, second


def _checked(values: Sequence[float] | Tensor, name: str, least: int) -> Tensor:
    try:
        numbers = torch.as_tensor(values).detach().to("cpu", torch.float64)
    except Exception as error:  # whatever torch says of what is no list of numbers
        raise MrFlowError(f"{name} must be a list of numbers, got {quoted(values)}.") from error
    if numbers.ndim != 1 or len(numbers) < least:
        raise MrFlowError(f"{name} must be a list of {least} or more numbers, got shape {tuple(numbers.shape)}.")
    if not bool(numbers.isfinite().all()):
        raise MrFlowError(f"{name} holds NaN or infinity, which has no place in an order; leave that picture out.")
    return numbers
