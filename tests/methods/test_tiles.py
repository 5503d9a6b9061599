"""A refine stage in tiles: the same noise, the same sigma, and no seams where the network needs no surroundings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mrflow_sched import StagedPlan, demo, get_family, load_upscaler, make_plan
from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched.methods.tiled import TiledEngine
from mrflow_sched.plan.cost import part_costs
from mrflow_sched.plan.tiles import tile_sides
from mrflow_sched.sampler import sample_staged


class Pointwise:
    """An engine whose clean estimate needs no surroundings; it remembers the sizes that it was given."""

    family = SimpleNamespace(grid=8)
    name = "pointwise"

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        return 4, height // 4, width // 4

    def denoise(self, x: Tensor, sigma: Tensor, text: Any, *, guidance: float) -> Tensor:
        self.seen.append(tuple(x.shape))
        return x * (1 - sigma.view(-1, 1, 1, 1)) + guidance


@pytest.mark.parametrize(("width", "height", "tile"), [(256, 256, 128), (520, 128, 200), (136, 392, 100), (64, 64, 64)])
def test_tiles_of_a_network_without_surroundings_are_the_whole(width: int, height: int, tile: int) -> None:
    engine = Pointwise()
    x = torch.randn((2, *engine.latent_shape(width, height)), generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 0.1])
    whole = engine.denoise(x, sigma, None, guidance=2.0)
    engine.seen.clear()
    tiled: Any = TiledEngine(engine, tile)  # type: ignore[arg-type]
    assert torch.allclose(tiled.denoise(x, sigma, None, guidance=2.0), whole, atol=1e-6)
    assert [(4 * shape[3], 4 * shape[2]) for shape in engine.seen] == tile_sides(width, height, tile, 8)
    assert all(side <= max(tile, 8) for shape in engine.seen for side in (4 * shape[2], 4 * shape[3]))
    assert tiled.name == "pointwise"


class Blurring(Pointwise):
    """An engine whose clean estimate sees two latents around each, and nothing beyond the edge of what it is given."""

    def denoise(self, x: Tensor, sigma: Tensor, text: Any, *, guidance: float) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2)


def test_neighbours_share_a_quarter_of_a_tile_so_that_seams_see_their_surroundings() -> None:
    """Tiles of 32 latents share 8, of which the outer 2 of each do not count: those that lack their surroundings."""
    engine: Any = Blurring()
    x = torch.randn((1, *engine.latent_shape(608, 128)), generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3])
    tiled = TiledEngine(engine, 128).denoise(x, sigma, None, guidance=1.0)
    torch.testing.assert_close(tiled, engine.denoise(x, sigma, None, guidance=1.0), rtol=0, atol=1e-6)


def test_cancelling_is_heard_between_tiles() -> None:
    engine, asked = Pointwise(), []

    def stop() -> None:
        asked.append(len(engine.seen))
        if len(asked) == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        TiledEngine(engine, 64, cancel=stop).denoise(torch.zeros(1, 4, 64, 64), torch.ones(1), None, guidance=1.0)  # type: ignore[arg-type]
    assert asked == [0, 1, 2]


def test_the_plan_keeps_its_tile_and_costs_less_with_it() -> None:
    whole, tiled = (make_plan("flux1-dev", 4096, 4096, stages=3, tile=tile) for tile in (0, 1536))
    assert StagedPlan.from_string(tiled.to_string()) == tiled
    assert StagedPlan.from_json(tiled.to_json()) == tiled
    assert "tile" not in whole.to_string()
    assert [tiled.tiled(index) for index in range(3)] == [False, True, True]
    assert tiled.tile_tokens(0) == (tiled.stages[0].tokens,)
    assert set(tiled.tile_tokens(2)) == {96 * 96}
    assert sum(tiled.tile_tokens(2)) > tiled.stages[2].tokens  # they overlap
    parts = [part_costs(plan) for plan in (whole, tiled)]
    assert parts[0] is not None
    assert parts[1] is not None
    last = [found[-2] for found in parts if found]
    assert last[0].flop > 1.2 * last[1].flop
    assert (last[0].calls, last[1].calls) == (1, len(tiled.tile_tokens(2)))
    assert whole.cost_ratio > 1
    fits = make_plan("flux1-dev", 1024, 1024, tile=1024)
    assert not fits.tiled(1)


@pytest.mark.parametrize("tile", [-1, 63, 200, 40000, 512.0])
def test_a_tile_that_holds_nothing_gets_one_sentence(tile: Any) -> None:
    with pytest.raises(ValueError, match="tile must be"):
        make_plan("flux1-dev", 2048, 2048, tile=tile)
    with pytest.raises(ValueError, match="native=True"):
        make_plan("flux1-dev", 2048, 2048, tile=512, native=True)


def test_a_tiled_refine_step_is_near_the_whole_one_and_seamless() -> None:
    """On the embedded model, with tiles of the size that it was trained at."""
    engine, upscaler = demo.load_engine(), load_upscaler(demo.upscaler_path())
    prompt = "the word MAGIC in white letters on a blue wall"
    pictures = {}
    for tile in (0, 128):
        plan = make_plan("demo", 256, 256, low_steps=4, seed=5, tile=tile)
        heard: list[float] = []
        done = sample_staged(engine, plan, prompt, upscaler=upscaler, callback=lambda p, h=heard: h.append(p.fraction))
        pictures[tile] = done.images
        assert heard == sorted(heard)
        assert done.forwards == 5
    difference = (pictures[0] - pictures[128]).abs().mean(1)[0]
    assert 0 < float(difference.mean()) < 0.02
    cuts = (32, 48, 64, 80, 96, 112, 128, 160)
    seams = [float((pictures[128][..., cut] - pictures[128][..., cut - 1]).abs().mean()) for cut in cuts]
    own = [float((pictures[0][..., cut] - pictures[0][..., cut - 1]).abs().mean()) for cut in cuts]
    assert max(a - b for a, b in zip(seams, own, strict=True)) < 0.01


def test_families_name_the_least_tile() -> None:
    least = round(get_family("flux1-dev").min_low_side / 2)
    assert make_plan("flux1-dev", 2048, 2048, tile=least).tile == least
