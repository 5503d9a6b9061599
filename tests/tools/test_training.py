"""tools/train_demo: what a training step of the embedded model is shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mrflow_sched.demo.parse import scene_of
from mrflow_sched.demo.scenes import FINE_KINDS, fine_scene
from tools.train_demo import data, flow, further


@pytest.fixture(scope="module")
def batches() -> Any:
    """Twenty scenes; the latents of each hold its number and the row that they are of."""
    count = 20
    made = object.__new__(flow.Batches)
    made.count, made.settings, made.rng = count, flow.FlowSettings(drop_text=0.0), np.random.default_rng(0)
    made.meanings, made.latents = {}, {}
    for size in data.SIZES:
        grid, side = size // data.TOKEN, size // data.PATCH
        made.meanings[size] = np.stack([data.meaning(data.scene_at(i), 10 * i + 1, grid) for i in range(count)])
        latents = np.zeros((count, 16, side, side), np.float16)
        latents[:, 0] = np.arange(count)[:, None, None]
        latents[:, 1] = np.arange(side)[None, :, None]
        made.latents[size] = latents
    made.ids, made.clip_ids = torch.arange(2 * count + 1)[:, None], torch.arange(2 * count + 1)[:, None]
    made.with_words, made.first_row, made.last_row = made._words()
    return made


def test_pictures_with_words_are_found(batches: Any) -> None:
    expected = [index for index in range(batches.count) if data.scene_at(index).word]
    assert batches.with_words.tolist() == expected
    assert 0 < len(expected) < batches.count
    assert all(0 <= a <= b < 32 for a, b in zip(batches.first_row, batches.last_row, strict=True))


def test_marks_are_letters_things_and_lights() -> None:
    names = np.array(data.MEANINGS["part"])
    marked = set(names[flow.is_mark(np.arange(len(names)))])
    assert {"square", "A", "Z", "sun", "moon"} <= marked
    assert not marked & {"wall", "tiles", "green hills", "blue sky", "night sky"}
    assert not bool(flow.is_mark(np.array([data.UNKNOWN])).any())
    assert set(names[flow.is_letter(np.arange(len(names)))]) == {name for name in marked if len(name) == 1}


def test_a_band_holds_every_letter_of_its_pictures(batches: Any) -> None:
    tops = set()
    for _ in range(30):
        top, (x0, ids, _, shown) = batches.draw_band()
        tops.add(top)
        assert x0.shape == (batches.settings.batch_band, 16, 32, 64)
        assert shown.shape == (batches.settings.batch_band, 3, 16 * 32)
        assert x0[0, 1, :, 0].tolist() == list(range(2 * top, 2 * top + 32))
        for picture, meant, row in zip(x0, shown, ids, strict=True):
            index = int(picture[0, 0, 0])
            whole = flow.is_letter(batches.meanings[256][index, 0])
            assert int(flow.is_letter(meant[0]).sum()) == int(whole.sum()) > 0
            assert int(row) % batches.count == index
    assert len(tops) > 3


def test_a_band_keeps_the_positions_of_its_picture() -> None:
    whole, band = flow.position_ids(64, 64), flow.position_ids(32, 64, top=5)
    assert torch.equal(band, whole.view(32, 32, 3)[5:21].reshape(-1, 3))


def test_words_are_drawn_as_often_as_asked_for(batches: Any) -> None:
    seen = []
    for size in (data.LOW, data.HIGH, data.TINY):
        rows = torch.cat([batches.draw(size, 4)[0][:, 0, 0, 0] for _ in range(100)])
        seen.append(float(np.isin(rows.numpy().astype(int), batches.with_words).mean()))
    plain = len(batches.with_words) / batches.count
    wanted = batches.settings.word_share + (1 - batches.settings.word_share) * plain
    assert seen[:2] == [pytest.approx(wanted, abs=0.15)] * 2
    assert seen[2] == pytest.approx(plain, abs=0.12)


def test_guidance_is_heard_again_around_what_it_gave() -> None:
    torch.manual_seed(0)
    model: Any = flow.make_transformer()
    parts = model.time_text_embed
    scales = parts.time_proj(1000 * torch.linspace(float(flow.GUIDANCE_RANGE[0]), float(flow.GUIDANCE_RANGE[1]), 9))
    with torch.no_grad():
        parts.guidance_embedder.linear_1.bias -= 100  # deaf: no unit answers
        parts.guidance_embedder.linear_2.bias += 1.5
        deaf = parts.guidance_embedder(scales)
        flow.heed_guidance(model)
        heard = parts.guidance_embedder(scales)
    assert float(deaf.std(0).max()) < 1e-6
    assert torch.allclose(heard.mean(0), deaf.mean(0), atol=1e-4)
    assert float(heard.std(0).mean()) > 1e-3


def test_guidance_is_heard_smoothly_whatever_training_does() -> None:
    """What bfloat16 makes of 3.5 is 3.504: to hear a difference there is to hear noise."""
    torch.manual_seed(0)
    model: Any = flow.make_transformer()
    parts = model.time_text_embed

    def heard(*scales: float) -> Tensor:
        with torch.no_grad():
            return parts.guidance_embedder(parts.time_proj(1000 * torch.tensor(scales)))

    def near_to_far() -> float:
        near, far = heard(3.5, 3.504).diff(dim=0), heard(3.0, 4.0).diff(dim=0)
        return float(near.norm() / far.norm())

    assert near_to_far() > 0.1
    keep_smooth = flow.heed_guidance(model)
    assert near_to_far() < 0.01
    with torch.no_grad():  # a step of training
        parts.guidance_embedder.linear_1.weight += 0.1 * torch.randn_like(parts.guidance_embedder.linear_1.weight)
    assert near_to_far() > 0.01
    keep_smooth()
    assert near_to_far() < 0.01


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("a red star over green hills, the tiny word SLOW", "small letters"),
        ("a small happy face with red hair and blue eyes on a white wall", "small faces"),
        ("a happy face with red hair and blue eyes on a white wall", "large faces"),
        ("thin red lines three apart on white", "pattern"),
        ("a red star over green hills under a blue sky with three birds", "birds"),
        ("many small yellow windows on purple", "detail"),
        ("a red striped circle and a blue star over green hills under a blue sky", "textures"),
        ("a red circle and a blue star over green hills under a blue sky", ""),
        ("a red striped circle over green hills under a blue sky", ""),
    ],
)
def test_what_is_learnt_last_has_a_name_that_the_settings_know(caption: str, kind: str) -> None:
    scene = scene_of(caption)
    assert scene is not None
    assert further.hard_kind(scene) == kind
    assert not kind or kind in further.FurtherSettings().hard


def test_scenes_that_were_written_are_read_back_whole(tmp_path: Path) -> None:
    scenes = [fine_scene(np.random.default_rng(5), kind) for kind in FINE_KINDS]
    assert any(scene.faces for scene in scenes)
    assert any(scene.things for scene in scenes)
    (tmp_path / "scenes.json").write_text(json.dumps([asdict(scene) for scene in scenes]))
    assert data.load_scenes(tmp_path) == scenes
