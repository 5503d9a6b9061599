"""EDM models on SDXL's network (Playground 2.5, CosXL): diffusers' own schedule, loop and images, and refinement."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import tiny_pipelines
import torch
from pipeline_tools import listening, theirs_with

from mrflow_sched import MrFlow, MrFlowError, make_plan, sample_staged
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler
from mrflow_sched.plan.families import ShiftRule
from mrflow_sched.plan.recipes import sigmas_from_recipe
from mrflow_sched.plan.schedule import edm_sigmas
from mrflow_sched.sampling.noise import add_noise, draw_noise, model_sigmas, sigma_to_ve, to_denoised

PLAYGROUND: dict[str, Any] = {}
COSXL = {"sigma_data": 1.0, "sigma_max": 120.0, "sigma_schedule": "exponential", "prediction_type": "v_prediction"}
BOTH = pytest.mark.parametrize("config", [PLAYGROUND, COSXL], ids=["playground", "cosxl"])


def edm_pipe(config: dict[str, Any]) -> Any:
    """SDXL with an EDM scheduler, and with a mean and deviation per channel of latents, as Playground 2.5 has them."""
    pipe = tiny_pipelines.make("sdxl")
    pipe.scheduler = tiny_pipelines.diffusers().EDMEulerScheduler(**config)
    pipe.vae.register_to_config(
        latents_mean=[-1.6, 1.1, 0.3, -2.8], latents_std=[8.4, 5.9, 5.0, 5.2], scaling_factor=0.5
    )
    return pipe


@BOTH
@pytest.mark.parametrize("steps", [2, 25])
def test_a_plan_has_diffusers_own_schedule(config: dict[str, Any], steps: int) -> None:
    pipe = edm_pipe(config)
    engine = PipelineEngine(pipe)
    stage = make_plan(engine.family, 128, 128, low_steps=steps, solver="euler").stages[0]
    theirs = pipe.scheduler
    theirs.set_timesteps(steps)
    ve = model_sigmas(stage.sigmas, engine.family.prediction, engine.family.shift.largest_ve)
    assert [sigma * theirs.config.sigma_data for sigma in ve] == pytest.approx(theirs.sigmas.tolist(), rel=1e-5)
    walked = MrFlowScheduler.for_stage(theirs.config, ve, "euler", prediction=engine.family.prediction)
    assert walked.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist(), abs=1e-6)
    assert sigmas_from_recipe(stage.recipe) == stage.sigmas


@BOTH
def test_stage_1_is_the_pipelines_own_image(config: dict[str, Any]) -> None:
    pipe = edm_pipe(config)
    engine = PipelineEngine(pipe)
    plan = make_plan(engine.family, 128, 128, low_steps=6, solver="euler")
    low = plan.stages[0]
    noise = draw_noise(engine.latent_shape(low.width, low.height), [3])
    ve = model_sigmas(low.sigmas, engine.family.prediction, engine.family.shift.largest_ve)
    ours = engine.sample_stage("euler", noise * ve[0], ve, engine.encode_text(["a cat"]), guidance=low.guidance)
    start = noise * (pipe.scheduler.config.sigma_max / pipe.scheduler.init_noise_sigma)
    asked: dict[str, Any] = {
        "width": low.width,
        "height": low.height,
        "num_inference_steps": 6,
        "guidance_scale": low.guidance,
    }
    theirs = pipe("a cat", latents=start, output_type="pt", **asked).images
    torch.testing.assert_close(engine.decode(ours), theirs, rtol=0, atol=1e-4)
    assert float(theirs.std()) > 0.01


@BOTH
def test_refining_reads_the_upscaled_image_with_the_plans_noise(config: dict[str, Any]) -> None:
    pipe = edm_pipe(config)
    engine = PipelineEngine(pipe)
    side = 16 * engine.family.grid
    plan = make_plan(engine.family, side, side, low_steps=3, sigma=0.2, seed=3)
    with listening(pipe) as heard:
        result = sample_staged(engine, plan, "a cat", keep_stages=True)
    upscaled = next(stage.image for stage in result.stages if stage.name == "stage 2 upscaled")
    shape = engine.latent_shape(side, side)
    prediction = engine.family.prediction
    noisy = add_noise(engine.encode(upscaled), draw_noise(shape, [4]), 0.2, prediction)
    large = [index for index, state in enumerate(heard.states) if state.shape[-1] == shape[-1]]
    ve = sigma_to_ve(0.2)
    torch.testing.assert_close(heard.states[large[0]][:1], noisy / math.hypot(ve, 1.0), rtol=0, atol=1e-4)
    data = pipe.scheduler.config.sigma_data
    assert [float(heard.timesteps[index][0]) for index in large] == pytest.approx([0.25 * math.log(ve * data)])
    assert float(result.images.std()) > 0.01


def test_latents_that_come_out_are_the_pipelines_own() -> None:
    pipe = edm_pipe(PLAYGROUND)
    mrflow = MrFlow(pipe)
    side = 16 * mrflow.family.grid
    asked: dict[str, Any] = {"width": side, "height": side, "low_steps": 2, "seed": 3}
    latents = mrflow("a cat", output_type="latent", **asked).images
    config = pipe.vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    decoded = pipe.vae.decode(latents * std / config.scaling_factor + mean).sample / 2 + 0.5
    image = mrflow("a cat", output_type="pt", **asked).images
    torch.testing.assert_close(decoded.detach().clamp(0, 1), image, rtol=0, atol=1e-4)


@BOTH
def test_the_scheduler_by_itself_is_edm_euler(config: dict[str, Any]) -> None:
    theirs = theirs_with("EDMEulerScheduler", **config)
    ours: Any = MrFlowScheduler.from_config(theirs.config, solver="euler")
    states: list[torch.Tensor] = []
    for each in (theirs, ours):
        each.set_timesteps(7)
        x = draw_noise((4, 8, 8), [5]) * theirs.init_noise_sigma
        for time in each.timesteps:
            output = torch.tanh(1.3 * each.scale_model_input(x, time) + 0.2 * time)
            x = each.step(output, time, x, return_dict=False)[0]
        states.append(x)
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-4)
    assert ours.init_noise_sigma == pytest.approx(theirs.init_noise_sigma, rel=1e-3)
    told = theirs.timesteps
    ours.set_timesteps(timesteps=told.tolist())
    torch.testing.assert_close(ours.timesteps, told, rtol=0, atol=1e-6)
    noise = torch.ones(1, 4)
    noisy = copy.deepcopy(ours).add_noise(torch.zeros(1, 4), noise, told[2:3])
    torch.testing.assert_close(noisy, theirs.sigmas[2] * noise, rtol=1e-5, atol=0)


def test_the_output_of_an_edm_network_is_v_with_the_other_sign() -> None:
    x, output = draw_noise((4, 8, 8), [1]), draw_noise((4, 8, 8), [2])
    torch.testing.assert_close(to_denoised(output, x, 3.0, "edm"), to_denoised(-output, x, 3.0, "v"))
    # An image that is nothing but the noise which the network was asked to name: nothing is left.
    torch.testing.assert_close(to_denoised(-x / 3.0 / math.hypot(3.0, 1.0), x, 3.0, "edm"), x * 0.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"sigma_data": 0.0},
        {"sigma_data": float("nan")},
        {"sigma_max": 1e9},
        {"sigma_min": 80.0},
        {"rho": 0.5},
        {"sigma_min": None},
    ],
)
def test_impossible_levels_get_one_sentence(options: dict[str, Any]) -> None:
    config = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "prediction_type": "epsilon"}
    with pytest.raises(MrFlowError, match=r"sigma_|rho"):
        MrFlowScheduler.from_config({**config, **options}).set_timesteps(4)
    with pytest.raises(MrFlowError, match="needs sigma_data"):
        MrFlowScheduler(prediction_type="edm")
    with pytest.raises(MrFlowError, match="sigma_max and sigma_min"):
        ShiftRule("edm", sigma_min=0.004)


@pytest.mark.parametrize(
    "recipe", ["edm 5 max=1.0", "edm 5 max=1.0 min=2.0", "edm 5 max=1e9 min=1.0", "edm 5 max=2 min=1 rho=0"]
)
def test_impossible_recipes_are_refused(recipe: str) -> None:
    with pytest.raises(MrFlowError):
        sigmas_from_recipe(recipe)


def test_even_logarithms_without_rho() -> None:
    ve = [sigma / (1 - sigma) for sigma in edm_sigmas(5, largest=100.0, smallest=0.01, rho=None)[1:-1]]
    assert ve == pytest.approx([10.0, 1.0, 0.1, 0.01])
