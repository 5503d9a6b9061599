"""Orders of drafts: exact over all sets, ties counted, nothing promised that is not there."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.measure.ranking import expected_gain, order, report, spearman, tied
from mrflow_sched.measure.scores import get_score

FEW_VALUES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=7)


def over_all_sets(drafts: Sequence[float], finished: Sequence[float], n: int) -> tuple[float, float, float]:
    """Gain, oracle's gain and agreement by going through every set; of drafts that tie, each is as likely."""
    gains, oracles, same = [], [], []
    for rows in combinations(range(len(drafts)), n):
        top = max(drafts[row] for row in rows)
        chosen = [finished[row] for row in rows if drafts[row] == top]
        best = max(finished[row] for row in rows)
        gains.append(sum(chosen) / len(chosen))
        oracles.append(best)
        same.append(sum(each == best for each in chosen) / len(chosen))
    mean = sum(finished) / len(finished)
    return (sum(gains) / len(gains) - mean, sum(oracles) / len(oracles) - mean, sum(same) / len(same))


@settings(max_examples=60)
@given(FEW_VALUES, st.data())
def test_the_gain_is_the_mean_over_all_sets(pairs: list[tuple[int, int]], data: Any) -> None:
    drafts, finished = ([float(each[side]) for each in pairs] for side in (0, 1))
    n = data.draw(st.integers(1, len(pairs)))
    found = expected_gain(drafts, finished, n)
    assert (found.gain, found.oracle, found.agreement) == pytest.approx(over_all_sets(drafts, finished, n), abs=1e-9)


def test_gains_of_many_drafts() -> None:
    """Of N equally spaced values the largest of n has the mean rank n (N + 1) / (n + 1)."""
    values = torch.arange(1.0, 2001.0)
    for n in (1, 4, 1000, 2000):
        found = expected_gain(values, values, n)
        assert found.gain == pytest.approx(n * 2001 / (n + 1) - 1000.5, rel=1e-9, abs=1e-6)
        assert found.agreement == pytest.approx(1)
    assert expected_gain(values, values.flip(0), 4).gain == pytest.approx(-expected_gain(values, values, 4).gain)


def test_a_skewed_score_gains_less_than_the_normal_rule() -> None:
    """All pictures equal but one bad one: the order is perfect, and there is nearly nothing to gain."""
    values = torch.ones(64)
    values[0] = -10
    values += torch.linspace(0, 1e-3, 64)
    found = expected_gain(values, values, 8)
    assert spearman(values, values) == pytest.approx(1)
    assert found.deviations is not None
    assert found.deviations < 0.2 < 1.42


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 100]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # Ranks 1.5 1.5 3 4 against 1 2 3 4: covariance 4.5, deviations sqrt(4.5) and sqrt(5).
    assert spearman([1, 1, 3, 4], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_several_scores_count_by_the_mean_of_their_ranks() -> None:
    columns = [[1.0, 2.0, 3.0, 0.0], [50.0, 90.0, 0.0, 1.0]]  # ranks 1 2 3 0 and 2 3 0 1

    def score(column: list[float]) -> Any:
        return get_score(lambda images, prompts: torch.tensor(column))

    images, prompts = torch.zeros(4, 3, 4, 4), ["x"] * 4
    rows, best_first = order(images, prompts, [score(each) for each in columns])
    assert rows == tuple(zip(*columns, strict=True))
    assert best_first == (1, 0, 2, 3)  # means 2.5, 1.5, 1.5 (which came later), 0.5
    assert order(images, prompts, [score([1.0, 1.0, 2.0, 1.0])])[1] == (2, 0, 1, 3)
    with pytest.raises(MrFlowError, match="scores is empty"):
        order(images, prompts, [])
    with pytest.raises(MrFlowError, match="gave nan"):
        order(images, prompts, [score(columns[0]), score([0.0, math.nan, 0.0, 0.0])])


def test_a_report_before_anything_is_finished_is_an_upper_bound() -> None:
    drafts = torch.linspace(0, 1, 8)
    found = report(drafts, score="sharpness")
    assert (found.finished, found.correlation, found.same_best) == (False, None, None)
    assert [gain.n for gain in found.gains] == [2, 4, 8]
    assert found.gains[-1].gain == pytest.approx(0.5)
    lines = found.lines()
    assert lines[0] == "sharpness: 8 drafts, none tied."
    assert all("at most" in line for line in lines[1:])


def test_a_report_says_ties_and_what_was_kept() -> None:
    drafts, finished = [3.0, 3.0, 1.0, 0.0], [2.0, 5.0, 1.0, 0.0]
    found = report(drafts, finished, score="mine\x1b")
    assert (found.tied_drafts, found.tied_finished, tied(drafts)) == (2, 0, 2)
    assert found.same_best is False
    text = " ".join(found.lines())
    assert "2 tied among the drafts, none tied among the pictures" in text
    assert "of 4 pictures: mostly chance" in text
    assert text.isprintable()
    whole = found.gains[-1]
    assert whole.share == pytest.approx(1.5 / 3)  # one of the two that tie: (2 + 5) / 2 - 2, of 5 - 2
    assert json.loads(json.dumps(found.to_dict()))["gains"][-1]["share"] == pytest.approx(0.5)


def test_equal_scores_gain_nothing_and_say_so() -> None:
    found = report([1.0] * 4, [2.0] * 4)
    assert found.correlation is None
    assert all(gain.share is None and gain.deviations is None and gain.gain == 0 for gain in found.gains)
    assert "all scores of one side are equal" in found.lines()[0]
    assert "4 tied among the drafts, 4 tied among the pictures" in found.lines()[0]
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("drafts", "finished", "sentence"),
    [
        ([1.0], [1.0], "draft_scores must be a list of 2 or more numbers"),
        ([1.0, 2.0], [1.0], "finished_scores must be a list of 2 or more"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "finished_scores has 3 numbers and draft_scores 2"),
        ([1.0, math.nan], [1.0, 2.0], "draft_scores holds NaN"),
        ([1.0, 2.0], [1.0, math.inf], "finished_scores holds NaN or infinity"),
        (["a", "b"], [1.0, 2.0], "draft_scores must be a list of numbers"),
        (torch.zeros(2, 2), torch.zeros(2, 2), "draft_scores must be a list"),
    ],
)
def test_wrong_numbers_get_one_sentence(drafts: Any, finished: Any, sentence: str) -> None:
    with pytest.raises(MrFlowError, match=sentence):
        report(drafts, finished)


@pytest.mark.parametrize("n", [0, 5, 2.5, True, "2"])
def test_n_is_a_number_of_drafts(n: Any) -> None:
    values: Tensor = torch.arange(4.0)
    with pytest.raises(MrFlowError, match=r"^n "):
        expected_gain(values, values, n)
