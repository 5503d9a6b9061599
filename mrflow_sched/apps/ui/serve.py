"""The page for this machine's own names only; nothing that a browser shows comes from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from mrflow_sched.apps.web import LOOPBACK, own_origin

_NAMES = [LOOPBACK, "localhost"]
_ONLY_OURS = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)


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
        if not own_origin(dict(scope.get("headers", ()))):
            await PlainTextResponse("Only this page's own requests are answered.", 403)(scope, receive, send)
            return

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                ours = [(b"content-security-policy", _ONLY_OURS.encode()), (b"referrer-policy", b"same-origin")]
                message = {**message, "headers": [*message.get("headers", ()), *ours]}
            await send(message)

        await self._app(scope, receive, sending)
