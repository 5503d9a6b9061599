"""Wild inputs: only a sentence comes out, soon, and what is accepted comes back as it was written."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from bench.reliability.inputs import CASES, Case, judge
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.make import make_plan

SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


@pytest.mark.parametrize("name", CASES)
def test_only_a_sentence_comes_out(name: str) -> None:
    @settings(max_examples=40, suppress_health_check=SLOW)
    @given(CASES[name].inputs)
    def give(value: Any) -> None:
        judge(CASES[name], value)

    give()


@pytest.mark.parametrize("name", CASES)
def test_every_way_in_takes_some_of_the_inputs(name: str) -> None:
    quick = settings(max_examples=500, database=None, suppress_health_check=SLOW, phases=[Phase.generate])
    find(CASES[name].inputs, lambda value: judge(CASES[name], value) == "accepted", settings=quick, random=Random(0))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda _: {}["a"], "KeyError"),
        (lambda _: 1 / 0, "ZeroDivisionError"),
        (lambda _: make_plan("demo", 256, 256, factor=1 / 0), "ZeroDivisionError"),
    ],
)
def test_the_judge_lets_faults_through(call: Any, words: str) -> None:
    with pytest.raises(Exception) as caught:
        judge(Case(st.none(), call), None)
    assert type(caught.value).__name__ == words


@pytest.mark.parametrize("sentence", ["", "x" * 5000, "\x1b[31mred", "two\nlines"])
def test_the_judge_refuses_bad_sentences(sentence: str) -> None:
    def refuse(_: object) -> None:
        raise MrFlowError(sentence)

    with pytest.raises(AssertionError):
        judge(Case(st.none(), refuse), None)
