"""The choice of a device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from mrflow_sched._runtime.device import has_bfloat16, resolve_device
from mrflow_sched._runtime.errors import MrFlowError

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


@pytest.mark.parametrize(
    "word",
    ["hpu", "privateuseone", "mps", "xpu", "mtia", "opengl", "vulkan", "xla", "cuda:99", "", "\x1b[31m", "x" * 5000],
)
def test_a_device_that_torch_lacks_ends_in_one_whole_sentence(word: str) -> None:
    if word in ("mps", "xpu", "hpu") and getattr(torch, word, None) is not None and getattr(torch, word).is_available():
        pytest.skip(f"this machine has {word}")
    with pytest.raises(MrFlowError) as caught:
        resolve_device(word)
    said = str(caught.value)
    assert re.fullmatch(r"device is .+, which .+; use auto(, cpu or cuda| or cpu)\.", said)
    assert said.isprintable()
    assert "..." not in said.replace("xxx...", "")
    assert len(said) < 250


@pytest.mark.parametrize("wrong", [None, ["cpu"], 1.5])
def test_what_is_no_device_name(wrong: Any) -> None:
    with pytest.raises(MrFlowError, match="not a device name"):
        resolve_device(wrong)
