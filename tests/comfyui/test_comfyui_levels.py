"""The sigmas that a model is called with are the plan's, on every kind of model, whatever the workflow put before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mrflow_sched.plan.families import FAMILIES
from mrflow_sched.plan.make import make_plan
from mrflow_sched.sampling.noise import model_sigmas

from .client import Client, Run
from .graphs import Graph, Parts, demo, doubled, plan_in, staged
from .process import INSTALLATION, REASON

if INSTALLATION is None:
    pytest.skip(REASON, allow_module_level=True)

# ComfyUI's class of a model's settings, and the families of ours that its files may be of.
KNOWN = {
    "Flux": {"flux1-dev"},
    "FluxSchnell": {"flux1-schnell"},
    "Chroma": {"chroma"},
    "QwenImage": {"qwen-image"},
    "Flux2": {"flux2-dev", "flux2-klein", "flux2-klein-base"},
    "SD3": {"sd3", "sd35-medium", "sd35-large", "sd35"},
    "ZImage": {"z-image", "z-image-turbo"},
    "Lumina2": {"lumina2"},
    "AuraFlow": {"auraflow"},
    "HiDream": {"hidream", "hidream-dev", "hidream-full", "hidream-fast"},
    "HunyuanImage21": {"hunyuan-image"},
    "Lens": {"lens", "lens-turbo"},
    "MageFlow": {"mage-flow", "mage-flow-turbo"},
}
# Flow models that are in no table of ours, or not always.
GENERIC = (
    *("LongCatImage", "ChromaRadiance", "Krea2", "Anima", "ErnieImage", "Omnigen2", "Boogu"),
    *("JoyImage", "PixelDiTT2I", "ZImagePixelSpace", "Kandinsky5Image"),
)
# Variance-exploding ones: the list is converted at equal signal-to-noise ratio.
EXPLODING = {"SD15": 14.6146, "SDXL": 14.6146, "CosmosT2IPredict2": 80.0}
# The network's own time over sigma.
TIMES = {"SD3": 1000, "HiDream": 1000, "HunyuanImage21": 1000, "ErnieImage": 1000, "JoyImage": 1000}


def sampled(client: Client, made: Graph, parts: Parts, **inputs: Any) -> tuple[Run, str]:
    """A run of the one node, and what it says of its plan."""
    name = client.name()
    staged(made, parts, name, **inputs)
    run = client.run(made.api).succeeded()
    return run, run.text(f"{name}-plan")


def same(seen: list[float], wanted: list[float], tolerance: float = 1e-6) -> bool:
    """As many, each within the tolerance, or a ten-millionth of its value where that is more: float32."""
    return len(seen) == len(wanted) and bool(np.allclose(seen, wanted, rtol=2e-7, atol=tolerance))


def levels(plan: Any) -> list[float]:
    """What a model is to be called with: every sigma but the 0 that ends a stage."""
    return [sigma for stage in plan.stages for sigma in stage.sigmas[:-1]]


@pytest.mark.parametrize("kind", KNOWN)
def test_a_known_model_has_its_familys_sigmas(client: Client, graph: Callable[[], Graph], seed: int, kind: str) -> None:
    made = graph()
    run, text = sampled(client, made, doubled(made, kind), seed=seed, sigma=0.12, solver="euler", cfg=1.0)
    plan = plan_in(text)
    assert plan.family in KNOWN[kind] & set(FAMILIES)
    wanted = make_plan(plan.family, 256, 256, preset="12+1", sigma=0.12, solver="euler", guidance=1.0, seed=seed)
    assert levels(plan) == levels(wanted)
    assert len(levels(plan)) == 13
    assert same(run.sigmas, levels(wanted))
    if kind in TIMES:
        assert same([time / TIMES[kind] for time in run.times], levels(wanted))


@pytest.mark.parametrize("kind", GENERIC)
def test_a_flow_model_that_nobody_knows_goes_from_noise_to_image_and_starts_again_at_sigma(
    client: Client, graph: Callable[[], Graph], seed: int, kind: str
) -> None:
    made = graph()
    run, text = sampled(client, made, doubled(made, kind), seed=seed, sigma=0.18, solver="euler", cfg=1.0)
    assert same(run.sigmas, levels(plan_in(text)))
    assert run.sigmas[0] == 1.0
    assert run.sigmas[:12] == sorted(run.sigmas[:12], reverse=True)
    assert abs(run.sigmas[12] - 0.18) < 1e-6
    assert plan_in(text).family in text


@pytest.mark.parametrize("kind", EXPLODING)
def test_a_variance_exploding_model_gets_the_same_signal_to_noise(
    client: Client, graph: Callable[[], Graph], seed: int, kind: str
) -> None:
    made = graph()
    run, text = sampled(client, made, doubled(made, kind), seed=seed, sigma=0.12, solver="euler", cfg=1.0)
    stages = plan_in(text).stages
    wanted = [s for stage in stages for s in model_sigmas(stage.sigmas, "epsilon", EXPLODING[kind])[:-1]]
    assert same(run.sigmas, wanted, 1e-4)
    assert abs(run.sigmas[-1] - 0.12 / 0.88) < 1e-6


def test_a_model_made_another_kind_by_a_node_gets_the_same_signal_to_noise(
    client: Client, graph: Callable[[], Graph], seed: int
) -> None:
    """SDXL as Playground 2.5: its own network scaling, other sigmas of pure noise, the same share of noise."""
    made = graph()
    parts = doubled(made, "SDXL")
    kind = {"sampling": "edm_playground_v2.5", "sigma_max": 120.0, "sigma_min": 0.002}
    patched = made.add("ModelSamplingContinuousEDM", model=parts.model, **kind)
    parts = replace(parts, model=patched[0])
    run, _ = sampled(client, made, parts, seed=seed, sigma=0.12, solver="euler")
    assert abs(run.sigmas[-1] - 0.12 / 0.88) < 1e-6
    assert abs(run.sigmas[0] - 120.0) < 1e-4


@pytest.mark.parametrize("sigma", [0.12, 0.18])
@pytest.mark.parametrize("preset", ["12+1", "8+1"])
@pytest.mark.parametrize("solver", ["euler", "multistep"])
def test_the_demo_models_network_is_called_at_the_plans_sigmas(
    client: Client, graph: Callable[[], Graph], seed: int, solver: str, preset: str, sigma: float
) -> None:
    made, size = graph(), (128, 128)
    chosen = {"width": 128, "height": 128, "seed": seed, "solver": solver, "preset": preset, "sigma": sigma}
    run, text = sampled(client, made, demo(made), **chosen)
    wanted = make_plan("demo", *size, preset=preset, sigma=sigma, solver=solver, seed=seed)
    assert same(run.sigmas, levels(wanted))
    assert same(run.times, levels(wanted))
    shapes = [tuple(entry["shape"]) for entry in run.of("network")]
    low = wanted.stages[0]
    assert shapes == [(1, 16, low.height // 4, low.width // 4)] * low.steps + [(1, 16, 32, 32)]
    assert plan_in(text) == wanted


@pytest.mark.parametrize("refine_steps", [1, 2, 3])
def test_three_stages_each_begin_at_sigma(
    client: Client, graph: Callable[[], Graph], seed: int, refine_steps: int
) -> None:
    made = graph()
    chosen = {"width": 512, "height": 384, "stages": 3, "refine_steps": refine_steps, "sigma": 0.15, "seed": seed}
    run, text = sampled(client, made, doubled(made, "QwenImage"), solver="euler", **chosen)
    evenly = [0.15 * (refine_steps - step) / refine_steps for step in range(refine_steps)]
    assert same(run.sigmas[12:], evenly * 2)
    assert same(run.sigmas, levels(plan_in(text)))
    assert len({tuple(entry["shape"]) for entry in run.of("network")}) == 3


def test_a_list_of_ones_own_takes_the_place_of_stage_1s(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    """Such as a Turbo model's, which a formula would miss."""
    made = graph()
    own = "1,0.978453,0.95418,0.926626,0.89508,0.845148,0.704534,0.414568,0"
    listed = made.add("RecorderLevels", levels=own)
    run, text = sampled(
        client, made, doubled(made, "QwenImage"), low_sigmas=listed[0], seed=seed, sigma=0.12, solver="euler"
    )
    wanted = [*map(float, own.split(",")[:-1]), 0.12]
    assert same(run.sigmas, wanted)
    assert same(levels(plan_in(text)), wanted)


@pytest.mark.parametrize("levels", ["1,0.5,0.2", "0.9,0.5,0", "1", "1.2,0.5,0"])
def test_a_list_that_is_not_whole_is_refused(
    client: Client, graph: Callable[[], Graph], seed: int, levels: str
) -> None:
    made = graph()
    listed = made.add("RecorderLevels", levels=levels)
    staged(made, doubled(made, "ZImage"), "broken", low_sigmas=listed[0], seed=seed)
    run = client.run(made.api)
    assert "low_sigmas must fall from the model's pure noise, which is sigma 1, to 0" in run.error
    assert run.sigmas == []


def test_a_schedulers_list_serves_too(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    made = graph()
    parts = doubled(made, "ZImage")
    simple = made.add("BasicScheduler", model=parts.model, scheduler="simple", steps=6, denoise=1.0)
    made.save(simple[0], "simple")
    run, _ = sampled(client, made, parts, low_sigmas=simple[0], seed=seed, sigma=0.12, solver="euler")
    assert same(run.sigmas, [*run.array("simple")[:-1].tolist(), 0.12])


def test_a_list_in_the_models_own_units_serves_too(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    """SDXL's schedulers give standard deviations of noise."""
    made = graph()
    parts = doubled(made, "SDXL")
    karras = made.add("BasicScheduler", model=parts.model, scheduler="karras", steps=6, denoise=1.0)
    made.save(karras[0], "karras")
    run, _ = sampled(client, made, parts, low_sigmas=karras[0], seed=seed, sigma=0.12, solver="euler")
    wanted = [*run.array("karras")[:-1].tolist(), 0.12 / 0.88]
    assert np.allclose(run.sigmas, wanted, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Flux", "QwenImage", "Lumina2"])
def test_the_final_sizes_shift_counts_where_it_is_asked_for(
    client: Client, graph: Callable[[], Graph], seed: int, kind: str
) -> None:
    made = graph()
    chosen = {"seed": seed, "solver": "euler", "sigma": 0.12, "width": 512, "height": 384}
    run, text = sampled(client, made, doubled(made, kind), shift="final", **chosen)
    options = {"preset": "12+1", "solver": "euler", "sigma": 0.12, "guidance": 1.0}
    wanted = make_plan(plan_in(text).family, 512, 384, shift_tokens="final", **options)
    assert same(run.sigmas, levels(wanted))


def test_a_host_that_scales_the_noise_gets_it_unscaled(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    """HiDream-O1's noise is 8 times as strong; ComfyUI sees to that itself."""
    made = graph()
    run, _ = sampled(client, made, doubled(made, "HiDreamO1"), seed=seed, sigma=0.12, solver="euler")
    first, last = run.of("model")[0], run.of("model")[-1]
    assert abs(first["std"] / 8 - 1) < 0.02
    assert abs(last["sigma"][0] - 0.12) < 1e-6
    assert 0.9 < last["std"] < 1.5  # 0.12 x 8, and the picture


# ------------------------------------------------------------------------------------------ what stands before the node


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("EasyCache", {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95}),
        ("LazyCache", {}),
        ("ModelSamplingFlux", {"max_shift": 1.15, "base_shift": 0.5, "width": 1024, "height": 1024}),
        ("ModelSamplingFlux", {"max_shift": 3.0, "base_shift": 0.5, "width": 2048, "height": 2048}),
        ("ModelSamplingSD3", {"shift": 3.0}),
        ("ModelSamplingAuraFlow", {"shift": 1.73}),
        ("CFGNorm", {"strength": 1.0}),
        ("FreSca", {}),
        ("RescaleCFG", {"multiplier": 0.7}),
        ("DifferentialDiffusion", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("kind", ["Flux", "ZImage"])
def test_a_patched_model_is_called_at_the_same_sigmas(
    client: Client, graph: Callable[[], Graph], info: Any, seed: int, kind: str, node: str, inputs: dict[str, Any]
) -> None:
    if node not in info:
        pytest.skip(f"this ComfyUI has no {node}")
    made = graph()
    parts = doubled(made, kind)
    patched = made.add(node, model=parts.model, **inputs)
    chosen = {"seed": seed, "solver": "euler", "sigma": 0.12}
    run, text = sampled(client, made, replace(parts, model=patched[0]), **chosen)
    plan = plan_in(text)
    assert same(levels(plan), levels(make_plan(plan.family, 256, 256, preset="12+1", solver="euler", sigma=0.12)))
    if node in ("EasyCache", "LazyCache"):
        # They leave calls out; those that are made are the plan's.
        assert set(np.array(run.sigmas, np.float32)) <= set(np.array(levels(plan), np.float32))
        assert len(run.sigmas) <= 13
    else:
        assert same(run.sigmas, levels(plan))


def test_a_lora_changes_the_picture_and_no_sigma(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    pictures: list[Any] = []
    for strength in (0.0, 1.0):
        made, name = graph(), client.name()
        parts = demo(made)
        patched = made.add("RecorderPatch", model=parts.model, strength=strength)
        parts = replace(parts, model=patched[0])
        staged(made, parts, name, width=128, height=128, seed=seed, sigma=0.12, solver="euler")
        run = client.run(made.api).succeeded()
        assert same(run.sigmas, levels(make_plan("demo", 128, 128, preset="12+1", sigma=0.12, solver="euler")))
        pictures.append(run.levels(name))
    assert np.abs(pictures[0] - pictures[1]).max() > 8


def test_the_models_own_shift_counts_where_it_is_asked_for(
    client: Client, graph: Callable[[], Graph], seed: int
) -> None:
    """shift "model": ModelSamplingSD3's number shifts stage 1, and never the refining step."""
    starts: list[list[float]] = []
    for shift in (3.0, 6.0):
        made = graph()
        parts = doubled(made, "ZImage")
        patched = made.add("ModelSamplingSD3", model=parts.model, shift=shift)
        parts = replace(parts, model=patched[0])
        run, text = sampled(client, made, parts, shift="model", seed=seed, sigma=0.12, solver="euler")
        assert same(run.sigmas, levels(plan_in(text)))
        evenly = [(12 - step) / 12 for step in range(12)]
        wanted = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in evenly]
        assert same(run.sigmas[:12], wanted, 2e-3)
        assert abs(run.sigmas[12] - 0.12) < 1e-6
        starts.append(run.sigmas)
    assert starts[0] != starts[1]
