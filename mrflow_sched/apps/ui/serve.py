"""The server of the page: on the loopback address only, and nothing that a browser shows comes from elsewhere."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from mrflow_sched._runtime.errors import MrFlowError

HOST = "127.0.0.1"
"""The only address that is served: other machines cannot reach it."""
_PATIENCE = 5.0
"""Seconds that the server has to send what it has begun."""
_NAMES = [HOST, "localhost"]
_ONLY_OURS = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)


def listening(port: int) -> socket.socket:
    """Take a port of the loopback address.

    Args:
        port: 1 to 65535, or 0 for any that is free.

    Returns:
        The socket that the server is to use.

    Raises:
        MrFlowError: Another program uses the port, or this user may not.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name == "posix":  # elsewhere the option lets two programs share a port
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
        found.listen()
    except OSError as error:
        found.close()
        reason = (error.strerror or str(error)).lower()
        raise MrFlowError(
            f"--port is {port}, which cannot be used ({reason}); give another, or 0 for a free one."
        ) from error
    return found


def application(mount: Callable[[FastAPI], FastAPI]) -> FastAPI:
    """The page with what keeps it to this machine: one policy for every answer, and our own names only.

    Args:
        mount: Puts the page on an application.

    Returns:
        What a server runs.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Policy)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=_NAMES)
    return mount(app)


class _Policy:
    """Refuses what another site's page asks for, and adds the policy to every answer, streams included."""

    def __init__(self, app: Any) -> None:
        """Stand before an application.

        Args:
            app: The application.
        """
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request.

        Args:
            scope: As ASGI has it, as all that follow.
            receive: Likewise.
            send: Likewise.
        """
        asked: dict[bytes, bytes] = dict(scope.get("headers", ()))
        if asked.get(b"origin") not in (None, b"http://" + asked.get(b"host", b"")):
            await PlainTextResponse("Only this page's own requests are answered.", 403)(scope, receive, send)
            return

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                ours = [(b"content-security-policy", _ONLY_OURS.encode()), (b"referrer-policy", b"same-origin")]
                message = {**message, "headers": [*message.get("headers", ()), *ours]}
            await send(message)

        await self._app(scope, receive, sending)


def _run(server: uvicorn.Server, taken: socket.socket, ended: threading.Event) -> None:
    try:
        server.run(sockets=[taken])
    finally:
        ended.set()


def serve(app: FastAPI, taken: socket.socket, ready: Callable[[str], object], check: Callable[[], object]) -> None:
    """Serve until Ctrl-C, which passes through.

    Args:
        app: The page.
        taken: From `listening`.
        ready: Called with the address once the page answers.
        check: Called again and again; raises where the process is to end.

    Raises:
        MrFlowError: The server ended by itself.
    """
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    # Not in the main thread, where uvicorn would take the signals for itself.
    ended = threading.Event()  # a thread that is joined counts as ended once a signal has interrupted the join
    threading.Thread(target=_run, args=(server, taken, ended), daemon=True).start()
    try:
        while not (server.started or ended.wait(0.02)):
            check()
        if server.started:
            ready(f"http://{HOST}:{taken.getsockname()[1]}")
        while not ended.wait(0.2):
            check()
    finally:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # streams that are cut off now are no faults
        server.should_exit = True
        ended.wait(_PATIENCE)
    raise MrFlowError("the server of the page ended by itself; the lines above may say why.")
