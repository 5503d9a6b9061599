"""The final size that Hires. fix would give, which MrFlow takes over where the two are switched on together."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.plan.checks import is_number

__all__ = ["hires_note", "hires_target"]

_MAX_SCALE = 100.0


def hires_target(job: Mapping[str, Any], host_class: Any = None) -> tuple[int, int]:
    """Return the size that the host's Hires. fix would give to a job.

    Args:
        job: "width" and "height" in pixels, "hr_scale", "hr_resize_x" and "hr_resize_y" (0: from the other, or from the
            scale), and what else the host's method reads.
        host_class: The host's class of txt2img jobs. Its `calculate_target_resolution` is asked, because hosts round
            differently; None, or one whose method fails on `job`: the product is rounded down.

    Returns:
        (width, height) in pixels.

    Raises:
        MrFlowError: The scale is no number above 0 to 100, or a side is no whole number of pixels.
    """
    width, height = job["width"], job["height"]
    across, down = (_side(name, job.get(name)) for name in ("hr_resize_x", "hr_resize_y"))
    scale: Any = job.get("hr_scale")
    if not (across or down) and not (is_number(scale) and 0 < scale <= _MAX_SCALE):
        raise MrFlowError(f"hr_scale must be a number above 0 to {_MAX_SCALE:g}, got {quoted(scale)}.")
    asked = SimpleNamespace(**{**job, "hr_resize_x": across, "hr_resize_y": down, "extra_generation_params": {}})
    asked.truncate_x = asked.truncate_y = 0
    try:
        host_class.calculate_target_resolution(asked)
        if asked.truncate_x or asked.truncate_y:  # the host scales to cover the size, and crops to it
            return asked.hr_resize_x, asked.hr_resize_y
        return int(asked.hr_upscale_to_x), int(asked.hr_upscale_to_y)
    except Exception:
        if across or down:
            return across or down * width // height, down or across * height // width
        return int(width * scale), int(height * scale)


def _side(name: str, value: Any) -> int:
    if value is None:
        return 0
    if not is_number(value) or not 0 <= value < 2**31 or value != int(value):
        raise MrFlowError(f"{name} must be a whole number of pixels, 0 or more, got {quoted(value)}.")
    return int(value)


def hires_note(width: int, height: int) -> str:
    """Say which of two sizes counts.

    Args:
        width: Width of the final image in pixels.
        height: Its height.

    Returns:
        A sentence for the user.
    """
    return f"MrFlow replaces Hires. fix; its target {width}x{height} is the final size."
