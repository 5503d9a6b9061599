"""`MrFlow.draft` and `MrFlow.finish`: what is picked is what the call of that seed makes, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_pipelines
import torch
from PIL import Image
from torch import Tensor

from mrflow_sched import MrFlow
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

NUMBERS: dict[str, Any] = {"width": 64, "height": 64, "low_steps": 2}


class Doubler:
    """A pixel upscaler of scale 2 by repetition."""

    name, scale = "doubler", 2

    def __call__(self, images: Tensor) -> Tensor:
        return images.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize("family", ["flux1-dev", "sd3", "qwen-image", "sdxl", "sana"])
def test_a_finished_draft_is_the_call_of_its_seed(family: str) -> None:
    flow = MrFlow(tiny_pipelines.make(family), upscaler=Doubler())
    texts: dict[str, Any] = (
        {} if flow.family.guidance_kind != "cfg" else {"negative_prompt": "a dog", "guidance_scale": 3.0}
    )
    drafts = flow.draft("a cat", num_images_per_prompt=3, seed=3, **NUMBERS, **texts)
    assert [each.seed for each in drafts] == [3, 4, 5]
    whole = flow("a cat", seed=5, output_type="pt", **NUMBERS, **texts)
    finished = flow.finish(drafts[2], output_type="pt")
    assert torch.equal(finished.images, whole.images)
    assert finished.plan == whole.plan
    assert isinstance(drafts[2].image, Image.Image)
    both = flow.finish(drafts[:2])
    assert [each.seeds for each in both] == [(3,), (4,)]


def test_every_prompt_has_its_texts_and_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = MrFlow(tiny_pipelines.make("sd3"))
    asked: list[Any] = []
    usual = PipelineEngine.encode_text

    def encode_text(self: Any, prompts: Any, *given: Any, **named: Any) -> Any:
        asked.append(prompts)
        return usual(self, prompts, *given, **named)

    monkeypatch.setattr(PipelineEngine, "encode_text", encode_text)
    drafts = flow.draft(
        ["a cat", "a cow"], num_images_per_prompt=2, seed=[8, 2, 9, 1], negative_prompt=["x", "y"], **NUMBERS
    )
    assert [(each.prompt, each.seed, each.options["negative_prompt"]) for each in drafts] == [
        ("a cat", 8, "x"),
        ("a cat", 2, "x"),
        ("a cow", 9, "y"),
        ("a cow", 1, "y"),
    ]
    assert asked == [["a cat"], ["a cow"]]


def test_cancelling_keeps_the_drafts_that_are_there() -> None:
    flow = MrFlow(tiny_pipelines.make("flux1-dev"))
    steps: list[int] = []
    drafts = flow.draft(
        "a cat",
        num_images_per_prompt=4,
        seed=0,
        callback=lambda step: steps.append(step.step) if step.name == "stage 1 sample" and step.step else None,
        cancel=lambda: len(steps) > 4,
        **NUMBERS,
    )
    assert [each.seed for each in drafts] == [0, 1]
    assert not flow.finish(drafts[0]).cancelled  # the draft keeps no function that stopped the others


def test_what_has_no_meaning_is_refused() -> None:
    flow = MrFlow(tiny_pipelines.make("flux1-dev"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"output_type": "np"}, "output_type has no meaning for a draft; give it to finish"),
        ({"image": torch.zeros(3, 8, 8)}, "image has no meaning for a draft"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
    ]
    for options, sentence in cases:
        with pytest.raises(MrFlowError, match=sentence):
            flow.draft("a cat", **NUMBERS, **options)
    (made,) = flow.draft("a cat", seed=1, **NUMBERS)
    with pytest.raises(MrFlowError, match="and width from the draft; leave it out"):
        flow.finish(made, width=32)
    with pytest.raises(MrFlowError, match="drafts holds str"):
        flow.finish("draft.png")  # pyright: ignore[reportArgumentType,reportCallIssue]


def test_the_call_itself_takes_no_latents() -> None:
    flow = MrFlow(tiny_pipelines.make("flux1-dev"))
    for name in ("latents", "until", "memory"):
        options: dict[str, Any] = {**NUMBERS, name: 1}
        with pytest.raises(MrFlowError, match=name):
            flow("a cat", seed=1, **options)
    with pytest.raises(MrFlowError, match="lowsteps is neither"):
        flow.draft("a cat", lowsteps=1, **NUMBERS)


def test_a_finished_draft_keeps_nested_noise() -> None:
    flow = MrFlow(tiny_pipelines.make("flux1-dev"))
    (made,) = flow.draft("a cat", seed=2, noise="nested", **NUMBERS)
    whole = flow("a cat", seed=2, noise="nested", output_type="pt", **NUMBERS)
    assert torch.equal(flow.finish(made, output_type="pt").images, whole.images)
    assert not torch.equal(flow("a cat", seed=2, output_type="pt", **NUMBERS).images, whole.images)
