"""What a user should know about a plan, in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mrflow_sched.plan.checks import MAX_FACTOR, MIN_FACTOR
from mrflow_sched.plan.families import FAMILIES, Family
from mrflow_sched.plan.refining import UNAIDED_SIGMA
from mrflow_sched.plan.sizes import fit_box, stage_sizes

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import Stage, StagedPlan

LEAST_TOKENS = 64
"""An image of fewer tokens, such as 128x128 where one covers 16x16 pixels, holds no picture."""
MOST_GUIDANCE = 3
"""Guidance of stage 1 above this many times the usual scale is noted; at 4 times the embedded model draws grids."""
# Start sigmas outside this range have only been seen to fail (docs/method.md, section 5.1): a note says so.
USUAL_SIGMA = (0.02, 0.6)
# Of several refine steps: six from 0.75 keep the image (docs/kinds.md).
DEEPEST_SIGMA = 0.9
# Noted where stage 1 has more than this many times the native area: FLUX.1's makers state up to two megapixels; other
# families not measured.
LARGEST_AREA = 2.0
# Rounding to the grid may take this share of a side before a note calls a stage too small.
SIDE_SLACK = 0.95


OF_STAGE_1 = ("low_steps", "sigmas", "mu", "shift_tokens", "guidance_interval", "noise")
"""Options that decide how stage 1 is sampled, and nothing else."""
LONGEST_SHAPE = 4.0
"""Longer strips than this many to one are not among the sizes that families are trained on."""
SLIGHT_AREA = 0.005
"""A share by which an area may differ from another one that it is said to be."""
# A relative change of shape between two stages up to this is not visible.
SLIGHT_STRETCH = 0.002


# ------------------------------------------------------------------------------------------------------------- notes


def plan_notes(
    plan: StagedPlan, family: Family | None = None, *, stretches: bool = False, grid: int | None = None
) -> tuple[str, ...]:
    """What a user should know about a plan: what was rounded or cropped, and where it leaves tested ground.

    Args:
        plan: The plan.
        family: Its family; None: the known one of its name, if there is one.
        stretches: An image is stretched into the next stage's shape; False: it is cropped at the centre.
        grid: Pixels of which the sides of the final image are multiples; None: the family's grid.

    Returns:
        Sentences for the user, often none.
    """
    known = FAMILIES.get(plan.family) if family is None else family
    notes = [
        *size_notes(plan, known, stretches=stretches, grid=grid),
        *_refine_notes(plan, known),
        *tile_notes(plan, known),
    ]
    if known is not None:
        notes.extend(_guidance_notes(plan, known))
    if known is not None and len(plan.stages) > 1 and known.prediction != "flow" and not known.rescaled_flow:
        notes.append(
            f"{known.title} is not a flow model: sigmas are converted at equal signal-to-noise ratio, which the "
            "method's authors have not tested."
        )
    if len(plan.stages) > 1 and plan.cost_ratio < 1.0:
        notes.append(f"This plan costs {1 / plan.cost_ratio:.2f} times as much as {plan.native_steps} native steps.")
    return tuple(notes)


def tile_notes(plan: StagedPlan, family: Family | None) -> tuple[str, ...]:
    """What a user should know about the tiles of a plan.

    Args:
        plan: The plan.
        family: Its family; None: what its network is told is unknown.

    Returns:
        Sentences for the user, often none.
    """
    if not plan.tile:
        return ()
    if not any(map(plan.tiled, range(len(plan.stages)))):
        return (f"tile={plan.tile} has no effect: no later stage has a larger side.",)
    made = family is not None and family.pipeline is not None and family.pipeline.positions == "made"
    return (own_image_note(family),) if family is not None and made and plan.tile_positions == "whole" else ()


def own_image_note(family: Family) -> str:
    """What it means for tiles that a network makes positions by itself.

    Args:
        family: The family.

    Returns:
        A sentence for the user.
    """
    return f"Each tile is an image of its own to {family.title}, whose network is not told positions."


def chosen_note(plan: StagedPlan, family: Family) -> str:
    """Which sizes were chosen for the stages of a large image, and why.

    Args:
        plan: The plan.
        family: Its family.

    Returns:
        A sentence for the user.
    """
    *before, last = (f"{stage.width}x{stage.height}" for stage in plan.stages)
    usual = "x".join(map(str, stage_sizes(family, plan.width, plan.height, (family.factor,))[0]))
    first = plan.stages[0]
    shape = max(first.width, first.height) / min(first.width, first.height)
    share = first.width * first.height / math.prod(family.native_size)
    near = "the area" if abs(share - 1.0) < SLIGHT_AREA else f"{share:.0%} of the area"
    strip = f" A strip of {shape:.3g}:1 may show repeated content all the same." if shape > LONGEST_SHAPE else ""
    return (
        f"{len(plan.stages)} stages were chosen, {', '.join(before)} and {last}: stage 1 has {near} that "
        f"{family.title} is made for, where the usual factor would begin at {usual}. Give stages, factor or factors "
        f"for others.{strip}"
    )


def image_notes(plan: StagedPlan, width: int, height: int, strength: float | None = None) -> tuple[str, ...]:
    """The notes of a plan that hold for a run from an image, and what becomes of the image.

    Args:
        plan: The plan.
        width: Width of the image in pixels, as it was given.
        height: Its height.
        strength: The sigma at which stage 1 starts from it; None: it replaces stage 1.

    Returns:
        Sentences for the user, often none.
    """
    stages = plan.stages
    target = stages[0] if strength is not None else stages[min(1, len(stages) - 1)]
    crop = fitting_note(f"The image of {width}x{height}", (width, height), (target.width, target.height))
    kept = [note for note in plan.notes if strength is not None or not note.startswith("Stage 1 at")]
    notes = [*kept, *([] if crop is None else [crop])]
    refined = stages[1].start_sigma if len(stages) > 1 and stages[1].sigmas else 0.0
    if strength is not None and strength < refined:
        notes.append(
            f"strength={strength:g} is below the sigma {refined:g} at which the refine stage starts, which changes the "
            "image more than stage 1 does; lower sigma too, or leave strength out."
        )
    return tuple(notes)


def idle_notes(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Which options have no effect where an image replaces stage 1.

    Args:
        options: Those of the plan that were given; None counts as left out.

    Returns:
        Sentences for the user, often none.
    """
    idle = [name for name in OF_STAGE_1 if options.get(name) is not None]
    if not idle:
        return ()
    return (
        f"The image replaces stage 1, so {' and '.join(idle)} had no effect; give strength too, to start stage 1 from "
        "the image.",
    )


def fitting_note(what: str, size: tuple[int, int], target: tuple[int, int]) -> str | None:
    """What is lost where an image of one shape is fitted to another.

    Args:
        what: Names the image at the beginning of the sentence.
        size: Its (width, height) in pixels.
        target: The (width, height) that it fills.

    Returns:
        A sentence for the user; None where the shapes agree and nothing is cropped.
    """
    width, height, _, _ = fit_box(*size, *target)
    if (width, height) == target:
        return None
    share = 1.0 - math.prod(target) / (width * height)
    return (
        f"{what} is not shaped like {target[0]}x{target[1]}"
        f": it is {'upscaled' if width > size[0] else 'resized'} to {width}x{height} and cropped at the centre, "
        f"losing {share:.1%} of the image."
    )


def size_notes(
    plan: StagedPlan, family: Family | None, *, stretches: bool = False, grid: int | None = None
) -> tuple[str, ...]:
    """The notes on sizes alone: what was rounded, cropped or stretched, and what lies outside the model's range.

    Args:
        plan: The plan.
        family: Its family; None: the model's range is unknown.
        stretches: As in `plan_notes`.
        grid: As in `plan_notes`.

    Returns:
        Sentences for the user, often none.
    """
    multiple = grid if grid is not None or family is None else family.grid
    trimmed = grid is None and not stretches
    notes = [
        *_rounding_notes(plan, stretches, multiple, trimmed),
        *([] if family is None else _range_notes(plan, family)),
    ]
    return tuple(notes)


def _rounding_notes(plan: StagedPlan, stretches: bool, grid: int | None, trimmed: bool) -> list[str]:
    notes: list[str] = []
    if (plan.width, plan.height) != (plan.requested_width, plan.requested_height):
        where = "on the model's grid" if grid is None else f"in multiples of {grid} pixels"
        made = f"The requested {plan.requested_width}x{plan.requested_height} is made at {plan.width}x{plan.height}, "
        notes.append(made + (f"{where}, and trimmed at its edges." if trimmed else f"the nearest size {where}."))
    for number, (small, large) in enumerate(pairwise(plan.stages), start=2):
        scale = max(large.width / small.width, large.height / small.height)
        if not MIN_FACTOR <= scale <= MAX_FACTOR:
            notes.append(
                f"Rounding to the grid makes stage {number} upscale by {scale:.2f}; so small a size gains nothing."
            )
        change = _stretch_note(number, small, large) if stretches else _crop_note(number, small, large)
        notes.extend([change] if change else [])
    return notes


def _crop_note(number: int, small: Stage, large: Stage) -> str | None:
    size = (small.width, small.height)
    return fitting_note(f"Stage {number - 1} at {small.width}x{small.height}", size, (large.width, large.height))


def _stretch_note(number: int, small: Stage, large: Stage) -> str | None:
    ratio = small.width * large.height / (small.height * large.width)
    stretch = max(ratio, 1 / ratio) - 1
    if stretch <= SLIGHT_STRETCH:
        return None
    return (
        f"Stage {number - 1} at {small.width}x{small.height} is not shaped like {large.width}x{large.height}: "
        f"the image is stretched by {stretch:.1%}."
    )


def _range_notes(plan: StagedPlan, family: Family) -> list[str]:
    notes: list[str] = []
    first = plan.stages[0]
    if first.width * first.height > LARGEST_AREA * math.prod(family.native_size):
        native = "x".join(map(str, family.native_size))
        notes.append(
            f"Stage 1 at {first.width}x{first.height} is more than {LARGEST_AREA:g} times the area of the {native} "
            f"that {family.title} is made for; expect repeated content, "
            "or choose a smaller size, a larger factor or more stages."
        )
    if first.tokens < LEAST_TOKENS:
        count = "1 token" if first.tokens == 1 else f"{first.tokens} tokens"
        notes.append(
            f"Stage 1 at {first.width}x{first.height} has {count}, too few to draw anything in; "
            "choose a larger size, a smaller factor or fewer stages."
        )
    elif len(plan.stages) > 1 and math.sqrt(first.width * first.height) < SIDE_SLACK * family.min_low_side:
        notes.append(
            f"Stage 1 at {first.width}x{first.height} is smaller than the {family.min_low_side} px square "
            f"below which {family.title} is out of its range; expect weaker composition, "
            "or choose a larger size or a smaller factor."
        )
    return notes


def _guidance_notes(plan: StagedPlan, family: Family) -> list[str]:
    scale, most = plan.stages[0].guidance, MOST_GUIDANCE * family.guidance
    if family.guidance_kind == "none" or 1.0 <= scale <= most:
        return []
    return [
        f"Guidance {scale:g} is far from the {family.guidance:g} that {family.title} is made for; expect a spoiled "
        f"image, or choose 1 to {most:g}."
    ]


def unaided_stages(plan: StagedPlan) -> tuple[Stage, ...]:
    """The later stages that start with more noise because no network upscales the image.

    Args:
        plan: The plan.

    Returns:
        Those from `refining.UNAIDED_SIGMA`; none where the plan is for a network.
    """
    if plan.upscaler_kind == "network":
        return ()
    return tuple(stage for stage in plan.stages[1:] if stage.start_sigma == UNAIDED_SIGMA)


def _refine_notes(plan: StagedPlan, family: Family | None) -> list[str]:
    notes: list[str] = []
    own = _own_sigma(plan, family)
    unaided = unaided_stages(plan)
    if unaided:
        steps = f"{unaided[-1].steps} step{'s' if unaided[-1].steps > 1 else ''}"
        notes.append(
            f"No network upscales the image, so it is refined more: {steps} from sigma {unaided[-1].start_sigma:g}."
        )
    for number, stage in enumerate(plan.stages[1:], start=2):
        if not stage.sigmas:
            notes.append(f"Stage {number} takes no step: the upscaler's image is kept as it is.")
        elif stage.start_sigma != own and not USUAL_SIGMA[0] <= stage.start_sigma <= _highest_sigma(stage.steps):
            notes.append(
                f"Stage {number} starts at sigma {stage.start_sigma:g}, outside the usual {USUAL_SIGMA[0]} to "
                f"{_highest_sigma(stage.steps)}: below, nothing is refined; above, the image is made anew."
            )
        if stage.steps > 1 and stage.start_sigma < UNAIDED_SIGMA:
            notes.append(f"Stage {number} takes {stage.steps} refine steps; published results gain little beyond one.")
    return notes


def _own_sigma(plan: StagedPlan, family: Family | None) -> float | None:
    """The start sigma of the plan's preset, which nobody need be told of; None where its name is no preset's."""
    if family is None or plan.preset not in family.preset_names:
        return None
    return family.get_preset(plan.preset).sigma


def _highest_sigma(steps: int) -> float:
    return USUAL_SIGMA[1] if steps == 1 else DEEPEST_SIGMA
