"""bench/speed/parts: networks on torch alone do the work of the real classes, and every part is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from bench.speed import parts
from bench.speed.count import count
from mrflow_sched import get_family
from mrflow_sched.plan.cost import UPSCALER_FLOP

TRUE = parts.Sizes()
FLUX = get_family("flux1-dev")
VAE: Any = FLUX.vae_cost


@pytest.mark.parametrize(
    ("make", "work", "flop"),
    [
        (lambda: parts.Network(TRUE), parts.forward, FLUX.forward_cost(32 * 32)),
        (
            lambda: parts.make_decoder(TRUE.channels),
            lambda m: parts.convolved(m, 16, 1 / 8),
            VAE.decode.flop(512 * 512),
        ),
        (lambda: parts.make_encoder(TRUE.channels), lambda m: parts.convolved(m, 3, 1), VAE.encode.flop(512 * 512)),
        (
            lambda: parts.Upscaler(TRUE.filters, TRUE.blocks),
            lambda m: parts.convolved(m, 3, 1 / 2),
            UPSCALER_FLOP["x2"] * 256 * 256,
        ),
    ],
    ids=["network", "decode", "encode", "upscale"],
)
def test_a_stand_in_does_the_work_of_the_real_class(
    make: Callable[[], Any], work: Callable[[Any], Callable[[int], Callable[[], object]]], flop: float
) -> None:
    assert count(make, lambda module: work(module)(512)()).flop == pytest.approx(flop, rel=0.001)


def test_every_part_is_timed_at_every_size(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["parts", "--small", "--repeats", "1", "--device", "cpu"])
    parts.main()
    told = json.loads(capsys.readouterr().out)
    for part in ("network", "decode", "decode, channels last", "encode", "upscale"):
        assert list(told[part]) == ["64", "128"]
        assert all(row["seconds"] > 0 for row in told[part].values())
        assert told[part]["128"]["FLOP"] > 3 * told[part]["64"]["FLOP"] or part == "network"
    assert set(told["seconds per GB"]) == {"to the device", "back"}
    assert set(told["speeds"]) == {"network", "forward", "decode", "encode", "upscale"}


def test_the_fit_finds_the_speeds_behind_the_seconds() -> None:
    rows = {str(flop): {"FLOP": flop, "seconds": 0.01 + 2e-12 * flop} for flop in (1e9, 8e9, 3e11)}
    plain = {str(flop): {"FLOP": flop, "seconds": 5e-12 * flop} for flop in (1e9, 8e9, 3e11)}
    found = parts.fitted({"network": rows, "decode": plain, "encode": plain, "upscale": plain})
    assert found == pytest.approx(
        {"network": 2e-12, "forward": 0.01, **dict.fromkeys(("decode", "encode", "upscale"), 5e-12)}
    )
