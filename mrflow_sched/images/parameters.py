"""The `parameters` text that other programs show of an image: prompt, negative prompt, and a line of `Name: value`.

The layout is that of AUTOMATIC1111's PNG info, which WebUIs, image viewers and model sites read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from mrflow_sched.plan.solver_table import SOLVERS
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from mrflow_sched.images.record import RunRecord

PARAMETERS = "parameters"
"""Key of the text in an image file."""

_NEGATIVE = "Negative prompt:"
_FIRST = "Steps: "
_VALUE = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


@dataclass(frozen=True)
class Parameters:
    """A `parameters` text in its parts.

    Attributes:
        prompt: The prompt, line by line as it was written.
        negative: The negative prompt; empty where there was none.
        values: The values of the last line by name, as they were written; the first one where a name comes twice.
    """

    prompt: str
    negative: str
    values: Mapping[str, str]


def read_parameters(text: str) -> Parameters:
    """Read a `parameters` text, of any program that writes like A1111.

    Args:
        text: The text. The last line that begins with "Steps: " holds the values; a text without one is all prompt.

    Returns:
        Its parts; a value that is quoted and damaged is left out.
    """
    lines = text.strip().split("\n")
    last = next((at for at in range(len(lines) - 1, -1, -1) if lines[at].startswith(_FIRST)), len(lines))
    values: dict[str, str] = {}
    for match in _VALUE.finditer(lines[last] if last < len(lines) else ""):
        value = match[2].strip()
        if value.startswith('"'):
            try:
                value = str(json.loads(value))
            except ValueError:
                continue
        values.setdefault(match[1].strip(), value)
    written = lines[:last]
    split = next((at for at, line in enumerate(written) if line.startswith(_NEGATIVE)), len(written))
    negative = "\n".join(written[split:]).removeprefix(_NEGATIVE).removeprefix(" ")
    return Parameters("\n".join(written[:split]), negative, values)


def parameters_text(record: RunRecord) -> str:
    """What a record says, as the text for the key `parameters`.

    Args:
        record: How the image was made.

    Returns:
        The prompt; a line "Negative prompt: ..." where there is one; and a line with steps, solver and guidance of the
        first stage that ran, the seed that makes this image alone, the final size, the model's name, the image that the
        run started from with the fraction of noise that it was given, how the image was made where it is a preview of
        all this, and what MrFlow did.

    Raises:
        MrFlowError: The record's plan cannot be read.
    """
    plan = StagedPlan.from_string(record.plan)
    enlarged = record.start is not None and record.strength is None
    first, *later = plan.stages[enlarged:] or plan.stages
    values = {
        "Steps": str(first.steps),
        "Sampler": SOLVERS[first.solver].title if first.solver in SOLVERS else first.solver,
        "CFG scale": f"{first.guidance:g}",
        "Seed": str(record.seed + record.image),
        "Size": f"{plan.requested_width}x{plan.requested_height}",
        "Model": PureWindowsPath(PurePosixPath(record.model).name).name,
    }
    if record.start is not None:
        values["Denoising strength"] = f"{first.start_sigma if record.strength is None else record.strength:g}"
        values["Source image"] = record.start
    if later:
        values["Refine steps"] = "+".join(str(stage.steps) for stage in later)
        values["Refine sigma"] = " ".join(f"{stage.start_sigma:g}" for stage in later)
    if len(plan.stages) > 1:
        values["Upscaler"] = record.upscaler
    if record.preview is not None:
        values["Preview"] = record.preview
    if "mrflow-sched" in record.versions:
        values["Version"] = f"mrflow-sched {record.versions['mrflow-sched']}"
    lines = [record.prompt]
    if record.negative:
        lines.append(f"{_NEGATIVE} {record.negative}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in values.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """A value as it stands in the line: quoted where it holds what separates values."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',\n:"') else value
