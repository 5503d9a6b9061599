"""Pipelines that count noise in another way: what their networks are told and handed, and the schedules behind it."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy
import pytest
import tiny_pipelines
import torch
from pipeline_tools import listening, theirs_with
from tiny_pipelines import TWICE

from mrflow_sched import MrFlow, MrFlowError, make_native_plan, make_plan
from mrflow_sched.engines.diffusers.layouts import find_layout
from mrflow_sched.engines.diffusers.layouts.find import check_from_text
from mrflow_sched.engines.diffusers.layouts.shift import shift_rule, ve_rule
from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler
from mrflow_sched.plan.betas import TrainingBetas, betas_sigmas
from mrflow_sched.plan.families import FAMILIES
from mrflow_sched.plan.recipes import recipe_of_betas, recipe_of_steps, sigmas_from_recipe
from mrflow_sched.plan.schedule import native_sigmas, refine_sigmas, shift_sigma
from mrflow_sched.plan.trigflow import angle_of, sigma_of_angle, trigflow_sigmas
from mrflow_sched.sampling.noise import model_sigmas


@functools.cache
def tiny(name: str) -> Any:
    return tiny_pipelines.make(name)


def told(name: str, steps: int, **options: Any) -> tuple[list[float], Any]:
    """What the network is told at its first call of each evaluation, in both stages; and the plan."""
    pipe = tiny(name)
    side = 8 * find_layout(pipe).family.grid
    with listening(pipe) as heard:
        made = MrFlow(pipe, upscaler=TWICE)(
            "a star", width=side, height=side, low_steps=steps, solver="euler", seed=2, **options
        )
    times = [float(time[0]) for time in heard.timesteps]
    return [time for index, time in enumerate(times) if not index or time != times[index - 1]], made.plan


# --------------------------------------------------------------------------------------------------- what is told


@pytest.mark.parametrize(("name", "first", "end", "less"), [("cogview4", 1000, 1, 0), ("glm-image", 1000, None, 1)])
def test_times_before_a_shift_by_a_root_of_tokens(name: str, first: int, end: int | None, less: int) -> None:
    """Whole steps in stage 1; in the refine stage what a schedule of that size would tell at its sigma."""
    times, plan = told(name, 4)
    even = numpy.linspace(first, 1.0, 4) if end else numpy.linspace(first, 1.0, 5)[:-1]
    assert times[:4] == [step - less for step in even.astype(int)]
    refine = plan.stages[1]
    factor = 0.25 + 0.75 * math.sqrt(refine.tokens / 256)
    assert shift_sigma((times[4] + less) / 1000, factor) == pytest.approx(0.12, abs=1e-6)
    low = 0.25 + 0.75 * math.sqrt(plan.stages[0].tokens / 256)
    assert plan.stages[0].sigmas[1] == pytest.approx(shift_sigma(int(even[1]) / 1000, low))


def test_omnigen_is_told_how_much_image_there_is() -> None:
    assert told("omnigen", 4)[0] == pytest.approx([0, 250, 500, 750, 880])


def test_omnigen_without_guidance_runs_one_branch() -> None:
    pipe = tiny("omnigen")
    with listening(pipe) as heard:
        made = MrFlow(pipe, upscaler=TWICE)(
            "a star", width=128, height=128, low_steps=2, solver="euler", guidance_scale=1.0
        )
    assert [len(state) for state in heard.states] == [1, 1, 1]
    assert made.plan.forwards == 3


def test_cosmos_is_told_flow_sigmas_and_handed_flow_states() -> None:
    times, plan = told("cosmos-predict2", 4)
    ve = model_sigmas(plan.stages[0].sigmas, "epsilon", 80.0)
    assert times == pytest.approx([*(sigma / (1 + sigma) for sigma in ve[:-1]), 0.12], rel=1e-5)
    assert ve[0] == 80.0
    assert ve[3] == pytest.approx(0.002)
    assert not MrFlow(tiny("cosmos-predict2"), upscaler=TWICE).experimental
    assert not any("not a flow" in note for note in plan.notes)


def test_sana_sprint_has_the_angles_of_its_pipeline() -> None:
    times, plan = told("sana-sprint", 2)
    assert times == pytest.approx([1.0, math.tan(1.3) / (1 + math.tan(1.3)), 0.12], abs=1e-6)
    assert plan.stages[0].recipe == "trigflow 2 middle=1.3"
    assert recipe_of_steps(plan.stages[0].recipe, 4) == "trigflow 4"
    assert told("sana-sprint", 3)[0][:3] == pytest.approx(
        [1.0, sigma_of_angle(math.pi / 3), sigma_of_angle(math.pi / 6)]
    )
    assert angle_of(sigma_of_angle(0.4)) == pytest.approx(0.4)
    assert trigflow_sigmas(1) == (1.0, 0.0)
    with pytest.raises(MrFlowError, match="steps must be a whole number from 2 to 2, got 3"):
        trigflow_sigmas(3, 1.3)


def test_lcm_is_handed_states_of_unit_variance() -> None:
    pipe = tiny("lcm")
    with listening(pipe) as heard:
        MrFlow(pipe, upscaler=TWICE)("a star", width=256, height=256, low_steps=3, solver="euler", seed=2)
    assert [float(state.std()) for state in heard.states[:1]] == pytest.approx([1.0], abs=0.05)


@pytest.mark.parametrize("name", ["sana-sprint", "lcm"])
def test_a_state_that_a_callback_changes_counts_in_the_loops_own_scale(name: str) -> None:
    pipe = tiny(name)

    def halved(_pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0.5} if step == 0 else {}

    def heard_by(callback: Any) -> list[float]:
        with listening(pipe) as heard:
            MrFlow(pipe, upscaler=TWICE)(
                "a star",
                width=256,
                height=256,
                low_steps=2,
                solver="euler",
                renoise=0,
                seed=2,
                callback_on_step_end=callback,
            )
        return [float(state.abs().mean()) for state in heard.states]

    seen = heard_by(halved)
    plain = heard_by(None)
    assert seen[0] == plain[0]
    assert seen[1] == pytest.approx(0.5 * plain[1], rel=1e-5)


# ------------------------------------------------------------------------------------------------ once for a run


def test_glm_image_writes_its_tokens_once_for_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, sizes = tiny("glm-image"), list[tuple[int, int]]()
    write = type(pipe).generate_prior_tokens

    def noted(self: Any, **named: Any) -> Any:
        sizes.append((named["width"], named["height"]))
        return write(self, **named)

    monkeypatch.setattr(type(pipe), "generate_prior_tokens", noted)
    state = torch.random.get_rng_state()
    with listening(pipe) as heard:
        MrFlow(pipe, upscaler=TWICE)(["a star", "hills"], width=192, height=128, low_steps=1, solver="euler", seed=2)
    assert sizes == [(96, 64), (96, 64)]
    assert torch.equal(state, torch.random.get_rng_state())
    low, high = (heard.arguments[call]["prior_token_id"] for call in (0, -1))
    assert low.shape == (2, 24)
    enlarged = low.view(2, 1, 4, 6).repeat_interleave(2, 2).repeat_interleave(2, 3).view(2, -1)
    assert torch.equal(high, enlarged)
    assert not torch.equal(low[0], low[1])


def test_glm_image_takes_tokens_that_are_ready() -> None:
    pipe = tiny("glm-image")
    layout = find_layout(pipe)
    text = layout.encode_text(["a star"])
    with pytest.raises(MrFlowError, match="prompt_embeds came without prior_token_ids"):
        layout.encode_text(None, None, {"prompt_embeds": text["prompt_embeds"]})
    ready = torch.arange(24)[None]
    given = layout.drawn_arguments({"prior_token_ids": ready}, [0], 192, 128)["prior_token_ids"]
    assert torch.equal(given.view(8, 12)[::2, ::2].reshape(1, -1), ready)
    with pytest.raises(MrFlowError, match="prior_token_ids holds 23 tokens"):
        layout.drawn_arguments({"prior_token_ids": ready[:, :23]}, [0], 192, 128)


def test_cosmos_asks_its_safety_checker_once_and_heeds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, texts, pictures = tiny("cosmos-predict2"), list[str](), list[Any]()
    guard = type(pipe.safety_checker)
    read, look = guard.check_text_safety, guard.check_video_safety
    monkeypatch.setattr(guard, "check_text_safety", lambda self, text: (texts.append(text), read(self, text))[1])
    monkeypatch.setattr(guard, "check_video_safety", lambda self, f: (pictures.append(f.shape), look(self, f))[1])
    asked: dict[str, Any] = {"width": 128, "height": 128, "low_steps": 1, "output_type": "np"}
    made = MrFlow(pipe, upscaler=TWICE)(["a star"] * 2, **asked)
    assert texts == ["a star"]
    assert pictures == [(1, 128, 128, 3)] * 2
    assert made.nsfw_content_detected == (False, False)
    with pytest.raises(MrFlowError, match="safety checker refuses the prompt 'forbidden'"):
        MrFlow(pipe, upscaler=TWICE)("forbidden", **asked)
    monkeypatch.setattr(guard, "check_video_safety", lambda self, frames: None)
    black = MrFlow(pipe, upscaler=TWICE)("a star", **asked)
    assert not numpy.asarray(black.images[0]).any()
    without = copy.copy(pipe)
    without.safety_checker = None
    with pytest.raises(MrFlowError, match="pipe has no safety_checker"):
        MrFlow(without, upscaler=TWICE)("a star", **asked)


@pytest.mark.parametrize("name", ["omnigen", "glm-image"])
def test_a_negative_prompt_that_cannot_be_given_is_told_of(name: str) -> None:
    pipe = tiny(name)
    made = MrFlow(pipe, upscaler=TWICE)("a star", negative_prompt="rain", width=128, height=128, low_steps=1)
    assert any("has a negative prompt of its own: yours was ignored" in said for said in made.warnings)


def test_cogview3_heeds_a_negative_prompt() -> None:
    pipe = tiny("cogview3-plus")
    asked: dict[str, Any] = {"width": 128, "height": 128, "low_steps": 2, "output_type": "np", "seed": 1}
    plain, other = (
        MrFlow(pipe, upscaler=TWICE)("a star", negative_prompt=said, **asked).images[0] for said in (None, "rain")
    )
    assert not numpy.array_equal(plain, other)


# ---------------------------------------------------------------------------------------------------- schedules

FLOW = {"shift": 3.0, "use_dynamic_shifting": True}


@pytest.mark.parametrize(
    "config",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"time_shift_type": "linear"},
        {"time_shift_type": "linear", "use_karras_sigmas": True, "shift_terminal": 0.02},
        {"use_dynamic_shifting": False, "use_karras_sigmas": True},
        {"use_dynamic_shifting": False, "use_exponential_sigmas": True},
    ],
)
def test_flow_schedules_are_diffusers_own(config: dict[str, Any]) -> None:
    theirs = theirs_with("FlowMatchEulerDiscreteScheduler", **{**FLOW, **config})
    rule = shift_rule(theirs, FAMILIES["flux1-dev"].shift)
    family = replace(FAMILIES["flux1-dev"], shift=rule)
    plan = make_native_plan(family, 1024, 1024, steps=7)
    mu = 1.15 if theirs.config.use_dynamic_shifting else None
    theirs.set_timesteps(sigmas=[1 - index / 7 for index in range(7)], mu=mu)
    assert plan.stages[0].sigmas == pytest.approx(theirs.sigmas.tolist(), abs=2e-6)
    assert sigmas_from_recipe(plan.stages[0].recipe) == plan.stages[0].sigmas


@pytest.mark.parametrize("steps", [1, 2, 5, 50, 100, 214, 370])
def test_whole_training_steps_are_numpys(steps: int) -> None:
    closed, ahead = numpy.linspace(1000, 1.0, steps), numpy.linspace(1000, 1.0, steps + 1)[:-1]
    for options, theirs in (({"sigma_min": 0.001}, closed), ({"ahead": 0.001}, ahead)):
        ours = native_sigmas(steps, whole=1000, **options)  # type: ignore[arg-type]
        assert [round(1000 * sigma, 9) for sigma in ours[:-1]] == theirs.astype(int).tolist()


@pytest.mark.parametrize(
    "config",
    [
        {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
        {"beta_start": 0.00085, "beta_end": 0.014, "beta_schedule": "scaled_linear", "num_train_timesteps": 1100},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.0001 * step for step in range(1, 101)], "num_train_timesteps": 100},
    ],
)
def test_any_training_betas_are_followed(config: dict[str, Any]) -> None:
    theirs = theirs_with("EulerDiscreteScheduler", **config, timestep_spacing="trailing")
    theirs.set_timesteps(7)
    rule = ve_rule(theirs, FAMILIES["sdxl"].shift)
    assert rule.betas is not None
    sigmas = betas_sigmas(7, rule.betas)
    assert model_sigmas(sigmas, "epsilon", rule.largest_ve) == pytest.approx(theirs.sigmas.tolist(), rel=2e-4)
    plan = make_plan(replace(FAMILIES["sdxl"], shift=rule), 1024, 1024, low_steps=7)
    assert plan.stages[0].sigmas == sigmas
    walked = MrFlowScheduler.for_stage(
        theirs.config, model_sigmas(sigmas, "epsilon", rule.largest_ve), "euler", prediction="epsilon"
    )
    assert walked.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)


def test_a_divided_signal_to_noise_ratio_is_cogvideoxs() -> None:
    theirs = import_module("diffusers").CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", snr_shift_scale=4.0, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    rule = ve_rule(theirs, FAMILIES["cogview3-plus"].shift)
    assert rule == FAMILIES["cogview3-plus"].shift
    assert rule.betas is not None
    levels = torch.tensor(rule.betas.levels[:-2], dtype=torch.float64)
    kept = theirs.alphas_cumprod[:-2].double()
    torch.testing.assert_close(levels, ((1 - kept) / kept).sqrt(), rtol=1e-4, atol=1e-6)
    assert rule.largest_ve == pytest.approx(4096, rel=1e-6)


def test_recipes_of_betas_say_what_differs() -> None:
    for betas in (
        TrainingBetas(last=0.014, count=1100),
        TrainingBetas(first=0.0001, last=0.02, spacing="linear"),
        TrainingBetas(spacing="cosine"),
        TrainingBetas(zero_snr=True, snr_scale=4.0),
        TrainingBetas(spacing="own", own=(0.001,) * 50, count=50),
    ):
        recipe = recipe_of_betas(5, betas)
        assert sigmas_from_recipe(recipe) == betas_sigmas(5, betas)
        assert all(after > before for before, after in pairwise(betas.levels))
    for wrong, sentence in (
        ("betas 5 first=0.1 last=0.2 power=3", "power must be 1 or 2"),
        ("betas 5 first=0.1 last=0.2 power=1 count=2.5", "must be whole numbers"),
        ("betas 5 first=2.0 last=0.2 power=1", "beta_start must be a number"),
        ("betas 5 first=0.1", "lacks power"),
        ("betas 50 cosine=1 count=20", "steps must be a whole number from 1 to 20"),
        ("trigflow 2 middle=9", "middle must be a number"),
    ):
        with pytest.raises(MrFlowError, match=sentence):
            sigmas_from_recipe(wrong)


def test_rising_sigmas_are_diffusers_own() -> None:
    theirs = theirs_with("FlowMatchEulerDiscreteScheduler", invert_sigmas=True, shift=2.0)
    ours: Any = MrFlowScheduler.from_config(theirs.config, solver="euler")
    x, output = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5])
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    made = [each.step(output, each.timesteps[0], x, return_dict=False)[0] for each in (theirs, ours)]
    torch.testing.assert_close(made[1], made[0])


def test_angles_are_diffusers_own_for_one_step() -> None:
    if not hasattr(tiny_pipelines.diffusers(), "SCMScheduler"):
        pytest.skip("the installed diffusers has no SCMScheduler")
    theirs = theirs_with("SCMScheduler", sigma_data=0.5)
    with pytest.warns(UserWarning, match="adds none"):
        ours: Any = MrFlowScheduler.from_config({**theirs.config, "_class_name": "SCMScheduler"}, solver="euler")
    theirs.set_timesteps(1, max_timesteps=math.pi / 2, intermediate_timesteps=None)
    ours.set_timesteps(1, max_timesteps=math.pi / 2, intermediate_timesteps=None)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    x, output = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    made = [each.step(output, each.timesteps[0], x, return_dict=False)[1] for each in (theirs, ours)]
    torch.testing.assert_close(made[1], made[0])


def test_refine_stages_of_betas_start_at_equal_signal_to_noise() -> None:
    times, plan = told("kolors", 2)
    assert plan.stages[1].sigmas == refine_sigmas(0.12, 1)
    levels = TrainingBetas(last=0.014, count=1100).levels
    wanted = 0.12 / 0.88
    low = max(step for step, level in enumerate(levels) if level <= wanted)
    assert low < times[-1] < low + 1


# ------------------------------------------------------------------------------------------- community pipelines


def test_a_community_pipeline_whose_image_is_optional_makes_pictures_from_text() -> None:
    library = import_module("diffusers")

    class LongPrompts(library.StableDiffusionPipeline):
        def __call__(self, prompt: Any, image: Any = None, strength: float = 0.8, **others: Any) -> Any:
            return super().__call__(prompt=prompt, **others)

    class AnyImage(library.StableDiffusionPipeline):
        def __call__(self, prompt: Any, image: Any, strength: float = 0.8, **others: Any) -> Any:
            return super().__call__(prompt=prompt, **others)

    class Passing(library.FluxImg2ImgPipeline):
        def __call__(self, *values: Any, **others: Any) -> Any:
            return super().__call__(*values, **others)

    check_from_text(LongPrompts)
    for kind in (AnyImage, Passing, library.StableDiffusionImg2ImgPipeline):
        with pytest.raises(MrFlowError, match="which starts from an image"):
            check_from_text(kind)
