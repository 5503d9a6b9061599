"""Rewards: scores of images (`measure.scores`) whose gradient can be followed back to the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.measure.scores import Score

__all__ = ["rewarded", "try_reward"]


def rewarded(score: Score, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The rewards of images, with the graph that leads to them.

    Args:
        score: What rewards; "least first" turns its sign.
        images: (B, 3, H, W), float32 in [0, 1].
        prompts: What each should show.

    Returns:
        (B,), float32 on the images' device; higher is better.

    Raises:
        MrFlowError: The score gives no tensor of one number for each image.
    """
    given: Any = score.measure(images, prompts)
    if not isinstance(given, Tensor) or given.shape != (len(images),):
        raise MrFlowError(
            f"reward {quoted(score.name)} gave {quoted(given)}; it must give a tensor of {len(images)} numbers."
        )
    values = given.float().to(images.device)
    return -values if score.least_first else values


def try_reward(score: Score, prompt: str) -> None:
    """Refuse a score that no gradient leads through, before anything is sampled.

    Args:
        score: What is to reward.
        prompt: One that it will see.

    Raises:
        MrFlowError: The score refuses the prompt, or has no gradient in the image.
    """
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        images = pixels.requires_grad_()
        values = rewarded(score, images, [prompt])
        slope = None
        if values.requires_grad:
            slope = torch.autograd.grad(values.sum(), images, allow_unused=True)[0]
    if slope is None or not bool(slope.abs().sum() > 0):
        raise MrFlowError(
            f"reward {quoted(score.name)} has no gradient in the image, so nothing can be tuned by it; write it with "
            "torch's own operations, outside no_grad, or use it as the guard."
        )
