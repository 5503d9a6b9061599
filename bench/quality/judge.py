"""The judge of the benchmark: which attributes of its caption an image shows, and features to compare sets by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mrflow_sched.demo import fine_judge, judge
from mrflow_sched.demo.scenes import Scene


@lru_cache(maxsize=1)
def load() -> judge.Judge:
    """The judge, ready to read."""
    return judge.load_judge()


def hits(pictures: Tensor, scenes: Sequence[Scene]) -> list[dict[str, list[bool]]]:
    """By image and group of attributes, whether each reads as the scene says; "letters" are those of its word."""
    return judge.hits(load(), pictures, scenes)


def share_read(pictures: Tensor, scenes: Sequence[Scene]) -> float:
    """Share of what scenes have, fine detail too, that is read of pictures, saved in eight bits, (N, 3, H, W)."""
    saved = (pictures.clamp(0, 1) * 255).round() / 255
    read = (*hits(saved, scenes), *fine_hits(saved, scenes))
    every = [hit for each in read for values in each.values() for hit in values]
    return sum(every) / len(every)


@lru_cache(maxsize=1)
def load_fine() -> fine_judge.FineJudge:
    """The judge of fine detail, ready to read."""
    return fine_judge.load_fine_judge()


def fine_hits(pictures: Tensor, scenes: Sequence[Scene]) -> list[dict[str, list[bool]]]:
    """The same of fine detail, which is read at full size; an empty group where a scene has none."""
    return fine_judge.fine_hits(load_fine(), pictures, scenes)


@torch.inference_mode()
def readings(pictures: Tensor) -> dict[str, Tensor]:
    """What the judge reads in whole images, whatever their captions say: numbers of values (N,), by field."""
    parts = [load().whole(part) for part in judge.at_reading_size(pictures).split(50)]
    return {field: torch.cat([part[field].argmax(-1) for part in parts]) for field in judge.WHOLE}


@torch.inference_mode()
def features(pictures: Tensor) -> Tensor:
    """The judge's features of whole images, (N, 256)."""
    return torch.cat([load().whole.features(part) for part in judge.at_reading_size(pictures).split(50)])


@torch.inference_mode()
def maps(pictures: Tensor) -> list[Tensor]:
    """Feature maps at four scales, for distances between two images."""
    found: list[Tensor] = []
    x = judge.at_reading_size(pictures) * 2 - 1
    for layer in list(load().whole.body.children())[:-3]:
        x = layer(x)
        if isinstance(layer, torch.nn.ReLU):
            found.append(x)
    return found[1::2]
