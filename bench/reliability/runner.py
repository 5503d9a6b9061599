"""What all groups share: a case, how it ended, what is wrong with that, and the process that runs cases."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

MIB = 2**20
SLACK = 300 * MIB
"""Bytes that a case may take on top of twice its need: what libraries import late, and the tiny images of the runs."""

EXECUTED, MEMORY, TIME, TRACEBACK, CONTROL = "executed", "over memory", "over time", "traceback", "control characters"
LOST, OWNER, SILENT, ENDING, WRONG = "image lost", "wrong owner", "not told", "wrong ending", "wrong result"
KINDS = (EXECUTED, MEMORY, TIME, TRACEBACK, CONTROL, LOST, OWNER, SILENT, ENDING, WRONG)
"""What can be wrong, in the order of the table."""

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_EXAMPLES = 100
"""Wrong cases of a group that are told one by one."""
_LONGEST = 3000
"""Letters of a refusal from which on it is no sentence."""


@dataclass(frozen=True)
class Case:
    """A subject (a function that a child runs) with its arguments, and what it may cost.

    Attributes:
        name: For the report.
        subject: Name of the function, of `subjects` or with its module, as in "injected.command".
        arguments: Its keywords; JSON.
        need: Bytes that the input declares honestly; twice as much, and `SLACK`, is allowed.
        seconds: CPU seconds that are allowed.
        copies: Children that run the case at once.
        environment: Variables that are set in the child.
    """

    name: str
    subject: str
    arguments: Mapping[str, Any]
    need: int = 0
    seconds: float = 30.0
    copies: int = 1
    environment: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def limit(self) -> int:
        """Bytes above the baseline from which on the case is over memory."""
        return 2 * self.need + SLACK


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        code: Exit code; None where a signal ended it.
        signal: The signal.
        killed: "memory" or "time" where the watcher ended it.
        seconds: CPU seconds.
        peak: Most resident bytes above the baseline.
        text: Everything printed.
        executed: The mark of a payload was found.
        value: What the subject returned.
        error: Type of the exception that left the subject.
        refusal: That exception is a refusal, one sentence for the user.
        message: Its words.
    """

    code: int | None
    signal: int | None
    killed: str | None
    seconds: float
    peak: int
    text: str
    executed: bool = False
    value: Any = None
    error: str | None = None
    refusal: bool = False
    message: str = ""

    @property
    def said(self) -> str:
        """What a user would read: of a refusal its words, else all that was printed."""
        return self.message if self.refusal else self.text


def common_faults(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with how a case ended, whatever its group."""
    found: list[str] = []
    if outcome.executed:
        found.append(EXECUTED)
    if outcome.killed == "memory" or outcome.peak > case.limit:
        found.append(MEMORY)
    if outcome.killed == "time":
        found.append(TIME)
    untold = outcome.error is not None and (not outcome.refusal or len(outcome.message) > _LONGEST)
    if untold or "Traceback (most recent call last)" in outcome.said:
        found.append(TRACEBACK)
    if outcome.signal is not None and outcome.killed is None:
        found.append(ENDING)
    if _CONTROL.search(outcome.said):
        found.append(CONTROL)
    return found


@dataclass
class Tally:
    """What a group found.

    Attributes:
        tried: Cases.
        wrong: Kind -> cases with that kind of fault.
        examples: One line each, of the wrong cases.
        checked: Whether the group's known-bad subjects were counted as bad and its known-good one as good.
    """

    tried: int = 0
    wrong: dict[str, int] = field(default_factory=dict[str, int])
    examples: list[str] = field(default_factory=list[str])
    checked: bool = False

    def add(self, name: str, kinds: list[str], said: str = "", *, count: int = 1) -> None:
        """Count a case (or `count` of one kind) and keep it as an example where it is wrong."""
        self.tried += count
        for kind in dict.fromkeys(kinds):
            self.wrong[kind] = self.wrong.get(kind, 0) + count
        if kinds and len(self.examples) < _EXAMPLES:
            last = said.strip().splitlines()[-1] if said.strip() else ""
            self.examples.append(f"{name}: {', '.join(dict.fromkeys(kinds))} {last[:200]!a}")
            print(f"  {self.examples[-1]}", file=sys.stderr, flush=True)


class Bench:
    """The package that is tried, in a process of its own, and what groups need to try it.

    Attributes:
        folder: Scratch folder of the run, in which it runs: Python finds modules there.
        mark: The file that a payload writes when it is executed.
        random: The seeded generator of the group.
        quick: Fewer cases of the groups whose number is chosen.
        python: The interpreter that is tried.
        environment: Variables under which it runs.
        versions: What the worker says of its libraries.
    """

    def __init__(self, folder: Path, python: str, checkout: Path, seed: int, *, quick: bool) -> None:
        self.folder, self.python, self.quick = folder, python, quick
        self.mark = folder / "executed"
        self.random = random.Random(seed)
        packages = folder / "packages"  # the package that is tried beside this bench, without the rest of `bench`
        (packages / "bench").mkdir(parents=True)
        (packages / "bench" / "__init__.py").touch()
        (packages / "bench" / "reliability").symlink_to(ROOT / "bench" / "reliability")
        (packages / "mrflow_sched").symlink_to(checkout.resolve() / "mrflow_sched")
        home = folder / "home"
        home.mkdir()
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(packages),
            "HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        with (folder / "worker.log").open("w") as log:
            self._worker = subprocess.Popen(
                [python, "-m", "bench.reliability.worker"],
                cwd=folder,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.versions: dict[str, str] = self._answer()

    def _answer(self) -> Any:
        assert self._worker.stdout is not None
        line = self._worker.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended: {(self.folder / 'worker.log').read_text()[-2000:]}")
        return json.loads(line)

    def run(self, case: Case) -> list[Outcome]:
        """Run a case.

        Returns:
            The ending of each of its copies.
        """
        self.mark.unlink(missing_ok=True)
        message = {**dataclasses.asdict(case), "bytes": case.limit + 500 * MIB}
        assert self._worker.stdin is not None
        print(json.dumps(message), file=self._worker.stdin, flush=True)
        executed = self.mark.exists
        return [Outcome(**ended, executed=executed()) for ended in self._answer()]

    def one(self, case: Case) -> Outcome:
        """Run a case of one copy."""
        [outcome] = self.run(case)
        return outcome

    def close(self) -> None:
        """End the worker."""
        assert self._worker.stdin is not None
        self._worker.stdin.close()
        self._worker.wait(timeout=60)


def count(bench: Bench, cases: Iterator[Case]) -> Tally:
    """Run cases for which only the common faults count."""
    tally = Tally()
    for case in cases:
        outcome = bench.one(case)
        tally.add(case.name, common_faults(case, outcome), outcome.said)
    return tally


def found_bad(bench: Bench, *known: tuple[Case, str]) -> bool:
    """Whether each known-bad case is counted as bad, with that kind of fault."""
    return all(kind in common_faults(case, bench.one(case)) for case, kind in known)
