"""PNG info: every control survives the way into a picture's text and back; other texts read as far as they go."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from doubles import pasted
from hypothesis import given, settings
from hypothesis import strategies as st
from test_controls import any_controls

from mrflow_sched.apps.webui import infotext
from mrflow_sched.apps.webui.controls import FIELDS, Controls
from mrflow_sched.apps.webui.host import ModelInfo
from mrflow_sched.apps.webui.recipe import Recipe, make_recipe
from mrflow_sched.plan.families import FAMILIES, get_family

NAMES = ("None", "Lanczos", "R-ESRGAN 2x+")


def model(family: str) -> ModelInfo:
    known = get_family(family)
    flow = known.prediction == "flow"
    return ModelInfo(known, known.title, flow, not flow, None, known.vae_factor, known.grid)


def recipe(controls: Controls, family: str = "flux1-dev") -> Recipe:
    return make_recipe(controls, model(family), 1024, 1024, upscalers=(*NAMES, controls.upscaler))


def as_hosts_write(keys: dict[str, str]) -> dict[str, str]:
    """Joined to one line and parsed again by the hosts' grammar."""
    quoted = {
        key: json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value
        for key, value in keys.items()
    }
    line = ", ".join(f"{key}: {value}" for key, value in quoted.items())
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line)
    return pasted({key: json.loads(value) if value.startswith('"') else value for key, value in found})


@given(any_controls(), st.sampled_from(sorted(FAMILIES)))
@settings(max_examples=150)
def test_every_control_comes_back(controls: Controls, family: str) -> None:
    try:
        made = recipe(controls, family)
    except ValueError:  # refused: more steps than sampling natively takes
        return
    read = infotext.read(as_hosts_write(infotext.write(controls, made)))
    assert read == controls
    assert recipe(read, family) == made


def test_what_a_picture_says() -> None:
    controls = Controls(True, sigma=0.15)
    assert infotext.write(controls, recipe(controls)) | {"MrFlow version": ""} == {
        "MrFlow": "automatic 12+1 x2 sigma=0.15 v1",
        "MrFlow steps": "12+1",
        "MrFlow sigma": "0.15",
        "MrFlow size": "512x512",
        "MrFlow upscaler": "automatic (R-ESRGAN 2x+)",
        "MrFlow version": "",
    }
    controls = Controls(True, "6+2", 4 / 3, solver="multistep", refine_cfg="value", refine_cfg_value=2.5)
    keys = infotext.write(controls, recipe(controls, "sdxl"))
    assert keys["MrFlow"] == "6+2 x1.3333333333333333 experimental v1"
    assert keys["MrFlow solver"] == "multistep"
    assert keys["MrFlow refine CFG"] == "value 2.5"


def test_keys_fit_the_hosts_grammar() -> None:
    controls = Controls(True, "6+2", 1.5, 3, 2, 0.3, "host", "multistep", "a, b: c", "off", 2.0, "host", "auto", True)
    keys = infotext.write(controls, recipe(controls))
    assert all(re.fullmatch(r"\w[\w \-/]+", key) for key in keys)
    assert all(key == infotext.KEY or key.startswith(infotext.PREFIX) for key in keys)


def test_an_image_without_our_keys_pastes_to_off() -> None:
    assert infotext.read({}) == Controls()
    assert infotext.read({"Steps": "20", "Hires upscaler": "Latent", "MrFlow sigma": "0.3"}) == Controls()
    assert infotext.field_value("enabled")({"Steps": "20"}) is False


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"MrFlow": "12+1"}, Controls(True, "12+1")),
        ({"MrFlow": "automatic"}, Controls(True)),
        ({"MrFlow": "automatic x3"}, Controls(True, factor=3.0)),
        ({"MrFlow": "True"}, Controls(True)),
        ({"MrFlow": ""}, Controls(True)),
        ({"MrFlow": "9+1 x2 new=7 v9"}, Controls(True, "9+1")),
        ({"MrFlow": "9+1 x99 sigma=abc low=-3 v1"}, Controls(True, "9+1")),
        ({"MrFlow": "999+1 x2 v1"}, Controls(True)),
        ({"MrFlow": "text x2 v1", "MrFlow shift": "other", "MrFlow solver": "host sampler"}, Controls(True, "text")),
        ({"MrFlow": "12+1", "MrFlow refine CFG": "off"}, Controls(True, "12+1", refine_cfg="off")),
        (
            {"MrFlow": "12+1", "MrFlow upscaler-1": "2", "MrFlow upscaler-2": "4"},
            Controls(True, "12+1", upscaler="2x4"),
        ),
    ],
)
def test_old_new_and_damaged_texts_read_as_far_as_they_go(keys: dict[str, Any], wanted: Controls) -> None:
    assert infotext.read(keys) == wanted


def test_each_control_has_a_paste_function() -> None:
    controls = Controls(True, "6+2", 1.5, 3, 2, 0.3, "host", "multistep", "None", "off", 2.0, "host", "auto", True)
    keys = pasted(infotext.write(controls, recipe(controls)))
    assert {name: infotext.field_value(name)(keys) for name in FIELDS} == controls.to_dict()
    with pytest.raises(ValueError, match="name must be one of enabled"):
        infotext.field_value("nothing")
