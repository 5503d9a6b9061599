"""`mrflow generate`: make images from a prompt, or repeat the run of a saved image."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.console import (
    DONE,
    REFUSED,
    STOPPED,
    ctrl_c,
    print_json,
    progress_bar,
    say,
    saying_warnings,
    show,
    writable,
)
from mrflow_sched.apps.cli.load import (
    EMBEDDED,
    UPSCALER,
    Job,
    Loaded,
    find_upscaler,
    load,
    make_record,
    plan_family,
    threads_of,
)
from mrflow_sched.apps.cli.options import (
    Commands,
    ModelChoices,
    OutputChoices,
    PlanChoices,
    common_options,
    model_options,
    option_name,
    output_options,
    plan_options,
    prompt_option,
    text_option,
    whole_number,
)
from mrflow_sched.images.record import KEY, MAX_BATCH, RunRecord
from mrflow_sched.plan.options import OPTIONS
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from torch import Tensor

    from mrflow_sched.sampler import StagedResult
    from mrflow_sched.sampling.progress import Progress


@dataclass(frozen=True)
class GenerateRequest:
    """Images to make from a prompt.

    Attributes:
        prompt: What the images show.
        negative: What they should not show, or None.
        batch: How many images, 1 to `images.record.MAX_BATCH`; image i has the plan's seed plus i.
        choices: Options of the plan.
        model: The model and the upscaler.
        save_stages: Save the image of each stage too.
        output: Where the results go.
    """

    prompt: str
    negative: str | None
    batch: int
    choices: PlanChoices
    model: ModelChoices
    save_stages: bool
    output: OutputChoices

    def job(self) -> Job:
        """Plan the run.

        Returns:
            The job, all of whose images are saved.

        Raises:
            MrFlowError: The options make no plan, or the model's folder cannot be used.
        """
        plan = self.choices.make_plan(plan_family(self.model))
        return Job(plan, self.prompt, self.negative, self.batch, tuple(range(self.batch)))


@dataclass(frozen=True)
class RepeatRequest:
    """The run of a saved image, to be repeated.

    Attributes:
        source: A PNG with a record.
        model: The model and the upscaler, which must be those of the record.
        save_stages: Save the image of each stage too.
        output: Where the results go.
    """

    source: Path
    model: ModelChoices
    save_stages: bool
    output: OutputChoices

    def job(self) -> Job:
        """Read the recorded run. The whole batch runs again, because the last bits depend on the batch's size.

        Returns:
            The job, of whose images only the recorded one is saved.

        Raises:
            MrFlowError: The file has no readable record, or was made with another model than `model` names.
        """
        record = _read_record(self.source)
        if record.model != EMBEDDED and self.model.model is None:
            raise MrFlowError(
                f"{self.source} was made with the model folder {record.model!r}; name it with --model DIR."
            )
        if record.model == EMBEDDED and self.model.model is not None:
            raise MrFlowError(f"{self.source} was made with the embedded model; leave out --model.")
        if record.unfinished:
            say(f"{self.source} is an unfinished image; its run is now completed.")
        plan = StagedPlan.from_string(record.plan)
        return Job(plan, record.prompt, record.negative, record.batch, (record.image,), record)


def request_of(args: argparse.Namespace) -> GenerateRequest | RepeatRequest:
    """Make the request from parsed arguments.

    Args:
        args: What the parser of `add_parser` returned.

    Returns:
        A `RepeatRequest` where --from was given, else a `GenerateRequest`.

    Raises:
        MrFlowError: The prompt is missing, or options do not go together.
    """
    model, output = ModelChoices.from_args(args), OutputChoices.from_args(args)
    if args.source is None:
        if args.prompt is None:
            raise MrFlowError(
                'the prompt is missing; say what the image shows, as in mrflow generate "a blue star" --out DIR.'
            )
        choices = PlanChoices.from_args(args)
        if args.native and args.upscaler is not None:
            raise MrFlowError("--native samples in one stage, so --upscaler has no meaning; leave one out.")
        return GenerateRequest(args.prompt, args.negative, args.batch or 1, choices, model, args.save_stages, output)
    recorded = (*OPTIONS, "size", "prompt", "negative", "family", "calibration", "batch")
    given = [word for word in recorded if getattr(args, word) is not None]
    if given:
        name = "a prompt" if given[0] == "prompt" else option_name(given[0])
        raise MrFlowError(
            f"--from takes the prompt and all numbers from the image's record, so {name} has no meaning; leave one out."
        )
    return RepeatRequest(args.source, model, args.save_stages, output)


def add_parser(commands: Commands) -> None:
    """Add `mrflow generate`.

    Args:
        commands: Where the parser is added.
    """
    parser = commands.add_parser(
        "generate",
        parents=[plan_options(), model_options(), output_options(), common_options()],
        allow_abbrev=False,
        help="make images from a prompt",
    )
    parser.add_argument("prompt", nargs="?", type=prompt_option, metavar="PROMPT")
    parser.add_argument(
        "--negative", type=text_option, metavar="TEXT", help="what the image should not show, for models that use it"
    )
    parser.add_argument("--batch", type=whole_number(1, MAX_BATCH), metavar="N", help="number of images (default 1)")
    parser.add_argument("--save-stages", action="store_true", help="save the image of every stage too")
    parser.add_argument("--from", dest="source", type=Path, metavar="IMAGE.png", help="repeat the run of a saved image")
    parser.set_defaults(from_args=request_of, run=run)


def run(request: GenerateRequest | RepeatRequest) -> int:
    """Make and save the images, and print their paths.

    Args:
        request: What to make or to repeat.

    Returns:
        0; 130 where Ctrl-C stopped the run and the best image so far was saved; 2 where an image was left out because
        it contains NaN or infinity, or is unfinished.

    Raises:
        MrFlowError: The plan, the model, the upscaler, the record or the output folder cannot be used, or no image is
            left to save.
    """
    job, output = request.job(), request.output
    if request.save_stages and len(job.plan.stages) == 1:
        raise MrFlowError("--save-stages has no meaning for a native run, which has one stage; leave it out.")
    file = find_upscaler(request.model, job.source)
    with writable(output.folder), saying_warnings(), threads_of(job.source):
        loaded = load(request.model, job, file)
        record = make_record(request.model, job, loaded)
        _check_repeatable(job.source, record)
        for note in job.plan.notes:
            say(note)
        with progress_bar(output.progress) as bar, ctrl_c() as stopped:
            result = _sample(loaded, job, lambda step: bar("", step), stopped, request.save_stages)
        for note in dict.fromkeys(result.warnings):
            say(note)
        paths, lost = _save_images(output.folder, job, replace(record, unfinished=result.unfinished), result)
    if result.cancelled:
        say(f"Stopped; the best image so far is {paths[0]}.")
    if output.json:
        print_json(_result_json(job, result, paths))
    else:
        show(*(str(path) for path in paths))
    return STOPPED if result.cancelled else REFUSED if lost or result.unfinished else DONE


def _result_json(job: Job, result: StagedResult, paths: list[Path]) -> dict[str, object]:
    return {
        "images": [str(path) for path in paths],
        "stages": [{"name": timing.name, "seconds": timing.seconds} for timing in result.timings],
        "plan": job.plan.to_string(),
        "seed": job.plan.seed,
    }


def _sample(
    loaded: Loaded, job: Job, callback: Callable[[Progress], None], cancel: Callable[[], bool], keep_stages: bool
) -> StagedResult:
    from mrflow_sched.sampler import sample_staged

    return sample_staged(
        loaded.engine,
        job.plan,
        job.prompt,
        negative_prompt=job.negative,
        batch=job.batch,
        upscaler=loaded.upscaler,
        callback=callback,
        cancel=cancel,
        keep_stages=keep_stages,
    )


# --- repeating ---------------------------------------------------------------------------------


def _read_record(path: Path) -> RunRecord:
    from mrflow_sched.images.files import read_png_text

    text = read_png_text(path).get(KEY)
    if text is None:
        raise MrFlowError(f"--from is {str(path)!r}, which has no mrflow record; give a PNG that mrflow made.")
    return RunRecord.from_json(text)


def _check_repeatable(old: RunRecord | None, new: RunRecord) -> None:
    """Refuse to repeat a run with another model or upscaler; say what else may change the last bits."""
    if old is None:
        return
    if old.model_fingerprint != new.model_fingerprint:
        raise MrFlowError(
            f"the image was made with other weights of {old.model!r} than those found; "
            "give --model the folder that it was made with."
        )
    if old.upscaler_sha256 != new.upscaler_sha256:
        advice = "leave out --upscaler" if old.upscaler_sha256 is None else "give that file with --upscaler"
        raise MrFlowError(f"the image was made with the upscaler {old.upscaler!r}, not {new.upscaler!r}; {advice}.")
    moved = [f"{name} {before!r} is now {now!r}" for name, before, now in _arithmetic(old, new) if before != now]
    if moved:
        say(f"The image may differ from the original in its last bits: {', '.join(moved)}.")


def _arithmetic(old: RunRecord, new: RunRecord) -> Iterator[tuple[str, object, object]]:
    """Yield (name, then, now) of everything besides the weights on which the last bits depend."""
    yield "device", old.device, new.device
    for part in dict.fromkeys((*new.dtypes, *old.dtypes)):
        before = old.dtype_of(part)
        if before is not None or part != UPSCALER:  # an older version did not record the upscaler's
            yield f"dtype of {part}", before, new.dtype_of(part)
    yield "threads", old.threads, new.threads
    for name, value in new.versions.items():
        yield name, old.versions.get(name), value


# --- saving ------------------------------------------------------------------------------------


def _save_images(folder: Path, job: Job, record: RunRecord, result: StagedResult) -> tuple[list[Path], list[str]]:
    """Write the wanted images of a result, and its stages where kept, each with its record; never over an old file.

    Returns:
        The paths of the images, and the names of those left out because they contain NaN or infinity, which the user is
        told.

    Raises:
        MrFlowError: No image is left.
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

    ending = "-unfinished" if record.unfinished else ""
    paths: list[Path] = []
    for number in job.images:
        text = {KEY: replace(record, image=number).to_json()}
        stem = _free_stem(folder, f"mrflow-{job.plan.seed + number}{ending}")
        for step, stage in enumerate(result.stages, 1):
            name = re.sub(r"[^a-z0-9]+", "-", stage.name.lower()).strip("-")
            put(folder / f"{stem}-part{step}-{name}.png", _one(stage.image, number), text)
        path = folder / f"{stem}.png"
        if put(path, _one(result.images, number), text):
            paths.append(path)
    if lost:
        sentence = f"not saved, because of NaN or infinity in the image: {', '.join(lost)}; try --dtype float32."
        if not paths:
            raise MrFlowError(sentence)
        say(sentence)
    return paths, lost


def _one(images: Tensor, number: int) -> Tensor:
    return images if images.ndim == 3 else images[number]


def _free_stem(folder: Path, stem: str) -> str:
    """Return `stem`, or `stem-2`, `stem-3` ... where an image of that name, or of its stages, is already there."""
    names = (stem if count == 1 else f"{stem}-{count}" for count in range(1, 1_000_000))
    taken = ("{}.png", "{}-part*.png")
    return next(name for name in names if not any(any(folder.glob(each.format(name))) for each in taken))
