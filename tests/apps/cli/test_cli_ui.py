"""`mrflow ui` before there is a page: what is missing or taken is one sentence, and nothing is loaded for it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrflow_sched.apps.cli import ui


def test_without_gradio_the_sentence_names_the_extra(
    mrflow: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ui, "find_spec", lambda _: None)
    code, out, err = mrflow("ui", "--out", str(tmp_path / "out"))
    assert (code, out) == (2, "")
    assert err == "mrflow: mrflow ui needs the package gradio; pip install 'mrflow-sched[ui]'.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("port", ["65536", "-1", "page"])
def test_a_port_is_a_number(mrflow: Any, port: str) -> None:
    code, _, err = mrflow("ui", "--port", port)
    assert code == 2
    assert err.startswith("mrflow: argument --port")


def refused_to_load(*_: Any) -> Any:
    raise AssertionError("something was loaded")


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(
    mrflow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("gradio")
    monkeypatch.setattr(ui, "load", refused_to_load)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, err = mrflow("ui", "--port", str(port), "--out", str(tmp_path / "out"))
    assert code == 2
    assert err.startswith(f"mrflow: --port is {port}, which cannot be used (address already in use)")
    assert not (tmp_path / "out").exists()
