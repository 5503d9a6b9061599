"""The fine judge reads the detail that only the full size holds, and nothing that is not there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mrflow_sched.demo.drawing import render
from mrflow_sched.demo.fine_judge import (
    FIELDS,
    FINE_GROUPS,
    WEIGHTS,
    FineJudge,
    at_full_size,
    fine_confidence,
    fine_hits,
    fine_log_probability,
    load_fine_judge,
    places,
    resampled,
)
from mrflow_sched.demo.scenes import FINE_KINDS, OUTLINED, Face, Scene, Thing, fine_scene, random_scene

EACH = 6


@pytest.fixture(scope="module")
def judge() -> FineJudge:
    return load_fine_judge()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [fine_scene(np.random.default_rng([77, k]), kind) for kind in FINE_KINDS for k in range(EACH)]


def drawn(scenes: list[Scene], size: int = 256) -> Tensor:
    images = [torch.from_numpy(render(scene, size, seed=500 + row)) for row, scene in enumerate(scenes)]
    return torch.stack(images).permute(0, 3, 1, 2).float().contiguous()


@pytest.fixture(scope="module")
def images(scenes: list[Scene]) -> Tensor:
    return drawn(scenes)


def share(found: list[dict[str, list[bool]]], *groups: str) -> float:
    return float(np.mean([hit for row in found for name, hits in row.items() if name in groups for hit in hits]))


def test_the_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size <= 2_000_000


def test_true_scenes_read_as_their_captions_say(judge: FineJudge, images: Tensor, scenes: list[Scene]) -> None:
    found = fine_hits(judge, images, scenes)
    assert {group for row in found for group in row} == set(FINE_GROUPS)
    assert share(found, *FINE_GROUPS) >= 0.98
    sure = fine_confidence(judge, images, scenes)
    assert sure.shape == (len(scenes),)
    assert float(sure.mean()) > 0.95
    assert float(sure.max()) <= 1


def test_an_image_of_128_pixels_does_not_hold_it(judge: FineJudge, images: Tensor, scenes: list[Scene]) -> None:
    small = nn.functional.avg_pool2d(images, 2)
    for worse in (small, nn.functional.interpolate(small, scale_factor=2.0, mode="bilinear")):
        assert share(fine_hits(judge, worse, scenes), "tiny letters") <= 0.1
    close = [scene for scene in scenes if scene.gap == "three"]
    rows = [row for row, scene in enumerate(scenes) if scene in close]
    assert len(close) > 1
    assert share(fine_hits(judge, images[rows], close), "gap") == 1
    assert share(fine_hits(judge, small[rows], close), "gap") == 0


def test_other_captions_are_less_likely(judge: FineJudge, images: Tensor, scenes: list[Scene]) -> None:
    right = fine_log_probability(judge, images, scenes)
    others = [scenes[EACH * (k // EACH) + (k + 1) % EACH] for k in range(len(scenes))]  # of the same kind
    other = fine_log_probability(judge, images, others)
    assert bool((right <= 0).all())
    assert float(right.mean()) > -0.1
    assert float((other < right).float().mean()) > 0.95
    assert float((right - other).mean()) > 2


def test_an_average_of_images_is_not_sure(judge: FineJudge) -> None:
    faces = [
        Scene("faces", faces=(Face(mood, hair, "blue"),), wall="white")
        for mood, hair in (("sad", "red"), ("surprised", "black"))
    ]
    wall = Scene("letters", word="AB", print="small", ink="black", wall="white")
    words = [replace(wall, small_word=word) for word in ("LIMB", "FOXY")]
    asked = [Scene("faces", faces=(Face("sad", "red", ""),)), words[0]]
    for (first, second), named in zip((drawn(faces), drawn(words)), asked, strict=True):
        sure = fine_confidence(judge, torch.stack([first, second, (first + second) / 2]), [named] * 3)
        assert float(sure[:2].min()) > 0.95
        assert float(sure[2]) < 0.85


def test_only_what_a_scene_names_is_asked(judge: FineJudge) -> None:
    things = (Thing("red", OUTLINED, "star"), Thing("", "", "ring"))
    scene = Scene("objects", things, "green hills", "blue", birds="two", small_word="ABC", print="tiny")
    shown = replace(scene, things=(things[0], Thing("blue", "plain", "ring")))
    [found] = fine_hits(judge, drawn([shown]), [scene])
    assert {group: len(hits) for group, hits in found.items()} == {"tiny letters": 3, "birds": 1, "outline": 1}
    asked = {
        name for place in places(Scene("faces", faces=(Face("", "red", ""),), face_size="small")) for name in place.asks
    }
    assert asked == {"hair"}
    assert places(Scene("faces", faces=(Face("", "", ""),))) == []
    assert [list(place.asks) for place in places(Scene("lines", pattern="grid"))] == [["pattern"]]


def test_scenes_without_fine_detail_are_not_judged(judge: FineJudge) -> None:
    coarse = [random_scene(np.random.default_rng([1, k])) for k in range(3)]
    images = torch.zeros(3, 3, 256, 256)
    assert fine_hits(judge, images, coarse) == [{}, {}, {}]
    assert fine_log_probability(judge, images, coarse).tolist() == [0, 0, 0]
    assert bool(fine_confidence(judge, images, coarse).isnan().all())


def test_a_wrong_letter_counts_once(judge: FineJudge) -> None:
    scene = Scene("letters", word="FLOW", ink="black", wall="yellow", small_word="MAGIC", print="small")
    image = drawn([scene])
    [found] = fine_hits(judge, image, [replace(scene, small_word="MAGIX")])
    assert found == {"small letters": [True, True, True, True, False]}
    right, wrong = fine_log_probability(judge, image.repeat(2, 1, 1, 1), [scene, replace(scene, small_word="MAGIX")])
    assert float(wrong) < float(right) - 0.5


@pytest.mark.parametrize("size", [128, 256, 384, 512])
def test_every_size_is_read_at_256(size: int) -> None:
    image = torch.zeros(1, 3, size, size)
    image[..., : size // 2] = 1
    read = at_full_size(image)
    assert read.shape == (1, 3, 256, 256)
    assert read[0, 0, 9, [40, 220]].tolist() == pytest.approx([1, 0], abs=1e-4)


@pytest.mark.parametrize("shape", [(3, 256, 256), (1, 4, 256, 256)])
def test_images_of_another_shape_are_refused(judge: FineJudge, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must have the shape \(B, 3, H, W\)"):
        fine_hits(judge, torch.zeros(shape), [Scene("lines", pattern="grid")])
    with pytest.raises(ValueError, match="as many, got 2 and 1"):
        fine_hits(judge, torch.zeros(2, 3, 256, 256), [Scene("lines", pattern="grid")])


def test_a_box_of_whole_pixels_is_cut_as_it_is() -> None:
    cut = torch.rand(2, 3, 32, 40)
    boxes = torch.tensor([[4.0, 2, 20, 26], [24.0, 8, 40, 32]])
    out = resampled(cut, boxes, (24, 16))
    assert torch.allclose(out[0], cut[0, :, 2:26, 4:20], atol=1e-5)
    assert torch.allclose(out[1], cut[1, :, 8:32, 24:40], atol=1e-5)


def test_a_gradient_reaches_every_place(judge: FineJudge, images: Tensor, scenes: list[Scene]) -> None:
    chosen = list(range(0, len(scenes), EACH))
    shown = images[chosen].clone().requires_grad_()
    fine_log_probability(judge, shown, [scenes[k] for k in chosen]).sum().backward()
    assert shown.grad is not None
    assert bool((shown.grad.abs().sum((1, 2, 3)) > 0).all())
    assert set(FINE_GROUPS.values()) == set(FIELDS)
