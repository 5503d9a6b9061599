"""A network whose forward goes through `torch.compile`, beside the one that its owner keeps.

Compiling takes from seconds to minutes and holds for one size, so it pays where many forwards of one size follow: in
the first stage. Refining takes one or two forwards at another size, and runs the network uncompiled.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched._runtime.memory import is_memory_error

__all__ = ["COMPILE_MODES", "COMPILE_STEPS", "NetworkCompiler"]

logger = logging.getLogger(__name__)

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""What `torch.compile` calls its modes; the second and third record CUDA graphs."""
COMPILE_STEPS = 4
"""Stages of fewer steps run the network as it is."""


class NetworkCompiler:
    """Makes the compiled twin of a network, and keeps those of the last two: some pipelines have two that take turns.

    Attributes:
        mode: The mode of `torch.compile`.
        notes: A sentence for each network that could not be compiled.
    """

    def __init__(self, mode: str) -> None:
        """Choose the mode; nothing is compiled yet.

        Args:
            mode: One of `COMPILE_MODES`, as `torch.compile` takes it.

        Raises:
            MrFlowError: Another mode.
        """
        if mode not in COMPILE_MODES:
            raise MrFlowError(f"compile_mode must be None or one of {', '.join(COMPILE_MODES)}, got {mode!r}.")
        self.mode = mode
        self.notes: list[str] = []
        self._known: list[tuple[torch.nn.Module, torch.nn.Module]] = []

    def __getstate__(self) -> dict[str, Any]:
        # What is compiled cannot be pickled; a copy compiles anew.
        return {**vars(self), "_known": []}

    def __call__(self, network: torch.nn.Module) -> torch.nn.Module:
        """A twin of a network with the same weights, adapters and hooks, compiled at its first forward.

        Where compiling fails (no compiler, an unsupported operation), the twin says so once (`notes`, and the log) and
        runs the network uncompiled from then on.

        Args:
            network: Not changed.

        Returns:
            The twin; the same one for the same network.
        """
        for known, twin in self._known:
            if known is network:
                return twin
        self._known = [*self._known[-1:], (network, _twin(network, self.mode, self._say))]
        return self._known[-1][1]

    def _say(self, sentence: str) -> None:
        self.notes.append(sentence)
        logger.warning("%s", sentence)


def _twin(network: torch.nn.Module, mode: str, say: Callable[[str], object]) -> torch.nn.Module:

    def plain(*values: Any, **named: Any) -> Any:
        return network.forward(*values, **named)  # as it is by then: offloading puts hooks there

    library = cast("Any", torch)  # whose types leave this one open
    fast: Callable[..., Any] = library.compile(plain, mode=mode)
    graphs = mode in ("reduce-overhead", "max-autotune")
    failed = False

    @functools.wraps(network.forward)
    def forward(*values: Any, **named: Any) -> Any:
        nonlocal failed
        if failed:
            return plain(*values, **named)
        try:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            result = fast(*values, **named)
            return _own_copy(result) if graphs else result
        except Exception as error:
            if is_memory_error(error):
                raise
            reason = first_line(error)
        made = plain(*values, **named)  # raises what is not the compiler's fault
        failed = True
        say(f"torch.compile could not compile {type(network).__name__} ({reason}): it runs uncompiled.")
        return made

    twin = copy.copy(network)
    twin.forward = forward
    return twin


def _own_copy(result: Any) -> Any:
    """`result` copied out of the memory that the next replay of a CUDA graph writes to."""
    if isinstance(result, Tensor):
        return result.clone()
    if isinstance(result, Mapping):  # the outputs of diffusers
        found = cast("Any", result)
        return type(found)(**{name: _own_copy(value) for name, value in found.items()})
    if isinstance(result, (tuple, list)):
        many = cast("tuple[Any, ...]", result)
        return type(many)(_own_copy(value) for value in many)
    return result
