"""GET /mrflow/v1/schema: names, allowed values and defaults of the script's API arguments."""

from __future__ import annotations

from typing import Any

import mrflow_sched
from mrflow_sched.apps.webui.controls import AUTOMATIC, CHOICES, FIELDS, LABELS, LIMITS, MIN_SIGMA, Controls

__all__ = ["ROUTE", "register", "schema"]

ROUTE = "/mrflow/v1/schema"

_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string"}


def register(demo: Any, app: Any) -> None:
    """Add the route to the host's app, once; the hook for `on_app_started`.

    Args:
        demo: The host's gradio page, or None; not used.
        app: The host's FastAPI app.
    """
    if all(getattr(route, "path", None) != ROUTE for route in app.routes):
        app.add_api_route(ROUTE, schema, methods=["GET"], name="mrflow_schema")


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
