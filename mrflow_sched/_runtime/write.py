"""Files that appear whole or not at all, and never over another process's file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import time
import uuid
from collections.abc import Generator, Iterator
from itertools import count
from pathlib import Path

import psutil

__all__ = ["append_line", "next_new", "sweep", "whole_lines", "write_new", "write_once", "write_whole"]

_DRAFT = re.compile(r"\.mrflow-([0-9a-f]{8})-(\d{1,10})-[0-9a-f]{32}\.tmp")
_SETTLED_SECONDS = 60.0
"""Age under which a draft is left alone in any case."""
_OLD_SECONDS = 6 * 3600.0
"""Age from which a draft is stale whoever wrote it: writing takes seconds."""


def write_whole(path: Path, data: bytes) -> None:
    """Write a file; an older one of that name is replaced, in one moment.

    Args:
        path: The file. Its folder must exist.
        data: What it holds.

    Raises:
        OSError: It cannot be written; nothing is left, and the older file is as it was.
    """
    with _draft(path.parent, data) as draft:
        os.replace(draft, path)


def write_new(folder: Path, stem: str, suffix: str, data: bytes) -> Path:
    """Write a file under the first free name of `stem`, `stem-2`, `stem-3` ...

    The name is taken by the file system in one step, so processes that write into one folder at the same time get
    different names. Drafts that a killed process left in the folder are removed first (`sweep`).

    Args:
        folder: Where the file goes; it must exist.
        stem: Name without suffix.
        suffix: Ending of the name, with its dot.
        data: What the file holds.

    Returns:
        The file's path.

    Raises:
        OSError: It cannot be written; nothing is left.
    """
    sweep(folder)
    with _draft(folder, data) as draft:
        return next(path for path in _names(folder, stem, suffix) if _takes(draft, path))


def write_once(path: Path, data: bytes) -> bool:
    """Write a file unless there is one of its name, in one moment.

    Nothing else ever stands under the name than the whole file. Of several writers one succeeds; on a file system
    without hard links the last of those that come within the same instant does.

    Args:
        path: The file. Its folder must exist.
        data: What it holds.

    Returns:
        False where a file of that name was there, which is left as it is.

    Raises:
        OSError: It cannot be written; nothing is left.
    """
    with _draft(path.parent, data) as draft:
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        except (OSError, AttributeError):  # a file system without hard links
            if os.path.lexists(path):
                return False
            os.replace(draft, path)
    _sync_names(path.parent)
    return True


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, in one write: a reader never meets half of it.

    Args:
        path: The file; it is made if it is missing.
        line: Text without a line end.

    Raises:
        OSError: It cannot be written; the file is as it was.
    """
    data = f"{line}\n".encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        written = os.write(file, data)
        if written < len(data):
            os.ftruncate(file, os.fstat(file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(file)
    finally:
        os.close(file)


def whole_lines(path: Path) -> list[str]:
    """The lines of a file of `append_line`; what a machine that lost its power left of one is cut off.

    Args:
        path: The file.

    Returns:
        Its lines without their ends; none where there is no file.

    Raises:
        OSError: It cannot be read, or not mended.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return data[:whole].decode("utf-8", "replace").split("\n")[:-1]


def _sync_names(folder: Path) -> None:
    """Let the new name of a file outlive a machine that loses its power, where the system can."""
    with contextlib.suppress(OSError, AttributeError):  # Windows opens no folders
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def next_new(folder: Path, stem: str, suffix: str) -> Path:
    """The name that `write_new` would take now.

    Args:
        folder: As in `write_new`.
        stem: As in `write_new`.
        suffix: As in `write_new`.

    Returns:
        A path at which there is nothing.
    """
    return next(path for path in _names(folder, stem, suffix) if not os.path.lexists(path))


def _names(folder: Path, stem: str, suffix: str) -> Iterator[Path]:
    yield folder / f"{stem}{suffix}"
    for number in count(2):
        yield folder / f"{stem}-{number}{suffix}"


def sweep(folder: Path) -> None:
    """Remove the drafts of this module that a killed process left in a folder.

    A draft is stale once the process that wrote it is gone, or six hours after its last change where that process ran
    on another machine. Files of any other name are not looked at.

    Args:
        folder: Where to look; nothing happens where it cannot be read.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if _DRAFT.fullmatch(name):
                with contextlib.suppress(OSError):
                    if _is_stale(folder / name):
                        (folder / name).unlink()


def _is_stale(draft: Path) -> bool:
    found = _DRAFT.fullmatch(draft.name)
    age = time.time() - draft.stat().st_mtime
    if found is None or age < _SETTLED_SECONDS:
        return False
    here = found.group(1) == _machine()
    return age > _OLD_SECONDS or (here and not psutil.pid_exists(int(found.group(2))))


def _machine() -> str:
    """A word for this machine, as other machines may write into the same folder."""
    return hashlib.sha256(platform.node().encode("utf-8", "replace")).hexdigest()[:8]


@contextlib.contextmanager
def _draft(folder: Path, data: bytes) -> Generator[Path, None, None]:
    """A finished file under a name of its own, which is gone afterwards."""
    draft = folder / f".mrflow-{_machine()}-{os.getpid()}-{uuid.uuid4().hex}.tmp"
    try:
        # Not tempfile: its files are readable by their owner alone, and a rename keeps that.
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield draft
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _takes(draft: Path, path: Path) -> bool:
    """Give the finished draft a name that nothing has yet; False where something has it."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except (OSError, AttributeError):  # a file system without hard links: FAT, some network folders, Android
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        try:
            os.replace(draft, path)
        except BaseException:
            path.unlink()
            raise
    return True
