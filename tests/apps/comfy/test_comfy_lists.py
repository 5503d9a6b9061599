"""Lists into the nodes that expand, and numbers that come by links."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_bench import LATER, PLAN, Bench

from mrflow_sched._runtime.errors import MrFlowError

pytestmark = pytest.mark.usefixtures("comfy")


def listed(bench: Bench, **lists: list[Any]) -> dict[str, Any]:
    sockets = bench.links("model", "positive", "negative", "vae", "upscale_model")
    graph = {name: {"class_type": "List", "inputs": {"value": values}} for name, values in lists.items()}
    links = {name: [name, 0] for name in lists}
    it = {"class_type": "MrFlowSampler", "inputs": {**sockets, **PLAN, **LATER, "batch_size": 1, **links}}
    return {**bench.loaders(), **graph, "it": it}


def test_a_list_of_prompts_makes_a_batch_and_every_output_keeps_its_place() -> None:
    bench = Bench()
    graph = listed(bench, positive=[[["red", {}]], [["blue", {}]]])
    [image], [draft], [text] = (bench.host.run_list(graph, "it", output) for output in range(3))
    assert (tuple(image.shape), tuple(draft.shape)) == ((2, 64, 64, 3), (2, 32, 32, 3))
    torch.testing.assert_close(image[:1], Bench().sampler(), rtol=0, atol=2e-6)
    assert text.splitlines()[2].startswith("z-image 6+1: 64x64")


def test_a_list_of_seeds_runs_once_for_each() -> None:
    bench = Bench()
    images = bench.host.run_list(listed(bench, seed=[3, 9]), "it")
    for image, seed in zip(images, (3, 9), strict=True):
        torch.testing.assert_close(image, Bench().sampler(seed=seed), rtol=0, atol=2e-6)
    parts = bench.links("model", "positive", "negative", "vae")
    graph = {
        **bench.loaders(),
        "seeds": {"class_type": "List", "inputs": {"value": [3, 9]}},
        "draft": {"class_type": "MrFlowDraft", "inputs": {**parts, **PLAN, "batch_size": 2, "seed": ["seeds", 0]}},
        "it": {
            "class_type": "MrFlowFinish",
            "inputs": {**parts, **LATER, "plan": ["draft", 1], "drafts": ["draft", 0], "index": 1, "count": 1},
        },
    }
    both = bench.host.run(graph, "it")
    for image, seed in zip(both, (4, 10), strict=True):
        torch.testing.assert_close(image[None], Bench().sampler(seed=seed, upscale_model=None), rtol=0, atol=2e-6)
    graph["it"]["inputs"]["index"] = ["seeds", 0]
    with pytest.raises(MrFlowError, match="index is a list of 2; give one value"):
        bench.host.run(graph, "it")


def test_images_of_several_sizes_are_no_batch() -> None:
    bench = Bench()
    pictures = [torch.rand(1, 32, 32, 3), torch.rand(1, 32, 48, 3)]
    graph = {
        **bench.loaders(),
        "image": {"class_type": "List", "inputs": {"value": pictures}},
        "it": {
            "class_type": "MrFlowRefine",
            "inputs": {
                **bench.links("model", "positive", "negative", "vae", "image"),
                "width": 0,
                "height": 0,
                "seed": 3,
                "preset": "12+1",
                "sigma": 0.0,
                "cfg": 0.0,
                "family": "auto",
                "factor": 2.0,
                "refine_steps": 0,
            },
        },
    }
    with pytest.raises(MrFlowError, match="images of 64x64, 96x64, which are no batch"):
        bench.host.run(graph, "it")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"stages": 0}, "stages must be a whole number from 2 to 8, got 0"),
        ({"sigma": 1.5}, "sigma must lie between 0 and 1"),
        ({"sigma": -0.5}, "sigma must lie between 0 and 1"),
        ({"refine_steps": 100000}, "refine_steps must be a whole number from 0 to 1000"),
        ({"refine_cfg": -2.0}, "refine_guidance must be a number from 0 to 100"),
    ],
    ids=str,
)
def test_numbers_that_come_by_a_link_are_checked(values: dict[str, Any], sentence: str) -> None:
    bench = Bench()
    graph = listed(bench, **{name: [value] for name, value in values.items()})
    with pytest.raises(MrFlowError, match=sentence):
        bench.host.run(graph, "it")
    if "sigma" not in values and "refine_steps" not in values:  # which a link leads to their stage
        assert bench.model.calls == []
