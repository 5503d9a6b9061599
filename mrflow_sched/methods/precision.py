"""Stages in fewer bits: the network of stage 1, or of the later ones, quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.sampling.engine import capabilities_of
from mrflow_sched.sampling.method import Wrapper

if TYPE_CHECKING:
    from mrflow_sched.sampling.method import StageRun

__all__ = ["StagePrecision", "stage_precisions"]

_OWN = "own"


@dataclass(frozen=True)
class StagePrecision(Wrapper):
    """The network in another precision for some stages; all else is left to `inner`.

    What an image shows is settled in stage 1, at a low size; its last digits are lost where the image is upscaled.

    Attributes:
        first: Precision of stage 1, as the engine names it ("int8", ...; "own": as it was loaded).
        later: Of every later stage.
    """

    first: str = _OWN
    later: str = _OWN

    def stage(self, run: StageRun, latents: Tensor) -> Tensor:
        """Sample the stage as the inner method does, with the network in its precision.

        Args:
            run: The stage.
            latents: (B, *latent_shape), float32, at its first sigma.

        Returns:
            Clean latents in the shape of `latents`, float32.

        Raises:
            MrFlowError: The engine has one precision, or cannot have this one.
        """
        precision = self.later if run.index else self.first
        if precision == _OWN or not run.stage.sigmas:
            return self.inner.stage(run, latents)
        if not capabilities_of(run.engine).precisions:
            raise MrFlowError(
                f"{type(run.engine).__name__} runs its network in one precision; leave precision {precision} out."
            )
        engine: Any = run.engine
        return self.inner.stage(run.with_engine(engine.in_precision(precision)), latents)


def stage_precisions(precision: object) -> tuple[str, str]:
    """The precisions of stage 1 and of the later stages.

    Args:
        precision: One name for all stages, or a mapping with "stage1", "refine", or both; None: as loaded.

    Returns:
        (stage 1's, the later stages'); whether an engine can do them, it says itself.

    Raises:
        MrFlowError: It is none of these.
    """
    if precision is None:
        return _OWN, _OWN
    if isinstance(precision, str):
        return precision, precision
    names = ("stage1", "refine")
    if isinstance(precision, Mapping):
        found = cast("Mapping[object, object]", precision)
        if found and all(name in names and isinstance(value, str) for name, value in found.items()):
            return str(found.get("stage1", _OWN)), str(found.get("refine", _OWN))
    raise MrFlowError(
        "precision must be a name such as 'int8', or names by stage such as {'stage1': 'int8'} (stage1, refine), got "
        f"{quoted(cast('object', precision))}."
    )
