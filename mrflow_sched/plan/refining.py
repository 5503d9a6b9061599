"""How an image that no network upscaled is refined: more noise and more steps than a preset has for a network's."""

from __future__ import annotations

from dataclasses import replace

from mrflow_sched.plan.checks import UpscalerKind
from mrflow_sched.plan.families.base import Family, Preset, steps_in

__all__ = ["UNAIDED_SIGMA", "UNAIDED_STEPS", "for_upscaler"]

# 44 scenes of the embedded model, half with fine detail, composite with Lanczos (`python -m bench.quality --sweep
# upscalers`): 1 step from .12 .735, 1 from .45 .844, 1 from .6 .867, 2 from .45 .837, 2 from .6 .845, 4 from .6 .853.
# One step gives the mean of what is possible; this world's captions fix that, those of large models do not: so two.
UNAIDED_STEPS, UNAIDED_SIGMA = 2, 0.45
"""Refine steps, and the sigma that they start from, where interpolation upscales the image."""
_FEW_STEPS = 8
"""A model distilled to fewer native steps takes one refine step: a second one would cost half of a native run."""


def for_upscaler(family: Family, preset: Preset, kind: UpscalerKind, *, counted: bool = False) -> Preset:
    """A preset as it is for a kind of upscaler.

    With "network" it stays as it is. With "interpolation", which adds no detail, refining starts at `UNAIDED_SIGMA` and
    takes `UNAIDED_STEPS`: a family's default of 12+1 becomes 12+2 from .45, and so do the tiers "fast", "balanced" and
    "best". Steps that the user counted, by a name such as "12+1", stay what they say: 1 step, from .45. A preset that
    was measured with its upscaler (`Preset.measured`), one without refine steps, and one that starts higher keep their
    own.

    Args:
        family: Whose preset it is.
        preset: As the family has it.
        kind: What upscales the image.
        counted: Keep its number of refine steps: the user's name of it counts them (`steps_in`), or sigma was given.

    Returns:
        The preset; its name tells its steps where it counted steps before.
    """
    if kind == "network" or preset.measured or preset.refine_steps == 0 or preset.sigma > UNAIDED_SIGMA:
        return preset
    steps = preset.refine_steps
    if not counted and family.native_steps >= _FEW_STEPS:
        steps = max(steps, UNAIDED_STEPS)
    name = f"{preset.low_steps}+{steps}" if steps_in(preset.name) else preset.name
    return replace(preset, name=name, refine_steps=steps, sigma=UNAIDED_SIGMA)
