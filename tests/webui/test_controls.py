"""What a user may set: API argument shapes, limits, and one sentence for everything else."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrflow_sched.apps.webui.controls import AUTOMATIC, CHOICES, FIELDS, LABELS, LIMITS, MIN_SIGMA, Controls
from mrflow_sched.plan.families import FAMILIES


def any_controls() -> st.SearchStrategy[Controls]:
    """Every combination that is allowed, upscaler names as hosts have them."""
    letters = st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters='"\\')
    names = st.text(letters, min_size=1, max_size=20).map(str.strip)
    names = names.filter(lambda name: name and not name.startswith(AUTOMATIC))
    steps = st.builds("{}+{}".format, st.integers(1, 150), st.integers(1, 20))
    return st.builds(
        Controls,
        enabled=st.just(True),
        preset=st.sampled_from(CHOICES["preset"]) | steps,
        factor=st.floats(1.25, 4.0),
        low_steps=st.integers(0, 150),
        refine_steps=st.integers(0, 20),
        sigma=st.just(0.0) | st.floats(MIN_SIGMA, 0.9),
        shift=st.sampled_from(CHOICES["shift"]),
        solver=st.sampled_from(CHOICES["solver"]),
        upscaler=st.just(AUTOMATIC) | names,
        refine_cfg=st.sampled_from(CHOICES["refine_cfg"]),
        refine_cfg_value=st.floats(1.0, 30.0),
        refine_seed=st.sampled_from(CHOICES["refine_seed"]),
        colour_guard=st.sampled_from(CHOICES["colour_guard"]),
        save_stages=st.booleans(),
        keep_composition=st.booleans(),
    )


def test_the_order_of_the_arguments_is_fixed() -> None:
    # Bodies of API calls and saved scripts depend on it: only ever append.
    first = ("enabled", "preset", "factor", "low_steps", "refine_steps", "sigma", "shift", "solver", "upscaler")
    last = ("refine_cfg", "refine_cfg_value", "refine_seed", "colour_guard", "save_stages", "draft")
    assert (*first, *last, "keep_composition") == FIELDS
    assert set(LABELS) == set(FIELDS)
    assert len(set(LABELS.values())) == len(FIELDS)


def test_defaults_are_off_and_stand_first_among_the_choices() -> None:
    controls = Controls()
    assert controls.enabled is False
    assert all(getattr(controls, name) == choices[0] for name, choices in CHOICES.items())
    assert all(LIMITS[name][0] <= getattr(controls, name) <= LIMITS[name][1] for name in LIMITS)
    with pytest.raises(FrozenInstanceError):
        controls.enabled = True  # type: ignore[misc]


@given(any_controls())
def test_lists_and_dicts_give_the_same_controls(controls: Controls) -> None:
    values = controls.to_dict()
    assert list(values) == list(FIELDS)
    sent = json.loads(json.dumps(values))
    assert Controls.from_args([sent]) == controls
    assert Controls.from_args([sent, "12+1", 3]) == controls
    assert Controls.from_args(list(sent.values())) == controls
    assert Controls.from_args(tuple(sent.values())) == controls


@pytest.mark.parametrize("count", range(len(FIELDS) + 1))
def test_a_shorter_list_leaves_the_rest_at_the_defaults(count: int) -> None:
    assert Controls.from_args(list(Controls().to_dict().values())[:count]) == Controls()


def test_a_dict_switches_on_unless_it_says_otherwise() -> None:
    assert Controls.from_args([{}]).enabled is True
    assert Controls.from_args([{"preset": "text"}]) == Controls(True, "text")
    assert Controls.from_args([{"enabled": False}]).enabled is False


def test_whole_numbers_may_come_as_floats_and_nothing_as_none() -> None:
    controls = Controls.from_args([True, None, 2, 12.0, 1.0, None])
    assert controls == Controls(True, low_steps=12, refine_steps=1)
    assert type(controls.low_steps) is int
    assert type(controls.factor) is float


def test_every_preset_that_needs_no_lora_is_a_choice() -> None:
    every = [preset for family in FAMILIES.values() for preset in family.presets]
    # The host puts LoRAs on, by the prompt.
    assert {preset.name for preset in every if not preset.few_step} < set(CHOICES["preset"])
    assert not {preset.name for preset in every if preset.few_step} & set(CHOICES["preset"])
    assert all(Controls(preset=name).preset == name for name in CHOICES["preset"])
    assert Controls(preset="08+01").preset == "8+1"


BAD: list[tuple[Any, str]] = [
    ({"enabled": 1}, "enabled must be true or false, got 1."),
    ({"enabled": "yes"}, "enabled must be true or false, got 'yes'."),
    (
        {"preset": "quick"},
        "preset must be 'automatic', 'fast', 'balanced', 'best', 'text', 'detail', or low + refine steps such as",
    ),
    ({"preset": "0+1"}, "preset must be"),
    ({"preset": "151+1"}, "preset must be"),
    ({"preset": "12+21"}, "preset must be"),
    ({"preset": 12}, "preset must be"),
    ({"factor": 1.2}, "factor must be a number from 1.25 to 4, got 1.2."),
    ({"factor": "2"}, "factor must be a number from 1.25 to 4, got '2'."),
    ({"factor": float("nan")}, "factor must be"),
    ({"low_steps": 1.5}, "low_steps must be a whole number from 0 to 150, got 1.5; 0 uses the preset's."),
    ({"low_steps": True}, "low_steps must be"),
    ({"low_steps": -1}, "low_steps must be"),
    ({"refine_steps": 21}, "refine_steps must be a whole number from 0 to 20, got 21; 0 uses the preset's."),
    ({"sigma": 0.01}, "sigma must be a number from 0.02 to 0.9, got 0.01; 0 uses the preset's."),
    ({"sigma": 0.91}, "sigma must be"),
    ({"sigma": [0.12]}, "sigma must be"),
    ({"shift": "none"}, "shift must be 'resolution-aware' or 'host', got 'none'."),
    ({"solver": ["multistep"]}, "solver must be 'host sampler' or 'multistep' or 'automatic', got ['multistep']."),
    ({"upscaler": " "}, "upscaler must be 'automatic' or the name of an upscaler, got ' '."),
    ({"upscaler": 3}, "upscaler must be"),
    ({"refine_cfg_value": 0.5}, "refine_cfg_value must be a number from 1 to 30, got 0.5."),
    ({"refine_seed": "seed+1"}, "refine_seed must be 'seed + 1' or 'host', got 'seed+1'."),
    ({"sgima": 0.1}, "'sgima' is not a setting of MrFlow; did you mean 'sigma'? Known names are enabled, preset,"),
    ({3: 4}, "3 is not a setting of MrFlow; known names are enabled"),
]


@pytest.mark.parametrize(("values", "sentence"), BAD)
def test_what_is_not_allowed_is_told_in_one_sentence(values: dict[Any, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        Controls.from_args([values])
    text = str(caught.value)
    assert text.startswith(sentence)
    assert text.endswith(".")
    assert "\n" not in text


def test_too_many_values_are_an_error() -> None:
    with pytest.raises(ValueError, match="args must hold at most 16 values"):
        Controls.from_args([*Controls().to_dict().values(), 1])
