"""Sparse refining: later stages run the network on the tokens that have most to gain; the rest stays as it was encoded.

After the token selection of Just-in-Time sampling (arXiv 2603.10744), with what a staged run knows besides: the clean
latents of the upscaled image, which is what a token keeps that is not refined. docs/sparse.md has what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.images.convert import from_pictures
from mrflow_sched.plan.token_shares import token_count
from mrflow_sched.sampling.engine import capabilities_of
from mrflow_sched.sampling.handoff import stage_noise
from mrflow_sched.sampling.method import Wrapper
from mrflow_sched.sampling.tokens import TokenGrid, choose, on_tokens

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.sampling.method import StageRun

__all__ = ["SparseRefine", "check_refine_mask", "clean_of", "context", "detail"]


@dataclass(frozen=True)
class SparseRefine(Wrapper):
    """Refine a share of the tokens in later stages whose plan has `shares`; every other stage is left to `inner`.

    `inner` must add the noise of `sampling.handoff`, as `Plain` does: it is taken off again to know what was encoded.

    Attributes:
        feather: Over what part of a token, 0 to 1, refined and kept latents are blended at the border between them.
        mask: Where to refine: a PIL image, array or tensor of any size, stretched over the image; tokens are refined
            that hold anything lighter than middle grey. None: where `importance` is greatest.
        importance: (raster, clean latents (B, C, h, w)) -> (B, N): how much each token has to gain.
    """

    mask: Any = None
    feather: float = 0.5
    importance: Callable[[TokenGrid, Tensor], Tensor] = field(default_factory=lambda: detail)

    def start(self, run: StageRun, image: Tensor | None) -> Tensor:
        """Start as the inner method does, where the later stages can be refined in part.

        Args:
            run: The first stage.
            image: (B, 3, H, W), float32 in [0, 1]; None for pure noise.

        Returns:
            Latents (B, *latent_shape), float32, at the stage's first sigma.

        Raises:
            MrFlowError: The engine cannot run its network on some of the tokens.
        """
        _check_engine(run)
        return self.inner.start(run, image)

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        """Refine some tokens of a stage.

        Args:
            run: The stage.
            latents: (B, C, h, w), float32, at its first sigma.

        Returns:
            Clean latents in the shape of `latents`, float32: outside the chosen tokens those that were encoded.

        Raises:
            MrFlowError: The engine cannot run its network on some of the tokens.
        """
        stage = run.stage
        if run.index == 0 or not stage.sigmas or (self.mask is None and not stage.shares):
            return self.inner.stage(run, latents)
        _check_engine(run)
        grid = TokenGrid.of(stage, latents)
        clean = clean_of(run, latents)
        chosen = self._chosen(run, grid, clean)
        if all(len(tokens) == grid.count for tokens in chosen):
            return self.inner.stage(run, latents)
        beside = context(grid, run.plan.context)
        seen = [torch.cat([tokens, beside[~torch.isin(beside, tokens)]]).sort().values for tokens in chosen]

        def spread(output: Tensor, image: int) -> Tensor:
            every = output.new_zeros(len(output), grid.count, output.shape[-1])
            return every.index_copy(1, seen[image].to(output.device), output)

        refined = run.sample(latents, around=lambda call, go: on_tokens(call, go, grid, seen, spread))
        weight = torch.stack([_weight(grid, tokens, latents, self.feather) for tokens in chosen])
        blended = torch.where(weight < 1.0, clean + weight * (refined - clean), refined)
        return torch.where(weight > 0.0, blended, clean)

    def _chosen(self, run: StageRun, grid: TokenGrid, clean: Tensor) -> list[Tensor]:
        """The tokens to refine, for each image."""
        if self.mask is not None:
            tokens = (_lightest(self.mask, grid) > 0.5).nonzero()[:, 0]
            if not len(tokens):
                raise MrFlowError("mask is black throughout, so nothing would be refined; make white what to refine.")
            return [tokens] * len(clean)
        count = token_count(grid.count, run.stage.shares[0])
        return [choose(values, count) for values in self.importance(grid, clean)]


def check_refine_mask(plan: StagedPlan) -> None:
    """Refuse a plan with which a mask of what to refine has no meaning.

    Args:
        plan: The plan.

    Raises:
        MrFlowError: It refines nothing, refines in tiles, or chooses tokens by itself.
    """
    if not any(stage.sigmas for stage in plan.stages[1:]):
        raise MrFlowError("refine_mask says where to refine, and this run refines nothing; leave it out.")
    if plan.tile:
        raise MrFlowError(f"refine_mask does not go with tile={plan.tile}; leave one of the two out.")
    if any(stage.shares for stage in plan.stages[1:]):
        raise MrFlowError("refine_mask says where to refine, and so does refine_tokens; leave one of the two out.")


def _check_engine(run: StageRun) -> None:
    family = run.engine.family
    if family.prediction != "flow" or not capabilities_of(run.engine).token_subsets:
        raise MrFlowError(
            "refining a share of the tokens needs a network that takes tokens with their positions; that of "
            f"{family.title} does not: leave refine_tokens at 1, and refine_mask out."
        )


def detail(grid: TokenGrid, latents: Tensor) -> Tensor:
    """How much detail each token holds: what latents lose when they are shrunk to half and enlarged again.

    Args:
        grid: The raster.
        latents: Clean latents (B, C, h, w).

    Returns:
        (B, N), mean absolute loss.
    """
    half = functional.avg_pool2d(latents.float(), 2, ceil_mode=True)
    smooth = functional.interpolate(half, latents.shape[-2:], mode="bilinear", align_corners=False)
    return grid.fields((latents - smooth).abs()).mean(1).flatten(1)


def context(grid: TokenGrid, share: float) -> Tensor:
    """Tokens spread evenly over an image.

    Args:
        grid: The raster.
        share: Of its tokens, at most; 0 for none.

    Returns:
        (n,) rising integers.
    """
    if share <= 0.0:
        return torch.arange(0)
    step = max(1, math.ceil(math.sqrt(1.0 / share) - 1e-9))
    rows, columns = (torch.arange(min(step // 2, side - 1), side, step) for side in (grid.rows, grid.columns))
    return (rows[:, None] * grid.columns + columns).flatten()


def clean_of(run: StageRun, latents: Tensor) -> Tensor:
    """The latents before the handoff added noise.

    Args:
        run: A later stage of a flow model.
        latents: Where it starts, (B, *latent_shape), float32.

    Returns:
        What was encoded, to the rounding of float32, in the shape of `latents`.
    """
    noise = stage_noise(latents.shape[1:], run.plan.posterior, run.seeds, device=latents.device)
    sigma = run.stage.start_sigma
    return (latents - sigma * noise) / (1.0 - sigma)


def _weight(grid: TokenGrid, tokens: Tensor, latents: Tensor, feather: float) -> Tensor:
    """How much of the refined latents counts, (1, h, w).

    0 outside the tokens; inside it rises from their edge to 1 over `feather` of a token.
    """
    inside = torch.zeros(grid.count, device=latents.device)
    inside[tokens.to(latents.device)] = 1.0
    down, across = latents.shape[-2] // grid.rows, latents.shape[-1] // grid.columns
    mask = inside.view(1, 1, grid.rows, grid.columns)
    mask = mask.repeat_interleave(down, 2).repeat_interleave(across, 3)
    if feather <= 0.0:
        return mask[0]
    weight = mask
    for ring in range(max(down, across)):
        # What lies at most `ring` latents from the edge counts as far as it is from there.
        size = 2 * ring + 3
        padded = functional.pad(mask, [ring + 1] * 4, mode="replicate")
        eroded = -functional.max_pool2d(-padded, size, 1)
        level = min(1.0, (ring + 0.5) / (feather * max(down, across)))
        weight = torch.minimum(weight, torch.where(eroded > 0.0, mask, mask * level))
    return weight[0]


def _lightest(mask: Any, grid: TokenGrid) -> Tensor:
    """The largest value of a mask in each token: (N,)."""
    values = from_pictures(mask)
    grey = values[:1, :3].mean(1, keepdim=True)
    least = (max(grid.rows, grey.shape[-2]), max(grid.columns, grey.shape[-1]))
    grey = functional.interpolate(grey, least, mode="nearest")
    return functional.adaptive_max_pool2d(grey, (grid.rows, grid.columns)).flatten()
