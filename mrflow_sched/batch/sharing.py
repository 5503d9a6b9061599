"""Workers of several processes, which share every forward: how they find each other and which devices they see."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError

__all__ = ["ContextParallel", "Share", "groups_for", "join", "share_of"]

_CUDA = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class ContextParallel:
    """How the processes of a worker share a forward, in diffusers' words.

    Attributes:
        ulysses: Each has all tokens of some attention heads, and some tokens of everything else; 1: not so.
        ring: Keys and values go round; 1: they do not.
    """

    ulysses: int = 1
    ring: int = 1

    @property
    def parts(self) -> int:
        """Processes, and devices, of a worker."""
        return self.ulysses * self.ring

    def __str__(self) -> str:
        """As the command line says it.

        Returns:
            Such as "ulysses=2".
        """
        each = {"ulysses": self.ulysses, "ring": self.ring}
        return ",".join(f"{name}={number}" for name, number in each.items() if number > 1)


@dataclass(frozen=True)
class Share:
    """One process of a worker.

    Attributes:
        rank: Its number in the worker, from 0.
        parts: How many there are.
        store: A file that does not exist yet, by which they find each other.
        device: Its own, as `join` makes it known to the process.
        visible: What CUDA_VISIBLE_DEVICES is set to; None: it stays.
    """

    rank: int
    parts: int
    store: str
    device: str
    visible: str | None


def share_of(rank: int, store: str, devices: Sequence[str | None], environment: Mapping[str, str]) -> Share:
    """What a process of a worker is told.

    Diffusers takes the device of the process's number: the first for process 0, and so on. So each process sees the
    devices of its worker alone.

    Args:
        rank: Its number in the worker.
        store: As in `Share`.
        devices: Of the worker's processes.
        environment: May say which devices of CUDA there are.

    Returns:
        The share.
    """
    own = devices[rank] or "cpu"
    if not own.startswith("cuda"):
        return Share(rank, len(devices), store, own, None)
    given = [name.strip() for name in environment.get(_CUDA, "").split(",") if name.strip()]
    numbers = [int(str(device).partition(":")[2]) for device in devices]
    visible = ",".join(given[number] if given else str(number) for number in numbers)
    return Share(rank, len(devices), store, f"cuda:{rank}", visible)


def join(share: Share) -> None:
    """Join the other processes of a worker; returns when all have.

    Args:
        share: What this one is.
    """
    if share.visible is not None:
        os.environ[_CUDA] = share.visible  # before torch looks for devices
    import torch
    from torch import distributed as processes

    distributed: Any = processes  # parts of it have no types
    is_cuda = share.device.startswith("cuda")
    if is_cuda:
        torch.cuda.set_device(share.rank)
    store = distributed.FileStore(share.store, share.parts)
    distributed.init_process_group("nccl" if is_cuda else "gloo", store=store, rank=share.rank, world_size=share.parts)


def groups_for(device: str, workers: int, config: ContextParallel) -> tuple[str | None, ...]:
    """A device for each process of several workers.

    Args:
        device: "auto" or a torch device, as --device says it.
        workers: How many.
        config: How the processes of each share a forward.

    Returns:
        The devices, those of a worker together.

    Raises:
        MrFlowError: There are too few, one of them was named, or they are of a kind that is not supported here.
    """
    from mrflow_sched._runtime.device import resolve_device

    found, count = resolve_device(device), workers * config.parts
    if found.type == "cpu":
        return ("cpu",) * count
    if found.type != "cuda":
        raise MrFlowError(
            f"--context-parallel is for CUDA devices, and --device {device} is {found.type}; leave it out."
        )
    if ":" in str(found):
        raise MrFlowError(
            f"--device {device} is one device, and --context-parallel {config} shares forwards between {config.parts}; "
            "give --device cuda."
        )
    import torch

    there = torch.cuda.device_count()
    if count > there:
        each = "" if workers == 1 else f" for each of {workers} workers"
        raise MrFlowError(
            f"--context-parallel {config} takes {config.parts} devices{each}, and this machine has {there}; give fewer "
            "parts or workers."
        )
    return tuple(f"cuda:{number}" for number in range(count))
