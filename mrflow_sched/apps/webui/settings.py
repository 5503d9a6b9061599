"""Our section of the host's settings page: the controls' first values, and what happens after a refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Literal

from mrflow_sched.apps.webui.controls import CHOICES, Controls

__all__ = ["INFO", "LABELS", "WHEN_REFUSED", "add_settings", "defaults", "register", "when_refused"]

SECTION = ("mrflow", "MrFlow")

WHEN_REFUSED = ("go on without MrFlow", "stop the job")
"""What happens when MrFlow cannot be used for a job, default first."""

LABELS = {
    "mrflow_enabled": "Switch MrFlow on when the page is loaded",
    "mrflow_preset": "Preset when the page is loaded",
    "mrflow_save_stages": "Save stage images when the page is loaded",
    "mrflow_when_refused": "When MrFlow cannot be used for a job",
}
INFO = {
    "mrflow_enabled": "also for API jobs that send no MrFlow arguments",
    "mrflow_when_refused": "a sentence under the image says why in both cases; a stopped API job ends in an error",
}


def register() -> None:
    """Add the settings to the running host; the hook for `on_ui_settings`."""
    shared = import_module("modules.shared")
    add_settings(shared.opts, shared.OptionInfo, import_module("gradio"))


def add_settings(opts: Any, option_info: Callable[..., Any], gr: Any) -> None:
    """Add our options to the host's settings.

    Args:
        opts: The host's options.
        option_info: The host's `OptionInfo`.
        gr: The gradio that the host runs on.
    """
    start = Controls()

    def add(key: str, default: Any, component: Any = None, args: dict[str, Any] | None = None) -> None:
        option = option_info(default, LABELS[key], component, args, section=SECTION)
        if key in INFO:
            option = option.info(INFO[key])
        if key != "mrflow_when_refused":
            option = option.needs_reload_ui()
        opts.add_option(key, option)

    add("mrflow_enabled", start.enabled, gr.Checkbox)
    add("mrflow_preset", start.preset, gr.Dropdown, {"choices": list(CHOICES["preset"])})
    add("mrflow_save_stages", start.save_stages, gr.Checkbox)
    add("mrflow_when_refused", WHEN_REFUSED[0], gr.Radio, {"choices": list(WHEN_REFUSED)})


def defaults(opts: Any) -> Controls:
    """Return the first values of the page's controls.

    Args:
        opts: The host's options. Settings that are missing or not allowed count as the built-in defaults.

    Returns:
        The controls.
    """
    known = Controls()
    preset = getattr(opts, "mrflow_preset", known.preset)
    return Controls(
        enabled=getattr(opts, "mrflow_enabled", known.enabled) is True,
        preset=preset if preset in CHOICES["preset"] else known.preset,
        save_stages=getattr(opts, "mrflow_save_stages", known.save_stages) is True,
    )


def when_refused(opts: Any, overrides: Mapping[str, Any] | None = None) -> Literal["go on", "stop"]:
    """Return what the user wants when MrFlow cannot be used for a job.

    Args:
        opts: The host's options.
        overrides: The job's own settings, which hosts put into the options only later.

    Returns:
        "go on" (make the image without MrFlow) or "stop" (make none).
    """
    chosen = (overrides or {}).get("mrflow_when_refused", getattr(opts, "mrflow_when_refused", None))
    return "stop" if chosen == WHEN_REFUSED[1] else "go on"
