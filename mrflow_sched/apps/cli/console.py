"""What the commands say, and how they end."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import mrflow_sched
from mrflow_sched._runtime.errors import MrFlowError

if TYPE_CHECKING:
    from types import FrameType

    from mrflow_sched.sampling.progress import Progress


AILING = 1
STOPPED = 130
REFUSED = 2


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


# --- around every command ---------------------------------------------------------------------


def say(text: str) -> None:
    print(f"mrflow: {text}", file=sys.stderr)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


@contextlib.contextmanager
def writable(folder: Path) -> Generator[None, None, None]:
    """Make the folder and prove that it takes files before minutes are spent; remove it if a failure left it empty."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    there = next((place for place in (folder, *folder.parents) if place.exists() or place.is_symlink()), folder)
    if not there.is_dir():
        which = "that" if there == folder else repr(str(there))
        raise MrFlowError(f"--out is {str(folder)!r}, but {which} is not a folder; give another.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"mrflow")
    except OSError as error:
        raise MrFlowError(
            f"--out is {str(folder)!r}, which takes no files ({os_reason(error)}); give another."
        ) from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # rmdir takes only empty folders
            for place in missing:
                place.rmdir()
        raise


@contextlib.contextmanager
def saying_warnings() -> Generator[None, None, None]:
    """Warnings of this package become notes on standard error; those of others keep their own way."""
    home = str(Path(mrflow_sched.__file__).parent)
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if filename.startswith(home):
                say(str(message))
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


@contextlib.contextmanager
def progress_bar(args: argparse.Namespace) -> Generator[Callable[[str, Progress], None], None, None]:
    """A function (run name, progress) that moves a bar on standard error, or does nothing where no bar is wanted."""
    if not (sys.stderr.isatty() if args.progress is None else args.progress):
        yield lambda _name, _step: None
        return
    from tqdm import tqdm

    # A percentage, not a step count: the fraction is weighted by cost, so the bar moves evenly in time.
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    make_bar: Any = tqdm
    with make_bar(total=1.0, bar_format=layout, file=sys.stderr, leave=False) as bar:
        last = [""]

        def show(name: str, step: Progress) -> None:
            if name != last[0]:
                last[0] = name
                bar.reset(total=1.0)
            bar.set_description_str(f"{name}: {step.name}" if name else step.name, refresh=False)
            bar.update(step.fraction - bar.n)
            bar.refresh()

        yield show


@contextlib.contextmanager
def ctrl_c() -> Generator[Callable[[], bool], None, None]:
    """A function that says whether Ctrl-C was pressed; the first press stops gently, the second at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return

    def press(number_between: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say("Stopping and keeping the best picture so far (Ctrl-C again stops at once).")

    before = signal.signal(signal.SIGINT, press)
    try:
        yield stop.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def os_reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return (error.strerror or str(error)).lower()


def sentence_of(error: BaseException) -> str:
    """One line for any refusal."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f" at {error.filename}" if error.filename else ""
        return f"{os_reason(error)}{where}; free some space or give another folder or file."
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."


def out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from mrflow_sched._runtime.memory import is_memory_error

    return is_memory_error(error)


def forget_output() -> None:
    """Point stdout at nothing, so that Python's own flush at exit does not fail once more, with a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush_output() -> None:
    """Bring what was printed out while an error can still be told in a sentence."""
    if sys.stdout is not None:  # pyright: ignore[reportUnnecessaryComparison]  # None where stdout was closed
        try:
            sys.stdout.flush()
        except OSError:
            forget_output()
            raise
