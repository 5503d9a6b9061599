"""TrigFlow: times that are angles, as consistency models such as SanaSprint have them.

A state is cos(t) x0 + sin(t) noise. It has the signal-to-noise ratio of the flow sigma sin t / (sin t + cos t).
Source: Lu and Song 2024 (arXiv 2410.11081), and diffusers SanaSprintPipeline and SCMScheduler.
"""

from __future__ import annotations

import math

from mrflow_sched.plan.checks import MAX_STEPS, checked_number, checked_whole
from mrflow_sched.plan.schedule import Sigmas, evenly, validate_sigmas

__all__ = ["angle_of", "sigma_of_angle", "trigflow_sigmas"]


def angle_of(sigma: float) -> float:
    """The angle with the signal-to-noise ratio of a flow sigma.

    Args:
        sigma: Noise fraction in [0, 1].

    Returns:
        t from 0 to pi/2.
    """
    return math.atan2(sigma, 1.0 - sigma)


def sigma_of_angle(angle: float) -> float:
    """Inverse of `angle_of`.

    Args:
        angle: t from 0; above pi/2 it counts as pi/2.

    Returns:
        Noise fraction in [0, 1].
    """
    tangent = math.tan(angle) if angle < math.pi / 2 - 1e-9 else math.inf
    return 1.0 if math.isinf(tangent) else tangent / (1.0 + tangent)


def trigflow_sigmas(steps: int, middle: float | None = None) -> Sigmas:
    """Evenly spaced angles from pi/2 to 0, in flow sigma.

    Args:
        steps: 1 to 1000.
        middle: The angle in the middle of two steps, 0.01 to 1.56 (SanaSprint: 1.3); None: pi/4.

    Returns:
        steps + 1 floats from exactly 1.0 to exactly 0.0.

    Raises:
        MrFlowError: A number is out of its range, or a middle for another number of steps.
    """
    steps = checked_whole(steps, "steps", 1, MAX_STEPS)
    angles = evenly(math.pi / 2, 0.0, steps + 1)[1:-1]
    if middle is not None:
        checked_whole(steps, "steps", 2, 2, "an angle in the middle is for two steps")
        angles = [checked_number(middle, "middle", 0.01, 1.56, "SanaSprint has 1.3")]
    return validate_sigmas([1.0, *(sigma_of_angle(angle) for angle in angles), 0.0], "sigmas")
