"""`mrflow preview`: small images of what native runs will give; or, with --check, how near such previews are."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.console import DONE, REFUSED, Outcome, progress_bar, say, say_new, saying_warnings, writable
from mrflow_sched.apps.cli.forecast import check_memory
from mrflow_sched.apps.cli.inputs import read_prompts, syntax_notes
from mrflow_sched.apps.cli.load import Job, Loaded, check_packages, load, make_record, plan_family
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
from mrflow_sched.apps.cli.parsing import check_seeds, prompt_option, prompts_option, text_option, whole_number
from mrflow_sched.apps.cli.stopping import current
from mrflow_sched.apps.cli.wording import option_name
from mrflow_sched.images.parameters import PARAMETERS, parameters_text
from mrflow_sched.images.record import KEY, MAX_BATCH
from mrflow_sched.measure.preview_kinds import FEW_STEPS, KINDS, kind_note
from mrflow_sched.plan.options import PlanOptions

if TYPE_CHECKING:
    from mrflow_sched.measure.preview_check import Checked, PreviewCheck
    from mrflow_sched.plan.families import Family
    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.sampling.progress import Progress

_OF_NATIVE = (
    "These are previews of the native images of their seeds (mrflow generate --from PREVIEW makes one in full), not "
    "of the staged ones, which are other images."
)


@dataclass(frozen=True)
class PreviewRequest:
    """Native runs to preview, or a model to check previews on.

    Attributes:
        prompts: What the images show; empty takes those that the check comes with.
        negative: What they should not show, or None.
        batch: How many previews of each prompt; preview i has the plan's seed plus i.
        kind: How they are made, a key of `measure.preview_kinds.KINDS`.
        steps: Steps of the kind "few"; None: the usual number.
        check: Measure all kinds in place of making previews.
        choices: Options of the native plan.
        model: The model.
        output: Where the results go.
    """

    prompts: tuple[str, ...]
    negative: str | None
    batch: int
    kind: str
    steps: int | None
    check: bool
    choices: PlanChoices
    model: ModelChoices
    output: OutputChoices

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> PreviewRequest:
        """Make the request from parsed arguments.

        Args:
            args: What the parser of `add_parser` returned.

        Returns:
            The request.

        Raises:
            MrFlowError: The prompt is missing, or options do not go together.
        """
        _check_options(args)
        choices = PlanChoices.from_args(args)
        options: PlanOptions = {**choices.options, "native": True}
        prompts = () if args.prompt is None else (args.prompt,)
        return cls(
            prompts if args.prompts is None else read_prompts(args.prompts),
            args.negative,
            args.batch or 1,
            args.kind or "few",
            args.preview_steps,
            args.check,
            replace(choices, options=options),
            ModelChoices.from_args(args),
            OutputChoices.from_args(args),
        )


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if args.check:
        folder = None if args.out == Path("out") else args.out
        given = {"a prompt": args.prompt, "--kind": args.kind, "--batch": args.batch, "--out": folder}
        idle = next((name for name, value in given.items() if value is not None), None)
        if idle is not None:
            raise MrFlowError(
                f"--check measures every kind on the prompts of --prompts FILE, so {idle} has no meaning; leave it out."
            )
    elif args.prompt is None and args.prompts is None:
        raise MrFlowError(
            'the prompt is missing; say what the image shows, as in mrflow preview "a blue star" --batch 8.'
        )
    if args.prompt is not None and args.prompts is not None:
        raise MrFlowError("--prompts gives all prompts, so a prompt beside it has no meaning; leave one out.")
    if args.preview_steps is not None and args.kind not in (None, "few"):
        raise MrFlowError(f"--preview-steps are those of the kind few, not of {args.kind}; leave one out.")
    usual = {"upscaler": None, "upscaler_tile": None, "upscaler_dtype": "auto"}
    idle = next((name for name, value in usual.items() if getattr(args, name) != value), None)
    if idle is not None:
        raise MrFlowError(f"a native run has no upscaler, so {option_name(idle)} has no meaning; leave it out.")


def add_parser(commands: Commands) -> None:
    """Add `mrflow preview`.

    Args:
        commands: Where the parser is added.
    """
    parser = commands.add_parser(
        "preview",
        parents=[plan_options(native=False, staged=False), model_options(), output_options(), common_options()],
        allow_abbrev=False,
        help="preview native runs, small and for less; --check measures how near previews are on a model",
    )
    parser.add_argument(
        "prompt", nargs="?", type=prompt_option, metavar="PROMPT", help="what the image shows, in quotation marks"
    )
    parser.add_argument("--prompts", type=prompts_option, metavar="FILE", help="a prompt on each line; - is stdin")
    parser.add_argument(
        "--negative", type=text_option, metavar="TEXT", help="what the image should not show, for models that use it"
    )
    parser.add_argument(
        "--batch", type=whole_number(1, MAX_BATCH), metavar="N", help="number of previews of each prompt (default 1)"
    )
    parser.add_argument(
        "--kind", choices=tuple(KINDS), help="how previews are made, see docs/previews.md (default few)"
    )
    parser.add_argument(
        "--preview-steps", type=whole_number(1, 1000), metavar="N", help="steps of the kind few, 4 to 8 (default 6)"
    )
    parser.add_argument("--check", action="store_true", help="run native images and every kind of preview, and compare")
    parser.set_defaults(from_args=PreviewRequest.from_args, run=run)


def run(request: PreviewRequest) -> Outcome:
    """Make and save previews, or measure them.

    Args:
        request: What to preview or to check.

    Returns:
        The previews; where an error or a signal came after the first of them, what was saved by then. With --check, the
        numbers of every kind.

    Raises:
        KeyboardInterrupt: It came before there was a preview to keep.
        MrFlowError: The plan, the model or the output folder cannot be used, or the kind is none for the model.
    """
    family = plan_family(request.model)
    plan = request.choices.make_plan(family)
    check_packages(request.model, plan)
    check_memory(request.model, family, plan)
    if request.check:
        return _check(request, plan)
    check_seeds(plan.seed, request.batch)
    made = _Made(plan, request.kind)
    try:
        _make_all(request, family, plan, made)
    except (Exception, KeyboardInterrupt) as error:
        if not made.images:
            raise
        return made.outcome(error)
    return made.outcome()


# --- making ------------------------------------------------------------------------------------


@dataclass
class _Made:
    """The previews that are saved.

    Attributes:
        plan: The native plan of the first.
        kind: How they are made.
        images: One entry each, as docs/cli.md describes.
        lost: Names of those with NaN or infinity.
        notes: What the user was told.
    """

    plan: StagedPlan
    kind: str
    images: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    lost: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])

    def outcome(self, error: BaseException | None = None) -> Outcome:
        current().end()
        value: dict[str, Any] = {
            "previews": self.images,
            "of": "native",
            "kind": self.kind,
            "plan": self.plan.to_string(),
            "lost": self.lost,
            "notes": self.notes,
        }
        if self.lost:
            value["error"] = f"not saved, because of NaN or infinity in the image: {', '.join(self.lost)}."
            say(value["error"])
        lines = tuple(str(each["path"]) for each in self.images)
        return Outcome(value, lines, REFUSED if self.lost else DONE, error)


def _make_all(request: PreviewRequest, family: str | Family, plan: StagedPlan, made: _Made) -> None:
    """Load the model, then make and save each preview by itself, so that it is the same in every batch."""
    from mrflow_sched.measure.previews import few_plan, preview

    steps = request.steps or FEW_STEPS
    if request.kind == "few":
        few_plan(plan, steps, "--preview-steps")
    job = Job(plan, request.prompts[0], request.negative)
    with writable(request.output.folder), saying_warnings(made.notes):
        note = kind_note(request.kind, plan.family)
        loaded = load(request.model, job, None)
        words = syntax_notes(*request.prompts, request.negative)
        say_new((_OF_NATIVE, *([] if note is None else [note]), *job.notes, *words), made.notes)
        stop, count = current(), len(request.prompts) * request.batch
        with progress_bar(request.output.progress) as bar:
            for number in range(count):
                own = replace(plan, seed=plan.seed + number % request.batch)
                one = replace(job, plan=own, prompt=request.prompts[number // request.batch])

                def follow(step: Progress, name: str = f"{number + 1} of {count}") -> None:
                    stop.check()
                    bar(name, step)

                found = preview(
                    *(loaded.engine, own, one.prompt),
                    kind=request.kind,
                    steps=steps,
                    negative_prompt=request.negative,
                    callback=follow,
                )
                say_new(found.warnings, made.notes)
                _save(request, loaded, one, found, made)


def _save(request: PreviewRequest, loaded: Loaded, job: Job, found: Any, made: _Made) -> None:
    """Write a preview with the record of the native run that it previews."""
    from mrflow_sched.images.files import save_new

    record = replace(make_record(request.model, job, loaded), preview=found.title)
    stem = f"mrflow-{job.plan.seed}-preview-{found.kind}"
    image = found.images[0]
    if not bool(image.isfinite().all()):
        made.lost.append(f"{stem}.png")
        return
    text = {PARAMETERS: parameters_text(record), KEY: record.to_json()}
    with current().whole():
        path: Path = save_new(request.output.folder, stem, image, text, ".png")
        made.images.append(
            {
                "path": str(path),
                "prompt": job.prompt,
                "seed": job.plan.seed,
                "cost": found.cost,
                "seconds": found.seconds,
                "plan": job.plan.to_string(),
            }
        )


# --- checking ----------------------------------------------------------------------------------


def _check(request: PreviewRequest, plan: StagedPlan) -> Outcome:
    """Measure all kinds on the model."""
    from mrflow_sched.measure.preview_check import SEEDS, check_previews

    check_seeds(plan.seed, SEEDS)
    prompts = request.prompts or _usual_prompts(request.model)
    job, notes = Job(plan, prompts[0], request.negative), list[str]()
    with saying_warnings(notes):
        loaded = load(request.model, job, None)
        say_new((*job.notes, *syntax_notes(*prompts, request.negative)), notes)
        stop = current()

        def follow(name: str, step: Progress) -> None:
            stop.check()
            bar(name, step)

        with progress_bar(request.output.progress) as bar:
            found = check_previews(
                *(loaded.engine, plan, prompts),
                steps=request.steps or FEW_STEPS,
                negative_prompt=request.negative,
                callback=follow,
            )
    return Outcome(_numbers(found), tuple(_lines(found)))


def _usual_prompts(model: ModelChoices) -> tuple[str, ...]:
    from mrflow_sched import demo
    from mrflow_sched.apps.cli.calibrate import USUAL_PROMPTS

    return USUAL_PROMPTS if model.model is not None else demo.example_prompts()


def _numbers(found: PreviewCheck) -> dict[str, Any]:
    """The value that docs/cli.md describes."""
    return {
        "plan": found.plan.to_string(),
        "prompts": found.prompts,
        "native_seconds": found.native_seconds,
        "floor": {"psnr": found.floor[0], "ssim": found.floor[1]},
        "kinds": [
            {
                "kind": row.kind,
                "refusal": row.refusal,
                **({} if row.refusal else _numbers_of(row)),
            }
            for row in found.rows
        ],
    }


def _numbers_of(row: Checked) -> dict[str, Any]:
    names = ("psnr", "ssim", "own_seed", "cost", "seconds", "ideal", "gain", "ideal_gain", "enough", "keeps_its_word")
    return {name: getattr(row, name) for name in names}


def _lines(found: PreviewCheck) -> Iterator[str]:
    full = found.plan
    yield (
        f"{full.family}: {found.prompts} prompts x 2 seeds, native {full.requested_width}x{full.requested_height}, "
        f"{full.stages[0].steps} steps, {found.native_seconds:.2f} s each; previews against the native image, shrunk"
    )
    yield f"{'':<16} {'evaluations':>11} {'seconds':>8} {'PSNR':>6} {'SSIM':>6} {'own seed':>8} {'D x1':>6}   its word"
    for row in found.rows:
        if row.refusal is not None:
            yield f"{row.kind:<16} {row.refusal}"
            continue
        ideal = "" if row.ideal is None else f"{row.ideal:.2f}"
        yield (
            f"{row.kind:<16} {row.cost:>11.1f} {row.seconds:>8.2f} {row.psnr:>6.2f} {row.ssim:>6.3f} "
            f"{row.own_seed:>8.2f} {ideal:>6}   {_word(row)}"
        )
    yield f"{'other seed':<16} {'':>11} {'':>8} {found.floor[0]:>6.2f} {found.floor[1]:>6.3f}"
    yield (
        "A chain keeps its word where it and its D x1 are both nearer than nested, by a paired t over prompts above "
        f"{found.rows[0].enough:.1f}, which {found.prompts} prompts reach by chance once in forty."
    )


def _word(row: Checked) -> str:
    if row.keeps_its_word is None or row.gain is None or row.ideal_gain is None:
        return "needs no D"
    verdict = "kept" if row.keeps_its_word else "NOT kept"
    return f"{verdict} (t {row.gain:+.1f}, of D x1 {row.ideal_gain:+.1f})"
