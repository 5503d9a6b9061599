"""An experiment: the chain's other use, a picture moved or bent in place of shrunk (arXiv 2604.09227, last section).

D may be any linear map with D D^T = I. A translation (around the edges) is one. A warp is none, as interpolation makes
noise weak and smooth; its noise is whitened again: with the interpolation A of every row of latents, D = U V^T of
A = U S V^T. All at 128 px: 30 Euler steps, D after a third of them, and the plain run's picture, moved, as the aim.

Each D acts in one of two places, as with the downsamplers: on the state (latents), or on the clean estimate as a
picture, with D of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.markdown import table
from bench.previews.previews import interval
from bench.previews.runs import GUIDANCE, GUIDED, OFF, SMALL, SWITCH, in_parts, kept, prompts_of
from mrflow_sched import demo
from mrflow_sched.measure.metrics import paired_t, psnr
from mrflow_sched.methods.previews import Head, Switched, euler_tail, in_pixels
from mrflow_sched.sampling.noise import draw_noise
from mrflow_sched.sampling.solvers import sample_euler

SIGMAS = SMALL.stages[0].sigmas
ROWS = ("noise alone", "latents", "latents + guidance", "picture", "picture + guidance", "not moved")


@dataclass(frozen=True)
class Motion:
    """How far each row of a picture is moved to the right, around the edge, as a share of the width."""

    name: str
    shares: Callable[[int], list[float]]

    def moved(self, x: Tensor) -> Tensor:
        """`x` (B, C, H, W) with its rows moved, interpolated between two neighbours."""
        return torch.einsum("bchw,hvw->bchv", x, self._rows(x).to(x))

    def white(self, x: Tensor) -> Tensor:
        """The same on noise, whitened again: D D^T = I."""
        maps = torch.stack([_whitened(each) for each in self._rows(x)])
        return torch.einsum("bchw,hvw->bchv", x, maps.to(x))

    def _rows(self, x: Tensor) -> Tensor:
        """The interpolation of each row, (H, W, W)."""
        height, width = x.shape[-2:]
        unit = torch.eye(width, dtype=torch.float64)
        found: list[Tensor] = []
        for share in self.shares(height):
            whole, part = divmod(share * width, 1.0)
            found.append((1 - part) * unit.roll(int(whole), 0) + part * unit.roll(int(whole) + 1, 0))
        return torch.stack(found)


def _whitened(mean: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(mean)
    return left @ right


MOTIONS = (
    Motion("a quarter to the right", lambda rows: [0.25] * rows),
    Motion("one latent (4 px) to the right", lambda rows: [1 / 32] * rows),
    Motion("a wave of 8 px", lambda rows: [math.sin(2 * math.pi * (row + 0.5) / rows) / 16 for row in range(rows)]),
)
"""A translation by whole tokens of the network, one by half a token, and a warp."""


@torch.no_grad()
def section(*, prompts: int, seeds: int, folder: Path) -> str:
    """The section on moved and bent pictures.

    Args:
        prompts: How many.
        seeds: Seeds of each.
        folder: Where what was measured is kept.

    Returns:
        Markdown.
    """
    texts, engine = prompts_of(prompts), cache(lambda: demo.load_engine(device="cpu"))

    def part(some: list[str], numbers: list[int], first: int) -> dict[str, Tensor]:
        del first
        asked = ["1", some, numbers, SMALL.to_string()]
        return kept(folder, "warps", asked, lambda: _part(engine(), some, numbers))

    values = in_parts(texts, seeds, part)
    lines: list[list[str]] = []
    for motion in MOTIONS:
        means = {row: values[f"{motion.name}: {row}"].double().reshape(seeds, -1).mean(0) for row in ROWS}
        for row in ROWS:
            low, high = interval(means[row])
            base = row.removesuffix(" + guidance")
            gain = "" if base == row else f"{paired_t(means[row] - means[base]):.1f}"
            lines.append([motion.name, row, f"{float(means[row].mean()):.2f}", f"{low:.2f} to {high:.2f}", gain])
    return "\n\n".join(
        [
            f"An experiment on {len(texts)} prompts x {seeds} seeds at 128 px: PSNR to the plain run's picture, moved. "
            "*noise alone*: D of the noise from the first step on. *latents*: D of the state after 10 of 30 steps. "
            "*picture*: D of the clean estimate, decoded, and of the noise. *not moved*: the picture itself.",
            table(["motion", "D acts on", "PSNR", "95 %", "t of guidance"], lines, "llrrr"),
        ]
    )


def _part(engine: Any, prompts: list[str], seeds: list[int]) -> dict[str, Tensor]:
    """PSNR of each image by motion and row."""
    text = engine.encode_text(prompts)
    heads: list[Head] = []

    def estimate(x: Tensor, sigma: Tensor) -> Tensor:
        return engine.denoise(x, sigma, text, guidance=GUIDANCE)

    def keep(step: dict[str, Any]) -> None:
        if int(step["i"]) == SWITCH:
            velocity = (step["x"] - step["denoised"]) / SIGMAS[SWITCH]
            heads.append(Head(step["x"], velocity, noise, SIGMAS[SWITCH:]))

    noise = draw_noise(engine.latent_shape(SMALL.width, SMALL.height), seeds)
    plain = engine.decode(sample_euler(estimate, noise, SIGMAS, callback=keep))
    head = heads[0]
    found: dict[str, Tensor] = {}
    for motion in MOTIONS:
        aim, white = motion.moved(plain), motion.white(noise)
        clean, gone = motion.moved(head.clean), motion.white(head.noise_estimate)
        sigma = SIGMAS[SWITCH]
        latents = Switched((1 - sigma) * clean + sigma * gone, gone - clean, head.sigmas)

        def by_picture(each: Tensor, motion: Motion = motion) -> Tensor:
            return engine.encode(motion.moved(engine.decode(each)))

        pictures = in_pixels(head, by_picture, white)
        ends = {
            "noise alone": sample_euler(estimate, white, SIGMAS),
            "latents": euler_tail(estimate, latents, OFF),
            "latents + guidance": euler_tail(estimate, latents, GUIDED),
            "picture": euler_tail(estimate, pictures, OFF),
            "picture + guidance": euler_tail(estimate, pictures, GUIDED),
        }
        for name, end in ends.items():
            found[f"{motion.name}: {name}"] = psnr(engine.decode(end), aim)
        found[f"{motion.name}: not moved"] = psnr(plain, aim)
    return found
