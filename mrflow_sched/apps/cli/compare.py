"""`mrflow compare`: time native and staged sampling against each other."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mrflow_sched.apps.cli.console import Outcome, progress_bar, say, saying_warnings, writable
from mrflow_sched.apps.cli.forecast import check_memory
from mrflow_sched.apps.cli.inputs import syntax_notes
from mrflow_sched.apps.cli.load import Job, check_packages, find_upscaler, load, make_record, plan_family, upscaler_kind
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
from mrflow_sched.apps.cli.parsing import prompt_option, text_option, whole_number
from mrflow_sched.apps.cli.stopping import current
from mrflow_sched.images.parameters import PARAMETERS, parameters_text
from mrflow_sched.images.record import KEY
from mrflow_sched.plan.options import PlanOptions

if TYPE_CHECKING:
    from mrflow_sched.measure.runs import Comparison, Part
    from mrflow_sched.plan.families import Family
    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.sampler import StagedResult
    from mrflow_sched.sampling.progress import Progress


@dataclass(frozen=True)
class CompareRequest:
    """A prompt to sample natively and staged.

    Attributes:
        prompt: What the image shows.
        negative: What it should not show, or None.
        choices: Options of the staged plan, "euler" as its solver unless --solver was given.
        native_steps: Steps of the native run; None takes the family's own number.
        repeats: Runs of each kind, 1 to 100; the one of median time counts.
        model: The model and the upscaler.
        output: Where the results go.
    """

    prompt: str
    negative: str | None
    choices: PlanChoices
    native_steps: int | None
    repeats: int
    model: ModelChoices
    output: OutputChoices

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> CompareRequest:
        """Make the request from parsed arguments.

        Args:
            args: What the parser of `add_parser` returned.

        Returns:
            The request.
        """
        choices = PlanChoices.from_args(args)
        # Euler unless --solver says otherwise, because that is what native pipelines run; --steps is the native run's.
        options: PlanOptions = {"solver": "euler", **choices.options}
        options.pop("steps", None)
        model, output = ModelChoices.from_args(args), OutputChoices.from_args(args)
        return cls(
            args.prompt, args.negative, replace(choices, options=options), args.steps, args.repeats, model, output
        )


def add_parser(commands: Commands) -> None:
    """Add `mrflow compare`.

    Args:
        commands: Where the parser is added.
    """
    parser = commands.add_parser(
        "compare",
        parents=[plan_options(native=False), model_options(), output_options(), common_options()],
        allow_abbrev=False,
        help="measure native and staged sampling",
    )
    parser.add_argument("prompt", type=prompt_option, metavar="PROMPT", help="what the image shows, in quotation marks")
    parser.add_argument(
        "--negative", type=text_option, metavar="TEXT", help="what the image should not show, for models that use it"
    )
    parser.add_argument(
        "--repeats",
        type=whole_number(1, 100),
        default=1,
        metavar="N",
        help="runs of each; the one of median time counts (default 1)",
    )
    parser.set_defaults(from_args=CompareRequest.from_args, run=run)


def run(request: CompareRequest) -> Outcome:
    """Run native and staged sampling and save the images.

    Args:
        request: What to compare.

    Returns:
        The seconds of both, and where the images are.

    Raises:
        MrFlowError: The plan, the model, the upscaler or the output folder cannot be used.
    """
    family = plan_family(request.model)
    kind = upscaler_kind(request.model)
    plan = request.choices.make_plan(family, upscaler_kind=kind)
    from mrflow_sched.measure.compare import compare, native_plan_of

    file = find_upscaler(request.model)
    job = Job(plan, request.prompt, request.negative)
    native = native_plan_of(plan, request.native_steps, family=None if isinstance(family, str) else family)
    check_packages(request.model, plan)
    check_memory(request.model, family, plan, native)
    with writable(request.output.folder), saying_warnings():
        loaded = load(request.model, job, file)
        words = syntax_notes(request.prompt, request.negative)
        for note in (*plan.notes, *_solver_note(request.choices, plan, family), *words):
            say(note)
        staged = make_record(request.model, job, loaded)
        alone = make_record(request.model, job, replace(loaded, upscaler=None, file=None))

        def save(result: StagedResult, path: Path) -> None:
            from mrflow_sched.images.files import save_png

            record = alone if len(result.plan.stages) == 1 else staged
            one = replace(record, plan=result.plan.to_string())
            save_png(path, result.images[0], {PARAMETERS: parameters_text(one), KEY: one.to_json()})

        stop = current()

        def follow(name: str, step: Progress) -> None:
            stop.check()
            bar(name, step)

        with progress_bar(request.output.progress) as bar:
            found = compare(
                loaded.engine,
                request.prompt,
                plan,
                request.output.folder,
                negative_prompt=request.negative,
                native_plan=native_plan_of(plan, request.native_steps, family=loaded.engine.family),
                upscaler=loaded.upscaler,
                save=save,
                repeats=request.repeats,
                callback=follow,
            )
    return Outcome(found.to_dict(), tuple(_lines(found)))


def _solver_note(choices: PlanChoices, plan: StagedPlan, family: str | Family) -> Iterator[str]:
    """Say where `mrflow generate` would make another image than this comparison, because of the solver."""
    options: PlanOptions = {**choices.options}
    options.pop("solver", None)
    used, usual = (each.stages[0].solver for each in (plan, replace(choices, options=options).make_plan(family)))
    if used != usual:
        yield f"Both ways use the solver {used}, as native pipelines do; mrflow generate uses {usual} (see --solver)."


def _lines(found: Comparison) -> Iterator[str]:
    native, staged = found.native, found.staged
    other = "staged" if len(found.plan.stages) > 1 else found.plan.preset
    yield f"native {native.seconds:.2f} s, {other} {staged.seconds:.2f} s: {found.speedup:.2f}x as fast"
    yield f"native: {_seconds(native.parts)}"
    yield f"{other}: {_seconds(staged.parts)}"
    yield f"outside the network: {found.overhead_share:.1%} of the {other} time"
    yield f"peak memory: {found.peak_memory_ratio:.2f}x native"
    yield f"image: {found.sheet}"


def _seconds(parts: tuple[Part, ...]) -> str:
    return ", ".join(f"{part.name} {part.seconds:.2f} s" for part in parts)
