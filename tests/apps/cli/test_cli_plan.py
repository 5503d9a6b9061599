"""`mrflow plan`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mrflow_sched.apps.cli.main import main
from mrflow_sched.plan.cost import part_costs
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.options import OPTIONS
from mrflow_sched.plan.stages import StagedPlan


def test_plan_json_has_the_stable_keys_and_numbers(mrflow: Any) -> None:
    code, out, err = mrflow("plan", "--family", "flux1-dev", "--size", "1024x1024", "--preset", "12+1", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert {"family", "preset", "cost_ratio", "plan", "stages"} <= set(found)
    assert (found["family"], found["preset"]) == ("flux1-dev", "12+1")
    first, last = found["stages"]
    assert {"width", "height", "tokens", "mu", "sigmas", "forwards"} <= set(first)
    assert (first["width"], first["tokens"], len(first["sigmas"])) == (512, 1024, 13)
    assert first["mu"] == pytest.approx(0.63, abs=1e-3)
    assert last["sigmas"] == [0.12, 0.0]
    assert found["cost_ratio"] > 8
    assert StagedPlan.from_string(found["plan"]).stages[1].width == 1024


def test_plan_tells_work_memory_and_tiles(mrflow: Any) -> None:
    _, out, _ = mrflow("plan", "--family", "flux1-dev", "--json")
    found = json.loads(out)
    assert found["work_ratio"] == pytest.approx(10.58, abs=0.02)
    assert [part["name"] for part in found["work"]][2:4] == ["upscale", "encode"]
    _, out, _ = mrflow("plan", "--family", "flux1-dev")
    assert "network cost: 11.19x less than 50 native steps" in out
    assert ", 10.58x less than 50 native steps" in out
    assert "memory in 16 bits: about 23.9 GiB at the peak, which is stage 2 decode; " in out
    _, out, _ = mrflow("plan", "--family", "hunyuan-image")
    assert "with upscaler; the VAE was not counted" in out
    assert "memory" not in out
    words = ("--size", "4096x4096", "--stages", "3", "--tile", "1024", "--json")
    code, out, _ = mrflow("plan", "--family", "flux1-dev", *words)
    assert (code, StagedPlan.from_string(json.loads(out)["plan"]).tile) == (0, 1024)
    _, out, _ = mrflow("plan", "--family", "sd35", "--guidance-interval", "0.3-0.9", "--json")
    assert StagedPlan.from_string(json.loads(out)["plan"]).stages[0].guidance_interval == (0.3, 0.9)
    code, _, err = mrflow("plan", "--family", "sd35", "--guidance-interval", "wide")
    assert (code, "write LOW-HIGH" in err) == (2, True)
    code, _, err = mrflow("plan", "--family", "flux1-dev", "--native", "--tile", "1024")
    assert (code, "--tile has no meaning" in err) == (2, True)


def test_plan_predicts_seconds_from_a_comparison(mrflow: Any, tmp_path: Path) -> None:
    plan = make_plan("flux1-dev", 1024, 1024)
    parts = part_costs(plan) or ()
    file = tmp_path / "timings.json"
    stages = [{"name": part.name, "seconds": part.flop * 1e-12} for part in parts]
    file.write_text(json.dumps({"plan": plan.to_string(), "stages": stages}))
    _, out, _ = mrflow("plan", "--family", "flux1-dev", "--native", "--timings", str(file), "--json")
    told = {part["name"]: part["seconds"] for part in json.loads(out)["seconds"]}
    assert told["stage 1 sample"] == pytest.approx(50 * 74.36, rel=1e-3)
    _, out, _ = mrflow("plan", "--family", "flux1-dev", "--timings", str(file))
    assert "predicted run time: 352." in out
    code, _, err = mrflow("plan", "--family", "sd35", "--timings", str(file))
    assert (code, "is of family flux1-dev, not sd35" in err) == (2, True)
    far = json.dumps({"plan": plan.to_string(), "stages": [{"name": "text", "seconds": 1e9}]})
    for text in (
        "no json",
        "{}",
        "[" * 100_000,
        '{"plan": "x", "stages": []}',
    ):
        file.write_text(text)
        code, _, err = mrflow("plan", "--family", "flux1-dev", "--timings", str(file))
        assert (code, "cannot be read" in err, err.count("\n")) == (2, True, 1)
    for number in ("1000000000.0", "NaN", "-1", '"1"', "null", "9" * 400):
        file.write_text(far.replace("1000000000.0", number))
        code, _, err = mrflow("plan", "--family", "flux1-dev", "--timings", str(file))
        assert (code, "seconds['text'] must be a number from 0 to 1e+07" in err, err.count("\n")) == (2, True, 1)
        assert len(err) < 400
    file.write_text(far.replace("1000000000.0", "1"))
    code, _, err = mrflow("plan", "--family", "flux1-dev", "--timings", str(file))
    assert (code, "--timings is" in err, "has no 'stage 1 sample'" in err, err.count("\n")) == (2, True, True, 1)


def test_plan_text_says_the_same(mrflow: Any) -> None:
    code, out, _ = mrflow("plan", "--family", "flux1-dev", "--size", "1000x1000", "--refine-steps", "0")
    assert code == 0
    assert "stage 1: " in out
    assert "the upscaled image is kept" in out
    assert "note: " in out
    line = next(line for line in out.splitlines() if line.startswith("plan: "))
    assert StagedPlan.from_string(line.removeprefix("plan: ")).family == "flux1-dev"


def test_plan_takes_every_override(mrflow: Any) -> None:
    words = "--low-steps 7 --refine-steps 2 --sigma 0.2 --solver euler --factor 2 --stages 3 --refine-curve shifted"
    more = "--shift-tokens final --guidance 2 --refine-guidance 3 --seed 9 --seed-rule hash --posterior sample --json"
    _, out, _ = mrflow("plan", "--family", "flux1-dev", "--size", "2048x2048", *words.split(), *more.split())
    plan = StagedPlan.from_string(json.loads(out)["plan"])
    assert [stage.width for stage in plan.stages] == [512, 1024, 2048]
    assert [stage.steps for stage in plan.stages] == [7, 2, 2]
    assert plan.stages[1].start_sigma == 0.2
    assert plan.stages[1].sigmas[1] > 0.1  # shifted, not linear
    assert [stage.guidance for stage in plan.stages] == [2, 3, 3]
    assert (plan.seed, plan.seed_rule, plan.posterior) == (9, "hash", "sample")
    _, out, _ = mrflow("plan", "--family", "flux1-dev", "--mu", "0.5", "--json")
    assert json.loads(out)["stages"][0]["mu"] == 0.5
    _, out, _ = mrflow("plan", "--family", "flux1-dev", "--native", "--steps", "9", "--json")
    assert [stage["forwards"] for stage in json.loads(out)["stages"]] == [9]


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("flux1-dev", [512, 1024]), ("sdxl", [768, 1024]), ("sd15", [512, 1024]), ("demo", [128, 256])],
)
def test_the_default_size_stays_in_the_familys_range(mrflow: Any, family: str, sizes: list[int]) -> None:
    _, out, _ = mrflow("plan", "--family", family, "--json")
    found = json.loads(out)
    assert [stage["width"] for stage in found["stages"]] == sizes
    assert not any("Stage 1" in note for note in found["notes"])


def test_the_native_default_size_is_the_models_own(mrflow: Any) -> None:
    _, out, _ = mrflow("plan", "--family", "sd15", "--native", "--json")
    assert [stage["width"] for stage in json.loads(out)["stages"]] == [512]


def test_a_plan_that_costs_more_than_native_says_so(mrflow: Any) -> None:
    words = ("--family", "flux1-dev", "--low-steps", "50", "--refine-steps", "50")
    _, out, _ = mrflow("plan", *words)
    assert "more than 50 native steps" in out
    assert "0." not in out.splitlines()[1]


def test_every_option_of_a_plan_is_on_the_command_line_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    of_the_command = {"--help", "--json", "--debug", "--family", "--timings", "--size", "--calibration", "--memory"}
    shown = set(re.findall(r"^ +(?:-h, )?(--[a-z][a-z-]*)", text.partition("options:")[2], re.MULTILINE))
    assert shown - of_the_command == {f"--{name.replace('_', '-')}" for name in OPTIONS}
    for option in OPTIONS.values():
        assert " ".join(option.help.split()) in " ".join(text.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--native", "--tile", "512"), "--native samples in one stage, so --tile has no meaning"),
        (("--native", "--refine-curve", "shifted"), "so --refine-curve has no meaning"),
        (("--steps", "5"), "--steps 5 is for native sampling; add --native"),
        (("--sigma", "0.1,x"), "--sigma must lie between 0 and 1, got 'x'"),
        (("--low-steps", "0"), "--low-steps must be a whole number from 1 to 1000, got 0"),
        (("--refine-curve", "bent"), "--refine-curve must be 'linear' or 'shifted', got 'bent'"),
    ],
)
def test_options_are_refused_by_the_table_of_options(mrflow: Any, words: tuple[str, ...], sentence: str) -> None:
    code, out, err = mrflow("plan", "--family", "flux1-dev", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert sentence in err


@pytest.mark.parametrize("word", ["random", "-1"])
def test_a_random_seed_is_drawn_once_and_is_a_number_from_then_on(mrflow: Any, word: str) -> None:
    seeds: set[int] = set()
    for _ in range(4):
        code, out, err = mrflow("plan", "--family", "demo", "--seed", word, "--json")
        found = json.loads(out)
        seed = StagedPlan.from_string(found["plan"]).seed
        assert (code, err) == (0, f"mrflow: The random seed is {seed}.\n")
        assert 0 <= seed < 2**32
        seeds.add(seed)
    assert len(seeds) > 1
    code, _, err = mrflow("plan", "--family", "demo", "--seed", "any")
    assert (code, "'any' is not a whole number from 0 to 9223372036854775807, or random" in err) == (2, True)


def test_every_later_stage_may_have_its_own_numbers(mrflow: Any) -> None:
    words = ("--size", "2048x2048", "--factors", "2,2", "--refine-steps", "1,2", "--sigma", "0.2,0.1")
    _, out, _ = mrflow("plan", "--family", "flux1-dev", *words, "--json")
    plan = StagedPlan.from_string(json.loads(out)["plan"])
    assert [stage.width for stage in plan.stages] == [512, 1024, 2048]
    assert [(stage.steps, stage.start_sigma) for stage in plan.stages[1:]] == [(1, 0.2), (2, 0.1)]


def test_memory_chooses_offload_and_tiles_and_says_so(mrflow: Any) -> None:
    words = ("plan", "--family", "z-image", "--size", "4096x4096", "--memory", "16")
    code, out, _ = mrflow(*words, model=None)
    assert code == 0
    assert out.splitlines()[-1].startswith("On a card of 16 GB all parts stay on it; VAE in tiles of 512; upscaler in ")
    assert ";tile=1024;tile_positions=whole;" in out
    found = json.loads(mrflow(*words, "--json", model=None)[1])["memory"]
    assert (found["tile"], found["vae_tile"], found["offload"], found["fits"]) == (1024, 512, None, True)
