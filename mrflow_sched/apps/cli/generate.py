"""`mrflow generate`: make images from prompts or an image, or repeat the run of a saved image."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.console import Outcome, progress_bar, say_new, saying_warnings, writable
from mrflow_sched.apps.cli.forecast import check_memory, fit_to_card
from mrflow_sched.apps.cli.inputs import read_mask, read_prompts, read_references, read_start, syntax_notes
from mrflow_sched.apps.cli.load import (
    Job,
    Loaded,
    check_packages,
    find_upscaler,
    load,
    make_record,
    plan_family,
    threads_of,
    upscaler_kind,
)
from mrflow_sched.apps.cli.meaning import check_run_options
from mrflow_sched.apps.cli.options import (
    Commands,
    ModelChoices,
    OutputChoices,
    PlanChoices,
    add_memory,
    common_options,
    model_options,
    output_options,
    plan_options,
)
from mrflow_sched.apps.cli.parsing import (
    check_seeds,
    format_option,
    number_option,
    path_option,
    prompt_option,
    prompts_option,
    text_option,
    whole_number,
)
from mrflow_sched.apps.cli.repeat import Changes, check_weights, recorded_loras, repeated_job, say_differences
from mrflow_sched.apps.cli.results import Results, check_format, holds_alpha
from mrflow_sched.apps.cli.stopping import Stop, Stopped, current
from mrflow_sched.apps.cli.wording import option_name, with_options
from mrflow_sched.images.record import MAX_BATCH
from mrflow_sched.plan.options import OPTIONS

if TYPE_CHECKING:
    from mrflow_sched.plan.families import Family
    from mrflow_sched.sampler import StagedResult
    from mrflow_sched.sampling.progress import Progress


@dataclass(frozen=True)
class GenerateRequest:
    """Images to make.

    Attributes:
        prompts: What the images show; each makes its own, with the same plan and the same seeds.
        negative: What they should not show, or None.
        refine_prompt: What the stages after the first show instead, or None.
        refine_negative: What those should not show instead, or None.
        batch: How many images of each prompt, 1 to `images.record.MAX_BATCH`; image i has the plan's seed plus i.
        choices: Options of the plan.
        image: An image file to start from, or None.
        strength: The sigma at which stage 1 starts from it; None: it takes the place of stage 1.
        model: The model and the upscaler.
        save_stages: Save the image of each stage too.
        suffix: Ending of the image files, which decides their format.
        output: Where the results go.
        references: Image files that an editing model looks at.
        refine_mask: An image file, white where later stages refine; None: everywhere.
        memory: Of the card in GiB, for which offload and tiles are chosen; None: neither is.
    """

    prompts: tuple[str, ...]
    negative: str | None
    refine_prompt: str | None
    refine_negative: str | None
    batch: int
    choices: PlanChoices
    image: Path | None
    strength: float | None
    model: ModelChoices
    save_stages: bool
    suffix: str
    output: OutputChoices
    references: tuple[Path, ...] = ()
    refine_mask: Path | None = None
    memory: float | None = None

    def jobs(self, family: str | Family) -> tuple[Job, ...]:
        """Plan the runs.

        Args:
            family: The model's, from `plan_family`.

        Returns:
            A job for each prompt, all of whose images are saved.

        Raises:
            MrFlowError: The options make no plan, or the image or the model's folder cannot be used.
        """
        start = None if self.image is None else read_start(self.image, self.strength)
        plan = self.choices.make_plan(family, start, upscaler_kind=upscaler_kind(self.model))
        if self.refine_mask is not None:
            from mrflow_sched.methods.sparse_refine import check_refine_mask

            try:
                check_refine_mask(plan)
            except MrFlowError as error:
                raise MrFlowError(with_options(str(error))) from error
        check_seeds(plan.seed, self.batch)
        first = Job(
            plan,
            self.prompts[0],
            self.negative,
            self.batch,
            tuple(range(self.batch)),
            start=start,
            refine_prompt=self.refine_prompt,
            refine_negative=self.refine_negative,
            references=read_references(self.references),
            refine_mask=None if self.refine_mask is None else read_mask(self.refine_mask),
        )
        return tuple(replace(first, prompt=prompt) for prompt in self.prompts)


@dataclass(frozen=True)
class RepeatRequest:
    """The run of a saved image, to be repeated.

    Attributes:
        source: An image file with a record, or with the texts of A1111 or ComfyUI.
        image: The image file that the run started from, or None.
        changes: What else was asked for, which an image of another program allows.
        model: The model, the upscaler and the LoRAs, which must be those of the record.
        save_stages: Save the image of each stage too.
        suffix: Ending of the image files, which decides their format.
        output: Where the results go.
        references: Image files that an editing model looked at.
        refine_mask: An image file, white where later stages refine; None: everywhere.
        memory: Of the card in GiB, for which offload and tiles are chosen; None: neither is.
    """

    source: Path
    image: Path | None
    changes: Changes
    model: ModelChoices
    save_stages: bool
    suffix: str
    output: OutputChoices
    references: tuple[Path, ...] = ()
    refine_mask: Path | None = None
    memory: float | None = None

    def jobs(self, family: str | Family) -> tuple[Job, ...]:
        """Read the run.

        Args:
            family: The model's, from `plan_family`.

        Returns:
            One job; of a recorded run only the image of the file is saved.

        Raises:
            MrFlowError: The file has no readable record, or was made with other files than those given.
        """
        return (
            repeated_job(self.source, self.model, self.image, family, self.changes, self.references, self.refine_mask),
        )


def request_of(args: argparse.Namespace) -> GenerateRequest | RepeatRequest:
    """Make the request from parsed arguments.

    Args:
        args: What the parser of `add_parser` returned.

    Returns:
        A `RepeatRequest` where --from was given, else a `GenerateRequest`.

    Raises:
        MrFlowError: The prompt is missing, or options do not go together.
    """
    model, output, choices = ModelChoices.from_args(args), OutputChoices.from_args(args), PlanChoices.from_args(args)
    if args.source is None:
        check_run_options(args)
        return GenerateRequest(
            (args.prompt,) if args.prompts is None else read_prompts(args.prompts),
            args.negative,
            args.refine_prompt,
            args.refine_negative,
            args.batch or 1,
            choices,
            args.image,
            args.strength,
            model,
            args.save_stages,
            f".{args.format}",
            output,
            tuple(args.reference or ()),
            args.refine_mask,
            args.memory,
        )
    fixed = next((word for word in ("prompt", "prompts", "strength") if getattr(args, word) is not None), None)
    if fixed is not None:
        name = "a prompt" if fixed == "prompt" else option_name(fixed)
        raise MrFlowError(
            f"--from takes the prompt and the start from the image, so {name} has no meaning; leave one out."
        )
    recorded = (*OPTIONS, "size", "negative", "refine_prompt", "refine_negative", "family", "calibration", "batch")
    names = tuple(option_name(word) for word in recorded if getattr(args, word) is not None)
    words = args.negative, args.refine_prompt, args.refine_negative
    changes = Changes(names, choices, args.batch or 1, *words, upscaler_kind(model))
    seen, suffix, mask = tuple(args.reference or ()), f".{args.format}", args.refine_mask
    rest = (args.save_stages, suffix, output, seen, mask, args.memory)
    return RepeatRequest(args.source, args.image, changes, model, *rest)


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
    parser.add_argument(
        "prompt", nargs="?", type=prompt_option, metavar="PROMPT", help="what the image shows, in quotation marks"
    )
    parser.add_argument(
        "--prompts",
        type=prompts_option,
        metavar="FILE",
        help="a prompt on each line, for images of its own; - is stdin",
    )
    parser.add_argument(
        "--negative", type=text_option, metavar="TEXT", help="what the image should not show, for models that use it"
    )
    parser.add_argument(
        "--refine-prompt", type=prompt_option, metavar="TEXT", help="the prompt of the later stages (default: PROMPT)"
    )
    parser.add_argument(
        "--refine-negative", type=text_option, metavar="TEXT", help="the negative prompt of the later stages"
    )
    parser.add_argument(
        "--image", type=path_option, metavar="FILE", help="an image to upscale and refine, in place of stage 1"
    )
    parser.add_argument(
        "--strength",
        type=number_option,
        metavar="S",
        help="start stage 1 from --image at this sigma, above 0 (keep it) and at most 1 (ignore it)",
    )
    parser.add_argument(
        "--reference",
        type=path_option,
        action="append",
        metavar="FILE",
        help="an image for an editing model to look at; several with several options",
    )
    parser.add_argument(
        "--refine-mask",
        type=path_option,
        metavar="FILE",
        help="an image, white where later stages refine; elsewhere the upscaled image stays (FLUX.1, FLUX.2)",
    )
    parser.add_argument("--batch", type=whole_number(1, MAX_BATCH), metavar="N", help="number of images (default 1)")
    parser.add_argument(
        "--format",
        type=format_option,
        default="png",
        metavar="png|jpg|webp",
        help="of the saved images (default png, lossless)",
    )
    add_memory(parser)
    parser.add_argument("--save-stages", action="store_true", help="save the image of every stage too")
    parser.add_argument(
        "--from", dest="source", type=path_option, metavar="IMAGE", help="repeat the run of a saved image"
    )
    parser.set_defaults(from_args=request_of, run=run)


def run(request: GenerateRequest | RepeatRequest) -> Outcome:
    """Make and save the images.

    Args:
        request: What to make or to repeat.

    Returns:
        The images; where an error came after the first of them, or a signal, what was made by then, and the error.

    Raises:
        KeyboardInterrupt: It came where no signals are watched, before there was an image to keep.
        MrFlowError: The plan, a file, the model, the upscaler, the record or the output folder cannot be used, or no
            image is left to save.
    """
    results = Results()
    try:
        _make_all(request, results)
    except (Exception, KeyboardInterrupt) as error:
        if not (results.images or results.lost or current().requested):
            raise
        return results.outcome(error)
    return results.outcome()


def _make_all(request: GenerateRequest | RepeatRequest, results: Results) -> None:
    """Plan, check, load, sample and save; files that are named are looked at before a model is loaded."""
    output, model = request.output, request.model
    family = plan_family(model)
    jobs = request.jobs(family)
    source = jobs[0].source
    results.plan = jobs[0].plan
    if request.save_stages and len(jobs[0].plan.stages) == 1:
        raise MrFlowError("--save-stages has no meaning for a native run, which has one stage; leave it out.")
    check_format(request.suffix, jobs[0].plan)
    file = find_upscaler(model, source)
    if source is not None:
        check_weights(model, file, source)
        model = recorded_loras(model, source)
    if request.memory is not None:
        model, fitted = fit_to_card(
            *(model, family, jobs[0].plan, request.memory), batch=jobs[0].batch, tiles=source is None
        )
        jobs = tuple(replace(job, plan=fitted.plan) for job in jobs)
        results.plan = fitted.plan
        say_new((fitted.sentence,), results.notes)
    check_packages(model, jobs[0].plan)
    check_memory(model, family, jobs[0].plan, batch=jobs[0].batch)
    with writable(output.folder), saying_warnings(results.notes), threads_of(source):
        loaded = load(model, jobs[0], file)
        results.upscaler = None if loaded.upscaler is None else loaded.upscaler.name
        record = make_record(model, jobs[0], loaded)
        if source is not None:
            say_differences(source, record)
        say_new(_notes(jobs, request.suffix), results.notes)
        with current().keeping() as stop, progress_bar(output.progress) as bar:
            for number, job in enumerate(jobs, 1):
                name = "" if len(jobs) == 1 else f"{number} of {len(jobs)}"
                result = _sample(loaded, job, lambda step, name=name: bar(name, step), stop, request.save_stages)
                if result.empty:
                    break
                results.add_timings(result.timings)
                results.save(output.folder, request.suffix, job, replace(record, prompt=job.prompt), result)
                if stop.requested:
                    break
        if stop.requested and not results.images:
            raise Stopped
        results.tell_missing()


def _notes(jobs: tuple[Job, ...], suffix: str) -> Iterator[str]:
    """What the user should know of the runs before they begin."""
    first = jobs[0]
    yield from first.notes
    if first.source is None:
        texts = (first.negative, first.refine_prompt, first.refine_negative)
        yield from syntax_notes(*(job.prompt for job in jobs), *texts)
    if first.start is not None and first.start.alpha is not None and not holds_alpha(suffix):
        yield f"{suffix} holds no transparency, so that of the image is lost; use png."


def _sample(
    loaded: Loaded, job: Job, callback: Callable[[Progress], None], stop: Stop, keep_stages: bool
) -> StagedResult:
    from mrflow_sched.methods import method_of
    from mrflow_sched.sampler import sample_staged

    return sample_staged(
        loaded.engine,
        job.plan,
        job.prompt,
        negative_prompt=job.negative,
        refine_prompt=job.refine_prompt,
        refine_negative_prompt=job.refine_negative,
        batch=job.batch,
        upscaler=loaded.upscaler,
        callback=callback,
        cancel=stop.polled,
        keep_stages=keep_stages,
        image=None if job.start is None else job.start.for_engine(loaded.engine),
        start_sigma=None if job.start is None else job.start.strength,
        method=None if job.refine_mask is None else method_of(job.plan, job.refine_mask.pixels),
    )
