"""Make the host's VAE encoder give the same latents for the same seeds in the handoff.

Hosts draw from the encoder's distribution with torch's global generator, so the latents depend on whatever else drew
from it before, and on the image's place in the batch. Some engines also keep only the first image of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mrflow_sched.apps.webui.host import kept_random_state, own_attributes

__all__ = ["steady_encoding"]


@contextmanager
def steady_encoding(model: Any, seeds: Sequence[int]) -> Generator[None, None, None]:
    """Let a model encode images one by one while the block runs, each with torch's generators seeded by its own seed.

    The generators are put back after each image. `encode_first_stage` and `get_first_stage_encoding` (which draws, on
    hosts that split the two) are hidden by attributes of this one model object, which are removed at the end.

    Args:
        model: The host's model.
        seeds: A seed for each image, in the order in which they are encoded; taken again from the start where there
            are more images. Empty: 0.

    Yields:
        Nothing.
    """
    own = own_attributes(model)
    covered: dict[str, Any] = {
        name: own.get(name, _ABSENT) for name in ("encode_first_stage", "get_first_stage_encoding")
    }
    encoder = _Encoder(seeds, model.encode_first_stage, getattr(model, "get_first_stage_encoding", None))
    try:
        model.encode_first_stage = encoder.encode
        if encoder.finisher is not None:
            model.get_first_stage_encoding = encoder.finish
        yield
    finally:
        for name, value in covered.items():
            if value is not _ABSENT:
                setattr(model, name, value)
            elif name in own:
                delattr(model, name)


_ABSENT: Any = object()


class _Encoder:
    """Counts the images and seeds each.

    Args:
        seeds: A seed for each image.
        encoder: The model's own `encode_first_stage`.
        finisher: Its own `get_first_stage_encoding`; None where it has none.
    """

    def __init__(self, seeds: Sequence[int], encoder: Callable[..., Any], finisher: Callable[..., Any] | None) -> None:
        self._seeds = [int(seed) for seed in seeds] or [0]
        self._encoder = encoder
        self.finisher = finisher
        self._next = 0

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.shape[0] > 1:
            parts = [self.encode(x[i : i + 1], *args, **kwargs) for i in range(x.shape[0])]
            return torch.cat(parts)
        self._next += 1
        with self._seeded():
            return self._encoder(x, *args, **kwargs)

    def finish(self, encoding: Any) -> Any:
        """Draw the latents of the image that was encoded last.

        Args:
            encoding: What `encode` returned.

        Returns:
            What the model's own method returns.
        """
        with self._seeded():
            return encoding if self.finisher is None else self.finisher(encoding)

    @contextmanager
    def _seeded(self) -> Generator[None, None, None]:
        with kept_random_state():
            library: Any = torch  # partially typed
            library.manual_seed(self._seeds[(max(self._next, 1) - 1) % len(self._seeds)] % 2**63)
            yield
