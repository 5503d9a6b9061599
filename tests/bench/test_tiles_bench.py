"""Tiles of a refine stage leave no seam: measured at their borders and by spectra, beside the known-bad way."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from bench import tiles
from mrflow_sched import demo, load_upscaler, make_plan
from mrflow_sched.sampler import sample_staged

SIDE, TILE = 256, 128


def test_a_step_at_the_border_of_tiles_is_found_and_smooth_change_is_not() -> None:
    torch.manual_seed(0)
    smooth = torch.randn(2, 3, 256, 256)
    lines = tiles.borders(256, 64, overlap=False)
    assert lines == [64, 128, 192]
    step = smooth.clone()
    step[..., 64:128] += 1.0
    step[..., 192:] += 1.0
    assert tiles.seam(smooth, lines) < 1.1
    assert tiles.seam(step, lines) > 1.2
    assert tiles.period(step, 64) > 3
    assert tiles.period(smooth, 64) < 2.5
    assert tiles.borders(512, 256) == [160, 192, 224, 288, 320, 352]


@functools.cache
def pictures() -> dict[str, Tensor]:
    """A refine step of 256 px from one image of 128 px: whole, and in tiles of a size that the model knows."""
    engine, upscaler = demo.load_engine(), load_upscaler(demo.upscaler_path())
    prompt = "the word MAGIC in white letters on a blue wall"
    low = sample_staged(engine, make_plan("demo", 256, 256, low_steps=4, seed=5), prompt, until=1).images
    found: dict[str, Tensor] = {}
    for name, (options, method) in tiles.ways(SIDE, TILE).items():
        plan = make_plan("demo", SIDE, SIDE, seed=5, sigma=tiles.AUTHORS_SIGMA, **options)
        found[name] = sample_staged(engine, plan, prompt, upscaler=upscaler, image=low, method=method).images
    return found


@pytest.mark.parametrize("way", ["tiles, own positions", "tiles, positions of the whole"])
def test_tiles_leave_no_seam(way: str) -> None:
    made = pictures()
    whole = made["whole image"]
    changed, hard = made[way] - whole, made["side by side, no overlap"] - whole
    bad = tiles.seam(hard, tiles.borders(SIDE, TILE, overlap=False))
    assert bad > 1.35  # or the measure would see nothing
    assert tiles.seam(changed, tiles.borders(SIDE, TILE)) < 1.3
    assert float(changed.abs().mean()) < 0.02


def test_positions_of_the_whole_image_are_nearer_to_it() -> None:
    """Why they are the default."""
    made = pictures()
    whole = made["whole image"]
    apart = {name: float((each - whole).square().mean()) for name, each in made.items()}
    assert apart["tiles, positions of the whole"] < apart["tiles, own positions"]
