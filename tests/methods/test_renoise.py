"""Noise drawn anew after each step of stage 1, as samplers of distilled models do."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import tiny_pipelines
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler
from diffusers.schedulers import scheduling_flow_match_euler_discrete as scheduling
from tiny_pipelines import TWICE
from torch import Tensor

from mrflow_sched import MrFlow, StagedPlan, make_plan, sample_staged
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.analytic import GaussianFieldEngine
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.sampling.noise import draw_noise, stage_seed

SIZE: dict[str, Any] = {"width": 64, "height": 64, "seed": 3, "output_type": "pt"}


def fresh(step: int, shape: Any, seeds: Any = (3,)) -> Tensor:
    return draw_noise(shape, [stage_seed(seed, 0, 1000 + step, "hash") for seed in seeds])


def test_lcm_jumps_to_the_image_and_adds_noise_of_the_next_level() -> None:
    exact = GaussianFieldEngine()
    plan = make_plan(exact.family, 64, 64, seed=3, low_steps=4, renoise=1.0)
    found = sample_staged(exact, plan, "", until=1).latents
    assert found is not None
    sigmas, text = plan.stages[0].sigmas, exact.encode_text([""])
    state = clean = draw_noise(found.shape[1:], [3])
    for step, (sigma, aim) in enumerate(pairwise(sigmas)):
        clean = exact.denoise(state, torch.tensor([sigma]), text, guidance=plan.stages[0].guidance)
        state = (1 - aim) * clean + aim * fresh(step, found.shape[1:])
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)


def test_a_small_share_is_nearly_euler() -> None:
    exact = GaussianFieldEngine()
    size = (exact.family, 128, 128)
    euler = sample_staged(exact, make_plan(*size, low_steps=8, solver="euler"), "", until=1).latents
    near = sample_staged(exact, make_plan(*size, low_steps=8, renoise=1e-9), "", until=1).latents
    assert euler is not None
    assert near is not None
    torch.testing.assert_close(near, euler, rtol=1e-3, atol=1e-3)


class Consistent(GaussianFieldEngine):
    """A network that knows where the path through a state ends, of data of deviation 0.5."""

    def denoise(self, x: Tensor, sigma: Tensor, text: Any, *, guidance: float) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        return x * 0.5 / ((0.25 * (1 - s) ** 2) + s**2).sqrt()


def test_a_consistent_network_keeps_its_spread() -> None:
    engine = Consistent()
    plan = make_plan(engine.family, 256, 256, seed=3, low_steps=4, renoise=1.0)
    found = sample_staged(engine, plan, "", until=1).latents
    assert found is not None
    assert float(found.std()) == pytest.approx(0.5, rel=0.03)


def test_stochastic_sampling_makes_the_pipelines_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipelines.make("sd3")
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    if "stochastic_sampling" not in scheduler.config:
        pytest.skip("this diffusers has no stochastic_sampling")
    pipe.scheduler = scheduler
    mrflow = MrFlow(pipe, upscaler=TWICE)
    plan = mrflow.plan(64, 64, native=True, steps=4, seed=3)
    assert plan.stages[0].renoise == 1.0
    engine = PipelineEngine(pipe)
    mine = sample_staged(engine, plan, "a cat", negative_prompt="").images
    count = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(scheduling, "randn_tensor", lambda shape, **_: fresh(next(count), shape[1:]))
        latents = draw_noise(engine.latent_shape(64, 64), [3])
        scale = plan.stages[0].guidance
        asked = {"width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": scale, "latents": latents}
        theirs = pipe("a cat", negative_prompt="", output_type="pt", **asked).images
    assert next(count) >= 3
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "share"), [(LCMScheduler, 1.0), (TCDScheduler, 0.3)])
def test_lcm_and_tcd_are_followed_without_a_warning(kind: Any, share: float) -> None:
    pipe = tiny_pipelines.make("sdxl")
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    mrflow = MrFlow(pipe, upscaler=TWICE)
    asked: dict[str, Any] = {**SIZE, "preset": "4+1"}
    seeds: list[Any] = [[3, 8], 8]
    made = mrflow(["a cat", "a dog"], **(asked | {"seed": seeds[0]}))
    first, later = made.plan.stages
    assert (first.renoise, first.solver, later.renoise) == (share, "euler", 0.0)
    assert not any("adds noise" in each for each in made.warnings)
    alone = mrflow("a dog", **(asked | {"seed": seeds[1]})).images
    torch.testing.assert_close(alone, made.images[1:], rtol=1e-3, atol=1e-3)
    plain = mrflow("a dog", **(asked | {"seed": seeds[1], "renoise": 0}))
    assert plain.plan.stages[0].renoise == 0.0
    assert not torch.equal(plain.images, alone)


def test_a_plan_with_it_is_read_back_whole() -> None:
    plan = make_plan("flux1-dev", 1024, 1024, "8+1", renoise=0.3)
    assert " renoise=0.3 " in plan.to_string()
    for again in (StagedPlan.from_string(plan.to_string()), StagedPlan.from_json(plan.to_json())):
        assert again == plan
    assert "renoise" not in make_plan("flux1-dev", 1024, 1024).to_string()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"renoise": 1.5}, "renoise must be a number from 0 to 1, got 1.5; 0 draws none"),
        ({"renoise": 1, "solver": "multistep"}, "solver must be euler with renoise=1, which draws noise after each"),
        ({"renoise": 1, "method": "jit-4x"}, "leave renoise=1 out"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused(options: Any, sentence: str) -> None:
    with pytest.raises(MrFlowError, match=sentence):
        make_plan("flux1-dev", 1024, 1024, **options)


def test_a_callback_counts_the_steps_of_a_stage_that_is_walked_in_parts() -> None:
    pipe = tiny_pipelines.make("sd3")
    seen: list[int] = []

    def callback(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return tensors

    mrflow = MrFlow(pipe, upscaler=TWICE)
    options: dict[str, Any] = {"low_steps": 3, "refine_steps": 1, "renoise": 1.0}
    mrflow("a cat", width=64, height=64, callback_on_step_end=callback, **options)
    assert seen == [0, 1, 2, 0]
