"""Shares of tokens in plans: schedules, costs, the line of text, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mrflow_sched import MrFlowError, StagedPlan, make_plan
from mrflow_sched.plan.cost import part_costs
from mrflow_sched.plan.schedule import low_beta_sigmas
from mrflow_sched.plan.token_shares import JIT, checked_shares, read_shares, write_shares


def test_the_schedules_are_the_published_ones() -> None:
    # Sigmas of the method's own code for FLUX.1-dev (18 and 11 steps), to four digits.
    slow, fast = low_beta_sigmas(18), low_beta_sigmas(11)
    assert [round(sigma, 4) for sigma in slow[:8]] == [1.0, 0.9992, 0.9959, 0.9894, 0.9792, 0.9646, 0.9454, 0.9209]
    assert [round(sigma, 4) for sigma in slow[-4:]] == [0.4325, 0.2964, 0.0556, 0.0]
    assert [round(sigma, 4) for sigma in fast] == [
        *(1.0, 0.9973, 0.9863, 0.9643, 0.929, 0.8779, 0.8081, 0.7149, 0.5907, 0.4184, 0.0909, 0.0)
    ]
    assert fast[-2] == pytest.approx(1 / 11)
    assert all(first > second for first, second in itertools.pairwise(slow))
    assert JIT["jit-4x"].shares == (0.35,) * 7 + (0.62,) * 4 + (1.0,) * 7
    assert JIT["jit-7x"].shares == (0.32,) * 4 + (0.6,) * 3 + (1.0,) * 4


@pytest.mark.parametrize(("name", "evaluations"), [("jit-4x", 11.93), ("jit-7x", 7.08)])
def test_costs_count_the_tokens_that_are_seen(name: Any, evaluations: float) -> None:
    plan = make_plan("flux1-dev", 1024, 1024, method=name)
    assert plan.forwards == JIT[name].steps
    # Tokens alone give the published number; text beside them and attention move it a little.
    shares = plan.stages[0].shares
    assert sum(shares) == pytest.approx(evaluations, abs=0.01)
    assert sum(plan.stage_costs()) == pytest.approx(evaluations, rel=0.03)


def test_a_refined_share_costs_less_and_context_costs_more() -> None:
    def last(**options: Any) -> float:
        parts = part_costs(make_plan("flux1-dev", 2048, 2048, **options))
        assert parts is not None
        return next(part.flop for part in parts if part.name == "stage 2 sample")

    dense, half, beside = last(), last(refine_tokens=0.5), last(refine_tokens=0.5, refine_context=0.2)
    assert half < 0.5 * dense  # attention costs less than its share
    assert half < beside < dense
    assert last(refine_tokens=1.0) == dense


def test_one_share_for_each_later_stage() -> None:
    plan = make_plan("flux1-dev", 4096, 4096, refine_tokens=[1.0, 0.25], refine_steps=2)
    assert [stage.shares for stage in plan.stages] == [(), (), (0.25, 0.25)]
    with pytest.raises(MrFlowError, match="refine_tokens must be one number or 2"):
        make_plan("flux1-dev", 4096, 4096, refine_tokens=[1.0, 0.5, 0.5])


@pytest.mark.parametrize(
    "options",
    [
        {"method": "jit-4x"},
        {"method": "jit-7x", "guidance": 2.0, "seed": 5},
        {"refine_tokens": 0.3, "refine_context": 0.1},
        {"refine_tokens": 0.123456789, "refine_steps": 3},
    ],
    ids=str,
)
def test_a_plan_with_shares_is_read_back_whole(options: dict[str, Any]) -> None:
    plan = make_plan("flux1-dev", 1024, 768, **options)
    assert StagedPlan.from_string(plan.to_string()) == plan
    assert StagedPlan.from_json(plan.to_json()) == plan


def test_plans_without_shares_have_the_line_of_before() -> None:
    line = make_plan("flux1-dev", 1024, 1024).to_string()
    assert "shares" not in line
    assert "context" not in line


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "jit-4x", "low_steps": 8}, "method=jit-4x has its own steps and sigmas"),
        ({"method": "jit-4x", "solver": "heun"}, "leave solver='heun' out"),
        ({"method": "jit-4x", "preset": "12+1"}, "leave preset='12\\+1' out"),
        ({"method": "jit-5x"}, "method must be 'jit-4x' or 'jit-7x', got 'jit-5x'"),
        ({"refine_tokens": 0.5, "tile": 512}, "tile must be 0 where a stage's shares leave tokens out"),
        ({"refine_tokens": 0.0}, "refine_tokens must be a number from 0.01 to 1, got 0.0"),
        ({"refine_tokens": "half"}, "refine_tokens must be a number from 0.01 to 1, got 'half'"),
        ({"refine_context": 0.6}, "refine_context must be a number from 0 to 0.5"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MrFlowError, match=sentence):
        make_plan("flux1-dev", 1024, 1024, **options)


def test_just_in_time_is_for_flow_models() -> None:
    with pytest.raises(MrFlowError, match="is for flow models whose network takes tokens; Stable Diffusion XL is none"):
        make_plan("sdxl", 1024, 1024, method="jit-4x")


def test_the_solver_and_the_upscaler_that_hosts_say_do_no_harm() -> None:
    plan = make_plan("flux1-dev", 1024, 1024, method="jit-4x", solver="euler", upscaler_kind="interpolation")
    assert len(plan.stages) == 1


def test_context_without_a_share_has_no_effect_and_says_so() -> None:
    plan = make_plan("flux1-dev", 1024, 1024, refine_context=0.1)
    assert plan.context == 0.0
    assert any("refine_context=0.1 has no effect" in note for note in plan.notes)


@pytest.mark.parametrize("shares", [(0.5,), (0.5, 0.4), (0.0, 1.0), (0.5, 1.5), "ab", (float("nan"), 1.0), None, 3])
def test_shares_that_are_none_are_refused(shares: Any) -> None:
    with pytest.raises(MrFlowError, match="shares"):
        checked_shares(shares, 2)


@pytest.mark.parametrize("text", ["", "0.5", "0.5*", "*3", "0.5*-1", "0.5*99999", "0.5*2/", "0.5*1001", "x*2", "0.5*²"])
def test_hostile_texts_of_shares_are_refused(text: str) -> None:
    with pytest.raises(MrFlowError):
        read_shares(text)


def test_shares_are_written_short() -> None:
    assert write_shares(JIT["jit-4x"].shares) == "0.35*7/0.62*4/1.0*7"
    assert read_shares("0.35*7/0.62*4/1.0*7") == JIT["jit-4x"].shares
    assert checked_shares((1, 1.0), 2) == ()
