"""What the commands print, and how they end."""

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
    """Write a number with its noun, as in "1 step", "2 steps".

    Args:
        number: How many.
        thing: The noun in the singular; its plural must end in s.

    Returns:
        The two words.
    """
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def say(text: str) -> None:
    """Print a sentence for the user on standard error.

    Args:
        text: The sentence; "mrflow: " is put before it.
    """
    print(f"mrflow: {text}", file=sys.stderr)


def show(*lines: str) -> None:
    """Print lines of the result on standard output.

    Args:
        *lines: The lines. A character that the output's encoding lacks is written as an escape.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for line in lines:
        print(line.encode(encoding, "backslashreplace").decode(encoding))


def print_json(value: Any) -> None:
    """Print the result as JSON on standard output.

    Args:
        value: Anything that `json.dumps` takes.
    """
    print(json.dumps(value, indent=2))


@contextlib.contextmanager
def saying_warnings() -> Generator[None, None, None]:
    """Print this package's warnings as sentences, each once, and those of libraries as usual, when the block ends.

    After an exception nothing is printed but what the exception says.

    Yields:
        Nothing; warnings are collected while the block runs.
    """
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
    """Show a progress bar on standard error while the block runs.

    Args:
        wanted: Whether to show one; None: only on a terminal.

    Yields:
        A function (run name, progress) that moves the bar, or does nothing where no bar is wanted.
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
    """Make a folder and check that files can be written there, before minutes are spent on results.

    Folders that were made are removed again if the block fails and they are empty.

    Args:
        folder: The folder of --out.

    Yields:
        Nothing; the folder is there while the block runs.

    Raises:
        MrFlowError: It is no folder, cannot be made, or takes no file.
    """
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
    """Turn the first Ctrl-C into a request to stop; the second one stops at once.

    The previous handler is put back at the end. Outside the main thread, where Python takes no handlers, nothing is
    changed.

    Yields:
        A function that returns whether Ctrl-C was pressed.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed a second time.
    """
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
    """Return the sentence for the user where an error is a refusal or a limit of the machine.

    Refusals are `MrFlowError`. Limits of the machine are memory that ran out and errors of the operating system (disk
    full, no permission to read or write). A plain ValueError of a library is a fault: we check the user's input.

    Args:
        error: What a command raised.

    Returns:
        One sentence, or None where the error is a fault.
    """
    if _out_of_memory(error):
        return MEMORY_SENTENCE
    if isinstance(error, MrFlowError):
        text = " ".join(str(error).split()) or type(error).__name__
        return text if text.endswith((".", "!", "?")) else text + "."
    if isinstance(error, OSError) and error.errno is not None:
        where = f" at {error.filename}" if error.filename else ""
        return f"{os_reason(error)}{where}; free some space or give another folder or file."
    return None


def os_reason(error: OSError) -> str:
    """Return what the operating system says of an error, in words that fit into a sentence.

    Args:
        error: An error of the operating system.

    Returns:
        Lower-case words without a full stop, such as "permission denied".
    """
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return (error.strerror or str(error)).lower()


def _out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; torch is not imported to find out."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from mrflow_sched._runtime.memory import is_memory_error

    return is_memory_error(error)


def forget_output() -> None:
    """Point standard output at nothing, so that Python's flush at exit does not fail again, with a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush_output() -> None:
    """Flush standard output now, while an error can still be told in a sentence.

    Raises:
        OSError: What was printed cannot be written (disk full, broken pipe).
    """
    if sys.stdout is not None:  # pyright: ignore[reportUnnecessaryComparison]  # None where stdout was closed
        try:
            sys.stdout.flush()
        except OSError:
            forget_output()
            raise
