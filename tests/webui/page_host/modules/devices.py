"""A WebUI that runs on the CPU."""

from __future__ import annotations

import torch

device = device_esrgan = torch.device("cpu")


def torch_gc() -> None:
    """Nothing to give back."""
