"""The routes of the API."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mrflow_sched._runtime.errors import shown as shown_text
from mrflow_sched.apps.serve.guard import Guard, answer
from mrflow_sched.apps.serve.jobs import ENDED, Event, Job, Jobs, shown
from mrflow_sched.apps.serve.limits import Limits, Refused
from mrflow_sched.apps.serve.requests import read_request
from mrflow_sched.apps.serve.served import FAULT, Offered, Served, failure_of, make_image

__all__ = ["application", "jobs_of"]

_HEARTBEAT = 15.0
"""Seconds after which a stream without events says that it is still there."""
_GONE = 499
"""Status for a client that went away; nobody reads it."""


def jobs_of(served: Served, limits: Limits) -> Jobs:
    """The queue of a model.

    Args:
        served: The model.
        limits: What is taken at most.

    Returns:
        The queue, whose thread waits for jobs.
    """
    return Jobs(partial(make_image, served), partial(failure_of, served), limits)


def application(
    served: Offered, jobs: Jobs, *, names: Collection[str] | None = None, key: str | None = None
) -> FastAPI:
    """The API.

    Args:
        served: The model.
        jobs: Its queue.
        names: By which the server is asked, without ports; None: any.
        key: That clients must send; None: none.

    Returns:
        What a server runs.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, names=names, key=key, metrics=jobs.metrics)
    _Routes(served, jobs).add_to(app)
    return app


class _Routes:
    """What is answered on each route."""

    def __init__(self, served: Offered, jobs: Jobs) -> None:
        """Answer for a model.

        Args:
            served: The model.
            jobs: Its queue.
        """
        self._served = served
        self._jobs = jobs

    def add_to(self, app: FastAPI) -> None:
        """Add every route to an application.

        Args:
            app: The application.
        """
        for path, method, handler in (
            ("/v1/images", "POST", self._images),
            ("/v1/images/generations", "POST", self._images),
            ("/v1/jobs", "POST", self._submit),
            ("/v1/jobs/{name}", "GET", self._job),
            ("/v1/jobs/{name}", "DELETE", self._cancel),
            ("/v1/jobs/{name}/events", "GET", self._events),
            ("/v1/files/{token}/{file}", "GET", self._file),
            ("/v1/models", "GET", self._models),
            ("/health", "GET", self._health),
            ("/metrics", "GET", self._metrics),
        ):
            app.add_api_route(path, handler, methods=[method], response_model=None)
        app.add_exception_handler(Refused, self._refuse)
        app.add_exception_handler(HTTPException, self._refuse_path)
        app.add_exception_handler(Exception, self._fault)

    async def _images(self, request: Request) -> Response:
        """Make images and answer with them; the client waits."""
        try:
            job = await self._submitted(request, kept=False)
        except ClientDisconnect:
            return Response(status_code=_GONE)
        try:
            if not await self._waited_for(job, request):
                return Response(status_code=_GONE)
        finally:
            self._jobs.cancel(job, Refused(409, "cancelled", "the client that waited for the job went away."))
        if job.error is not None:
            raise _told(job.error)
        within = job.asked.form == "b64_json"
        view = self._jobs.view(job, _base(request))
        value: dict[str, Any] = {
            "created": int(job.created),
            "data": [shown(job, index, _base(request), within=within) for index in range(len(job.images))],
            "mrflow": {name: view[name] for name in ("plan", "notes", "seconds", "expires")},
        }
        if within:
            value["mrflow"]["expires"] = None
            self._jobs.forget(job)
        return JSONResponse(value)

    async def _submit(self, request: Request) -> Response:
        """Put a job into the queue."""
        try:
            job = await self._submitted(request, kept=True)
        except ClientDisconnect:
            return Response(status_code=_GONE)
        view = self._jobs.view(job, _base(request))
        return JSONResponse(view, 202, {"location": f"/v1/jobs/{job.id}"})

    async def _job(self, name: str, request: Request) -> Response:
        """Tell where a job stands."""
        return JSONResponse(self._jobs.view(self._found(name), _base(request), inside=True))

    async def _cancel(self, name: str, request: Request) -> Response:
        """Cancel a job, or drop one that has ended."""
        job = self._found(name)
        if job.is_over:
            self._jobs.forget(job)
        else:
            self._jobs.cancel(job)
        return JSONResponse(self._jobs.view(job, _base(request)))

    async def _events(self, name: str, request: Request) -> Response:
        """Stream what happens to a job."""
        job, last = self._found(name), request.headers.get("last-event-id", "0")
        after = int(last) if last.isascii() and last.isdigit() and len(last) < 12 else 0
        stream = self._stream(job, after, _base(request))
        return StreamingResponse(stream, media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    async def _file(self, token: str, file: str) -> Response:
        """Give an image."""
        number = file.removesuffix(".png")
        known = file.endswith(".png") and number.isascii() and number.isdigit() and len(number) < 6 and token.isascii()
        found = self._jobs.file(token, int(number)) if known else None
        if found is None:
            raise Refused(404, "not_found", "there is no such image, or it has expired; make it again.")
        return Response(found, media_type="image/png")

    async def _models(self) -> Response:
        """Name the model."""
        entry = {"id": self._served.name, "object": "model", "created": 0, "owned_by": "mrflow"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def _health(self) -> Response:
        """Tell whether jobs are taken."""
        is_open = self._jobs.is_open
        return JSONResponse({"status": "ok" if is_open else "stopping"}, 200 if is_open else 503)

    async def _metrics(self) -> Response:
        """Tell what was counted."""
        text = self._jobs.metrics.text(self._jobs.gauges())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _refuse(self, _request: Request, error: Any) -> Response:
        """Answer with a refusal."""
        return answer(error)

    async def _refuse_path(self, request: Request, error: Any) -> Response:
        """Answer to a path or a method that there is not."""
        code = {404: "not_found", 405: "not_allowed"}.get(error.status_code, "refused")
        what = shown_text(f"{request.method} {request.url.path}")
        routes = "POST /v1/images/generations, POST /v1/jobs, GET /v1/models, GET /health and GET /metrics"
        sentence = f"there is no {what}; there are {routes}." if code != "refused" else shown_text(error.detail)
        return answer(Refused(error.status_code, code, sentence))

    async def _fault(self, _request: Request, _error: Any) -> Response:
        """Answer where something broke; the server itself shows the traceback."""
        return answer(Refused(500, "fault", FAULT))

    # ------------------------------------------------------------------------------------------------ the parts

    def _found(self, name: str) -> Job:
        job = self._jobs.get(name)
        if job is None:
            raise Refused(404, "not_found", f"there is no job {shown_text(name)!r}, or it has expired.")
        return job

    async def _submitted(self, request: Request, *, kept: bool) -> Job:
        """Read a request and put it into the queue; what is refused is counted."""
        try:
            data = await self._body(request)
            asked = await run_in_threadpool(read_request, data, self._served, self._jobs.limits)
            return self._jobs.submit(asked, kept=kept)
        except Refused as refused:
            self._jobs.metrics.refuse(refused.code)
            raise

    async def _body(self, request: Request) -> bytes:
        """The body of a request, no larger and no slower than the limits allow."""
        limits = self._jobs.limits
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what the form of a foreign page can send is something else
            raise Refused(415, "not_json", "the request is not declared as JSON; send Content-Type: application/json.")
        large = Refused(413, "too_large", f"the request has more than {limits.body} bytes, the most that are taken.")
        declared = request.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > limits.body):
            raise large

        async def read() -> bytes:
            data = bytearray()
            async for part in request.stream():
                data += part
                if len(data) > limits.body:
                    raise large
            return bytes(data)

        try:
            return await asyncio.wait_for(read(), limits.arrival)
        except asyncio.TimeoutError as error:
            sentence = f"the request did not arrive within {limits.arrival:g} seconds."
            raise Refused(408, "too_slow", sentence) from error

    async def _waited_for(self, job: Job, request: Request) -> bool:
        """Wait for a job's end; False: its client went away first."""
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            async with _following(self._jobs, job) as changed:
                while not job.is_over:
                    changed.clear()
                    if job.is_over:
                        break
                    waiting = asyncio.ensure_future(changed.wait())
                    await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
                    waiting.cancel()
                    if gone.done() and not job.is_over:
                        return False
            return True
        finally:
            gone.cancel()

    async def _stream(self, job: Job, after: int, base: str) -> AsyncIterator[str]:
        """Events of a job as a browser's EventSource reads them, until it has ended."""
        async with _following(self._jobs, job) as changed:
            while True:
                changed.clear()
                for event in self._jobs.events(job, after):
                    after = event.number
                    yield self._written(job, event, base)
                    if event.name in ENDED:
                        return
                if job.is_over and not self._jobs.events(job, after):
                    return
                try:
                    await asyncio.wait_for(changed.wait(), _HEARTBEAT)
                except asyncio.TimeoutError:
                    yield ": still here\n\n"

    def _written(self, job: Job, event: Event, base: str) -> str:
        data = self._jobs.view(job, base) if event.name in ENDED else event.data
        if "url" in data:
            data = {**data, "url": base + data["url"]}
        return f"id: {event.number}\nevent: {event.name}\ndata: {json.dumps(data)}\n\n"


@contextlib.asynccontextmanager
async def _following(jobs: Jobs, job: Job) -> AsyncGenerator[asyncio.Event, None]:
    """An event of asyncio that is set after each event of a job, which happens in another thread."""
    changed, loop = asyncio.Event(), asyncio.get_running_loop()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(changed.set)

    with jobs.heard(job, wake):
        yield changed


async def _disconnected(request: Request) -> None:
    """Return when the client has gone; its request was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _base(request: Request) -> str:
    return str(request.base_url).rstrip("/")


def _told(error: Refused) -> Refused:
    """A copy, as an exception that is raised twice grows."""
    return Refused(error.status, error.code, str(error), param=error.param, retry_after=error.retry_after)
