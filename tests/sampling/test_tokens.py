"""Tokens of an image: their raster, which are chosen, how a field on some becomes one on all."""

from __future__ import annotations

import pytest
import torch

from mrflow_sched import MrFlowError
from mrflow_sched.plan.make import make_plan
from mrflow_sched.sampling.tokens import Lift, TokenGrid, anchors, choose, local_variance

GRID = TokenGrid(12, 20)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_fields_and_latents_are_inverse() -> None:
    latents = torch.randn(2, 3, 24, 60, generator=_generator())
    fields = GRID.fields(latents)
    assert fields.shape == (2, 18, 12, 20)
    assert torch.equal(GRID.to_latents(fields, latents), latents)
    assert torch.equal(fields[0, :, 1, 2].sort().values, latents[0, :, 2:4, 6:9].flatten().sort().values)


def test_the_raster_of_a_stage() -> None:
    stage = make_plan("flux1-dev", 1024, 768).stages[-1]
    assert TokenGrid.of(stage, torch.zeros(1, 16, 96, 128)) == TokenGrid(48, 64)
    with pytest.raises(MrFlowError, match="whole square tokens"):
        TokenGrid.of(stage, torch.zeros(1, 16, 95, 128))
    with pytest.raises(MrFlowError, match="whole square tokens"):
        TokenGrid.of(stage, torch.zeros(1, 16, 1, 96, 128))


@pytest.mark.parametrize("share", [0.02, 0.2, 0.3, 0.35, 0.62, 0.99, 1.0])
def test_anchors_are_as_many_as_asked_and_differ(share: float) -> None:
    found = anchors(GRID, share, _generator())
    assert len(found) == len(found.unique()) == max(1, int(share * GRID.count))
    assert torch.equal(found, found.sort().values)
    assert int(found.min()) >= 0
    assert int(found.max()) < GRID.count
    assert torch.equal(found, anchors(GRID, share, _generator()))


def test_anchors_hold_the_published_pattern() -> None:
    # 64x64 tokens: 1213 of the checkerboard and the border, before random ones are added (spec B.1.3).
    grid = TokenGrid(64, 64)
    found = set(anchors(grid, 0.35, _generator()).tolist())
    pattern = {
        row * 64 + column
        for row in range(64)
        for column in range(64)
        if (row % 2 == 0 and column % 2 == 0) or row in (0, 63) or column in (0, 63)
    }
    assert len(pattern) == 1213
    assert pattern <= found
    assert len(found) == 1433


def test_a_lift_is_exact_where_known_and_keeps_a_constant() -> None:
    known = anchors(GRID, 0.4, _generator())
    values = torch.randn(2, len(known), 5, generator=_generator(), dtype=torch.float64)
    lift = Lift(GRID, known)
    assert torch.equal(lift(values)[:, known], values)
    assert torch.equal(lift(values.bfloat16())[:, known], values.bfloat16())
    constant = lift(torch.full((1, len(known), 3), 0.7, dtype=torch.float64))
    torch.testing.assert_close(constant, torch.full((1, GRID.count, 3), 0.7, dtype=torch.float64), atol=1e-15, rtol=0)


def test_a_lift_of_all_tokens_is_the_field_itself() -> None:
    values = torch.randn(1, GRID.count, 4)
    assert Lift(GRID, torch.arange(GRID.count))(values) is values


def test_a_lift_of_a_slope_errs_by_no_more_than_it_reaches() -> None:
    row = torch.arange(GRID.count, dtype=torch.float64) // GRID.columns
    known = anchors(GRID, 0.3, _generator())
    error = (Lift(GRID, known)(row[known].view(1, -1, 1))[0, :, 0] - row).abs().max()
    apart = (known // GRID.columns)[:, None] - (torch.arange(GRID.count) // GRID.columns)
    across = (known % GRID.columns)[:, None] - (torch.arange(GRID.count) % GRID.columns)
    farthest = (apart**2 + across**2).double().sqrt().min(0).values.max()
    assert float(error) <= float(farthest) + 3.0  # the Gaussian's reach at this share


@pytest.mark.parametrize("grid", [TokenGrid(1, 5), TokenGrid(2, 2), TokenGrid(40, 3)])
def test_small_and_narrow_rasters(grid: TokenGrid) -> None:
    known = anchors(grid, 0.1, _generator())
    lifted = Lift(grid, known)(torch.ones(1, len(known), 2))
    torch.testing.assert_close(lifted, torch.ones(1, grid.count, 2))


def test_a_constant_field_has_no_detail_and_a_patch_is_found() -> None:
    flat = torch.full((1, 3, 12, 20), 2.0)
    assert float(local_variance(flat).max()) == 0.0
    assert float(local_variance(flat, padding="zeros").max()) > 0.5  # the published code's false importance
    busy = flat.clone()
    busy[:, :, 4:8, 10:14] += torch.randn(1, 3, 4, 4, generator=_generator()) * 3.0
    found = choose(local_variance(busy)[0], 10)
    assert all(3 <= token // 20 <= 8 and 9 <= token % 20 <= 14 for token in found.tolist())


def test_choice_leaves_out_what_is_taken_and_prefers_the_first_of_equals() -> None:
    assert choose(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 2]
    assert choose(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 2, torch.tensor([1, 2])).tolist() == [3, 4]
    assert choose(torch.zeros(6), 3).tolist() == [0, 1, 2]
