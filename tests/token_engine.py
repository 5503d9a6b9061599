"""A stand-in engine whose network takes tokens with their positions: for methods that run it on some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mrflow_sched.plan.families import get_family
from mrflow_sched.sampling.engine import Capabilities
from mrflow_sched.sampling.network import NetworkCall, TokenInputs

CHANNELS, PIXELS = 2, 8  # of the latents; FLUX's grid is 16 pixels, so a token is 2x2 latents

Network = Callable[[Tensor, Tensor, float], Tensor]
"""(tokens (B, n, C), positions (n, 3), sigma) -> velocity (B, n, C)."""


@dataclass
class TokenEngine:
    """Walks Euler steps by its own loop and calls `network` on packed tokens; VAE and text do nothing."""

    network: Network
    doubled: bool = False  # every call holds two branches in one batch
    one_by_one: bool = False  # images of a batch are run alone, as where memory is short
    seen: list[int] = field(default_factory=list)  # tokens of each call
    capabilities: Capabilities = field(
        default_factory=lambda: Capabilities(whole_stages=True, network_seam=True, token_subsets=True)
    )
    family: Any = field(default_factory=lambda: get_family("flux1-dev"))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def encode_text(self, prompts: Sequence[str], negative_prompts: Any = None) -> Any:
        return list(prompts)

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        return CHANNELS, height // PIXELS, width // PIXELS

    def denoise(self, x: Tensor, sigma: Tensor, text: Any, *, guidance: float) -> Tensor:
        raise AssertionError("this engine runs whole stages")

    def encode(self, images: Tensor, *, posterior: str = "mode", seeds: Any = None) -> Tensor:
        return torch.nn.functional.avg_pool2d(images[:, :CHANNELS], PIXELS) * 4.0 - 2.0

    def decode(self, latents: Tensor) -> Tensor:
        one = latents.mean(1, keepdim=True).repeat_interleave(PIXELS, 2).repeat_interleave(PIXELS, 3)
        return (one * 0.25 + 0.5).clamp(0, 1).repeat(1, 3, 1, 1)

    def sample_stage(
        self,
        solver: str,
        latents: Tensor,
        sigmas: Sequence[float],
        text: Any,
        *,
        guidance: Any,
        progress: Any = None,
        callback: Any = None,
        around: Any = None,
    ) -> Tensor:
        if self.one_by_one and len(latents) > 1:
            each = [self._walk(latents[k : k + 1], sigmas, callback, around, k) for k in range(len(latents))]
            return torch.cat(each)
        return self._walk(latents, sigmas, callback, around, 0)

    def _walk(self, x: Tensor, sigmas: Sequence[float], callback: Any, around: Any, first: int) -> Tensor:
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        place = torch.arange(rows * columns)
        positions = torch.stack([torch.zeros(rows * columns), place // columns, place % columns], 1)
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            tokens = pack(x).repeat(1 + self.doubled, 1, 1)
            call = NetworkCall(
                inputs={"hidden_states": tokens, "img_ids": positions},
                sigma=sigma,
                step=step,
                branch="both" if self.doubled else "only",
                batch=len(x),
                latents_name="hidden_states",
                tokens=TokenInputs("hidden_states", "img_ids"),
                network=lambda hidden_states, img_ids, sigma=sigma: self._run(hidden_states, img_ids, sigma),
                first_image=first,
            )
            velocity = call.run() if around is None else around(call, NetworkCall.run)
            velocity = unpack(velocity[: len(x)], rows, columns)
            if callback is not None:
                callback({"i": step, "sigma": sigma, "x": x, "denoised": x - sigma * velocity, "images": len(x)})
            x = x + (following - sigma) * velocity
        return x

    def _run(self, hidden_states: Tensor, img_ids: Tensor, sigma: float) -> Tensor:
        self.seen.append(hidden_states.shape[1])
        return self.network(hidden_states, img_ids, sigma)


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 w/2, 4 C)."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), 2)
