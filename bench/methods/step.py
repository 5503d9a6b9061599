"""Seconds of a network call by its share of the tokens, at the proportions of FLUX.1 and random weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.markdown import table

__all__ = ["measure", "report"]

TEXT, SIDE = 512, 64  # tokens of the text, and of the image a side


def measure(shares: Sequence[float] = (1.0, 0.75, 0.62, 0.5, 0.35, 0.25), repeats: int = 2) -> list[dict[str, Any]]:
    """One double and two single blocks of FLUX.1's width (it has 19 and 38), 4,096 image tokens at most."""
    from diffusers import FluxTransformer2DModel

    kind: Any = FluxTransformer2DModel
    torch.manual_seed(0)
    with torch.no_grad():
        network = kind(num_layers=1, num_single_layers=2, guidance_embeds=True).to(torch.bfloat16).eval()
        every = torch.arange(SIDE * SIDE)
        positions = torch.stack([torch.zeros_like(every), every // SIDE, every % SIDE], 1)
        rows: list[dict[str, Any]] = []
        for share in shares:
            tokens = every[torch.randperm(len(every))[: int(share * len(every))]].sort().values
            inputs: dict[str, Any] = {
                "hidden_states": torch.randn(1, len(tokens), 64, dtype=torch.bfloat16),
                "img_ids": positions[tokens],
                "encoder_hidden_states": torch.randn(1, TEXT, 4096, dtype=torch.bfloat16),
                "txt_ids": torch.zeros(TEXT, 3),
                "pooled_projections": torch.randn(1, 768, dtype=torch.bfloat16),
                "timestep": torch.tensor([0.12]),
                "guidance": torch.tensor([3.5]),
            }
            spent: list[float] = []
            for _ in range(repeats):
                begin = time.process_time()
                network(**inputs)
                spent.append(time.process_time() - begin)
            rows.append({"share": share, "seconds": min(spent)})
    return rows


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    whole = rows[0]["seconds"]
    return table(
        ["share of 4,096 tokens", "CPU s of three blocks", "of a dense call"],
        [[f"{row['share']:g}", f"{row['seconds']:.1f}", f"{row['seconds'] / whole:.2f}"] for row in rows],
        "r",
    )
