"""tools/train_demo/fine_classifier: what the fine judge is trained on, and how it is measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrflow_sched.demo import fine_judge
from mrflow_sched.demo.fine_judge import FIELDS, FineJudge
from tools import train as parts
from tools.train_demo import fine_classifier as fine

_STEPS = dict.fromkeys(("letter_steps", "face_steps", "thing_steps", "bird_steps", "line_steps"), 100)
SMALL = fine.FineSettings(
    small_letters=8, small_sign=4, birds=8, faces=6, lines=8, vae_letters=0, vae_lines=4, batch=16, **_STEPS
)


@pytest.fixture(scope="module")
def data() -> dict[str, fine.Windows]:
    return fine.training_data(SMALL)


def test_every_view_has_windows_with_what_they_show(data: dict[str, fine.Windows]) -> None:
    assert set(data) == {*fine_judge.VIEWS, "bare"}
    for view, part in data.items():
        window = (100, 256) if view == "bare" else fine_judge.VIEWS[view].window
        assert part.pixels.shape[1:] == (3, *window)
        assert all(len(target) == len(part.pixels) == len(part.boxes) for target in part.targets.values())
    letters = data["letter"]
    assert int((letters.targets["letter"] == len(FIELDS["letter"])).sum()) == SMALL.birds  # places without a sign
    assert 0 < int(letters.vanish.sum()) < len(letters.vanish)
    assert bool((data["birds"].targets["birds"] == 0).any())


def test_what_vanishes_at_half_the_size_is_learnt_as_nothing(data: dict[str, fine.Windows]) -> None:
    worn = fine._Worn(replace(SMALL, enlarged_share=1.0))
    letters = data["letter"]
    shown = letters.pixels / 255
    worse, chosen = worn.vanished(shown, letters.vanish)
    assert torch.equal(chosen, letters.vanish)
    changed = (worse - shown).abs().amax((1, 2, 3)) > 0.05
    assert torch.equal(changed, chosen)
    none, _ = fine._Worn(replace(SMALL, enlarged_share=0.0)).vanished(shown, letters.vanish)
    assert torch.equal(none, shown)


def test_mixtures_are_learnt_as_both() -> None:
    worn = fine._Worn(replace(SMALL, mixed_share=1.0))
    x, letters = torch.arange(12.0).view(4, 3, 1, 1), torch.tensor([0, 1, 2, len(FIELDS["letter"])])
    mix = worn.mixed(x, {"letter": letters})
    assert mix.share[3] == 1  # nothing can be told: not mixed
    assert torch.allclose(mix.x[0], mix.share[0] * x[0] + (1 - mix.share[0]) * x[mix.partner[0]])
    sure = torch.full((4, 27), -9.0).scatter(1, letters[:, None], 9.0)
    alone = fine._Worn(replace(SMALL, mixed_share=0.0)).mixed(x, {"letter": letters})
    assert float(alone.cross_entropy({"letter": sure})) < 1e-3
    assert torch.equal(alone.x, x)


def test_blur_keeps_flat_parts_and_narrows_contrast() -> None:
    stripes = torch.zeros(1, 3, 16, 16)
    stripes[..., ::2] = 1
    assert torch.allclose(fine.blurred(torch.full((1, 3, 8, 8), 0.4), 0.1), torch.tensor(0.4))
    assert float(fine.blurred(stripes, 0.1)[..., 1:-1].amax()) == pytest.approx(0.8)
    assert float(fine.gaussian(stripes, 1.0)[..., 4:-4].std()) < 0.01
    assert float(fine.enlarged(stripes.repeat(1, 1, 16, 16)).std()) < 0.01


def test_the_part_trains_and_writes_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: dict[str, Any] = {"true": {"gap": 1.0}}
    monkeypatch.setattr(fine, "FineSettings", lambda: SMALL)
    monkeypatch.setattr(fine, "table", lambda *_: measured)
    parts.run("fine classifier", tmp_path, 0, 0.01, tmp_path)
    record = json.loads((tmp_path / "fine_classifier.json").read_text())
    assert record["accuracy"] == measured
    assert (record["letters"]["steps"], record["lines"]["steps"]) == (1, 1)
    assert record["letters"]["seconds"] > 0
    fine.export(tmp_path, tmp_path / "fine.safetensors")
    monkeypatch.setattr(fine_judge, "WEIGHTS", tmp_path / "fine.safetensors")
    loaded = fine_judge.load_fine_judge()
    assert not loaded.training
    assert set(loaded.state_dict()) == set(FineJudge().state_dict())


def test_the_table_names_what_it_measured() -> None:
    pictures, scenes = fine.test_set(1)
    found = fine.accuracy(fine_judge.load_fine_judge(), pictures, scenes)
    assert {"tiny letters", "gap two"} <= set(found)
    text = fine.as_text({"true": found, "blurred": dict.fromkeys(found, 0.5)})
    assert len(text.splitlines()) == len(found) + 1
    assert np.isnan(found["gap three"]) == all(scene.gap != "three" for scene in scenes)
    assert np.isnan(found["gap two"])
