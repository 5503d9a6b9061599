"""The schedule and its workers: what fails is tried elsewhere, and nothing outlives the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from batch_makers import WordMaker

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.batch.items import Item, Unit
from mrflow_sched.batch.patience import LEAST, TIMES, Patience
from mrflow_sched.batch.pool import Event, HerePool, ProcessPool, devices_for
from mrflow_sched.batch.schedule import Outlet, in_order, run_units
from mrflow_sched.plan.make import make_plan

PLAN = make_plan("demo", 64, 64)


def unit(name: str, cost: float = 1.0, loras: tuple[str, ...] = ()) -> Unit:
    return Unit((Item(name, 1, PLAN, name, loras=loras),), (0,), "image", cost)


class Notes:
    """Takes what a schedule gives."""

    def __init__(self, more: dict[str, list[Unit]] | None = None, stop_after: int | None = None) -> None:
        self.more, self.stop_after = more or {}, stop_after
        self.done: list[tuple[str, Any, int]] = []
        self.aside: list[tuple[str, str, int]] = []
        self.said: list[str] = []
        self.sent: list[str] = []

    def outlet(self) -> Outlet:
        return Outlet(self.task, self.take, self.put_aside, self.stop, self.said.append)

    def task(self, unit: Unit) -> str:
        self.sent.append(unit.items[0].prompt)
        return unit.items[0].prompt

    def take(self, unit: Unit, value: Any, place: int, tries: int) -> Sequence[Unit]:
        self.done.append((unit.items[0].prompt, value, tries))
        return self.more.get(unit.items[0].prompt, [])

    def put_aside(self, unit: Unit, reason: str, tries: int) -> Sequence[Unit]:
        self.aside.append((unit.items[0].prompt, reason, tries))
        return []

    def stop(self) -> bool:
        return self.stop_after is not None and len(self.done) >= self.stop_after


class ScriptedPool:
    """Workers whose answers are given: (task, place) -> kind; "done" where nothing is."""

    def __init__(self, places: int, answers: dict[tuple[str, int], Any]) -> None:
        self.places, self.answers = places, answers
        self.events: list[Event] = []
        self.started: list[int] = []
        self.tasks: list[tuple[str, int]] = []

    def start(self, place: int) -> None:
        self.started.append(place)
        self.events.append(Event(place, "ready"))

    def send(self, place: int, task: Any) -> None:
        self.tasks.append((task, place))
        self.events.append(Event(place, self.answers.get((task, place), "done"), task, "it broke"))

    def wait(self, seconds: float) -> Sequence[Event]:
        found, self.events = self.events, []
        return found

    def close(self) -> None:
        self.events.clear()


@pytest.fixture
def pool() -> Iterator[ProcessPool]:
    made = ProcessPool(WordMaker(), ("cpu", "cpu"), 1)
    yield made
    made.close()
    assert made.pids() == ()


def test_the_dearest_comes_first_and_loras_stay_together() -> None:
    units = [unit("a", 1), unit("b", 5, ("x",)), unit("c", 3), unit("d", 9, ("x",)), unit("e", 2)]
    assert [each.items[0].prompt for each in in_order(units)] == ["d", "b", "c", "e", "a"]


def test_what_fails_is_tried_at_another_worker_first() -> None:
    pool = ScriptedPool(2, {("a", 0): "memory"})
    notes = Notes()
    run_units([unit("a", 9), unit("b"), unit("c")], pool, notes.outlet())
    assert [place for task, place in pool.tasks if task == "a"] == [0, 1]
    assert sorted(name for name, _, _ in notes.done) == ["a", "b", "c"]
    assert [tries for name, _, tries in notes.done if name == "a"] == [2]
    assert pool.started == [0, 1]  # a worker whose memory ran out goes on


def test_three_failures_set_a_unit_aside_and_no_other() -> None:
    pool = ScriptedPool(2, {("a", 0): "lost", ("a", 1): "lost"})
    notes = Notes()
    run_units([unit("a", 9), unit("b"), unit("c")], pool, notes.outlet())
    assert notes.aside == [("a", "3 workers failed on it; the last time it broke", 3)]
    assert sorted(name for name, _, _ in notes.done) == ["b", "c"]
    assert len(pool.started) == 5  # the two, and one for each that was lost


def test_a_refusal_is_not_tried_again() -> None:
    pool = ScriptedPool(2, {("a", 0): "refused"})
    notes = Notes()
    run_units([unit("a", 9), unit("b")], pool, notes.outlet())
    assert notes.aside == [("a", "it broke", 1)]


def test_a_retry_does_not_wait_for_a_worker_that_never_comes() -> None:
    pool = ScriptedPool(2, {("a", 0): "memory"})
    usual = pool.start
    pool.start = lambda place: usual(place) if place == 0 else None  # type: ignore[method-assign]
    notes = Notes()
    pool.answers = {}
    first = {"left": 1}

    def send(place: int, task: Any) -> None:
        kind = "memory" if first["left"] else "done"
        first["left"] = 0
        pool.events.append(Event(place, kind, task, "full"))

    pool.send = send  # type: ignore[method-assign]
    run_units([unit("a"), unit("b")], pool, notes.outlet())
    assert sorted(name for name, _, _ in notes.done) == ["a", "b"]


def test_what_follows_is_done_next() -> None:
    pool = ScriptedPool(1, {})
    notes = Notes({"a": [unit("a2"), unit("a3")]})
    run_units([unit("a", 9), unit("b")], pool, notes.outlet())
    assert notes.sent == ["a", "a2", "a3", "b"]


def test_a_stop_hands_nothing_out() -> None:
    pool = ScriptedPool(1, {})
    notes = Notes(stop_after=1)
    run_units([unit("a", 9), unit("b"), unit("c")], pool, notes.outlet())
    assert [name for name, _, _ in notes.done] == ["a"]


def test_in_this_process_errors_become_events() -> None:
    notes = Notes()
    units = [unit(word) for word in ("a", "memory", "refuse", "fail", "b")]
    run_units(units, HerePool(WordMaker(), None, lambda: False), notes.outlet())
    assert sorted(name for name, _, _ in notes.done) == ["a", "b"]
    reasons = {name: (reason, tries) for name, reason, tries in notes.aside}
    assert reasons["refuse"] == ("no such thing", 1)
    assert reasons["memory"] == ("3 workers failed on it; the last time memory ran out (not enough)", 3)
    assert "RuntimeError: a bug" in reasons["fail"][0]


def test_processes_that_die_are_replaced(pool: ProcessPool, tmp_path: Path) -> None:
    notes = Notes()
    words = [f"once die {tmp_path / 'one'}", "a", "b", "die", f"once fail {tmp_path / 'two'}"]
    run_units([unit(word) for word in words], pool, notes.outlet())
    assert sorted(name for name, _, _ in notes.done) == sorted(set(words) - {"die"})
    assert all(value == (name, "cpu") for name, value, _ in notes.done)
    ((name, reason, tries),) = notes.aside
    assert (name, tries) == ("die", 3)
    assert "ended by signal 9" in reason


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
def test_processes_that_hang_are_ended_and_count_as_dead(pool: ProcessPool, tmp_path: Path) -> None:
    notes = Notes()
    words = [f"once sleep {tmp_path / 'one'}", "a", "b", "sleep", f"once stop {tmp_path / 'two'}"]
    run_units([unit(word) for word in words], pool, notes.outlet(), Patience(1.0))
    assert sorted(name for name, _, _ in notes.done) == sorted(set(words) - {"sleep"})
    assert {name: tries for name, _, tries in notes.done if name.startswith("once")} == {words[0]: 2, words[4]: 2}
    reason = "3 workers failed on it; the last time its worker was silent for 1 seconds and was ended"
    assert notes.aside == [("sleep", reason, 3)]
    assert all("was silent for 1 seconds and is ended" in sentence for sentence in notes.said)
    assert len(notes.said) == 5


def test_a_worker_has_ten_times_the_longest_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("mrflow_sched.batch.patience.time.monotonic", lambda: clock[0])
    patience = Patience()

    def passes(seconds: int) -> list[int]:
        for _ in range(seconds):
            clock[0] += 1
            patience.overdue()
        return [place for place, _ in patience.overdue()]

    patience.begin(0, 2.0)
    patience.begin(1, 2.0)
    assert passes(10_000) == []  # nothing was done yet, so nothing is known
    patience.end(0, done=False)  # what failed says nothing of how long it takes
    assert passes(1) == []
    patience.end(1, done=True)
    patience.begin(0, 1.0)
    patience.begin(1, 2.0)
    assert passes(int(TIMES) * 5_000 + 10) == [0]
    patience.end(0, done=False)
    assert passes(int(TIMES) * 5_000 + 10) == [1]
    fixed = Patience(5)
    fixed.begin(0, 1.0)
    clock[0] += 1000  # this process was stopped, and its workers with it
    assert fixed.overdue() == []
    short = Patience()
    short.begin(0, 1.0)
    short.end(0, done=True)
    short.begin(0, 1.0)
    patience = short
    assert passes(int(LEAST) - 1) == []
    assert passes(2) == [0]


def test_workers_that_are_killed_while_idle_or_busy_cost_nothing(pool: ProcessPool) -> None:
    notes = Notes()
    usual, killed = notes.take, []

    def take(unit: Unit, value: Any, place: int, tries: int) -> Sequence[Unit]:
        if len(killed) < 3:
            killed.append(pool.pids()[0])
            os.kill(killed[-1], signal.SIGKILL)
        return usual(unit, value, place, tries)

    notes.take = take  # type: ignore[method-assign]
    run_units([unit(f"word {number}") for number in range(12)], pool, notes.outlet())
    assert sorted(name for name, _, _ in notes.done) == sorted(f"word {number}" for number in range(12))


def test_a_model_that_cannot_be_loaded_is_refused_once() -> None:
    pool = ProcessPool(WordMaker(refusal="the folder is empty"), ("cpu",), 1)
    with pytest.raises(MrFlowError, match="the folder is empty"):
        run_units([unit("a")], pool, Notes().outlet())
    pool.close()


def test_workers_that_never_start_end_the_run(tmp_path: Path) -> None:
    pool = ProcessPool(WordMaker(starts=tmp_path), ("cpu",), 1)
    with pytest.raises(MrFlowError, match="no worker can be started: its process was ended by signal 9"):
        run_units([unit("a")], pool, Notes().outlet())
    pool.close()
    assert len(list(tmp_path.iterdir())) == 5


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from batch_makers import WordMaker\n"
        "from mrflow_sched.batch.pool import ProcessPool\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPool(WordMaker(), ('cpu', 'cpu'), 1)\n"
        "    for place in range(2):\n"
        "        pool.start(place)\n"
        "    ready = []\n"
        "    while len(ready) < 2:\n"
        "        ready += pool.wait(1)\n"
        "    pool.send(0, 'sleep')\n"
        "    print(*pool.pids(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    here = Path(__file__).resolve()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(here.parents[2]), str(here.parent)))}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while any(_runs(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_devices_are_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert devices_for("cpu", 3) == ("cpu",) * 3
    found = {"auto": "cuda", "cuda": "cuda", "cuda:1": "cuda:1"}
    monkeypatch.setattr("mrflow_sched._runtime.device.resolve_device", lambda name: torch.device(found[name]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_for("auto", 2) == ("cuda:0", "cuda:1")
    assert devices_for("cuda:1", 1) == ("cuda:1",)
    with pytest.raises(MrFlowError, match="--workers is 3, and this machine has 2 cuda devices"):
        devices_for("cuda", 3)
    with pytest.raises(MrFlowError, match="--device cuda:1 is one device"):
        devices_for("cuda:1", 2)
