"""Where images are kept: a name is taken once, what stands under it is whole, the manifest has whole lines."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrflow_sched._runtime.errors import FileError, MrFlowError
from mrflow_sched._runtime.write import append_line, whole_lines, write_once
from mrflow_sched.batch import store as stores
from mrflow_sched.batch.store import MANIFEST, FolderStore, Manifest, ObjectStore, Store, open_store


@pytest.fixture(params=["folder", "file", "memory", "local objects"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Opens the same store again and again."""
    if request.param == "folder":
        return lambda: open_store(str(tmp_path))
    if request.param == "file":
        return lambda: open_store(f"file://{tmp_path}")
    fsspec: Any = pytest.importorskip("fsspec")
    if request.param == "memory":
        return lambda: open_store(f"memory://{tmp_path}/images")
    return lambda: ObjectStore(fsspec.filesystem("file", auto_mkdir=True), str(tmp_path), "file")


def test_a_name_is_taken_once(opened: Callable[[], Store]) -> None:
    store = opened()
    assert store.put_new("a.png", b"one")
    assert not store.put_new("a.png", b"two")
    again = opened()
    assert again.read("a.png") == b"one"
    assert not again.put_new("a.png", b"two")
    assert "a.png" in again.names()


def test_the_manifest_stays(opened: Callable[[], Store]) -> None:
    manifest = Manifest(opened())
    manifest.add({"kind": "image", "key": "a", "status": "failed", "error": "no\nend"})
    manifest.add({"kind": "image", "key": "b", "status": "done"})
    manifest.add({"kind": "image", "key": "a", "status": "done"})
    manifest.store.close()
    found = Manifest(opened())
    assert [found.is_done("image", key) for key in "abc"] == [True, True, False]
    assert not found.is_done("draft", "a")
    found.add({"kind": "draft", "key": "a", "status": "done"})
    found.store.close()
    assert len(opened().lines()) == 4


def test_one_of_many_writers_gets_a_name(tmp_path: Path) -> None:
    wins: list[int] = []
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        if write_once(tmp_path / "a", bytes([number]) * 100_000):
            wins.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(wins) == 1
    assert (tmp_path / "a").read_bytes() == bytes([wins[0]]) * 100_000
    assert os.listdir(tmp_path) == ["a"]


def test_without_hard_links_files_are_whole_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert write_once(tmp_path / "a", b"one")
    assert not write_once(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    append_line(path, '{"key": "a", "kind": "image", "status": "done"}')
    with path.open("ab") as file:
        file.write(b'{"key": "b", "ki')
    assert whole_lines(path) == ['{"key": "a", "kind": "image", "status": "done"}']
    append_line(path, "{}")
    assert [json.loads(line) for line in path.read_text().splitlines()][1] == {}


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / MANIFEST
    append_line(path, "one")
    usual = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: usual(file, data[:2]))
        with pytest.raises(OSError, match="space"):
            append_line(path, "two")
    assert path.read_text() == "one\n"


def test_lines_that_are_no_entries_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('hello\n[]\n{"key": 1}\n{"key": "a", "kind": "image", "status": "done"}\n')
    assert list(Manifest(FolderStore(tmp_path)).entries) == [("image", "a")]


def test_an_object_manifest_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.setattr(stores, "_LEAST_PAUSE", 0.0)
    address = f"memory://{tmp_path}/often"
    first = Manifest(open_store(address))
    first.add({"kind": "image", "key": "a", "status": "done"})
    assert Manifest(open_store(address)).is_done("image", "a")  # it was not closed


def test_places_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MrFlowError, match=r"nosuch://bucket.*cannot be used"):
        open_store("nosuch://bucket/a")
    store = FolderStore(tmp_path)
    with pytest.raises(FileError, match="cannot be written"):
        store.put_new("x" * 300, b"one")
