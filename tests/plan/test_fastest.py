"""Which stages are fastest: counted, and from one measured run."""

from __future__ import annotations

import pytest

from mrflow_sched import make_plan
from mrflow_sched.plan.cost import Speeds, part_costs
from mrflow_sched.plan.families import FAMILIES, get_family
from mrflow_sched.plan.fastest import fastest_plan


@pytest.mark.parametrize("side", [1024, 2048, 4096])
def test_no_tried_plan_is_cheaper_and_the_first_stage_is_one_the_model_knows(side: int) -> None:
    family = get_family("flux1-dev")
    found = fastest_plan(family, side, side)
    assert found.cost <= found.usual_cost <= found.native
    assert found.usual == make_plan(family, side, side)
    first = found.plan.stages[0]
    assert family.min_low_side <= first.width <= family.native_size[0] * 1.08
    parts = part_costs(found.plan)
    assert parts is not None
    assert found.cost == pytest.approx(sum(part.flop for part in parts))
    for stages, factor in ((2, 2.0), (3, 2.0), (2, 1.5)):
        other = make_plan(family, side, side, stages=stages, factor=factor)
        low = other.stages[0].width
        if family.min_low_side <= low <= family.native_size[0] * 1.07:
            assert found.cost <= sum(part.flop for part in part_costs(other) or ())


def test_seconds_decide_where_a_machine_was_measured() -> None:
    family = get_family("flux1-dev")
    # A machine on which a forward costs a second whatever its size: fewer forwards win.
    slow = Speeds(network=1e-20, forward=1.0, decode=0.0, encode=0.0, upscale=0.0)
    found = fastest_plan(family, 4096, 4096, speeds=slow)
    assert found.plan.forwards == min(make_plan(family, 4096, 4096, stages=count).forwards for count in (3, 4))
    assert found.native == pytest.approx(50.0, rel=1e-3)


def test_a_distilled_model_at_its_own_size_gains_little() -> None:
    found = fastest_plan(get_family("flux1-schnell"), 1024, 1024)
    assert 1.0 < found.native / found.usual_cost < 3.0


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_has_a_fastest_plan(name: str) -> None:
    family = get_family(name)
    width, height = (round(1.4 * side) for side in family.native_size)
    if part_costs(make_plan(family, width, height)) is None:
        pytest.skip("its cost is unknown")
    found = fastest_plan(family, width, height)
    assert found.tried >= 1
    assert found.cost > 0
