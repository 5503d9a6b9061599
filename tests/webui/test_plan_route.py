"""POST /mrflow/v1/plan: what a job would do, or the sentence it would get."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from documented_request import PAGE, command
from doubles import Flux, WebUI, engine
from test_page import flux_loaded

from mrflow_sched.apps.webui import api, expected
from mrflow_sched.apps.webui.run import ATTRIBUTE

UPSCALER = "2x-Tiny (MrFlow)"
SIZE = {"width": 1024, "height": 768, "steps": 20, "cfg_scale": 1.0}
KEYS = {
    *("refused", "line", "notes", "family", "model", "low", "final", "low_steps", "refine_steps", "sigma", "solver"),
    *("upscaler", "noise", "experimental", "sigmas", "expected"),
}


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected, "_learned", {})
    flux_loaded(monkeypatch, UPSCALER)


def asked(**body: Any) -> dict[str, Any]:
    """The answer as it goes over the wire, which takes neither NaN nor infinity."""
    return json.loads(json.dumps(api.plan(body), allow_nan=False))


def job(*args: Any, **more: Any) -> dict[str, Any]:
    return {**SIZE, "alwayson_scripts": {"mrflow": {"args": list(args)}}, **more}


def test_the_answer_is_the_plan() -> None:
    answer = asked(**job({"preset": "6+2", "sigma": 0.2}))
    assert set(answer) == KEYS
    assert answer["refused"] is None
    assert (answer["family"], answer["model"]) == ("flux1-dev", "FLUX.1-dev")
    assert (answer["low"], answer["final"]) == ([512, 384], [1024, 768])
    assert (answer["low_steps"], answer["refine_steps"], answer["sigma"]) == (6, 2, 0.2)
    assert (answer["solver"], answer["upscaler"], answer["experimental"]) == (None, UPSCALER, False)
    assert len(answer["sigmas"]["first"]) == 7
    assert answer["sigmas"]["refine"] == [0.2, 0.1, 0.0]
    assert answer["expected"]["than_steps"] == 20
    faster = answer["expected"]["faster"]
    assert answer["line"].endswith(f" @ σ 0.2 · about {faster:.1f}× faster than 20 steps")


def test_what_stage_1_starts_from_is_told() -> None:
    kept, usual = (asked(**job({"preset": "12+1", **choice})) for choice in ({"keep_composition": True}, {}))
    assert (kept["noise"], usual["noise"]) == ("nested", "own")
    assert kept["line"].replace(" · keeps composition", "") == usual["line"]
    assert " · keeps composition · about " in kept["line"]


def test_the_documented_command_is_answered() -> None:
    words = command("/mrflow/v1/plan")
    answer = asked(**json.loads(words[words.index("-d") + 1]))
    text = PAGE.read_text("utf-8")
    assert answer["refused"] is None
    assert all(f"`{key}`" in text for key in KEYS)
    assert f'{{"faster": {answer["expected"]["faster"]:.1f}, "than_steps": 20}}' in text
    assert answer["line"].partition(" · ")[2] in text


def test_it_is_what_a_job_does() -> None:
    ui = WebUI("forge", Flux(name="flux1-dev"))
    p = ui.job(width=384, height=256, cfg_scale=1.0)
    seen: list[Any] = []
    ui.at["process"] = lambda p: seen.append(getattr(p, ATTRIBUTE).recipe)
    ui.generate(p, {"preset": "6+2", "solver": "multistep"})
    answer = asked(width=384, height=256, args={"preset": "6+2", "solver": "multistep", "upscaler": UPSCALER})
    [recipe] = seen
    assert answer["low"] == [recipe.low_width, recipe.low_height]
    assert answer["sigmas"] == {"first": list(recipe.first_sigmas), "refine": list(recipe.refine_sigmas)}
    assert answer["solver"] == recipe.solver == "multistep"


@pytest.mark.parametrize(
    "body",
    [
        {"args": {"preset": "6+2"}},
        {"args": [{"preset": "6+2"}]},
        {"args": [True, "6+2"]},
        {"alwayson_scripts": {"MrFlow": {"args": [True, "6+2"]}}},
        {"alwayson_scripts": {"ControlNet": {}, "mrflow": {"args": {"preset": "6+2"}}}},
    ],
)
def test_arguments_may_come_in_any_form(body: dict[str, Any]) -> None:
    assert (asked(**body)["low_steps"], asked(**body)["final"]) == (6, [512, 512])


@pytest.mark.parametrize("body", [{}, {"args": []}, {"alwayson_scripts": None}, {"args": {}}])
def test_without_arguments_the_defaults_are_answered_where_the_job_would_run(body: dict[str, Any]) -> None:
    answer = asked(**SIZE, **body)
    if body.get("args") == []:  # as in a job, where nothing switches it on
        assert "enabled is false" in answer["refused"]
    else:
        assert answer["low_steps"] == 12


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (job({"sigma": 5}), "Sigma must be a number from 0.02 to 0.9, got 5"),
        (job({"sgma": 0.2}), "'sgma' is not a setting of MrFlow; did you mean 'sigma'?"),
        (job({"sigma": float("nan")}), "Sigma must be a number from 0.02 to 0.9, got nan"),
        (job("true"), "Enabled must be true or false, got 'true'."),
        (job(1), "Enabled must be true or false, got 1."),
        (job({"upscaler": 3}), "Upscaler must be"),
        (job(*[True] * 40), "Args must hold at most"),
        (job({}, width=64, height=64), "its sides must be at least 64 px"),
        (job({}, width="wide"), "Width must be a whole number of pixels"),
        (job({}, height=float("inf")), "Height must be a whole number of pixels"),
        (job({}, width=10**400), "Width must be a whole number of pixels"),
        (job({}, width=[1024]), "Width must be a whole number of pixels"),
        (job({}, width=True), "Width must be a whole number of pixels"),
        (job({}, steps="many"), "Steps must be a whole number"),
        (job({}, cfg_scale=float("nan")), "Cfg_scale must be a number"),
        (job({}, enable_hr=True, hr_scale=-2), "Hr_scale must be a number"),
        (job({}, refiner_checkpoint="sdxl-refiner"), "cannot be used with the refiner sdxl-refiner"),
        (job(False), "MrFlow is off: enabled is false"),
        ({"args": 7}, "Args must be a list of values or one dict, got 7."),
        ({"args": None}, "Args must be a list of values or one dict, got None."),
        ({"alwayson_scripts": [1]}, "Alwayson_scripts must be an object, got [1]."),
        ({"alwayson_scripts": {"mrflow": 1}}, "Alwayson_scripts.mrflow must be an object, got 1."),
    ],
)
def test_what_a_job_would_refuse_is_refused_in_its_words(body: dict[str, Any], sentence: str) -> None:
    answer = asked(**body)
    assert set(answer) == {"refused"}
    assert sentence in answer["refused"]
    assert answer["refused"].endswith(".")


@pytest.mark.parametrize("given", [{"sigma": 5}, {"sgma": 0.2}, {"preset": "150+20"}])
def test_the_sentence_is_that_of_the_job(given: dict[str, Any]) -> None:
    ui = WebUI("forge", Flux())
    p = ui.job()
    ui.generate(p, given)
    [told] = list(p.comments)
    refused = asked(width=512, height=512, args=given)["refused"]
    assert refused[1:] in told


def test_hires_fix_decides_the_final_size() -> None:
    answer = asked(width=512, height=320, enable_hr=True, hr_scale=2.0)
    assert (answer["low"], answer["final"]) == ([512, 320], [1024, 640])
    assert answer["notes"][0] == "MrFlow replaces Hires. fix; its target 1024x640 is the final size."
    assert asked(width=512, height=320, enable_hr=True)["final"] == [1024, 640]
    assert asked(width=512, height=320, enable_hr=True, hr_resize_x=768)["final"] == [768, 480]


def test_no_number_pretends_where_nothing_is_gained() -> None:
    answer = asked(**{**SIZE, "steps": 3})
    assert answer["expected"] is None
    assert answer["line"].endswith(" · no faster than 3 steps at this size")


def test_a_fault_is_told_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the list is damaged")

    monkeypatch.setattr(api, "preview", broken)
    assert asked(**SIZE) == {"refused": "MrFlow failed (RuntimeError: the list is damaged); see the console."}


def test_a_record_of_the_host_counts_as_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    record: Any = ModuleType("backend.args")
    record.dynamic_args = SimpleNamespace(kontext=True, edit=False, wan=False)
    monkeypatch.setitem(sys.modules, "backend.args", record)
    assert "edit model" in asked(**SIZE)["refused"]


def test_a_model_that_makes_videos_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flux_loaded(monkeypatch, UPSCALER, model=engine("Wan", wan=True)())
    assert "makes videos" in asked(**SIZE)["refused"]


def test_a_job_that_finishes_drafts_is_told_in_one_line() -> None:
    told = api.plan({"args": {"finish": ["a", "b"]}})
    assert told == {"refused": None, "line": "Generate finishes 2 drafts, each with its own settings."}
