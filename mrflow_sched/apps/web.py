"""A server of HTTP in this process: the port that it takes, whose requests it answers, and how it ends."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mrflow_sched._runtime.errors import MrFlowError, quoted

__all__ = ["LOOPBACK", "address_of", "is_loopback", "listening", "own_origin", "serve"]

LOOPBACK = "127.0.0.1"
"""The address that no other machine can reach."""
_PATIENCE = 5.0
"""Seconds that the server has to send what it has begun."""


def listening(port: int, host: str = LOOPBACK) -> socket.socket:
    """Take a port.

    Args:
        port: 1 to 65535, or 0 for any that is free.
        host: The address, or a name of this machine.

    Returns:
        The socket that the server is to use.

    Raises:
        MrFlowError: There is no such address here, another program uses the port, or this user may not.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise MrFlowError(
            f"--host is {quoted(host)}, which is no address of this machine; give one, such as {LOOPBACK}, or 0.0.0.0 "
            "for all."
        ) from error
    kind, _, _, _, address = found[0]
    taken = socket.socket(kind, socket.SOCK_STREAM)
    if os.name == "posix":  # elsewhere the option lets two programs share a port
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
        taken.listen()
    except OSError as error:
        taken.close()
        reason = (error.strerror or str(error)).lower()
        where = "" if host == LOOPBACK else f" at --host {quoted(host)}"
        raise MrFlowError(
            f"--port is {port}, which cannot be used{where} ({reason}); give another, or 0 for a free one."
        ) from error
    return taken


def is_loopback(taken: socket.socket) -> bool:
    """Whether only this machine can reach a socket.

    Args:
        taken: From `listening`.

    Returns:
        True for an address of 127.0.0.0/8, and for ::1.
    """
    return ipaddress.ip_address(str(taken.getsockname()[0]).partition("%")[0]).is_loopback


def address_of(taken: socket.socket) -> str:
    """The address of a socket for a browser.

    Args:
        taken: From `listening`.

    Returns:
        Such as "http://127.0.0.1:7870".
    """
    host, port, *_ = taken.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def own_origin(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request comes from a page of this very server, or from no page at all.

    Args:
        headers: Of the request, by their names in lower case.

    Returns:
        False where the page of another site asks.
    """
    host = headers.get(b"host", b"")
    return headers.get(b"origin") in (None, b"http://" + host, b"https://" + host)


def serve(
    app: Any,
    taken: socket.socket,
    ready: Callable[[str], object],
    check: Callable[[], object],
    closing: Callable[[], object] = lambda: None,
    *,
    connections: int | None = None,
    arrival: float | None = None,
) -> None:
    """Serve until Ctrl-C, which passes through.

    Args:
        app: An ASGI application.
        taken: From `listening`.
        ready: Called with the address once it answers.
        check: Called again and again; raises where the process is to end.
        closing: Called before the server ends, which answers until it returns.
        connections: Most connections at once; None: no limit.
        arrival: Seconds in which a request's head must have arrived, else its connection is closed; None: no limit.

    Raises:
        MrFlowError: The server ended by itself.
    """
    http = "auto" if arrival is None else _within(arrival)
    config = uvicorn.Config(
        app, http=http, log_level="warning", timeout_graceful_shutdown=1, limit_concurrency=connections
    )
    server = uvicorn.Server(config)
    # Not in the main thread, where uvicorn would take the signals for itself.
    ended = threading.Event()  # a thread that is joined counts as ended once a signal has interrupted the join
    threading.Thread(target=_run, args=(server, taken, ended), daemon=True).start()
    try:
        while not (server.started or ended.wait(0.02)):
            check()
        if server.started:
            ready(address_of(taken))
        while not ended.wait(0.2):
            check()
    finally:
        try:
            closing()
        finally:
            # Streams that are cut off now are no faults.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            server.should_exit = True
            ended.wait(_PATIENCE)
    raise MrFlowError("the server ended by itself; the lines above may say why.")


def _within(seconds: float) -> type[asyncio.Protocol]:
    """A protocol that closes a connection whose next request has not begun in time.

    That of uvicorn limits only the silence between two requests: a byte now and then, or none at all before the first,
    keeps its connections open for ever.

    Args:
        seconds: From the connection, or from the first byte after an answer, to the end of a request's head.

    Returns:
        The protocol.
    """

    class Within(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _is_between(self) -> bool:
            cycle: Any = self.cycle
            return cycle is None or cycle.response_complete

        def _watch(self) -> None:
            if not self._is_between():
                self._forget()
            elif self._late is None:
                self._late = self.loop.call_later(seconds, self._close)

        def _forget(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _close(self) -> None:
            self._late = None
            if self._is_between():
                self.transport.close()

    return Within


def _run(server: uvicorn.Server, taken: socket.socket, ended: threading.Event) -> None:
    try:
        server.run(sockets=[taken])
    finally:
        ended.set()
