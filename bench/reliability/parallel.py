"""Eight runs into one folder at once, with one seed: eight images have to be there."""

from __future__ import annotations

import sys

from bench.reliability.runner import LOST, MIB, Bench, Case, Tally, common_faults

TITLE = "8 parallel runs into one folder"
COPIES = 8


def _round(bench: Bench, name: str, subject: str) -> Tally:
    out, meeting = bench.folder / f"{name}-out", bench.folder / f"{name}-meeting"
    out.mkdir()
    meeting.mkdir()
    arguments = {"out": str(out), "meeting": str(meeting), "copies": COPIES}
    case = Case(name, subject, arguments, need=200 * MIB, copies=COPIES)
    tally = Tally()
    outcomes = bench.run(case)
    for number, outcome in enumerate(outcomes):
        tally.add(f"{name}, run {number}", common_faults(case, outcome), outcome.said)
    missing = COPIES - len(list(out.glob("*.png")))
    if missing:
        tally.wrong[LOST] = missing
        tally.examples.append(f"{name}: {COPIES - missing} of {COPIES} files")
        print(f"  {tally.examples[-1]}", file=sys.stderr)
    return tally


def run(bench: Bench) -> Tally:
    """Some rounds of eight runs."""
    whole = Tally()
    for number in range(1 if bench.quick else 4):
        found = _round(bench, f"round-{number}", "injected.together")
        whole.tried += found.tried
        whole.examples += found.examples
        for kind, count in found.wrong.items():
            whole.wrong[kind] = whole.wrong.get(kind, 0) + count
    whole.checked = LOST in _round(bench, "known-bad", "injected.bad_together").wrong
    return whole
