"""Files that appear whole or not at all: names taken exclusively, stale drafts swept."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mrflow_sched._runtime import write
from mrflow_sched._runtime.write import sweep, write_new, write_whole


def draft_of(folder: Path, pid: int, machine: str, age: float) -> Path:
    draft = folder / f".mrflow-{machine}-{pid}-{'0' * 32}.tmp"
    draft.write_bytes(b"half")
    os.utime(draft, (time.time() - age, time.time() - age))
    return draft


def dead_pid() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_a_taken_name_is_passed_over_and_its_file_kept(tmp_path: Path) -> None:
    (tmp_path / "a-2.txt").write_text("old")
    paths = [write_new(tmp_path, "a", ".txt", bytes([number])) for number in range(3)]
    assert [path.name for path in paths] == ["a.txt", "a-3.txt", "a-4.txt"]
    assert [path.read_bytes() for path in paths] == [b"\0", b"\1", b"\2"]
    assert (tmp_path / "a-2.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("error", [PermissionError(errno.EPERM, "no links here"), OSError(errno.EOPNOTSUPP, "no")])
def test_without_hard_links_a_name_is_still_taken_exclusively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "link", refuse)
    paths = [write_new(tmp_path, "a", ".txt", bytes([number])) for number in range(3)]
    assert [path.name for path in paths] == ["a.txt", "a-2.txt", "a-3.txt"]
    assert [path.read_bytes() for path in paths] == [b"\0", b"\1", b"\2"]
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_new(tmp_path, "b", ".txt", b"x")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a-2.txt", "a-3.txt", "a.txt"]


def test_a_kill_while_writing_leaves_a_draft_that_the_next_run_sweeps(tmp_path: Path) -> None:
    kill = (
        "import os, pathlib, signal, sys; from mrflow_sched._runtime.write import write_new;"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL if os.name != 'nt' else 9);"
        "write_new(pathlib.Path(sys.argv[1]), 'a', '.txt', b'x')"
    )
    subprocess.run([sys.executable, "-c", kill, str(tmp_path)], check=False)
    [left] = tmp_path.iterdir()
    assert re.fullmatch(r"\.mrflow-.*\.tmp", left.name)
    write_new(tmp_path, "b", ".txt", b"x")
    assert left.exists()  # too fresh to judge
    os.utime(left, (time.time() - 120, time.time() - 120))
    write_new(tmp_path, "b", ".txt", b"x")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["b-2.txt", "b.txt"]


def test_only_stale_drafts_of_our_own_are_swept(tmp_path: Path) -> None:
    here = write._machine()
    mine = draft_of(tmp_path, os.getpid(), here, 3600)
    elsewhere = draft_of(tmp_path, dead_pid(), "0" * 8, 3600)
    others = [tmp_path / name for name in (f".{'a' * 32}.tmp", "a.tmp", ".mrflow-notes.tmp", "mrflow-0.png")]
    for other in others:
        other.touch()
        os.utime(other, (0, 0))
    gone = draft_of(tmp_path, dead_pid(), here, 120)
    ancient = draft_of(tmp_path, dead_pid(), "1" * 8, 7 * 3600)
    sweep(tmp_path)
    assert not gone.exists()
    assert not ancient.exists()
    assert all(kept.exists() for kept in (mine, elsewhere, *others))
    sweep(tmp_path / "none")


def test_replacing_leaves_the_old_file_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("links", [True, False])
def test_eight_processes_that_write_one_stem_lose_nothing(tmp_path: Path, links: bool) -> None:
    work = (
        "import os, pathlib, sys; from mrflow_sched._runtime.write import write_new\n"
        "folder, word, links = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3] == 'True'\n"
        "if not links: del os.link\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for number in range(10): print(write_new(folder, 'same', '.txt', f'{word} {number}'.encode()))\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", work, str(tmp_path), str(word), str(links)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for word in range(8)
    ]
    assert all(each.stdout and each.stdout.readline() == "ready\n" for each in started)
    for each in started:  # all are past their imports: now they write at once
        assert each.stdin
        each.stdin.write("go\n")
        each.stdin.flush()
    told = {word: each.communicate(timeout=60)[0].split() for word, each in enumerate(started)}
    names = {"same.txt", *(f"same-{number}.txt" for number in range(2, 81))}
    assert {each.name for each in tmp_path.iterdir()} == names
    found = {word: [Path(path).read_text() for path in paths] for word, paths in told.items()}
    assert found == {word: [f"{word} {number}" for number in range(10)] for word in range(8)}
