"""Wild inputs for all that takes numbers, and the judge of what comes of them.

A `Case` is a hypothesis strategy and the function that its values are given to. `judge` calls it: the only right ends
are a result, or an `MrFlowError` with one short sentence, both soon. A function of a case also reads back what it made,
and raises AssertionError where that is not the same.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.webui import infotext
from mrflow_sched.apps.webui.controls import CHOICES, FIELDS, LIMITS, Controls
from mrflow_sched.images.record import RunRecord
from mrflow_sched.measure.calibrate import Calibration, SweepRow
from mrflow_sched.plan import cost, schedule
from mrflow_sched.plan.families import FAMILIES, get_family
from mrflow_sched.plan.make import make_native_plan, make_plan, make_sized_plan
from mrflow_sched.plan.options import OPTIONS, Option
from mrflow_sched.plan.recipes import sigmas_from_recipe
from mrflow_sched.plan.sizes import fit_box
from mrflow_sched.plan.stages import Stage, StagedPlan

LONGEST_SENTENCE = 600
"""Characters of a refusal: the longest one lists all families, and quotes one value."""
LONGEST_WAIT = 3.0
"""Seconds of processor time that one input may take."""

End = Literal["accepted", "refused"]


@dataclass(frozen=True)
class Case:
    """One way in.

    Attributes:
        inputs: What comes in.
        call: Takes a value of `inputs`, uses what it gets and checks that it can be written and read back.
    """

    inputs: SearchStrategy[Any]
    call: Callable[[Any], object]


def judge(case: Case, value: Any) -> End:
    """Give one input to a case.

    Args:
        case: The way in.
        value: What `case.inputs` gave.

    Returns:
        "accepted", or "refused" in a sentence.

    Raises:
        AssertionError: The refusal is no short sentence, or the answer took too long. What else the call raises is a
            fault too, and passes through.
    """
    started = time.process_time()
    end: End = "accepted"
    try:
        case.call(value)
    except MrFlowError as error:
        sentence, end = str(error), "refused"
        assert 0 < len(sentence) <= LONGEST_SENTENCE, f"a sentence of {len(sentence)} characters: {sentence[:200]}"
        assert sentence.isprintable(), f"a sentence with control characters: {sentence!r}"
    assert time.process_time() - started <= LONGEST_WAIT, "it took too long"
    return end


# ------------------------------------------------------------------------------------------------------------ values


def _nested(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


_NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3.5, -0.0, 2.0**31, 10**9, 10**30, 10**400, -(10**400), 10**5000, 2**63, 2**64),
    *(float("nan"), float("inf"), float("-inf"), 1e-320, 5e-324, 1e308, 0.1 + 0.2, 1 - 1e-17, 1 + 1e-16),
)
_TYPES: tuple[Any, ...] = (
    *(None, True, False, b"x", complex(1, 1), Decimal("0.5"), Fraction(1, 2), object(), int, [], {}, (), set[int]()),
    *([1], [[1]], (0.1, 0.9), (float("nan"),) * 2, {"a": 1}, _nested(2000), [10**400], range(3), np.array([1.0, 0.0])),
    *(np.int64(512), np.float64(0.5), np.float64("nan"), np.float32(0.5), np.bool_(True), np.array(3)),
)
_WORDS: tuple[Any, ...] = (
    *("", " ", "12+1", "fast", "best", "BEST", "euler", "low", "linear", "1024", "0.12", "nan", "1e400", "9" * 5000),
    *("a" * 5000, "\x1b[31mred", "two\nlines", "\x00", "\ud800", "١٢+١", "１２", "0+0", "999999+1", "12+1\n", "1_0"),
)
WILD: SearchStrategy[Any] = (
    st.sampled_from(_NUMBERS)
    | st.sampled_from(_TYPES)
    | st.sampled_from(_WORDS)
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
)
"""What a careless or hostile caller gives for anything."""


def mostly(good: SearchStrategy[Any], wild: SearchStrategy[Any] = WILD) -> SearchStrategy[Any]:
    """Good values, and a wild one in eight.

    Args:
        good: Values that are allowed.
        wild: The others.

    Returns:
        The mixture.
    """
    return st.integers(0, 7).flatmap(lambda number: wild if number == 7 else good)


SIDES = st.integers(1, 4096) | st.sampled_from((1, 8, 16, 64, 512, 1000, 1024, 32768, 32769))
FAMILY_NAMES = st.sampled_from(tuple(FAMILIES))


def _good_option(option: Option) -> SearchStrategy[Any]:
    low, high = option.low or 0, option.high if option.high is not None else 1
    number = st.floats(float(low), float(high))
    whole = st.integers(int(low), int(high)) | st.integers(int(low), int(min(high, low + 30)))
    one: Mapping[str, SearchStrategy[Any]] = {
        "whole": whole,
        "number": number,
        "numbers": st.lists(number, max_size=9),
        "interval": st.tuples(number, number).map(lambda two: tuple(sorted(two))),
        "flag": st.booleans(),
        "text": st.sampled_from(option.choices or ("12+1", "fast", "best", "text", "10+1", "8+1+2", "1000+1000")),
    }
    found = one[option.kind]
    if option.choices and option.kind != "text":
        found |= st.sampled_from(option.choices)
    return found | st.lists(found, max_size=3) if option.per_stage else found


@st.composite
def plan_keywords(draw: st.DrawFn) -> dict[str, Any]:
    """Keywords of `make_plan`, most of them allowed.

    Args:
        draw: Given by hypothesis.

    Returns:
        Name and value of up to five options.
    """
    names = draw(st.lists(st.sampled_from(tuple(OPTIONS)), max_size=5, unique=True))
    found = {name: draw(mostly(_good_option(OPTIONS[name]))) for name in names}
    if draw(st.integers(0, 40)) == 0:
        found[draw(st.sampled_from(("low_step", "", "x" * 5000, "\x1b")))] = draw(WILD)
    return found


_ARGUMENTS = st.tuples(
    mostly(FAMILY_NAMES), mostly(SIDES, WILD | st.integers(1, 40000)), mostly(SIDES), plan_keywords()
)


def use(plan: StagedPlan) -> StagedPlan:
    """Ask a plan for all that it can say, and read it back.

    Args:
        plan: The plan.

    Returns:
        The same plan.
    """
    line, text = plan.to_string(), plan.to_json()
    assert line.isprintable(), "the plan's line has control characters"
    assert StagedPlan.from_string(line) == plan, "the line does not come back as it was"
    assert StagedPlan.from_json(text) == plan, "the JSON does not come back as it was"
    parts, peak = cost.part_costs(plan), cost.peak_memory(plan)
    for value in (plan.cost_ratio, cost.work_ratio(plan), *(part.flop for part in parts or ()), *plan.stage_costs()):
        assert 0 <= value < float("inf"), f"a cost of {value!r}"
    assert peak is None or 0 < peak.total < float("inf")
    assert all(note.isprintable() for note in plan.notes)
    return plan


def _make(value: tuple[Any, Any, Any, dict[str, Any]]) -> StagedPlan:
    family, width, height, options = value
    return use(make_plan(family, width, height, **options))


def _make_native(value: tuple[Any, Any, Any, dict[str, Any]]) -> StagedPlan:
    family, width, height, options = value
    return use(make_native_plan(family, width, height, **options))


def _make_sized(value: tuple[str, Any, Any, dict[str, Any]]) -> StagedPlan:
    name, sizes, requested, options = value
    return use(make_sized_plan(FAMILIES[name], sizes, requested, **options))


_PAIRS = st.tuples(SIDES, SIDES)
_SIZED = st.tuples(
    FAMILY_NAMES,
    mostly(st.lists(mostly(_PAIRS, WILD | st.tuples(WILD, WILD)), min_size=2, max_size=4)),
    mostly(_PAIRS),
    plan_keywords(),
)


# ---------------------------------------------------------------------------------------------------- plans as values


def _some_plans() -> tuple[StagedPlan, ...]:
    return (
        make_plan("flux1-dev", 1024, 1024),
        make_plan("qwen-image", 1328, 800, "text", seed=7, refine_steps=3, refine_curve="shifted"),
        make_plan("sdxl", 2048, 2048, guidance_interval=(0.2, 0.9), tile=512),
        make_plan("chroma", 1024, 768, stages=3, sigma=(0.3, 0.12)),
        make_plan("flux2-klein", 1024, 1024, refine_steps=0),
        make_plan("demo", 256, 256, sigmas=(1, 0.8, 0.5)),
        make_native_plan("z-image", 1024, 1024, steps=20),
        make_plan("auraflow", 1000, 1000, shift_tokens="final", seed_rule="hash", posterior="sample"),
    )


PLANS: tuple[StagedPlan, ...] = _some_plans()
"""Plans of every kind of schedule, which are then spoiled."""

_STAGE_FIELDS = tuple(Stage.__dataclass_fields__)
_PLAN_FIELDS = tuple(StagedPlan.__dataclass_fields__)


def _changed(fields: Mapping[str, Any], names: tuple[str, ...]) -> SearchStrategy[dict[str, Any]]:
    changes = st.dictionaries(st.sampled_from(names), WILD, min_size=1, max_size=2)
    return changes.map(lambda change: {**fields, **change})


def _fields(value: Stage | StagedPlan, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


_STAGES = st.sampled_from([stage for plan in PLANS for stage in plan.stages]).flatmap(
    lambda stage: _changed(_fields(stage, _STAGE_FIELDS), _STAGE_FIELDS)
)
_STAGED = st.sampled_from(PLANS).flatmap(lambda plan: _changed(_fields(plan, _PLAN_FIELDS), _PLAN_FIELDS))


def _build_stage(fields: Mapping[str, Any]) -> StagedPlan:
    stage = Stage(**fields)
    first = replace_first(stage)
    return use(StagedPlan("mine", "mine", stage.width, stage.height, first))


def replace_first(stage: Stage) -> tuple[Stage, ...]:
    """A plan's stages with this one among them, first where it starts at 1 and second where it starts lower.

    Args:
        stage: The stage.

    Returns:
        One stage, or two.
    """
    return (stage,) if stage.start_sigma == 1.0 else (PLANS[0].stages[0], stage)


# -------------------------------------------------------------------------------------------------------- plans as text

_DIGITS = (
    *("0", "-1", "1", "99999999999999999999", "1e308", "nan", "inf", "-inf", "1_0", "１２", "", "9" * 400, "9" * 5000),
    *("0x10", "1e-400", " ", "1.0000000000000002", "1e-320", "1000", "1001", "32768", "200001"),
)
_RECIPES = ("native", "linear", "list", "none", "beta", "shifted", "scaled-linear", "zero-snr", "list 1.0 0.5 0.0")
_LETTERS = (*"\x00\x07\n\x1b #;=@-. \ud800\U0001f600", "list " + "0.5 " * 3000, "9" * 3000)


@st.composite
def spoiled(draw: st.DrawFn, texts: SearchStrategy[str]) -> str:
    """A text with up to four places changed: numbers, letters, parts between semicolons, words of a schedule.

    Args:
        draw: Given by hypothesis.
        texts: The texts to change.

    Returns:
        The text; of one with a checksum, most often without it.
    """
    text = draw(texts)
    if draw(st.integers(0, 4)):
        text = text.partition(";#")[0]
    for _ in range(draw(st.integers(1, 4))):
        kind, parts = draw(st.integers(0, 5)), text.split(";")
        place = draw(st.integers(0, len(text)))
        if kind <= 1 and (found := list(re.finditer(r"[0-9.]+", text))):
            number = draw(st.sampled_from(found))
            text = text[: number.start()] + draw(st.sampled_from(_DIGITS)) + text[number.end() :]
        elif kind == 2:
            text = text[:place] + draw(st.sampled_from(_LETTERS)) + text[place:]
        elif kind == 3:
            text = ";".join(
                draw(st.permutations(parts)) if draw(st.booleans()) else [*parts, draw(st.sampled_from(parts))]
            )
        elif kind == 4:
            text = text.replace(draw(st.sampled_from(_RECIPES)), draw(st.sampled_from(_RECIPES)))
        else:
            text = text[:place] + text[place + draw(st.integers(1, 20)) :]
    return text


_LINES = st.sampled_from([plan.to_string() for plan in PLANS])
_FIRST_LINE = "mrflow1;flux1-dev;12+1;1024x1024;seed 0 offset;mode tile 64;native 50 50;cost 512 1.5e-05;"
_FIRST_LINES = st.just(
    f"{_FIRST_LINE}512x512 1024t euler g3.5 f12 native 12 mu=0.63;1024x1024 4096t euler g3.5 f1 linear 1 start=0.12"
)

_DEEP = "[" * 100_000


@st.composite
def _spoiled_json(draw: st.DrawFn, values: SearchStrategy[Any]) -> str:
    """JSON of which some values became wild, or went missing."""

    def change(value: Any) -> Any:
        if draw(st.integers(0, 40)) == 0:
            return draw(
                st.sampled_from((None, True, -1, 1.5, float("nan"), float("inf"), 10**30, "", "x", [], {}, "9" * 30))
            )
        if isinstance(value, dict):
            return {key: change(each) for key, each in value.items() if draw(st.integers(0, 300))}
        if isinstance(value, list) and len(value) < 30:
            return [change(each) for each in value]
        return value

    text = json.dumps(change(draw(values)))
    if draw(st.integers(0, 5)) == 0:
        text = re.sub(r"\b[0-9]+\b", lambda _: "9" * 5000, text, count=draw(st.integers(1, 3)))
    return _DEEP if draw(st.integers(0, 50)) == 0 else text


_CALIBRATION = Calibration(
    *("flux1-dev", "x2", 1024, 1024, 2.0, 4, 0.02, 0.01, 0.001, 0.124, 0.09, (SweepRow(0.12, 1, 0.2, 30.0),)),
    *((("euler", 20, 0.1), ("multistep", 12, 0.09)), 0.12, 12, 1),
)
_RECORD = RunRecord(
    *(PLANS[0].to_string(), "a star", None, 0, 1, 0, "embedded", "0" * 64, "x2", "0" * 64, "cpu", "float32", "float32"),
    *(2, {"torch": "2.7"}, False, {"vae": "float32"}),
)


def _read_calibration(text: str) -> object:
    found = Calibration.from_json(text)
    assert Calibration.from_json(found.to_json()) == found, "the calibration does not come back as it was"
    return use(make_plan(found.apply(get_family(found.family)), 1024, 1024))


def _read_record(text: str) -> object:
    found = RunRecord.from_json(text)
    assert RunRecord.from_json(found.to_json()) == found, "the record does not come back as it was"
    return use(StagedPlan.from_string(found.plan))


# ------------------------------------------------------------------------------------------------------------- the page


def _good_control(name: str) -> SearchStrategy[Any]:
    if name in LIMITS:
        low, high, step = LIMITS[name]
        return st.integers(int(low), int(high)) if step == 1 else st.floats(low, high)
    return st.sampled_from(CHOICES[name]) if name in CHOICES else st.booleans() | st.just("automatic")


@st.composite
def _controls(draw: st.DrawFn) -> object:
    names = draw(st.lists(st.sampled_from(FIELDS), unique=True, max_size=6))
    values: dict[Any, Any] = {name: draw(mostly(_good_control(name))) for name in names}
    if draw(st.integers(0, 30)) == 0:
        values[draw(st.sampled_from(("sgima", "", "x" * 5000, 3, None, "\x1b")))] = draw(WILD)
    return [values] if draw(st.booleans()) else [values.get(name) for name in FIELDS]


def _read_controls(value: Any) -> object:
    found = Controls.from_args(value)
    assert Controls.from_args([found.to_dict()]) == found
    return found


def _read_infotext(value: Mapping[str, Any]) -> object:
    found = infotext.read(value)
    return Controls.from_args([found.to_dict()])


_MAIN = st.sampled_from(("automatic 12+1 x2 v1", "12+1 x2 low=8 refine=2 sigma=0.15 v1", "best x1.5 experimental v1"))
_INFOTEXT = st.dictionaries(
    st.sampled_from(
        (infotext.KEY, "MrFlow steps", "MrFlow sigma", "MrFlow refine CFG", "MrFlow upscaler", "MrFlow shift")
    ),
    spoiled(_MAIN) | st.text(max_size=20) | st.sampled_from(_WORDS),
)


# -------------------------------------------------------------------------------------------------------- the formulas

_NEAR = st.floats(-30, 30) | st.floats(0, 1) | st.integers(-2, 1200)
_ANY = mostly(_NEAR)
_LISTS = mostly(
    st.lists(_ANY, max_size=5) | st.lists(st.floats(0, 1), max_size=5).map(lambda few: sorted(few, reverse=True))
)
_FORMULAS: Mapping[str, tuple[SearchStrategy[Any], ...]] = {
    "shift_sigma": (_ANY, _ANY),
    "unshift_sigma": (_ANY, _ANY),
    "mu_for_tokens": (_ANY,),
    "mu_flux2": (_ANY, _ANY),
    "stretch_to_terminal": (_LISTS, _ANY),
    "native_sigmas": (_ANY,),
    "beta_sigmas": (_ANY,),
    "scaled_linear_sigmas": (_ANY,),
    "refine_sigmas": (_ANY, _ANY),
    "validate_sigmas": (_LISTS,),
}
_KEYWORDS: Mapping[str, Mapping[str, SearchStrategy[Any]]] = {
    "mu_for_tokens": {"base_tokens": _ANY, "max_tokens": _ANY, "base_shift": _ANY, "max_shift": _ANY},
    "native_sigmas": {"mu": _ANY, "terminal": _ANY, "sigma_min": _ANY, "beta": _ANY},
    "beta_sigmas": {"mu": _ANY, "alpha": _ANY, "beta": _ANY},
    "refine_sigmas": {"curve": mostly(st.sampled_from(("linear", "shifted")))},
}


@st.composite
def _formulas(draw: st.DrawFn) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    name = draw(st.sampled_from(tuple(_FORMULAS)))
    more = {key: draw(value) for key, value in _KEYWORDS.get(name, {}).items() if draw(st.booleans())}
    return name, tuple(draw(each) for each in _FORMULAS[name]), more


def _compute(value: tuple[str, tuple[Any, ...], dict[str, Any]]) -> object:
    name, arguments, more = value
    found = getattr(schedule, name)(*arguments, **more)
    for number in found if isinstance(found, tuple) else (found,):
        assert abs(number) < float("inf"), f"{name} gave {number!r}"
    return found


_WORDS_OF_RECIPES = (*_RECIPES, "12", "1000", "1001", "-3", "mu=0.5", "mu=nan", "mu=25", "start=0.12", "terminal=0.02")
_GOOD_RECIPES = tuple(stage.recipe for plan in PLANS for stage in plan.stages)
_RECIPE_TEXTS = st.lists(
    st.sampled_from((*_WORDS_OF_RECIPES, "min=0", "1.0", "0.5", "0.0", "x", "=", "1_000", "mu=1e400")), max_size=6
).map(" ".join)


def _name(value: tuple[Any, Any]) -> object:
    return get_family(value[0]).get_preset(value[1])


def _predict(value: Mapping[str, Any]) -> object:
    return cost.Speeds.measured(PLANS[0], value).predict(PLANS[0])


_SECONDS = st.fixed_dictionaries({part.name: _ANY for part in cost.part_costs(PLANS[0]) or ()})

CASES: Mapping[str, Case] = {
    "make_plan": Case(_ARGUMENTS, _make),
    "make_native_plan": Case(_ARGUMENTS, _make_native),
    "make_sized_plan": Case(_SIZED, _make_sized),
    "Stage": Case(_STAGES, _build_stage),
    "StagedPlan": Case(_STAGED, lambda fields: use(StagedPlan(**fields))),
    "plan line": Case(mostly(spoiled(_LINES | _FIRST_LINES)), lambda text: use(StagedPlan.from_string(text))),
    "plan JSON": Case(
        mostly(_spoiled_json(st.sampled_from([plan.to_dict() for plan in PLANS]))),
        lambda text: use(StagedPlan.from_json(text)),
    ),
    "calibration": Case(mostly(_spoiled_json(st.just(json.loads(_CALIBRATION.to_json())))), _read_calibration),
    "record": Case(_spoiled_json(st.just(asdict(_RECORD))) | st.text(), _read_record),
    "controls": Case(mostly(_controls()), _read_controls),
    "infotext": Case(_INFOTEXT, _read_infotext),
    "schedules": Case(_formulas(), _compute),
    "recipes": Case(
        mostly(_RECIPE_TEXTS | spoiled(_RECIPE_TEXTS | st.sampled_from(_GOOD_RECIPES))), sigmas_from_recipe
    ),
    "names": Case(st.tuples(mostly(FAMILY_NAMES), WILD), _name),
    "fit_box": Case(st.tuples(*[mostly(SIDES)] * 4), lambda sides: fit_box(*sides)),
    "seconds": Case(_SECONDS, _predict),
}
"""Every way in by name."""
