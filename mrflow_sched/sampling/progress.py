"""Where a run stands: its clock, its progress, and what it tells on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    `fraction` rises from 0 to 1 with the network's cost, so a bar drawn from it moves evenly in time. `stage` (from
    1) of `stages`; `step` of `steps` within it (0 before the first). `name`: the part at work, as in
    `StagedResult.timings`, at last "done". `denoised`: the clean estimate of the step just evaluated, latents (B,
    ...), else None.
    """

    fraction: float
    stage: int
    stages: int
    step: int
    steps: int
    name: str
    denoised: Tensor | None = None


@dataclass(frozen=True)
class StageTiming:
    """Wall-clock seconds of one part, measured with the device's queue empty at both ends."""

    name: str
    seconds: float


def wait_for(device: torch.device) -> None:
    """Let the device finish what is queued, so that a clock read now is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()
