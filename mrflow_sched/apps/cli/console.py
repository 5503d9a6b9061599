"""What the commands say, and how they end."""

from __future__ import annotations

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
from typing import TYPE_CHECKING, Any

import mrflow_sched
from mrflow_sched._runtime.errors import MrFlowError

if TYPE_CHECKING:
    from types import FrameType

    from mrflow_sched.sampling.progress import Progress

DONE, UNHEALTHY, REFUSED, FAULT, STOPPED = 0, 1, 2, 70, 130
"""Exit codes: done; `doctor` found what would fail; a refusal; a fault (EX_SOFTWARE of sysexits.h); Ctrl-C."""

FAULT_SENTENCE = (
    "this is a fault of mrflow or of a library it uses, not of your input; please report it with the lines above."
)
MEMORY_SENTENCE = "there is not enough memory for this size or batch; make the image or the batch smaller."

# --- what is said ------------------------------------------------------------------------------


def counted(number: int, thing: str) -> str:
    """`number` things, as in "1 step", "2 steps"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def say(text: str) -> None:
    """A sentence for the user, on standard error."""
    print(f"mrflow: {text}", file=sys.stderr)


def show(*lines: str) -> None:
    """Lines of the result, on standard output; a letter that its encoding lacks is written as an escape."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for line in lines:
        print(line.encode(encoding, "backslashreplace").decode(encoding))


def print_json(value: Any) -> None:
    """The result as JSON, on standard output."""
    print(json.dumps(value, indent=2))


@contextlib.contextmanager
def saying_warnings() -> Generator[None, None, None]:
    """Say this package's warnings as sentences, each once, at the end; those of libraries are warned of as usual."""
    home = str(Path(mrflow_sched.__file__).parent)
    with warnings.catch_warnings(record=True) as caught:
        try:
            yield
        finally:
            found = list(caught)
    for sentence in dict.fromkeys(str(each.message) for each in found if each.filename.startswith(home)):
        say(sentence)
    for each in found:
        if not each.filename.startswith(home):
            warnings.showwarning(each.message, each.category, each.filename, each.lineno, each.file, each.line)


@contextlib.contextmanager
def progress_bar(wanted: bool | None) -> Generator[Callable[[str, Progress], None], None, None]:
    """A function (run name, progress) that moves a bar on standard error, or does nothing where no bar is wanted.

    `wanted` None: a bar on a terminal only.
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
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


# --- around a command --------------------------------------------------------------------------


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
            f"--out is {str(folder)!r}, where no file can be written ({os_reason(error)}); give another."
        ) from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # rmdir takes only empty folders
            for place in missing:
                place.rmdir()
        raise


@contextlib.contextmanager
def ctrl_c() -> Generator[Callable[[], bool], None, None]:
    """A function that tells whether Ctrl-C was pressed; the first press stops gently, the second at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return

    def press(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say("Stopping and keeping the best image so far (Ctrl-C again stops at once).")

    before = signal.signal(signal.SIGINT, press)
    try:
        yield stop.is_set
    finally:
        signal.signal(signal.SIGINT, before)


# --- how a command ends ------------------------------------------------------------------------


def refusal_of(error: BaseException) -> str | None:
    """One sentence where `error` is a refusal, or a limit of the machine; None where it is a fault.

    Refusals are `MrFlowError`. The machine's limits are memory that ran out and the system's own errors (disk full, no
    right to read or write). A plain ValueError of a library is a fault: the user's input is checked by us.
    """
    if out_of_memory(error):
        return MEMORY_SENTENCE
    if isinstance(error, MrFlowError):
        text = " ".join(str(error).split()) or type(error).__name__
        return text if text.endswith((".", "!", "?")) else text + "."
    if isinstance(error, OSError) and error.errno is not None:
        where = f" at {error.filename}" if error.filename else ""
        return f"{os_reason(error)}{where}; free some space or give another folder or file."
    return None


def os_reason(error: OSError) -> str:
    """What the system says of `error`, to stand within a sentence."""
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return (error.strerror or str(error)).lower()


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch is not loaded to ask."""
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
