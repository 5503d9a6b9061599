"""From a table of weights to the network that fits it (spandrel), without more memory than the weights need."""

# spandrel ships its types without the marker that says so.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mrflow_sched._runtime.errors import MrFlowError, first_line, shown
from mrflow_sched._runtime.torchvision_ops import ensure_ops
from mrflow_sched.upscaling.pickles import Declared

if TYPE_CHECKING:
    from spandrel import Architecture, ImageModelDescriptor

SMALL = 16_384
"""Values of a tensor that says how a network is built, such as the window sizes of DAT."""

LARGEST_SCALE = 16

# A name in a file may claim any layer number, and the layers up to it would be built; no real model comes near this.
_MAX_LAYER = 256
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
# Prefixes that training programs leave in front of every name, besides those that spandrel takes off.
_PREFIXES = ("module.", "netG.")
_COMPILED = "_orig_mod."
# Networks that cannot be built without memory; they hold plain layers, which are counted one by one.
_NOT_WITHOUT_MEMORY = frozenset({"RCAN", "IPT"})
_FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange})
# Values that a network may hold beside its weights, in masks and indices: so many, or so many times its weights.
_BESIDES = 16 << 20, 8
# Calls of torch while a network is built, for each tensor of its file: real ones need up to 25.
_MOST_CALLS = 50

T = TypeVar("T")


def weights_table(table: object) -> dict[str, Declared]:
    """Find the weights among what a file declares, under the names that spandrel knows.

    Args:
        table: As `Contents.table` holds it: flat, or below one of the usual keys ("params_ema", "state_dict", ...).

    Returns:
        The tensors, by name.

    Raises:
        MrFlowError: There is no table, or a name claims a layer that no real model has. The sentence has no subject.
    """
    spandrel = _spandrel()
    if not isinstance(table, dict):
        raise MrFlowError("it holds no table of weights")
    found: dict[str, Any] = spandrel.canonicalize_state_dict(cast("dict[str, Any]", table))
    names = {name: name.replace(_COMPILED, "") for name in found}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in names.values()):
            names = {name: shown.removeprefix(prefix) for name, shown in names.items()}
    tensors = {names[name]: value for name, value in found.items() if isinstance(value, Declared)}
    _check_layers(tensors)
    return tensors


def _check_layers(names: Mapping[str, object]) -> None:
    """Refuse layer numbers that no file with this many weights can mean: every layer up to them would be built."""
    most = min(2 * len(names), _MAX_LAYER)
    for name in names:
        if any(len(number) > 9 or int(number) > most for number in _LAYER.findall(name)):
            raise MrFlowError(f"the entry {shown(repr(name))} names no layer of a real model")


def rehearse_build(table: Mapping[str, Tensor]) -> ImageModelDescriptor[torch.nn.Module] | None:
    """Build the network without memory, so that what does not fit is found before anything is allocated.

    The builder sizes every layer by a few tensors of the file.

    Args:
        table: The weights; tensors of more than `SMALL` values may be on the meta device.

    Returns:
        The network on the meta device; None for the few that cannot be built so.

    Raises:
        MrFlowError: No known network, one that does not upscale whole RGB or grey images, or weights that do not fit
            together. The sentence has no subject.
    """
    light = {name: value.to("meta") if value.numel() > SMALL else value for name, value in table.items()}
    kind = _kind(light)
    if str(kind.id) in _NOT_WITHOUT_MEMORY:
        return None
    with torch.device("meta"), _OnMeta(_MOST_CALLS * (len(light) + 50)):
        model = _load(kind, light)
    total = sum(one.numel() for one in (*model.model.parameters(), *model.model.buffers()))
    if total > _room(table):
        raise MrFlowError(f"it asks for a network of {total:,} values and does not hold them")
    return model


def build(table: Mapping[str, Tensor]) -> ImageModelDescriptor[torch.nn.Module]:
    """Build the network of a table of weights, on the CPU. No random number of the program is used up.

    Args:
        table: The weights.

    Returns:
        The network in float32.

    Raises:
        MrFlowError: As `rehearse_build`.
    """
    rehearsed = rehearse_build(table)
    guard = nullcontext() if rehearsed is not None else _Counted(_room(table))
    # Layers begin with random weights, drawn from the generator that is the program's.
    with torch.random.fork_rng(devices=[]), guard:  # pyright: ignore[reportUnknownMemberType]
        return _load(_kind(table), table)


def _room(table: Mapping[str, Tensor]) -> int:
    """Values that the network of a table may hold."""
    held = sum(value.numel() for value in table.values())
    return held + max(_BESIDES[0], _BESIDES[1] * held)


def _spandrel() -> ModuleType:
    """spandrel, which imports torchvision, whose operators may be missing."""
    ensure_ops()
    import spandrel

    return spandrel


def _kind(table: Mapping[str, Tensor]) -> Architecture[torch.nn.Module]:
    """The kind of network whose weights these are. Raises MrFlowError where none is known."""
    spandrel = _spandrel()
    for known in spandrel.MAIN_REGISTRY.architectures("detection"):
        if known.detect(dict(table)):
            return known.architecture
    raise MrFlowError("it holds weights of no known super-resolution model")


def _load(kind: Architecture[torch.nn.Module], table: Mapping[str, Tensor]) -> ImageModelDescriptor[torch.nn.Module]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one per weight, that copying to the meta device does nothing
            model = kind.load(dict(table))
    except Exception as error:
        raise MrFlowError(
            f"it looks like a model of type {kind.name} but its weights do not fit together ({first_line(error)})"
        ) from error
    return _checked(model)


def _checked(model: object) -> ImageModelDescriptor[torch.nn.Module]:
    import spandrel

    found = cast("ImageModelDescriptor[torch.nn.Module]", model)
    if not isinstance(model, spandrel.ImageModelDescriptor) or found.purpose not in ("SR", "Restoration"):
        raise MrFlowError(f"it is a {found.architecture.name} model for {found.purpose}, not for upscaling images")
    channels = found.input_channels, found.output_channels
    if channels not in ((3, 3), (1, 1)):
        raise MrFlowError(f"it takes {channels[0]} and returns {channels[1]} channels, not RGB or grey images")
    if not 1 <= found.scale <= LARGEST_SCALE:
        raise MrFlowError(f"it enlarges {found.scale} times, and {LARGEST_SCALE} times is the most that is taken")
    return found


class _OnMeta(TorchFunctionMode):
    """Inside `torch.device("meta")`: numbers that a builder reads back are real, and nobody builds without end.

    Args:
        calls: Calls of torch that are allowed.
    """

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(
        self, func: Callable[..., T], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> T:
        self.calls -= 1
        if self.calls < 0:
            raise MrFlowError("more layers than any real model has")
        given = dict(kwargs or {})
        if func is torch.linspace and given.get("steps", args[-1]) <= _MAX_LAYER**2:
            given["device"] = "cpu"  # rates of dropped paths, read back one by one
        return func(*args, **given)


class _Counted(TorchFunctionMode):
    """Counts the values that are made, and stops before they are more than a file can fill.

    Args:
        room: Values that may be made.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def __torch_function__(
        self, func: Callable[..., T], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> T:
        given = dict(kwargs or {})
        if func in _FACTORIES:
            made = cast("Tensor", func(*args, **{**given, "device": "meta"}))
            self.room -= made.numel()
            if self.room < 0:
                raise MrFlowError("a network larger than the file's weights")
        return func(*args, **given)
