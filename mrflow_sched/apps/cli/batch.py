"""`mrflow batch`: the images of a table of prompts, by one worker or many, each exactly once."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from mrflow_sched._runtime.errors import MrFlowError, shown
from mrflow_sched.apps.cli.batch_items import COLUMNS, Defaults, Wanted, read_items
from mrflow_sched.apps.cli.batch_worker import MadeFile, ModelMaker, Task
from mrflow_sched.apps.cli.console import (
    DONE,
    REFUSED,
    Outcome,
    cost_bar,
    say,
    say_new,
    saying_warnings,
    writable,
)
from mrflow_sched.apps.cli.forecast import check_memory, most_together
from mrflow_sched.apps.cli.inputs import syntax_notes
from mrflow_sched.apps.cli.load import check_packages
from mrflow_sched.apps.cli.options import (
    Commands,
    ModelChoices,
    PlanChoices,
    common_options,
    model_options,
    plan_options,
)
from mrflow_sched.apps.cli.parsing import (
    format_option,
    number_option,
    prompt_option,
    prompts_option,
    text_option,
    whole_number,
)
from mrflow_sched.apps.cli.results import check_format
from mrflow_sched.apps.cli.stopping import current
from mrflow_sched.apps.cli.wording import with_options
from mrflow_sched.apps.plan_lines import counted
from mrflow_sched.batch.items import Item, Kind, Unit, plan_cost
from mrflow_sched.batch.patience import Patience
from mrflow_sched.batch.schedule import Outlet, in_order, run_units
from mrflow_sched.batch.sharing import ContextParallel, groups_for
from mrflow_sched.batch.store import MANIFEST, Manifest, Store, is_address, open_store, sha256_of
from mrflow_sched.batch.table import read_table
from mrflow_sched.images.record import MAX_BATCH, MAX_PROMPT
from mrflow_sched.plan.families import FAMILIES, Family

if TYPE_CHECKING:
    from mrflow_sched.batch.pool import Maker, Pool

_MOST_WORKERS = 1024
_MOST_NOTES = 8
_LONGEST = 100
"""Letters of a reason in the sentence at the end; the manifest has all of it."""


@dataclass(frozen=True)
class BatchRequest:
    """Images to make from a table.

    Attributes:
        prompts: The table's file, or "-" for prompts on standard input.
        defaults: What holds where a row says nothing.
        out: A folder, or an address for fsspec.
        progress: Whether to show a progress bar; None: only on a terminal.
        workers: How many processes or actors; None: this process, or one actor for each GPU.
        ray: Address of a Ray cluster, or None.
        threads: CPU threads of each worker, or None.
        timeout: Seconds that a worker may be at one task, `math.inf` for no limit; None: as `Patience` has it.
        shared: How the processes of a worker share every forward; None: a worker is one process.
        together: How many images of a prompt are sampled at once; None: as many as memory holds.
        draft: Make drafts.
        scores: Names of the scores by which drafts are ordered.
        keep: How many drafts of each row are finished.
    """

    prompts: Path | Literal["-"]
    defaults: Defaults
    out: str
    progress: bool | None
    workers: int | None
    ray: str | None
    threads: int | None
    timeout: float | None
    shared: ContextParallel | None
    together: int | None
    draft: bool
    scores: tuple[str, ...]
    keep: int

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> BatchRequest:
        """Make the request from parsed arguments.

        Args:
            args: What the parser of `add_parser` returned.

        Returns:
            The request.

        Raises:
            MrFlowError: Options do not go together.
        """
        for name in ("score", "keep"):
            if getattr(args, name) and not args.draft:
                raise MrFlowError(f"--{name} is for drafts; give --draft too, or leave it out.")
        if args.keep and not args.score:
            raise MrFlowError(
                f"--keep {args.keep} finishes the best, and nothing says which those are; give --score too, or pick by "
                "eye and use mrflow finish."
            )
        if args.draft and args.native:
            raise MrFlowError("--native has no first stage to draft; leave out --native or --draft.")
        if args.draft and args.together != 1:
            raise MrFlowError("--together is for whole images, as each draft is sampled alone; leave it out.")
        if args.ray is not None and args.together is None:
            raise MrFlowError("--together auto asks this machine's memory, and --ray runs on others; give a number.")
        if args.context_parallel is not None:
            _check_sharing(args)
            args.workers = args.workers or 1
        if args.timeout is not None and args.workers is None and args.ray is None:
            raise MrFlowError(
                "--timeout ends a worker that hangs, and here this process makes the images itself; give --workers 1 "
                "too, or leave it out."
            )
        defaults = Defaults(
            args.negative,
            args.refine_prompt,
            args.refine_negative,
            args.batch,
            PlanChoices.from_args(args),
            ModelChoices.from_args(args),
            f".{args.format}",
        )
        return cls(
            args.prompts,
            defaults,
            args.out,
            args.progress,
            args.workers,
            args.ray,
            args.threads,
            args.timeout,
            args.context_parallel,
            args.together,
            args.draft,
            tuple(dict.fromkeys(args.score)),
            args.keep or 0,
        )


def add_parser(commands: Commands) -> None:
    """Add `mrflow batch`.

    Args:
        commands: Where the parser is added.
    """
    parser = commands.add_parser(
        "batch",
        parents=[plan_options(), model_options(), common_options()],
        allow_abbrev=False,
        help="make the images of a table of prompts, with several workers",
    )
    parser.add_argument(
        "prompts",
        type=prompts_option,
        metavar="PROMPTS",
        help="a .txt file with a prompt on each line, or .jsonl, .csv, .parquet with columns; - is stdin",
    )
    parser.add_argument("--negative", type=text_option, metavar="TEXT", help="what the images should not show")
    parser.add_argument("--refine-prompt", type=prompt_option, metavar="TEXT", help="the prompt of the later stages")
    parser.add_argument(
        "--refine-negative", type=text_option, metavar="TEXT", help="the negative prompt of the later stages"
    )
    parser.add_argument(
        "--batch",
        type=whole_number(1, MAX_BATCH),
        default=1,
        metavar="N",
        help="images of each prompt, with the seeds from --seed on (default 1)",
    )
    parser.add_argument(
        "--together",
        type=_together_option,
        default=1,
        metavar="N|auto",
        help="images of a prompt that are sampled at once; auto is what memory holds (default 1, the bits of generate)",
    )
    parser.add_argument(
        "--workers", type=whole_number(1, _MOST_WORKERS), metavar="N", help="make them in N processes, a device each"
    )
    parser.add_argument(
        "--ray", type=text_option, metavar="ADDRESS", help="make them on a Ray cluster: auto, HOST:PORT, or local"
    )
    parser.add_argument("--threads", type=whole_number(1, 1024), metavar="N", help="CPU threads of each worker")
    parser.add_argument(
        "--timeout",
        type=_timeout_option,
        metavar="SECONDS|off",
        help="end a worker that has been at a prompt for longer, and try the prompt again (default: ten times the "
        "longest so far, at least 600)",
    )
    parser.add_argument(
        "--context-parallel",
        type=_sharing_option,
        metavar="ulysses=N|ring=N",
        help="N devices for each worker, which share every forward of an image by diffusers' context parallelism",
    )
    parser.add_argument("--draft", action="store_true", help="make drafts, stage 1 alone")
    parser.add_argument(
        "--score", type=text_option, action="append", default=[], metavar="NAME", help="order drafts by it; repeatable"
    )
    parser.add_argument("--keep", type=whole_number(1, MAX_BATCH), metavar="K", help="finish the K best of each prompt")
    parser.add_argument(
        "--format", type=format_option, default="png", metavar="png|jpg|webp", help="of the finished images"
    )
    group = parser.add_argument_group("the output")
    group.add_argument(
        "--out",
        type=_out_option,
        default="out",
        metavar="DIR",
        help="folder for the images, or an address of object storage such as s3://bucket/folder (default out)",
    )
    group.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bar on standard error (default: only on a terminal)",
    )
    parser.set_defaults(from_args=BatchRequest.from_args, run=run)


def _together_option(text: str) -> int | None:
    return None if text.strip().lower() == "auto" else whole_number(1, MAX_BATCH)(text)


def _timeout_option(text: str) -> float:
    if text.strip().lower() == "off":
        return math.inf
    try:
        seconds = number_option(text)
    except argparse.ArgumentTypeError:
        seconds = 0.0
    if not 1 <= seconds <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 1e9, nor off")
    return seconds


def _sharing_option(text: str) -> ContextParallel:
    found: dict[str, int] = {}
    for word in text.split(","):
        name, _, number = word.strip().partition("=")
        if name not in ("ulysses", "ring") or name in found:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not ulysses=N or ring=N, nor both with a comma between them; write ulysses=2"
            )
        found[name] = whole_number(1, _MOST_WORKERS)(number)
    config = ContextParallel(**found)
    if config.parts < 2:
        raise argparse.ArgumentTypeError(f"{text!r} shares nothing, as one device has all; give 2 or more")
    return config


def _check_sharing(args: argparse.Namespace) -> None:
    """Refuse what does not go with shared forwards."""
    if args.ray is not None:
        raise MrFlowError("--context-parallel is for the devices of this machine; leave out it or --ray.")
    if args.offload is not None:
        raise MrFlowError("--context-parallel needs the network on its device; leave out it or --offload.")


def _out_option(text: str) -> str:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("it is empty; give a folder" if not text else "a path has no NUL character")
    return text


# --- the work ----------------------------------------------------------------------------------


@dataclass
class _State:
    """What is known and made so far."""

    request: BatchRequest
    wanted: Wanted
    manifest: Manifest
    names: set[str]
    made: int = 0
    there: int = 0
    failed: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    notes: list[str] = field(default_factory=list[str])
    seconds: float = 0.0
    rows: dict[int, list[Item]] = field(default_factory=dict[int, list[Item]])
    left: dict[int, int] = field(default_factory=dict[int, int])
    advance: Callable[[float, str], None] = lambda _cost, _text: None

    def __post_init__(self) -> None:
        """Put the images of each row together."""
        for item in self.wanted.items:
            self.rows.setdefault(item.row, []).append(item)

    @property
    def family(self) -> Family | None:
        """The model's family, where it is in the table or was read from a folder."""
        return FAMILIES.get(self.wanted.family) if isinstance(self.wanted.family, str) else self.wanted.family

    def has(self, item: Item, kind: Kind) -> bool:
        """Whether an image is there; one whose line was never written gets it now.

        Args:
            item: The image.
            kind: Of the file.

        Returns:
            False also for a draft whose scores are not known.
        """
        name = item.file(kind, self.request.defaults.suffix)
        if name not in self.names:
            return False
        entry = self.manifest.entries.get((kind, item.key))
        known = self.manifest.is_done(kind, item.key)
        if kind == "draft":
            scores = cast("dict[str, float]", (entry or {}).get("scores") or {})
            return known and set(self.request.scores) <= set(scores)
        if not known:
            data = self.manifest.store.read(name)
            self.manifest.add(_entry(item, kind, "done", file=name, sha256=sha256_of(data)))
        return True


def run(request: BatchRequest) -> Outcome:
    """Make the images that are not there yet.

    Args:
        request: What to make.

    Returns:
        What was made, what was there and what was set aside; where an error came after the first image, or a signal,
        what was made by then, and the error.

    Raises:
        KeyboardInterrupt: It came before the work began.
        MrFlowError: The table, a row, the model or the output cannot be used, or no worker can be started.
    """
    defaults = request.defaults
    table = read_table(request.prompts, COLUMNS, longest=MAX_PROMPT)
    wanted = read_items(table, defaults)
    model = replace(defaults.model, loras=tuple(wanted.loras.values()))
    if request.ray is not None:
        model = replace(model, device="auto")  # this machine may lack the cluster's devices
    for plan in wanted.plans:
        check_format(defaults.suffix, plan)
        check_packages(model, plan)
        if request.draft and len(plan.stages) < 2:
            raise MrFlowError("--draft needs plans of several stages, and a row asks for one; leave out native there.")
    if request.ray is None:
        for plan in wanted.plans:
            check_memory(defaults.model, wanted.family, plan, workers=_processes(request))
    if request.shared is not None:
        from mrflow_sched.engines.diffusers.context_parallel import check_context_parallel

        check_context_parallel()
        groups_for(defaults.model.device, request.workers or 1, request.shared)
    with _output(request.out) as store:
        state = _State(request, wanted, Manifest(store), set(store.names()))
        try:
            with saying_warnings(state.notes):
                _make_all(state)
        except (Exception, KeyboardInterrupt) as error:
            if not (state.made or current().requested):
                raise
            return _outcome(state, error)
        finally:
            with current().whole():
                store.close()
    return _outcome(state)


@contextlib.contextmanager
def _output(out: str) -> Generator[Store, None, None]:
    """The store of --out, ready to be written to."""
    if is_address(out):
        yield open_store(out)
        return
    with writable(Path(out.removeprefix("file://"))):
        yield open_store(out)


def _make_all(state: _State) -> None:
    request, wanted = state.request, state.wanted
    defaults = request.defaults
    texts = (defaults.negative, defaults.refine_prompt, defaults.refine_negative)
    say_new(
        (
            *wanted.notes,
            *_plan_notes(wanted),
            *syntax_notes(*(item.prompt for item in wanted.items), *texts),
        ),
        state.notes,
    )
    units = _units(state)
    if not units:
        return
    first = in_order(units)[0].items[0]
    loras = tuple(wanted.loras[lora] for lora in first.loras)
    model = replace(defaults.model, loras=loras)
    if request.ray is not None:
        model = model.on_any_machine()
    maker = ModelMaker(model, first.plan.to_string(), defaults.suffix, request.scores, request.shared)
    if request.ray is None:
        _run(state, units, maker)
    else:
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints there, where only the result belongs
            _run(state, units, maker)


def _plan_notes(wanted: Wanted) -> Iterator[str]:
    """What the plans have to say, each sentence once, and no more of them than anybody reads."""
    notes = list(dict.fromkeys(with_options(note) for plan in wanted.plans for note in plan.notes))
    yield from notes[:_MOST_NOTES]
    if len(notes) > _MOST_NOTES:
        yield f"{len(notes) - _MOST_NOTES} more notes on plans are left out; mrflow plan tells them."


def _run(state: _State, units: Sequence[Unit], maker: Maker) -> None:
    request, stop = state.request, current()
    pool = _pool(request, maker, stop.polled)
    began = time.perf_counter()
    try:
        with stop.keeping(), cost_bar(request.progress, _whole_cost(state, units)) as state.advance:
            outlet = Outlet(
                lambda unit: _task(state, unit),
                lambda unit, files, place, tries: _done(state, unit, files, place, tries),
                lambda unit, reason, tries: _aside(state, unit, reason, tries),
                lambda: stop.requested,
                lambda sentence: say_new((sentence,), state.notes),
            )
            run_units(units, pool, outlet, Patience(request.timeout))
    finally:
        state.seconds = time.perf_counter() - began
        pool.close()


def _pool(request: BatchRequest, maker: Maker, cancel: Callable[[], bool]) -> Pool:
    device = request.defaults.model.device
    if request.ray is not None:
        from mrflow_sched.batch.ray_pool import RayPool

        own = None if device == "auto" else device
        return RayPool(maker, request.ray, workers=request.workers, device=own, threads=request.threads)
    from mrflow_sched.batch.pool import HerePool, ProcessPool, devices_for

    if request.workers is None:
        return HerePool(maker, request.threads, cancel)
    if request.shared is None:
        devices = devices_for(device, request.workers)
    else:
        devices = groups_for(device, request.workers, request.shared)
    threads = request.threads
    if threads is None and devices[0] == "cpu":
        import torch

        threads = max(1, torch.get_num_threads() // len(devices))
    return ProcessPool(maker, devices, threads, parts=request.shared.parts if request.shared else 1)


def _processes(request: BatchRequest) -> int:
    """Processes of this machine that hold the model."""
    return (request.workers or 1) * (request.shared.parts if request.shared else 1)


# --- what is handed out ------------------------------------------------------------------------


def _units(state: _State) -> list[Unit]:
    """What is left to do; the images that are there are counted."""
    if state.request.draft:
        return [*_drafts(state), *(unit for row in state.rows.values() for unit in _best(state, row))]
    units: list[Unit] = []
    for group in _groups(state):
        left = tuple(number for number, item in enumerate(group) if not state.has(item, "image"))
        state.there += len(group) - len(left)
        if left:
            cost = plan_cost(group[0].plan, state.family) * len(group)
            units.append(Unit(group, left, "image", cost))
    return units


def _drafts(state: _State) -> Iterator[Unit]:
    for item in state.wanted.items:
        if state.has(item, "draft"):
            state.there += 1
            continue
        state.left[item.row] = state.left.get(item.row, 0) + 1
        yield Unit((item,), (0,), "draft", plan_cost(item.plan, state.family, "draft"))


def _best(state: _State, row: Sequence[Item]) -> Sequence[Unit]:
    """The later stages of the best drafts of a row, once all its drafts are there or set aside."""
    if not state.request.keep or state.left.get(row[0].row):
        return ()
    from mrflow_sched.measure.ranking import best_first

    drafts = [item for item in row if state.manifest.is_done("draft", item.key)]
    if not drafts:
        return ()
    scores = [state.manifest.entries["draft", item.key]["scores"] for item in drafts]
    order = best_first([[values[name] for name in state.request.scores] for values in scores])
    kept = [drafts[number] for number in order[: state.request.keep]]
    left = [item for item in kept if not state.has(item, "image")]
    state.there += len(kept) - len(left)
    return [Unit((item,), (0,), "image", plan_cost(item.plan, state.family, "finish"), finishes=True) for item in left]


def _groups(state: _State) -> Iterator[tuple[Item, ...]]:
    """The images that are sampled at once: decided by the table alone, so that a rerun samples the same ones."""
    request, wanted = state.request, state.wanted
    for row in state.rows.values():
        plan = row[0].plan
        most = request.together
        if most is None:
            model = request.defaults.model
            most = most_together(model, wanted.family, plan, len(row), workers=_processes(request))
        if plan.seed_rule != "offset":
            most = 1
        group: list[Item] = []
        for item in row:
            if group and (len(group) == most or item.plan.seed != group[-1].plan.seed + 1):
                yield tuple(group)
                group = []
            group.append(item)
        yield tuple(group)


def _whole_cost(state: _State, units: Sequence[Unit]) -> float:
    """The cost of all units, with those that will follow from drafts."""
    cost = sum(unit.cost for unit in units)
    for row in state.rows.values() if state.request.keep else ():
        if state.left.get(row[0].row):
            cost += min(state.request.keep, len(row)) * plan_cost(row[0].plan, state.family, "finish")
    return cost


def _task(state: _State, unit: Unit) -> Task:
    first = unit.items[0]
    loras = tuple(state.wanted.loras[lora] for lora in first.loras)
    if state.request.ray is not None:
        loras = tuple(replace(each, file=each.file.resolve()) for each in loras)
    draft = state.manifest.store.read(first.file("draft", "")) if unit.finishes else None
    return Task(
        unit.kind,
        first.plan.to_string(),
        first.prompt,
        first.negative,
        first.refine_prompt,
        first.refine_negative,
        loras,
        len(unit.items),
        unit.wanted,
        draft,
    )


# --- what comes back ---------------------------------------------------------------------------


def _done(state: _State, unit: Unit, files: Sequence[MadeFile], place: int, tries: int) -> Sequence[Unit]:
    """Keep what a worker made: the file first, then its line."""
    for made in files:
        item = unit.items[made.number]
        if made.data is None:
            _set_aside(state, item, unit.kind, made.reason, tries)
            continue
        say_new(made.warnings, state.notes)
        name = item.file(unit.kind, state.request.defaults.suffix)
        with current().whole():
            data = made.data
            if state.manifest.store.put_new(name, data):
                state.made += 1
            else:
                data = state.manifest.store.read(name)
            state.names.add(name)
            more: dict[str, Any] = {"scores": made.scores} if unit.kind == "draft" else {}
            if made.warnings:
                more["warnings"] = list(made.warnings)
            state.manifest.add(
                _entry(
                    item,
                    unit.kind,
                    "done",
                    file=name,
                    sha256=sha256_of(data),
                    seconds=round(made.seconds, 4),
                    worker=place,
                    tries=tries,
                    **more,
                )
            )
    return _after(state, unit)


def _aside(state: _State, unit: Unit, reason: str, tries: int) -> Sequence[Unit]:
    for number in unit.wanted:
        _set_aside(state, unit.items[number], unit.kind, reason, tries)
    return _after(state, unit)


def _set_aside(state: _State, item: Item, kind: Kind, reason: str, tries: int) -> None:
    entry = _entry(item, kind, "failed", tries=tries, error=reason)
    with current().whole():
        state.manifest.add(entry)
    state.failed.append({name: entry[name] for name in ("row", "id", "prompt", "seed", "error")})


def _after(state: _State, unit: Unit) -> Sequence[Unit]:
    """Move the bar; give what follows from a draft."""
    state.advance(unit.cost, counted(state.made, "image"))
    if unit.kind != "draft":
        return ()
    row = unit.items[0].row
    state.left[row] -= 1
    return _best(state, state.rows[row])


def _entry(item: Item, kind: Kind, status: str, **more: Any) -> dict[str, Any]:
    """A line of the manifest."""
    return {
        "key": item.key,
        "kind": kind,
        "status": status,
        "row": item.row,
        "id": item.name,
        "prompt": item.prompt,
        "negative": item.negative,
        "refine_prompt": item.refine_prompt,
        "refine_negative": item.refine_negative,
        "seed": item.plan.seed,
        "size": f"{item.plan.requested_width}x{item.plan.requested_height}",
        "loras": list(item.loras),
        **more,
    }


def _outcome(state: _State, error: BaseException | None = None) -> Outcome:
    stop = current()
    stop.end()
    made, out = state.made, state.request.out
    missing: list[str] = []
    if state.failed:
        first = state.failed[0]
        missing.append(
            f"{counted(len(state.failed), 'image')} could not be made; the first, of line {first['row']}: "
            f"{shown(str(first['error']).rstrip('.'), _LONGEST)}. {MANIFEST} names all; the same command tries them "
            "again."
        )
    if stop.requested:
        missing.append(f"Stopped; what was finished is saved ({counted(made, 'image')}). The same command goes on.")
    rate = made / state.seconds * 60 if state.seconds > 0 else 0.0
    if made:
        say(f"{counted(made, 'image')} in {state.seconds:.0f} s, {rate:.3g} a minute; {state.there} were there.")
    elif not missing and error is None:
        say(f"All {counted(state.there, 'image')} were there already.")
    for sentence in missing:
        say(sentence)
    manifest = f"{out.rstrip('/')}/{MANIFEST}"
    value = {
        "manifest": manifest,
        "made": made,
        "there": state.there,
        "failed": state.failed,
        "seconds": state.seconds,
        "images_per_minute": rate,
        "notes": state.notes,
        "cancelled": stop.requested,
        **({"error": " ".join(missing)} if missing and error is None else {}),
    }
    return Outcome(value, (manifest,), REFUSED if missing else DONE, error)
