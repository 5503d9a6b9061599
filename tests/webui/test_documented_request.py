"""The curl command of docs/webui.md, run by curl against a host's double that listens on the same route."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from documented_request import command, send
from doubles import Flux, Sd3Model, WebUI, close, levels

from mrflow_sched.apps.webui.controls import FIELDS, Controls

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@contextmanager
def listening(ui: WebUI) -> Generator[str, None, None]:
    """The double as an API on a free port of the loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/sdapi/v1/txt2img"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent = body.pop("alwayson_scripts")["mrflow"]["args"]
            # Hosts put what was sent in front of the page's defaults.
            defaults = [getattr(Controls(), name) for name in FIELDS]
            body.pop("scheduler")
            made = ui.generate(ui.job(**body), *sent, *defaults[len(sent) :])
            answer = {"sizes": [list(image.shape[1:]) for image in made.images], "infotexts": made.infotexts}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@needs_curl
@pytest.mark.parametrize("kind", ["a1111", "forge", "neo"])
def test_the_documented_command_makes_a_staged_picture(kind: str) -> None:
    ui = WebUI(kind, Sd3Model() if kind == "a1111" else Flux(neo=kind == "neo"))
    with listening(ui) as address:
        answer = send(address)
    assert answer["sizes"] == [[1024, 1024]]
    assert "MrFlow" in str(answer["infotexts"])
    assert len(levels(ui, "first")) == 12
    assert close(levels(ui, "hires"), [0.12])
    assert not ui.errors


def test_the_documented_command_names_only_real_controls() -> None:
    body = json.loads(command()[command().index("-d") + 1])
    (sent,) = body["alwayson_scripts"]["mrflow"]["args"]
    assert set(sent) <= set(FIELDS)
