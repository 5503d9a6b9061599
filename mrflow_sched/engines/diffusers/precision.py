"""A network with fewer bits, beside the one that its owner keeps: torchao's quantisation, for some stages of a run."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch

from mrflow_sched._runtime.chatter import without_chatter
from mrflow_sched._runtime.errors import MrFlowError, first_line, quoted

__all__ = ["OWN", "PRECISIONS", "LoweredNetworks", "check_precision", "state_of"]

OWN = "own"
"""The network as its owner loaded it."""
PRECISIONS: Mapping[str, str] = MappingProxyType(
    {
        "int8": "Int8WeightOnlyConfig",
        "int8-dynamic": "Int8DynamicActivationInt8WeightConfig",
        "fp8": "Float8WeightOnlyConfig",
        "fp8-dynamic": "Float8DynamicActivationFloat8WeightConfig",
        "int4": "Int4WeightOnlyConfig",
    }
)
"""What torchao calls each: weights alone in few bits, or ("dynamic") what they are multiplied with too."""
_FP8_CAPABILITY = (8, 9)
_FACTS = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
"""What says how a LoRA's layer counts."""


def check_precision(precision: str, network: torch.nn.Module, device: torch.device) -> None:
    """Refuse a precision that cannot be had, with the reason.

    Args:
        precision: `OWN`, or a name of `PRECISIONS`.
        network: Which is to be run in it.
        device: Where it runs.

    Raises:
        MrFlowError: The name is unknown, torchao is missing, the device cannot do it, or the network comes quantised or
            is moved to its device part by part.
    """
    if precision == OWN:
        return
    if precision not in PRECISIONS:
        raise MrFlowError(f"precision must be one of {', '.join((OWN, *PRECISIONS))}, got {quoted(precision)}.")
    name = type(network).__name__
    if getattr(network, "hf_quantizer", None) is not None or getattr(network, "is_quantized", False):
        raise MrFlowError(f"precision must be left out, as {name} was loaded quantised already.")
    if any(hasattr(module, "_hf_hook") for module in network.modules()):
        raise MrFlowError(
            f"precision {precision} needs the whole network on {device}, and {name} is offloaded; leave one of the two "
            "out."
        )
    capability = (0, 0)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
    if precision == "fp8-dynamic" and tuple(capability) < tuple(_FP8_CAPABILITY):
        raise MrFlowError(
            f"precision fp8-dynamic multiplies in 8 bits, which takes a GPU of compute capability 8.9 or more (RTX 40, "
            f"H100), and the run is on {_device(device, capability)}; use int8, or fp8, whose weights alone are small."
        )
    if precision == "int4" and device.type != "cuda":
        raise MrFlowError(f"precision int4 needs a CUDA GPU, and the run is on {device}; use int8.")
    _config(precision)


class LoweredNetworks:
    """Makes quantised twins of networks, and keeps those of the last two until a weight of theirs changes."""

    def __init__(self) -> None:
        """Know no twin yet."""
        self._known: list[tuple[torch.nn.Module, str, Any, torch.nn.Module]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": []}  # made anew where a copy runs

    def __call__(self, network: torch.nn.Module, precision: str) -> torch.nn.Module:
        """A twin of a network in another precision.

        Args:
            network: Not changed.
            precision: A name of `PRECISIONS` that `check_precision` let pass.

        Returns:
            The twin, the same one while the network's weights and adapters stay what they are.

        Raises:
            MrFlowError: torchao could not quantise it.
        """
        state = state_of(network)
        for known, name, before, twin in self._known:
            if known is network and name == precision and before == state:
                return twin
        twin = _quantised(network, precision)
        kept = [each for each in self._known if not (each[0] is network and each[1] == precision)]
        self._known = [*kept[-1:], (network, precision, state, twin)]
        return twin


def state_of(network: torch.nn.Module) -> tuple[Any, ...]:
    """What changes where a weight is changed, or an adapter is added, scaled or switched off.

    Args:
        network: Any.

    Returns:
        Values that can be compared.
    """
    weights = tuple((name, weight.data_ptr(), _version(weight)) for name, weight in network.named_parameters())
    adapters: list[tuple[str, ...]] = []
    for name, module in cast("Iterable[tuple[str, torch.nn.Module]]", network.named_modules()):
        if hasattr(module, "lora_A"):
            adapters.append((name, *(repr(getattr(module, fact, None)) for fact in _FACTS)))
    return weights, adapters


def _version(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version  # pyright: ignore[reportPrivateUsage]


def _quantised(network: torch.nn.Module, precision: str) -> torch.nn.Module:
    twin, configuration = copy.deepcopy(network), _config(precision)
    try:
        with torch.no_grad():
            _library().quantize_(twin, configuration)
    except Exception as error:
        raise MrFlowError(
            f"torchao could not make {type(network).__name__} {precision} ({first_line(error)}); use another precision."
        ) from error
    return twin


def _config(precision: str) -> Any:
    """The configuration of that name."""
    try:
        return getattr(_library(), PRECISIONS[precision])()
    except ModuleNotFoundError as error:
        raise MrFlowError(
            f"precision {precision} needs torchao, which is not installed; run pip install 'mrflow-sched[lowp]'."
        ) from error
    except Exception as error:  # too old for its torch, or a package of its own is missing
        raise MrFlowError(
            f"precision {precision} cannot be used with the installed torchao ({first_line(error)}); use another one."
        ) from error


def _library() -> Any:
    with without_chatter():
        return importlib.import_module("torchao.quantization")


def _device(device: torch.device, capability: tuple[int, int]) -> str:
    return f"{device} of {capability[0]}.{capability[1]}" if device.type == "cuda" else str(device)
