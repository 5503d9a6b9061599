"""The processes that tune together, as accelerate or torchrun started them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from mrflow_sched._runtime.errors import MrFlowError

__all__ = ["Processes", "joined"]


@dataclass(frozen=True)
class Processes:
    """This process among those that tune together.

    Attributes:
        rank: Its number, from 0; that one looks at the held-out prompts and writes the files.
        count: How many there are.
        device: Where each has its model, as torch spells it; None: as the user says.
    """

    rank: int = 0
    count: int = 1
    device: str | None = None

    @property
    def first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the mean of all processes' gradients.

        Args:
            parameters: The same ones in each; what has no gradient counts as 0.
        """
        if self.count == 1:
            return
        parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        flat = self.total(torch.cat([part.flatten() for part in parts])) / self.count
        shares: tuple[Tensor, ...] = torch.split(flat, [part.numel() for part in parts])
        for each, part in zip(parameters, shares, strict=True):
            each.grad = part.view_as(each)

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' values.

        Args:
            values: Of one shape in all of them.

        Returns:
            It, in each of them.
        """
        if self.count == 1:
            return values
        summed, group = values.clone(), cast("Any", torch.distributed)
        group.all_reduce(summed)
        return summed

    def told(self, value: float) -> float:
        """What the first process says.

        Args:
            value: Its word; that of the others does not count.

        Returns:
            It, in each of them.
        """
        if self.count == 1:
            return value
        said = torch.tensor([value], dtype=torch.float64, device=self.device)
        cast("Any", torch.distributed).broadcast(said, 0)
        return float(said)


def joined() -> tuple[Processes, str | None]:
    """Join the processes that were started together.

    Returns:
        (this process; a sentence for the user, where a launcher started one process and may have been asked for more).

    Raises:
        MrFlowError: Several were started, and accelerate is missing.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        launched = any(name.startswith("ACCELERATE_") for name in os.environ)
        return Processes(), (_ONE if launched else None)
    if find_spec("accelerate") is None:
        raise MrFlowError(
            f"{count} processes were started, and accelerate, which joins them, is not installed; run pip install "
            "'mrflow-sched[tune]'."
        )
    accelerate: Any = import_module("accelerate")
    state = accelerate.PartialState(cpu=not torch.cuda.is_available())
    return Processes(state.process_index, state.num_processes, str(state.device)), None


_ONE = (
    "This is one process, though a launcher started it: accelerate launch --cpu starts one whatever it is asked for. "
    "For several on a CPU: torchrun --nproc-per-node 2 -m mrflow_sched tune ..."
)
