"""Work within the available memory: the whole batch, image by image, in tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mrflow_sched._runtime.cancel import stop_if
from mrflow_sched._runtime.errors import first_line
from mrflow_sched._runtime.memory import free_memory, is_memory_error
from mrflow_sched.sampling.engine import capabilities_of

if TYPE_CHECKING:
    from mrflow_sched.sampling.engine import Engine


@dataclass(frozen=True)
class _Full:
    """Memory ran out; `said` is how the library put it."""

    said: str


def within_memory(
    work: Callable[[Engine, slice], Tensor],
    engine: Engine,
    batch: int,
    what: str,
    *,
    tiles: bool = True,
    cancel: Callable[[], bool] | None = None,
    warn: Callable[[str], object] | None = None,
) -> Tensor:
    """Do `work` for a whole batch; where memory runs out, image by image, then with a VAE in tiles.

    Args:
        work: Called as `work(engine, images)`, `images` being the slice of the batch to work on; returns a tensor with
            that many rows.
        engine: Passed to `work`; replaced by its tiling version where needed.
        batch: Number of images.
        what: What is being done, for the error and the warning: "memory ran out while {what}".
        tiles: False for work that does not involve the VAE.
        cancel: Polled before each image where they are done one by one; True raises `Cancelled`.
        warn: Called with a sentence if tiles were needed, since they can leave faint seams.

    Returns:
        The results of `work`, concatenated along the batch.

    Raises:
        MemoryError: Not even one image fits. Other errors of `work` pass through.
    """
    whole = _attempt(work, engine, slice(0, batch))
    if not isinstance(whole, _Full):
        return whole
    full = whole
    parts: list[Tensor] = []
    able: Engine | None = engine
    if batch == 1:
        able = _in_tiles(engine, tiles)
    while able is not None and len(parts) < batch:
        stop_if(cancel)
        part = _attempt(work, able, slice(len(parts), len(parts) + 1))
        if isinstance(part, _Full):
            full, able = part, _in_tiles(able, tiles)
        else:
            parts.append(part)
    if len(parts) < batch:
        raise MemoryError(f"memory ran out while {what} ({full.said}); choose a smaller size or free memory.")
    if able is not engine and warn is not None:
        warn(f"memory ran out while {what}; it was done in tiles, which may leave faint seams.")
    return torch.cat(parts)


def _in_tiles(engine: Any, wanted: bool) -> Engine | None:
    return engine.in_tiles() if wanted and capabilities_of(engine).tiles else None


def _attempt(work: Callable[[Engine, slice], Tensor], engine: Engine, images: slice) -> Tensor | _Full:
    """What `work` returns, or how memory ran out; by then the failed attempt's tensors are freed."""
    try:
        return work(engine, images)
    except Exception as error:
        if not is_memory_error(error):
            raise
        said = first_line(error)
    free_memory(engine.device)
    return _Full(said)
