"""Sizes of stages that a plan chooses by itself for an image beyond what two stages of the usual factor reach."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mrflow_sched import FAMILIES, StagedPlan, get_family, make_plan
from mrflow_sched.plan.sizes import chosen_sizes, from_an_image, stage_sizes


def sizes(plan: StagedPlan) -> list[tuple[int, int]]:
    return [(stage.width, stage.height) for stage in plan.stages]


@pytest.mark.parametrize(
    ("family", "size", "stages"),
    [
        ("flux1-dev", (4096, 4096), [(1024, 1024), (2048, 2048), (4096, 4096)]),
        ("flux1-dev", (3840, 2160), [(1280, 720), (2048, 1152), (3840, 2160)]),
        ("flux1-dev", (2160, 3840), [(720, 1280), (1152, 2048), (2160, 3840)]),
        ("flux1-dev", (2560, 2560), [(960, 960), (1280, 1280), (2560, 2560)]),
        ("flux1-dev", (8192, 8192), [(1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192)]),
        ("flux1-dev", (8192, 1024), [(2048, 256), (4096, 512), (8192, 1024)]),
        ("flux1-dev", (1024, 8192), [(256, 2048), (512, 4096), (1024, 8192)]),
        ("sd15", (2048, 2048), [(512, 512), (1024, 1024), (2048, 2048)]),
        ("flux1-dev", (2192, 2192), [(1104, 1104), (2192, 2192)]),
        ("flux1-dev", (2208, 2208), [(832, 832), (1104, 1104), (2208, 2208)]),
        ("sd15", (1288, 1288), [(512, 512), (1288, 1288)]),
        ("sd15", (1304, 1304), [(488, 488), (656, 656), (1304, 1304)]),
        ("sd15", (1152, 1152), [(512, 512), (1152, 1152)]),
        ("qwen-image-2.1", (4096, 4096), [(2048, 2048), (4096, 4096)]),
        ("hunyuan-image", (8192, 8192), [(2048, 2048), (4096, 4096), (8192, 8192)]),
        ("demo", (1024, 1024), [(256, 256), (512, 512), (1024, 1024)]),
    ],
)
def test_stage_1_of_a_large_image_has_a_size_that_the_model_knows(
    family: str, size: tuple[int, int], stages: list[tuple[int, int]]
) -> None:
    plan = make_plan(family, *size)
    assert sizes(plan) == stages
    told = [note for note in plan.notes if "stages were chosen" in note]
    usual = stage_sizes(get_family(family), *size, [2.0])[0]
    assert bool(told) == (stages[0] != usual)
    assert all(f"{usual[0]}x{usual[1]}" in note and f"{stages[0][0]}x{stages[0][1]}" in note for note in told)


@settings(max_examples=200)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 4096), st.floats(1 / 3, 3))
@example("ltx-video", 1066, 1.5625)  # a coarse grid, and a least size near the native one
def test_chosen_stages_are_within_the_models_range_and_what_an_upscaler_does(
    name: str, width: int, ratio: float
) -> None:
    family, height = get_family(name), max(round(width * ratio), 1)
    plan = make_plan(name, width, height, shift_tokens=1024)
    native = math.sqrt(math.prod(family.native_size))
    if math.sqrt(plan.width * plan.height) <= 2 * native:
        assert plan == make_plan(name, width, height, shift_tokens=1024, stages=2)
        assert "were chosen" not in " ".join(plan.notes)
    areas = [math.sqrt(stage.width * stage.height) for stage in plan.stages]
    if "were chosen" in " ".join(plan.notes):
        assert 0.9 * family.min_low_side <= areas[0] <= math.sqrt(1.15) * native
        steps = [large / small for small, large in pairwise(areas)]
        assert min(steps) >= 1.2
        assert areas[-1] > 8 * native or max(steps) <= 2.7
        assert len(plan.stages) <= 4
    assert StagedPlan.from_string(plan.to_string()) == plan


@pytest.mark.parametrize(
    "options", [{"factor": 2.0}, {"stages": 2}, {"factors": (2.0,)}, {"stages": 3, "factor": 1.5}, {"factors": (2, 3)}]
)
def test_what_the_user_says_of_sizes_is_not_chosen(options: Any) -> None:
    family = get_family("flux1-dev")
    assert chosen_sizes(family, 4096, 4096, options) is None
    plan = make_plan(family, 4096, 4096, **options)
    assert not any("were chosen" in note for note in plan.notes)


def test_a_preset_that_counts_its_stages_gets_sizes_for_them() -> None:
    assert sizes(make_plan("sd15", 4096, 4096, "12+1+1")) == [(512, 512), (2048, 2048), (4096, 4096)]
    same = make_plan("flux1-dev", 4096, 4096, "12+1+1")
    assert same.stages == make_plan("flux1-dev", 4096, 4096).stages
    assert sizes(make_plan("flux1-dev", 2048, 2048, "12+1+1"))[0] == (512, 512)
    assert sizes(make_plan("flux1-dev", 4096, 4096, "12+1+1", factor=1.5))[0] == (1824, 1824)
    plan = make_plan("flux1-dev", 4096, 4096, "12+2+1", sigma=(0.2, 0.12))
    assert [(stage.steps, stage.start_sigma) for stage in plan.stages] == [(12, 1.0), (2, 0.2), (1, 0.12)]


def test_a_given_image_is_stage_1_as_large_as_it_is() -> None:
    assert from_an_image({"sigma": 0.2}) == {"sigma": 0.2, "stages": 2}
    for options in ({"factor": 3.0}, {"stages": 3}, {"factors": (2, 2)}, {"preset": "8+1+1"}):
        assert from_an_image(options) == options


def test_a_strip_beyond_every_models_shape_says_so() -> None:
    assert "A strip of 8:1 may show repeated content" in make_plan("flux1-dev", 8192, 1024).notes[0]
    assert "strip" not in make_plan("flux1-dev", 3840, 2160).notes[0]


@pytest.mark.parametrize(
    ("family", "size", "words"),
    [
        ("flux1-dev", (4096, 4096), "stage 1 has the area that FLUX.1-dev is made for"),
        ("flux1-dev", (3840, 2160), "stage 1 has 88% of the area that FLUX.1-dev is made for"),
        ("flux1-dev", (3000, 2000), "stage 1 has 77% of the area that FLUX.1-dev is made for"),
        ("flux1-dev", (8192, 1024), "stage 1 has 50% of the area that FLUX.1-dev is made for"),
    ],
)
def test_the_note_says_how_much_of_the_native_area_stage_1_has(family: str, size: tuple[int, int], words: str) -> None:
    assert words in make_plan(family, *size).notes[0]


def test_a_model_of_one_size_begins_near_it() -> None:
    first = make_plan("sd15", 2064, 2048).stages[0]
    assert 1.0 <= first.width * first.height / 512**2 <= 1.1
