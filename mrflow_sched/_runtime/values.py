"""What a tensor must be before anything is computed with its values."""

from __future__ import annotations

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError

__all__ = ["check_dense", "check_unit_range"]


def check_dense(values: Tensor, name: str) -> None:
    """Refuse a tensor without one plain number for each place.

    Args:
        values: Any tensor.
        name: The argument's name, for the refusal.

    Raises:
        MrFlowError: It is sparse, nested or quantised, or on the device "meta", which holds no values.
    """
    if values.is_meta:
        raise MrFlowError(f'{name} is a tensor on the device "meta", which holds no values; give one that does.')
    if values.is_nested or values.is_quantized or values.layout != torch.strided:
        kind = "nested" if values.is_nested else "quantised" if values.is_quantized else "sparse"
        raise MrFlowError(f"{name} is a {kind} tensor; give a dense one of plain numbers.")


def check_unit_range(values: Tensor, name: str) -> None:
    """Refuse values outside [0, 1].

    Args:
        values: Dense floats.
        name: The argument's name, for the refusal.

    Raises:
        MrFlowError: There is NaN, or a value below 0 or above 1.
    """
    if bool(((values >= 0) & (values <= 1)).all()):
        return
    if not bool(values.isfinite().all()):
        raise MrFlowError(f"{name} holds NaN or infinity; mend it, or give another.")
    low, high = float(values.min()), float(values.max())
    advice = "clamp them" if low >= -0.5 and high <= 1.5 else "divide them by 255"
    if low < -0.5 and high <= 1.5:
        advice = "scale them by x / 2 + 0.5"
    raise MrFlowError(f"{name} must hold floats from 0 to 1, got {low:.3g} to {high:.3g}; {advice}.")
