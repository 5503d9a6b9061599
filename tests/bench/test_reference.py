"""The official scripts' procedure, as bench.reference runs it, and ours are one where their choices are one."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from bench import reference

PROMPT = "the word MAGIC in white letters on a blue wall"


def test_with_the_references_choices_the_pictures_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    if "sigmas" not in inspect.signature(FluxPipeline.__call__).parameters:
        pytest.skip("FluxPipeline takes sigmas from diffusers 0.32 on")
    monkeypatch.setattr(reference, "LOW_STEPS", 3)
    ways = reference.ways(128)
    made = {name: np.array(make(PROMPT, 5)).astype(int) for name, make in ways.items() if name != "native"}
    expected = made["reference"]
    assert expected.shape == (128, 128, 3)
    assert expected.std() > 10
    away = {name: np.abs(picture - expected) for name, picture in made.items()}
    # Rounded at the same places: what is left is the order of sums in float32, at the edge between two levels.
    assert away["MrFlow, its choices, rounded"].max() <= 1
    assert away["MrFlow, its choices, rounded"].mean() < 0.01
    # In float: what 8 bits leave out, and the truncation, half a level on average.
    assert away["MrFlow, its choices, float"].max() <= 8
    assert 0.01 < away["MrFlow, its choices, float"].mean() < 1
    # Our own choices are another picture, so the equality above means something.
    assert away["MrFlow"].mean() > 0.5


def test_tiles_cover_the_picture_and_join_without_a_seam() -> None:
    class Doubler:
        device = torch.device("cpu")
        scale, dtype = 2, torch.float32

        @staticmethod
        def model(images: torch.Tensor) -> torch.Tensor:
            assert images.shape[-2:] == (240, 240)
            return double(images)

    doubler: Any = Doubler()
    images = torch.rand((2, 3, 200, 330), generator=torch.Generator().manual_seed(0))
    large = reference.Tiles(doubler)(images)
    assert torch.equal(large, double(images))
    rounded = reference.Tiles(doubler, rounded=True)(images)
    assert torch.allclose(rounded, large, atol=0.51 / 255)


def double(images: torch.Tensor) -> torch.Tensor:
    return images.repeat_interleave(2, -1).repeat_interleave(2, -2)
