"""What the commands say and leave, and how they end."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mrflow_sched._runtime.errors import MrFlowError, shown
from mrflow_sched.apps.cli.stopping import current
from mrflow_sched.apps.cli.wording import with_loaded_options

if TYPE_CHECKING:
    from mrflow_sched.sampling.progress import Progress

DONE, UNHEALTHY, REFUSED, FAULT = 0, 1, 2, 70
"""Exit codes: done; `doctor` found what would fail; a refusal; a fault (EX_SOFTWARE of sysexits.h)."""

FAULT_SENTENCE = (
    "this is a fault of mrflow, or of a library or model that it uses; please report it with the lines above."
)
_LONGEST = 600
"""Most letters of a refusal."""
MEMORY_SENTENCE = "there is not enough memory for this size or batch; make the image or the batch smaller."

# --- what is said ------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print a sentence for the user on standard error, above the progress bar if there is one.

    Args:
        text: The sentence; "mrflow: " is put before it.
    """
    with _telling():
        bars = sys.modules.get("tqdm")
        write: Callable[..., object] = print if bars is None else bars.tqdm.write
        write(f"mrflow: {text}", file=sys.stderr)
        sys.stderr.flush()


def say_new(sentences: Iterable[str], told: list[str]) -> None:
    """Print sentences for the user that were not told yet.

    Args:
        sentences: The sentences.
        told: Those that were told, to which the new ones are added.
    """
    for sentence in sentences:
        if sentence not in told:
            told.append(sentence)
            say(sentence)


@contextlib.contextmanager
def _telling() -> Generator[None, None, None]:
    """Run a block that writes to standard error; where that takes nothing, nobody is told, and the work goes on."""
    try:
        if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]  # it was closed before Python began
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # print would take standard output in its place
        yield
    except (OSError, ValueError):  # disk full, reader gone; closed
        _forget(sys.stderr)


@contextlib.contextmanager
def saying_warnings(told: list[str] | None = None) -> Generator[None, None, None]:
    """Print what the package's log holds as warnings when it comes, each sentence once.

    Args:
        told: Sentences that were told already, to which each one is added.

    Yields:
        Nothing; the usual way is back when the block ends.
    """
    handler = _Saying([] if told is None else told)
    log = logging.getLogger("mrflow_sched")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _Saying(logging.Handler):
    """Says each sentence of the log that was not told yet."""

    def __init__(self, told: list[str]) -> None:
        """Say warnings and worse.

        Args:
            told: Sentences that were told already, to which each one is added.
        """
        super().__init__(logging.WARNING)
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        """Say a sentence.

        Args:
            record: Holds it.
        """
        say_new([record.getMessage()], self._told)


@contextlib.contextmanager
def progress_bar(wanted: bool | None) -> Generator[Callable[[str, Progress], None], None, None]:
    """Show a progress bar on standard error while the block runs.

    Args:
        wanted: Whether to show one; None: only on a terminal.

    Yields:
        A function (run name, progress) that moves the bar, or does nothing where no bar is wanted.
    """
    with _telling():
        sys.stderr.flush()
        wanted = sys.stderr.isatty() if wanted is None else wanted
    if not wanted:
        yield lambda _name, _step: None
        return
    from tqdm import tqdm

    # A percentage, not a step count: the fraction is weighted by cost, so the bar moves evenly in time.
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    make_bar: Any = tqdm
    stop = current()
    with make_bar(total=1.0, bar_format=layout, file=sys.stderr, leave=False) as bar:
        last = [""]

        def show(name: str, step: Progress) -> None:
            with _telling():
                if name != last[0]:
                    last[0] = name
                    bar.reset(total=1.0)
                bar.set_description_str(f"{name}: {step.name}" if name else step.name, refresh=False)
                bar.update(step.fraction - bar.n)
                bar.refresh()

        stop.on_bar = True
        try:
            yield show
        finally:
            stop.on_bar = False


@contextlib.contextmanager
def cost_bar(wanted: bool | None, total: float) -> Generator[Callable[[float, str], None], None, None]:
    """Show a progress bar of many pieces of work on standard error while the block runs, with the time left.

    Args:
        wanted: Whether to show one; None: only on a terminal.
        total: Cost of all pieces, in any measure.

    Yields:
        A function (cost, text) that moves the bar by a piece's cost, or does nothing where no bar is wanted.
    """
    with _telling():
        sys.stderr.flush()
        wanted = sys.stderr.isatty() if wanted is None else wanted
    if not wanted:
        yield lambda _cost, _text: None
        return
    from tqdm import tqdm

    make_bar: Any = tqdm
    stop = current()
    began, count = time.monotonic(), [0]
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with make_bar(total=max(total, 1e-9), bar_format=layout, file=sys.stderr, leave=False) as bar:

        def advance(cost: float, text: str) -> None:
            count[0] += 1
            rate = count[0] / max(time.monotonic() - began, 1e-9) * 60
            with _telling():
                bar.set_description_str(f"{text}, {rate:.3g} a minute", refresh=False)
                bar.update(min(cost, bar.total - bar.n))
                bar.refresh()

        stop.on_bar = True
        try:
            yield advance
        finally:
            stop.on_bar = False


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
    try:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        there = next((place for place in (folder, *folder.parents) if place.exists() or place.is_symlink()), folder)
    except OSError as error:  # a name that is too long
        raise MrFlowError(f"--out is {shown(folder)!r}, which no folder can be ({os_reason(error)}).") from error
    if not there.is_dir():
        which = "that" if there == folder else repr(str(there))
        raise MrFlowError(f"--out is {str(folder)!r}, but {which} is not a folder; give another.")
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"mrflow")
        except OSError as error:
            raise MrFlowError(
                f"--out is {str(folder)!r}, where no file can be written ({os_reason(error)}); give another."
            ) from error
        yield
    except BaseException:
        for place in missing:
            with contextlib.suppress(OSError):  # rmdir takes only empty folders
                place.rmdir()
        raise


# --- how a command ends ------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a command leaves; `main` prints it, once.

    Attributes:
        value: The result for --json: a dict, or a list where the command cannot end early. None: there is none.
        lines: The result in words.
        code: The exit code where neither an error nor a signal ended the command.
        error: What ended it early; `value` and `lines` then say what was made before. None: nothing did.
    """

    value: Any = None
    lines: tuple[str, ...] = ()
    code: int = DONE
    error: BaseException | None = None

    def show(self, sentence: str | None, *, as_json: bool) -> None:
        """Print the result on standard output, and wait until it is there.

        Args:
            sentence: What is said of `error`, or None.
            as_json: Print one JSON value, with the sentence under the key "error". Else print the lines; a character
                that the output's encoding lacks is written as an escape.

        Raises:
            OSError: It cannot be written (disk full, broken pipe).
        """
        value: Any = self.value
        if sentence is not None:
            value = {**dict[str, Any](self.value or {}), "error": sentence}
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        lines = (json.dumps(value, indent=2),) if as_json else self.lines
        try:
            for line in lines:
                print(line.encode(encoding, "backslashreplace").decode(encoding))
            if sys.stdout is not None:  # pyright: ignore[reportUnnecessaryComparison]  # None where it was closed
                sys.stdout.flush()
        except OSError:
            _forget(sys.stdout)  # Python's flush at exit would fail again, with a traceback
            raise


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
        text = _short(with_loaded_options(" ".join(str(error).split()))) or type(error).__name__
        return text if text.endswith((".", "!", "?")) else text + "."
    if isinstance(error, OSError) and error.errno is not None:
        where = f" at {error.filename}" if error.filename else ""
        return _short(f"{os_reason(error)}{where}; free some space or give another folder or file.")
    return None


def _short(text: str) -> str:
    """A sentence that may quote foreign text: without control characters, its middle cut where it is long."""
    text = shown(text, 10 * len(text) + 4)  # an escape has up to 10 letters
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 2 :]}"


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


def _forget(stream: TextIO | None) -> None:
    """Point a stream at nothing."""
    with contextlib.suppress(OSError, ValueError):  # a stream that is no file
        if stream is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
