"""What stands before every route: whose requests are answered, and what every answer says to browsers."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from typing import Any

from starlette.responses import JSONResponse

from mrflow_sched.apps.serve.limits import Refused
from mrflow_sched.apps.serve.metrics import Metrics
from mrflow_sched.apps.web import own_origin

__all__ = ["KEYLESS", "Guard", "answer"]

KEYLESS = ("/health", "/v1/files/")
"""Beginnings of paths for which no key is asked: whether the server is there, and links that cannot be guessed."""

_SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


def answer(refused: Refused) -> JSONResponse:
    """A refusal as an answer.

    Args:
        refused: The refusal.

    Returns:
        JSON with OpenAI's "error". Their client is told which failures to try again: only what passes by itself.
    """
    headers = {} if refused.retry_after is None else {"retry-after": str(refused.retry_after)}
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    headers["x-should-retry"] = "true" if refused.status in (429, 503) else "false"
    return JSONResponse({"error": refused.value}, refused.status, headers)


class Guard:
    """Refuses other names of this machine, pages of other sites, and whoever lacks the key."""

    def __init__(self, app: Any, *, names: Collection[str] | None, key: str | None, metrics: Metrics) -> None:
        """Stand before an application.

        Args:
            app: The application.
            names: By which the server is asked, without ports; None: any.
            key: That clients must send; None: none.
            metrics: Counts refusals.
        """
        self._app = app
        self._names = None if names is None else {name.lower() for name in names}
        self._key = None if key is None else _digest(key.encode())
        self._metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request.

        Args:
            scope: As ASGI has it, as all that follow.
            receive: Likewise.
            send: Likewise.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_SAFE]}
            await send(message)

        refused = self._refusal(scope["path"], dict(scope["headers"]))
        if refused is None:
            await self._app(scope, receive, sending)
            return
        self._metrics.refuse(refused.code)
        await answer(refused)(scope, receive, sending)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> Refused | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._names is not None and _without_port(host) not in self._names:
            return Refused(
                403,
                "foreign_host",
                "this server is not asked by the name in the header Host; give mrflow serve --allow-host NAME.",
            )
        if not own_origin(headers):
            return Refused(403, "foreign_origin", "requests of other sites' pages are not answered.")
        if self._key is None or path == KEYLESS[0] or path.startswith(KEYLESS[1]):
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and secrets.compare_digest(_digest(given.strip()), self._key):
            return None
        return Refused(401, "wrong_key", "the API key is missing or wrong; send the header Authorization: Bearer KEY.")


def _digest(key: bytes) -> bytes:
    """Of one length for every key, so that comparing tells nothing of the length."""
    return hashlib.sha256(key).digest()


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
