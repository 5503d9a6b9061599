"""Wild plans, plan strings, records, calibrations, controls and command lines: only refusals may come out."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from bench.reliability import inputs
from bench.reliability.runner import SLACK, Bench, Case, Tally, common_faults

TITLE = "wild plans, records, controls and command lines"

_COUNT = 3000
"""Inputs of each door."""
_CHUNK = 250
"""Inputs of one child."""

_WORDS = st.sampled_from(
    (
        *("plan", "--family", "flux1-dev", "demo", "sdxl", "--size", "1024x1024", "1x1", "99999x99999", "--preset"),
        *("12+1", "0+0", "1000+1000", "fast", "--low-steps", "--refine-steps", "--sigma", "--solver", "euler", "--mu"),
        *("--factor", "--factors", "--stages", "--refine-curve", "shifted", "--shift-tokens", "low", "--sigmas", "1,0"),
        *("--guidance", "--refine-guidance", "--seed", "--seed-rule", "--guidance-interval", "0.3-0.9", "--tile"),
        *("--posterior", "mode", "--calibration", "--native", "--steps", "--timings", "--json", "--out=--", "--", "0"),
        *(
            "--batch",
            "--image",
            "--strength",
            "--prompts",
            "--lora",
            "--from",
            "--format",
            "webp",
            "--upscaler",
            "lanczos",
        ),
        *(
            "--negative",
            "--refine-prompt",
            "--device",
            "cpu",
            "--dtype",
            "--offload",
            "--force",
            "--repeats",
            "a cat",
            ".",
        ),
        *("-1", "1e400", "9" * 500, "\x1b[31mred", "\n", "", "=", "--debug=1", "nan", "0.12", "None", "٣", "\udcff"),
    )
)
"""What a command line is made of."""
_NO_MODEL = ("--model", "no such folder")
_COMMANDS = st.sampled_from(
    (("plan",), ("families",), *((name, *_NO_MODEL) for name in ("generate", "compare", "calibrate")))
)
"""How it begins: none loads a model, since all else is checked before one is looked for."""
COMMAND_LINES = st.builds(
    lambda command, words: [*command, *words],
    _COMMANDS,
    st.lists(_WORDS | st.text(max_size=8).filter(lambda word: "\0" not in word), max_size=9),
)

DOORS: dict[str, st.SearchStrategy[Any]] = {
    **{
        name: inputs.CASES[name].inputs
        for name in ("make_plan", "make_native_plan", "plan line", "plan JSON", "calibration", "record", "controls")
    },
    "command line": COMMAND_LINES,
}
"""The ways in that every version has, with what comes in: function of `doors` -> values."""


def draw(strategy: st.SearchStrategy[Any], count: int, start: int) -> list[Any]:
    """The first `count` values of a strategy; the same for the same start."""
    found: list[Any] = []

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def _chunks(values: list[Any], folder: Path, door: str) -> Iterator[tuple[Path, int]]:
    for number, at in enumerate(range(0, len(values), _CHUNK)):
        path = folder / f"{door.replace(' ', '-')}-{number}.pickle"
        path.write_bytes(pickle.dumps(values[at : at + _CHUNK]))
        yield path, len(values[at : at + _CHUNK])


def run(bench: Bench) -> Tally:
    """Give every door its share of wild values."""
    tally = Tally()
    for door, strategy in DOORS.items():
        values = draw(strategy, _COUNT // 20 if bench.quick else _COUNT, bench.random.randrange(2**32))
        for path, count in _chunks([value for value in values if _picklable(value)], bench.folder, door):
            case = Case(f"{door}, {path.name}", "doors.try_all", {"door": door, "path": str(path)}, SLACK, seconds=240)
            outcome = bench.one(case)
            wrong: list[list[str]] = outcome.value or []
            tally.add(door, [], count=count - len(wrong))
            for kind, said in wrong:
                tally.add(door, [kind], said)
            if outcome.value is None:
                tally.add(case.name, common_faults(case, outcome), outcome.said)
    bad = bench.folder / "bad.pickle"
    bad.write_bytes(pickle.dumps([0]))
    found = bench.one(Case("divides by zero", "doors.try_all", {"door": "known bad", "path": str(bad)}))
    tally.checked = bool(found.value)
    return tally


def _picklable(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False  # objects without a type of their own, which some wild values are
    return True
