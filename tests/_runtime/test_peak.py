"""The highest memory use of a stretch of work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mrflow_sched._runtime import peak as _memory
from mrflow_sched._runtime.peak import PeakMemory

MEGABYTE = 1 << 20


def hold(megabytes: int) -> int:
    """Fill that much memory and let go of it."""
    return int(torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)[-1])


@pytest.mark.parametrize("kernel", [True, False])
def test_peak_memory_sees_what_was_held_and_freed(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(_memory, "_reset_high_water", lambda: False)
    peaks: list[int] = []
    for size in (200, 20, 200):
        with PeakMemory(torch.device("cpu")) as peak:
            for _ in range(3):
                hold(size)
        peaks.append(peak.bytes)
    for large in (peaks[0], peaks[2]):
        assert 120 * MEGABYTE < large - peaks[1] < 240 * MEGABYTE


def test_the_kernels_mark_is_used_only_where_it_moves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_memory, "_CLEAR", tmp_path / "none" / "clear_refs")
    assert not _memory._reset_high_water()
    monkeypatch.setattr(_memory, "_CLEAR", tmp_path / "clear_refs")
    monkeypatch.setattr(_memory, "_STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("VmHWM:   2000 kB\nVmRSS:   1000 kB\n")
    assert not _memory._reset_high_water()
    (tmp_path / "status").write_text("VmHWM:   1000 kB\nVmRSS:   1000 kB\n")
    assert _memory._reset_high_water()
    (tmp_path / "status").write_text("Name: x\n")
    assert not _memory._reset_high_water()


def test_cuda_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("max_memory_allocated", 7)):
        monkeypatch.setattr(torch.cuda, name, lambda _d, name=name, value=value: calls.append(name) or value)
    with PeakMemory(torch.device("cuda")) as peak:
        pass
    assert peak.bytes == 7
    assert calls == ["synchronize", "reset_peak_memory_stats", "max_memory_allocated"]


def test_systems_without_trimming_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory.sys, "platform", "win32")
    _memory.give_back()
    monkeypatch.setattr(_memory.sys, "platform", "linux")
    monkeypatch.setattr(_memory.ctypes, "CDLL", lambda _name: object())
    _memory.give_back()
