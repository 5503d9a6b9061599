"""All numbers of a run, decided before any tensor exists. Nothing here needs torch."""

from mrflow_sched.plan.make import make_native_plan, make_plan, make_sized_plan
from mrflow_sched.plan.options import OPTIONS, Option, PlanOptions
from mrflow_sched.plan.sizes import fit_box
from mrflow_sched.plan.solver_table import SOLVER_NAMES, solver_evaluations
from mrflow_sched.plan.stages import Stage, StagedPlan

__all__ = [
    "OPTIONS",
    "SOLVER_NAMES",
    "Option",
    "PlanOptions",
    "Stage",
    "StagedPlan",
    "fit_box",
    "make_native_plan",
    "make_plan",
    "make_sized_plan",
    "solver_evaluations",
]
