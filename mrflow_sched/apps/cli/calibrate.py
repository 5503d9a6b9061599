"""`mrflow calibrate`: measure which start sigma and how many steps suit a model and an upscaler."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mrflow_sched._runtime.errors import FileError, MrFlowError
from mrflow_sched.apps.cli.console import Outcome, os_reason, say, saying_warnings, writable
from mrflow_sched.apps.cli.forecast import check_memory
from mrflow_sched.apps.cli.inputs import read_prompts, syntax_notes
from mrflow_sched.apps.cli.load import check_packages, find_upscaler, load_engine, open_upscaler, plan_family
from mrflow_sched.apps.cli.options import (
    Commands,
    ModelChoices,
    OutputChoices,
    PlanChoices,
    common_options,
    model_options,
    output_options,
)
from mrflow_sched.apps.cli.parsing import (
    check_seeds,
    number_option,
    prompt_option,
    prompts_option,
    seed_option,
    size_option,
    whole_number,
)
from mrflow_sched.apps.plan_lines import counted
from mrflow_sched.plan.families import Family, get_family
from mrflow_sched.plan.make import make_native_plan
from mrflow_sched.plan.notes import LEAST_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

    from mrflow_sched.measure.calibrate import Calibration
    from mrflow_sched.plan.stages import StagedPlan

# Wide, detailed, lettered, smooth.
USUAL_PROMPTS = (
    "a harbour at dawn with fishing boats, mountains behind it",
    "a crowded market street, many small stalls and signs, detailed photograph",
    'a shop window with the words "OPEN TODAY" painted on it',
    "a portrait of an old fisherman, soft light",
)


@dataclass(frozen=True)
class CalibrateRequest:
    """What to measure: native images of prompts, or image files.

    Attributes:
        prompts: A prompt for each image; empty takes those that come with the command.
        images: Image files to measure in place of native images, with as many prompts or none.
        size: (width, height) in pixels of the images that are measured; None takes the family's default.
        factor: Upscale factor between the stages, 1.25 to 4; None takes the family's.
        native_steps: Steps of the native images; None takes the family's own number.
        seed: Seed of the first image.
        model: The model and the upscaler.
        output: Where the results go.
    """

    prompts: tuple[str, ...]
    images: tuple[Path, ...]
    size: tuple[int, int] | None
    factor: float | None
    native_steps: int | None
    seed: int
    model: ModelChoices
    output: OutputChoices

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> CalibrateRequest:
        """Make the request from parsed arguments.

        Args:
            args: What the parser of `add_parser` returned.

        Returns:
            The request.

        Raises:
            MrFlowError: Prompts were given beside --prompts, or --images with --steps or another number of prompts.
        """
        if args.prompt and args.prompts is not None:
            raise MrFlowError("--prompts gives all prompts, so a prompt beside it has no meaning; leave one out.")
        prompts = tuple(args.prompt) if args.prompts is None else read_prompts(args.prompts)
        images = tuple(args.images or ())
        if images and args.steps is not None:
            raise MrFlowError(
                "--images are measured in place of native images, so --steps has no meaning; leave one out."
            )
        if images and prompts and len(prompts) != len(images):
            raise MrFlowError(f"there are {len(prompts)} prompts for {len(images)} --images; give one each, or none.")
        model, output = ModelChoices.from_args(args), OutputChoices.from_args(args)
        return cls(prompts, images, args.size, args.factor, args.steps, args.seed, model, output)


def add_parser(commands: Commands) -> None:
    """Add `mrflow calibrate`.

    Args:
        commands: Where the parser is added.
    """
    parser = commands.add_parser(
        "calibrate",
        parents=[model_options(), output_options(), common_options()],
        allow_abbrev=False,
        help="measure which start sigma and how many steps suit a model and an upscaler",
    )
    parser.add_argument(
        "prompt",
        nargs="*",
        type=prompt_option,
        metavar="PROMPT",
        help="an image each, each in quotation marks (default: four; six for the embedded model); measured is the mean",
    )
    parser.add_argument("--prompts", type=prompts_option, metavar="FILE", help="a prompt on each line; - is stdin")
    parser.add_argument("--size", type=size_option, metavar="WxH", help="size of the images to measure")
    parser.add_argument("--factor", type=number_option, metavar="F", help="upscale factor between stages, 1.25 to 4")
    parser.add_argument("--steps", type=whole_number(1, 1000), metavar="N", help="steps of the native images")
    parser.add_argument(
        "--images", type=Path, nargs="+", metavar="IMAGE", help="image files to measure in place of native images"
    )
    parser.add_argument(
        "--seed",
        type=seed_option,
        default=0,
        metavar="N",
        help="seed of the first image; random draws one (default 0)",
    )
    parser.set_defaults(from_args=CalibrateRequest.from_args, run=run)


def run(request: CalibrateRequest) -> Outcome:
    """Measure, and write the calibration file.

    Args:
        request: What to measure.

    Returns:
        What was found, and the file.

    Raises:
        MrFlowError: The size, the factor, the model, the upscaler, an image file or the output folder cannot be used.
        FileError: The calibration file cannot be written.
    """
    from mrflow_sched.measure.calibrate import calibrate

    named = plan_family(request.model)
    family = get_family(named) if isinstance(named, str) else named
    plan = PlanChoices(request.size, {} if request.factor is None else {"factor": request.factor}, None).make_plan(
        family
    )
    width, height = plan.requested_width, plan.requested_height
    prompts = _measured_prompts(request)
    check_seeds(request.seed, len(prompts))
    _check_size(plan)
    file = find_upscaler(request.model)
    check_packages(request.model)
    check_memory(request.model, family, plan, make_native_plan(family, width, height))
    images = _measured_images(request.images, width, height)
    output = request.output
    with writable(output.folder), saying_warnings():
        upscaler = None if file is None else open_upscaler(request.model, file)
        engine = load_engine(request.model, request.model.dtype)
        for note in syntax_notes(*prompts):
            say(note)
        found = calibrate(
            engine,
            upscaler,
            prompts=prompts,
            width=width,
            height=height,
            factor=request.factor,
            images=images,
            native_steps=request.native_steps,
            seed=request.seed,
            tell=None if output.progress is False else lambda what: say(f"measuring: {what}"),
        )
        note = lower_note(found, family)
        if note is not None:
            say(note)
        path = _write_new(output.folder, f"calibration-{found.family}", found.to_json())
    value = {"file": str(path), "calibration": json.loads(found.to_json())}
    return Outcome(value, (*_lines(found), str(path)))


def lower_note(found: Calibration, family: Family) -> str | None:
    """What the user should know where less noise is recommended than the family's own preset has by measurement.

    Args:
        found: The calibration.
        family: The family that was measured.

    Returns:
        A sentence, or None.
    """
    preset = family.get_preset()
    if not preset.measured or found.sigma >= preset.sigma:
        return None
    return (
        f"The preset {preset.name} starts from {preset.sigma:g}, measured on images of every kind, small lettering and "
        f"small faces too ({preset.source}); {found.sigma:g} is what these images need on the whole, and may lose "
        "small things in them. For such images keep the preset."
    )


def _check_size(plan: StagedPlan) -> None:
    """Refuse sizes at which stage 1 draws nothing that could be measured."""
    low = plan.stages[0]
    if low.tokens < LEAST_TOKENS:
        raise MrFlowError(
            f"--size {plan.requested_width}x{plan.requested_height} makes stage 1 {low.width}x{low.height}, "
            f"{counted(low.tokens, 'token')}, in which there is nothing to measure; choose a size whose stage 1 has at "
            f"least {LEAST_TOKENS}, best the one that you will use."
        )


def _measured_prompts(request: CalibrateRequest) -> tuple[str, ...]:
    """Return a prompt for each image."""
    if request.prompts:
        return request.prompts
    if request.images:
        return ("",) * len(request.images)
    if request.model.model is not None:
        return USUAL_PROMPTS
    from mrflow_sched import demo

    return demo.example_prompts()


def _measured_images(files: tuple[Path, ...], width: int, height: int) -> Tensor | None:
    """Load the images of --images, resized to fill the size and cropped: (B, 3, H, W) in [0, 1]; None without any."""
    if not files:
        return None
    import torch

    return torch.cat([_fitted(file, width, height) for file in files])


def _fitted(file: Path, width: int, height: int) -> Tensor:
    """An image file filling the size, (1, 3, H, W); what the file left open and what is cropped is told."""
    from mrflow_sched.images.files import load_image
    from mrflow_sched.plan.notes import fitting_note
    from mrflow_sched.upscaling.fit import upscale_to

    image = load_image(file, lambda sentence: say(f"{file}: {sentence}"))
    note = fitting_note(f"{file}", (image.shape[-1], image.shape[-2]), (width, height))
    if note is not None:
        say(note)
    return upscale_to(image[None], width, height)


def _lines(found: Calibration) -> Iterator[str]:
    yield (
        f"{found.family} with {found.upscaler}: {counted(found.pictures, 'image')} of {found.width}x{found.height}, "
        f"factor {found.factor:g}"
    )
    yield f"fine detail of the model's own images: local power {found.clean_power:.3g}, bound sigma {found.bound:.3f}"
    yield (
        f"error of the upscaler: local power {found.error_power:.3g} in fine detail, {found.error_power_low:.3g} below "
        f"it, bound sigma {found.error_bound:.3f}"
    )
    yield "refining from   steps   fine detail vs the model   PSNR"
    for row in found.sweep:
        yield f"  sigma {row.sigma:<7g} {row.refine_steps:>5}   {row.detail_db:>+19.2f} dB   {row.psnr:>7.2f} dB"
    yield "distance of stage 1 from its converged image: " + ", ".join(
        f"{solver} {steps}: {distance:.3f}" for solver, steps, distance in found.low_steps_distance
    )
    yield f"recommended: low steps {found.low_steps}, refine steps {found.refine_steps}, sigma {found.sigma:g}"


def _write_new(folder: Path, stem: str, text: str) -> Path:
    """Write `stem`.json in `folder`, whole or not at all and never over an old file, and return its path."""
    from mrflow_sched._runtime.write import next_new, write_new

    try:
        return write_new(folder, stem, ".json", text.encode("utf-8"))
    except OSError as error:
        path = next_new(folder, stem, ".json")
        raise FileError(f"{str(path)!r} cannot be written ({os_reason(error)}); give another --out.") from error
