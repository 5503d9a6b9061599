"""Arguments of a pipeline's call that are no such thing, refused before a run begins."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.engines.diffusers.layouts.base import SCALE_ARGUMENTS, parameters

__all__ = ["check_arguments", "takes_a_number"]

_OTHER_KINDS = ("ist", "uple", "equence", "ensor", "ict", "allable", "Any", "str")
"""Endings of types that an annotation may allow besides numbers."""


def check_arguments(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse an argument whose type the pipeline's call cannot use.

    Args:
        pipe: A diffusers pipeline.
        arguments: Keyword arguments of its call.

    Raises:
        MrFlowError: The first one that is wrong.
    """
    known = parameters(pipe.__call__)
    for name, value in arguments.items():
        wanted = "" if value is None else _wanted(name, value, known.get(name))
        if wanted:
            raise MrFlowError(f"{name} must be {wanted}, got {quoted(value)}.")


def _wanted(name: str, value: Any, parameter: inspect.Parameter | None) -> str:
    """What an argument must be where its value is not that; "" where it is."""
    if name in SCALE_ARGUMENTS and not issubclass(type(value), dict):
        return "a dict such as {'scale': 0.8}"
    if name == "callback_on_step_end" and not callable(value):
        return "a function"
    if "prompt_embeds" in name and not _is_embedding(value):
        return "a tensor, or a list of tensors"
    if parameter is None or _fits(parameter, value):
        return ""
    return "one or several numbers" if _takes_more(parameter) else "a finite number"


def takes_a_number(parameter: inspect.Parameter) -> bool:
    """Whether a parameter of a library's function is for a number, or for True and False, as it is declared.

    Args:
        parameter: Its default and its annotation count.

    Returns:
        True also where it takes lists of numbers besides.
    """
    declared = re.search(r"\b(float|int|bool)\b", _declared(parameter)) is not None
    return (isinstance(parameter.default, (int, float)) or declared) and "str" not in _declared(parameter)


def _declared(parameter: inspect.Parameter) -> str:
    """The annotation as text; "" for none."""
    said: Any = parameter.annotation
    if said is inspect.Parameter.empty:
        return ""
    return said.__name__ if isinstance(said, type) else str(said)


def _fits(parameter: inspect.Parameter, value: object) -> bool:
    """Whether a value is a number where only a number is taken, and no text where numbers are."""
    if not takes_a_number(parameter):
        return True
    if isinstance(value, (str, bytes, dict)):
        return False
    if _takes_more(parameter):
        return True
    try:
        return math.isfinite(float(cast("Any", value)))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False


def _takes_more(parameter: inspect.Parameter) -> bool:
    return any(kind in _declared(parameter) for kind in _OTHER_KINDS)


def _is_embedding(value: Any) -> bool:
    """Whether a value is tensors at any depth of lists and dicts."""
    if isinstance(value, dict):
        return all(_is_embedding(each) for each in cast("dict[str, Any]", value).values())
    if isinstance(value, (list, tuple)):
        return all(_is_embedding(each) for each in cast("list[Any]", value))
    return value is None or isinstance(value, Tensor)
