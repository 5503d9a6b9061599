"""Image tokens as a raster, and runs of a network on some of them: what sparse methods are made of.

A network that takes tokens with their positions can be run on a subset of them (`NetworkCall.subset`). Here is how the
subset is chosen and how its output becomes that of all tokens again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.token_shares import token_count

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import Stage
    from mrflow_sched.sampling.network import NetworkCall, Next

__all__ = ["Lift", "TokenGrid", "anchors", "choose", "local_variance", "on_tokens"]

_MOST_DISTANCES = 2**24
"""Distances that are held at once while nearest anchors are looked for."""


@dataclass(frozen=True)
class TokenGrid:
    """The raster of an image's tokens, row by row.

    Attributes:
        rows: Tokens from top to bottom.
        columns: Tokens from left to right.
    """

    rows: int
    columns: int

    @classmethod
    def of(cls, stage: Stage, latents: Tensor) -> TokenGrid:
        """The raster of a stage.

        Args:
            stage: Its size and number of tokens.
            latents: (B, C, h, w), of that size.

        Returns:
            The raster.

        Raises:
            MrFlowError: The stage does not consist of whole square tokens, or the latents are no images.
        """
        side = round(math.sqrt(stage.width * stage.height / stage.tokens))
        rows, columns = stage.height // side, stage.width // side
        whole = rows * columns == stage.tokens and latents.ndim == 4
        if not whole or latents.shape[-2] % rows or latents.shape[-1] % columns:
            raise MrFlowError(
                f"{stage.width}x{stage.height} is not made of whole square tokens of this model, so the network cannot "
                "be run on a share of them; choose sides that are multiples of the model's grid."
            )
        return cls(rows, columns)

    @property
    def count(self) -> int:
        """Tokens in all."""
        return self.rows * self.columns

    def fields(self, latents: Tensor) -> Tensor:
        """Latents with the values of each token in one place.

        Args:
            latents: (B, C, h, w).

        Returns:
            (B, D, rows, columns).
        """
        batch, channels, height, width = latents.shape
        down, across = height // self.rows, width // self.columns
        parts = latents.reshape(batch, channels, self.rows, down, self.columns, across)
        return parts.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, self.rows, self.columns)

    def to_latents(self, fields: Tensor, like: Tensor) -> Tensor:
        """The inverse of `fields`.

        Args:
            fields: (B, D, rows, columns).
            like: Latents of the wanted shape (C, h, w).

        Returns:
            (B, C, h, w).
        """
        channels, height, width = like.shape[-3:]
        down, across = height // self.rows, width // self.columns
        parts = fields.reshape(-1, channels, down, across, self.rows, self.columns)
        return parts.permute(0, 1, 4, 2, 5, 3).reshape(-1, channels, height, width)


# ------------------------------------------------------------------------------------------------------------- choosing


def anchors(grid: TokenGrid, share: float, generator: torch.Generator) -> Tensor:
    """Tokens that stand for all: every second one of every second row, the border, and random ones.

    Source: Just-in-Time sampling (arXiv 2603.10744), whose code draws them from global random state.

    Args:
        grid: The raster.
        share: Of its tokens; where it is less than those of the pattern, random ones are left out.
        generator: Draws them, on the CPU.

    Returns:
        (n,) rising integers.
    """
    wanted = token_count(grid.count, share)
    pattern = torch.zeros(grid.rows, grid.columns, dtype=torch.bool)
    pattern[::2, ::2] = True
    pattern[[0, -1]] = True
    pattern[:, [0, -1]] = True
    inside = pattern.flatten()
    found, rest = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
    if len(found) > wanted:
        found = found[torch.randperm(len(found), generator=generator)[:wanted]]
    else:
        found = torch.cat([found, rest[torch.randperm(len(rest), generator=generator)[: wanted - len(found)]]])
    return found.sort().values


def choose(importance: Tensor, count: int, taken: Tensor | None = None) -> Tensor:
    """The most important tokens; of equal ones the first.

    Args:
        importance: (N,), one value for each token.
        count: How many to choose.
        taken: Tokens that are not to be chosen.

    Returns:
        (count,) rising integers on the CPU.
    """
    values = importance.detach().double().cpu().clone()
    if taken is not None:
        values[taken] = -math.inf
    order = torch.argsort(values, descending=True, stable=True)
    return order[:count].sort().values


def local_variance(fields: Tensor, *, padding: Literal["replicate", "zeros"] = "replicate") -> Tensor:
    """Variance within 3x3 tokens, averaged over channels: where a field has detail.

    Args:
        fields: (B, D, rows, columns).
        padding: Of the border. The published code has "zeros", which makes a constant field vary there.

    Returns:
        (B, N), 0 and above.
    """
    state = fields.double()
    border = functional.pad(state, [1] * 4, mode="replicate" if padding == "replicate" else "constant")
    mean, square = (functional.avg_pool2d(each, 3, 1) for each in (border, border * border))
    return (square - mean * mean).clamp_min(0.0).mean(1).flatten(1)


# -------------------------------------------------------------------------------------------------------------- lifting


class Lift:
    """A field on some tokens becomes one on all: the nearest known token's value, smoothed, and exact where known.

    Source: the interpolation operator of Just-in-Time sampling (arXiv 2603.10744, equation 4): a Gaussian of
    standard deviation 0.4 / sqrt(share), from 1 to 10 tokens.
    """

    def __init__(self, grid: TokenGrid, known: Tensor) -> None:
        """Find every token's nearest known one.

        Args:
            grid: The raster.
            known: (n,) integers, at least one.
        """
        self.grid, self.known = grid, known
        self._whole = len(known) == grid.count
        if self._whole:
            return
        self._nearest = _nearest(grid, known)
        width = min(max(0.4 / math.sqrt(len(known) / grid.count), 1.0), 10.0)
        reach = math.ceil(3.0 * width)
        weights = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float64) ** 2) / (2.0 * width**2))
        self._weights = weights / weights.sum()

    def __call__(self, values: Tensor) -> Tensor:
        """Spread values over all tokens.

        Args:
            values: (B, n, D) on the known tokens, in their order.

        Returns:
            (B, N, D), in the dtype of `values`, whose rows at the known tokens are `values` themselves.
        """
        if self._whole:
            return values
        state = values if values.dtype == torch.float64 else values.float()
        spread = state.index_select(1, self._nearest.to(values.device))
        fields = spread.transpose(1, 2).reshape(len(values), -1, self.grid.rows, self.grid.columns)
        smooth = self._smoothed(fields).flatten(2).transpose(1, 2).to(values.dtype)
        return smooth.index_copy(1, self.known.to(values.device), values)

    def _smoothed(self, fields: Tensor) -> Tensor:
        weights = self._weights.to(fields)
        reach, channels = len(weights) // 2, fields.shape[1]
        for axis in (0, 1):
            along = fields.shape[2 + axis]
            pad = [0, 0, reach, reach] if axis == 0 else [reach, reach, 0, 0]
            kernel = weights.view(-1, 1) if axis == 0 else weights.view(1, -1)
            wide = functional.pad(fields, pad, mode="reflect" if along > reach else "replicate")
            fields = functional.conv2d(wide, kernel.expand(channels, 1, *kernel.shape), groups=channels)
        return fields


def _nearest(grid: TokenGrid, known: Tensor) -> Tensor:
    """For each token the place in `known` of the nearest one, of equal distances the first: (N,)."""
    row, column = known // grid.columns, known % grid.columns
    found: list[Tensor] = []
    size = max(1, _MOST_DISTANCES // len(known))
    for first in range(0, grid.count, size):
        part = torch.arange(first, min(first + size, grid.count))
        down = (part // grid.columns)[:, None] - row
        across = (part % grid.columns)[:, None] - column
        # Whole numbers with the place as the last digits: one minimum, whatever the device's idea of a tie.
        ranked = (down * down + across * across) * len(known) + torch.arange(len(known))
        found.append(ranked.argmin(1))
    return torch.cat(found)


# -------------------------------------------------------------------------------------------------------------- running


def on_tokens(
    call: NetworkCall,
    run: Next,
    grid: TokenGrid,
    tokens: Sequence[Tensor],
    spread: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Run a call on some of its image tokens, and make the output of all tokens from that.

    Args:
        call: The call.
        run: Runs one.
        grid: The raster of the image; tokens of reference images, which come after it, are always run.
        tokens: For each image of the whole batch, the tokens to run, (n,) integers.
        spread: (output, image) -> output: (rows, n, D) of an image's tokens becomes (rows, N, D).

    Returns:
        What the loop gets: (rows, N, D), with whatever the network puts before or after the image's tokens.

    Raises:
        MrFlowError: The network's tokens are not the image row by row.
    """
    _check_order(call, grid)
    images = range(call.first_image, call.first_image + call.batch)
    beyond = torch.arange(grid.count, call.latents.shape[-2])

    def one(part: NetworkCall, image: int) -> Tensor:
        kept = tokens[image]
        output = run(part.subset(torch.cat([kept, beyond])))
        before = output.shape[1] - len(kept) - len(beyond)
        own = spread(output[:, before : before + len(kept)], image)
        return torch.cat([output[:, :before], own, output[:, before + len(kept) :]], 1)

    if call.batch == 1:
        return one(call, images[0])
    # Each image has tokens of its own, so each is run by itself; its branches stay together.
    made = [one(call.of_image(number), image) for number, image in enumerate(images)]
    return torch.stack(made, 1).flatten(0, 1)


def _check_order(call: NetworkCall, grid: TokenGrid) -> None:
    """Refuse a network whose image tokens are not in rows, from the top left."""
    names = call.tokens
    positions: Tensor | None = None if names is None else call.inputs[names.positions]
    right = positions is not None and call.latents.ndim == 3 and call.latents.shape[-2] >= grid.count
    if right and positions is not None:
        each = positions if positions.ndim == 2 else positions[0]
        row, column = (each[: grid.count, axis].double().view(grid.rows, grid.columns) for axis in (1, 2))
        # 16 bits do not tell every two neighbours apart.
        rising = bool((row.diff(dim=0) >= 0).all()) and bool((column.diff(dim=1) >= 0).all())
        whole = (grid.rows == 1 or row[-1, 0] > row[0, 0]) and (grid.columns == 1 or column[0, -1] > column[0, 0])
        right = rising and bool(whole) and bool((row == row[:, :1]).all()) and bool((column == column[:1]).all())
    if not right:
        network = type(getattr(call.network, "__self__", call.network)).__name__
        raise MrFlowError(
            f"{network} does not take the tokens of an image row by row with their positions, so it cannot be run on a "
            "share of them; leave the share at 1."
        )
