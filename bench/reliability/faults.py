"""Faults injected into a run: NaN of each part, every spelling of full memory, bad upscalers, raising callbacks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from bench.reliability.injected import LOW_STEPS, bad_upscalers, memory_errors
from bench.reliability.runner import (
    LOST,
    MIB,
    OWNER,
    SILENT,
    WRONG,
    Bench,
    Case,
    Outcome,
    Tally,
    common_faults,
)

TITLE = "faults injected into a run"
_NEED = 200 * MIB
_LAST = LOW_STEPS + 1
"""The network's call in the refine step."""

_OWNERS = {
    "text": r"text",
    "network": r"network|transformer|stage \d|sampl",
    "decode": r"VAE|decod",
    "encode": r"VAE|encod",
    "upscaler": r"upscal",
}
"""Words of which one has to be in the sentence on a part's fault."""
_BLAMED = re.compile(r"the upscaler .{0,80}(gave|failed|is not|holds)|another (file|upscaler)")
"""A sentence that names the upscaler as the one at fault."""

_PLACES = (
    ("text", 1),
    ("network", 1),
    ("network", _LAST),
    ("decode", 1),
    ("decode", 2),
    ("encode", 1),
    ("upscaler", 1),
)


def _came_before(part: str, call: int) -> bool:
    """Whether stage 1 had given an image before the part failed."""
    return (part, call) not in (("text", 1), ("network", 1), ("decode", 1))


def judge_command(outcome: Outcome, part: str, call: int, fault: str, out: Path) -> list[str]:
    """What is wrong with a run of the command line that had a fault."""
    kinds: list[str] = []
    files = sorted(out.glob("*.png")) if out.is_dir() else []
    if outcome.value not in (0, 2):
        kinds.append(WRONG)
    if not files and _came_before(part, call):
        kinds.append(LOST)
    if any(_is_flat(file) and "unfinished" not in file.name for file in files):
        kinds.append(SILENT)
    spoiled = fault not in memory_errors()
    if spoiled and not (files and outcome.value == 0 and fault == "huge"):
        told = outcome.text
        if not re.search(_OWNERS[part], told, re.IGNORECASE) or (part != "upscaler" and _BLAMED.search(told)):
            kinds.append(OWNER)
    elif not spoiled and outcome.value == 2 and "memory" not in outcome.text:
        kinds.append(OWNER)
    return kinds


def _is_flat(path: Path) -> bool:
    with Image.open(path) as image:
        return all(low == high for low, high in image.convert("RGB").getextrema())  # pyright: ignore[reportGeneralTypeIssues]


def judge_result(outcome: Outcome) -> list[str]:
    """What is wrong with a run from Python that had a fault: an image without content that nobody calls unfinished."""
    if outcome.value is None:
        return []
    value = outcome.value
    return [SILENT] if value["flat"] and not (value["unfinished"] and value["warnings"]) else []


def judge_callback(outcome: Outcome, error: str) -> list[str]:
    """A callback's own error has to reach its caller as it was."""
    return [] if outcome.error == error else [OWNER]


def _commands(bench: Bench) -> Iterator[tuple[str, int, str]]:
    for fault in ("NaN", "infinity", "one NaN"):
        for part, call in _PLACES:
            yield part, call, fault
    yield "upscaler", 1, "failure"
    for fault in memory_errors():
        every = fault in ("CUDA", "MemoryError") and not bench.quick
        for part, call in _PLACES if every else (("decode", 2), ("encode", 1), ("upscaler", 1), ("network", _LAST)):
            yield part, call, fault


def run(bench: Bench) -> Tally:
    """Try every fault through the command line and from Python."""
    tally = Tally()
    step = 5 if bench.quick else 1
    for number, (part, call, fault) in enumerate(list(_commands(bench))[::step]):
        out = bench.folder / f"fault-{number}"
        arguments = {"part": part, "call": call, "fault": fault, "out": str(out), "more": []}
        case = Case(f"{fault} at {part} {call}", "injected.command", arguments, _NEED)
        outcome = bench.one(case)
        tally.add(
            case.name, common_faults(case, outcome) + judge_command(outcome, part, call, fault, out), outcome.text
        )
    for fault in ("NaN", "infinity"):
        for part, call in [place for place in _PLACES if place[0] != "upscaler"][::step]:
            case = Case(
                f"MrFlow: {fault} at {part} {call}",
                "injected.pipeline",
                {"part": part, "call": call, "fault": fault},
                _NEED,
            )
            outcome = bench.one(case)
            tally.add(case.name, common_faults(case, outcome) + judge_result(outcome), outcome.said)
    for name in list(bad_upscalers())[::step]:
        case = Case(f"own upscaler: {name}", "injected.upscaler", {"name": name}, _NEED)
        outcome = bench.one(case)
        lost = [LOST] if name == "ZeroDivisionError" and outcome.value is None else []
        tally.add(case.name, common_faults(case, outcome) + lost + judge_result(outcome), outcome.said)
    for error in ("ValueError", "KeyError", "MemoryError", "OutOfMemoryError", "RuntimeError")[::step]:
        for at in (1, 3, 5, 8):
            case = Case(f"callback raises {error} at call {at}", "injected.callback", {"at": at, "error": error}, _NEED)
            outcome = bench.one(case)
            tally.add(case.name, judge_callback(outcome, error), outcome.text)
    blamed = bench.one(Case("blames the upscaler", "injected.bad_blame", {}))
    black = bench.one(Case("black image", "injected.bad_black", {}))
    nothing = bench.folder / "nothing"
    tally.checked = judge_command(blamed, "network", _LAST, "NaN", nothing) == [LOST, OWNER] and judge_result(
        black
    ) == [SILENT]
    return tally
