"""Hand work out: the dearest first, one task a worker, again elsewhere where a worker fails, aside after three."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.batch.items import Unit
from mrflow_sched.batch.patience import Patience
from mrflow_sched.batch.pool import Event, Pool

__all__ = ["TRIES", "Outlet", "in_order", "run_units"]

TRIES = 3
"""Workers that a unit may fail before it is set aside."""

_STARTS = 5
"""Starts in a row that may fail before a place is given up."""

_SECONDS = 0.2
"""How long a signal to stop may wait to be seen."""


@dataclass(frozen=True)
class Outlet:
    """Where the schedule takes from and gives to.

    Attributes:
        task_of: Makes a unit's task, when it is handed out and no earlier.
        done: Takes (unit, what its task gave, place, tries), and gives what is to be done next. The place gets no new
            task before it returns.
        aside: Takes (unit, reason, tries) of one that is not tried again, and gives what is to be done next.
        stop: Polled; once it returns True nothing is handed out and the schedule ends.
        say: Takes sentences for the user.
    """

    task_of: Callable[[Unit], Any]
    done: Callable[[Unit, Any, int, int], Sequence[Unit]]
    aside: Callable[[Unit, str, int], Sequence[Unit]]
    stop: Callable[[], bool]
    say: Callable[[str], None]


@dataclass
class _Tried:
    """A unit and what became of it so far."""

    unit: Unit
    tries: int = 0
    places: set[int] = field(default_factory=set[int])


def in_order(units: Sequence[Unit]) -> list[Unit]:
    """The order in which units are handed out.

    Those of one set of LoRAs follow each other, as a worker loads its model anew for another set; among them the
    dearest comes first, so that no worker is left alone with a long one at the end.

    Args:
        units: In any order.

    Returns:
        The same.
    """
    total: dict[tuple[str, ...], float] = {}
    for unit in units:
        loras = unit.items[0].loras
        total[loras] = total.get(loras, 0.0) + unit.cost
    rank = {loras: place for place, loras in enumerate(sorted(total, key=lambda loras: -total[loras]))}
    return sorted(units, key=lambda unit: (rank[unit.items[0].loras], -unit.cost))


def run_units(units: Sequence[Unit], pool: Pool, outlet: Outlet, patience: Patience | None = None) -> None:
    """Have all units done, in the order of `in_order`; what follows from one is done next.

    Args:
        units: What to do.
        pool: Who does it.
        outlet: Where tasks come from and results go.
        patience: How long a worker may be at a unit before it is ended and started anew, which counts as its death;
            None: as `Patience` has it.

    Raises:
        MrFlowError: No worker can be started.
    """
    waiting = deque(_Tried(unit) for unit in in_order(units))
    again: deque[_Tried] = deque()
    free: set[int] = set()
    busy: dict[int, _Tried] = {}
    starts: dict[int, int] = {}
    patience = Patience() if patience is None else patience
    for place in range(min(pool.places, len(units))):
        starts[place] = 0
        pool.start(place)
    while waiting or again or busy:
        if outlet.stop():
            return
        for place in sorted(free):
            found = _next_for(place, waiting, again, starts, alone=not busy)
            if found is not None:
                free.remove(place)
                busy[place] = found
                pool.send(place, outlet.task_of(found.unit))
                patience.begin(place, found.unit.cost)
        answered = pool.wait(_SECONDS)
        for event in (*answered, *_hung(patience, answered, outlet)):
            held = busy.pop(event.place, None)
            patience.end(event.place, done=event.kind == "done")
            if event.kind == "stopped":
                return
            if event.kind == "ready":
                starts[event.place] = 0
                free.add(event.place)
            elif held is None:
                free.discard(event.place)
                _start_again(event, pool, starts, outlet)
            elif event.kind == "done":
                more = outlet.done(held.unit, event.value, event.place, held.tries + 1)
                waiting.extendleft(_Tried(unit) for unit in reversed(more))
                free.add(event.place)
            else:
                more = _failed(event, held, again, outlet)
                waiting.extendleft(_Tried(unit) for unit in reversed(more))
                if event.kind in ("lost", "failed"):
                    pool.start(event.place)
                else:
                    free.add(event.place)


def _hung(patience: Patience, answered: Sequence[Event], outlet: Outlet) -> list[Event]:
    """The workers that have been silent for too long, as if they were lost."""
    known = {event.place for event in answered}
    found: list[Event] = []
    for place, limit in patience.overdue():
        if place not in known:
            outlet.say(
                f"Worker {place} was silent for {limit:.0f} seconds and is ended; what it was at is tried again, "
                "elsewhere first. --timeout sets another limit."
            )
            found.append(Event(place, "lost", reason=f"its worker was silent for {limit:.0f} seconds and was ended"))
    return found


def _next_for(
    place: int, waiting: deque[_Tried], again: deque[_Tried], living: Collection[int], *, alone: bool
) -> _Tried | None:
    """What a place does next: what failed elsewhere before what is new, and what failed here only if it must."""
    elsewhere = set(living) - {place}
    for each in again:
        if place not in each.places or elsewhere <= each.places:
            again.remove(each)
            return each
    if waiting:
        return waiting.popleft()
    return again.popleft() if again and alone else None  # the others may never be ready


def _failed(event: Event, held: _Tried, again: deque[_Tried], outlet: Outlet) -> Sequence[Unit]:
    held.tries += 1
    held.places.add(event.place)
    if event.kind == "refused":
        return outlet.aside(held.unit, event.reason, held.tries)
    if held.tries >= TRIES:
        return outlet.aside(held.unit, f"{held.tries} workers failed on it; the last time {event.reason}", held.tries)
    again.append(held)
    return ()


def _start_again(event: Event, pool: Pool, starts: dict[int, int], outlet: Outlet) -> None:
    """Start a worker that ended without a task; give the place up after several such ends in a row.

    Args:
        event: Its end.
        pool: All workers.
        starts: Place -> starts in a row that failed; a place that is given up is taken out.
        outlet: Says what the user should know.

    Raises:
        MrFlowError: The model cannot be loaded anywhere, or no place is left.
    """
    if event.kind == "refused":
        raise MrFlowError(event.reason)
    starts[event.place] += 1
    if starts[event.place] < _STARTS:
        pool.start(event.place)
        return
    del starts[event.place]
    if not starts:
        raise MrFlowError(f"no worker can be started: {event.reason}.")
    outlet.say(f"Worker {event.place} cannot be started and is left out: {event.reason}.")
