"""CFG between two sigmas only: fewer forwards, and the pictures that its ends promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_pipelines
import torch

from mrflow_sched import MrFlow, StagedPlan, get_family, make_plan, sample_staged
from mrflow_sched.engines.analytic import GaussianFieldEngine
from mrflow_sched.methods import GuidanceInterval, Plain, StageRun


def test_forwards_are_counted_level_by_level() -> None:
    plan = make_plan("qwen-image", 1024, 1024, guidance_interval=(0.3, 0.9))
    first = plan.stages[0]
    inside = sum(0.3 <= sigma <= 0.9 for sigma in first.sigmas[:-1])
    assert 0 < inside < 12
    assert first.forwards == 12 + inside
    assert plan.stages[1].forwards == 2
    full = make_plan("qwen-image", 1024, 1024)
    assert full.stages[0].forwards == 24
    assert plan.cost_ratio > full.cost_ratio
    heun = make_plan("qwen-image", 1024, 1024, guidance_interval=(0.3, 0.9), solver="heun").stages[0]
    levels = [sigma for pair in zip(heun.sigmas, heun.sigmas[1:], strict=False) for sigma in pair if sigma > 0]
    assert heun.forwards == sum(2 if 0.3 <= sigma <= 0.9 else 1 for sigma in levels)


def test_the_interval_is_kept_in_the_plans_line_and_json() -> None:
    plan = make_plan("sd35", 1024, 1024, guidance_interval=(0.25, 0.875))
    assert StagedPlan.from_string(plan.to_string()) == plan
    assert StagedPlan.from_json(plan.to_json()) == plan
    assert " guidance_interval=0.25/0.875 " in plan.to_string()
    old = make_plan("sd35", 1024, 1024)
    assert "@0" not in old.to_string()


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.9, 0.1), (-0.1, 0.5), (0.1, 1.5), ("a", 1.0)])
def test_what_is_no_interval_gets_one_sentence(interval: Any) -> None:
    with pytest.raises(ValueError, match="two sigmas, 0 <= low < high <= 1"):
        make_plan("sd35", 1024, 1024, guidance_interval=interval)


def test_where_nothing_is_saved_it_is_refused() -> None:
    assert get_family("flux1-dev").guidance_kind == "embedded"
    with pytest.raises(ValueError, match="this run of flux1-dev has none"):
        make_plan("flux1-dev", 1024, 1024, guidance_interval=(0.1, 0.9))
    with pytest.raises(ValueError, match="this run of sd35 has none"):
        make_plan("sd35", 1024, 1024, guidance=1.0, guidance_interval=(0.1, 0.9))


def test_stages_without_an_interval_are_left_to_the_method_inside() -> None:
    stages: list[int] = []

    class Noting(Plain):
        def stage(self, run: StageRun, latents: torch.Tensor) -> torch.Tensor:
            stages.append(run.index)
            return super().stage(run, latents)

    exact = GaussianFieldEngine()
    engine = replace(exact, family=replace(exact.family, guidance_kind="cfg", guidance=4.0))
    plan = make_plan(engine.family, 32, 32, low_steps=4, guidance_interval=(0.3, 0.9))
    made = sample_staged(engine, plan, "", method=GuidanceInterval(Noting()))
    assert stages == [1]
    assert torch.equal(made.images, sample_staged(engine, plan, "").images)


@pytest.mark.parametrize("name", ["sd3", "qwen-image", "z-image", "sdxl"])
def test_the_network_runs_once_outside_and_twice_inside(name: str) -> None:
    pipe = tiny_pipelines.make(name)
    network: Any = getattr(pipe, "transformer", None) or pipe.unet
    rows: list[int] = []
    embedded = next(module for module in network.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)))
    handle = embedded.register_forward_hook(lambda _module, inputs, _out: rows.append(len(inputs[0])))
    run = MrFlow(pipe)
    sides: dict[str, Any] = {"width": 128, "height": 128, "factor": 2.0, "seed": 4, "output_type": "pt"}

    def made(**numbers: Any) -> tuple[Any, int]:
        rows.clear()
        result = run("a star", low_steps=4, refine_steps=0, solver="euler", **sides, **numbers)
        return result.images, sum(rows)

    whole, both = made()
    covered, all_of_them = made(guidance_interval=(0.0, 1.0))
    sigmas = run.plan(128, 128, low_steps=4, refine_steps=0, factor=2.0, solver="euler").stages[0].sigmas
    cut = (sigmas[1] + sigmas[2]) / 2
    part, some = made(guidance_interval=(0.0, cut))
    off, once = made(guidance_scale=_off(name))
    handle.remove()
    assert torch.allclose(whole, covered, atol=1e-5)
    assert both == all_of_them == 2 * once
    assert some == once * 6 // 4  # two of four steps guided
    assert float((part - whole).abs().max()) > 1e-5
    assert float((part - off).abs().max()) > 1e-5


def _off(name: str) -> float:
    """The pipelines' own word for guidance that is off."""
    return 0.0 if name == "z-image" else 1.0
