"""Looking at diffusers pipelines from outside: what a network was called with, and whether anything was changed."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor


def network_of(pipe: Any) -> Any:
    return getattr(pipe, "transformer", None) or pipe.unet


@dataclass
class Heard:
    """What the network was called with, one entry per call."""

    states: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)


@contextlib.contextmanager
def listening(pipe: Any) -> Iterator[Heard]:
    """Note every call of the pipeline's network: its state, as one tensor (B, ...), and its timestep."""
    heard = Heard()

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = [kwargs[name] for name in ("hidden_states", "sample", "x") if name in kwargs]
        state: Any = named[0] if named else args[0]
        rest = [value for value in args if value is not state]
        timestep = next(
            (kwargs[name] for name in ("timestep", "timesteps", "t") if name in kwargs), rest[0] if rest else None
        )
        rows = [row[-1] if isinstance(row, list) else row for row in state]  # of several pictures the last is made
        heard.states.append(torch.stack(rows) if isinstance(state, list) else state.detach().clone())
        heard.timesteps.append(torch.as_tensor(timestep, dtype=torch.float32).flatten().clone())
        heard.arguments.append(kwargs)

    handle = network_of(pipe).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield heard
    finally:
        handle.remove()


_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")


def snapshot(pipe: Any) -> dict[str, Any]:
    """All that may not change about a pipeline, comparable with ==: attributes, configurations, modules, weights.

    Weights are told by address and version, which any change in place raises. Hooks that accelerate renews after every
    run, as it does after a run of the pipeline itself, are told by their kinds.
    """
    found: dict[str, Any] = {}
    for name, value in vars(pipe).items():
        if name == "_all_hooks":
            found[name] = [type(hook).__name__ for hook in value]
        else:
            found[name] = value if isinstance(value, (str, int, float, bool, type(None), dict, list)) else id(value)
    found["config"] = dict(pipe.config)
    for name, part in pipe.components.items():
        found[f"{name}.id"] = id(part)
        if hasattr(part, "config") and hasattr(part.config, "items"):
            found[f"{name}.config"] = {key: repr(value) for key, value in part.config.items()}
        if name == "scheduler":
            found["scheduler.vars"] = {key: repr(value) for key, value in vars(part).items()}
        if isinstance(part, torch.nn.Module):
            found |= {f"{name}.{key}": value for key, value in _module(part).items()}
    return found


def _module(module: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, (str, int, float, bool, tuple, type(None))):
                found[f"{name}.{key}"] = value
        found[f"{name} hooks"] = [len(getattr(part, table)) for table in _HOOK_TABLES]
        found[f"{name} offload"] = type(getattr(part, "_hf_hook", None)).__name__
    for kind in ("named_parameters", "named_buffers"):
        for name, tensor in getattr(module, kind)():
            found[name] = (tensor.device, tensor.dtype, tuple(tensor.shape), tensor.data_ptr(), tensor._version)
    return found


def theirs_with(kind: str, **config: Any) -> Any:
    """diffusers' own scheduler; skips the test where the installed one is too old to have an option of it."""
    diffusers: Any = import_module("diffusers")  # its lazy names are hidden from type checkers
    known = inspect.signature(getattr(diffusers, kind).__init__).parameters
    lacking = [name for name in config if name not in known]
    if lacking:
        pytest.skip(f"the installed diffusers has a {kind} without {', '.join(lacking)}")
    return getattr(diffusers, kind)(**config)
