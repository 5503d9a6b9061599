"""Options that commands share: how they are parsed, and the values they become."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

from mrflow_sched._runtime.errors import MrFlowError, shown
from mrflow_sched.apps.cli.inputs import LoraChoice, StartImage, read_small
from mrflow_sched.apps.cli.meaning import check_plan_options, check_start_options
from mrflow_sched.apps.cli.parsing import (
    lora_option,
    number_option,
    path_option,
    path_text_option,
    seed_option,
    size_option,
    tile_option,
)
from mrflow_sched.apps.cli.wording import option_name, with_options
from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.options import OPTIONS, Option, PlanOptions
from mrflow_sched.plan.sizes import from_an_image, size_step
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from mrflow_sched.plan.checks import UpscalerKind
    from mrflow_sched.plan.cost import Offload
    from mrflow_sched.plan.families import Family

LANCZOS = "lanczos"
"""The value of --upscaler that needs no file."""


class Parser(argparse.ArgumentParser):
    """argparse without the usage block: a bad argument is one sentence, like every other refusal."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments.

        Args:
            message: What is wrong with them, in argparse's own words.

        Raises:
            MrFlowError: Always.
        """
        said = re.sub(r"\Aargument (--[\w-]+): (?:\1 )?(?=must )", r"\1 ", message.strip().rstrip("."))
        raise MrFlowError(f"{said} (see {self.prog} --help).")

    def _refuse_left(self, values: argparse.Namespace, left: list[str]) -> NoReturn:
        """Refuse arguments that no option takes. Words that follow a prompt are most often the rest of it."""
        prompt = getattr(values, "prompt", None)
        words = [word for word in left if not word.startswith("-")]
        if prompt is not None and len(words) == len(left):
            raise MrFlowError(
                f"the words {shown(' '.join(words))!r} follow the prompt {shown(prompt)!r}; put the whole prompt in "
                f'quotation marks, as in {self.prog} "a blue star over green hills".'
            )
        unknown = [word.partition("=")[0] for word in left if word.startswith("-")]
        near = [difflib.get_close_matches(word, self._option_string_actions, n=1) for word in unknown]
        hint = f"; did you mean {near[0][0]}?" if near and near[0] else ""
        self.error(f"unrecognized arguments: {' '.join(left)}{hint}")

    def parse_known_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Parse arguments, as argparse does.

        Args:
            args: The arguments; None takes those of the process.
            namespace: Where the values go.

        Returns:
            (values, an empty list: what is left is refused here, where the command is known).

        Raises:
            MrFlowError: An argument is not known, or has the value "--", which argparse takes for the end of the
                options.
        """
        for word in args or ():
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word[:-3]}: '--' is no value")
        values, left = super().parse_known_args(args, namespace)
        if left:
            self._refuse_left(values, left)
        return values, left


class Commands(Protocol):
    """Where a command adds its parser."""

    def add_parser(self, name: str, **more: Any) -> argparse.ArgumentParser:
        """Add the parser of a command.

        Args:
            name: The command's name on the command line.
            **more: Keywords of `argparse.ArgumentParser`, and `help`.

        Returns:
            The new parser.
        """
        ...


# --- every command -----------------------------------------------------------------------------


def common_options() -> Parser:
    """Make the options of every command: --json and --debug.

    Returns:
        A parser for argparse's `parents=`.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on standard output, and nothing else"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a refusal too")
    return parser


# --- the plan ----------------------------------------------------------------------------------


def plan_options(*, native: bool = True, staged: bool = True) -> Parser:
    """Make the options that decide a plan, from `plan.options.OPTIONS`.

    What the user leaves out comes from the family and its preset.

    Args:
        native: Offer --native; False is for commands that need a staged plan, or a native one.
        staged: Offer what only staged plans have; False is for commands that need a native plan.

    Returns:
        A parser for argparse's `parents=`, whose results `PlanChoices.from_args` reads.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("the plan (what is left out comes from the family's preset)")
    group.add_argument("--size", type=size_option, metavar="WxH", help="size of the final image in pixels")
    for option in OPTIONS.values():
        if option.applies == "staged" and not staged:
            continue
        if option.name != "native":
            _add_option(group, option)
        elif native:
            group.add_argument("--native", action="store_true", default=None, help=option.help)
    if staged:
        group.add_argument(
            "--calibration",
            type=path_option,
            metavar="FILE",
            help="a file written by `mrflow calibrate`: its preset is the default",
        )
    return parser


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:  # pyright: ignore[reportPrivateUsage]
    default = "" if option.default in (None, 0) and option.name != "seed" else f" (default {option.default})"
    words = option.metavar or "|".join(option.choices) or None
    if option.per_stage or option.kind == "numbers":
        words = f"{words}[,{words}...]"
    reader = seed_option if option.name == "seed" else _reader(option)
    more = "; random draws one" if option.name == "seed" else ""
    group.add_argument(option_name(option.name), type=reader, metavar=words, help=option.help + more + default)


def _reader(option: Option) -> Callable[[str], object]:
    """Make a parser of the option's value; the option itself says what is allowed."""

    def read(text: str) -> object:
        value = _value_of(option, text.strip())
        try:
            option.checked(value)
        except MrFlowError as error:
            raise argparse.ArgumentTypeError(with_options(str(error)).rstrip(".")) from error
        return value

    return read


def read_option(name: str, text: str) -> object:
    """Read the value of a plan's option as the command line does.

    Args:
        name: A name of `plan.options.OPTIONS`.
        text: What was written.

    Returns:
        The value.

    Raises:
        MrFlowError: It is none of this option.
    """
    if name == "native":
        if text.lower() not in ("true", "false"):
            raise MrFlowError(f"native is {shown(text)!r}; write true or false.")
        return text.lower() == "true"
    try:
        return _reader(OPTIONS[name])(text)
    except argparse.ArgumentTypeError as error:
        raise MrFlowError(f"{name} cannot be {shown(text)!r}: {error}.") from error


def _value_of(option: Option, text: str) -> object:
    """Convert text to the option's kind of value, or return it unchanged where it is of another kind."""
    if option.kind == "interval":
        found = re.fullmatch(r"([0-9.]+)-([0-9.]+)", text)
        numbers = tuple(_number(part, float) for part in found.groups()) if found else ()
        if not numbers or any(isinstance(number, str) for number in numbers):
            raise argparse.ArgumentTypeError(f"{text!r} is not an interval; write LOW-HIGH, for example 0.2-0.9")
        return numbers
    kind = int if option.kind == "whole" else float
    if text.lower() in option.choices:
        return text.lower()
    if option.kind == "text":
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
    """What the plan's options ask for.

    Attributes:
        size: (width, height) of the final image in pixels; None takes the family's default.
        options: The options that were given, as keywords of `plan.make.make_plan`.
        calibration: A file of `mrflow calibrate`, whose preset becomes the default; or None.
    """

    size: tuple[int, int] | None
    options: PlanOptions
    calibration: Path | None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> PlanChoices:
        """Take the choices from parsed arguments.

        Args:
            args: What a parser with `plan_options` returned.

        Returns:
            The choices.
        """
        return cls(args.size, _given_options(args), getattr(args, "calibration", None))

    def make_plan(
        self,
        family: str | Family,
        start: StartImage | None = None,
        taken: PlanOptions | None = None,
        upscaler_kind: UpscalerKind | None = None,
    ) -> StagedPlan:
        """Make the plan that the options ask for; what was not given is left to `plan.make.make_plan`.

        Args:
            family: The model's family, or its name.
            start: The image that the run starts from, whose size decides where --size is left out; or None.
            taken: Options besides, from another image, that were not given and do not contradict those that were.
            upscaler_kind: Of the upscaler that is used (`load.upscaler_kind`), where --upscaler-kind was not given;
                None: nothing is known of it.

        Returns:
            The plan.

        Raises:
            MrFlowError: An option is out of range, or has no meaning beside another; --calibration cannot be read.
        """
        check_plan_options(self.options)
        if start is not None:
            check_start_options(self.options, self.size, start)
        try:
            known: PlanOptions = {}
            if upscaler_kind is not None and not self.options.get("native"):
                known["upscaler_kind"] = upscaler_kind
            whole = replace(self, options={**known, **(taken or {}), **self.options})
            return whole._made(get_family(family) if isinstance(family, str) else family, start)
        except MrFlowError as error:
            raise type(error)(with_options(str(error))) from error

    def _made(self, family: Family, start: StartImage | None) -> StagedPlan:
        known, native = self._calibrated(family), bool(self.options.get("native"))
        usual = default_size(known, native=native) if start is None else start.size(size_step(known, self.options))
        width, height = self.size or usual
        options = from_an_image(self.options) if start is not None and start.strength is None else self.options
        plan = make_plan(known, width, height, **cast("PlanOptions", options))
        if start is not None and self.size is None:
            start.check_shape(plan)
        return plan

    def _calibrated(self, family: Family) -> Family:
        """Return `family` with the preset of --calibration, where that is given."""
        if self.calibration is None:
            return family
        from mrflow_sched.measure.calibrate import Calibration

        wanted = "a file that `mrflow calibrate` wrote"
        data = read_small(self.calibration, "--calibration", wanted)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise MrFlowError(
                f"--calibration is {str(self.calibration)!r}, which is no text; give {wanted}."
            ) from error
        return Calibration.from_json(text).apply(family)


def _given_options(args: argparse.Namespace) -> PlanOptions:
    """Return the plan's options that were given in `args`."""
    found = {name: getattr(args, name, None) for name in OPTIONS}
    return cast("PlanOptions", {name: value for name, value in found.items() if value is not None})


def default_size(family: Family, *, native: bool) -> tuple[int, int]:
    """Return the size to make where --size is left out.

    Args:
        family: The model's family.
        native: Whether the run is native, that is, of one stage.

    Returns:
        (width, height) in pixels.
    """
    return family.native_size if native else family.default_size or family.native_size


# --- the model and the machine -----------------------------------------------------------------


def model_options() -> Parser:
    """Make the options that choose the model, the upscaler and what they run on.

    Returns:
        A parser for argparse's `parents=`, whose results `ModelChoices.from_args` reads.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("the model and the machine")
    group.add_argument(
        "--model",
        type=path_text_option,
        metavar="PATH",
        help="local diffusers folder or .safetensors file of a text-to-image model (default: the embedded model)",
    )
    group.add_argument(
        "--model-config",
        type=path_text_option,
        metavar="DIR",
        help="for a single file: the diffusers folder that describes it (default: one of its name beside it)",
    )
    group.add_argument(
        "--family", metavar="NAME", help="family of --model, where the folder does not tell (flux1-krea)"
    )
    group.add_argument(
        "--upscaler",
        type=path_text_option,
        metavar="FILE",
        help=f"ESRGAN-type file, .safetensors or .pth; or {LANCZOS}, which adds no detail",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the model; auto is bfloat16 where the hardware multiplies it, else float32",
    )
    group.add_argument(
        "--offload",
        choices=("model", "layers"),
        help="keep parts on the CPU while they are idle (model), or every layer: least memory, slow (layers)",
    )
    group.add_argument(
        "--offload-text", dest="offload", action="store_const", const="model", help="the same as --offload model"
    )
    group.add_argument(
        "--lora",
        type=lora_option,
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="a LoRA in a .safetensors file to put on the model; may be repeated",
    )
    group.add_argument(
        "--upscaler-dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the upscaler; auto is half precision where that is as good and faster",
    )
    group.add_argument(
        "--upscaler-tile",
        type=tile_option,
        metavar="PIXELS",
        help="largest side that the upscaler is given at once (default: the whole image, tiles where memory is short)",
    )
    group.add_argument("--force", action="store_true", help="run although the forecast says that memory will not do")
    return parser


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Add the option for a card of a given size.

    Args:
        parser: Of a command that plans for one.
    """
    parser.add_argument(
        "--memory",
        type=number_option,
        metavar="GB",
        help="choose offload and tiles so that the run fits on a card of this size, such as 8, 12 or 16",
    )


@dataclass(frozen=True)
class ModelChoices:
    """Which model and upscaler to load, and how.

    Attributes:
        model: Folder of a diffusers pipeline, or a single file; None: the embedded model.
        family: Name of the model's family; None: the folder tells.
        upscaler: An ESRGAN-type file or "lanczos"; None: the embedded model's own, Lanczos for a folder.
        device: "auto" or a torch device.
        dtype: "auto" or a dtype name, for all parts.
        offload: "model" keeps parts on the CPU while they are idle, "layers" every layer; None: neither.
        loras: LoRA weights to put on the model, in this order.
        upscaler_dtype: "auto" or a dtype name.
        upscaler_tile: Largest side in input pixels that the upscaler is given at once; None: the whole image.
        force: Run although the forecast says that memory will not do.
        config: For a single file: the diffusers folder that describes it; None: one of its name beside it.
        vae_tile: Largest side in pixels of an image that the VAE works on at once; None: the whole image.
    """

    model: str | None = None
    family: str | None = None
    upscaler: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    offload: Offload | None = None
    loras: tuple[LoraChoice, ...] = ()
    upscaler_dtype: str = "auto"
    upscaler_tile: int | None = None
    force: bool = False
    config: str | None = None
    vae_tile: int | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ModelChoices:
        """Take the choices from parsed arguments.

        Args:
            args: What a parser with `model_options` returned.

        Returns:
            The choices.
        """
        return cls(
            args.model,
            args.family,
            args.upscaler,
            args.device,
            args.dtype,
            args.offload,
            tuple(args.lora),
            args.upscaler_dtype,
            args.upscaler_tile,
            args.force,
            args.model_config,
        )

    def on_any_machine(self) -> ModelChoices:
        """The same files by paths that hold on every machine that has them.

        Returns:
            The choices.
        """

        def whole(path: str | None) -> str | None:
            return str(Path(path).resolve()) if path is not None and Path(path).exists() else path

        loras = tuple(replace(each, file=each.file.resolve()) for each in self.loras)
        return replace(
            self, model=whole(self.model), config=whole(self.config), upscaler=whole(self.upscaler), loras=loras
        )


# --- what comes out ----------------------------------------------------------------------------


def output_options() -> Parser:
    """Make the options of what a command writes and shows.

    Returns:
        A parser for argparse's `parents=`, whose results `OutputChoices.from_args` reads.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("the output")
    group.add_argument(
        "--out", type=path_option, default=Path("out"), metavar="DIR", help="folder for the results (default out)"
    )
    group.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bar on standard error (default: only on a terminal)",
    )
    return parser


@dataclass(frozen=True)
class OutputChoices:
    """Where results go and how they are shown.

    Attributes:
        folder: Where files are written; it is made if it is missing.
        progress: Whether to show a progress bar; None: only on a terminal.
    """

    folder: Path
    progress: bool | None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> OutputChoices:
        """Take the choices from parsed arguments.

        Args:
            args: What a parser with `output_options` and `common_options` returned.

        Returns:
            The choices.
        """
        return cls(args.out, args.progress)
