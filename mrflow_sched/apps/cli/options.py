"""What every command can be given, and how it is read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.solver_table import SOLVER_NAMES
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from mrflow_sched.plan.families import Family
from mrflow_sched.apps.cli.load import LANCZOS

SEED_END = 2**63 - 2**20
"""Seeds stay below what a torch generator takes, with room for the offsets of images and stages."""


class Parser(argparse.ArgumentParser):
    """argparse without the usage block: a bad argument is one sentence, like every other refusal."""

    def error(self, message: str) -> NoReturn:
        raise MrFlowError(f"{message.strip().rstrip('.')} (see {self.prog} --help).")


# --- arguments --------------------------------------------------------------------------------


def size_option(text: str) -> tuple[int, int]:
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


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
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


def number_between(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
        return number

    return parse


def prompt_option(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it holds bytes that are not UTF-8; type the prompt again") from None
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; say what the picture shows")
    return text


def _shift_tokens(text: str) -> str | int:
    return text if text in ("low", "final") else whole_number(1)(text)


def common_options() -> Parser:
    """Options of every command."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on standard output, and nothing else"
    )
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    return parser


def plan_options() -> Parser:
    """Options that decide a plan; what is left out comes from the family and its preset."""
    parser = Parser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("the plan (what is left out comes from the family's preset)")
    group.add_argument("--size", type=size_option, metavar="WxH", help="size of the final picture in pixels")
    group.add_argument("--preset", help="fast, balanced, best, or low-size steps + full-size steps, for example 12+1")
    group.add_argument("--low-steps", type=whole_number(1, 1000), metavar="N", help="steps of the first stage")
    group.add_argument("--refine-steps", type=whole_number(0, 1000), metavar="N", help="steps of every later stage")
    group.add_argument("--sigma", type=float, metavar="S", help="fraction of noise at which refining starts, 0 < S < 1")
    group.add_argument("--solver", help=", ".join(SOLVER_NAMES))
    group.add_argument("--factor", type=float, metavar="F", help="enlargement between stages, 1.25 to 4")
    group.add_argument("--stages", type=whole_number(2, 8), metavar="N", help="number of stages, 2 to 8")
    group.add_argument("--refine-curve", choices=("linear", "shifted"), help="spacing of the refine sigmas")
    group.add_argument("--shift-tokens", type=_shift_tokens, metavar="low|final|N", help="token count that sets mu")
    group.add_argument("--mu", type=number_between(-20, 20), help="shift of the first stage, as log(shift)")
    group.add_argument("--guidance", type=number_between(0, 100), metavar="G", help="guidance of the first stage")
    group.add_argument(
        "--refine-guidance", type=number_between(0, 100), metavar="G", help="guidance of every later stage"
    )
    group.add_argument("--seed", type=whole_number(0, SEED_END), help="seed of the first picture's noise (default 0)")
    group.add_argument("--seed-rule", choices=("offset", "hash"), help="how seeds of stages and batch images differ")
    group.add_argument("--posterior", choices=("mode", "sample"), help="what to take from the VAE's encoder")
    group.add_argument(
        "--guidance-interval", type=_interval, metavar="LOW-HIGH", help="sigmas between which CFG is on in stage 1"
    )
    group.add_argument(
        "--tile", type=whole_number(0, 32768), metavar="PIXELS", help="refine larger pictures in such tiles"
    )
    group.add_argument("--steps", type=whole_number(1, 1000), metavar="N", help="steps of native sampling")
    group.add_argument(
        "--calibration", type=Path, metavar="FILE", help="what `mrflow calibrate` wrote: its preset is the default"
    )
    return parser


def machine_options() -> Parser:
    """Options that choose the model and what it runs on."""
    parser = Parser(add_help=False, allow_abbrev=False)
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


PLAN_WORDS = (
    *("preset", "low_steps", "refine_steps", "sigma", "solver", "factor", "stages", "refine_curve", "shift_tokens"),
    *("mu", "guidance", "refine_guidance", "seed", "seed_rule", "posterior", "tile", "guidance_interval"),
)


_STAGED_WORDS = (
    *("preset", "low_steps", "refine_steps", "sigma", "factor", "stages", "refine_curve", "shift_tokens"),
    *("refine_guidance", "tile", "guidance_interval"),
)


def plan_of(args: argparse.Namespace, family: str | Family, **overrides: Any) -> StagedPlan:
    """The plan that the given options ask for; everything not given is left to `make_plan`."""
    given = {word: getattr(args, word) for word in PLAN_WORDS if getattr(args, word) is not None} | overrides
    native = bool(getattr(args, "native", False))
    clash = [word for word in _STAGED_WORDS if word in given] if native else []
    if clash:
        raise MrFlowError(
            f"--native samples in one stage, so --{clash[0].replace('_', '-')} has no meaning; leave one out."
        )
    if native and getattr(args, "upscaler", None) is not None:
        raise MrFlowError("--native samples in one stage, so --upscaler has no meaning; leave one out.")
    if args.steps is not None and args.command != "compare":
        if not native:
            raise MrFlowError(f"--steps {args.steps} counts native steps; add --native, or use --low-steps.")
        given["steps"] = args.steps
    _check_meaning(given)
    width, height = args.size or default_size(family, native)
    return make_plan(family, width, height, native=native, **given)


def _check_meaning(given: dict[str, Any]) -> None:
    """Refuse options that another one makes meaningless."""
    if "mu" in given and "shift_tokens" in given:
        raise MrFlowError("--mu sets the shift outright, so --shift-tokens has no meaning; leave one out.")
    idle = [word for word in ("sigma", "refine_curve", "refine_guidance") if word in given]
    if given.get("refine_steps") == 0 and idle:
        raise MrFlowError(
            f"--refine-steps 0 keeps the upscaled picture, so --{idle[0].replace('_', '-')} has no meaning; "
            "leave one out."
        )


def default_size(family: str | Family, native: bool) -> tuple[int, int]:
    known = get_family(family) if isinstance(family, str) else family
    return known.native_size if native else known.default_size or known.native_size


def with_calibration(args: argparse.Namespace, family: str | Family) -> str | Family:
    """The family with the preset of --calibration, where that is given."""
    if args.calibration is None:
        return family
    from mrflow_sched.measure.calibrate import Calibration

    try:
        text = args.calibration.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MrFlowError(
            f"--calibration is {str(args.calibration)!r}, which cannot be read; give a file of mrflow calibrate."
        ) from error
    return Calibration.from_json(text).apply(get_family(family) if isinstance(family, str) else family)
