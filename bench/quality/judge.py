"""The judge of the benchmark: which attributes of its caption an image shows, and features to compare sets by.

The networks are those of tools/train_demo/classifier.py, trained on rendered scenes only; their weights are beside
this file. On rendered scenes that they were not trained on they read 99.7 per cent of the attributes correctly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.train_demo import classifier

WEIGHTS = Path(__file__).parent / "judge.safetensors"


@lru_cache(maxsize=1)
def load() -> Any:
    """The judge, ready to read."""
    judge = classifier.Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()}, strict=False)
    return judge.eval().requires_grad_(False)


def keep(trained: Path) -> None:
    """Write the weights of `classifier.pt` beside this file, in half the bytes."""
    state: dict[str, Tensor] = torch.load(trained, weights_only=True)
    small = {n: v.to(torch.bfloat16).contiguous() for n, v in state.items() if v.is_floating_point()}
    save_file(small, WEIGHTS)


def hits(pictures: Tensor, scenes: Sequence[Any]) -> list[dict[str, list[bool]]]:
    """By image and group of attributes, whether each reads as the scene says; "letters" are those of its word."""
    return classifier.hits(load(), pictures, scenes)


@torch.inference_mode()
def features(pictures: Tensor) -> Tensor:
    """The judge's features of whole images, (N, 256)."""
    judge = load()
    small = classifier.at_reading_size(pictures) * 2 - 1
    return torch.cat([judge.whole.hidden(judge.whole.body(part)) for part in small.split(50)])


@torch.inference_mode()
def maps(pictures: Tensor) -> list[Tensor]:
    """Feature maps at four scales, for distances between two images."""
    found: list[Tensor] = []
    x = classifier.at_reading_size(pictures) * 2 - 1
    for layer in load().whole.body[:-3]:
        x = layer(x)
        if isinstance(layer, torch.nn.ReLU):
            found.append(x)
    return found[1::2]
