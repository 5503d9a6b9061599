"""`mrflow families`: what is known of each kind of model."""

from __future__ import annotations

import json
from typing import Any

from mrflow_sched.plan.families import FAMILIES, get_family


def test_every_family_and_preset_is_listed(mrflow: Any) -> None:
    code, out, err = mrflow("families", model=None)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    for family in FAMILIES.values():
        [head] = [line for line in lines if line.startswith(f"{family.name}: ")]
        assert family.title in head
        names = [*(preset.name for preset in family.presets), "text", "detail"]
        below = lines[lines.index(head) + 1 :][: len(names)]
        assert sorted(line.split()[0] for line in below) == sorted(names)
    assert "  20+1   sigma 0.15  best" in lines
    assert "  text   sigma 0.18  12+1, images with lettering" in lines
    assert "any other N+M" in lines[-1]


def test_json_holds_the_numbers_of_one_family(mrflow: Any) -> None:
    code, out, _ = mrflow("families", "z-image-turbo", "--json", model=None)
    [found] = json.loads(out)
    family = get_family("z-image-turbo")
    assert code == 0
    assert (found["name"], found["native_steps"], found["grid"]) == (family.name, family.native_steps, family.grid)
    assert [(each["name"], each["sigma"], each["for"]) for each in found["presets"]] == [
        ("8+1", 0.11, "fast, the default"),
        ("9+1", 0.11, "best"),
        ("text", 0.18, "images with lettering"),
        ("detail", 0.75, "small things in large images"),
    ]


def test_an_unknown_family_is_one_sentence(mrflow: Any) -> None:
    code, out, err = mrflow("families", "FLUX.1-dev", model=None)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "did you mean 'flux1-dev'?" in err
