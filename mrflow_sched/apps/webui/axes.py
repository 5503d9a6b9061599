"""Axes of the host's X/Y/Z plot. A value is kept in a new dict on the cell's own copy of the job, nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.webui.controls import AUTOMATIC, CHOICES, LABELS, Controls
from mrflow_sched.apps.webui.words import translated

__all__ = ["AXES", "PREFIX", "add_axes", "axis_label", "overrides", "register"]

PREFIX = "[MrFlow] "
ATTRIBUTE = "_mrflow_axes"

AXES: tuple[tuple[str, type], ...] = (
    ("sigma", float),
    ("low_steps", int),
    ("refine_steps", int),
    ("factor", float),
    ("preset", str),
    ("upscaler", str),
    ("solver", str),
    ("enabled", str),
    ("keep_composition", str),
)
"""Field of `Controls` and the type to which the plot converts its values, in the order of the menu (append only)."""

_SWITCHES = ("enabled", "keep_composition")
_SWITCH = {"true": True, "false": False}


def register() -> None:
    """Add our axes to the running host's plot; a hook for `on_before_ui`, safe to run again after a reload."""
    scripts = import_module("modules.scripts")
    shared = import_module("modules.shared")
    add_axes(scripts.scripts_data, lambda: [str(entry.name) for entry in shared.sd_upscalers])


def add_axes(scripts_data: Iterable[Any], upscaler_names: Callable[[], list[str]]) -> int:
    """Add our axes to the X/Y/Z plot, unless it has them already.

    Args:
        scripts_data: The host's scripts. The plot is recognised by its file's name, which is the same on every host;
            without a plot nothing happens.
        upscaler_names: Returns the names of the host's upscalers; called when the menu opens.

    Returns:
        How many axes were added.
    """
    added = 0
    for data in scripts_data:
        if os.path.basename(str(data.path)) != "xyz_grid.py":
            continue
        known = {option.label for option in data.module.axis_options}
        for name, kind in AXES:
            label = axis_label(name)
            if label not in known:
                data.module.axis_options.append(_option(data.module, label, name, kind, upscaler_names))
                added += 1
    return added


def axis_label(name: str) -> str:
    """Return the name of an axis in the plot's menu.

    Args:
        name: A field of `Controls`.

    Returns:
        Our prefix and the control's label, which does not repeat "MrFlow".
    """
    label = "Enabled" if name == "enabled" else LABELS[name].removeprefix("MrFlow ")
    return f"{PREFIX}{label[:1].upper()}{label[1:]}"


def overrides(p: Any) -> Mapping[str, Any]:
    """Return the values that the plot set for this cell.

    Args:
        p: The cell's job.

    Returns:
        Values by field of `Controls`; empty outside a plot.
    """
    return dict(getattr(p, ATTRIBUTE, None) or {})


def _option(module: Any, label: str, name: str, kind: type, upscaler_names: Callable[[], list[str]]) -> Any:
    choices = _choices(name, upscaler_names)
    extra = {} if choices is None else {"choices": choices}
    make = getattr(module, "AxisOptionTxt2Img", module.AxisOption)
    return make(label, kind, _applier(name), confirm=_confirmer(name, upscaler_names), **extra)


def _choices(name: str, upscaler_names: Callable[[], list[str]]) -> Callable[[], list[str]] | None:
    if name == "upscaler":
        return lambda: [AUTOMATIC, *upscaler_names()]
    if name in _SWITCHES:
        return lambda: ["True", "False"]
    if name in CHOICES:
        return lambda: list(CHOICES[name])
    return None


def _applier(name: str) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, x: Any, xs: Any) -> None:
        # A new dict each time: the cell is a shallow copy and would share the old one with every other cell.
        setattr(p, ATTRIBUTE, {**overrides(p), name: _value(name, x)})

    return apply


def _confirmer(name: str, upscaler_names: Callable[[], list[str]]) -> Callable[[Any, Iterable[Any]], None]:
    def confirm(p: Any, xs: Iterable[Any]) -> None:
        try:
            for x in xs:
                check(_value(name, x))
        except MrFlowError as error:
            raise MrFlowError(translated(str(error))) from error  # the host shows it on the page

    def check(value: Any) -> None:
        if name == "upscaler" and value != AUTOMATIC and value not in upscaler_names():
            raise MrFlowError(
                f"upscaler must be {AUTOMATIC!r} or one of {', '.join(upscaler_names())}, got {value!r}; choose "
                "it from the list."
            )
        Controls.from_args([{name: value}])

    return confirm


def _value(name: str, x: Any) -> Any:
    if name in _SWITCHES:
        return _SWITCH.get(str(x).strip().lower(), x)
    return x.strip() if isinstance(x, str) else x
