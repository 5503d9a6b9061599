"""Diffusers' own context parallelism: several processes, each with a device, share every forward of a network."""

from __future__ import annotations

from typing import Any

from mrflow_sched._runtime.errors import MrFlowError, first_line

__all__ = ["check_context_parallel", "enable_context_parallel", "sharing_refusal"]


def check_context_parallel() -> None:
    """Look whether the installed libraries have it.

    Raises:
        MrFlowError: This diffusers has none, or torch was built without processes that talk to each other.
    """
    import diffusers
    import torch

    if not hasattr(diffusers, "ContextParallelConfig"):
        raise MrFlowError(
            f"--context-parallel needs a diffusers with ContextParallelConfig, and this is {diffusers.__version__}; "
            "update diffusers, or leave it out."
        )
    if not torch.distributed.is_available():
        raise MrFlowError(
            "--context-parallel needs a torch with torch.distributed, which this one lacks; leave it out."
        )


def enable_context_parallel(network: Any, ulysses: int, ring: int) -> None:
    """Let the processes that torch.distributed joined share a network's forwards.

    Args:
        network: Of a pipeline, loaded the same in every process.
        ulysses: As diffusers' `ulysses_degree`, from 1.
        ring: As its `ring_degree`; the product of both is the number of processes.

    Raises:
        MrFlowError: This network, its attention, or this kind of device cannot.
    """
    import diffusers
    import torch

    version = diffusers.__version__
    library: Any = diffusers
    name = type(network).__name__
    if not hasattr(network, "enable_parallelism") or not getattr(network, "_cp_plan", None):
        raise MrFlowError(
            f"--context-parallel: diffusers {version} does not know how to share the network {name}; leave it out."
        )
    try:
        network.enable_parallelism(config=library.ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring))
    except ZeroDivisionError as error:  # 0.42 takes the rank modulo torch.accelerator.device_count()
        raise MrFlowError(
            f"--context-parallel: diffusers {version} shares forwards between accelerators only, and torch "
            f"{torch.__version__} counts none here; leave it out."
        ) from error
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise MrFlowError(
            f"--context-parallel: diffusers {version} cannot share the network {name} ({first_line(error)}); choose "
            "another kind, or leave it out."
        ) from error


def sharing_refusal(error: BaseException) -> MrFlowError | None:
    """What is told where a forward cannot be cut into equal parts, which diffusers says by an assertion.

    Args:
        error: Of a run with shared forwards.

    Returns:
        The refusal; None: the error is another.
    """
    cause = error if isinstance(error, AssertionError) else error.__cause__
    if not (isinstance(cause, AssertionError) and "divisible" in str(cause)):
        return None
    return MrFlowError(
        "--context-parallel: the tokens of a stage, or of the text, cannot be cut into as many equal parts; choose "
        "another size or fewer parts."
    )
