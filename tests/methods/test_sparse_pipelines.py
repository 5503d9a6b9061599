"""Sparse methods on real pipeline classes with tiny random weights, and on the embedded model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from tiny_pipelines import TWICE

from mrflow_sched import MrFlow, demo, make_plan, sample_staged
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.methods import SparseRefine
from mrflow_sched.plan.make import make_native_plan

TOLD = ("flux1-dev", "flux2-dev", "flux2-klein-base", "flux2-klein")
"""Pipelines that tell their network where tokens lie; of these flux2-klein-base has CFG."""


@pytest.mark.parametrize("name", TOLD)
def test_just_in_time_runs_with_fewer_tokens(name: str) -> None:
    engine = PipelineEngine(tiny_pipelines.make(name))
    side = 8 * engine.family.grid
    plan = make_plan(engine.family, side, side, method="jit-7x")
    both = sample_staged(engine, plan, ["a cat", "blue"], seeds=[3, 4])
    alone = sample_staged(engine, plan, "blue", seeds=[4])
    assert bool(both.images.isfinite().all())
    torch.testing.assert_close(both.images[1:], alone.images, atol=2e-5, rtol=0)
    assert both.forwards == plan.forwards


@pytest.mark.parametrize("name", TOLD)
def test_sparse_refining_keeps_what_it_does_not_refine(name: str) -> None:
    engine = PipelineEngine(tiny_pipelines.make(name))
    side = 8 * engine.family.grid
    dense = make_plan(engine.family, side, side, low_steps=2, sigma=0.4)
    first = sample_staged(engine, dense, "a cat", seeds=[3], until=1, upscaler=TWICE).latents
    options: dict[str, Any] = {"prompt": "a cat", "seeds": [3], "latents": first, "upscaler": TWICE}
    whole = sample_staged(engine, dense, **options)
    mask = np.zeros((8, 8), np.float32)
    mask[:4] = 1.0
    half = sample_staged(engine, dense, **options, method=SparseRefine(mask=mask)).latents
    all_of_it = sample_staged(engine, dense, **options, method=SparseRefine(mask=np.ones((2, 2)))).latents
    assert whole.latents is not None
    assert half is not None
    assert all_of_it is not None
    assert torch.equal(all_of_it, whole.latents)
    other = sample_staged(engine, dense, **options, method=SparseRefine(mask=1.0 - mask)).latents
    assert other is not None
    rows = half.shape[-2] // 2
    # The lower half of one is what the other one began with: both stay as they were encoded where they are black.
    changed = (half - other).abs().amax((0, 1, 3))
    assert float(changed[:rows].mean()) > 1e-3
    sparse = sample_staged(
        engine, make_plan(engine.family, side, side, low_steps=2, sigma=0.4, refine_tokens=0.5), **options
    )
    assert bool(sparse.images.isfinite().all())


def test_mrflow_takes_the_method_by_name_and_the_share_as_an_option() -> None:
    mrflow = MrFlow(tiny_pipelines.make("flux1-dev"), upscaler=TWICE)
    size: dict[str, Any] = {"width": 128, "height": 128, "seed": 3, "output_type": "pt"}
    made = mrflow("a cat", method="jit-4x", **size)
    assert made.plan.preset == "jit-4x"
    assert made.plan.stages[0].shares[0] == 0.35
    made = mrflow("a cat", refine_tokens=0.5, **size)
    assert made.plan.stages[1].shares == (0.5,)
    with pytest.raises(MrFlowError, match="method must be 'jit-4x' or 'jit-7x', got 'jit'"):
        mrflow("a cat", method="jit", **size)


@pytest.mark.parametrize("name", ["sd3", "qwen-image"])
def test_networks_that_make_their_positions_are_refused_in_one_sentence(name: str) -> None:
    engine = PipelineEngine(tiny_pipelines.make(name))
    side = 8 * engine.family.grid
    asked: list[dict[str, Any]] = [{"method": "jit-4x"}, {"refine_tokens": 0.5, "low_steps": 1}]
    for options in asked:
        with pytest.raises(MrFlowError, match="takes tokens with their positions") as refusal:
            sample_staged(engine, make_plan(engine.family, side, side, **options), "a cat")
        assert str(refusal.value).count(". ") == 0


def test_the_embedded_model_draws_its_prompt_on_a_third_of_the_tokens() -> None:
    """The picture is that of the dense run: both are far nearer to each other than to another prompt's."""
    engine = demo.load_engine(dtype="float32")
    plan = make_plan(engine.family, 256, 256, method="jit-7x")
    dense = make_native_plan(engine.family, 256, 256, steps=11, sigmas=plan.stages[0].sigmas)
    made = sample_staged(engine, plan, "the word SUN on a blue wall", seeds=[2]).images
    whole = sample_staged(engine, dense, "the word SUN on a blue wall", seeds=[2]).images
    other = sample_staged(engine, dense, "a red star over green hills", seeds=[2]).images
    assert float((made - whole).square().mean()) < 0.1 * float((other - whole).square().mean())
