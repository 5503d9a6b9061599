"""Sparse refining: how much of a dense refine step is kept, by what is chosen, its share, and sigma."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.markdown import table
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import Scene
from mrflow_sched.methods import Plain, SparseRefine
from mrflow_sched.methods.sparse_refine import clean_of, detail
from mrflow_sched.plan.make import make_plan
from mrflow_sched.sampler import sample_staged
from mrflow_sched.sampling.method import StageRun
from mrflow_sched.sampling.network import NetworkCall, Next
from mrflow_sched.sampling.tokens import TokenGrid, choose, local_variance

__all__ = ["measure", "report"]

MERGED = 2
"""Tokens a side that `Merged` makes one of."""


@dataclass(frozen=True)
class Kept(Plain):
    """Nothing is refined: the upscaled image, encoded."""

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        return super().stage(run, latents) if run.index == 0 else clean_of(run, latents)


@dataclass(frozen=True)
class Merged(SparseRefine):
    """The tokens left out are merged, 2x2 into one with its noise level restored, and seen; half of what the network
    changes in a merged token goes to its four."""

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        if run.index == 0:
            return self.inner.stage(run, latents)
        grid, clean = TokenGrid.of(run.stage, latents), clean_of(run, latents)
        tokens = choose(detail(grid, clean)[0], int(run.stage.shares[0] * grid.count))
        out = torch.ones(grid.count)
        out[tokens] = 0.0
        members = _blocks(grid, out[None, :, None])[0, :, :, 0]
        number = members.sum(1).clamp_min(1.0)
        kept = members.sum(1) > 0

        def pooled(values: Tensor) -> Tensor:
            return (_blocks(grid, values) * members[..., None]).sum(2) / number[:, None]

        generator = torch.Generator().manual_seed(run.seeds[0])

        def around(call: NetworkCall, go: Next) -> Tensor:
            x, positions, sigma = call.latents, call.inputs["img_ids"], call.sigma
            # Packed clean latents and noise of the embedded model's tokens.
            clean_tokens = functional.pixel_unshuffle(clean, 2).flatten(2).transpose(1, 2).to(x)
            small, place = pooled(x.float()), pooled(positions[None].float())[0]
            fresh = torch.randn(small.shape, generator=generator)
            small = small + sigma * (1.0 - 1.0 / number).sqrt()[:, None] * fresh
            answer = go(
                call.replace(
                    hidden_states=torch.cat([x[:, tokens], small[:, kept].to(x)], 1),
                    img_ids=torch.cat([positions[tokens], place[kept].to(positions)]),
                )
            )
            own = pooled(clean_tokens.float())
            unchanged = (small - (1.0 - sigma) * own) / sigma - own
            moved = torch.zeros_like(small)
            moved[:, kept] = (answer[:, len(tokens) :] - unchanged[:, kept]).float()
            wide = moved.unflatten(1, (grid.rows // MERGED, grid.columns // MERGED))
            wide = wide.repeat_interleave(MERGED, 1).repeat_interleave(MERGED, 2).flatten(1, 2)
            every = (x - clean_tokens) / sigma + 0.5 * wide.to(x)
            return every.index_copy(1, tokens, answer[:, : len(tokens)].to(every))

        return run.sample(latents, around=around)


def _blocks(grid: TokenGrid, values: Tensor) -> Tensor:
    """(B, N, D) -> (B, blocks, tokens of each, D)."""
    raster = values.unflatten(1, (grid.rows // MERGED, MERGED, grid.columns // MERGED, MERGED))
    return raster.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _random(grid: TokenGrid, clean: Tensor) -> Tensor:
    return torch.rand(len(clean), grid.count, generator=torch.Generator().manual_seed(0))


def _variance(grid: TokenGrid, clean: Tensor) -> Tensor:
    return local_variance(grid.fields(clean))


def ways(oracle: Tensor) -> dict[str, tuple[Any, float]]:
    """Name of a row -> its method and its share of context tokens.

    `oracle` is what a dense step changes, (B, C, h, w).
    """

    def known(grid: TokenGrid, _: Tensor) -> Tensor:
        return grid.fields(oracle).square().mean(1).flatten(1)

    return {
        "random (known bad)": (SparseRefine(importance=_random), 0.0),
        "3x3 variance": (SparseRefine(importance=_variance), 0.0),
        "detail": (SparseRefine(), 0.0),
        "detail, hard borders": (SparseRefine(feather=0.0), 0.0),
        "detail, 10 % context": (SparseRefine(), 0.1),
        "what dense changes, hard borders (ceiling)": (SparseRefine(feather=0.0, importance=known), 0.0),
        "detail, the rest merged 2x2": (Merged(), 0.0),
    }


def measure(
    engine: Any, upscaler: Any, scenes: Sequence[Scene], first_seed: int, size: int, sigmas: Sequence[float]
) -> list[dict[str, Any]]:
    """The rows: one for each way, sigma and share."""
    lost: dict[tuple[str, float, float], list[float]] = {}
    costs: dict[tuple[str, float], float] = {}
    nothing: dict[float, float] = dict.fromkeys(sigmas, 0.0)
    for index, scene in enumerate(scenes):
        words, seed = caption(scene), first_seed + index
        first = sample_staged(engine, make_plan("demo", size, size, seed=seed), words, until=1).latents
        for sigma in sigmas:

            def run(method: Any, words: str = words, seed: int = seed, first: Any = first, **options: Any) -> Any:
                plan = make_plan("demo", size, size, seed=seed, **options)
                result = sample_staged(engine, plan, words, latents=first, upscaler=upscaler, method=method)
                return result.images, result.latents

            whole, refined = run(Plain(), sigma=sigma)
            kept, encoded = run(Kept(), sigma=sigma)
            nothing[sigma] += float((kept - whole).square().sum())
            for name, (method, beside) in ways(refined - encoded).items():
                for share in (0.25, 0.5, 0.6, 0.75):
                    made, _ = run(method, sigma=sigma, refine_tokens=share, refine_context=beside)
                    lost.setdefault((name, sigma, share), []).append(float((made - whole).square().sum()))
                    costs[(name, share)] = cost_of(method, share, beside, size)
    rows: list[dict[str, Any]] = []
    for (name, sigma, share), each in lost.items():
        row = {"way": name, "sigma": sigma, "share": share, "kept": 1.0 - sum(each) / nothing[sigma]}
        rows.append({**row, "cost": costs[(name, share)]})
    return rows


def cost_of(method: Any, share: float, beside: float, size: int) -> float:
    """FLOP of the network in the refine step over those of a dense one."""
    more = (1.0 - share) / MERGED**2 if isinstance(method, Merged) else beside
    return make_plan("demo", size, size, refine_tokens=share, refine_context=more).stage_costs()[1]


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each way and sigma, a column for each share: what is kept, and the cost of the step."""
    shares = sorted({row["share"] for row in rows})
    lines: list[list[object]] = []
    for sigma in sorted({row["sigma"] for row in rows}):
        for name in dict.fromkeys(row["way"] for row in rows):
            found = {row["share"]: row for row in rows if row["way"] == name and row["sigma"] == sigma}
            lines.append(
                [name, sigma, *(f"{found[share]['kept']:.2f} ({found[share]['cost']:.2f})" for share in shares)]
            )
    return table(["chosen by", "sigma", *(f"share {share:g}" for share in shares)], lines, "lr")
