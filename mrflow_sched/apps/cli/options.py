"""Options that commands share: how they are read, and the values they become."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.options import OPTIONS, Option, PlanOptions
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from mrflow_sched.plan.families import Family

LANCZOS = "lanczos"
"""The --upscaler that needs no file."""


class Parser(argparse.ArgumentParser):
    """argparse without the usage block: a bad argument is one sentence, like every other refusal."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments.

        Raises:
            MrFlowError: Always, with argparse's own sentence.
        """
        raise MrFlowError(f"{message.strip().rstrip('.')} (see {self.prog} --help).")


class Commands(Protocol):
    """Where a command adds its parser."""

    def add_parser(self, name: str, **more: Any) -> argparse.ArgumentParser:
        """The parser of a command called `name`; `more` are argparse's own keywords."""
        ...


# --- how an option is read ---------------------------------------------------------------------


def size_option(text: str) -> tuple[int, int]:
    """(width, height) of "WIDTHxHEIGHT"."""
    found = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text.strip())
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT in pixels, for example 1024x768")
    return size


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


def text_option(text: str) -> str:
    """Text, which may be empty but not broken."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it contains bytes that are not UTF-8; type the text again") from None
    return text


def prompt_option(text: str) -> str:
    """A prompt, which is neither empty nor broken text."""
    if not text_option(text).strip():
        raise argparse.ArgumentTypeError("it is empty; say what the image shows")
    return text


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


def plan_options(*, native: bool = True) -> Parser:
    """Options that decide a plan, made from `OPTIONS`; what is left out comes from the family and its preset.

    `native` False leaves out --native, for commands that need a staged plan.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("the plan (what is left out comes from the family's preset)")
    group.add_argument("--size", type=size_option, metavar="WxH", help="size of the final image in pixels")
    for option in OPTIONS.values():
        if option.name != "native":
            _add_option(group, option)
        elif native:
            group.add_argument("--native", action="store_true", default=None, help=option.help)
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="a file written by `mrflow calibrate`: its preset is the default",
    )
    return parser


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:  # pyright: ignore[reportPrivateUsage]
    default = "" if option.default in (None, 0) and option.name != "seed" else f" (default {option.default})"
    words = option.metavar or "|".join(option.choices) or None
    if option.per_stage or option.kind == "numbers":
        words = f"{words}[,{words}...]"
    group.add_argument(option_name(option.name), type=_reader(option), metavar=words, help=option.help + default)


def _reader(option: Option) -> Callable[[str], object]:
    """A function that reads the option's value from text; the option itself says what it may be."""

    def read(text: str) -> object:
        value = _value_of(option, text.strip())
        try:
            option.check(value)
        except MrFlowError as error:
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error
        return value

    return read


def _value_of(option: Option, text: str) -> object:
    """`text` as the option's kind of value, or as it is where it is of another kind."""
    if option.kind == "interval":
        found = re.fullmatch(r"([0-9.]+)-([0-9.]+)", text)
        numbers = tuple(_number(part, float) for part in found.groups()) if found else ()
        if not numbers or any(isinstance(number, str) for number in numbers):
            raise argparse.ArgumentTypeError(f"{text!r} is not an interval; write LOW-HIGH, for example 0.2-0.9")
        return numbers
    kind = int if option.kind == "whole" else float
    if option.kind == "text" or text in option.choices:
        return text
    if option.kind == "numbers" or (option.per_stage and "," in text):
        return tuple(_number(part, kind) for part in text.split(","))
    return _number(text, kind)


def _number(text: str, kind: type[int] | type[float]) -> object:
    try:
        return kind(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class PlanChoices:
    """What the plan's options ask for; `options` has those that were given, as keywords of `make_plan`."""

    size: tuple[int, int] | None
    options: PlanOptions
    calibration: Path | None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> PlanChoices:
        """The choices in the arguments."""
        return cls(args.size, given_options(args), args.calibration)

    def make_plan(self, family: str | Family) -> StagedPlan:
        """The plan that the options ask for; everything not given is left to `plan.make.make_plan`.

        Args:
            family: the model's family, or its name.

        Raises:
            MrFlowError: An option is out of range, or has no meaning beside another; --calibration cannot be read.
        """
        native = bool(self.options.get("native"))
        _check_meaning(self.options, native)
        known = self._calibrated(get_family(family) if isinstance(family, str) else family)
        width, height = self.size or default_size(known, native=native)
        return make_plan(known, width, height, **self.options)

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


def given_options(args: argparse.Namespace) -> PlanOptions:
    """The plan's options that were given in `args`."""
    found = {name: getattr(args, name, None) for name in OPTIONS}
    return cast("PlanOptions", {name: value for name, value in found.items() if value is not None})


def option_name(word: str) -> str:
    """The option that is called `word` in Python."""
    return f"--{word.replace('_', '-')}"


def _check_meaning(given: PlanOptions, native: bool) -> None:
    """Refuse options that another one makes meaningless, by the names that they have here."""
    for name, value in given.items():
        option = OPTIONS[name]
        if native and option.applies == "staged" and value != option.default:
            raise MrFlowError(f"--native samples in one stage, so {option_name(name)} has no meaning; leave one out.")
        if not native and option.applies == "native":
            raise MrFlowError(f"{option_name(name)} {value} is for native sampling; add --native, or use --low-steps.")
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
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the model; auto is bfloat16 where the hardware multiplies it, else float32",
    )
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
        """The choices in the arguments."""
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
        """The choices in the arguments."""
        return cls(args.out, args.progress, args.json)
