"""`mrflow sizes` in words and as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mrflow_sched import StagedPlan
from mrflow_sched.plan.cost import part_costs


def test_sizes_says_what_each_size_costs_and_what_a_card_needs(mrflow: Any) -> None:
    code, text, err = mrflow("sizes", "--family", "flux1-dev", model=None)
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert lines[0] == "FLUX.1-dev: all parts of a run against 50 native steps, counted in TFLOP; loading is in neither"
    heads = [line.split(":")[0] for line in lines[1:] if not line.startswith(" ")]
    assert heads == ["1024x1024", "1440x1440", "2048x2048", "2880x2880"]
    assert sum(line.startswith("  8 GB: --offload layers") for line in lines) == 4
    assert "12+1, 1024x1024 -> 2048x2048" in text
    assert "fastest of" in text


def test_sizes_as_json_hold_plans_that_can_be_run(mrflow: Any) -> None:
    found = json.loads(mrflow("sizes", "--family", "z-image-turbo", "--sizes", "1024x1024", "--json", model=None)[1])
    (row,) = found["sizes"]
    assert found["unit"] == row["unit"] == "FLOP"
    plan = StagedPlan.from_string(row["usual"]["plan"])
    assert row["usual"]["cost"] == pytest.approx(sum(part.flop for part in part_costs(plan) or ()))
    assert row["usual"]["ratio"] == pytest.approx(row["native"] / row["usual"]["cost"])
    assert [card["gigabytes"] for card in row["cards"]] == [8, 12, 16, 24]


def test_seconds_come_from_a_measured_run(mrflow: Any, tmp_path: Any) -> None:
    plan = json.loads(mrflow("plan", "--family", "flux1-dev", "--size", "1024x1024", "--json", model=None)[1])
    seconds = {part["name"]: part["flop"] * 1e-14 for part in plan["work"]}
    stages = [{"name": name, "seconds": value} for name, value in seconds.items()]
    file = tmp_path / "timings.json"
    file.write_text(json.dumps({"plan": plan["plan"], "stages": stages}))
    words = ("sizes", "--family", "flux1-dev", "--sizes", "1024x1024", "--timings", str(file))
    found = json.loads(mrflow(*words, "--json", model=None)[1])
    assert found["unit"] == "seconds"
    assert found["sizes"][0]["usual"]["cost"] == pytest.approx(sum(seconds.values()), rel=1e-6)
    assert "seconds predicted from timings.json" in mrflow(*words, model=None)[1]
    code, _, err = mrflow("sizes", "--family", "sdxl", "--timings", str(file), model=None)
    assert (code, "which is of family flux1-dev, not sdxl" in err) == (2, True)
