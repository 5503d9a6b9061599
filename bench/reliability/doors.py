"""The ways into the package for values that a fuzzer makes, as every version has them; run in a child."""

from __future__ import annotations

import contextlib
import inspect
import io
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.reliability import subjects

LONGEST_WAIT = 3.0
"""CPU seconds that one input may take."""
LONGEST_SENTENCE = 3000


def _plan(maker: str) -> Callable[[Any], object]:
    def call(value: tuple[Any, Any, Any, Mapping[str, Any]]) -> object:
        import mrflow_sched

        family, width, height, options = value
        make = getattr(mrflow_sched, maker)
        taken = inspect.signature(make).parameters
        open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
        return _use(make(family, width, height, **{k: v for k, v in options.items() if open_ended or k in taken}))

    return call


def _use(plan: Any) -> object:
    from mrflow_sched import StagedPlan

    return plan.cost_ratio, StagedPlan.from_string(plan.to_string()), StagedPlan.from_json(plan.to_json())


def _line(text: str) -> object:
    from mrflow_sched import StagedPlan

    return _use(StagedPlan.from_string(text))


def _json(text: str) -> object:
    from mrflow_sched import StagedPlan

    return _use(StagedPlan.from_json(text))


def _record(text: str) -> object:
    records = subjects.first("mrflow_sched.images.record", "mrflow_sched.record")
    return _line(records.RunRecord.from_json(text).plan)


def _calibration(text: str) -> object:
    from mrflow_sched import get_family, make_plan

    measured = subjects.first("mrflow_sched.measure.calibrate", "mrflow_sched.calibrate")
    found = measured.Calibration.from_json(text)
    return _use(make_plan(found.apply(get_family(found.family)), 1024, 1024))


def _controls(value: Any) -> object:
    page = subjects.first("mrflow_sched.apps.webui.controls", "mrflow_sched.webui.controls")
    return page.Controls.from_args([page.Controls.from_args(value).to_dict()])


def _command(words: list[str]) -> object:
    """A command line, whose sentence has to fit its exit code."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = subjects.command(words)
    text = said.getvalue()
    if any(ord(letter) < 32 and letter not in "\t\r\n" for letter in text):
        raise AssertionError(f"control characters: {ascii(text)[-200:]}")
    if code not in (0, 2):
        last = text.strip().splitlines()[-3:]
        raise AssertionError(f"exit code {code}: {' '.join(last)}")
    return code


def _bad(value: int) -> object:
    return 1 / value


DOORS: dict[str, Callable[[Any], object]] = {
    "make_plan": _plan("make_plan"),
    "make_native_plan": _plan("make_native_plan"),
    "plan line": _line,
    "plan JSON": _json,
    "record": _record,
    "calibration": _calibration,
    "controls": _controls,
    "command line": _command,
    "known bad": _bad,
}


def try_all(door: str, path: str) -> list[tuple[str, str]]:
    """Give every value of a pickled list to a door; kind of fault and what was said, of each wrong one."""
    call, refusal = DOORS[door], subjects.refusal()
    wrong: list[tuple[str, str]] = []
    for value in pickle.loads(Path(path).read_bytes()):
        sys.argv = ["mrflow"]
        began = time.process_time()
        try:
            call(value)
        except refusal as error:
            if len(str(error)) > LONGEST_SENTENCE:
                wrong.append(("traceback", f"a sentence of {len(str(error))} letters: {str(error)[:80]}"))
            elif any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in str(error)):
                wrong.append(("control characters", ascii(str(error))[:200]))
        except Exception as error:
            wrong.append(("traceback", f"{type(error).__name__}: {error!s:.150} from {value!a:.150}"))
        if time.process_time() - began > LONGEST_WAIT:
            wrong.append(("over time", f"{value!a:.200}"))
    return wrong
