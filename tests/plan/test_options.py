"""The table of a plan's options: one definition that types, checks and describes each of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, cast, get_type_hints

import numpy as np
import pytest
import torch

from mrflow_sched import make_native_plan, make_plan, native_sigmas, refine_sigmas
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.options import OPTIONS, NativeOptions, PlanOptions, check_options

NUMBERS = ("whole", "number", "numbers", "interval")


def test_every_field_is_in_the_table_with_its_words_and_its_range() -> None:
    assert set(OPTIONS) == set(get_type_hints(PlanOptions))
    assert next(iter(OPTIONS)) == "preset"
    for name, option in OPTIONS.items():
        assert option.name == name
        assert option.help
        assert "\n" not in option.help
        if option.kind in NUMBERS:
            assert option.low is not None
            assert option.high is not None


def test_types_become_facts() -> None:
    facts = {name: (option.kind, option.per_stage, option.applies) for name, option in OPTIONS.items()}
    assert facts["preset"] == ("text", False, "staged")
    assert facts["low_steps"] == ("whole", False, "staged")
    assert facts["refine_steps"] == ("whole", True, "staged")
    assert facts["sigma"] == ("number", True, "staged")
    assert facts["shift_tokens"] == ("whole", False, "staged")
    assert facts["factors"] == ("numbers", False, "staged")
    assert facts["guidance_interval"] == ("interval", False, "staged")
    assert facts["native"] == ("flag", False, "both")
    assert facts["steps"] == ("whole", False, "native")
    assert facts["seed"] == ("whole", False, "both")
    assert OPTIONS["shift_tokens"].choices == ("low", "final")
    assert OPTIONS["seed_rule"].choices == ("offset", "hash")
    assert (OPTIONS["factor"].low, OPTIONS["factor"].high) == (1.25, 4.0)
    assert (OPTIONS["refine_curve"].default, OPTIONS["seed"].default, OPTIONS["sigma"].default) == ("linear", 0, None)


def test_what_applies_to_native_plans_is_what_make_native_plan_takes() -> None:
    applies = {name for name, option in OPTIONS.items() if option.applies != "staged"} - {"native"}
    assert applies == set(get_type_hints(NativeOptions))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tile": -1}, "tile must be a whole number from 0 to 32768, got -1"),
    ({"native": 1}, "native must be True or False, got 1"),
    ({"preset": 12}, "preset must be text, got 12"),
    ({"factors": 2.0}, "factors must be a list of numbers, got 2.0"),
    ({"factors": (2.0, 9.0)}, "factors must be a number from 1.25 to 4, got 9.0; for a larger step use more stages."),
    ({"sigma": (0.1, 1.0)}, "sigma must lie between 0 and 1, got 1.0"),
    ({"guidance_interval": (0.9, 0.1)}, "guidance_interval must be two"),
    ({"shift_tokens": "high"}, "shift_tokens must be 'low' or 'final' or a whole number from 1 to"),
    ({"low_steps": (4, 5)}, r"low_steps must be a whole number from 1 to 1000, got \(4, 5\)"),
    ({"low_steps": True}, "low_steps must be a whole number from 1 to 1000, got True"),
    ({"sead": 1}, "sead is no option of make_plan; did you mean seed"),
]


@pytest.mark.parametrize(("options", "sentence"), WRONG)
def test_values_out_of_range_are_refused_by_the_table(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        check_options(options)
    assert "\n" not in str(caught.value)


NUMBERS_OF_OTHERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"low_steps": np.int64(3), "refine_steps": np.uint8(2)}, {"low_steps": 3, "refine_steps": 2}),
    ({"sigma": np.float32(0.25), "guidance": np.float16(3)}, {"sigma": 0.25, "guidance": 3.0}),
    ({"stages": np.int32(3), "sigma": np.array([0.25, 0.5])}, {"stages": 3, "sigma": [0.25, 0.5]}),
    ({"sigma": (np.float64(0.25),), "seed": torch.tensor(7)}, {"sigma": (0.25,), "seed": 7}),
    ({"sigmas": np.linspace(1, 0, 5), "tile": np.int64(256)}, {"sigmas": (1, 0.75, 0.5, 0.25, 0), "tile": 256}),
    ({"factors": torch.tensor([2.0, 1.5]), "mu": Fraction(1, 2)}, {"factors": (2.0, 1.5), "mu": 0.5}),
    (
        {"guidance": np.float32(3), "guidance_interval": np.array([0.25, 0.5])},
        {"guidance": 3, "guidance_interval": (0.25, 0.5)},
    ),
    ({"native": np.bool_(True), "steps": np.int64(4)}, {"native": True, "steps": 4}),
]


@pytest.mark.parametrize(("given", "same"), NUMBERS_OF_OTHERS)
def test_numbers_of_numpy_and_torch_become_pythons(given: dict[str, Any], same: dict[str, Any]) -> None:
    sides: Any = np.int64(500), np.uint16(512)
    plan = make_plan("sd3", *sides, **given)
    assert plan == make_plan("sd3", 500, 512, **same)
    assert json.loads(plan.to_json()) == json.loads(make_plan("sd3", 500, 512, **same).to_json())
    assert {type(value) for value in numbers_in(plan)} <= {int, float}


def numbers_in(value: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(value):
        value = [getattr(value, each.name) for each in dataclasses.fields(value)]
    if isinstance(value, (list, tuple)):
        for each in cast("list[Any]", value):
            yield from numbers_in(each)
    elif not isinstance(value, (str, bool)) and value is not None:
        yield value


def test_schedules_are_as_exact_with_numpys_numbers() -> None:
    single: Any = np.float32(0.3)
    three: Any = np.int64(3)
    assert native_sigmas(three, mu=single) == native_sigmas(3, mu=float(single))
    assert refine_sigmas(single, three, "shifted") == refine_sigmas(float(single), 3, "shifted")
    for wrong in (np.float32(3), np.bool_(True), np.array([3, 4]), torch.empty((), device="meta")):
        with pytest.raises(MrFlowError, match="low_steps must be a whole number from 1 to 1000, got"):
            make_plan("demo", 256, 256, low_steps=cast("Any", wrong))


def test_none_says_nothing() -> None:
    assert check_options(dict.fromkeys(OPTIONS)) == {}
    assert make_plan("demo", 256, 256, **dict.fromkeys(set(OPTIONS) - {"preset"})) == make_plan("demo", 256, 256)  # type: ignore[arg-type]


def test_native_plans_refuse_what_is_for_staged_ones() -> None:
    with pytest.raises(ValueError, match=r"native=True plans one stage and takes solver, .*steps; leave tile=512 out"):
        make_plan("demo", 256, 256, native=True, tile=512)
    with pytest.raises(ValueError, match="low_steps"):
        make_native_plan("demo", 256, 256, low_steps=3)  # type: ignore[call-arg]
    assert make_plan("demo", 256, 256, native=True, tile=0) == make_native_plan("demo", 256, 256)
