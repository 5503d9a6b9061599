"""`mrflow draft`: stage 1 alone for many seeds, a contact sheet to choose from, perhaps the best finished."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrflow_sched._runtime.errors import MrFlowError, shown
from mrflow_sched.apps.cli.console import DONE, REFUSED, Outcome, progress_bar, say, say_new, saying_warnings, writable
from mrflow_sched.apps.cli.drafting import MOST_DRAFTS, Picked, SavedDraft, finish_one, save, sheet_text
from mrflow_sched.apps.cli.forecast import check_memory
from mrflow_sched.apps.cli.inputs import read_prompts, syntax_notes
from mrflow_sched.apps.cli.load import (
    Job,
    Loaded,
    check_packages,
    find_upscaler,
    load,
    make_record,
    plan_family,
    upscaler_kind,
)
from mrflow_sched.apps.cli.options import (
    Commands,
    ModelChoices,
    OutputChoices,
    PlanChoices,
    common_options,
    model_options,
    output_options,
    plan_options,
)
from mrflow_sched.apps.cli.parsing import (
    check_seeds,
    format_option,
    prompt_option,
    prompts_option,
    text_option,
    whole_number,
)
from mrflow_sched.apps.cli.results import Results, check_format
from mrflow_sched.apps.cli.stopping import Stop, Stopped, current
from mrflow_sched.images.record import MAX_BATCH, RunRecord
from mrflow_sched.plan.checks import MAX_STEPS

if TYPE_CHECKING:
    from mrflow_sched.drafts import Draft
    from mrflow_sched.measure.ranking import RankReport
    from mrflow_sched.measure.scores import Score
    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.sampling.progress import Progress

_LEAST_FINISHED = 3
"""Finished images below which their order says nothing."""

_MOST_TOLD = 3
"""Prompts of which reports are told; --json has all of them."""

_LONGEST = 40
"""Letters of a prompt at the head of a report."""


@dataclass(frozen=True)
class DraftRequest:
    """Drafts to make.

    Attributes:
        prompts: What the images show.
        negative: What they should not show, or None.
        refine_prompt: What the later stages show instead, or None.
        refine_negative: What those should not show instead, or None.
        batch: How many seeds of each prompt, 1 to `images.record.MAX_BATCH`.
        steps: Fewer steps for drafts that are for ranking alone, or None.
        scores: Names of the scores by which they are ordered.
        keep: How many of each prompt are finished.
        choices: Options of the plan.
        model: The model and the upscaler.
        suffix: Ending of the finished images' files.
        output: Where the results go.
    """

    prompts: tuple[str, ...]
    negative: str | None
    refine_prompt: str | None
    refine_negative: str | None
    batch: int
    steps: int | None
    scores: tuple[str, ...]
    keep: int
    choices: PlanChoices
    model: ModelChoices
    suffix: str
    output: OutputChoices

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> DraftRequest:
        """Make the request from parsed arguments.

        Args:
            args: What the parser of `add_parser` returned.

        Returns:
            The request.

        Raises:
            MrFlowError: The prompt is missing, or options do not go together.
        """
        if args.prompt is None and args.prompts is None:
            raise MrFlowError('the prompt is missing; say what the images show, as in mrflow draft "a blue star".')
        if args.prompt is not None and args.prompts is not None:
            raise MrFlowError("--prompts gives all prompts, so a prompt beside it has no meaning; leave one out.")
        idle = next((name for name in ("native", "steps") if getattr(args, name) is not None), None)
        if idle is not None:
            raise MrFlowError(
                f"--{idle} is for native sampling, which has no first stage to draft; leave it out, or use mrflow "
                "preview, which shows native images in advance."
            )
        if args.keep is not None and not args.score:
            raise MrFlowError(
                f"--keep {args.keep} finishes the best, and nothing says which those are; give --score too, or pick by "
                "eye and use mrflow finish."
            )
        if args.keep is not None and args.keep > args.batch:
            raise MrFlowError(f"--keep {args.keep} is more than the {args.batch} drafts of a prompt; raise --batch.")
        prompts = (str(args.prompt),) if args.prompts is None else read_prompts(args.prompts)
        return cls(
            prompts,
            args.negative,
            args.refine_prompt,
            args.refine_negative,
            args.batch,
            args.draft_steps,
            tuple(dict.fromkeys(args.score)),
            args.keep or 0,
            PlanChoices.from_args(args),
            ModelChoices.from_args(args),
            f".{args.format}",
            OutputChoices.from_args(args),
        )


def add_parser(commands: Commands) -> None:
    """Add `mrflow draft`.

    Args:
        commands: Where the parser is added.
    """
    parser = commands.add_parser(
        "draft",
        parents=[plan_options(), model_options(), output_options(), common_options()],
        allow_abbrev=False,
        help="make cheap drafts to choose from",
    )
    parser.add_argument("prompt", nargs="?", type=prompt_option, metavar="PROMPT", help="what the images show")
    parser.add_argument("--prompts", type=prompts_option, metavar="FILE", help="a prompt on each line; - is stdin")
    parser.add_argument("--negative", type=text_option, metavar="TEXT", help="what the images should not show")
    parser.add_argument("--refine-prompt", type=prompt_option, metavar="TEXT", help="the prompt of the later stages")
    parser.add_argument(
        "--refine-negative", type=text_option, metavar="TEXT", help="the negative prompt of the later stages"
    )
    parser.add_argument(
        "--batch",
        type=whole_number(1, MAX_BATCH),
        default=8,
        metavar="N",
        help="drafts of each prompt, with the seeds from --seed on (default 8)",
    )
    parser.add_argument(
        "--draft-steps",
        type=whole_number(1, MAX_STEPS),
        metavar="N",
        help="fewer steps than the plan's: cheaper drafts, for ranking alone; what is finished is another image",
    )
    parser.add_argument(
        "--score",
        type=text_option,
        action="append",
        default=[],
        metavar="NAME",
        help="order them by sharpness, colourfulness, contrast, saturation, brightness, judge, clip:FOLDER; repeatable",
    )
    parser.add_argument("--keep", type=whole_number(1, MAX_BATCH), metavar="K", help="finish the K best of each prompt")
    parser.add_argument(
        "--format", type=format_option, default="png", metavar="png|jpg|webp", help="of the finished images"
    )
    parser.set_defaults(from_args=DraftRequest.from_args, run=run)


# --- the work ----------------------------------------------------------------------------------


@dataclass
class Made:
    """What the command has made so far.

    Attributes:
        drafts: The saved drafts, in the order of their numbers.
        values: The scores of each, by name; empty where none was asked for.
        sheet: The contact sheet.
        reports: What is known of the order, (prompt, report).
        results: The finished images.
    """

    drafts: list[SavedDraft] = field(default_factory=list[SavedDraft])
    values: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    sheet: Path | None = None
    reports: list[tuple[str, RankReport]] = field(default_factory=list["tuple[str, RankReport]"])
    results: Results = field(default_factory=Results)

    def rows(self) -> list[tuple[int, SavedDraft, dict[str, float]]]:
        """The drafts as they are numbered.

        Returns:
            (number from 1, draft, its scores); there are no scores where none were asked for, or not all are known.
        """
        unknown: dict[str, float] = {}
        values = self.values if len(self.values) == len(self.drafts) else [unknown] * len(self.drafts)
        return [(number, *row) for number, row in enumerate(zip(self.drafts, values, strict=True), 1)]

    def outcome(self, error: BaseException | None = None) -> Outcome:
        """End the work.

        Args:
            error: What ended it early, or None.

        Returns:
            What the command made.
        """
        finished = self.results.outcome(error)
        value = {
            "sheet": None if self.sheet is None else str(self.sheet),
            "drafts": [
                {
                    "number": number,
                    "path": str(each.path),
                    "prompt": each.draft.prompt,
                    "seed": each.draft.seed,
                    "scores": scores,
                }
                for number, each, scores in self.rows()
            ],
            "reports": [{"prompt": prompt, **each.to_dict()} for prompt, each in self.reports],
            "finished": finished.value,
            "cancelled": finished.value["cancelled"],
            **({"error": finished.value["error"]} if "error" in finished.value else {}),
        }
        lines = (*(() if self.sheet is None else (str(self.sheet),)), *finished.lines)
        return Outcome(value, lines, REFUSED if self.results.missing else DONE, error)


def run(request: DraftRequest) -> Outcome:
    """Make drafts, their contact sheet, and the images of those that are kept.

    Args:
        request: What to make.

    Returns:
        Where everything is; where an error came after the first draft, or a signal, what was made by then, and the
        error.

    Raises:
        KeyboardInterrupt: It came before there was a draft to keep.
        MrFlowError: The plan, the model, the upscaler, a score or the output folder cannot be used.
    """
    made = Made()
    try:
        _make_all(request, made)
    except (Exception, KeyboardInterrupt) as error:
        if not (made.drafts or current().requested):
            raise
        return made.outcome(error)
    return made.outcome()


def _make_all(request: DraftRequest, made: Made) -> None:
    output, model = request.output, request.model
    family = plan_family(model)
    plan = request.choices.make_plan(family, upscaler_kind=upscaler_kind(model))
    check_seeds(plan.seed, request.batch)
    count = request.batch * len(request.prompts)
    if count > MOST_DRAFTS:
        raise MrFlowError(
            f"{len(request.prompts)} prompts x {request.batch} are {count} drafts; at most {MOST_DRAFTS}."
        )
    check_format(request.suffix, plan)
    file = find_upscaler(model)
    check_packages(model, plan)
    check_memory(model, family, plan if request.keep else replace(plan, stages=plan.stages[:1]))
    scores = _scores(request)
    job = Job(
        plan,
        request.prompts[0],
        request.negative,
        refine_prompt=request.refine_prompt,
        refine_negative=request.refine_negative,
    )
    made.results.plan = plan
    notes = made.results.notes
    with writable(output.folder), saying_warnings(notes):
        loaded = load(model, job, file)
        made.results.upscaler = None if loaded.upscaler is None else loaded.upscaler.name
        record = make_record(model, job, loaded)
        say_new((*job.notes, *syntax_notes(*request.prompts, request.negative), *_of_steps(request, plan)), notes)
        with current().keeping() as stop, progress_bar(output.progress) as bar:
            _make_drafts(request, loaded, plan, record, made, bar, stop)
            if not made.drafts:
                if stop.requested:
                    raise Stopped
                raise MrFlowError("no draft was made, because of NaN or infinity; try --dtype float32.")
            _put_in_order(made, scores)
            with stop.whole():
                _save_sheet(output.folder, made)
            if request.keep and not stop.requested:
                _finish_best(request, loaded, made, scores, bar, stop)
        _tell(made)
        made.results.tell_missing()


def _scores(request: DraftRequest) -> list[Score]:
    """The scores that were asked for, tried on a grey picture: what they refuse is told before a model is loaded."""
    if not request.scores:
        return []
    import torch

    from mrflow_sched._runtime.device import resolve_device
    from mrflow_sched.measure.scores import get_score

    scores = [get_score(name, device=resolve_device(request.model.device)) for name in request.scores]
    for score in scores:
        for prompt in dict.fromkeys(request.prompts):
            score(torch.full((1, 3, 64, 64), 0.5), [prompt])
    return scores


def _of_steps(request: DraftRequest, plan: StagedPlan) -> Iterator[str]:
    if request.steps is not None and request.steps != plan.stages[0].steps:
        yield (
            f"Drafts of {request.steps} steps are for ranking alone: a finished image comes from a stage 1 of its own, "
            f"of {plan.stages[0].steps} steps, and differs from its draft."
        )


def _make_drafts(
    request: DraftRequest,
    loaded: Loaded,
    plan: StagedPlan,
    record: RunRecord,
    made: Made,
    bar: Callable[[str, Progress], None],
    stop: Stop,
) -> None:
    from mrflow_sched.drafts import draft

    def keep(made_one: Draft) -> None:
        with stop.whole():
            made.drafts.append(save(request.output.folder, made_one, record))

    count = request.batch * len(request.prompts)
    draft(
        *(loaded.engine, plan, request.prompts),
        batch=request.batch,
        negative_prompt=request.negative,
        refine_prompt=request.refine_prompt,
        refine_negative_prompt=request.refine_negative,
        steps=request.steps,
        on_draft=keep,
        callback=lambda step: bar(f"draft {len(made.drafts) + 1} of {count}", step),
        cancel=stop.polled,
    )


def _put_in_order(made: Made, scores: Sequence[Score]) -> None:
    """Number the drafts: those of a prompt together, the best first where there are scores."""
    if not scores:
        return
    from mrflow_sched.measure.ranking import order, report

    ordered: list[SavedDraft] = []
    for group in _groups(made.drafts):
        rows, best_first = order(_stacked(group), [each.draft.prompt for each in group], scores)
        ordered += [group[number] for number in best_first]
        made.values += [_by_name(scores, rows[number]) for number in best_first]
        if len(group) > 1:
            for column, score in enumerate(scores):
                known = report([row[column] for row in rows], score=score.name)
                made.reports.append((group[0].draft.prompt, known))
    made.drafts = ordered


def _finish_best(
    request: DraftRequest,
    loaded: Loaded,
    made: Made,
    scores: Sequence[Score],
    bar: Callable[[str, Progress], None],
    stop: Stop,
) -> None:
    """Finish the best drafts of each prompt, and compare their scores with those of their drafts."""
    groups = _groups(made.drafts)
    total, done = sum(min(request.keep, len(group)) for group in groups), 0
    for group in groups:
        images: list[Any] = []
        drafted: list[SavedDraft] = []
        for saved in group[: request.keep]:
            done += 1
            record = replace(saved.record, unfinished=False, draft=None, draft_latents=None, draft_steps=None)
            job = Job(
                saved.draft.plan,
                saved.draft.prompt,
                request.negative,
                refine_prompt=request.refine_prompt,
                refine_negative=request.refine_negative,
            )
            picked = Picked(str(saved.path), saved.record, job, saved.draft)
            result = finish_one(
                loaded,
                picked,
                bar=bar,
                name=f"finish {done} of {total}",
                stop=stop,
                folder=request.output.folder,
                suffix=request.suffix,
                record=record,
                results=made.results,
            )
            if stop.requested:
                return
            if not result.unfinished:
                images.append(result.images[0].cpu())
                drafted.append(saved)
        _compare(made, drafted, images, scores)


def _compare(made: Made, drafted: Sequence[SavedDraft], images: Sequence[Any], scores: Sequence[Score]) -> None:
    """Note how far the scores of drafts told those of the finished images."""
    if len(images) < _LEAST_FINISHED:
        return
    import torch

    from mrflow_sched.measure.ranking import report

    prompts = [each.draft.prompt for each in drafted]
    for score in scores:
        before, after = score(_stacked(drafted), prompts), score(torch.stack(list(images)), prompts)
        made.reports.append((prompts[0], report(before, after, score=score.name)))


def _tell(made: Made) -> None:
    """Say what is known of the order."""
    prompts = list(dict.fromkeys(prompt for prompt, _ in made.reports))
    for prompt, known in made.reports:
        if prompt in prompts[:_MOST_TOLD]:
            told = known.lines()
            line = f"{told[0]} {told[-1]}"
            say(line if len(prompts) == 1 else f"{shown(prompt, _LONGEST)}: {line}")


def _save_sheet(folder: Path, made: Made) -> None:
    from mrflow_sched.images.convert import from_pictures, to_pil
    from mrflow_sched.images.files import save_new
    from mrflow_sched.measure.contact import Tile, draw_contact

    tiles = [
        Tile(
            each.draft.prompt,
            to_pil(each.draft.image),
            f"#{number}, seed {each.draft.seed}",
            tuple(f"{name} {value:.4g}" for name, value in scores.items()),
        )
        for number, each, scores in made.rows()
    ]
    made.sheet = save_new(folder, "drafts", from_pictures(draw_contact(tiles))[0], sheet_text(made.drafts))


def _groups(drafts: Sequence[SavedDraft]) -> list[list[SavedDraft]]:
    """The drafts of each prompt."""
    groups: dict[str, list[SavedDraft]] = {}
    for each in drafts:
        groups.setdefault(each.draft.prompt, []).append(each)
    return list(groups.values())


def _stacked(drafts: Sequence[SavedDraft]) -> Any:
    import torch

    return torch.stack([each.draft.image for each in drafts])


def _by_name(scores: Sequence[Score], row: Sequence[float]) -> dict[str, float]:
    return {score.name: value for score, value in zip(scores, row, strict=True)}
