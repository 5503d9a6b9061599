"""Every option of a plan, defined once: its type, its range, its words.

`PlanOptions` types the keywords of `make_plan`; `OPTIONS` is the same table as values, for whatever checks options or
shows them to a user: the command line, MrFlow, node editors. A new option is one field here and one place that uses it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypedDict, cast, get_args, get_origin, get_type_hints

from mrflow_sched._runtime.errors import MrFlowError, quoted, shown
from mrflow_sched.plan.checks import (
    MAX_FACTOR,
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_SIDE,
    MAX_STAGES,
    MAX_STEPS,
    MIN_FACTOR,
    Noise,
    Posterior,
    Precision,
    SeedRule,
    TilePositions,
    UpscalerKind,
    checked_interval,
    is_number,
    plain,
)
from mrflow_sched.plan.schedule import MAX_MU
from mrflow_sched.plan.solver_table import SOLVER_NAMES
from mrflow_sched.plan.token_shares import JitMethod

__all__ = ["OPTIONS", "CallOptions", "NativeOptions", "Option", "PlanOptions", "StagedOptions", "check_options"]

Kind = Literal["whole", "number", "text", "flag", "interval", "numbers"]
Applies = Literal["staged", "native", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of a plan.

    `name`, `kind`, `per_stage`, `applies` and the choices of a Literal are filled in from the field that it annotates.

    Attributes:
        help: One line for a user.
        low: The smallest number allowed; None: no limit.
        high: The largest number allowed.
        open_range: The two ends themselves are not allowed.
        choices: The words it takes (beside numbers, where `kind` says so).
        default: Its value where it is left out; None: the family and its preset decide.
        metavar: Stands for the value in a usage line.
        advice: Ends the sentence that refuses a value.
        name: Its name as a keyword.
        kind: "whole", "number", "text", "flag", "interval" (two numbers) or "numbers" (several).
        per_stage: It takes one value, or one per later stage.
        applies: Whether staged plans, native plans or both take it.
    """

    help: str
    low: float | None = None
    high: float | None = None
    open_range: bool = False
    choices: tuple[str, ...] = ()
    default: Any = None
    metavar: str | None = None
    advice: str = ""
    name: str = ""
    kind: Kind = "text"
    per_stage: bool = False
    applies: Applies = "both"

    def checked(self, value: object) -> Any:
        """A value of this option's type and range.

        Args:
            value: The value that came; several where `per_stage` allows it.

        Returns:
            The same value; what other libraries have for numbers and lists as Python's own.

        Raises:
            MrFlowError: The value is not allowed; the sentence says what is.
        """
        made = plain(value)
        self._check(made)
        return made

    def _check(self, value: object) -> None:
        if self.kind in ("interval", "numbers"):
            self._check_list(value)
        elif self.per_stage and isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            for each in cast("Sequence[object]", value):
                self._check_one(each)
        else:
            self._check_one(value)

    def _check_list(self, value: object) -> None:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise MrFlowError(f"{self.name} must be a list of numbers, got {quoted(value)}{self._end}")
        if self.kind == "interval":
            checked_interval(cast("tuple[float, float]", value))
        elif self.low is not None:
            for each in cast("Sequence[object]", value):
                self._check_one(each)

    def _check_one(self, value: object) -> None:
        if isinstance(value, str) and value in self.choices:
            return
        right: Mapping[str, bool] = {
            "whole": isinstance(value, int) and not isinstance(value, bool),
            "number": is_number(value),
            "numbers": is_number(value),
            "text": isinstance(value, str) and not self.choices,
            "flag": isinstance(value, bool),
        }
        if not right[self.kind] or not self._in_range(value):
            raise MrFlowError(f"{self.name} must {self._allowed}, got {quoted(value)}{self._end}")

    def _in_range(self, value: Any) -> bool:
        if self.low is None or self.high is None:
            return True
        return self.low < value < self.high if self.open_range else self.low <= value <= self.high

    @property
    def _allowed(self) -> str:
        words = " or ".join(map(repr, self.choices))
        if self.kind == "text" and len(self.choices) > 2:
            return f"be one of {', '.join(self.choices)}"
        if self.kind == "text":
            return f"be {words or 'text'}"
        if self.kind == "flag":
            return "be True or False"
        ends = f"{_written(self.low)} and {_written(self.high)}" if self.open_range else ""
        count = "whole number" if self.kind == "whole" else "number"
        numbers = f"lie between {ends}" if ends else f"be a {count} from {_written(self.low)} to {_written(self.high)}"
        return f"be {words} or {numbers.removeprefix('be ')}" if words else numbers

    @property
    def _end(self) -> str:
        return f"; {self.advice}." if self.advice else "."


def _written(value: float | None) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


# ----------------------------------------------------------------------------------------------------------- the table


class _WalkOptions(TypedDict, total=False):
    """Options of every plan that go by these names wherever one is made."""

    solver: Annotated[
        str | None,
        Option(
            help=f"solver of all stages ({', '.join(SOLVER_NAMES)}); default: the family's",
            choices=SOLVER_NAMES,
            metavar="NAME",
        ),
    ]
    mu: Annotated[
        float | None,
        Option(
            help="shift of the first stage, as log(shift)",
            low=-MAX_MU,
            high=MAX_MU,
            advice="it is log(shift)",
        ),
    ]
    seed_rule: Annotated[
        SeedRule,
        Option(help="how the seeds of stages and of the images of a batch differ", default="offset"),
    ]
    posterior: Annotated[
        Posterior,
        Option(help="what to take from the VAE encoder's distribution", default="mode"),
    ]
    renoise: Annotated[
        float | None,
        Option(
            help="share of the noise that stage 1 draws anew after each step, as samplers of distilled models do: 1 is "
            "LCM, 0.3 is TCD; default: as the model's own sampler",
            low=0,
            high=1,
            metavar="SHARE",
            advice="0 draws none",
        ),
    ]
    precision: Annotated[
        Precision,
        Option(
            help="precision of the network's weights, by torchao, in a copy beside it; own: as the model was loaded",
            default="own",
            metavar="NAME",
        ),
    ]


class _SharedOptions(_WalkOptions, total=False):
    """Options of every plan."""

    sigmas: Annotated[
        Sequence[float] | None,
        Option(
            help="all sigmas of the first stage, from 1 to 0; nothing shifts them",
            low=0,
            high=1,
            metavar="S",
            advice="it is the fraction of noise",
        ),
    ]
    guidance: Annotated[
        float | None,
        Option(help="guidance of the first stage; 1 turns CFG off", low=0, high=MAX_GUIDANCE, metavar="G"),
    ]
    seed: Annotated[int, Option(help="seed of the first image's noise", low=0, high=MAX_SEED, default=0, metavar="N")]


class NativeOptions(_SharedOptions, total=False):
    """Keywords of `make_native_plan`."""

    steps: Annotated[int | None, Option(help="steps of native sampling", low=1, high=MAX_STEPS, metavar="N")]


class CallOptions(_WalkOptions, total=False):
    """Keywords of a plan that `MrFlow` takes by these names; guidance and seed have the pipeline's names there."""

    factor: Annotated[
        float | None,
        Option(
            help=f"size step between stages, {MIN_FACTOR} to {MAX_FACTOR:g}",
            low=MIN_FACTOR,
            high=MAX_FACTOR,
            metavar="F",
            advice="for a larger step use more stages",
        ),
    ]
    factors: Annotated[
        Sequence[float] | None,
        Option(
            help="a size step for each handoff, instead of one for all and a number of stages",
            low=MIN_FACTOR,
            high=MAX_FACTOR,
            metavar="F",
            advice="for a larger step use more stages",
        ),
    ]
    stages: Annotated[
        int | None,
        Option(
            help=f"number of stages, 2 to {MAX_STAGES}",
            low=2,
            high=MAX_STAGES,
            metavar="N",
            advice="one stage is native sampling: native=True in a plan, or the pipeline itself",
        ),
    ]
    low_steps: Annotated[int | None, Option(help="steps of the first stage", low=1, high=MAX_STEPS, metavar="N")]
    refine_steps: Annotated[
        int | Sequence[int] | None,
        Option(
            help="steps of every later stage; 0 keeps the upscaler's image",
            low=0,
            high=MAX_STEPS,
            metavar="N",
        ),
    ]
    sigma: Annotated[
        float | Sequence[float] | None,
        Option(
            help="fraction of noise at which refining starts, 0 < S < 1",
            low=0,
            high=1,
            open_range=True,
            metavar="S",
            advice="it is the noise fraction, usually 0.12",
        ),
    ]
    refine_curve: Annotated[Literal["linear", "shifted"], Option(help="spacing of the refine sigmas", default="linear")]
    noise: Annotated[
        Noise,
        Option(
            help="what stage 1 starts from: noise of its own size (own), or the final size's noise, shrunk (nested), "
            "which keeps the layout of the native image of that seed",
            default="own",
        ),
    ]
    shift_tokens: Annotated[
        Literal["low", "final"] | int,
        Option(
            help="token count that sets mu of the first stage: its own (low), the final size's, or a number",
            low=1,
            high=2**31,
            default="low",
            metavar="low|final|N",
        ),
    ]
    refine_guidance: Annotated[
        float | None,
        Option(help="guidance of every later stage", low=0, high=MAX_GUIDANCE, metavar="G"),
    ]
    refine_precision: Annotated[
        Precision | None, Option(help="precision of the later stages; default: as `precision`", metavar="NAME")
    ]
    guidance_interval: Annotated[
        tuple[float, float] | None,
        Option(help="range of sigma in which CFG is applied in stage 1", low=0, high=1, metavar="LOW-HIGH"),
    ]
    tile: Annotated[
        int,
        Option(
            help="side of the network's tiles in later stages that are larger; 0: no tiles",
            low=0,
            high=MAX_SIDE,
            default=0,
            metavar="PIXELS",
        ),
    ]
    tile_positions: Annotated[
        TilePositions,
        Option(
            help="which positions a tile's tokens have: those in the whole image, or as if the tile were an image",
            default="whole",
        ),
    ]
    refine_tokens: Annotated[
        float | Sequence[float],
        Option(
            help="share of the image tokens on which later stages run the network: those with most fine detail; the "
            "rest stays as the upscaler made it",
            low=0.01,
            high=1,
            default=1.0,
            metavar="SHARE",
            advice="1 refines the whole image",
        ),
    ]
    refine_context: Annotated[
        float,
        Option(
            help="share of further tokens that the network sees beside those of refine_tokens",
            low=0,
            high=0.5,
            default=0.0,
            metavar="SHARE",
        ),
    ]


class StagedOptions(CallOptions, _SharedOptions, total=False):
    """Keywords that a staged plan takes."""

    method: Annotated[
        JitMethod | None,
        Option(
            help="sample in one stage at the final size on a growing share of the tokens (Just-in-Time), with that "
            "method's own steps; default: staged",
            metavar="NAME",
        ),
    ]
    native: Annotated[bool, Option(help="plan plain sampling at the final size, in one stage", default=False)]
    upscaler_kind: Annotated[
        UpscalerKind,
        Option(
            help="what upscales the image: a network, or interpolation such as Lanczos, for which the presets refine "
            "more, in 2 steps from sigma 0.45",
            default="network",
        ),
    ]


class MadeOptions(NativeOptions, StagedOptions, total=False):
    """Keywords of `make_plan`, without `preset`, which is an argument of its own there."""


class PlanOptions(MadeOptions, total=False):
    """All that decides a plan besides its family and size: `make_plan(family, width, height, **options)`."""

    preset: Annotated[
        str | None,
        Option(
            help="fast, balanced, best, text (for lettering), or any low-size steps + full-size steps such as 10+1; "
            "`mrflow families` lists what each is for",
            metavar="NAME",
        ),
    ]


def _read_options() -> Mapping[str, Option]:
    """The table of `PlanOptions`, `preset` first."""
    native, staged = (frozenset(get_type_hints(each)) for each in (NativeOptions, StagedOptions))
    made: dict[str, Option] = {}
    for name, hint in get_type_hints(PlanOptions, include_extras=True).items():
        kind, option = get_args(hint)
        applies: Applies = "both" if name == "native" or name in native & staged else "staged"
        if name in native - staged:
            applies = "native"
        made[name] = replace(option, name=name, applies=applies, **_facts(kind, option))
    return MappingProxyType({"preset": made.pop("preset"), **made})


def _facts(hint: Any, option: Option) -> dict[str, Any]:
    """`kind`, `per_stage` and `choices` of a field of this type."""
    parts = (hint,) if get_origin(hint) in (Literal, Sequence, tuple) else get_args(hint) or (hint,)
    origins = [get_origin(part) for part in parts]
    words = tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))
    names: Mapping[Any, Kind] = {int: "whole", float: "number", bool: "flag", str: "text"}
    plain: list[Kind] = [names[part] for part in parts if part in names]
    kind: Kind = plain[0] if plain else "text"
    if not plain and tuple in origins:
        kind = "interval"
    elif not plain and Sequence in origins:
        kind = "numbers"
    listed = bool(plain) and Sequence in origins
    return {"kind": kind, "per_stage": listed, "choices": words or option.choices}


OPTIONS: Mapping[str, Option] = _read_options()
"""Every option of a plan by name, `preset` first."""


# ------------------------------------------------------------------------------------------------------------ checking


def check_options(options: Mapping[str, Any], function: str = "make_plan") -> dict[str, Any]:
    """The options that are given, each of its type and in its range.

    Args:
        options: Name and value; None is the same as leaving an option out.
        function: The name of what takes them, for the refusal.

    Returns:
        The options without those that are None.

    Raises:
        MrFlowError: A name is not in `OPTIONS`, or a value is out of range.
    """
    given: dict[str, Any] = {}
    for name, value in options.items():
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(OPTIONS)}."
            raise MrFlowError(f"{shown(name)} is no option of {function}; {hint}")
        if value is not None:
            given[name] = OPTIONS[name].checked(value)
    return given
