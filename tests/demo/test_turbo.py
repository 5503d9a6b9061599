"""The embedded model's few-step LoRA and the preset that puts it on in stage 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mrflow_sched import MrFlow, StagedPlan, demo, load_upscaler, make_plan, sample_staged
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.demo.engine import with_lora
from mrflow_sched.engines.analytic import GaussianFieldEngine
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.plan.families import get_family

PROMPT = "a red star over green hills, the word FLOW"


@pytest.fixture(scope="module")
def engine() -> PipelineEngine:
    return demo.load_engine(device="cpu", dtype="float32")


def run(engine: Any, *arguments: Any, **options: Any) -> Any:
    plan = make_plan(engine.family, 256, 256, *arguments, seed=3, **options)
    return sample_staged(engine, plan, PROMPT, upscaler=load_upscaler(demo.upscaler_path()), keep_stages=True)


@pytest.mark.parametrize("options", [{}, {"low_steps": 3}, {"sigma": 0.2}, {"upscaler_kind": "interpolation"}], ids=str)
def test_the_preset_asks_for_the_lora_in_stage_1_whatever_else_is_asked(options: Any) -> None:
    plan = make_plan("demo", 256, 256, "turbo", **options)
    assert [stage.few_step for stage in plan.stages] == [True, False]
    for again in (StagedPlan.from_string(plan.to_string()), StagedPlan.from_json(plan.to_json())):
        assert again == plan
    assert "few_step" not in make_plan("demo", 256, 256, "4+1").to_string()


def test_fast_is_not_turbo() -> None:
    family = get_family("demo")
    assert family.get_preset("turbo").low_steps < family.get_preset("fast").low_steps


def test_the_lora_is_on_in_stage_1_and_off_in_the_next(engine: PipelineEngine) -> None:
    before = {name: weight.clone() for name, weight in engine.network.named_parameters()}
    turbo, plain = run(engine, "turbo"), run(engine, "4+1")
    assert not torch.equal(turbo.stages[0].image, plain.stages[0].image)
    for name, weight in engine.network.named_parameters():
        assert torch.equal(weight, before[name])
    # The later stage is the network's own: from turbo's first image both make the same.
    plan = make_plan(engine.family, 256, 256, "4+1", seed=3)
    first = turbo.stages[0].image
    again = sample_staged(engine, plan, PROMPT, upscaler=load_upscaler(demo.upscaler_path()), image=first)
    torch.testing.assert_close(again.images, turbo.images)


def test_it_adds_what_diffusers_would_add() -> None:
    pytest.importorskip("peft")
    own, theirs = (demo.load_engine(device="cpu", dtype="float32") for _ in range(2))
    pipe: Any = theirs.pipe
    pipe.load_lora_weights(demo.turbo_path().parent, weight_name=demo.turbo_path().name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = dict(pipe.transformer.named_parameters())
    changed = 0
    for name, weight in with_lora(own.network, demo.turbo_path()).named_parameters():
        torch.testing.assert_close(weight, fused[name])
        changed += not torch.equal(weight, own.network.get_parameter(name))
    assert changed > 30


def test_another_lora_stays_on_beside_it() -> None:
    peft = pytest.importorskip("peft")
    engine = demo.load_engine(device="cpu", dtype="float32")
    plain = run(engine, "turbo")
    network: Any = engine.network
    network.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    both = run(engine, "turbo")
    network.disable_adapters()
    off = run(engine, "turbo")
    assert not torch.equal(both.stages[0].image, plain.stages[0].image)
    torch.testing.assert_close(off.images, plain.images)


def test_a_model_without_one_is_refused_before_it_runs() -> None:
    exact = GaussianFieldEngine()
    plan = StagedPlan.from_string(make_plan("demo", 256, 256, "turbo").to_string())
    other = make_plan(exact.family, 64, 64)
    from dataclasses import replace

    asked = replace(other, stages=(replace(other.stages[0], few_step=True), *other.stages[1:]))
    with pytest.raises(MrFlowError, match="comes with a few-step LoRA, and GaussianFieldEngine has none"):
        sample_staged(exact, asked, "")
    borrowed = MrFlow(demo.load_engine(device="cpu").pipe)
    assert plan.stages[0].few_step
    with pytest.raises(MrFlowError, match="put one on your model, and give its steps as the preset, such as 4\\+1"):
        borrowed(PROMPT, preset="turbo", width=256, height=256)
