"""bench/previews/composition.py: open captions leave out what they may, and shares and intervals are what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.previews import composition
from bench.previews.composition import Pictures, Row, compare, interval_of, rows, section
from bench.previews.open_captions import open_caption
from bench.quality.__main__ import scenes_of
from mrflow_sched import make_plan
from mrflow_sched.demo.captions import caption, vocabulary


def test_open_captions_leave_something_out_and_keep_what_absence_means() -> None:
    for scene in scenes_of(12):
        full = caption(scene)
        for seed in range(20):
            text = open_caption(scene, seed)
            assert text == open_caption(scene, seed)
            assert text != full
            words = text.replace(",", "").split()
            assert set(words) <= {*vocabulary(), scene.word}
            if scene.category != "objects":
                continue
            assert not (scene.word and scene.ground in text and scene.word not in words)  # else there would be no sign
            plain = {f"{thing.colour} {thing.shape}" for thing in scene.things if thing.texture == "plain"}
            textured = {f"{thing.colour} {thing.shape}" for thing in scene.things if thing.texture != "plain"}
            assert not any(words in text for words in textured - plain)  # else the thing would be plain


def pictures(count: int, seed: int) -> Tensor:
    return torch.rand((count, 3, 32, 32), generator=torch.Generator().manual_seed(seed))


def test_own_seed_is_one_for_the_same_pictures_and_none_for_those_of_the_other_seed() -> None:
    native = pictures(8, 0)
    assert compare(native, native, 2).own.tolist() == [1.0] * 8
    assert compare(native, native, 2).psnr.tolist() == [100.0] * 8
    swapped = native.roll(4, 0)
    assert compare(swapped, native, 2).own.tolist() == [0.0] * 8
    # Three seeds: nearer to its own than to one of the two others is a half; the same to all is a tie.
    twelve = pictures(12, 1)
    made = twelve.clone()
    made[0] = 0.45 * twelve[0] + 0.55 * twelve[4]
    assert compare(made, twelve, 3).own[0] == 0.5
    alike = twelve[:4].repeat(3, 1, 1, 1)
    assert compare(pictures(12, 2), alike, 3).own.tolist() == [0.5] * 12


def test_an_interval_draws_prompts_with_all_their_seeds() -> None:
    # The two seeds of every prompt cancel: only a sample of whole prompts has no spread.
    values = torch.cat([torch.arange(24.0), -torch.arange(24.0)])
    assert interval_of(values, 2) == (0.0, 0.0)
    low, high = interval_of(torch.arange(24.0).repeat(2), 2)
    assert low < 11.5 < high


def test_every_nested_row_has_one_with_noise_of_its_own() -> None:
    made = rows()
    plans = {(row.captions, row.plan.to_string()) for row in made}
    nested = [row for row in made if row.plan.noise == "nested"]
    assert len(nested) == 7
    assert all(
        (row.captions, row.plan.to_string().replace(";noise=nested", "")[:-10])
        in {(captions, text[:-10]) for captions, text in plans}
        for row in nested
    )
    assert len({(row.name, row.captions) for row in made}) == len(made)


def test_pictures_that_are_kept_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make(self: Any, row: Row, texts: Sequence[str], seeds: Sequence[int], given: Any) -> list[Tensor]:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.extend(seeds[:1])
        return [torch.full((3, 8, 8), seed % 256, dtype=torch.uint8) for seed in seeds]

    monkeypatch.setattr(Pictures, "_make", make)
    row = Row("staged", "full", make_plan("demo", 256, 256, "12+1"))
    with pytest.raises(KeyboardInterrupt):
        Pictures(8, 2, tmp_path).of(row)
    made.clear()
    whole = Pictures(8, 2, tmp_path).of(row)
    assert made == [1016, 1024]  # eight of sixteen were there
    assert (whole[:, 0, 0, 0] * 255).round().int().tolist() == [(1000 + 2 * at) % 256 for at in range(16)]
    assert Pictures(8, 2, tmp_path).of(row).equal(whole)
    assert made == [1016, 1024]


def test_the_section_has_both_tables_and_the_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(self: Any, row: Row, texts: Sequence[str], seeds: Sequence[int], given: Any) -> list[Tensor]:
        width, height = row.plan.stages[-1].width, row.plan.stages[-1].height
        assert (given is not None) is row.given
        # Nested noise gives the native picture of the seed; all else gives another one.
        same = row.plan.noise == "nested" or row.plan.preset == "native"
        drawn = [torch.Generator().manual_seed(seed if same else seed + 77) for seed in seeds]
        return [torch.randint(0, 256, (3, height, width), generator=each).to(torch.uint8) for each in drawn]

    monkeypatch.setattr(Pictures, "_make", make)
    monkeypatch.setattr(composition, "QUALITY_RESAMPLES", 3)
    monkeypatch.setattr(composition, "SCORED", ("staged 12+1, own noise",))
    text = section(prompts=4, seeds=2, folder=tmp_path)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "| 1.00 | " in lines["three stages, 12+1+1, nested noise"]
    assert " 100.00 | " in lines["stage 1 of 136 px, nested noise"]
    assert "100.00" not in lines["staged 12+1, nested noise of another seed"]
    assert "full: staged 12+1, own noise" in text
    assert "open: native, 30 steps" in text
