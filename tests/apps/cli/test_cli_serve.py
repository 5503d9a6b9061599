"""`mrflow serve` before there is a server: what is missing or taken is one sentence, and nothing is loaded for it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from mrflow_sched.apps.cli import serve

KEY = "a-key-that-nobody-guesses"


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> Any:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(serve, "load", load)
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)


def test_without_fastapi_the_sentence_names_the_extra(mrflow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda _: None)
    code, out, err = mrflow("serve")
    assert (code, out) == (2, "")
    assert err == "mrflow: mrflow serve needs the package fastapi; pip install 'mrflow-sched[serve]'.\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--port", "65536"), "argument --port"),
        (("--queue", "-1"), "argument --queue"),
        (("--max-images", "0"), "argument --max-images"),
        (("--max-size", "big"), "argument --max-size"),
        (("--timeout", "nan"), "argument --timeout"),
        (("--keep", "-1"), "argument --keep: '-1' is not a number of seconds"),
        (("--host", "no.such.host.invalid"), "--host is 'no.such.host.invalid', which is no address of this machine"),
        (("--api-key-file", "nothing"), "--api-key-file 'nothing' cannot be read (no such file or directory)"),
        (("--host", "0.0.0.0", "--port", "0"), "--host is '0.0.0.0', which other machines can reach, so an API key"),
    ],
)
def test_what_cannot_be_served_is_a_sentence(
    mrflow: Any, words: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    monkeypatch.chdir(tmp_path)
    code, _, err = mrflow("serve", *words)
    assert code == 2
    assert sentence in err


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(mrflow: Any) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, err = mrflow("serve", "--port", str(port))
    assert code == 2
    assert err.startswith(f"mrflow: --port is {port}, which cannot be used (address already in use)")


@pytest.mark.parametrize("text", ["", "short", "x" * 5000, "a key with spaces in it", "ключ" * 10, "a" * 20 + "\x07"])
def test_a_key_that_no_header_holds_or_that_is_short_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "key"
    file.write_text(text, "utf-8")
    with pytest.raises(serve.MrFlowError, match="must hold a key of 16 to 4096 ASCII letters") as refused:
        serve.read_key(file)
    assert len(text) < 8 or text not in str(refused.value)


def test_a_key_comes_from_its_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve.read_key(None) is None
    monkeypatch.setenv(serve.KEY_VARIABLE, KEY + "-env")
    assert serve.read_key(None) == KEY + "-env"
    (tmp_path / "key").write_text(f"  {KEY}\n")
    assert serve.read_key(tmp_path / "key") == KEY


def test_a_key_is_never_shown() -> None:
    assert KEY not in repr(serve.Access(KEY, None))


def test_names_are_checked_on_the_loopback_and_where_some_are_given() -> None:
    pytest.importorskip("uvicorn")
    model = serve.ModelChoices()
    for host, names, expected in (
        ("127.0.0.1", (), True),
        ("localhost", ("images.example",), True),
        ("0.0.0.0", (), False),
        ("0.0.0.0", ("images.example",), True),
    ):
        from mrflow_sched.apps.web import listening

        request = serve.ServeRequest(model, host, 0, names=names)
        with listening(0, host) as taken:
            access = serve.access_of(request, taken, KEY)
        assert (access.names is not None) == expected
        assert set(names) <= set(access.names or names)
