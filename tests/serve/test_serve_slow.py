"""Clients that send their request a byte at a time, over real sockets to a real server: none holds a connection."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from serve_tools import Press, failure, until

from mrflow_sched.apps import web
from mrflow_sched.apps.serve.jobs import Jobs
from mrflow_sched.apps.serve.limits import Limits
from mrflow_sched.apps.serve.routes import application

SECONDS = 1.0
HEAD = b"POST /v1/images HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


class End(Exception):
    """Ends the server."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a server that gives a request's head and its body a second each."""
    jobs = Jobs(Press(held=False), failure, Limits(pixels=64, arrival=SECONDS))
    served: Any = SimpleNamespace(name="none")
    taken, ready, over = web.listening(0), threading.Event(), threading.Event()

    def check() -> None:
        if over.is_set():
            raise End

    def run() -> None:
        app = application(served, jobs)
        with pytest.raises(End):
            web.serve(app, taken, lambda _: ready.set(), check, jobs.close, connections=8, arrival=jobs.limits.arrival)

    server = threading.Thread(target=run)
    server.start()
    until(ready.is_set)
    yield taken.getsockname()[1]
    over.set()
    server.join(30)
    assert not server.is_alive()


def drip(client: socket.socket, text: bytes) -> tuple[float, bytes]:
    """Send a byte every tenth of a second until the server closes: (seconds, what it answered)."""
    began, answer = time.monotonic(), b""
    client.settimeout(0.1)
    for byte in text:
        assert time.monotonic() - began < 20 * SECONDS
        try:
            client.sendall(bytes([byte]))
            part = client.recv(65536)
        except TimeoutError:
            continue
        except ConnectionError:
            break
        answer += part
        if not part:
            break
    else:
        pytest.fail("the server waited for the last byte")
    return time.monotonic() - began, answer


@pytest.mark.parametrize(
    ("at_once", "slow", "status"),
    [
        (b"", HEALTH + b"X-Long: " + b"a" * 1000, b""),
        (HEALTH, b"X-Long: " + b"a" * 1000, b""),
        (HEALTH + b"\r\n", HEALTH + b"X-Long: " + b"a" * 1000, b"200"),  # an answer, and the next request
        (HEAD, b"a" * 1000, b"408"),
        (HEAD.replace(b"POST", b"GET"), b"a" * 1000, b"405"),  # whose body nobody reads
        (HEAD.replace(b"Content-Length: 5000", b"Transfer-Encoding: chunked"), b"1\r\na\r\n" * 300, b"408"),
    ],
)
def test_a_request_that_comes_byte_by_byte_loses_its_connection(
    port: int, at_once: bytes, slow: bytes, status: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(at_once)
        seconds, answer = drip(client, slow)
    assert 0.8 * SECONDS < seconds < 10 * SECONDS
    assert answer[9:12] == status


def test_slow_clients_do_not_keep_others_out_for_long(port: int) -> None:
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
    for each in slow:
        each.sendall(HEALTH)

    def health() -> bytes:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(HEALTH + b"\r\n")
            return client.recv(65536)[9:12]

    assert health() == b"503"
    until(lambda: health() == b"200", 10 * SECONDS)
    for each in slow:
        each.close()


def test_a_request_in_time_and_a_connection_that_is_used_again_are_answered(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        for _ in range(4):
            client.sendall(HEALTH)
            time.sleep(0.4 * SECONDS)
            client.sendall(b"\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += client.recv(65536)
            assert b"200 OK" in answer
