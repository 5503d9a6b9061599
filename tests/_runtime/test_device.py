"""The choice of a device, and how errors of others are quoted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mrflow_sched._runtime.device import has_bfloat16, resolve_device
from mrflow_sched._runtime.errors import first_line

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_cpu_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not has_bfloat16(CPU)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert has_bfloat16(CPU)
    assert not has_bfloat16(torch.device("mps"))
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert not has_bfloat16(CPU), "torch without the probes works in float32"


@pytest.mark.parametrize("answer", [True, False])
def test_cuda_is_asked(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: answer)
    assert has_bfloat16(CUDA) is answer


def test_device_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    with pytest.raises(ValueError, match="holds shapes and no numbers"):
        resolve_device("meta")
    for word in ("quantum", "cpu:x"):
        with pytest.raises(ValueError, match="not a device name"):
            resolve_device(word)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no driver\nand more")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(ValueError, match=r"cannot be used here \(no driver\)"):
        resolve_device("cuda:3")


def test_errors_are_told_in_one_line() -> None:
    told: Sequence[tuple[Exception, str]] = (
        (ValueError("first\nsecond"), "first"),
        (KeyError(), "KeyError"),
        (RuntimeError("Error(s) in loading state_dict for Net:\n\tsize mismatch for a."), "size mismatch for a"),
        (ValueError("ends with a stop."), "ends with a stop"),
        (ValueError("x" * 500), "x" * 160),
    )
    for error, line in told:
        assert first_line(error) == line
