"""Stages in fewer bits: torchao's quantisation, beside the network that its owner keeps."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_pipelines
import torch
from tiny_pipelines import TWICE

from mrflow_sched import MrFlow, demo, load_upscaler, make_plan, sample_staged
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.analytic import GaussianFieldEngine
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.engines.diffusers.precision import LoweredNetworks
from mrflow_sched.measure.metrics import psnr
from mrflow_sched.methods import Plain

pytest.importorskip("torchao")

PRECISIONS: list[Any] = [
    {"precision": "int8", "refine_precision": "own"},
    {"refine_precision": "int8"},
    {"precision": "int8"},
]
PROMPT = "a red star over green hills, the word FLOW"


@pytest.fixture(scope="module")
def engine() -> PipelineEngine:
    return demo.load_engine(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def upscaler() -> Any:
    return load_upscaler(demo.upscaler_path())


def test_each_stage_has_its_precision(engine: PipelineEngine, upscaler: Any) -> None:
    plan = make_plan(engine.family, 256, 256, seed=3)
    before = {name: weight.clone() for name, weight in engine.network.named_parameters()}
    own = sample_staged(engine, plan, PROMPT, upscaler=upscaler)
    first, later, both = (
        sample_staged(engine, make_plan(engine.family, 256, 256, seed=3, **names), PROMPT, upscaler=upscaler)
        for names in PRECISIONS
    )
    assert first.latents is not None
    near = {name: float(psnr(each.images, own.images)) for name, each in (("first", first), ("later", later))}
    # 12 steps from noise against one from 12 % noise: 45 and 67 dB when this was written.
    assert 35 < near["first"] < near["later"] < 90
    assert float(psnr(both.images, first.images)) > near["first"]
    for name, weight in engine.network.named_parameters():
        assert torch.equal(weight, before[name])
    again = sample_staged(engine, plan, PROMPT, upscaler=upscaler)
    assert torch.equal(again.images, own.images)


def test_mrflow_takes_it_for_one_stage_or_for_all() -> None:
    size: dict[str, Any] = {"width": 64, "height": 64, "seed": 3, "output_type": "pt"}
    pipe = tiny_pipelines.make("sd3")
    own = MrFlow(pipe, upscaler=TWICE)("a cat", **size).images
    first = MrFlow(pipe, upscaler=TWICE, precision={"stage1": "int8"})("a cat", **size).images
    every = MrFlow(pipe, upscaler=TWICE, precision="int8")("a cat", **size).images
    assert not torch.equal(first, own)
    assert not torch.equal(every, first)
    assert float((every - own).abs().mean()) < 0.05


def test_twins_are_kept_until_a_weight_or_an_adapter_changes() -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    make, network = LoweredNetworks(), pipe.transformer
    twin = make(network, "int8")
    assert make(network, "int8") is twin
    assert make(network, "int8-dynamic") is not twin
    assert make(network, "int8") is twin
    with torch.no_grad():
        next(network.parameters()).mul_(1.5)
    other = make(network, "int8")
    assert other is not twin
    assert make(network, "int8") is other


def test_a_lora_counts_in_the_twin_and_so_does_its_scale() -> None:
    peft = pytest.importorskip("peft")
    pipe = tiny_pipelines.make("flux1-dev")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    size: dict[str, Any] = {"width": 64, "height": 64, "seed": 3, "output_type": "pt", "low_steps": 2}
    mrflow = MrFlow(pipe, upscaler=TWICE, precision="int8")
    with_lora = mrflow("a cat", **size).images
    pipe.transformer.disable_adapters()
    without = mrflow("a cat", **size).images
    assert float((with_lora - without).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("precision", "sentence"),
    [
        ("int3", "precision must be one of own, int8, int8-dynamic, fp8, fp8-dynamic, int4, got 'int3'"),
        ("fp8-dynamic", "compute capability 8.9 or more .* and the run is on cpu; use int8"),
        ("int4", "precision int4 needs a CUDA GPU, and the run is on cpu; use int8"),
        ({"stage2": "int8"}, "names by stage such as .*got"),
        ({}, "names by stage"),
        ({"stage1": 8}, "names by stage"),
        (8, "names by stage"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_refused_before_anything_runs(precision: Any, sentence: str) -> None:
    with pytest.raises(MrFlowError, match=sentence):
        MrFlow(tiny_pipelines.make("sd3"), precision=precision)


def test_a_quantised_network_and_an_offloaded_one_are_refused() -> None:
    pipe = tiny_pipelines.make("sd3")
    pipe.transformer.hf_quantizer = object()
    with pytest.raises(MrFlowError, match="was loaded quantised already"):
        MrFlow(pipe, precision="int8")
    pipe = tiny_pipelines.make("sd3")
    pipe.transformer._hf_hook = object()
    with pytest.raises(MrFlowError, match="is offloaded; leave one of the two out"):
        MrFlow(pipe, precision="int8")


def test_without_torchao_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MrFlowError, match="needs torchao, which is not installed; run pip install"):
        MrFlow(tiny_pipelines.make("sd3"), precision="int8")


def test_an_engine_of_one_precision_says_so() -> None:
    exact = GaussianFieldEngine()
    with pytest.raises(MrFlowError, match="runs its network in one precision; leave precision int8 out"):
        sample_staged(exact, make_plan(exact.family, 64, 64, precision="int8"), "")


def test_tiles_and_guidance_go_with_it() -> None:
    mrflow = MrFlow(tiny_pipelines.make("flux1-dev"), upscaler=TWICE, precision="int8")
    made = mrflow("a cat", width=512, height=512, seed=3, low_steps=2, tile=256, output_type="pt")
    assert bool(made.images.isfinite().all())


def test_a_call_says_otherwise_than_the_start() -> None:
    mrflow = MrFlow(tiny_pipelines.make("sd3"), upscaler=TWICE, precision={"stage1": "int8"})
    assert [stage.precision for stage in mrflow.plan(64, 64).stages] == ["int8", "own"]
    assert [stage.precision for stage in mrflow.plan(64, 64, refine_precision="fp8").stages] == ["int8", "fp8"]
    assert [stage.precision for stage in mrflow.plan(64, 64, precision="own").stages] == ["own", "own"]
    assert [stage.precision for stage in mrflow.plan(64, 64, native=True).stages] == ["int8"]
    made = mrflow("a cat", width=64, height=64, seed=3, low_steps=2, precision="fp8")
    assert [stage.precision for stage in made.plan.stages] == ["fp8", "fp8"]


def test_a_method_of_ones_own_runs_in_the_plans_precision(engine: PipelineEngine, upscaler: Any) -> None:
    low = make_plan(engine.family, 64, 64, seed=3, low_steps=2, precision="int8")
    high = make_plan(engine.family, 64, 64, seed=3, low_steps=2)
    made = [sample_staged(engine, plan, PROMPT, upscaler=upscaler, method=Plain()).images for plan in (low, high)]
    assert not torch.equal(*made)
    assert torch.equal(made[0], sample_staged(engine, low, PROMPT, upscaler=upscaler).images)
