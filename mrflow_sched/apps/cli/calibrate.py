"""`mrflow calibrate`: which start sigma and how many steps suit a model and an upscaler."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.make import make_plan

if TYPE_CHECKING:
    from torch import Tensor

    from mrflow_sched.measure.calibrate import Calibration
from mrflow_sched.apps.cli.console import counted, os_reason, print_json, say, saying_warnings, writable
from mrflow_sched.apps.cli.load import find_upscaler, load_engine, model_family
from mrflow_sched.apps.cli.options import default_size

# --- mrflow calibrate -------------------------------------------------------------------------

# Wide, detailed, lettered, smooth.
_PROMPTS = (
    "a harbour at dawn with fishing boats, mountains behind it",
    "a crowded market street, many small stalls and signs, detailed photograph",
    'a shop window with the words "OPEN TODAY" painted on it',
    "a portrait of an old fisherman, soft light",
)


def run_calibrate(args: argparse.Namespace) -> int:
    from mrflow_sched.measure.calibrate import calibrate
    from mrflow_sched.upscaling.load import load_upscaler

    family = model_family(args)
    width, height = args.size or default_size(family, native=False)
    make_plan(family, width, height, factor=args.factor)  # a bad size or factor is told before anything is loaded
    upscaler_path = find_upscaler(args)
    pictures, prompts = _measured_pictures(args, width, height)
    with writable(args.out), saying_warnings():
        engine = load_engine(args, args.device, args.dtype, args.family)
        upscaler = None if upscaler_path is None else load_upscaler(upscaler_path, device=engine.device)
        found = calibrate(
            engine,
            upscaler,
            prompts=prompts,
            width=width,
            height=height,
            factor=args.factor,
            images=pictures,
            native_steps=args.steps,
            seed=args.seed,
            tell=None if args.progress is False else lambda what: say(f"measuring: {what}"),
        )
        path = _write_new(args.out, f"calibration-{found.family}", found.to_json())
    if args.json:
        print_json({"file": str(path), "calibration": json.loads(found.to_json())})
    else:
        print("\n".join(_calibration_lines(found)))
        print(path)
    return 0


def _measured_pictures(args: argparse.Namespace, width: int, height: int) -> tuple[Tensor | None, tuple[str, ...]]:
    """The pictures of --images, filled and cropped to the size, and a prompt for each; or only prompts."""
    if not args.images:
        if args.prompts or args.model is not None:
            return None, tuple(args.prompts or _PROMPTS)
        from mrflow_sched import demo

        return None, demo.example_prompts()
    if args.steps is not None:
        raise MrFlowError(
            "--images are measured in place of native pictures, so --steps has no meaning; leave one out."
        )
    if args.prompts and len(args.prompts) != len(args.images):
        raise MrFlowError(
            f"there are {len(args.prompts)} prompts for {len(args.images)} --images; give one each, or none."
        )
    import torch

    from mrflow_sched.images.files import load_image
    from mrflow_sched.upscaling.fit import upscale_to

    loaded = [upscale_to(load_image(path)[None], width, height) for path in args.images]
    return torch.cat(loaded), tuple(args.prompts or [""] * len(args.images))


def _calibration_lines(found: Calibration) -> Iterator[str]:
    yield (
        f"{found.family} with {found.upscaler}: {counted(found.pictures, 'picture')} of {found.width}x{found.height}, "
        f"factor {found.factor:g}"
    )
    yield f"fine detail of the model's own pictures: power {found.clean_power:.3g}, bound sigma {found.bound:.3f}"
    yield (
        f"error of the upscaler: power {found.error_power:.3g} in fine detail, {found.error_power_low:.3g} below it, "
        f"bound sigma {found.error_bound:.3f}"
    )
    yield "refining from   steps   detail to the model's own   PSNR"
    for row in found.sweep:
        yield f"  sigma {row.sigma:<7g} {row.refine_steps:>5}   {row.detail_db:>+17.2f} dB   {row.psnr:>10.2f} dB"
    yield "distance of stage 1 to its converged picture: " + ", ".join(
        f"{solver} {steps}: {distance:.3f}" for solver, steps, distance in found.low_steps_distance
    )
    yield f"recommended: low steps {found.low_steps}, refine steps {found.refine_steps}, sigma {found.sigma:g}"


def _write_new(folder: Path, stem: str, text: str) -> Path:
    """`stem`.json in `folder`, whole or not at all, and never over an old file."""
    names = (stem if count == 1 else f"{stem}-{count}" for count in range(1, 1_000_000))
    path = next(path for name in names if not (path := folder / f"{name}.json").exists())
    draft = path.with_suffix(".part")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise MrFlowError(f"{str(path)!r} cannot be written ({os_reason(error)}); give another --out.") from error
    return path
