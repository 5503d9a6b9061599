"""What the tests of the command line share."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mrflow_sched.apps.cli import load
from mrflow_sched.images.record import RunRecord

SMALL = ("--size", "32x32", "--low-steps", "3", "--refine-steps", "1", "--dtype", "float32", "--device", "cpu")

RECORD = RunRecord(
    plan="p",
    prompt="a star",
    negative=None,
    seed=1,
    batch=1,
    image=0,
    model="embedded",
    model_fingerprint="f",
    upscaler="lanczos",
    upscaler_sha256=None,
    device="cpu",
    dtype="float32",
    vae_dtype="float32",
    threads=1,
    versions={},
)


def pixels(path: Path | str) -> Any:
    """(H, W, 3) bytes of an image file."""
    with Image.open(path) as image:
        return np.array(image)


def change_engines(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object]) -> None:
    """Let `change` work on every engine that a command loads from now on."""
    usual = load.load_engine

    def load_engine(*given: Any, **named: Any) -> Any:
        engine = usual(*given, **named)
        change(engine)
        return engine

    monkeypatch.setattr(load, "load_engine", load_engine)


def watch_network(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object]) -> None:
    """Call `before(number)` before every evaluation of FLUX.1's network, counted from 1."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    kind: Any = FluxTransformer2DModel
    usual, count = kind.forward, [0]

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        count[0] += 1
        before(count[0])
        return usual(self, *given, **named)

    monkeypatch.setattr(kind, "forward", forward)


SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
