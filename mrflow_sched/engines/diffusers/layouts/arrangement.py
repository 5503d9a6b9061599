"""How a pipeline's loop arranges latents, found by comparing a state with what its VAE is then given to decode."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Arrangement", "Map", "find_map"]

_PATCHES = (1, 2, 4, 8)
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Arrangement:
    """Latents as patches of p x p latent pixels.

    Attributes:
        kind: "tokens" (B, N, D), "first" (B, D, rows, columns) or "last" (B, rows, columns, D), D = C * p * p.
        patch: p.
        order: How channel (0), row (1) and column (2) within a patch stand in D, the slowest first.
        frame: Where an axis of one video frame stands; None where there is none.
    """

    kind: Literal["tokens", "first", "last"]
    patch: int = 1
    order: tuple[int, int, int] = (0, 1, 2)
    frame: int | None = None

    def pack(self, latents: Tensor) -> Tensor:
        """Latents as the loop holds them.

        Args:
            latents: (B, C, h, w), h and w multiples of the patch.

        Returns:
            The same values in the loop's shape.
        """
        batch, channels, height, width = latents.shape
        p, rows, columns = self.patch, height // self.patch, width // self.patch
        patches = latents.reshape(batch, channels, rows, p, columns, p)
        features = patches.permute(0, 2, 4, *((1, 3, 5)[axis] for axis in self.order)).reshape(batch, rows, columns, -1)
        if self.kind == "tokens":
            return features.flatten(1, 2)
        made = features.permute(0, 3, 1, 2) if self.kind == "first" else features
        return made if self.frame is None else made.unsqueeze(self.frame)

    def unpack(self, state: Tensor, height: int, width: int) -> Tensor:
        """Inverse of `pack`.

        Args:
            state: What `pack` returned.
            height: h.
            width: w.

        Returns:
            (B, C, h, w).
        """
        p, rows, columns = self.patch, height // self.patch, width // self.patch
        plain = state if self.frame is None else state.squeeze(self.frame)
        features = plain.permute(0, 2, 3, 1) if self.kind == "first" else plain
        inner = (features.shape[-1] // p**2, p, p)
        patches = features.reshape(len(state), rows, columns, *(inner[axis] for axis in self.order))
        back = tuple(3 + self.order.index(axis) for axis in range(3))
        return patches.permute(0, back[0], 1, back[1], 2, back[2]).reshape(len(state), -1, height, width)


@dataclass(frozen=True)
class Map:
    """What stands between a pipeline's state and the latents that its VAE decodes: scale * state + shift.

    Attributes:
        arrangement: Of the state.
        scale: (C, p, p), for each channel and place in a patch.
        shift: (C, p, p).
    """

    arrangement: Arrangement
    scale: Tensor
    shift: Tensor

    def normalise(self, latents: Tensor) -> Tensor:
        """The VAE's latents at the scale of the state.

        Args:
            latents: (B, C, h, w).

        Returns:
            In the same shape.
        """
        scale, shift = self._over(latents)
        return (latents - shift) / scale

    def denormalise(self, latents: Tensor) -> Tensor:
        """Inverse of `normalise`.

        Args:
            latents: (B, C, h, w).

        Returns:
            In the same shape.
        """
        scale, shift = self._over(latents)
        return latents * scale + shift

    def agrees(self, other: Map) -> bool:
        """Whether another image size showed the same map.

        Args:
            other: Found there.

        Returns:
            True where they are one to rounding.
        """
        alike = (
            torch.allclose(self.scale, other.scale, 1e-3, 1e-5),
            torch.allclose(self.shift, other.shift, 1e-3, 1e-3),
        )
        return self.arrangement == other.arrangement and all(alike)

    def _over(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift for every latent pixel."""
        times = (1, latents.shape[-2] // self.arrangement.patch, latents.shape[-1] // self.arrangement.patch)
        return self.scale.to(latents).repeat(times), self.shift.to(latents).repeat(times)


def find_map(state: Tensor, latents: Tensor) -> Map | None:
    """The map from a state to the latents that a pipeline made of it.

    Args:
        state: Random values in the shape of the loop's state, for one image.
        latents: (1, C, h, w), what the VAE was given for it.

    Returns:
        The map; None where none of those known here fits.
    """
    _, channels, height, width = latents.shape
    for arrangement in _candidates(state.shape, channels, height, width):
        found = _fitted(arrangement, arrangement.unpack(state, height, width)[0].double(), latents[0].double())
        if found is not None:
            return found
    return None


def _candidates(shape: Sequence[int], channels: int, height: int, width: int) -> Iterator[Arrangement]:
    for p in _PATCHES:
        if height % p or width % p:
            continue
        features, rows, columns = channels * p * p, height // p, width // p
        orders = list(itertools.permutations(range(3))) if p > 1 else [(0, 1, 2)]
        kinds: dict[Literal["tokens", "first", "last"], tuple[int, ...]] = {
            "tokens": (1, rows * columns, features),
            "first": (1, features, rows, columns),
            "last": (1, rows, columns, features),
        }
        for kind, wanted in kinds.items():
            frames = [None] if kind == "tokens" else [None, 1, 2]
            for frame, order in itertools.product(frames, orders):
                held = wanted if frame is None else (*wanted[:frame], 1, *wanted[frame:])
                if tuple(shape) == held:
                    yield Arrangement(kind, p, (order[0], order[1], order[2]), frame)


def _fitted(arrangement: Arrangement, given: Tensor, seen: Tensor) -> Map | None:
    """Scale and shift by least squares for each channel and place in a patch; None where they do not explain `seen`."""
    x, y = (_by_place(each, arrangement.patch) for each in (given, seen))
    mean_x, mean_y = x.mean(-1, keepdim=True), y.mean(-1, keepdim=True)
    scale = ((x - mean_x) * (y - mean_y)).sum(-1, keepdim=True) / (x - mean_x).square().sum(-1, keepdim=True)
    shift = mean_y - scale * mean_x
    explained = (scale * x + shift - y).abs().max() <= _TOLERANCE * y.abs().max().clamp(min=1e-6)
    if not bool(explained) or not bool((scale.abs() > 1e-9).all()):
        return None
    return Map(arrangement, scale[..., 0].float(), shift[..., 0].float())


def _by_place(latents: Tensor, p: int) -> Tensor:
    """(C, h, w) -> (C, p, p, patches): all values of a channel at one place in a patch along the last dimension."""
    channels, height, width = latents.shape
    patches = latents.reshape(channels, height // p, p, width // p, p)
    return patches.permute(0, 2, 4, 1, 3).reshape(channels, p, p, -1)
