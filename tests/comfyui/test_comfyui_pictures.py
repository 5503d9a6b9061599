"""What comes out: the picture that the package itself makes, however it is wired, in batches, and at odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mrflow_sched.plan.make import make_plan
from mrflow_sched.sampler import sample_staged
from mrflow_sched.upscaling.load import load_upscaler

from .client import Client, Run
from .graphs import PROMPT, Graph, Link, Parts, composed, demo, doubled, plan_in, staged
from .process import INSTALLATION, REASON, REPOSITORY

if INSTALLATION is None:
    pytest.skip(REASON, allow_module_level=True)

WEIGHTS = REPOSITORY / "mrflow_sched" / "demo" / "weights"


def farthest(first: Any, second: Any) -> int:
    """The largest difference of two pictures in levels of 255."""
    assert first.shape == second.shape
    return int(np.abs(first - second).max())


def psnr(first: Any, second: Any) -> float:
    """Of two pictures in [0, 1], in dB."""
    error = float(((first.astype(np.float64) - second.astype(np.float64)) ** 2).mean())
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def without_upscaler(parts: Parts) -> Parts:
    return replace(parts, upscale_model=None)


# -------------------------------------------------------------------------------------------- the package's own picture


@pytest.fixture(scope="module")
def engine() -> Any:
    """The embedded model in float32, as the package runs it."""
    from mrflow_sched.demo.engine import EmbeddedEngine

    return EmbeddedEngine.from_folder(WEIGHTS, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("size", "upscaler", "options"),
    [
        ((256, 256), True, {"solver": "euler"}),
        ((256, 256), True, {"solver": "multistep"}),
        ((256, 256), False, {"solver": "multistep"}),
        ((250, 170), True, {"solver": "euler"}),
        ((250, 170), False, {"solver": "multistep"}),
        ((256, 256), True, {"solver": "euler", "noise": "nested"}),
        ((256, 192), True, {"solver": "multistep", "sigma": 0.2, "refine_steps": 2}),
        ((384, 256), True, {"solver": "euler", "stages": 3}),
    ],
    ids=str,
)
def test_the_picture_is_the_packages_own(
    client: Client,
    graph: Callable[[], Graph],
    engine: Any,
    size: tuple[int, int],
    upscaler: bool,
    options: dict[str, Any],
) -> None:
    made, name, seed = graph(), client.name(), 3
    parts = demo(made)
    parts = parts if upscaler else without_upscaler(parts)
    staged(made, parts, name, width=size[0], height=size[1], seed=seed, cfg=0.0, **options)
    run = client.run(made.api).succeeded()
    plan = make_plan("demo", *size, preset="12+1", seed=seed, **options)
    assert plan_in(run.text(f"{name}-plan")) == plan
    own = load_upscaler(WEIGHTS / "upscaler" / "x2.safetensors") if upscaler else None
    wanted = sample_staged(engine, plan, PROMPT, upscaler=own, keep_stages=True)
    image = wanted.images.movedim(1, -1).numpy()
    assert run.array(name).shape == (1, size[1], size[0], 3)
    assert psnr(run.array(name), image) >= 50
    assert image.std() > 0.1  # a picture, not a grey plane that everything resembles


# --------------------------------------------------------------------------------------------------- three ways to wire


def wired_by_hand(made: Graph, parts: Parts, name: str, plan: Any, seed: int, latent: Link) -> None:
    """ComfyUI's own nodes, at the plan's sizes and sigmas."""
    low, high = plan.stages
    guider = made.add("BasicGuider", model=parts.model, conditioning=parts.positive)
    solver = made.add("KSamplerSelect", sampler_name="euler")
    image: Link = []
    for index, stage in enumerate((low, high)):
        if index:
            large = made.add("ImageUpscaleWithModel", upscale_model=parts.upscale_model, image=image)
            latent = made.add("VAEEncode", pixels=large[0], vae=parts.vae)[0]
        sampled = made.add(
            "SamplerCustomAdvanced",
            noise=made.add("RandomNoise", noise_seed=seed + index)[0],
            guider=guider[0],
            sampler=solver[0],
            sigmas=made.add("RecorderLevels", levels=",".join(map(repr, stage.sigmas)))[0],
            latent_image=latent,
        )
        image = made.add("VAEDecode", samples=sampled[0], vae=parts.vae)[0]
    made.save(image, name)


def test_one_node_is_its_parts_and_is_what_comfyuis_own_nodes_make(
    client: Client, graph: Callable[[], Graph], seed: int
) -> None:
    made, (one, parts_name, hand) = graph(), (client.name(), client.name(), client.name())
    parts = demo(made)
    chosen = {"seed": seed, "solver": "euler", "sigma": 0.12}
    staged(made, parts, one, **chosen)
    composed(made, parts, parts_name, **chosen)
    plan = make_plan("demo", 256, 256, preset="12+1", solver="euler", sigma=0.12, seed=seed)
    planned = made.add("MrFlowPlan", model=parts.model, width=256, height=256, seed=seed)
    empty = made.add("MrFlowEmptyLatent", plan=planned[0], model=parts.model)
    wired_by_hand(made, parts, hand, plan, seed, empty[0])
    run = client.run(made.api).succeeded()
    assert farthest(run.levels(one), run.levels(parts_name)) == 0
    assert psnr(run.array(one), run.array(hand)) >= 50
    assert run.levels(one).std() > 10


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Flux", {"solver": "euler", "sigma": 0.12}),
        ("ZImage", {"solver": "multistep", "sigma": 0.18}),
        ("QwenImage", {"solver": "euler", "refine_steps": 2}),
        ("Krea2", {"stages": 3, "width": 512, "height": 512}),
        ("HunyuanImage21", {"width": 1024, "height": 1024}),
        ("SDXL", {"sigma": 0.3, "batch_size": 2}),
        ("Flux", {"noise": "nested", "batch_size": 2, "width": 264, "height": 168}),
    ],
    ids=str,
)
def test_one_node_is_its_parts(
    client: Client, graph: Callable[[], Graph], seed: int, kind: str, options: dict[str, Any]
) -> None:
    made, (one, parts_name) = graph(), (client.name(), client.name())
    parts = doubled(made, kind)
    staged(made, parts, one, seed=seed, **options)
    composed(made, parts, parts_name, seed=seed, **options)
    run = client.run(made.api).succeeded()
    assert farthest(run.levels(one), run.levels(parts_name)) == 0


def test_the_hosts_own_nodes_make_the_same_of_a_double(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    """Noise, levels, sizes: all of it is what ComfyUI's own nodes make of the same numbers."""
    made, (one, hand) = graph(), (client.name(), client.name())
    parts = doubled(made, "Flux")
    staged(made, parts, one, seed=seed, solver="euler", sigma=0.12)
    plan = make_plan("flux1-dev", 256, 256, preset="12+1", solver="euler", sigma=0.12, seed=seed)
    empty = made.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)
    wired_by_hand(made, parts, hand, plan, seed, empty[0])
    run = client.run(made.api).succeeded()
    assert farthest(run.levels(one), run.levels(hand)) == 0


# -------------------------------------------------------------------------------------------------------------- batches


def run_of(client: Client, graph: Callable[[], Graph], parts: Callable[[Graph], Parts], **inputs: Any) -> Any:
    """The picture of one run of the one node, in levels."""
    made, name = graph(), client.name()
    staged(made, parts(made), name, **inputs)
    return client.run(made.api).succeeded().levels(name)


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        (demo, {"width": 128, "height": 128, "solver": "multistep"}),
        (demo, {"width": 128, "height": 128, "solver": "euler", "noise": "nested"}),
        (doubled, {}),
        (lambda made: doubled(made, "QwenImage"), {"refine_steps": 2}),
        (lambda made: doubled(made, "SD15"), {"stages": 3, "width": 512, "height": 512}),
    ],
    ids=["demo", "demo nested", "Flux", "QwenImage", "SD15"],
)
def test_a_batch_is_what_its_seeds_make_alone(
    client: Client,
    graph: Callable[[], Graph],
    seed: int,
    parts: Callable[[Graph], Parts],
    options: dict[str, Any],
) -> None:
    batch = run_of(client, graph, parts, seed=seed, batch_size=2, **options)
    assert len(batch) == 2
    for number in range(2):
        alone = run_of(client, graph, parts, seed=seed + number, **options)
        assert farthest(batch[number : number + 1], alone) <= 1
    assert farthest(batch[:1], batch[1:]) > 8


def test_the_largest_seed_makes_a_batch_too(client: Client, graph: Callable[[], Graph]) -> None:
    """Seeds begin anew at 0 after 2^63 - 1."""
    batch = run_of(client, graph, doubled, seed=2**63 - 1, batch_size=2)
    assert farthest(batch[1:], run_of(client, graph, doubled, seed=0)) <= 1


def test_refined_pictures_of_a_batch_are_what_they_are_alone(
    client: Client, graph: Callable[[], Graph], seed: int
) -> None:
    made, names = graph(), [client.name() for _ in range(3)]
    parts = doubled(made, "QwenImage")
    ramps = [made.add("RecorderPicture", width=128, height=96, slope=slope) for slope in (1 / 512, 1 / 256)]
    both = made.add("ImageBatch", image1=ramps[0][0], image2=ramps[1][0])
    for name, image, own in zip(names, (both, *ramps), (seed, seed, seed + 1), strict=True):
        made.save(made.add("MrFlowRefine", **parts.sockets, image=image[0], seed=own, cfg=1.0, refine_steps=2)[0], name)
    run = client.run(made.api).succeeded()
    whole = run.levels(names[0])
    assert whole.shape == (2, 192, 256, 3)
    for number in range(2):
        assert farthest(whole[number : number + 1], run.levels(names[number + 1])) <= 1


def drafted(made: Graph, parts: Parts, name: str, *, index: int, count: int = 1, **inputs: Any) -> None:
    """Draft and Finish; the drafts are saved as NAME-drafts, what is finished as NAME."""
    shared = {"model": parts.model, "positive": parts.positive, "negative": parts.negative, "vae": parts.vae}
    of_finish = {key: inputs.pop(key) for key in ("sigma", "refine_steps", "refine_cfg") if key in inputs}
    chosen = {"width": 256, "height": 256, "preset": "12+1", "cfg": 1.0, **inputs}
    draft = made.add("MrFlowDraft", **shared, **chosen)
    made.save(draft[0], f"{name}-drafts")
    finish = made.add(
        "MrFlowFinish",
        **shared,
        upscale_model=parts.upscale_model,
        plan=draft[1],
        drafts=draft[0],
        index=index,
        count=count,
        **of_finish,
    )
    made.save(finish[0], name)
    made.save(finish[1], f"{name}-text")


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(("index", "count"), [(0, 1), (2, 1), (1, 2), (1, 0)])
def test_a_finished_draft_is_what_its_seed_makes_alone(
    client: Client, graph: Callable[[], Graph], seed: int, stages: int, index: int, count: int
) -> None:
    made, name = graph(), client.name()
    kind = "Flux" if stages == 2 else "QwenImage"
    chosen = {"seed": seed, "sigma": 0.15, "stages": stages}
    drafted(made, doubled(made, kind), name, index=index, count=count, batch_size=3, **chosen)
    run = client.run(made.api).succeeded()
    finished = run.levels(name)
    wanted = range(index, index + count if count else 3)
    assert len(finished) == len(wanted)
    for place, number in enumerate(wanted):
        alone = run_of(client, graph, lambda made: doubled(made, kind), **{**chosen, "seed": seed + number})
        assert farthest(finished[place : place + 1], alone) <= 1
    assert len(run.array(f"{name}-drafts")) == 3


def test_a_latent_taken_from_a_batch_keeps_its_noise(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    """Core's LatentFromBatch says which one it was (batch_index): stage 1 of image 1 alone is what its seed makes."""
    made, (picked, whole) = graph(), (client.name(), client.name())
    parts = doubled(made)
    plan = made.add("MrFlowPlan", model=parts.model, width=256, height=256, seed=seed, preset="12+1", cfg=1.0)
    latents = made.add("MrFlowEmptyLatent", plan=plan[0], model=parts.model, batch_size=2)
    one = made.add("LatentFromBatch", samples=latents[0], batch_index=1, length=1)
    for latent, name in ((one, picked), (latents, whole)):
        sampled = made.add(
            "SamplerCustomAdvanced",
            noise=made.add("MrFlowNoise", plan=plan[0], stage=1)[0],
            guider=made.add("BasicGuider", model=parts.model, conditioning=parts.positive)[0],
            sampler=made.add("MrFlowSolver", plan=plan[0])[0],
            sigmas=made.add("MrFlowSigmas", plan=plan[0], model=parts.model, stage=1)[0],
            latent_image=latent[0],
        )
        made.save(made.add("MrFlowDecode", plan=plan[0], samples=sampled[0], vae=parts.vae, stage=1)[0], name)
    run = client.run(made.api).succeeded()
    assert len(run.levels(picked)) == 1
    assert farthest(run.levels(picked), run.levels(whole)[1:]) <= 1
    assert farthest(run.levels(picked), run.levels(whole)[:1]) > 8


@pytest.mark.parametrize("kind", ["QwenImage", "Krea2", "Anima"])
def test_a_vae_that_takes_a_batch_for_frames_gives_as_many_pictures(
    client: Client, graph: Callable[[], Graph], seed: int, kind: str
) -> None:
    made, name = graph(), client.name()
    staged(made, doubled(made, kind), name, seed=seed, batch_size=2)
    run = client.run(made.api).succeeded()
    assert run.array(name).shape == (2, 256, 256, 3)
    assert run.array(f"{name}-draft").shape == (2, 128, 128, 3)
    assert [entry["shape"][:3] for entry in run.of("encode")] == [[1, 3, 1], [1, 3, 1]]
    assert [entry["shape"][0] for entry in run.of("network")] == [2] * 13


# ------------------------------------------------------------------------------------------------------------- guidance


def rows_of(client: Client, made: Graph, parts: Parts, **inputs: Any) -> Run:
    name = client.name()
    staged(made, parts, name, solver="euler", **inputs)
    return client.run(made.api)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"cfg": 1.0}, [1] * 13),
        ({"cfg": 2.0}, [2] * 13),
        ({"cfg": 2.0, "refine_cfg": 1.0}, [2] * 12 + [1]),
        ({"cfg": 1.0, "refine_cfg": 3.0}, [1] * 12 + [2]),
        ({"cfg": 2.0, "batch_size": 2}, [4] * 13),
    ],
    ids=str,
)
def test_cfg_costs_two_rows_a_call(
    client: Client, graph: Callable[[], Graph], seed: int, options: dict[str, Any], rows: list[int]
) -> None:
    made = graph()
    run = rows_of(client, made, doubled(made, "QwenImage"), seed=seed, **options).succeeded()
    assert run.rows == rows


def test_cfg_0_is_the_familys(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    for kind, rows in (("QwenImage", 2), ("Flux", 1), ("FluxSchnell", 1)):
        made = graph()
        run = rows_of(client, made, doubled(made, kind), seed=seed, cfg=0.0).succeeded()
        assert run.rows == [rows] * 13, kind


def test_no_negative_is_no_matter_at_cfg_1(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    pictures: list[Any] = []
    for negative in (True, False):
        made, name = graph(), client.name()
        parts = doubled(made, "ZImage")
        parts = parts if negative else replace(parts, negative=None)
        staged(made, parts, name, seed=seed, cfg=1.0)
        pictures.append(client.run(made.api).succeeded().levels(name))
    assert farthest(*pictures) == 0


@pytest.mark.parametrize(
    ("kind", "node", "side"),
    [
        ("ZImage", "ConditioningSetArea", 256),
        ("ZImage", "ConditioningSetAreaPercentage", 1.0),
        ("QwenImage", "ConditioningSetArea", 256),
    ],
)
def test_an_area_of_the_text_follows_the_size_of_the_stage(
    client: Client, graph: Callable[[], Graph], seed: int, kind: str, node: str, side: float
) -> None:
    """The right three quarters; ComfyUI counts areas in latents of the finished picture, and calls the network on them
    alone."""
    made = graph()
    parts = doubled(made, kind)
    right = {"x": side // 4 if side > 1 else 0.25, "y": 0, "width": side * 3 // 4 if side > 1 else 0.75, "height": side}
    area = made.add(node, conditioning=parts.positive, strength=1.0, **right)
    both = made.add("ConditioningCombine", conditioning_1=area[0], conditioning_2=parts.positive)
    run = rows_of(client, made, replace(parts, positive=both[0]), seed=seed, cfg=1.0).succeeded()
    seen = [tuple(entry["shape"][-2:]) for entry in run.of("network")]
    assert set(seen[:-2]) == {(16, 12), (16, 16)}
    assert set(seen[-2:]) == {(32, 24), (32, 32)}
