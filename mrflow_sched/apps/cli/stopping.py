"""Ctrl-C, SIGTERM and SIGHUP, from a command's first import to its last saved byte.

A signal is always written down. What else it does depends on what runs:

- Imports, loading, measuring: nothing there is worth keeping, so `Stopped` is raised at once. Python drops an exception
  that is raised while an object is destroyed, and libraries catch more than they should: `Stop.check`, called between
  the parts of the work, raises it again.
- Inside `Stop.keeping`, where images are sampled and saved: nothing is raised. The work asks `Stop.requested` and ends
  by itself, with what it has. A second Ctrl-C raises.
- Inside `Stop.whole`, where one file is written: nothing is raised, so that a file is there whole or not at all.

Only what costs no time is imported here: the handlers must stand before torch is imported, which takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

STOPPED = 130
"""Exit code after Ctrl-C. A shell's rule gives 128 + the signal's number for any signal."""

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_PATIENCE = 2.0
"""Seconds after a raised `Stopped` in which none is raised again: open files are closed and removed meanwhile."""
_SENTENCE = "mrflow: Stopping and keeping what is made so far (Ctrl-C again stops at once).\n"


class Stopped(KeyboardInterrupt):
    """Raised where a signal ends a command that has nothing to keep."""


class Stop:
    """What the signals of this process asked for.

    Attributes:
        number: The first signal that came; None: none came.
        raised: `Stopped` was raised, so that an exception of any kind may be its consequence.
        on_bar: The cursor is behind a progress bar, so a sentence must begin on a new line.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.raised = False
        self.on_bar = False
        self._again = False
        self._keeping = False
        self._whole = False
        self._over = False
        self._raised_at = -_PATIENCE

    @property
    def requested(self) -> bool:
        """Whether the command is to end."""
        return self.number is not None

    @property
    def at_once(self) -> bool:
        """Whether Ctrl-C was pressed after a stop was requested."""
        return self._again

    def polled(self) -> bool:
        """Whether the sampler is to stop: its `cancel`.

        Returns:
            As `requested`.

        Raises:
            Stopped: Ctrl-C was pressed a second time, and the exception of that was lost.
        """
        if self.at_once:
            self.check()
        return self.requested

    def check(self) -> None:
        """Raise `Stopped` where the command is to end: to be called where nothing is worth keeping.

        Raises:
            Stopped: A signal came.
        """
        if self.requested:
            self._raise()

    @contextlib.contextmanager
    def keeping(self) -> Generator[Stop, None, None]:
        """Let the first signal raise nothing in this block, whose work ends by itself where `requested`.

        Yields:
            This object.

        Raises:
            Stopped: A signal came before the block, or Ctrl-C was pressed a second time in it.
        """
        self.check()
        self._keeping = True
        try:
            self.check()  # a signal between the two lines above
            yield self
        finally:
            self._keeping = False

    @contextlib.contextmanager
    def whole(self) -> Generator[None, None, None]:
        """Let no signal raise anything in this block, which must be short: one file is written.

        Yields:
            Nothing.
        """
        self._whole = True
        try:
            yield
        finally:
            self._whole = False

    def end(self) -> None:
        """Note that the work is over; signals that come later change nothing."""
        self._over = True

    def finish(self, code: int) -> int:
        """End the work, if it has not ended, and find the exit code.

        Args:
            code: The exit code where no signal came.

        Returns:
            The exit code: 128 + the signal's number where one came.
        """
        self.end()
        return code if self.number is None else 128 + self.number

    def press(self, number: int, frame: FrameType | None) -> None:
        """Take a signal: the handler.

        Args:
            number: The signal.
            frame: What ran when it came; not used.

        Raises:
            Stopped: Where the docstring of the module says so.
        """
        if self._over:
            return
        first = self.number is None
        self.number = self.number or number
        # A terminal that closes and a service manager may send theirs twice: only a person's second one hastens.
        self._again = self._again or (number == signal.SIGINT and not first)
        if self._keeping and first:
            self._tell()
        if self._whole or (self._keeping and not self._again):
            return
        if time.monotonic() - self._raised_at > _PATIENCE:
            self._raise()

    def _raise(self) -> None:
        self.raised = True
        self._raised_at = time.monotonic()
        raise Stopped

    def _tell(self) -> None:
        """Say so at once, past Python's stream, which may be in the middle of a write."""
        line = ("\n" if self.on_bar else "") + _SENTENCE
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, no file, or none at all
            os.write(sys.stderr.fileno(), line.encode())


def current() -> Stop:
    """The object that the process's handlers belong to.

    Returns:
        It; one that no signal reaches where none is installed.
    """
    owners = (getattr(signal.getsignal(number), "__self__", None) for number in _SIGNALS)
    return next((owner for owner in owners if isinstance(owner, Stop)), None) or Stop()


@contextlib.contextmanager
def watching(*, ends_process: bool = False) -> Generator[Stop, None, None]:
    """Watch the signals in this block. A signal that the process was told to ignore (`nohup`, `&`) stays ignored.

    Inside another such block nothing is installed again, nor outside the main thread, where Python takes no handlers.

    Args:
        ends_process: The process ends after the block: signals are ignored then. False: what was there is put back.

    Yields:
        What the signals asked for.
    """
    stop = current()
    if threading.current_thread() is not threading.main_thread() or _watched(stop):
        yield stop
        return
    usual = sys.unraisablehook

    def quiet(what: Any) -> None:
        if not isinstance(what.exc_value, Stopped):  # one that Python drops is raised again by `check`
            usual(what)

    before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    sys.unraisablehook = quiet
    try:
        for number in before:
            signal.signal(number, stop.press)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if ends_process else handler)
        if not ends_process:
            sys.unraisablehook = usual


def _watched(stop: Stop) -> bool:
    return any(getattr(signal.getsignal(number), "__self__", None) is stop for number in _SIGNALS)
