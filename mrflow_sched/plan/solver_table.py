"""The solvers that exist: names, order and cost. `sampling.solvers` has their formulas, under the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.plan.checks import MAX_STEPS, checked_whole

__all__ = ["SOLVERS", "SOLVER_NAMES", "SolverInfo", "check_solver", "evaluated_sigmas", "solver_evaluations"]


@dataclass(frozen=True, slots=True)
class SolverInfo:
    """One solver.

    Attributes:
        name: Its name in plans.
        title: Its name for people.
        order: Order of convergence.
        evaluations_per_step: Network evaluations in a step that does not end at sigma 0; every step to 0 takes one.
    """

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
    """The solver of a name.

    Args:
        solver: A name of `SOLVERS`.

    Returns:
        Its entry in the table.

    Raises:
        MrFlowError: The name is unknown; the sentence lists those that exist.
    """
    found = SOLVERS.get(solver) if isinstance(solver, str) else None
    if found is None:
        raise MrFlowError(f"solver must be one of {', '.join(SOLVER_NAMES)}, got {quoted(solver)}.")
    return found


def solver_evaluations(solver: str, steps: int) -> int:
    """How often a solver evaluates the network over several steps that end at sigma 0, guidance not counted.

    Args:
        solver: A name of `SOLVERS`.
        steps: 0 to 1000.

    Returns:
        `steps` times the solver's evaluations per step, where the last step takes one.

    Raises:
        MrFlowError: The solver is unknown, or `steps` is out of range.
    """
    each = check_solver(solver).evaluations_per_step
    count = checked_whole(steps, "steps", 0, MAX_STEPS)
    return max(each * count - (each - 1), 0)


def evaluated_sigmas(solver: str, sigmas: Sequence[float]) -> tuple[float, ...]:
    """The sigma of every network evaluation, in order.

    Heun evaluates the end of each step too: s0, s1, s1, s2, ... Evaluation j belongs to step
    j // evaluations_per_step.

    Args:
        solver: A name of `SOLVERS`.
        sigmas: A schedule that ends in 0; fewer than two values have no evaluation.

    Returns:
        `solver_evaluations` values for the schedule's steps, each above 0.

    Raises:
        MrFlowError: The solver is unknown.
    """
    if check_solver(solver).evaluations_per_step == 1:
        return tuple(sigmas[:-1])
    return tuple(sigma for step in pairwise(sigmas) for sigma in step if sigma > 0.0)
