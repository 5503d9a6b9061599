"""Seconds of a network call by its share of the tokens, at the proportions of FLUX.1 and random weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.markdown import table

__all__ = ["measure", "report"]

TEXT = 512
"""Tokens of the text."""
SIZES = {"1": 4096, "2": 8192, "4": 16384}
"""Megapixels -> tokens of the image."""
SHARES = (1.0, 0.75, 0.5, 0.25)
PLANS = {"12+1": (12, 1), "12+4": (12, 4)}
"""Calls of the first stage, at factor 2, and of the last one."""


def measure(sizes: Mapping[str, int] = SIZES, shares: Sequence[float] = SHARES) -> list[dict[str, Any]]:
    """Calls of one double and two single blocks of FLUX.1's width (it has 19 and 38): a row for every size and share,
    and one for the low size of a plan, whose share is "low"."""
    from diffusers import FluxTransformer2DModel

    kind: Any = FluxTransformer2DModel
    torch.manual_seed(0)
    with torch.no_grad():
        network = kind(num_layers=1, num_single_layers=2, guidance_embeds=True).to(torch.bfloat16).eval()
        rows: list[dict[str, Any]] = []
        for size, tokens in sizes.items():
            rows.append({"megapixels": size, "share": "low", "seconds": _seconds(network, tokens // 4, tokens // 4)})
            rows += [
                {"megapixels": size, "share": share, "seconds": _seconds(network, tokens, int(share * tokens))}
                for share in shares
            ]
    return rows


def _seconds(network: Any, tokens: int, seen: int) -> float:
    """Of one call that sees so many of the tokens."""
    chosen, wide = torch.randperm(tokens)[:seen].sort().values, 64
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, seen, 64, dtype=torch.bfloat16),
        "img_ids": torch.stack([torch.zeros_like(chosen), chosen // wide, chosen % wide], 1),
        "encoder_hidden_states": torch.randn(1, TEXT, 4096, dtype=torch.bfloat16),
        "txt_ids": torch.zeros(TEXT, 3),
        "pooled_projections": torch.randn(1, 768, dtype=torch.bfloat16),
        "timestep": torch.tensor([0.12]),
        "guidance": torch.tensor([3.5]),
    }
    spent: list[float] = []
    for _ in range(2):
        begin = time.process_time()
        network(**inputs)
        spent.append(time.process_time() - begin)
    return min(spent)


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two tables: a call by its share of the tokens, and what the network of a whole plan costs by that share."""
    found: dict[str, dict[Any, float]] = {}
    for row in rows:
        found.setdefault(row["megapixels"], {})[row["share"]] = row["seconds"]
    shares = [share for share in next(iter(found.values())) if share != "low"]
    calls = [
        [size, f"{each[1.0]:.1f}", *(f"{each[share] / each[1.0]:.2f}" for share in shares[1:])]
        for size, each in found.items()
    ]
    whole: list[list[object]] = []
    for size, each in found.items():
        for name, (first, last) in PLANS.items():
            spent = [first * each["low"] + last * each[share] for share in shares]
            of = f"{last * each[1.0] / spent[0]:.2f}"
            whole.append([size, name, f"{spent[0]:.0f}", of, *(f"{one / spent[0]:.2f}" for one in spent[1:])])
    less = [f"share {share:g}" for share in shares[1:]]
    return "\n\n".join(
        [
            table(["megapixels", "CPU s of a dense call", *less], calls, "r"),
            table(["megapixels", "plan", "CPU s of its calls", "of them refining", *less], whole, "rlr"),
        ]
    )
