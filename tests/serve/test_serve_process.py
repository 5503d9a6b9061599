"""The server as a process, over a socket: clients that go away, signals, slow requests, many at once."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from serve_tools import KEY, SMALL, Process, until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
LONG = {**SMALL, "size": "128x128", "n": 10, "mrflow": {"low_steps": 200, "refine_steps": 1}}


def ask(server: Process, method: str, path: str, value: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """(status, JSON or text, headers) of an answer."""
    connection = http.client.HTTPConnection(str(server.address).removeprefix("http://"), timeout=60)
    body = None if value is None else json.dumps(value)
    connection.request(method, path, body, {"content-type": "application/json", **headers})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    is_json = answer.headers.get_content_type() == "application/json"
    return answer.status, json.loads(text) if is_json else text, answer.headers


def metric(server: Process, name: str) -> float:
    lines = str(ask(server, "GET", "/metrics")[1]).splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} ")), 0.0)


@pytest.fixture
def server(tiny_folder: Path) -> Iterator[Process]:
    found = Process("--model", str(tiny_folder), "--queue", "2", "--grace", "1")
    yield found
    found.close()


def test_a_client_that_goes_away_ends_its_job_and_a_signal_ends_the_server(server: Process) -> None:
    status, value, _ = ask(server, "POST", "/v1/images/generations", SMALL)
    assert (status, len(value["data"])) == (200, 1)
    waiting = socket.create_connection(("127.0.0.1", int(str(server.address).rsplit(":", 1)[1])))
    body = json.dumps(LONG).encode()
    head = "POST /v1/images HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    waiting.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
    until(lambda: metric(server, "mrflow_jobs_running"))
    waiting.close()
    until(lambda: metric(server, 'mrflow_jobs_total{state="cancelled"}') == 1)
    assert ask(server, "POST", "/v1/images", SMALL)[0] == 200

    answers: list[tuple[int, Any, Any]] = []
    asking = [threading.Thread(target=lambda: answers.append(ask(server, "POST", "/v1/images", LONG))) for _ in "ab"]
    for each in asking:
        each.start()
    until(lambda: metric(server, "mrflow_jobs_waiting"))
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    for each in asking:
        each.join(30)
    assert server.process.wait(30) == 143
    assert time.monotonic() - began < 20
    assert [(status, value["error"]["code"]) for status, value, _ in answers] == [(503, "stopping")] * 2
    assert "Traceback" not in "".join(server.lines)


def test_the_client_of_the_page_makes_an_image(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "serve.md").read_text("utf-8")
    code = page.split("```python\n", 1)[1].split("```", 1)[0]
    assert len(code.strip().splitlines()) <= 10
    server = Process()
    try:
        unknown = ask(server, "POST", "/v1/images", {**SMALL, "prompt": "a zyxomorph over green hills"})[1]
        assert "zyxomorph" in str(unknown["mrflow"]["notes"])
        assert "zyxomorph" not in "".join(server.lines)
        code = code.replace("http://127.0.0.1:7871", str(server.address)).replace("256x256", "64x64")
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    finally:
        server.close()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "star-7.png").read_bytes().startswith(b"\x89PNG")


def test_a_key_is_asked_for_at_every_address_but_the_loopback(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    words = ("--model", str(tiny_folder), "--host", "0.0.0.0", "--api-key-file", str(tmp_path / "key"))
    server = Process(*words)
    try:
        assert KEY not in "".join(server.lines)
        assert ask(server, "GET", "/health")[0] == 200
        assert ask(server, "POST", "/v1/images", SMALL)[0] == 401
        assert ask(server, "POST", "/v1/images", SMALL, authorization=f"Bearer {KEY}")[0] == 200
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 130
    finally:
        server.close()


def test_many_requests_at_once_are_all_answered_in_the_end(tmp_path: Path) -> None:
    """`python -m bench.serve`, small."""
    from bench import serve as bench

    words = ["--requests", "12", "--queue", "2", "--size", "64x64", "--steps", "2", "--check", "3"]
    assert bench.main([*words, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "serve.json").read_text())
    assert (found["requests"], found["done"], found["failed"], found["lost"], found["wrong"]) == (12, 12, 0, 0, 0)
    assert found["refused"] > 0
    assert all("try again in" in sentence for sentence in found["sentences"])
    assert (tmp_path / "serve.md").read_text().startswith("|")
