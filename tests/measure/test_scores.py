"""Scores: they measure what they are called, at every size, and what cannot be ordered is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.drawing import render
from mrflow_sched.demo.scenes import random_scene
from mrflow_sched.measure.scores import NAMES, get_score

PIXELS = tuple(name for name in NAMES if name != "judge")


def value(name: str, image: Tensor) -> float:
    return float(get_score(name)(image[None], ["x"])[0])


def pictures(count: int, size: int) -> Tensor:
    scenes = [random_scene(np.random.default_rng([9, row])) for row in range(count)]
    drawn = [torch.from_numpy(render(scene, size, seed=row)) for row, scene in enumerate(scenes)]
    return torch.stack(drawn).permute(0, 3, 1, 2).float().contiguous()


def test_values_of_plain_images() -> None:
    red = torch.zeros(3, 8, 8)
    red[0] = 1
    half = torch.zeros(3, 8, 8)
    half[:, :4] = 1
    assert value("brightness", red) == pytest.approx(0.299)
    assert value("brightness", half) == pytest.approx(0.5)
    assert value("contrast", half) == pytest.approx(0.5)
    assert value("contrast", red) == pytest.approx(0, abs=1e-6)
    assert value("saturation", red) == pytest.approx(1)
    assert value("saturation", half) == pytest.approx(0)
    assert value("sharpness", red) == pytest.approx(0, abs=1e-4)
    assert value("sharpness", half) > 0.1
    assert value("colourfulness", half) == pytest.approx(0, abs=1e-3)


def test_colourfulness_is_that_of_its_authors() -> None:
    """Hasler and Suesstrunk (2003), equations 2 to 6: rg = R - G, yb = (R + G) / 2 - B."""
    image = torch.rand((3, 7, 5), generator=torch.Generator().manual_seed(0))
    red, green, blue = (image.double() * 255).numpy()
    rg, yb = red - green, 0.5 * (red + green) - blue
    expected = math.hypot(rg.std(), yb.std()) + 0.3 * math.hypot(rg.mean(), yb.mean())
    assert value("colourfulness", image) == pytest.approx(expected, rel=1e-5)
    plain = torch.zeros(3, 4, 4)
    plain[0] = 1
    assert value("colourfulness", plain) == pytest.approx(0.3 * math.hypot(255, 127.5), rel=1e-5)


def test_sharpness_is_the_variance_of_the_laplacian_of_a_gaussian() -> None:
    """Of cos(wx) the Gaussian leaves exp(-w^2 / 2) and the Laplacian 2 - 2 cos w; half the square is the variance."""
    frequency = 2 * math.pi / 16
    wave = 0.5 + 0.4 * torch.cos(frequency * torch.arange(128)).expand(3, 128, 128)
    amplitude = 0.4 * 255 * math.exp(-(frequency**2) / 2) * (2 - 2 * math.cos(frequency))
    assert value("sharpness", wave) == pytest.approx(amplitude**2 / 2, rel=0.03)


def test_sharpness_falls_with_every_blur_and_not_with_the_size() -> None:
    large = pictures(6, 256)
    softer = [functional.interpolate(large, scale_factor=1 / factor, mode="area") for factor in (4, 8, 16)]
    score = get_score("sharpness")
    values = [score(image, ["x"] * 6) for image in (large, *softer)]
    assert all(bool((a > b).all()) for a, b in pairwise(values))
    small = score(functional.interpolate(large, scale_factor=0.5, mode="area"), ["x"] * 6)
    assert torch.allclose(values[0], small, rtol=1e-4)
    assert score(large[..., :200, :], ["x"] * 6).isfinite().all()
    assert score(large[..., :1, :1], ["x"] * 6).tolist() == pytest.approx([0] * 6, abs=1e-4)


def test_the_judge_prefers_what_the_prompt_says() -> None:
    scenes = [random_scene(np.random.default_rng([9, row])) for row in range(4)]
    prompts, images, score = [caption(scene) for scene in scenes], pictures(4, 128), get_score("judge")
    right, wrong = score(images, prompts), score(images, prompts[1:] + prompts[:1])
    assert bool((right > wrong + 0.5).all())
    assert score(images[:1], ["a red star"]).shape == (1,)
    with pytest.raises(MrFlowError, match=r"score 'judge' reads only .*'a photo of a cat'"):
        score(images[:2], [prompts[0], "a photo of a cat"])
    with pytest.raises(MrFlowError) as caught:
        score(images[:1], ["\x1b[31m" + "x" * 5000])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", PIXELS)
def test_least_first_turns_the_order(name: str) -> None:
    images = pictures(3, 128)
    assert get_score(f"-{name}")(images, ["x"] * 3).tolist() == (-get_score(name)(images, ["x"] * 3)).tolist()
    assert get_score(f"-{name}").name == f"-{name}"


@pytest.mark.parametrize(
    "images", [torch.rand(2, 3, 9, 9), torch.rand(2, 3, 9, 9).half(), torch.rand(2, 3, 9, 9).double()]
)
@pytest.mark.parametrize("name", PIXELS)
def test_every_dtype_gives_doubles_and_no_gradient(name: str, images: Tensor) -> None:
    found = get_score(name)(images.requires_grad_(), ["x", "y"])
    assert (found.dtype, found.shape, found.requires_grad) == (torch.float64, (2,), False)


def test_any_function_is_a_score() -> None:
    def first_pixel(images: Tensor, prompts: Sequence[str]) -> Any:
        return [float(image[0, 0, 0]) + len(prompt) for image, prompt in zip(images, prompts, strict=True)]

    score = get_score(first_pixel)
    assert score.name == "first_pixel"
    assert score(torch.zeros(2, 3, 4, 4), ["ab", "c"]).tolist() == [2, 1]
    white = get_score(lambda images, prompts: images.mean((1, 2, 3)))  # what is transparent is seen on white
    assert white(torch.zeros(1, 4, 4, 4), ["a"]).tolist() == [1]
    assert get_score(score) is score


@pytest.mark.parametrize(
    "spec",
    ["", "-", "--sharpness", "beauty", "SHARPNESS", "clip", "clip:", "judge:x", "\x1b[2J", "x" * 9999, 3, None, []],
)
def test_unknown_names_get_one_sentence(spec: Any) -> None:
    with pytest.raises(MrFlowError, match=r"^score is .*sharpness, colourfulness, .*judge or clip:FOLDER") as caught:
        get_score(spec)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (torch.tensor([1.0, math.nan]), "gave nan for image 2 of 2"),
        (torch.tensor([math.inf, 1.0]), "gave inf for image 1 of 2"),
        (torch.zeros(3), r"gave values of shape \(3,\) for 2 images"),
        (torch.zeros(2, 1), r"gave values of shape \(2, 1\) for 2 images"),
        (1.0, r"gave values of shape \(\) for 2 images"),
        (None, "gave None; it must give a tensor of 2 numbers"),
        (["a", "b"], "it must give a tensor of 2 numbers"),
    ],
)
def test_what_has_no_order_is_refused(given: Any, sentence: str) -> None:
    with pytest.raises(MrFlowError, match=sentence):
        get_score(lambda images, prompts: given)(torch.zeros(2, 3, 4, 4), ["a", "b"])


@pytest.mark.parametrize(
    ("images", "prompts", "sentence"),
    [
        (torch.zeros(3, 4, 4), ["a"], "images must be a tensor"),
        (torch.zeros(1, 5, 4, 4), ["a"], "images must be a tensor"),
        (torch.zeros(0, 3, 4, 4), [], "images must be a tensor"),
        ("picture.png", ["a"], "images must be a tensor"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ["a"], "divide bytes by 255"),
        (torch.full((1, 3, 4, 4), math.nan), ["a"], "NaN"),
        (torch.full((1, 3, 4, 4), 200.0), ["a"], "from 0 to 1"),
        (torch.zeros(1, 3, 4, 4), "a", "prompts must be a list of 1 texts"),
        (torch.zeros(2, 3, 4, 4), ["a"], "prompts must be a list of 2 texts"),
    ],
)
def test_wrong_images_and_prompts_get_one_sentence(images: Any, prompts: Any, sentence: str) -> None:
    with pytest.raises(MrFlowError, match=sentence):
        get_score("contrast")(images, prompts)


def test_a_users_own_error_passes_through() -> None:
    def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        get_score(broken)(torch.zeros(1, 3, 4, 4), ["a"])
