"""Where images are kept: a folder, or object storage through fsspec; each file once, and a manifest of whole lines.

Only the process that hands out the work writes here, so workers need no common disk, and a worker that is killed leaves
nothing. A name is taken in one step, and what stands under it is whole: on a disk by a hard link to a finished file, in
object storage because an object appears whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from mrflow_sched._runtime.errors import FileError, MrFlowError, first_line
from mrflow_sched._runtime.write import append_line, sweep, whole_lines, write_once

__all__ = ["MANIFEST", "FolderStore", "Manifest", "ObjectStore", "Store", "is_address", "open_store", "sha256_of"]

MANIFEST = "manifest.jsonl"
"""Name of the manifest: a JSON object for every image that was made or set aside."""

_LEAST_PAUSE = 10.0
"""Seconds between two writes of a manifest that has to be written whole."""
_SHARE = 20.0
"""Such a write may take this part of the time at most, 1 / 20."""


class Store(Protocol):
    """Where files are kept."""

    where: str

    def names(self) -> Collection[str]:
        """The names of all files.

        Returns:
            Names without folders.
        """
        ...

    def read(self, name: str) -> bytes:
        """Read a file.

        Args:
            name: Its name.

        Returns:
            What it holds.
        """
        ...

    def put_new(self, name: str, data: bytes) -> bool:
        """Keep a file, whole or not at all.

        Args:
            name: Its name.
            data: What it holds.

        Returns:
            False where there is one of that name already, which is left as it is.
        """
        ...

    def lines(self) -> list[str]:
        """The lines of the manifest.

        Returns:
            Lines without their ends.
        """
        ...

    def append(self, line: str) -> None:
        """Add a line to the manifest.

        Args:
            line: Text without a line end.
        """
        ...

    def close(self) -> None:
        """Write what was not written yet."""
        ...


class FolderStore:
    """A folder of this machine, or of the network.

    Attributes:
        where: The folder, for sentences.
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        """Use a folder. What a killed process left half written there is removed.

        Args:
            folder: An existing folder.
        """
        self.folder, self.where = folder, str(folder)
        sweep(folder)

    def names(self) -> Collection[str]:
        """As in `Store`.

        Returns:
            Names without folders.
        """
        return {path.name for path in self.folder.iterdir()}

    def read(self, name: str) -> bytes:
        """As in `Store`.

        Args:
            name: The file's.

        Returns:
            What it holds.
        """
        return (self.folder / name).read_bytes()

    def put_new(self, name: str, data: bytes) -> bool:
        """As in `Store`.

        Args:
            name: The file's.
            data: What it holds.

        Returns:
            False where there is one of that name already.

        Raises:
            FileError: It cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return write_once(self.folder / name, data)
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise FileError(f"{str(self.folder / name)!r} cannot be written: {reason}.") from error

    def lines(self) -> list[str]:
        """As in `Store`.

        Returns:
            Lines without their ends.
        """
        return whole_lines(self.folder / MANIFEST)

    def append(self, line: str) -> None:
        """As in `Store`.

        Args:
            line: Text without a line end.
        """
        append_line(self.folder / MANIFEST, line)

    def close(self) -> None:
        """Nothing is left to write."""


class ObjectStore:
    """A folder of a file system of fsspec: S3, Google Cloud Storage, Azure, memory.

    Objects cannot be added to, so the manifest is written whole from time to time and at the end. What is made counts
    by its own name: a manifest that lags behind is made true by the next run.

    Attributes:
        where: The address, for sentences.
    """

    def __init__(self, files: Any, root: str, where: str) -> None:
        """Use a folder.

        Args:
            files: The file system.
            root: The folder in it.
            where: The address.
        """
        self.where = where
        self._files, self._root = files, root.rstrip("/")
        self._exclusive = "mode" in inspect.signature(getattr(files, "_pipe_file", files.pipe_file)).parameters
        self._lines: list[str] = []
        self._written, self._pause, self._last = 0, _LEAST_PAUSE, time.monotonic()

    def names(self) -> Collection[str]:
        """As in `Store`.

        Returns:
            Names without folders.
        """
        try:
            self._files.invalidate_cache()
            found: list[Any] = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return frozenset()
        return {str(each).rstrip("/").rpartition("/")[2] for each in found}

    def read(self, name: str) -> bytes:
        """As in `Store`.

        Args:
            name: The file's.

        Returns:
            What it holds.
        """
        return cast("bytes", self._files.cat_file(self._path(name)))

    def put_new(self, name: str, data: bytes) -> bool:
        """As in `Store`.

        Args:
            name: The file's.
            data: What it holds.

        Returns:
            False where there is one of that name already.

        Raises:
            FileError: It cannot be written.
        """
        path = self._path(name)
        try:
            if self._exclusive:
                self._files.pipe_file(path, data, mode="create")
                return True
            if self._files.exists(path):
                return False
            self._files.pipe_file(path, data)
        except FileExistsError:
            return False
        except OSError as error:
            raise FileError(f"{path!r} cannot be written: {error.strerror or first_line(error)}.") from error
        return True

    def lines(self) -> list[str]:
        """As in `Store`.

        Returns:
            Lines without their ends.
        """
        with contextlib.suppress(FileNotFoundError):
            text = cast("bytes", self._files.cat_file(self._path(MANIFEST))).decode("utf-8", "replace")
            self._lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
            self._written = len(self._lines)
        return list(self._lines)

    def append(self, line: str) -> None:
        """As in `Store`; the line is there once the manifest is written again.

        Args:
            line: Text without a line end.
        """
        self._lines.append(line)
        if time.monotonic() - self._last > self._pause:
            self.close()

    def close(self) -> None:
        """Write the manifest, if there is anything new in it."""
        if self._written == len(self._lines):
            return
        began = time.monotonic()
        self._files.pipe_file(self._path(MANIFEST), "".join(f"{line}\n" for line in self._lines).encode())
        self._written, self._last = len(self._lines), time.monotonic()
        self._pause = max(_LEAST_PAUSE, _SHARE * (self._last - began))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def is_address(where: str) -> bool:
    """Whether --out is an address for fsspec, and not a folder here.

    Args:
        where: A folder, file://..., s3://..., memory://...

    Returns:
        True for an address of another file system than this machine's.
    """
    return "://" in where and not where.startswith("file://")


def open_store(where: str) -> Store:
    """Open what files are kept in.

    Args:
        where: A folder, which must exist, also as file://...; or an address of fsspec, such as s3://bucket/folder.

    Returns:
        The store.

    Raises:
        MrFlowError: fsspec, or what it needs for the address, is not installed, or the address cannot be used.
    """
    if not is_address(where):
        return FolderStore(Path(where.removeprefix("file://")))
    try:
        import fsspec  # pyright: ignore[reportMissingTypeStubs]

        library: Any = fsspec
        files, root = library.core.url_to_fs(where)
        files.makedirs(root, exist_ok=True)
    except (ImportError, ValueError, OSError) as error:
        raise MrFlowError(
            f"--out is {where!r}, which cannot be used ({first_line(error)}); give a folder, or install what fsspec "
            "needs for this address."
        ) from error
    return ObjectStore(files, root, where)


def sha256_of(data: bytes) -> str:
    """The hash by which the manifest knows a file.

    Args:
        data: What the file holds.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(data).hexdigest()


class Manifest:
    """What is known of every image of a store.

    Attributes:
        store: Where it is kept.
        entries: (kind, key) -> of the last line on an image what a rerun asks for, "status" and "scores".
    """

    def __init__(self, store: Store) -> None:
        """Read the manifest of a store; a line that is no entry is passed over.

        Args:
            store: Where it is.
        """
        self.store = store
        self.entries: dict[tuple[str, str], Mapping[str, Any]] = {}
        for line in store.lines():
            try:
                entry: Any = json.loads(line)
                self._remember(entry)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write a line.

        Args:
            entry: Has at least "kind", "key" and "status".
        """
        self._remember(entry)
        self.store.append(json.dumps(entry))

    def _remember(self, entry: Mapping[str, Any]) -> None:
        known = {name: entry[name] for name in ("status", "scores") if name in entry}
        self.entries[str(entry["kind"]), str(entry["key"])] = known

    def is_done(self, kind: str, key: str) -> bool:
        """Whether a line says that an image was made.

        Args:
            kind: Of the file.
            key: The image's.

        Returns:
            False also where it was set aside.
        """
        return self.entries.get((kind, key), {}).get("status") == "done"
