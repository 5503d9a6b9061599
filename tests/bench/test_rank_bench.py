"""bench/previews/ranks: what it reports is what it was given, and pictures are made once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.previews import pictures, ranks
from mrflow_sched.demo.captions import caption


class Maker:
    """Pictures whose finished ones are the drafts enlarged; counts what it makes."""

    made = 0
    settings = ("none",)

    def make(self, prompt: str, seeds: Sequence[int]) -> dict[str, Tensor]:
        type(self).made += len(seeds)
        found: list[Tensor] = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed + len(prompt))
            low = torch.rand((1, 3, 4, 4), generator=generator) * torch.rand((), generator=generator)
            found.append(torch.nn.functional.interpolate(low, (32, 32), mode="bilinear"))
        drafts = torch.cat(found)
        large = torch.nn.functional.interpolate(drafts, scale_factor=2.0, mode="nearest")
        return {pictures.FINISHED: large, **dict.fromkeys(pictures.DRAFT_STEPS, drafts)}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> type[Maker]:
    monkeypatch.setattr(pictures, "_Maker", Maker)
    monkeypatch.setattr(Maker, "made", 0)
    monkeypatch.setattr(ranks, "NAMES", ("contrast", "saturation"))
    return Maker


def test_pictures_are_made_once_and_a_stopped_run_goes_on(made: type[Maker], tmp_path: Path) -> None:
    first = ranks.ranked(2, 16, tmp_path, resamples=2)
    assert made.made == 32
    some = sorted(tmp_path.rglob("*.safetensors"))
    assert len(some) == 4
    some[0].unlink()
    assert ranks.ranked(2, 16, tmp_path, resamples=2) == first
    assert made.made == 32 + pictures.TOGETHER


def test_perfect_drafts_are_perfect_and_random_ones_are_not(made: type[Maker], tmp_path: Path) -> None:
    text = ranks.ranked(2, 32, tmp_path, resamples=2)
    for scene in pictures.scenes(2):
        assert f"### “{caption(scene)}”" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    perfect = [row for row in rows if len(row) == 14 and row[1] in pictures.DRAFT_STEPS]
    assert len(perfect) == 2 * 2 * 3
    assert all(row[2].startswith("+1.00") and row[3] == "same" and row[7].startswith("1.00") for row in perfect)
    blind = [float(row[2].split()[0]) for row in rows if len(row) == 14 and row[1] in (ranks.OTHER, ranks.RANDOM)]
    assert len(blind) == 2 * 2 * 2
    assert max(map(abs, blind)) < 0.7


def test_the_section_takes_many_seeds_of_few_prompts(
    made: type[Maker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(ranks, "ranked", lambda prompts, seeds, folder: asked.append((prompts, seeds)) or "text")
    assert ranks.section(prompts=24, seeds=2, folder=tmp_path) == "## Scores of drafts\n\ntext"
    ranks.section(prompts=2, seeds=100, folder=tmp_path)
    assert asked == [(4, 64), (2, 100)]


def test_too_few_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few"):
        ranks.ranked(1, 64, tmp_path)


def test_a_row_without_order_has_no_share() -> None:
    row = ranks.measured("flat", "12 steps", torch.ones(16), torch.ones(16), resamples=3)
    assert row.rho[0] != row.rho[0]
    assert row.gains[4].share is None
    assert "nan" in ranks._table([row])
