"""A tile's tokens have the positions that they have in the whole image, where networks are told positions at all."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny_pipelines
import torch
from torch import Tensor

from mrflow_sched import StagedPlan, make_plan
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.engines.diffusers.seam import POSITIONS
from mrflow_sched.methods.tiled import TiledEngine
from mrflow_sched.plan.card import fit_card
from mrflow_sched.sampler import sample_staged

TOLD = ("flux1-dev", "flux1-kontext", "flux2-dev", "flux2-klein-base", "chroma", "ovis-image", "krea2")
UNTOLD = ("qwen-image", "z-image", "lumina2", "sd3", "auraflow")
WITHOUT = ("sana", "sdxl", "dreamlite")


@functools.cache
def engine_of(name: str) -> PipelineEngine:
    return PipelineEngine(tiny_pipelines.make(name))


class Heard:
    """The positions of image tokens in every call that reaches the network, and the tokens of each."""

    def __init__(self, engine: PipelineEngine) -> None:
        self.positions: list[Tensor] = []
        self._hook = engine.network.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: Any, _values: Any, named: dict[str, Any]) -> None:
        found = next(named[name] for name in POSITIONS if named.get(name) is not None)
        self.positions.append(found.reshape(-1, *found.shape[-2:])[0, -named["hidden_states"].shape[-2] :].double())

    def __enter__(self) -> Heard:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def run(engine: Any, x: Tensor, text: Any) -> Tensor:
    return engine.denoise(x, torch.full((len(x),), 0.5), text, guidance=engine.family.guidance)


@pytest.mark.parametrize("name", TOLD)
def test_tiles_have_the_positions_of_the_whole_image(name: str) -> None:
    engine = engine_of(name)
    grid = engine.family.grid
    rows, columns, side = 5, 6, 4
    text = engine.encode_text(["a red star"])
    x = torch.randn((1, *engine.latent_shape(columns * grid, rows * grid)), generator=torch.Generator().manual_seed(0))
    assert engine.capabilities.places
    with Heard(engine) as whole:
        run(engine, x, text)
    with Heard(engine) as placed:
        run(TiledEngine(engine, side * grid, placed=True), x, text)
    with Heard(engine) as own:
        run(TiledEngine(engine, side * grid), x, text)
    field = whole.positions[0].reshape(rows, columns, -1)
    each = len(whole.positions)  # guidance by two calls
    tiles = [field[top : top + side, left : left + side].flatten(0, 1) for top in (0, 1) for left in (0, 2)]
    wanted = [tile for tile in tiles for _ in range(each)]
    assert len(placed.positions) == len(wanted)
    assert all(torch.equal(found, tile) for found, tile in zip(placed.positions, wanted, strict=True))
    assert all(torch.equal(found, tiles[0]) for found in own.positions)


@pytest.mark.parametrize("name", [*UNTOLD, *WITHOUT])
def test_a_network_that_is_not_told_positions_says_so_and_tiles_all_the_same(name: str) -> None:
    engine = engine_of(name)
    assert not engine.capabilities.places
    family = engine.family
    tile = family.min_low_side // 2
    side = tile + 64
    options: Any = {"low_steps": 1, "tile": tile, "shift_tokens": 1024, "solver": "euler"}
    plan = make_plan(family, side, side, **options)
    told = sample_staged(engine, plan, "a red star")
    sentence = f"Each tile is an image of its own to {family.title}, whose network is not told positions."
    assert (sentence in plan.notes) is (sentence in told.warnings) is (name in UNTOLD)
    assert torch.isfinite(told.images).all()
    own = sample_staged(engine, make_plan(family, side, side, tile_positions="own", **options), "a red star")
    assert sentence not in (*own.warnings, *own.plan.notes)
    assert torch.equal(own.images, told.images)


def test_half_precision_positions_beyond_256_are_whole() -> None:
    """bfloat16 has no 257: a tile far inside a large image would else have its columns in pairs."""
    from mrflow_sched.engines.diffusers.seam import moved_to
    from mrflow_sched.sampling.network import NetworkCall

    ids = torch.stack([torch.zeros(4), torch.zeros(4), torch.arange(4.0)], 1).bfloat16()
    inputs = {"hidden_states": torch.zeros(1, 4, 8), "img_ids": ids}
    call = NetworkCall(inputs, 0.1, 0, "only", 1, "hidden_states", None, lambda **_: None)
    heard: list[Tensor] = []

    def note(last: NetworkCall) -> Tensor:
        heard.append(last.inputs["img_ids"])
        return last.latents

    moved_to((500, 301))(call, note)
    assert heard[0][:, 1].tolist() == [500.0] * 4
    assert heard[0][:, 2].tolist() == [301.0, 302.0, 303.0, 304.0]
    assert ids[:, 2].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_the_plan_says_which_positions_tiles_have() -> None:
    new = make_plan("flux1-dev", 2048, 2048, tile=1024)
    assert new.tile_positions == "whole"
    assert "tile=1024;tile_positions=whole;" in new.to_string()
    for plan in (new, make_plan("flux1-dev", 2048, 2048, tile=1024, tile_positions="own")):
        assert StagedPlan.from_string(plan.to_string()) == plan
        assert StagedPlan.from_json(plan.to_json()) == plan
    assert make_plan("flux1-dev", 2048, 2048).tile_positions == "own"  # of no tiles nothing is said
    before = new.to_string().replace("tile_positions=whole;", "").partition(";#")[0]
    assert StagedPlan.from_string(before).tile_positions == "own"


@pytest.mark.parametrize("name", [*TOLD, *UNTOLD, *WITHOUT])
def test_a_family_says_what_its_network_knows_of_positions(name: str) -> None:
    engine = engine_of(name)
    assert engine.family.pipeline is not None
    assert engine.family.pipeline.positions == ("told" if name in TOLD else "made" if name in UNTOLD else "none")
    assert engine.capabilities.places is (name in TOLD)


def test_what_has_no_effect_on_tiles_is_noted() -> None:
    alone = make_plan("flux1-dev", 2048, 2048, tile_positions="own")
    assert alone.notes == ("tile_positions=own has no effect without tiles; give tile too.",)
    wide = make_plan("flux1-dev", 2048, 2048, tile=8192)
    assert wide.notes == ("tile=8192 has no effect: no later stage has a larger side.",)
    assert make_plan("flux1-dev", 2048, 2048, tile=1024, tile_positions="own").notes == ()
    cut = fit_card(make_plan("z-image", 4096, 4096), 16).plan
    assert "Each tile is an image of its own to Z-Image, whose network is not told positions." in cut.notes
