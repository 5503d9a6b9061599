"""Options that do not go together: what one of them makes meaningless is refused, never ignored."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, cast

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.wording import option_name
from mrflow_sched.plan.families.base import steps_in
from mrflow_sched.plan.notes import OF_STAGE_1
from mrflow_sched.plan.options import OPTIONS, PlanOptions

if TYPE_CHECKING:
    from mrflow_sched.apps.cli.inputs import StartImage

_REFINING = ("sigma", "refine_curve", "refine_guidance", "tile")


def check_plan_options(given: PlanOptions) -> None:
    """Refuse options of a plan that another one makes meaningless.

    Args:
        given: The options that were given.

    Raises:
        MrFlowError: Two of them do not go together; the sentence names both.
    """
    native = bool(given.get("native"))
    for name, value in given.items():
        option = OPTIONS[name]
        if native and option.applies == "staged" and value != option.default:
            raise MrFlowError(f"--native samples in one stage, so {option_name(name)} has no meaning; leave one out.")
        if not native and option.applies == "native":
            raise MrFlowError(f"{option_name(name)} {value} is for native sampling; add --native, or use --low-steps.")
    if "mu" in given and "shift_tokens" in given:
        raise MrFlowError("--mu sets the shift outright, so --shift-tokens has no meaning; leave one out.")
    _check_counts(given)
    idle = [name for name in _REFINING if name in given]
    if idle and refines_nothing(given):
        raise MrFlowError(
            f"--refine-steps 0 keeps the upscaled image, so {option_name(idle[0])} has no meaning; leave one out."
        )


def _check_counts(given: PlanOptions) -> None:
    """Refuse counts beside a preset that spells out others."""
    name = given.get("preset") or ""
    low, *refine = steps_in(name) or (0,)
    if not refine:
        return
    sigmas, own = given.get("sigmas"), given.get("low_steps")
    if sigmas is not None:
        own = len(sigmas) - (sigmas[-1] == 0.0)
    if own not in (None, low):
        other = f"--low-steps {own}" if sigmas is None else f"--sigmas, which makes {own}"
        raise MrFlowError(f"--preset {name} has {low} steps in stage 1, which contradicts {other}; leave one out.")
    count = given.get("refine_steps")
    count = refine if count is None else count
    counts = [count] * len(refine) if isinstance(count, int) else list(count)
    if counts != refine and (len(refine) > 1 or counts != refine * len(counts)):
        raise MrFlowError(
            f"--preset {name} counts the steps of the later stages, which contradicts --refine-steps; leave one out."
        )
    stages = given.get("stages")
    if len(refine) > 1 and stages not in (None, len(refine) + 1):
        raise MrFlowError(
            f"--preset {name} has {len(refine) + 1} stages, which contradicts --stages {stages}; leave one out."
        )


def refines_nothing(given: PlanOptions) -> bool:
    """Whether no later stage takes a step, so that the upscaler's image is the result.

    Args:
        given: The options that were given.

    Returns:
        True where --refine-steps, or else the counts of --preset, are 0.
    """
    count = given.get("refine_steps")
    if count is None:
        count = steps_in(given.get("preset") or "")[1:]
    counts = (count,) if isinstance(count, int) else tuple(count)
    return bool(counts) and not any(counts)


def left_of(taken: PlanOptions, given: PlanOptions) -> PlanOptions:
    """Options taken from an image, without those that the user's own replace or make meaningless.

    Args:
        taken: The options that the image gives.
        given: The options that were given.

    Returns:
        What is left of `taken`.
    """
    idle = {*given}
    if given.get("native"):
        idle |= {name for name, option in OPTIONS.items() if option.applies != "both"} | {"preset"}
    if idle & {"mu", "sigmas", "shift_tokens"}:
        idle |= {"mu", "sigmas", "shift_tokens"}
    if "sigmas" in given:
        idle |= {"low_steps"}
    if "low_steps" in given:
        idle |= {"sigmas"}
    if "factors" in given:
        idle |= {"factor", "stages"}
    counts = steps_in(given.get("preset") or "")
    if counts:
        idle |= {"sigmas", "low_steps", "refine_steps", *(("stages",) if len(counts) > 2 else ())}
    return cast("PlanOptions", {name: value for name, value in taken.items() if name not in idle})


def check_start_options(given: PlanOptions, size: tuple[int, int] | None, start: StartImage) -> None:
    """Refuse options of stage 1 where an image takes its place.

    Args:
        given: The options of the plan that were given.
        size: The value of --size, or None.
        start: The image.

    Raises:
        MrFlowError: An option has no meaning.
    """
    if start.strength is not None or given.get("native"):
        return
    idle = next((name for name in OF_STAGE_1 if name in given), None)
    if idle is not None:
        raise MrFlowError(
            f"--image takes the place of stage 1, so {option_name(idle)} has no meaning; leave it out, or give "
            "--strength to start stage 1 from the image."
        )
    single = given.get("stages", 2) == 2 and len(given.get("factors") or (1,)) == 1
    factor = next((name for name in ("factor", "factors") if name in given), None)
    if size is not None and single and factor is not None:
        raise MrFlowError(
            f"--image is upscaled to --size, so {option_name(factor)} has no meaning; leave one of the two out."
        )


def check_run_options(args: argparse.Namespace) -> None:
    """Refuse options of a new run of `generate` that do not go together.

    Args:
        args: The parsed arguments.

    Raises:
        MrFlowError: The prompt is missing, or an option has no meaning beside another.
    """
    if args.prompt is None and args.prompts is None:
        raise MrFlowError(
            'the prompt is missing; say what the image shows, as in mrflow generate "a blue star" --out DIR.'
        )
    if args.prompt is not None and args.prompts is not None:
        raise MrFlowError("--prompts gives all prompts, so a prompt beside it has no meaning; leave one out.")
    if args.strength is not None and args.image is None:
        raise MrFlowError("--strength says how far to start from an image; give --image FILE too, or leave it out.")
    if args.native and args.image is not None and args.strength is None:
        raise MrFlowError("--image takes the place of stage 1, which is all that --native has; give --strength too.")
    later = next((name for name in ("refine_prompt", "refine_negative") if getattr(args, name) is not None), None)
    if args.native and later is not None:
        raise MrFlowError("--native samples in one stage, so a prompt of the later ones has no meaning; leave it out.")
    given: PlanOptions = {"preset": args.preset, "refine_steps": args.refine_steps}
    if later is not None and refines_nothing(given):
        raise MrFlowError(
            f"--refine-steps 0 keeps the upscaled image, so {option_name(later)} has no meaning; leave one out."
        )
    own = {"upscaler": None, "upscaler_tile": None, "upscaler_dtype": "auto"}
    idle = next((name for name, value in own.items() if getattr(args, name) != value), None)
    if args.native and idle is not None:
        raise MrFlowError(f"--native samples in one stage, so {option_name(idle)} has no meaning; leave one out.")
