"""`mrflow tune`: train a LoRA that raises a reward, watched by a second one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.console import DONE, REFUSED, Outcome, say, saying_warnings, writable
from mrflow_sched.apps.cli.forecast import check_memory
from mrflow_sched.apps.cli.inputs import read_prompts
from mrflow_sched.apps.cli.load import (
    check_packages,
    find_upscaler,
    load_engine,
    open_upscaler,
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
from mrflow_sched.apps.cli.parsing import number_option, prompts_option, text_option, whole_number
from mrflow_sched.apps.cli.stopping import current
from mrflow_sched.apps.plan_lines import counted

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.tuning import Tuned, TuneSettings

_HELD_OUT_SHARE = 4
"""One prompt in so many is held out where --held-out is not given."""
_OWN_PROMPTS, _OWN_HELD_OUT = 96, 24
_PATHS = "auto", "full", "bridge", "leap", "sparse", "lagrange", "clean", "renoised", "detached"
_VIEWS = "low", "none", "up", "vjp"
File = Path | Literal["-"]


@dataclass(frozen=True)
class TuneRequest:
    """A LoRA to train.

    Attributes:
        prompts: File of the prompts to train on; None: captions of the embedded model.
        held_out: File of the prompts that are only looked at; None: one in four of the others.
        reward: Name of the score that is raised.
        guard: Name of the score that must not fall.
        numbers: What was given of `tuning.TuneSettings`, by name.
        choices: Options of the plan.
        model: The model and the upscaler.
        output: Where the results go.
    """

    prompts: File | None
    held_out: File | None
    reward: str
    guard: str
    numbers: dict[str, object]
    choices: PlanChoices
    model: ModelChoices
    output: OutputChoices

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> TuneRequest:
        """Make the request from parsed arguments.

        Args:
            args: What the parser of `add_parser` returned.

        Returns:
            The request.

        Raises:
            MrFlowError: The reward, the guard or the prompts are missing, or both files are standard input.
        """
        if args.reward is None:
            raise MrFlowError("--reward is missing; name the score to raise, such as judge, saturation or clip:FOLDER.")
        if args.guard is None:
            raise MrFlowError(
                "--guard is missing: every reward can be deceived, so a second score must watch; name one that you do "
                "not want to lose, such as clip:FOLDER or judge."
            )
        if args.prompts is None and args.model is not None:
            raise MrFlowError("--prompts is missing; give a text file with a prompt on each line.")
        if args.held_out is not None and args.prompts is None:
            raise MrFlowError("--held-out is for prompts beside those of --prompts; give both files.")
        if args.prompts == args.held_out == "-":
            raise MrFlowError("--prompts and --held-out are both -, and there is one standard input; give a file.")
        names = {name: getattr(args, name) for name in _NUMBERS}
        numbers = {name: value for name, value in names.items() if value is not None}
        output = OutputChoices.from_args(args)
        return cls(
            args.prompts,
            args.held_out,
            args.reward,
            args.guard,
            numbers,
            PlanChoices.from_args(args),
            ModelChoices.from_args(args),
            output,
        )


_NUMBERS = (
    *("updates", "batch", "rank", "rate", "backward", "through", "target", "guard_drop", "check_every"),
    "checkpointing",
)


def add_parser(commands: Commands) -> None:
    """Add `mrflow tune`.

    Args:
        commands: Where the parser is added.
    """
    parser = commands.add_parser(
        "tune",
        parents=[plan_options(native=False), model_options(), output_options(), common_options()],
        allow_abbrev=False,
        help="train a LoRA that raises a reward",
    )
    add = parser.add_argument
    add("--reward", type=text_option, metavar="NAME", help="the score to raise, as of `mrflow draft --score`")
    add("--guard", type=text_option, metavar="NAME", help="another score, which stops tuning where it falls")
    add("--prompts", type=prompts_option, metavar="FILE", help="a prompt to train on on each line; - is stdin")
    add("--held-out", type=prompts_option, metavar="FILE", help="prompts that are only looked at (default: 1 in 4)")
    add("--updates", type=whole_number(1), metavar="N", help="steps of the optimiser (default 60)")
    add("--batch", type=whole_number(1), metavar="N", help="images of an update, over all processes (default 4)")
    add("--rank", type=whole_number(1), metavar="N", help="rank of the LoRA (default 8)")
    add("--rate", type=number_option, metavar="X", help="learning rate of AdamW (default 0.0003)")
    add(
        "--backward",
        choices=_PATHS,
        help="how the gradient is led back; auto is full, and leap where memory runs out (default auto)",
    )
    add(
        "--through",
        choices=_VIEWS,
        help="reward stage 1's image (low), or the final one, with so much of the hand-off's gradient (default low)",
    )
    add("--target", type=number_option, metavar="X", help="rewards above it are raised no further")
    add(
        "--guard-drop",
        type=number_option,
        metavar="X",
        help="how far the guard may fall, as a share of how much it varies between held-out images (default 0.1)",
    )
    add("--check-every", type=whole_number(1), metavar="N", help="updates between looks at them (default 10)")
    add(
        "--checkpointing",
        action="store_true",
        default=None,
        help="let the network keep less and compute it twice: less memory, more time",
    )
    parser.set_defaults(from_args=TuneRequest.from_args, run=run)


def run(request: TuneRequest) -> Outcome:
    """Train the LoRA, or go on where the folder of --out stands.

    Args:
        request: What to train.

    Returns:
        The file, the report and what was measured.

    Raises:
        MrFlowError: An argument, the model, a score or the folder cannot be used.
    """
    from mrflow_sched.tuning import tune
    from mrflow_sched.tuning.adapter import check_peft
    from mrflow_sched.tuning.processes import joined

    settings = _settings(request)
    prompts, held_out = _prompts(request)
    family = plan_family(request.model)
    plan = request.choices.make_plan(family, upscaler_kind=upscaler_kind(request.model))
    check_peft()
    check_packages(request.model, plan)
    file = find_upscaler(request.model)
    check_memory(request.model, family, plan)
    processes, note = joined()
    if note is not None:
        say(note)
    model = request.model if processes.device is None else replace(request.model, device=processes.device)
    output = request.output
    with writable(output.folder), saying_warnings():
        upscaler = None if len(plan.stages) == 1 else open_upscaler(model, file)
        engine = load_engine(model, model.dtype)
        if model.loras:  # the new one is tuned on top of them
            engine.pipe.fuse_lora()
            engine.pipe.unload_lora_weights()
        if processes.first:
            say(f"Training on {counted(len(prompts), 'prompt')}; {len(held_out)} others are held out.")
        with current().keeping() as stop:
            found = tune(
                engine,
                prompts,
                held_out,
                plan=plan,
                reward=request.reward,
                guard=request.guard,
                folder=output.folder,
                upscaler=upscaler,
                settings=settings,
                processes=processes,
                tell=None if output.progress is False else say,
                cancel=stop.polled,
            )
    return _outcome(request, found, plan) if processes.first else Outcome()


def _settings(request: TuneRequest) -> TuneSettings:
    from mrflow_sched.tuning import TuneSettings

    given: dict[str, Any] = {"seed": request.choices.options.get("seed", 0), **request.numbers}
    try:
        return TuneSettings(**given)
    except MrFlowError as error:
        name, space, rest = str(error).partition(" ")
        option = f"--{name.replace('_', '-')}" if name in _NUMBERS else name
        raise MrFlowError(f"{option}{space}{rest}") from error


def _prompts(request: TuneRequest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The prompts to train on, and those that are held out."""
    if request.prompts is None:
        return _own_prompts()
    given = tuple(dict.fromkeys(read_prompts(request.prompts)))
    if request.held_out is not None:
        return given, tuple(dict.fromkeys(read_prompts(request.held_out)))
    held_out = given[_HELD_OUT_SHARE - 1 :: _HELD_OUT_SHARE]
    if len(held_out) < 2:
        raise MrFlowError(
            f"--prompts has {counted(len(given), 'prompt')}, of which one in {_HELD_OUT_SHARE} is held out; give at "
            f"least {2 * _HELD_OUT_SHARE}, or --held-out too."
        )
    return tuple(prompt for prompt in given if prompt not in set(held_out)), held_out


def _own_prompts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Captions of the embedded model."""
    from mrflow_sched.demo.captions import random_captions

    found = random_captions(_OWN_PROMPTS + _OWN_HELD_OUT)
    return found[:_OWN_PROMPTS], found[_OWN_PROMPTS:]


def _outcome(request: TuneRequest, found: Tuned, plan: StagedPlan) -> Outcome:
    asked = {"reward": request.reward, "guard": request.guard, "plan": plan.to_string()}
    value = {**found.to_dict(), **asked, "cancelled": found.stopped == "cancelled"}
    code = DONE if found.file is not None or found.stopped == "cancelled" else REFUSED
    return Outcome(value, tuple(_lines(request, found)), code)


def _lines(request: TuneRequest, found: Tuned) -> Iterator[str]:
    if found.stopped == "cancelled":
        yield f"stopped after {found.updates} updates; the same command goes on from there"
    if found.stopped == "guard":
        yield f"the guard {request.guard} fell, so tuning stopped after {found.updates} updates"
    if found.file is None:
        if found.stopped == "guard":
            yield "no LoRA was made: the guard fell at the first look; lower --rate, or look more often (--check-every)"
    else:
        before, after = found.checks[0], found.at(found.update)
        yield (
            f"{request.reward} {fmean(before.rewards):.4f} -> {fmean(after.rewards):.4f}, guard {request.guard} "
            f"{fmean(before.guards):.4f} -> {fmean(after.guards):.4f}, after {found.update} updates"
        )
        yield str(found.file)
    yield str(found.report)
