"""The precision of each stage in a plan: its default, its line and JSON, its memory, its refusals."""

from __future__ import annotations

from typing import Any

import pytest

from mrflow_sched import StagedPlan, make_plan
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.cost import peak_memory


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["own", "own", "own"]),
        ({"precision": "int8"}, ["int8", "int8", "int8"]),
        ({"refine_precision": "fp8"}, ["own", "fp8", "fp8"]),
        ({"precision": "int4", "refine_precision": "own"}, ["int4", "own", "own"]),
    ],
    ids=str,
)
def test_later_stages_have_the_first_ones_unless_they_say_otherwise(options: Any, names: list[str]) -> None:
    plan = make_plan("flux1-dev", 2048, 2048, stages=3, **options)
    assert [stage.precision for stage in plan.stages] == names
    for again in (StagedPlan.from_string(plan.to_string()), StagedPlan.from_json(plan.to_json())):
        assert again == plan
    assert ("precision" in plan.to_string()) == bool(options)


def test_a_twin_is_counted_once_for_each_precision() -> None:
    weights = {name: peak_memory(make_plan("flux1-dev", 1024, 1024, **options)) for name, options in _ASKED.items()}
    own, one, both, two = (getattr(weights[name], "weights", 0.0) for name in ("own", "one", "both", "two"))
    network = 11.9e9
    assert one - own == pytest.approx(1.02 * network, rel=0.01)
    assert both == one
    assert two - one == pytest.approx(0.55 * network, rel=0.01)


_ASKED: dict[str, Any] = {
    "own": {},
    "one": {"precision": "int8", "refine_precision": "own"},
    "both": {"precision": "int8"},
    "two": {"precision": "int8", "refine_precision": "int4"},
}


@pytest.mark.parametrize("options", [{"precision": "int3"}, {"refine_precision": 8}, {"precision": True}], ids=str)
def test_other_names_are_refused(options: Any) -> None:
    with pytest.raises(MrFlowError, match="must be one of own, int8, int8-dynamic, fp8, fp8-dynamic, int4, got"):
        make_plan("flux1-dev", 1024, 1024, **options)


def test_a_line_with_another_precision_is_no_plan() -> None:
    line = make_plan("flux1-dev", 1024, 1024, precision="int8").to_string().partition(";#")[0]
    with pytest.raises(MrFlowError, match="precision must be"):
        StagedPlan.from_string(line.replace("precision=int8", "precision=float1"))
