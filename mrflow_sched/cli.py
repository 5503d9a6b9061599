"""The `mrflow` command: `plan` shows the numbers of a run, `generate` makes pictures, `compare` measures both ways,
`calibrate` measures what suits a model, `doctor` says what would run here.

Results go to standard output, everything said on the way to standard error. Exit codes: 0 done, 1 (`doctor` only)
something would fail, 2 a request that cannot
be met (one sentence says why and what to do), 130 stopped by Ctrl-C. `plan` runs without torch, so torch comes late.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import mrflow_sched
from mrflow_sched._errors import first_line
from mrflow_sched.cost import Speeds, part_costs, peak_memory, work_ratio
from mrflow_sched.families import FAMILIES, get_family
from mrflow_sched.plan import SOLVER_NAMES, StagedPlan, make_plan
from mrflow_sched.record import KEY, MAX_BATCH, RunRecord, library_versions

if TYPE_CHECKING:
    from types import FrameType

    from torch import Tensor

    from mrflow_sched.calibrate import Calibration
    from mrflow_sched.engines.flux import FluxEngine
    from mrflow_sched.engines.pipeline import PipelineEngine
    from mrflow_sched.families import Family
    from mrflow_sched.sampler import Progress, StagedResult
    from mrflow_sched.upscale import PixelUpscaler

EMBEDDED = "embedded"
"""What a record calls the model that ships with the package."""

LANCZOS = "lanczos"
AILING = 1
STOPPED = 130
REFUSED = 2
_SEED_END = 2**63 - 2**20
"""Seeds stay below what a torch generator takes, with room for the offsets of images and stages."""


class _Parser(argparse.ArgumentParser):
    """argparse without the usage block: a bad argument is one sentence, like every other refusal."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.strip().rstrip('.')} (see {self.prog} --help).")


# --- arguments --------------------------------------------------------------------------------


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text.strip())
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT in pixels, for example 1024x768")
    return size


def _interval(text: str) -> tuple[float, float]:
    found = re.fullmatch(r"([0-9.]+)-([0-9.]+)", text.strip())
    try:
        return float(found[1]), float(found[2])  # type: ignore[index]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no interval; write LOW-HIGH, for example 0.2-0.9") from None


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        span = f"from {low} up" if high is None else f"from {low} to {high}"
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {span}")
        return number

    return parse


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
        return number

    return parse


def _prompt(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it holds bytes that are not UTF-8; type the prompt again") from None
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; say what the picture shows")
    return text


def _shift_tokens(text: str) -> str | int:
    return text if text in ("low", "final") else _whole(1)(text)


def _common() -> _Parser:
    """Options of every command."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on standard output, and nothing else"
    )
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    return parser


def _numbers() -> _Parser:
    """Options that decide a plan; what is left out comes from the family and its preset."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("the plan (what is left out comes from the family's preset)")
    group.add_argument("--size", type=_size, metavar="WxH", help="size of the final picture in pixels")
    group.add_argument("--preset", help="fast, balanced, best, or low-size steps + full-size steps, for example 12+1")
    group.add_argument("--low-steps", type=_whole(1, 1000), metavar="N", help="steps of the first stage")
    group.add_argument("--refine-steps", type=_whole(0, 1000), metavar="N", help="steps of every later stage")
    group.add_argument("--sigma", type=float, metavar="S", help="fraction of noise at which refining starts, 0 < S < 1")
    group.add_argument("--solver", help=", ".join(SOLVER_NAMES))
    group.add_argument("--factor", type=float, metavar="F", help="enlargement between stages, 1.25 to 4")
    group.add_argument("--stages", type=_whole(2, 8), metavar="N", help="number of stages, 2 to 8")
    group.add_argument("--refine-curve", choices=("linear", "shifted"), help="spacing of the refine sigmas")
    group.add_argument("--shift-tokens", type=_shift_tokens, metavar="low|final|N", help="token count that sets mu")
    group.add_argument("--mu", type=_number(-20, 20), help="shift of the first stage, as log(shift)")
    group.add_argument("--guidance", type=_number(0, 100), metavar="G", help="guidance of the first stage")
    group.add_argument("--refine-guidance", type=_number(0, 100), metavar="G", help="guidance of every later stage")
    group.add_argument("--seed", type=_whole(0, _SEED_END), help="seed of the first picture's noise (default 0)")
    group.add_argument("--seed-rule", choices=("offset", "hash"), help="how seeds of stages and batch images differ")
    group.add_argument("--posterior", choices=("mode", "sample"), help="what to take from the VAE's encoder")
    group.add_argument(
        "--guidance-interval", type=_interval, metavar="LOW-HIGH", help="sigmas between which CFG is on in stage 1"
    )
    group.add_argument("--tile", type=_whole(0, 32768), metavar="PIXELS", help="refine larger pictures in such tiles")
    group.add_argument("--steps", type=_whole(1, 1000), metavar="N", help="steps of native sampling")
    group.add_argument(
        "--calibration", type=Path, metavar="FILE", help="what `mrflow calibrate` wrote: its preset is the default"
    )
    return parser


def _machine() -> _Parser:
    """Options that choose the model and what it runs on."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("the model and the machine")
    group.add_argument(
        "--model",
        metavar="DIR",
        help="local folder of a diffusers text-to-image pipeline (default: the embedded model)",
    )
    group.add_argument("--family", metavar="NAME", help="family of --model, where the folder does not say (flux1-krea)")
    group.add_argument(
        "--upscaler", metavar="FILE", help=f"ESRGAN-type file, .safetensors or .pth; or {LANCZOS}, which adds no detail"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    group.add_argument(
        "--offload-text",
        action="store_true",
        help="keep the text encoders off the device when idle (other models than FLUX.1: every part)",
    )
    group.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the pictures (default out)"
    )
    group.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bar on standard error (default: only on a terminal)",
    )
    return parser


def build_parser() -> _Parser:
    """The whole command line."""
    parser = _Parser(prog="mrflow", description=__doc__.partition("\n")[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mrflow {mrflow_sched.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    common, numbers, machine = _common(), _numbers(), _machine()

    plan = commands.add_parser("plan", parents=[numbers, common], allow_abbrev=False, help="show the numbers of a run")
    plan.add_argument("--family", required=True, metavar="NAME", help=", ".join(FAMILIES))
    plan.add_argument("--native", action="store_true", help="plan ordinary one-stage sampling")
    plan.add_argument(
        "--timings", type=Path, metavar="FILE", help="what compare --json printed: expect seconds on that machine"
    )
    plan.set_defaults(run=_plan)

    generate = commands.add_parser(
        "generate", parents=[numbers, machine, common], allow_abbrev=False, help="make pictures from a prompt"
    )
    generate.add_argument("prompt", nargs="?", type=_prompt, metavar="PROMPT")
    generate.add_argument(
        "--negative", metavar="TEXT", help="what the picture should not show, for models that have it"
    )
    generate.add_argument("--batch", type=_whole(1, MAX_BATCH), default=1, metavar="N", help="number of pictures")
    generate.add_argument("--native", action="store_true", help="sample at full size throughout, in one stage")
    generate.add_argument("--save-stages", action="store_true", help="save the picture of every stage too")
    generate.add_argument(
        "--from", dest="source", type=Path, metavar="IMAGE.png", help="repeat the run of a saved picture"
    )
    generate.set_defaults(run=_generate)

    compare = commands.add_parser(
        "compare", parents=[numbers, machine, common], allow_abbrev=False, help="measure native and staged sampling"
    )
    compare.add_argument("prompt", type=_prompt, metavar="PROMPT")
    compare.add_argument("--repeats", type=_whole(1, 100), default=1, metavar="N", help="runs of each, median counts")
    compare.set_defaults(run=_compare)

    calibrate = commands.add_parser(
        "calibrate",
        parents=[machine, common],
        allow_abbrev=False,
        help="measure which start sigma and how many steps suit a model and an upscaler",
    )
    calibrate.add_argument(
        "prompts", nargs="*", type=_prompt, metavar="PROMPT", help="a picture each (default: four of different kinds)"
    )
    calibrate.add_argument("--size", type=_size, metavar="WxH", help="size of the pictures to measure")
    calibrate.add_argument("--factor", type=float, metavar="F", help="enlargement between stages, 1.25 to 4")
    calibrate.add_argument("--steps", type=_whole(1, 1000), metavar="N", help="steps of the native pictures")
    calibrate.add_argument(
        "--images", type=Path, nargs="+", metavar="IMAGE", help="pictures to measure in place of native ones"
    )
    calibrate.add_argument("--seed", type=_whole(0, _SEED_END), default=0, help="seed of the first picture (default 0)")
    calibrate.set_defaults(run=_calibrate)

    doctor = commands.add_parser(
        "doctor", parents=[common], allow_abbrev=False, help="say what is installed, what would run and what would fail"
    )
    doctor.add_argument("--model", metavar="DIR", help="a local diffusers folder to look at; no weights are read")
    doctor.add_argument("--upscaler", metavar="FILE", help="an ESRGAN-type file to look at")
    doctor.set_defaults(run=_doctor)
    return parser


_PLAN_WORDS = (
    *("preset", "low_steps", "refine_steps", "sigma", "solver", "factor", "stages", "refine_curve", "shift_tokens"),
    *("mu", "guidance", "refine_guidance", "seed", "seed_rule", "posterior", "tile", "guidance_interval"),
)


_STAGED_WORDS = (
    *("preset", "low_steps", "refine_steps", "sigma", "factor", "stages", "refine_curve", "shift_tokens"),
    *("refine_guidance", "tile", "guidance_interval"),
)


def _make_plan(args: argparse.Namespace, family: str | Family, **overrides: Any) -> StagedPlan:
    """The plan that the given options ask for; everything not given is left to `make_plan`."""
    given = {word: getattr(args, word) for word in _PLAN_WORDS if getattr(args, word) is not None} | overrides
    native = bool(getattr(args, "native", False))
    clash = [word for word in _STAGED_WORDS if word in given] if native else []
    if clash:
        raise ValueError(
            f"--native samples in one stage, so --{clash[0].replace('_', '-')} has no meaning; leave one out."
        )
    if native and getattr(args, "upscaler", None) is not None:
        raise ValueError("--native samples in one stage, so --upscaler has no meaning; leave one out.")
    if args.steps is not None and args.command != "compare":
        if not native:
            raise ValueError(f"--steps {args.steps} counts native steps; add --native, or use --low-steps.")
        given["steps"] = args.steps
    _check_meaning(given)
    width, height = args.size or _default_size(family, native)
    return make_plan(family, width, height, native=native, **given)


def _check_meaning(given: dict[str, Any]) -> None:
    """Refuse options that another one makes meaningless."""
    if "mu" in given and "shift_tokens" in given:
        raise ValueError("--mu sets the shift outright, so --shift-tokens has no meaning; leave one out.")
    idle = [word for word in ("sigma", "refine_curve", "refine_guidance") if word in given]
    if given.get("refine_steps") == 0 and idle:
        raise ValueError(
            f"--refine-steps 0 keeps the upscaled picture, so --{idle[0].replace('_', '-')} has no meaning; "
            "leave one out."
        )


def _default_size(family: str | Family, native: bool) -> tuple[int, int]:
    known = get_family(family) if isinstance(family, str) else family
    return known.native_size if native else known.default_size or known.native_size


# --- mrflow plan ------------------------------------------------------------------------------


def _plan(args: argparse.Namespace) -> int:
    plan = _make_plan(args, _calibrated(args, args.family))
    seconds = None if args.timings is None else _predicted(plan, args.timings)
    if args.json:
        more = {} if seconds is None else {"seconds": [{"name": name, "seconds": value} for name, value in seconds]}
        _print_json({**plan.to_dict(), "work_ratio": work_ratio(plan), "work": _work(plan), **more})
    else:
        print("\n".join(_plan_lines(plan, seconds)))
    return 0


def _work(plan: StagedPlan) -> list[dict[str, Any]]:
    return [{"name": part.name, "calls": part.calls, "flop": part.flop} for part in part_costs(plan) or ()]


def _predicted(plan: StagedPlan, path: Path) -> tuple[tuple[str, float], ...]:
    """(part, seconds) of `plan` on the machine that `mrflow compare --json` was run on."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        measured = StagedPlan.from_string(found["plan"])
        seconds = {str(part["name"]): float(part["seconds"]) for part in found["stages"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--timings {path} cannot be read ({first_line(error)}); give what mrflow compare --json printed."
        ) from error
    if measured.family != plan.family:
        raise ValueError(f"--timings {path} is of family {measured.family}, not {plan.family}; compare this model.")
    return Speeds.measured(measured, seconds).predict(plan)


def _tera(flop: float) -> str:
    return f"{flop / 1e12:.3g}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _plan_lines(plan: StagedPlan, seconds: Sequence[tuple[str, float]] | None = None) -> Iterator[str]:
    size, forwards = f"{plan.width}x{plan.height}", _count(plan.forwards, "forward")
    yield f"{plan.family} {plan.preset}: {size}, {forwards}, seed {plan.seed}"
    if len(plan.stages) > 1:
        yield f"expected network work: {plan.native_steps} native steps cost {plan.cost_ratio:.2f} times as much"
    parts, peak = part_costs(plan), peak_memory(plan)
    if parts is not None:
        share = ", ".join(f"{part.name} {_tera(part.flop)}" for part in parts)
        counted = any(part.name.endswith("decode") for part in parts)
        what = "VAE and upscaler" if counted else "upscaler, without the VAE, which was not counted"
        whole = f"work with {what}: {_tera(sum(part.flop for part in parts))} TFLOP a picture ({share})"
        yield whole if len(plan.stages) == 1 else f"{whole}; native {work_ratio(plan):.2f} times as much"
    if peak is not None:
        yield (
            f"memory in 16 bits: about {peak.total / 2**30:.1f} GiB, most of it in {peak.name}, "
            f"{peak.weights / 2**30:.1f} of it weights"
        )
    if seconds is not None:
        share = ", ".join(f"{name} {value:.2f}" for name, value in seconds)
        yield f"expected seconds on the measured machine: {sum(value for _, value in seconds):.2f} ({share})"
    for number, stage in enumerate(plan.stages, 1):
        shift = "no shift" if stage.mu is None else f"mu {stage.mu:.4g}"
        yield (
            f"stage {number}: {stage.width}x{stage.height}, {_count(stage.tokens, 'token')}, {shift}, {stage.solver}, "
            f"guidance {stage.guidance:g}, {_count(stage.forwards, 'forward')}"
        )
        yield "  sigmas " + (" ".join(f"{sigma:.5g}" for sigma in stage.sigmas) or "none: the upscaled picture is kept")
    for note in plan.notes:
        yield f"note: {note}"
    yield f"plan: {plan.to_string()}"


# --- mrflow generate --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """All that a `generate` run needs, decided before anything large is loaded."""

    plan: StagedPlan
    prompt: str
    negative: str | None
    batch: int
    images: tuple[int, ...]
    source: RunRecord | None = None


def _generate(args: argparse.Namespace) -> int:
    job = _repeat_job(args) if args.source is not None else _new_job(args)
    if args.save_stages and len(job.plan.stages) == 1:
        raise ValueError("--save-stages has no meaning for a native run, which has one stage; leave it out.")
    upscaler_path = _upscaler_path(args, job.source)
    with _writable(args.out), _saying_warnings():
        engine, upscaler = _load(args, job, upscaler_path)
        record = _record(args, job, engine, upscaler, upscaler_path)
        _check_repeatable(job.source, record)
        for note in job.plan.notes:
            _say(note)
        with _progress(args) as show, _ctrl_c() as stopped:
            result = _sample(engine, job, upscaler, lambda step: show("", step), stopped, args.save_stages)
        for note in dict.fromkeys(result.warnings):
            _say(note)
        paths, lost = _save_images(args, job, record, result)
    if result.cancelled:
        _say(f"Stopped; the best picture so far is {paths[0]}.")
    if args.json:
        stages = [{"name": timing.name, "seconds": timing.seconds} for timing in result.timings]
        _print_json(
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


def _new_job(args: argparse.Namespace) -> _Job:
    if args.prompt is None:
        raise ValueError(
            'the prompt is missing; say what the picture shows, as in mrflow generate "a blue star" --out DIR.'
        )
    plan = _make_plan(args, _calibrated(args, _family(args)))
    return _Job(plan, args.prompt, args.negative, args.batch, tuple(range(args.batch)))


def _repeat_job(args: argparse.Namespace) -> _Job:
    """The run that a picture remembers. The whole batch runs again, because a batch's size reaches the last bits."""
    given = [
        word
        for word in (*_PLAN_WORDS, "size", "steps", "prompt", "negative", "family", "calibration")
        if getattr(args, word) is not None
    ]
    given += [word for word in ("native",) if getattr(args, word)] + (["batch"] if args.batch != 1 else [])
    if given:
        name = given[0] if given[0] == "prompt" else f"--{given[0].replace('_', '-')}"
        raise ValueError(f"--from takes every number and word from the picture, so {name} has no place; leave one out.")
    record = _read_record(args.source)
    if record.model != EMBEDDED and args.model is None:
        raise ValueError(f"{args.source} was made with the model folder {record.model!r}; name it with --model DIR.")
    if record.model == EMBEDDED and args.model is not None:
        raise ValueError(f"{args.source} was made with the embedded model; leave out --model.")
    if record.unfinished:
        _say(f"{args.source} is an unfinished picture; its run is now made whole.")
    plan = StagedPlan.from_string(record.plan)
    return _Job(plan, record.prompt, record.negative, record.batch, (record.image,), record)


def _read_record(path: Path) -> RunRecord:
    from mrflow_sched.images import read_png_text

    text = read_png_text(path).get(KEY)
    if text is None:
        raise ValueError(f"--from is {str(path)!r}, which holds no mrflow record; give a PNG that mrflow made.")
    return RunRecord.from_json(text)


def _family(args: argparse.Namespace) -> str | Family:
    """The family to plan for, found before anything large is loaded."""
    if args.model is None:
        if args.family not in (None, "demo"):
            raise ValueError(
                f"--family is {args.family!r}, but the embedded model is of family demo; give --model DIR."
            )
        return "demo"
    if _is_flux(args.model):
        from mrflow_sched.engines.flux import read_family

        found = read_family(args.model)
        return args.family or found
    from mrflow_sched.engines.pipeline import read_layout

    return read_layout(args.model, args.family).family


def _calibrated(args: argparse.Namespace, family: str | Family) -> str | Family:
    """The family with the preset of --calibration, where that is given."""
    if args.calibration is None:
        return family
    from mrflow_sched.calibrate import Calibration

    try:
        text = args.calibration.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--calibration is {str(args.calibration)!r}, which cannot be read; give a file of mrflow calibrate."
        ) from error
    return Calibration.from_json(text).apply(get_family(family) if isinstance(family, str) else family)


def _is_flux(folder: str) -> bool:
    """Whether a model folder is of FLUX.1, or of nothing that can be named, of which that engine tells best."""
    try:
        index: Any = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
        return index.get("_class_name", "FluxPipeline") == "FluxPipeline"
    except (OSError, ValueError, AttributeError):
        return True


def _upscaler_path(args: argparse.Namespace, source: RunRecord | None = None) -> Path | None:
    """The file to load; None means Lanczos. The embedded model brings its own, unless `source` was made without."""
    if args.upscaler is None:
        if args.model is not None or (source is not None and source.upscaler_sha256 is None):
            return None
        from mrflow_sched import demo

        return Path(demo.upscaler_path())
    if args.upscaler.lower() == LANCZOS:
        return None
    path = Path(args.upscaler)
    if not path.is_file():
        raise ValueError(
            f"--upscaler is {args.upscaler!r}, which is not a file; give an ESRGAN-type file, or {LANCZOS}."
        )
    return path


def _load(
    args: argparse.Namespace, job: _Job, upscaler_path: Path | None
) -> tuple[FluxEngine | PipelineEngine, PixelUpscaler | None]:
    from mrflow_sched.upscale import load_upscaler

    device, dtype = args.device, args.dtype
    if job.source is not None:
        _use_threads(job.source)
        device = _device_of(job.source) if device == "auto" else device
        dtype = job.source.dtype if dtype == "auto" else dtype
    family = args.family if job.source is None else job.plan.family
    engine = _load_engine(args, device, dtype, family)
    if len(job.plan.stages) == 1:
        return engine, None
    return engine, load_upscaler(upscaler_path, device=engine.device)


def _device_of(record: RunRecord) -> str:
    """The device that a picture was made on where this machine has it, so that its bits repeat; else "auto"."""
    from mrflow_sched._device import resolve_device

    try:
        return resolve_device(record.device).type
    except ValueError:
        return "auto"


def _use_threads(record: RunRecord) -> None:
    """Sums are split by thread count, so the same bits need the same count."""
    import torch

    if record.device == "cpu" and 1 <= record.threads <= 4096:
        torch.set_num_threads(record.threads)


def _load_engine(args: argparse.Namespace, device: str, dtype: str, family: str | None) -> FluxEngine | PipelineEngine:
    if args.model is None:
        from mrflow_sched import demo

        if args.offload_text:
            _say("--offload-text has no effect on the embedded model, whose text encoders are small.")
        return demo.load_engine(device=device, dtype=dtype)
    if not _is_flux(args.model):
        from mrflow_sched.engines.pipeline import PipelineEngine

        known = family if family in FAMILIES else None  # a family made from a configuration is made from it again
        engine = PipelineEngine.from_folder(
            args.model, device=device, dtype=dtype, family=known, offload=args.offload_text
        )
        engine.pipe.set_progress_bar_config(disable=True)
        return engine
    from mrflow_sched.engines.flux import FluxEngine

    return FluxEngine.from_folder(args.model, device=device, dtype=dtype, family=family, offload_text=args.offload_text)


def _sample(
    engine: FluxEngine | PipelineEngine,
    job: _Job,
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


def _record(
    args: argparse.Namespace,
    job: _Job,
    engine: FluxEngine | PipelineEngine,
    upscaler: PixelUpscaler | None,
    upscaler_path: Path | None,
) -> RunRecord:
    import torch

    used = upscaler is not None and upscaler_path is not None
    return RunRecord(
        plan=job.plan.to_string(),
        prompt=job.prompt,
        negative=job.negative,
        seed=job.plan.seed,
        batch=job.batch,
        image=0,
        model=EMBEDDED if args.model is None else engine.name,
        model_fingerprint=engine.fingerprint,
        upscaler="none" if upscaler is None else upscaler.name,
        upscaler_sha256=_sha256(upscaler_path) if used and upscaler_path else None,
        device=engine.device.type,
        dtype=str(engine.dtype).removeprefix("torch."),
        vae_dtype=str(engine.vae_dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        versions=library_versions(),
    )


def _check_repeatable(old: RunRecord | None, new: RunRecord) -> None:
    """Refuse a repeat with another model or upscaler; say aloud what else may move the last bits."""
    if old is None:
        return
    if old.model_fingerprint != new.model_fingerprint:
        raise ValueError(
            f"the picture was made with other weights of {old.model!r} than those found; "
            "give --model the folder that it was made with."
        )
    if old.upscaler_sha256 != new.upscaler_sha256:
        advice = "leave out --upscaler" if old.upscaler_sha256 is None else "give that file with --upscaler"
        raise ValueError(f"the picture was made with the upscaler {old.upscaler!r}, not {new.upscaler!r}; {advice}.")
    moved = [
        f"{name} {before!r} is now {after!r}"
        for name, before, after in (
            *((word, getattr(old, word), getattr(new, word)) for word in ("device", "dtype", "vae_dtype", "threads")),
            *((key, old.versions.get(key), value) for key, value in new.versions.items()),
        )
        if before != after
    ]
    if moved:
        _say(f"The picture may differ in its last bits from the original: {', '.join(moved)}.")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _save_images(
    args: argparse.Namespace, job: _Job, record: RunRecord, result: StagedResult
) -> tuple[list[Path], list[str]]:
    """Write the wanted images of a result, and its stages where kept, each with its record; never over an old file.

    Returns the paths of the images, and the names of pictures left out, with a word to the user, since they hold values
    that are no numbers. Raises ValueError where no image is left.
    """
    from mrflow_sched.images import save_png

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
            raise ValueError(sentence)
        _say(sentence)
    return paths, lost


def _one(images: Tensor, number: int) -> Tensor:
    return images if images.ndim == 3 else images[number]


def _free_stem(folder: Path, stem: str) -> str:
    """`stem`, or `stem-2`, `stem-3` ... where a picture of that name, or of its stages, is already there."""
    names = (stem if count == 1 else f"{stem}-{count}" for count in range(1, 1_000_000))
    taken = ("{}.png", "{}-part*.png")
    return next(name for name in names if not any(any(folder.glob(each.format(name))) for each in taken))


# --- mrflow compare ---------------------------------------------------------------------------


def _compare(args: argparse.Namespace) -> int:
    solver = {} if args.solver else {"solver": "euler"}
    plan = _make_plan(args, _calibrated(args, _family(args)), **solver)
    from mrflow_sched.compare import compare, native_plan_of

    upscaler_path = _upscaler_path(args)
    job = _Job(plan, args.prompt, None, 1, (0,))
    with _writable(args.out), _saying_warnings():
        engine, upscaler = _load(args, job, upscaler_path)
        for note in plan.notes:
            _say(note)
        record = _record(args, job, engine, upscaler, upscaler_path)

        def save(result: StagedResult, path: Path) -> None:
            from mrflow_sched.images import save_png

            one = replace(record, plan=result.plan.to_string())
            save_png(path, result.images[0], {KEY: one.to_json()})

        with _progress(args) as show:
            found = compare(
                engine,
                args.prompt,
                plan,
                args.out,
                native_plan=native_plan_of(plan, args.steps, family=engine.family),
                upscaler=upscaler,
                save=save,
                repeats=args.repeats,
                callback=show,
            )
    for note in dict.fromkeys(found.notes):
        _say(note)
    if args.json:
        _print_json(found.to_dict())
    else:
        print("\n".join(_compare_lines(found.to_dict())))
    return 0


def _compare_lines(found: dict[str, Any]) -> Iterator[str]:
    native, staged = found["native_seconds"], found["staged_seconds"]
    yield f"native {native:.2f} s, staged {staged:.2f} s: {found['speedup']:.2f} times as fast"
    for name in ("native", "staged"):
        parts = found["stages" if name == "staged" else "native_stages"]
        yield f"{name}: " + ", ".join(f"{part['name']} {part['seconds']:.2f} s" for part in parts)
    yield f"outside the network: {found['overhead_share']:.1%} of the staged time"
    yield f"peak memory: {found['peak_memory_ratio']:.2f} times native"
    yield f"picture: {found['sheet']}"


# --- mrflow calibrate -------------------------------------------------------------------------

# Wide, detailed, lettered, smooth.
_PROMPTS = (
    "a harbour at dawn with fishing boats, mountains behind it",
    "a crowded market street, many small stalls and signs, detailed photograph",
    'a shop window with the words "OPEN TODAY" painted on it',
    "a portrait of an old fisherman, soft light",
)


def _calibrate(args: argparse.Namespace) -> int:
    from mrflow_sched.calibrate import calibrate
    from mrflow_sched.upscale import load_upscaler

    family = _family(args)
    width, height = args.size or _default_size(family, native=False)
    make_plan(family, width, height, factor=args.factor)  # a bad size or factor is told before anything is loaded
    upscaler_path = _upscaler_path(args)
    pictures, prompts = _measured_pictures(args, width, height)
    with _writable(args.out), _saying_warnings():
        engine = _load_engine(args, args.device, args.dtype, args.family)
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
            tell=None if args.progress is False else lambda what: _say(f"measuring: {what}"),
        )
        path = _write_new(args.out, f"calibration-{found.family}", found.to_json())
    if args.json:
        _print_json({"file": str(path), "calibration": json.loads(found.to_json())})
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
        raise ValueError("--images are measured in place of native pictures, so --steps has no meaning; leave one out.")
    if args.prompts and len(args.prompts) != len(args.images):
        raise ValueError(
            f"there are {len(args.prompts)} prompts for {len(args.images)} --images; give one each, or none."
        )
    import torch

    from mrflow_sched.images import load_image
    from mrflow_sched.upscale import upscale_to

    loaded = [upscale_to(load_image(path)[None], width, height) for path in args.images]
    return torch.cat(loaded), tuple(args.prompts or [""] * len(args.images))


def _calibration_lines(found: Calibration) -> Iterator[str]:
    yield (
        f"{found.family} with {found.upscaler}: {_count(found.pictures, 'picture')} of {found.width}x{found.height}, "
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
        raise ValueError(f"{str(path)!r} cannot be written ({_reason(error)}); give another --out.") from error
    return path


# --- mrflow doctor ----------------------------------------------------------------------------


def _doctor(args: argparse.Namespace) -> int:
    from mrflow_sched.doctor import examine

    findings = list(examine(args.model, args.upscaler))
    healthy = all(finding.good for finding in findings)
    if args.json:
        _print_json({"ok": healthy, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.good else 'FAIL'} {finding.name}: {finding.text}")
    return 0 if healthy else AILING


# --- around every command ---------------------------------------------------------------------


def _say(text: str) -> None:
    print(f"mrflow: {text}", file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


@contextlib.contextmanager
def _writable(folder: Path) -> Generator[None, None, None]:
    """Make the folder and prove that it takes files before minutes are spent; remove it if a failure left it empty."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    there = next((place for place in (folder, *folder.parents) if place.exists() or place.is_symlink()), folder)
    if not there.is_dir():
        which = "that" if there == folder else repr(str(there))
        raise ValueError(f"--out is {str(folder)!r}, but {which} is not a folder; give another.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"mrflow")
    except OSError as error:
        raise ValueError(f"--out is {str(folder)!r}, which takes no files ({_reason(error)}); give another.") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # rmdir takes only empty folders
            for place in missing:
                place.rmdir()
        raise


@contextlib.contextmanager
def _saying_warnings() -> Generator[None, None, None]:
    """Warnings of this package become notes on standard error; those of others keep their own way."""
    home = str(Path(mrflow_sched.__file__).parent)
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if filename.startswith(home):
                _say(str(message))
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _progress(args: argparse.Namespace) -> Generator[Callable[[str, Progress], None], None, None]:
    """A function (run name, progress) that moves a bar on standard error, or does nothing where no bar is wanted."""
    if not (sys.stderr.isatty() if args.progress is None else args.progress):
        yield lambda _name, _step: None
        return
    from tqdm import tqdm

    # A percentage, not a step count: the fraction is weighted by cost, so the bar moves evenly in time.
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    make_bar: Any = tqdm
    with make_bar(total=1.0, bar_format=layout, file=sys.stderr, leave=False) as bar:
        last = [""]

        def show(name: str, step: Progress) -> None:
            if name != last[0]:
                last[0] = name
                bar.reset(total=1.0)
            bar.set_description_str(f"{name}: {step.name}" if name else step.name, refresh=False)
            bar.update(step.fraction - bar.n)
            bar.refresh()

        yield show


@contextlib.contextmanager
def _ctrl_c() -> Generator[Callable[[], bool], None, None]:
    """A function that says whether Ctrl-C was pressed; the first press stops gently, the second at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return

    def press(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        _say("Stopping and keeping the best picture so far (Ctrl-C again stops at once).")

    before = signal.signal(signal.SIGINT, press)
    try:
        yield stop.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return (error.strerror or str(error)).lower()


def _sentence(error: BaseException) -> str:
    """One line for any refusal."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f" at {error.filename}" if error.filename else ""
        return f"{_reason(error)}{where}; free some space or give another folder or file."
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."


def _out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from mrflow_sched.upscale import is_memory_error

    return is_memory_error(error)


def _forget_output() -> None:
    """Point stdout at nothing, so that Python's own flush at exit does not fail once more, with a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush_output() -> None:
    """Bring what was printed out while an error can still be told in a sentence."""
    if sys.stdout is not None:  # pyright: ignore[reportUnnecessaryComparison]  # None where stdout was closed
        try:
            sys.stdout.flush()
        except OSError:
            _forget_output()
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code.

    ValueError and OSError are refusals: one sentence, code 2. Anything else is a fault of ours and shows its traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        args = parser.parse_args(words)
        if args.command is None:
            parser.print_help(sys.stderr)
            return REFUSED
        code = int(args.run(args))
        _flush_output()
        return code
    except KeyboardInterrupt:
        _say("Stopped.")
        return STOPPED
    except BrokenPipeError:
        _forget_output()  # the reader went away (a pager, head)
        return 0
    except Exception as error:
        known = isinstance(error, (ValueError, OSError)) or _out_of_memory(error)
        if not known or "--debug" in words:
            raise
        if _out_of_memory(error):
            _say("there is not enough memory for this size or batch; make the picture or the batch smaller.")
        else:
            _say(_sentence(error))
        with contextlib.suppress(OSError):
            _flush_output()
        return REFUSED
