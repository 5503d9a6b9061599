"""`mrflow finish`: the later stages of drafts that were picked."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mrflow_sched._runtime.errors import MissingFileError, MrFlowError
from mrflow_sched.apps.cli.console import Outcome, progress_bar, say, say_new, saying_warnings, writable
from mrflow_sched.apps.cli.drafting import Pick, Picked, files_of, finish_one
from mrflow_sched.apps.cli.forecast import check_memory
from mrflow_sched.apps.cli.load import (
    Job,
    check_packages,
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
    common_options,
    model_options,
    output_options,
)
from mrflow_sched.apps.cli.parsing import format_option, path_text_option
from mrflow_sched.apps.cli.repeat import check_model, check_source, other_upscaler, recorded_loras, say_differences
from mrflow_sched.apps.cli.results import Results, check_format
from mrflow_sched.apps.cli.stopping import Stopped, current
from mrflow_sched.images.record import RunRecord

if TYPE_CHECKING:
    from torch import Tensor

    from mrflow_sched.plan.checks import UpscalerKind

# What drafts that are finished together share: they are finished by one model in one arithmetic.
_COMMON = {
    "model": "model",
    "model_fingerprint": "model",
    "loras": "LoRAs",
    "upscaler": "upscaler",
    "upscaler_sha256": "upscaler",
    "device": "device",
    "dtypes": "dtypes",
    "threads": "thread counts",
}


@dataclass(frozen=True)
class FinishRequest:
    """Drafts to finish.

    Attributes:
        picks: The drafts, in the order in which they are finished.
        model: The model, the upscaler and the LoRAs.
        save_stages: Save the image of each stage too.
        suffix: Ending of the image files.
        output: Where the results go.
    """

    picks: tuple[Pick, ...]
    model: ModelChoices
    save_stages: bool
    suffix: str
    output: OutputChoices

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> FinishRequest:
        """Make the request from parsed arguments.

        Args:
            args: What the parser of `add_parser` returned.

        Returns:
            The request.

        Raises:
            MrFlowError: A word names no draft.
        """
        picks = tuple(Pick.from_text(text) for text in args.drafts)
        model, output = ModelChoices.from_args(args), OutputChoices.from_args(args)
        return cls(picks, model, args.save_stages, f".{args.format}", output)


def add_parser(commands: Commands) -> None:
    """Add `mrflow finish`.

    Args:
        commands: Where the parser is added.
    """
    parser = commands.add_parser(
        "finish",
        parents=[model_options(), output_options(), common_options()],
        allow_abbrev=False,
        help="finish drafts at full size",
    )
    parser.add_argument(
        "drafts",
        nargs="+",
        type=path_text_option,
        metavar="DRAFT",
        help="a draft's file, or numbers on a contact sheet: drafts.png#3 or drafts.png#1,4-6",
    )
    parser.add_argument(
        "--format", type=format_option, default="png", metavar="png|jpg|webp", help="of the finished images"
    )
    parser.add_argument("--save-stages", action="store_true", help="save the image of every stage too")
    parser.set_defaults(from_args=FinishRequest.from_args, run=run)


def run(request: FinishRequest) -> Outcome:
    """Finish drafts and save the images.

    Args:
        request: Which.

    Returns:
        The images; where an error came after the first of them, or a signal, what was made by then, and the error.

    Raises:
        KeyboardInterrupt: It came before there was an image to keep.
        MrFlowError: A draft, the model, the upscaler or the output folder cannot be used.
    """
    results = Results()
    try:
        _finish_all(request, results)
    except (Exception, KeyboardInterrupt) as error:
        if not (results.images or results.lost or current().requested):
            raise
        return results.outcome(error)
    return results.outcome()


def _finish_all(request: FinishRequest, results: Results) -> None:
    from mrflow_sched.drafts import fitted

    output, model = request.output, request.model
    picked = _picked(request)
    source = picked[0].record
    _check_alike(picked)
    results.plan = picked[0].job.plan
    for each in picked:
        check_format(request.suffix, each.job.plan)
    check_source(picked[0].name, model, source)
    family = plan_family(model)
    file = find_upscaler(model, source)
    check_model(model, source)
    other = other_upscaler(file, source)
    if other is not None and model.upscaler is None:
        raise MrFlowError(other)
    model = recorded_loras(model, source)
    check_packages(model, picked[0].job.plan)
    check_memory(model, family, *(each.job.plan for each in picked))
    with writable(output.folder), saying_warnings(results.notes), threads_of(source):
        loaded = load(model, picked[0].job, file)
        results.upscaler = None if loaded.upscaler is None else loaded.upscaler.name
        record = make_record(model, picked[0].job, loaded)
        say_differences(source, record)
        if other is not None:
            say(f"{other[:1].upper()}{other[1:].partition(';')[0]}, as you asked.{_of_kind(picked[0], file)}")
        picked = tuple(replace(each, draft=fitted(each.draft, loaded.engine)) for each in picked)
        say_new(_notes(picked), results.notes)
        with current().keeping() as stop, progress_bar(output.progress) as bar:
            for number, each in enumerate(picked, 1):
                name = "" if len(picked) == 1 else f"{number} of {len(picked)}"
                finish_one(
                    loaded,
                    each,
                    bar=bar,
                    name=name,
                    stop=stop,
                    folder=output.folder,
                    suffix=request.suffix,
                    record=_finished(record, each.record),
                    results=results,
                    keep_stages=request.save_stages,
                )
                if stop.requested:
                    break
        if stop.requested and not results.images:
            raise Stopped
        results.tell_missing()


def _of_kind(picked: Picked, file: Path | None) -> str:
    """Say that a draft's later stages were planned for another kind of upscaler; they stay as they were planned."""
    now: UpscalerKind = "interpolation" if file is None else "network"
    if picked.job.plan.upscaler_kind == now:
        return ""
    wanted = "more noise and steps" if now == "interpolation" else "less noise and fewer steps"
    return f" Its refining stays as it was planned for that one; a new draft with --upscaler has {wanted}."


def _picked(request: FinishRequest) -> tuple[Picked, ...]:
    """Read the drafts, each once; files that are named are looked at before a model is loaded."""
    named = [found for pick in request.picks for found in files_of(pick)]
    unique = {(file.resolve(), record and record.to_json()): (name, file, record) for name, file, record in named}
    read = [(file.resolve(), _read(name, file, record)) for name, file, record in unique.values()]
    return tuple({(place, each.record.to_json()): each for place, each in read}.values())


def _read(name: str, file: Path, listed: RunRecord | None) -> Picked:
    """Read a draft; one whose file is gone is sampled again as the contact sheet says."""
    from mrflow_sched.images.drafts import read_draft

    try:
        found = read_draft(file)
    except MrFlowError as error:
        if listed is None:
            raise
        gone = isinstance(error, MissingFileError)
        why = "is not beside the sheet" if gone else "is not a whole draft any more"
    else:
        if listed is None or found.record == listed:
            return _picked_of(name, found.record, found.latents, found.image, changed=found.changed)
        why = "is another draft than the sheet shows"
    say(f"{name} is {file.name!r}, which {why}, so stage 1 runs again as the sheet says.")
    import torch

    return _picked_of(name, listed, None, torch.empty(3, 0, 0), changed=False)


def _picked_of(name: str, record: RunRecord, latents: Tensor | None, image: Tensor, *, changed: bool) -> Picked:
    from mrflow_sched.drafts import draft_of

    draft = draft_of(name, record, image, None if changed else latents)
    job = Job(
        draft.plan,
        record.prompt,
        record.negative,
        source=record,
        refine_prompt=record.refine_prompt,
        refine_negative=record.refine_negative,
    )
    return Picked(name, record, job, draft, image if changed else None)


def _check_alike(picked: Sequence[Picked]) -> None:
    """Refuse drafts that one loaded model cannot finish as each was made."""
    first = picked[0]
    for each in picked[1:]:
        differing = next((name for name in _COMMON if getattr(each.record, name) != getattr(first.record, name)), None)
        if differing is not None:
            raise MrFlowError(
                f"{first.name} and {each.name} differ in their {_COMMON[differing]}; finish them in two commands."
            )


def _finished(record: RunRecord, drafted: RunRecord) -> RunRecord:
    """The record of a finished image: what is loaded now, with the run of the draft."""
    return replace(
        record,
        plan=drafted.plan,
        prompt=drafted.prompt,
        negative=drafted.negative,
        seed=drafted.seed,
        refine_prompt=drafted.refine_prompt,
        refine_negative=drafted.refine_negative,
    )


def _notes(picked: Sequence[Picked]) -> Iterator[str]:
    """What the user should know before the work begins."""
    from mrflow_sched.drafts import rerun_note

    for each in picked:
        listed = each.draft.steps is None and not each.draft.image.numel()  # `_read` has said that its file is gone
        note = None if each.pixels is not None or listed else rerun_note(each.name, each.draft)
        if note is not None:
            yield note
