"""A1111's `parameters` text, which Forge and others write too."""

from __future__ import annotations

from mrflow_sched.images.foreign.run import ForeignRun, scale, sides, text, unusable, whole
from mrflow_sched.images.parameters import read_parameters
from mrflow_sched.plan.checks import MAX_SEED, MAX_STEPS

__all__ = ["read_a1111"]


def read_a1111(parameters: str) -> ForeignRun | None:
    """Read a run.

    Args:
        parameters: The text.

    Returns:
        The run; None where the text holds no prompt.
    """
    parts = read_parameters(parameters)
    values, prompt, negative = parts.values, text(parts.prompt.strip()), text(parts.negative.strip())
    if not prompt:
        return None
    seed, (width, height) = whole(values.get("Seed"), 0, MAX_SEED), sides(values.get("Size"))
    return ForeignRun(
        program="A1111",
        prompt=prompt,
        negative=negative or None,
        seed=seed,
        width=width,
        height=height,
        steps=whole(values.get("Steps"), 1, MAX_STEPS),
        guidance=scale(values.get("Distilled CFG Scale") or values.get("CFG scale")),
        unusable=unusable({"the seed": (values.get("Seed"), seed), "the size": (values.get("Size"), width)}),
    )
