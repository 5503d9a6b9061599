"""The solvers there are: names, order and cost. `sampling.solvers` has their mathematics, under the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

from mrflow_sched._runtime.errors import MrFlowError

__all__ = ["SOLVERS", "SOLVER_NAMES", "SolverInfo", "check_solver", "evaluated_sigmas", "solver_evaluations"]


@dataclass(frozen=True, slots=True)
class SolverInfo:
    """One solver: its `name` in plans, a `title` for people, its `order` of convergence, and how often it evaluates the
    network in a step that does not end at sigma 0 (`evaluations_per_step`; every step to 0 takes one)."""

    name: str
    title: str
    order: int
    evaluations_per_step: int = 1


_ALL = (
    SolverInfo("euler", "Euler", 1),
    SolverInfo("heun", "Heun", 2, evaluations_per_step=2),
    SolverInfo("multistep", "Adams-Bashforth 2", 2),
    SolverInfo("careful", "Adams-Bashforth 2 with error control", 2),
    SolverInfo("dpmpp_2m", "DPM-Solver++(2M)", 2),
)

SOLVERS: Mapping[str, SolverInfo] = MappingProxyType({solver.name: solver for solver in _ALL})
"""Every solver by name: the only list of them outside the functions themselves."""

SOLVER_NAMES: tuple[str, ...] = tuple(SOLVERS)


def check_solver(solver: object) -> SolverInfo:
    """The solver of that name. Raises MrFlowError listing the names there are."""
    found = SOLVERS.get(solver) if isinstance(solver, str) else None
    if found is None:
        raise MrFlowError(f"solver must be one of {', '.join(SOLVER_NAMES)}, got {solver!r}.")
    return found


def solver_evaluations(solver: str, steps: int) -> int:
    """How often a solver evaluates the network over `steps` steps that end at sigma 0, guidance not counted.

    Args:
        solver: a name of `SOLVERS`.
        steps: 0 or more.

    Returns:
        `steps` times the solver's evaluations per step, where the last step takes one.

    Raises:
        MrFlowError: for an unknown solver or a negative count.
    """
    each = check_solver(solver).evaluations_per_step
    if steps < 0:
        raise MrFlowError(f"steps must be 0 or more, got {steps!r}.")
    return max(each * steps - (each - 1), 0)


def evaluated_sigmas(solver: str, sigmas: Sequence[float]) -> tuple[float, ...]:
    """The sigma of every evaluation, in order: for Heun s0, s1, s1, s2, ..., as it also evaluates the end of each step.

    Evaluation j belongs to step j // evaluations_per_step. A list of one value or none has no evaluation.
    """
    if check_solver(solver).evaluations_per_step == 1:
        return tuple(sigmas[:-1])
    return tuple(sigma for step in pairwise(sigmas) for sigma in step if sigma > 0.0)
