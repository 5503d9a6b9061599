"""`mrflow generate`: pictures from a prompt, or a picture's run again."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.images.record import KEY, RunRecord
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from torch import Tensor

    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
    from mrflow_sched.sampler import StagedResult
    from mrflow_sched.sampling.progress import Progress
    from mrflow_sched.upscaling.role import PixelUpscaler
from mrflow_sched.apps.cli.console import (
    REFUSED,
    STOPPED,
    ctrl_c,
    print_json,
    progress_bar,
    say,
    saying_warnings,
    writable,
)
from mrflow_sched.apps.cli.load import EMBEDDED, Job, find_upscaler, load_parts, make_record, model_family
from mrflow_sched.apps.cli.options import PLAN_WORDS, plan_of, with_calibration


def run_generate(args: argparse.Namespace) -> int:
    job = _repeat_job(args) if args.source is not None else _new_job(args)
    if args.save_stages and len(job.plan.stages) == 1:
        raise MrFlowError("--save-stages has no meaning for a native run, which has one stage; leave it out.")
    upscaler_path = find_upscaler(args, job.source)
    with writable(args.out), saying_warnings():
        engine, upscaler = load_parts(args, job, upscaler_path)
        record = make_record(args, job, engine, upscaler, upscaler_path)
        _check_repeatable(job.source, record)
        for note in job.plan.notes:
            say(note)
        with progress_bar(args) as show, ctrl_c() as stopped:
            result = _sample(engine, job, upscaler, lambda step: show("", step), stopped, args.save_stages)
        for note in dict.fromkeys(result.warnings):
            say(note)
        paths, lost = _save_images(args, job, record, result)
    if result.cancelled:
        say(f"Stopped; the best picture so far is {paths[0]}.")
    if args.json:
        stages = [{"name": timing.name, "seconds": timing.seconds} for timing in result.timings]
        print_json(
            {
                "images": [str(path) for path in paths],
                "stages": stages,
                "plan": job.plan.to_string(),
                "seed": job.plan.seed,
            }
        )
    else:
        print("\n".join(str(path) for path in paths))
    return STOPPED if result.cancelled else REFUSED if lost or result.unfinished else 0


def _new_job(args: argparse.Namespace) -> Job:
    if args.prompt is None:
        raise MrFlowError(
            'the prompt is missing; say what the picture shows, as in mrflow generate "a blue star" --out DIR.'
        )
    plan = plan_of(args, with_calibration(args, model_family(args)))
    return Job(plan, args.prompt, args.negative, args.batch, tuple(range(args.batch)))


def _repeat_job(args: argparse.Namespace) -> Job:
    """The run that a picture remembers. The whole batch runs again, because a batch's size reaches the last bits."""
    given = [
        word
        for word in (*PLAN_WORDS, "size", "steps", "prompt", "negative", "family", "calibration")
        if getattr(args, word) is not None
    ]
    given += [word for word in ("native",) if getattr(args, word)] + (["batch"] if args.batch != 1 else [])
    if given:
        name = given[0] if given[0] == "prompt" else f"--{given[0].replace('_', '-')}"
        raise MrFlowError(
            f"--from takes every number and word from the picture, so {name} has no place; leave one out."
        )
    record = _read_record(args.source)
    if record.model != EMBEDDED and args.model is None:
        raise MrFlowError(f"{args.source} was made with the model folder {record.model!r}; name it with --model DIR.")
    if record.model == EMBEDDED and args.model is not None:
        raise MrFlowError(f"{args.source} was made with the embedded model; leave out --model.")
    if record.unfinished:
        say(f"{args.source} is an unfinished picture; its run is now made whole.")
    plan = StagedPlan.from_string(record.plan)
    return Job(plan, record.prompt, record.negative, record.batch, (record.image,), record)


def _read_record(path: Path) -> RunRecord:
    from mrflow_sched.images.files import read_png_text

    text = read_png_text(path).get(KEY)
    if text is None:
        raise MrFlowError(f"--from is {str(path)!r}, which holds no mrflow record; give a PNG that mrflow made.")
    return RunRecord.from_json(text)


def _sample(
    engine: PipelineEngine,
    job: Job,
    upscaler: PixelUpscaler | None,
    callback: Callable[[Progress], None],
    cancel: Callable[[], bool],
    keep_stages: bool,
) -> StagedResult:
    from mrflow_sched.sampler import sample_staged

    return sample_staged(
        engine,
        job.plan,
        job.prompt,
        negative_prompt=job.negative,
        batch=job.batch,
        upscaler=upscaler,
        callback=callback,
        cancel=cancel,
        keep_stages=keep_stages,
    )


def _check_repeatable(old: RunRecord | None, new: RunRecord) -> None:
    """Refuse a repeat with another model or upscaler; say aloud what else may move the last bits."""
    if old is None:
        return
    if old.model_fingerprint != new.model_fingerprint:
        raise MrFlowError(
            f"the picture was made with other weights of {old.model!r} than those found; "
            "give --model the folder that it was made with."
        )
    if old.upscaler_sha256 != new.upscaler_sha256:
        advice = "leave out --upscaler" if old.upscaler_sha256 is None else "give that file with --upscaler"
        raise MrFlowError(f"the picture was made with the upscaler {old.upscaler!r}, not {new.upscaler!r}; {advice}.")
    moved = [
        f"{name} {before!r} is now {after!r}"
        for name, before, after in (
            *((word, getattr(old, word), getattr(new, word)) for word in ("device", "dtype", "vae_dtype", "threads")),
            *((key, old.versions.get(key), value) for key, value in new.versions.items()),
        )
        if before != after
    ]
    if moved:
        say(f"The picture may differ in its last bits from the original: {', '.join(moved)}.")


def _save_images(
    args: argparse.Namespace, job: Job, record: RunRecord, result: StagedResult
) -> tuple[list[Path], list[str]]:
    """Write the wanted images of a result, and its stages where kept, each with its record; never over an old file.

    Returns the paths of the images, and the names of pictures left out, with a word to the user, since they hold values
    that are no numbers. Raises ValueError where no image is left.
    """
    from mrflow_sched.images.files import save_png

    lost: list[str] = []

    def put(path: Path, image: Tensor, text: dict[str, str]) -> bool:
        good = bool(image.isfinite().all())
        if good:
            save_png(path, image, text)
        else:
            lost.append(path.name)
        return good

    ending = "-unfinished" if result.unfinished else ""
    record = replace(record, unfinished=result.unfinished)
    paths: list[Path] = []
    for number in job.images:
        text = {KEY: replace(record, image=number).to_json()}
        stem = _free_stem(args.out, f"mrflow-{job.plan.seed + number}{ending}")
        for step, stage in enumerate(result.stages if args.save_stages else (), 1):
            name = re.sub(r"[^a-z0-9]+", "-", stage.name.lower()).strip("-")
            put(args.out / f"{stem}-part{step}-{name}.png", _one(stage.image, number), text)
        path = args.out / f"{stem}.png"
        if put(path, _one(result.images, number), text):
            paths.append(path)
    if lost:
        sentence = f"not saved, for values that are no numbers: {', '.join(lost)}; try --dtype float32."
        if not paths:
            raise MrFlowError(sentence)
        say(sentence)
    return paths, lost


def _one(images: Tensor, number: int) -> Tensor:
    return images if images.ndim == 3 else images[number]


def _free_stem(folder: Path, stem: str) -> str:
    """`stem`, or `stem-2`, `stem-3` ... where a picture of that name, or of its stages, is already there."""
    names = (stem if count == 1 else f"{stem}-{count}" for count in range(1, 1_000_000))
    taken = ("{}.png", "{}-part*.png")
    return next(name for name in names if not any(any(folder.glob(each.format(name))) for each in taken))
