"""Which device to work on, and which dtypes its hardware computes fast."""

from __future__ import annotations

import torch

from mrflow_sched._runtime.errors import MrFlowError, first_line, shown


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device of a name, checked to be usable.

    Args:
        device: "auto" is the first CUDA device where there is one, else the CPU; anything else is read as torch spells
            it ("cpu", "cuda:1").

    Returns:
        A device on which a tensor was allocated.

    Raises:
        MrFlowError: Torch does not know the device or cannot use it, or it is "meta", which holds no numbers.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    said = shown(repr(str(device)))
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise MrFlowError(f"device is {said}, which is not a device name; use auto, cpu or cuda.") from error
    if found.type == "meta":
        raise MrFlowError("device is 'meta', which holds shapes and no numbers; use auto, cpu or cuda.")
    try:
        torch.empty(0, device=found)
    except Exception as error:  # each backend that torch was built without fails in its own way, imports among them
        raise MrFlowError(
            f"device is {said}, which cannot be used here ({_reason(error)}); use auto or cpu."
        ) from error
    return found


_INTERNAL = ("Could not run", "INTERNAL ASSERT", "No module named")
"""What torch says where it was built without a device, in words about itself."""


def _reason(error: Exception) -> str:
    """Why a device cannot be used: the first sentence of torch's error where it is one for users."""
    sentence = first_line(error).split(". ")[0]
    return "torch was built without it" if any(word in sentence for word in _INTERNAL) else sentence


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16.

    Emulated bfloat16 on a CPU is slower than float32, hence the question.

    Args:
        device: A CPU or CUDA device; on any other kind the answer is False.

    Returns:
        True for CUDA devices where torch says so, and for CPUs with AVX512-BF16 or AMX.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # The probes are not public and old torch versions lack them; without them float32 is always right.
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return device.type == "cpu" and any(probe() for probe in probes if probe is not None)
