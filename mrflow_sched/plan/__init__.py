"""All numbers of a run, decided before any tensor exists. Nothing here needs torch."""

from mrflow_sched.plan.checks import SOLVER_NAMES
from mrflow_sched.plan.make import expected_speedup, make_native_plan, make_plan, solver_evaluations
from mrflow_sched.plan.sizes import fit_box
from mrflow_sched.plan.stages import Stage, StagedPlan

__all__ = [
    "SOLVER_NAMES",
    "Stage",
    "StagedPlan",
    "expected_speedup",
    "fit_box",
    "make_native_plan",
    "make_plan",
    "solver_evaluations",
]
