"""The `PixelUpscaler` role: anything that upscales RGB images by a whole factor."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError


class PixelUpscaler(Protocol):
    """Anything that upscales RGB images by a whole factor."""

    @property
    def name(self) -> str:
        """Its name in metadata and messages."""
        ...

    @property
    def scale(self) -> int:
        """Output side over input side, 1 for restoration models."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Upscale a batch.

        Args:
            images: (B, 3, h, w) float32 in [0, 1].

        Returns:
            (B, 3, h*scale, w*scale) float32 in [0, 1], on the same device.
        """
        ...


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of RGB images.

    Args:
        images: A tensor to upscale.

    Raises:
        MrFlowError: `images` is not a float tensor (B, 3, h, w), or is empty.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
        raise MrFlowError(
            f"images must be a float tensor (B, 3, h, w) of RGB in [0, 1], got {images.dtype} of shape "
            f"{tuple(images.shape)}; drop alpha and repeat grey three times before."
        )
