"""What runs again when one thing of a graph changes: the calls of the network are counted, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from .client import Client, Run
from .graphs import Graph, Parts, demo, doubled, plan_in, staged
from .process import INSTALLATION, REASON, X2_NAME, Server

if INSTALLATION is None:
    pytest.skip(REASON, allow_module_level=True)

Make = Callable[[], Graph]
OTHER_X2 = "another_x2.safetensors"
START = {"width": 256, "height": 256, "preset": "12+1", "cfg": 1.0, "sigma": 0.12}


@pytest.fixture(scope="module")
def other_upscaler(server: Server) -> str:
    """The same upscaler under another name."""
    folder = server.base / "models" / "upscale_models"
    shutil.copyfile(folder / X2_NAME, folder / OTHER_X2)
    return OTHER_X2


def once(client: Client, made: Graph, parts: Parts, name: str, inputs: dict[str, Any]) -> Run:
    staged(made, parts, name, **{**START, **inputs})
    return client.run(made.api).succeeded()


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        ({}, 0),
        ({"sigma": 0.18}, 1),
        ({"refine_steps": 2}, 2),
        ({"refine_cfg": 2.0}, 1),
        ({"sigma": 0.2, "refine_steps": 3}, 3),
        ({"seed": 5}, 13),
        ({"width": 320}, 13),
        ({"low_steps": 6}, 7),
        ({"preset": "8+1"}, 9),
        ({"solver": "euler"}, 13),
        ({"cfg": 2.0}, 13),
        ({"batch_size": 2}, 13),
        ({"factor": 1.5}, 13),
        ({"noise": "nested"}, 13),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["Flux", "QwenImage"])
def test_only_what_a_widget_touches_runs_again(
    client: Client, graph: Make, seed: int, kind: str, change: dict[str, Any], calls: int
) -> None:
    first = graph()
    name = client.name()
    chosen = {"seed": seed, "solver": "multistep"}
    assert len(once(client, first, doubled(first, kind), name, chosen).times) == 13
    second = graph()
    changed = {**chosen, **change}
    changed["seed"] = seed + change.get("seed", 0)
    assert len(once(client, second, doubled(second, kind), name, changed).times) == calls


def test_a_changed_sigma_on_the_demo_model_costs_one_call_and_changes_the_picture(
    client: Client, graph: Make, seed: int
) -> None:
    pictures: list[Any] = []
    for sigma, calls in ((0.12, (13,)), (0.18, (1,)), (0.12, (0, 1))):  # 0: it is kept by caches of more than one run
        made, name = graph(), client.name()
        run = once(client, made, demo(made), name, {"seed": seed, "sigma": sigma, "width": 128, "height": 128})
        assert len(run.times) in calls
        assert plan_in(run.text(f"{name}-plan")).stages[1].start_sigma == sigma
        pictures.append(run.levels(name))
    assert np.abs(pictures[0] - pictures[1]).max() > 1
    assert np.abs(pictures[0] - pictures[2]).max() == 0


def test_a_sigma_that_comes_from_a_node_costs_one_call_too(client: Client, graph: Make, seed: int) -> None:
    calls: list[int] = []
    name = client.name()
    for sigma in (0.12, 0.18, 0.2):
        made = graph()
        parts = doubled(made)
        number = made.add("PrimitiveFloat", value=sigma)
        run = once(client, made, parts, name, {"seed": seed, "sigma": number[0]})
        assert abs(run.sigmas[-1] - sigma) < 1e-6
        calls.append(len(run.times))
    assert calls == [13, 1, 1]


def test_another_upscaler_costs_one_call(client: Client, graph: Make, seed: int, other_upscaler: str) -> None:
    """A second file, none at all, and the first again."""
    calls: list[int] = []
    for file in (X2_NAME, other_upscaler, None, X2_NAME):
        made = graph()
        parts = doubled(made)
        loaded = made.add("UpscaleModelLoader", model_name=file or X2_NAME)[0]
        parts = replace(parts, upscale_model=loaded if file else None)
        calls.append(len(once(client, made, parts, client.name(), {"seed": seed}).times))
    assert calls[:3] == [13, 1, 1]
    assert calls[3] <= 1  # caches that keep more than the last run's outputs have it still


def test_another_text_runs_everything(client: Client, graph: Make, seed: int) -> None:
    for prompt, calls in (("a red circle", 13), ("a blue star", 13), ("a blue star", 0)):
        made = graph()
        chosen = {"seed": seed, "width": 64, "height": 64}
        assert len(once(client, made, demo(made, prompt), "text", chosen).times) == calls


def test_the_text_of_a_cached_run_is_the_same(client: Client, graph: Make, seed: int) -> None:
    texts: list[str] = []
    for _ in range(2):
        made, name = graph(), client.name()
        texts.append(once(client, made, doubled(made), name, {"seed": seed}).text(f"{name}-plan"))
    assert texts[0] == texts[1]


# ---------------------------------------------------------------------------------------------------- draft and finish


def drafted(made: Graph, parts: Parts, *, seed: int, index: int = 0, drafts: int = 3, **finish: Any) -> None:
    shared = {"model": parts.model, "positive": parts.positive, "negative": parts.negative, "vae": parts.vae}
    chosen = {"width": 256, "height": 256, "preset": "12+1", "cfg": 1.0, "batch_size": drafts, "seed": seed}
    draft = made.add("MrFlowDraft", **shared, **chosen)
    made.add("PreviewImage", images=draft[0])
    last = {"upscale_model": parts.upscale_model, "plan": draft[1], "drafts": draft[0], "index": index}
    made.add("PreviewImage", images=made.add("MrFlowFinish", **shared, **last, **{"count": 1, **finish})[0])


def test_drafts_are_sampled_once_and_each_is_finished_by_one_call(client: Client, graph: Make, seed: int) -> None:
    seen: list[list[int]] = []
    chosen: list[dict[str, Any]] = [{}, {"index": 2}, {"index": 2, "sigma": 0.18}]
    for finish in (*chosen, {"index": 1, "count": 2}, {"index": 1, "count": 2}):
        made = graph()
        drafted(made, doubled(made), seed=seed, **finish)
        seen.append(client.run(made.api).succeeded().rows)
    assert seen == [[3] * 12 + [1], [1], [1], [2], []]


def test_one_draft_is_finished_at_two_sigmas_side_by_side(client: Client, graph: Make, seed: int) -> None:
    seen: list[int] = []
    for sigmas in ((0.12, 0.18), (0.12, 0.2), (0.14, 0.2)):
        made = graph()
        parts = doubled(made)
        shared = {"model": parts.model, "positive": parts.positive, "negative": parts.negative, "vae": parts.vae}
        chosen = {"width": 256, "height": 256, "preset": "12+1", "cfg": 1.0, "batch_size": 1, "seed": seed}
        draft = made.add("MrFlowDraft", **shared, **chosen)
        for sigma in sigmas:
            last = {"upscale_model": parts.upscale_model, "plan": draft[1], "drafts": draft[0], "sigma": sigma}
            made.add("PreviewImage", images=made.add("MrFlowFinish", **shared, **last, index=0, count=1)[0])
        seen.append(len(client.run(made.api).succeeded().times))
    assert seen == [14, 1, 1]


def test_drafts_alone_are_stage_1_alone(client: Client, graph: Make, seed: int) -> None:
    made = graph()
    parts = doubled(made)
    shared = {"model": parts.model, "positive": parts.positive, "negative": parts.negative, "vae": parts.vae}
    chosen = {"width": 256, "height": 256, "preset": "12+1", "cfg": 1.0, "batch_size": 4, "seed": seed}
    made.add("PreviewImage", images=made.add("MrFlowDraft", **shared, **chosen)[0])
    run = client.run(made.api).succeeded()
    assert run.rows == [4] * 12
    assert run.of("encode") == []


def test_a_picture_that_is_refined_costs_its_steps(client: Client, graph: Make, seed: int) -> None:
    seen: list[int] = []
    for sigma, steps in ((0.12, 1), (0.2, 1), (0.2, 3)):
        made = graph()
        parts = doubled(made)
        picture = made.add("RecorderPicture", width=128, height=128)
        chosen = {"sigma": sigma, "refine_steps": steps, "cfg": 1.0, "seed": seed}
        made.add("PreviewImage", images=made.add("MrFlowRefine", **parts.sockets, image=picture[0], **chosen)[0])
        run = client.run(made.api).succeeded()
        assert abs(run.sigmas[0] - sigma) < 1e-6
        seen.append(len(run.times))
    assert seen == [1, 1, 3]
