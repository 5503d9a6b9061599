"""GET /mrflow/v1/schema: names, allowed values and defaults of the script's API arguments.

POST /mrflow/v1/plan: what a job would do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import mrflow_sched
from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.apps.webui.controls import AUTOMATIC, CHOICES, FIELDS, LABELS, LIMITS, MIN_SIGMA, Controls
from mrflow_sched.apps.webui.drafts import FINISH
from mrflow_sched.apps.webui.expected import LEAST
from mrflow_sched.apps.webui.host import refiner_refusal
from mrflow_sched.apps.webui.ui import Preview, finish_line, preview, refusal

__all__ = ["PLAN_ROUTE", "ROUTE", "plan", "register", "schema"]

ROUTE = "/mrflow/v1/schema"
PLAN_ROUTE = "/mrflow/v1/plan"

_SIZE = {"width": 512, "height": 512}
"""What hosts take where a body for txt2img names no size."""

_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string"}


def register(demo: Any, app: Any) -> None:
    """Add the routes to the host's app, once; the hook for `on_app_started`.

    Args:
        demo: The host's gradio page, or None; not used.
        app: The host's FastAPI app.
    """
    known = {getattr(route, "path", None) for route in app.routes}
    if ROUTE not in known:
        app.add_api_route(ROUTE, schema, methods=["GET"], name="mrflow_schema")
    if PLAN_ROUTE not in known:
        app.add_api_route(PLAN_ROUTE, plan, methods=["POST"], name="mrflow_plan")


def schema() -> dict[str, Any]:
    """Describe every argument, in positional order.

    Returns:
        JSON values: the arguments, and an example body for POST /sdapi/v1/txt2img.
    """
    example = {"enabled": True, "preset": "12+1", "factor": 2.0}
    return {
        "version": mrflow_sched.__version__,
        "script": "mrflow",
        "args": "a list in the order of 'arguments' (a shorter one leaves the rest at the page's defaults), or one "
        "object with these names as its only entry; such an object switches MrFlow on unless it says otherwise",
        "size": "width and height are those of the finished image",
        "arguments": [_argument(name) for name in FIELDS],
        "finish": "an object {'finish': X}, or X behind the arguments of a list, finishes drafts: X is a draft's image "
        "in base64, or its metadata as text, or a list of these",
        "example": {
            "prompt": "a lighthouse on a cliff, evening light",
            "width": 1024,
            "height": 1024,
            "seed": 1,
            "alwayson_scripts": {"mrflow": {"args": [example]}},
        },
    }


def _argument(name: str) -> dict[str, Any]:
    default = getattr(Controls(), name)
    entry: dict[str, Any] = {
        "name": name,
        "label": LABELS[name],
        "type": _KINDS[type(default)],
        "default": default,
    }
    if name in LIMITS:
        low, high, step = LIMITS[name]
        entry.update(minimum=low, maximum=high, step=step)
    if name in ("low_steps", "refine_steps", "sigma"):
        entry["zero"] = "from the preset"
    if name == "sigma":
        entry["minimum_above_zero"] = MIN_SIGMA
    if name in CHOICES:
        entry["choices"] = list(CHOICES[name])
    if name == "preset":
        entry["pattern"] = "N+M: low-resolution steps + refine steps, where no choice fits"
    if name == "upscaler":
        entry["choices_at"] = f"{AUTOMATIC!r}, or a name from GET /sdapi/v1/upscalers"
    return entry


# ------------------------------------------------------------------------------------------------------------- the plan


def plan(body: dict[str, Any]) -> dict[str, Any]:
    """Answer what a job would do, without running it.

    Args:
        body: As for POST /sdapi/v1/txt2img, or the script's arguments under "args": a list, or one object.

    Returns:
        JSON values. "refused" is the sentence that says why the job cannot run, and the only entry then; else None. Of
            a job that finishes drafts, which are not read here, only "line" is told.
    """
    try:
        waiting = _waiting(_arguments(body))
        if waiting:
            return {"refused": None, "line": finish_line(waiting)}
        return _answer(_preview(body))
    except Exception as error:
        return {"refused": refusal(error)}


def _preview(body: Mapping[str, Any]) -> Preview:
    sentence = refiner_refusal(body.get("refiner_checkpoint"))
    if sentence is not None:
        raise MrFlowError(sentence)
    controls = Controls.from_args(_arguments(body))
    if not controls.enabled:
        raise MrFlowError("MrFlow is off: enabled is false; send true to switch it on.")
    return preview(controls, {**_SIZE, **{key: value for key, value in body.items() if value is not None}})


def _arguments(body: Mapping[str, Any]) -> Any:
    """Return the script's arguments; those of the defaults, switched on, where there are none."""
    if "args" in body:
        given = body["args"]
    else:
        scripts = _object(body.get("alwayson_scripts") or {}, "alwayson_scripts")
        [entry, *_] = [value for name, value in scripts.items() if name.lower() == "mrflow"] or [{}]
        given = _object(entry, "alwayson_scripts.mrflow").get("args", {})
    # Behind the controls a list may go on with drafts to finish.
    if isinstance(given, list) and len(cast("list[Any]", given)) == len(FIELDS) + 1:
        return cast("list[Any]", given)[:-1]
    return [cast("dict[str, Any]", given)] if isinstance(given, dict) else cast("Any", given)


def _waiting(args: Any) -> int:
    """Return how many drafts the arguments ask to finish."""
    first: Any = cast("list[Any]", args)[0] if isinstance(args, list) and args else None
    finish: Any = cast("dict[str, Any]", first).get(FINISH) if isinstance(first, dict) else None
    return len(cast("list[Any]", finish)) if isinstance(finish, list) else int(bool(finish))


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MrFlowError(f"{name} must be an object, got {quoted(value)}.")
    return cast("dict[str, Any]", value)


def _answer(made: Preview) -> dict[str, Any]:
    recipe, expected = made.recipe, made.expected
    faster = None
    if expected is not None and expected.faster >= LEAST:
        faster = {"faster": round(expected.faster, 2), "than_steps": expected.than_steps}
    return {
        "refused": None,
        "line": made.line,
        "notes": list(made.notes),
        "family": made.model.family.name,
        "model": made.model.title,
        "low": [recipe.low_width, recipe.low_height],
        "final": [recipe.width, recipe.height],
        "low_steps": recipe.low_steps,
        "refine_steps": recipe.refine_steps,
        "sigma": recipe.sigma,
        "solver": recipe.solver,
        "upscaler": recipe.upscaler,
        "noise": recipe.plan.noise,
        "experimental": recipe.experimental,
        "sigmas": {
            "first": None if recipe.first_sigmas is None else list(recipe.first_sigmas),
            "refine": list(recipe.refine_sigmas),
        },
        "expected": faster,
    }
