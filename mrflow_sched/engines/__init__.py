"""Engines: what encodes text, predicts, encodes and decodes images for one model in one library.

`Engine` is the role (a protocol); `PipelineEngine` is any text-to-image pipeline of diffusers; `GaussianFieldEngine`
and `MixtureEngine` have closed-form answers, for tests and documentation. `MrFlowScheduler` puts our schedules and
solvers into any diffusers pipeline. Importing this package imports neither torch nor any model library: names are
loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrflow_sched.engines.analytic import GaussianFieldEngine, MixtureEngine
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
    from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler
    from mrflow_sched.sampling.engine import Engine

__all__ = ["Engine", "GaussianFieldEngine", "MixtureEngine", "MrFlowScheduler", "PipelineEngine"]

_HOMES = {
    "Engine": "mrflow_sched.sampling.engine",
    "PipelineEngine": "mrflow_sched.engines.diffusers.pipeline",
    "GaussianFieldEngine": "mrflow_sched.engines.analytic",
    "MixtureEngine": "mrflow_sched.engines.analytic",
    "MrFlowScheduler": "mrflow_sched.engines.diffusers.scheduler",
}


def __getattr__(name: str) -> Any:
    """Load the module that defines a public name on first use (PEP 562).

    Args:
        name: One of `__all__`.

    Returns:
        The class of that name.

    Raises:
        AttributeError: Another name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
