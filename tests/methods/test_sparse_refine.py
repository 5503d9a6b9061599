"""Sparse refining on a stand-in network of tokens: what is refined, what stays, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from token_engine import TokenEngine
from torch import Tensor

from mrflow_sched import MrFlowError
from mrflow_sched.methods import Plain, SparseRefine
from mrflow_sched.methods.sparse_refine import clean_of, context, detail
from mrflow_sched.plan.make import make_plan
from mrflow_sched.sampler import sample_staged
from mrflow_sched.sampling.engine import Capabilities
from mrflow_sched.sampling.tokens import TokenGrid

GRID = TokenGrid(16, 16)


def _attending(tokens: Tensor, positions: Tensor, sigma: float) -> Tensor:
    weights = (tokens @ tokens.transpose(1, 2) / 8.0).softmax(-1)
    return tokens - torch.tanh(weights @ tokens)


def _refined(engine: TokenEngine, method: Any = None, *, seeds: tuple[int, ...] = (3,), **options: Any) -> Tensor:
    plan = make_plan("flux1-dev", 256, 256, low_steps=2, **options)
    found = sample_staged(engine, plan, ["a"] * len(seeds), seeds=list(seeds), method=method).latents
    assert found is not None
    return found


def _kept() -> Tensor:
    """What is encoded for the last stage, without noise."""

    class Nothing(SparseRefine):
        def stage(self, run: Any, latents: Tensor) -> Tensor:
            return self.inner.stage(run, latents) if run.index == 0 else clean_of(run, latents)

    return _refined(TokenEngine(_attending), Nothing())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_is_refined_and_the_rest_stays_as_it_was_encoded(share: float) -> None:
    engine = TokenEngine(_attending)
    found, kept = _refined(engine, refine_tokens=share, sigma=0.4), _kept()
    assert engine.seen[-1] == int(share * 256)
    moved = GRID.fields((found - kept).abs()).amax(1).flatten()
    chosen = detail(GRID, kept)[0].topk(int(share * 256)).indices
    outside = torch.ones(256, dtype=torch.bool)
    outside[chosen] = False
    assert float(moved[outside].max()) <= 1e-6
    assert float(moved[chosen].mean()) > 1e-3


def test_all_tokens_are_the_dense_run_bit_for_bit() -> None:
    dense = _refined(TokenEngine(_attending))
    assert torch.equal(_refined(TokenEngine(_attending), SparseRefine(), refine_tokens=1.0), dense)
    plan = make_plan("flux1-dev", 256, 256, low_steps=2)
    forced = replace(plan, stages=(plan.stages[0], replace(plan.stages[1], shares=(0.9999,))))
    whole = sample_staged(TokenEngine(_attending), forced, "a", seeds=[3], method=SparseRefine(mask=np.ones((4, 4))))
    assert whole.latents is not None
    assert torch.equal(whole.latents, dense)


def test_a_pointwise_network_gives_inside_what_the_dense_run_gives() -> None:
    def pointwise(tokens: Tensor, positions: Tensor, sigma: float) -> Tensor:
        return tokens - torch.tanh(tokens * 0.5 + 0.3)

    dense = _refined(TokenEngine(pointwise), refine_steps=3, sigma=0.5)
    sparse = _refined(TokenEngine(pointwise), SparseRefine(feather=0.0), refine_steps=3, sigma=0.5, refine_tokens=0.4)
    same = (GRID.fields(sparse) == GRID.fields(dense)).all(1).flatten()
    assert int(same.sum()) == int(0.4 * 256)


def test_borders_are_blended_within_the_refined_tokens() -> None:
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:12, 4:12] = 1.0
    hard = _refined(TokenEngine(_attending), SparseRefine(mask=mask, feather=0.0), sigma=0.4)
    soft = _refined(TokenEngine(_attending), SparseRefine(mask=mask), sigma=0.4)
    kept = _kept()
    whole, part = (hard - kept)[0, 0], (soft - kept)[0, 0]
    ratio = (part / whole)[8:24, 8:24]  # 2x2 latents a token
    assert torch.allclose(ratio[1:-1, 1:-1], torch.ones(14, 14), atol=1e-3)
    assert torch.allclose(ratio[0], torch.full((16,), 0.5), atol=1e-3)
    assert float(part[:8].abs().max()) < 1e-6
    assert float(part[:, 24:].abs().max()) < 1e-6


def test_context_is_seen_and_not_refined() -> None:
    engine = TokenEngine(_attending)
    found = _refined(engine, refine_tokens=0.25, refine_context=0.1, sigma=0.4)
    beside = context(GRID, 0.1)
    assert 16 <= len(beside) <= 25
    assert 64 < engine.seen[-1] <= 64 + len(beside)
    moved = GRID.fields((found - _kept()).abs()).amax(1).flatten()
    assert int((moved > 1e-6).sum()) == 64
    assert len(context(GRID, 0.0)) == 0


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), ((0, 24), (0, 24)))),
        np.pad(np.ones((64, 64), np.float32), ((0, 192), (0, 192))),
        torch.nn.functional.pad(torch.ones(1, 4, 4), (0, 12, 0, 12)),
    ],
    ids=["picture", "array", "tensor"],
)
def test_masks_of_any_size_and_kind(mask: Any) -> None:
    engine = TokenEngine(_attending)
    found = _refined(engine, SparseRefine(mask=mask), sigma=0.4)
    moved = GRID.fields((found - _kept()).abs()).amax(1).view(16, 16) > 1e-6
    assert engine.seen[-1] == 16
    assert bool(moved[:4, :4].all())
    assert int(moved.sum()) == 16


def test_a_black_mask_is_refused() -> None:
    with pytest.raises(MrFlowError, match="mask is black throughout"):
        _refined(TokenEngine(_attending), SparseRefine(mask=np.zeros((4, 4))))


@pytest.mark.parametrize("doubled", [False, True])
def test_a_batch_is_its_images_alone(doubled: bool) -> None:
    options: dict[str, Any] = {"refine_tokens": 0.3, "refine_context": 0.1, "sigma": 0.4}
    alone = torch.cat([_refined(TokenEngine(_attending), seeds=(seed,), **options) for seed in (3, 4)])
    for engine in (TokenEngine(_attending, doubled=doubled), TokenEngine(_attending, one_by_one=True)):
        torch.testing.assert_close(_refined(engine, seeds=(3, 4), **options), alone, atol=1e-6, rtol=0)


def test_networks_without_positions_are_refused() -> None:
    engine = TokenEngine(_attending, capabilities=Capabilities(whole_stages=True))
    with pytest.raises(MrFlowError, match="leave refine_tokens at 1"):
        _refined(engine, refine_tokens=0.5)


def test_the_plain_method_is_left_alone_by_default() -> None:
    assert torch.equal(_refined(TokenEngine(_attending)), _refined(TokenEngine(_attending), Plain()))
