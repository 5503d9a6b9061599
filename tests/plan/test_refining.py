"""What a preset is without an upscaler's network: more noise, more steps; and what is never overruled."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from mrflow_sched import StagedPlan, get_family, make_plan
from mrflow_sched.apps.plan_lines import plan_lines
from mrflow_sched.plan.cost import part_costs
from mrflow_sched.plan.families import FAMILIES
from mrflow_sched.plan.families.base import Preset
from mrflow_sched.plan.refining import UNAIDED_SIGMA, UNAIDED_STEPS, for_upscaler

FLUX = get_family("flux1-dev")


def unaided(preset: str | None = None, family: str = "flux1-dev", **options: Any) -> StagedPlan:
    return make_plan(family, 1024, 1024, preset, upscaler_kind="interpolation", **options)


def refined(plan: StagedPlan) -> list[tuple[int, float]]:
    return [(stage.steps, stage.start_sigma) for stage in plan.stages[1:]]


@pytest.mark.parametrize(
    ("preset", "options", "name", "expected"),
    [
        (None, {}, "12+2", [(2, 0.45)]),
        ("balanced", {}, "12+2", [(2, 0.45)]),
        ("text", {}, "text", [(2, 0.45)]),
        (None, {"stages": 3}, "12+2", [(2, 0.45)] * 2),
        # What the user counted or gave stays.
        ("12+1", {}, "12+1", [(1, 0.45)]),
        ("10+4", {}, "10+4", [(4, 0.45)]),
        ("10+1+2", {}, "10+1+2", [(1, 0.45), (2, 0.45)]),
        (None, {"refine_steps": 1}, "12+1", [(1, 0.45)]),
        (None, {"sigma": 0.2}, "12+1", [(1, 0.2)]),
        (None, {"sigma": 0.3, "refine_steps": 3}, "12+3", [(3, 0.3)]),
        (None, {"refine_steps": 0}, "12+0", [(0, 0.0)]),
    ],
)
def test_what_is_left_to_a_preset_is_refined_more(
    preset: str | None, options: dict[str, Any], name: str, expected: list[tuple[int, float]]
) -> None:
    plan = unaided(preset, **options)
    assert (plan.preset, refined(plan)) == (name, expected)
    assert plan.stages[0] == make_plan("flux1-dev", 1024, 1024, preset, **options).stages[0]
    said = any(note.startswith("No network upscales the image") for note in plan.notes)
    assert said == (expected[0][1] >= UNAIDED_SIGMA)
    assert not any("gain little" in note for note in plan.notes) or "sigma" in options


def test_with_a_network_nothing_changes() -> None:
    assert make_plan("flux1-dev", 1024, 1024, upscaler_kind="network") == make_plan("flux1-dev", 1024, 1024)
    assert "upscaler_kind" not in make_plan("flux1-dev", 1024, 1024).to_string()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_family_pays_more_than_for_native_sampling(family: str) -> None:
    known, size = FAMILIES[family], FAMILIES[family].default_size or FAMILIES[family].native_size
    plan, usual = (make_plan(known, *size, upscaler_kind=kind) for kind in ("interpolation", "network"))
    assert plan.cost_ratio >= 1.0 or usual.cost_ratio < 1.0
    own = usual.stages[-1]
    assert plan.stages[-1].start_sigma == max(UNAIDED_SIGMA, own.start_sigma)
    more = known.native_steps >= 8 and own.start_sigma <= UNAIDED_SIGMA
    assert plan.stages[-1].steps == (UNAIDED_STEPS if more else own.steps)


def test_measured_presets_and_higher_ones_keep_their_numbers() -> None:
    measured = Preset("calibrated", 9, 1, 0.2, "measured", measured=True)
    strong = Preset("strong", 9, 3, 0.6, "mine")
    once = Preset("once", 9, 1, 0.6, "mine")
    for preset in (measured, strong, once):
        assert for_upscaler(FLUX, preset, "interpolation") == preset
        own = replace(FLUX, presets=(preset,), default_preset=preset.name)
        plan = make_plan(own, 1024, 1024, upscaler_kind="interpolation")
        assert refined(plan) == [(preset.refine_steps, preset.sigma)]


def test_the_line_and_the_lines_say_it_and_read_back() -> None:
    plan = unaided()
    assert "upscaler_kind=interpolation" in plan.to_string()
    note = "No network upscales the image, so it is refined more: 2 steps from sigma 0.45."
    assert f"note: {note}" in [*plan_lines(plan)]
    for again in (StagedPlan.from_string(plan.to_string()), StagedPlan.from_json(plan.to_json())):
        assert again == plan
        assert note in again.notes
    latent = plan.to_string().partition(";#")[0].replace("=interpolation", "=latent")
    with pytest.raises(ValueError, match="upscaler_kind must be 'network' or 'interpolation', got 'latent'"):
        StagedPlan.from_string(latent)


def test_plans_of_before_read_back_as_they_were() -> None:
    plan = make_plan("demo", 256, 256, seed=7)
    data = json.loads(plan.to_json())
    del data["upscaler_kind"]
    assert StagedPlan.from_json(json.dumps(data)) == plan
    assert refined(plan) == [(1, 0.6)]


def test_interpolation_costs_nothing() -> None:
    parts = part_costs(unaided())
    assert parts is not None
    assert [part.flop for part in parts if part.name == "upscale"] == [0.0]
