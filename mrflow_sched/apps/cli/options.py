"""Options that commands share: how they are read, and the values they become."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.checks import SOLVER_NAMES
from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from mrflow_sched.plan.families import Family

LANCZOS = "lanczos"
"""The --upscaler that needs no file."""

SEED_END = 2**63 - 2**20
"""Seeds stay below what a torch generator takes, with room for the offsets of images and stages."""


class Parser(argparse.ArgumentParser):
    """argparse without the usage block: a bad argument is one sentence, like every other refusal."""

    def error(self, message: str) -> NoReturn:
        raise MrFlowError(f"{message.strip().rstrip('.')} (see {self.prog} --help).")


class Commands(Protocol):
    """Where a command adds its parser."""

    def add_parser(self, name: str, **more: Any) -> argparse.ArgumentParser: ...


# --- how an option is read ---------------------------------------------------------------------


def size_option(text: str) -> tuple[int, int]:
    """(width, height) of "WIDTHxHEIGHT"."""
    found = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text.strip())
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT in pixels, for example 1024x768")
    return size


def interval_option(text: str) -> tuple[float, float]:
    """(low, high) of "LOW-HIGH"."""
    found = re.fullmatch(r"([0-9.]+)-([0-9.]+)", text.strip())
    try:
        return float(found[1]), float(found[2])  # type: ignore[index]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not an interval; write LOW-HIGH, for example 0.2-0.9") from None


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from `low` to `high`."""

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
    """A reader of numbers from `low` to `high`."""

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
    """A prompt, which is neither empty nor broken text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it contains bytes that are not UTF-8; type the prompt again") from None
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; say what the image shows")
    return text


def _shift_tokens(text: str) -> str | int:
    return text if text in ("low", "final") else whole_number(1)(text)


# --- every command -----------------------------------------------------------------------------


def common_options() -> Parser:
    """Options of every command."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on standard output, and nothing else"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a refusal too")
    return parser


# --- the plan ----------------------------------------------------------------------------------


PLAN_WORDS = (
    *("preset", "low_steps", "refine_steps", "sigma", "solver", "factor", "stages", "refine_curve", "shift_tokens"),
    *("mu", "guidance", "refine_guidance", "seed", "seed_rule", "posterior", "tile", "guidance_interval"),
)
_STAGED_WORDS = (
    *("preset", "low_steps", "refine_steps", "sigma", "factor", "stages", "refine_curve", "shift_tokens"),
    *("refine_guidance", "tile", "guidance_interval"),
)


def plan_options() -> Parser:
    """Options that decide a plan; what is left out comes from the family and its preset."""
    parser = Parser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("the plan (what is left out comes from the family's preset)")
    group.add_argument("--size", type=size_option, metavar="WxH", help="size of the final image in pixels")
    group.add_argument("--preset", help="fast, balanced, best, or low steps + refine steps, for example 12+1")
    group.add_argument("--low-steps", type=whole_number(1, 1000), metavar="N", help="steps of the first stage")
    group.add_argument("--refine-steps", type=whole_number(0, 1000), metavar="N", help="steps of every later stage")
    group.add_argument("--sigma", type=float, metavar="S", help="fraction of noise at which refining starts, 0 < S < 1")
    group.add_argument("--solver", help=", ".join(SOLVER_NAMES))
    group.add_argument("--factor", type=float, metavar="F", help="upscale factor between stages, 1.25 to 4")
    group.add_argument("--stages", type=whole_number(2, 8), metavar="N", help="number of stages, 2 to 8")
    group.add_argument("--refine-curve", choices=("linear", "shifted"), help="spacing of the refine sigmas")
    group.add_argument("--shift-tokens", type=_shift_tokens, metavar="low|final|N", help="token count that sets mu")
    group.add_argument("--mu", type=number_between(-20, 20), help="shift of the first stage, as log(shift)")
    group.add_argument("--guidance", type=number_between(0, 100), metavar="G", help="guidance of the first stage")
    group.add_argument(
        "--refine-guidance", type=number_between(0, 100), metavar="G", help="guidance of every later stage"
    )
    group.add_argument("--seed", type=whole_number(0, SEED_END), help="seed of the first image's noise (default 0)")
    group.add_argument("--seed-rule", choices=("offset", "hash"), help="how seeds of stages and batch images differ")
    group.add_argument("--posterior", choices=("mode", "sample"), help="what to take from the VAE's encoder")
    group.add_argument(
        "--guidance-interval",
        type=interval_option,
        metavar="LOW-HIGH",
        help="sigmas between which CFG is on in stage 1",
    )
    group.add_argument(
        "--tile", type=whole_number(0, 32768), metavar="PIXELS", help="refine larger images in tiles of this side"
    )
    group.add_argument("--steps", type=whole_number(1, 1000), metavar="N", help="steps of native sampling")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="a file written by `mrflow calibrate`: its preset is the default",
    )
    return parser


@dataclass(frozen=True)
class PlanChoices:
    """What the plan's options ask for; `options` holds those that were given, by their names in `make_plan`."""

    size: tuple[int, int] | None
    options: Mapping[str, Any]
    steps: int | None
    native: bool
    calibration: Path | None

    @classmethod
    def from_args(cls, args: argparse.Namespace, **defaults: Any) -> PlanChoices:
        """The choices in `args`; `defaults` are plan options that count where none was given."""
        values = {word: getattr(args, word) for word in PLAN_WORDS}
        given = {word: value for word, value in values.items() if value is not None}
        return cls(args.size, defaults | given, args.steps, getattr(args, "native", False), args.calibration)

    def make_plan(self, family: str | Family) -> StagedPlan:
        """The plan that the options ask for; everything not given is left to `plan.make.make_plan`.

        Raises:
            MrFlowError: An option is out of range, or has no meaning beside another.
        """
        given = dict(self.options)
        clash = [word for word in _STAGED_WORDS if word in given] if self.native else []
        if clash:
            raise MrFlowError(
                f"--native samples in one stage, so {option_name(clash[0])} has no meaning; leave one out."
            )
        if self.steps is not None:
            if not self.native:
                raise MrFlowError(f"--steps {self.steps} counts native steps; add --native, or use --low-steps.")
            given["steps"] = self.steps
        _check_meaning(given)
        known = self._calibrated(get_family(family) if isinstance(family, str) else family)
        width, height = self.size or default_size(known, native=self.native)
        return make_plan(known, width, height, native=self.native, **given)

    def _calibrated(self, family: Family) -> Family:
        """`family` with the preset of --calibration, where that is given."""
        if self.calibration is None:
            return family
        from mrflow_sched.measure.calibrate import Calibration

        try:
            text = self.calibration.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MrFlowError(
                f"--calibration is {str(self.calibration)!r}, which cannot be read; give a file that "
                "`mrflow calibrate` wrote."
            ) from error
        return Calibration.from_json(text).apply(family)


def option_name(word: str) -> str:
    """The option that is called `word` in Python."""
    return f"--{word.replace('_', '-')}"


def _check_meaning(given: Mapping[str, Any]) -> None:
    """Refuse options that another one makes meaningless."""
    if "mu" in given and "shift_tokens" in given:
        raise MrFlowError("--mu sets the shift outright, so --shift-tokens has no meaning; leave one out.")
    idle = [word for word in ("sigma", "refine_curve", "refine_guidance") if word in given]
    if given.get("refine_steps") == 0 and idle:
        raise MrFlowError(
            f"--refine-steps 0 keeps the upscaled image, so {option_name(idle[0])} has no meaning; leave one out."
        )


def default_size(family: Family, *, native: bool) -> tuple[int, int]:
    """(width, height) in pixels where --size is left out."""
    return family.native_size if native else family.default_size or family.native_size


# --- the model and the machine -----------------------------------------------------------------


def model_options() -> Parser:
    """Options that choose the model, the upscaler and what they run on."""
    parser = Parser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("the model and the machine")
    group.add_argument(
        "--model",
        metavar="DIR",
        help="local folder of a diffusers text-to-image pipeline (default: the embedded model)",
    )
    group.add_argument(
        "--family", metavar="NAME", help="family of --model, where the folder does not tell (flux1-krea)"
    )
    group.add_argument(
        "--upscaler", metavar="FILE", help=f"ESRGAN-type file, .safetensors or .pth; or {LANCZOS}, which adds no detail"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    group.add_argument("--offload-text", action="store_true", help="keep parts on the CPU while they are idle")
    return parser


@dataclass(frozen=True)
class ModelChoices:
    """Which model and upscaler to load, and how. `model` None: the embedded model."""

    model: str | None = None
    family: str | None = None
    upscaler: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    offload: bool = False

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ModelChoices:
        return cls(args.model, args.family, args.upscaler, args.device, args.dtype, args.offload_text)


# --- what comes out ----------------------------------------------------------------------------


def output_options() -> Parser:
    """Options of what a command writes and shows."""
    parser = Parser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("the output")
    group.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the results (default out)"
    )
    group.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bar on standard error (default: only on a terminal)",
    )
    return parser


@dataclass(frozen=True)
class OutputChoices:
    """Where results go and how they are shown. `progress` None: a bar on a terminal only."""

    folder: Path
    progress: bool | None
    json: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> OutputChoices:
        return cls(args.out, args.progress, args.json)
