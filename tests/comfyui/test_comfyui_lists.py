"""Lists into the nodes that expand: every item is made, once, and every output keeps its place."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .client import Client, check_sentence
from .graphs import Graph, demo, doubled
from .process import INSTALLATION, REASON

if INSTALLATION is None:
    pytest.skip(REASON, allow_module_level=True)


def test_a_list_of_images_is_refined_into_one_batch(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    made, name, alone = graph(), client.name(), client.name()
    parts = doubled(made, "QwenImage")
    ramps = [made.add("RecorderPicture", width=128, height=96, slope=slope) for slope in (1 / 512, 1 / 256)]
    both = made.add("ImageBatch", image1=ramps[0][0], image2=ramps[1][0])
    listed = made.add("RebatchImages", images=both[0], batch_size=1)
    for image, to in ((listed[0], name), (ramps[1][0], alone)):
        refined = made.add("MrFlowRefine", **parts.sockets, image=image, seed=seed, cfg=1.0)
        made.save(refined[0], to)
        made.save(refined[1], f"{to}-text")
    run = client.run(made.api).succeeded()
    found = run.levels(name)
    assert found.shape == (2, 192, 256, 3)
    assert (abs(found[1:].astype(int) - run.levels(alone).astype(int)) <= 1).all()
    assert run.text(f"{name}-text").splitlines()[2].startswith("qwen-image")


def test_a_list_of_drafts_is_finished_into_one_batch(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    made, name = graph(), client.name()
    parts = doubled(made, "ZImage")
    shared = {"model": parts.model, "positive": parts.positive, "negative": parts.negative, "vae": parts.vae}
    draft = made.add("MrFlowDraft", **shared, width=256, height=256, batch_size=3, seed=seed, cfg=1.0, preset="6+1")
    made.save(draft[0], f"{name}-drafts")
    listed = made.add("RebatchImages", images=draft[0], batch_size=1)
    finished = made.add("MrFlowFinish", **shared, plan=draft[1], drafts=listed[0], upscale_model=parts.upscale_model)
    made.save(finished[0], name)
    run = client.run(made.api).succeeded()
    assert run.levels(f"{name}-drafts").shape == (3, 128, 128, 3)
    assert run.levels(name).shape == (3, 256, 256, 3)


def test_a_list_of_prompts_makes_one_batch(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    made, name = graph(), client.name()
    parts = demo(made)
    other = demo(made, "many small orange flowers on green")
    listed = made.add("RecorderList", first=parts.positive, second=other.positive)
    chosen = {**parts.sockets, "width": 128, "height": 128, "preset": "6+1", "cfg": 1.0, "seed": seed}
    for positive, to in ((listed[0], name), (other.positive, f"{name}-alone")):
        node = made.add("MrFlowSampler", **{**chosen, "positive": positive})
        for output, end in enumerate(("", "-draft", "-text")):
            made.save(node[output], f"{to}{end}")
    run = client.run(made.api).succeeded()
    assert run.levels(name).shape == (2, 128, 128, 3)
    assert run.levels(f"{name}-draft").shape == (2, 64, 64, 3)
    assert (abs(run.levels(name)[1:].astype(int) - run.levels(f"{name}-alone").astype(int)) <= 1).all()
    assert run.text(f"{name}-text").splitlines()[2].startswith("demo 6+1: 128x128")


def test_images_of_several_sizes_are_refused(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    made = graph()
    parts = doubled(made, "ZImage")
    pictures = [made.add("RecorderPicture", width=width, height=96, slope=1 / 256) for width in (96, 128)]
    listed = [made.add("RebatchImages", images=picture[0], batch_size=1)[0] for picture in pictures]
    refined = [made.add("MrFlowRefine", **parts.sockets, image=image, seed=seed, cfg=1.0)[0] for image in listed]
    joined = made.add("RecorderList", first=refined[0], second=refined[1])
    made.save(made.add("MrFlowGather", image=joined[0])[0], client.name())
    run = client.run(made.api)
    assert "images of 192x192, 256x192, which are no batch" in run.error
    check_sentence(run.error)
