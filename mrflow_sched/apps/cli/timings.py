"""The file of --timings: what `mrflow compare --json` printed on this machine."""

from __future__ import annotations

import json
from pathlib import Path

from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched.apps.cli.inputs import read_small
from mrflow_sched.plan.cost import Speeds
from mrflow_sched.plan.stages import StagedPlan


def measured_speeds(family: str, path: Path) -> Speeds:
    """How fast the machine is that `mrflow compare --json` was run on.

    Args:
        family: Name of the family that is planned for.
        path: The file.

    Returns:
        The speeds, for that family.

    Raises:
        MrFlowError: The file cannot be read, is of another family, or does not separate the parts.
    """
    wanted = "what `mrflow compare --json` printed"
    data = read_small(path, "--timings", wanted)
    try:
        found = json.loads(data)
        measured = StagedPlan.from_string(found["plan"])
        seconds = {str(part["name"]): part["seconds"] for part in found["stages"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MrFlowError(
            f"--timings is {str(path)!r}, which cannot be read ({first_line(error)}); give {wanted}."
        ) from error
    if measured.family != family:
        raise MrFlowError(
            f"--timings is {str(path)!r}, which is of family {measured.family}, not {family}; compare this model."
        )
    try:
        return Speeds.measured(measured, seconds)
    except MrFlowError as error:
        raise MrFlowError(f"--timings is {str(path)!r}, which does not fit: {error}") from error
