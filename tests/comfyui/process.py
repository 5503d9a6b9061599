"""Starts a ComfyUI on the loopback with this checkout as a node pack, and a base directory of its own.

The environment says which one: MRFLOW_COMFYUI_ROOT (its folder), MRFLOW_COMFYUI_PYTHON (default:
<root>/venv/bin/python) and MRFLOW_COMFYUI_ARGS (more arguments; `--cpu` is added where its torch sees no CUDA). Nothing
in its folder changes: node packs, models, pictures and the database lie in a temporary folder.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

REPOSITORY = Path(__file__).parents[2]
RECORDER = Path(__file__).parent / "recorder_pack"
START = Path(__file__).parent / "start_comfyui.py"
X2 = REPOSITORY / "mrflow_sched" / "demo" / "weights" / "upscaler" / "x2.safetensors"
X2_NAME = "mrflow_demo_x2.safetensors"
START_SECONDS = 600.0
# Beside what the caller's environment says; the pack must not find the checkout by PYTHONPATH.
SETTINGS: Mapping[str, str] = {
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONSAFEPATH": "1",
}


@dataclass(frozen=True)
class Installation:
    """Where a ComfyUI lies and how it is started."""

    root: Path
    python: Path
    arguments: tuple[str, ...]

    @property
    def version(self) -> str:
        """As its own file says, "0.33.0"."""
        text = (self.root / "comfyui_version.py").read_text("utf-8")
        return text.rpartition("__version__")[2].strip(' ="\n')

    def command(self, port: int, base: Path) -> list[str]:
        """The page on `port` of the loopback, all that it reads or writes in `base`."""
        where = ["--base-directory", str(base), "--database-url", f"sqlite:///{base / 'comfyui.db'}"]
        quiet = ["--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch", "--disable-api-nodes"]
        quiet += ["--preview-method", "latent2rgb"]
        start = [str(self.python), str(START), str(REPOSITORY), str(self.root / "main.py")]
        return [*start, *where, *quiet, *self._processor(), *self.arguments]

    def _processor(self) -> list[str]:
        test = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
        found = subprocess.run([str(self.python), "-c", test], cwd=self.root, capture_output=True, check=False)
        return [] if found.returncode == 0 else ["--cpu"]


def find_installation(environment: Mapping[str, str]) -> tuple[Installation | None, str]:
    """The ComfyUI that the environment names, or None and one sentence why there is none."""
    named = environment.get("MRFLOW_COMFYUI_ROOT", "")
    if not named:
        return None, "no ComfyUI: set MRFLOW_COMFYUI_ROOT to the folder of an installed one to run these tests on it."
    root = Path(named).expanduser().resolve()
    if not (root / "comfyui_version.py").is_file():
        return None, f"MRFLOW_COMFYUI_ROOT={named!r} holds no comfyui_version.py; name the folder of a ComfyUI."
    python = Path(environment.get("MRFLOW_COMFYUI_PYTHON") or root / "venv" / "bin" / "python")
    if not python.is_file():
        return None, f"ComfyUI's Python {str(python)!r} does not exist; set MRFLOW_COMFYUI_PYTHON to it."
    return Installation(root, python, tuple(shlex.split(environment.get("MRFLOW_COMFYUI_ARGS", "")))), ""


INSTALLATION, REASON = find_installation(os.environ)


def kinds() -> list[str]:
    """Every class of model that this ComfyUI knows."""
    assert INSTALLATION is not None
    text = (INSTALLATION.root / "comfy" / "supported_models.py").read_text("utf-8")
    lists = re.findall(r"^models \+?= \[([^]]*)\]", text, re.MULTILINE)
    return [name for listed in lists for name in re.findall(r"\w+", listed)]


class Refused(Exception):
    """ComfyUI answered with an error: its status and what it said."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {body[:3000]}")
        self.status, self.body = status, body

    @property
    def said(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)


@dataclass
class Server:
    """A running ComfyUI. `start` waits until it answers, `stop` ends it.

    Attributes:
        installation: What is started.
        base: Its base directory; made by `start`.
        folder: What the pack's folder is called.
        packs: Further node packs: folder name to source folder.
        environment: More environment variables.
        start_log: What it printed until it was ready.
    """

    installation: Installation
    base: Path
    folder: str = "mrflow-sched"
    packs: Mapping[str, Path] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    start_log: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _log: IO[bytes] | None = None
    _port: int = 0

    # --------------------------------------------------------------------------------------------------------- life

    def start(self) -> None:
        self._place()
        self._port = _free_port()
        paths = [self.environment.get("PYTHONPATH", ""), str(self.installation.root)]
        environment = {**os.environ, **SETTINGS, **self.environment, "MRFLOW_RECORDER_FILE": str(self.recorded)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["MRFLOW_RECORDER_SAVED"] = str(self.saved)
        self._log = (self.base / "server.log").open("ab")
        self._process = subprocess.Popen(
            self.installation.command(self._port, self.base),
            cwd=self.base,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._await_ready()
        self.start_log = self.log()

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(20)
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _place(self) -> None:
        for name in ("custom_nodes", "models/upscale_models", "input", "output", "temp", "user", "saved"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        packs = {"mrflow_recorder": RECORDER, **self.packs}
        for name, source in packs.items():
            shutil.copytree(source, self.base / "custom_nodes" / name, ignore=shutil.ignore_patterns("__pycache__"))
        copy_checkout(self.base / "custom_nodes" / self.folder)
        shutil.copyfile(X2, self.base / "models" / "upscale_models" / X2_NAME)

    def _await_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while True:
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended while starting:\n{self.log()[-4000:]}")
            try:
                self.get("/system_stats")
            except OSError:
                pass
            else:
                return
            if time.monotonic() > end:
                raise RuntimeError(f"ComfyUI was not ready after {START_SECONDS:.0f} s:\n{self.log()[-4000:]}")
            time.sleep(0.5)

    # ------------------------------------------------------------------------------------------------------- files

    @property
    def recorded(self) -> Path:
        """JSON lines of what the recorder pack saw."""
        return self.base / "recorded.jsonl"

    @property
    def saved(self) -> Path:
        """Where the recorder's save node puts its files."""
        return self.base / "saved"

    def log(self) -> str:
        path = self.base / "server.log"
        return path.read_text("utf-8", "replace") if path.is_file() else ""

    def memory(self) -> int:
        """Bytes of main memory that the process holds."""
        assert self._process is not None
        return psutil.Process(self._process.pid).memory_info().rss

    # -------------------------------------------------------------------------------------------------------- HTTP

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def get(self, path: str) -> Any:
        return json.loads(self.read(path))

    def read(self, path: str) -> bytes:
        return self._send(urllib.request.Request(self.address + path))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        data = json.dumps(body).encode("utf-8")
        sent = self._send(urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}))
        return json.loads(sent) if sent else None

    def _send(self, request: urllib.request.Request) -> bytes:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as reply:
                return reply.read()
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode("utf-8", "replace")) from error


def copy_checkout(target: Path) -> None:
    """The files that a clone would hold, as they lie in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode("utf-8").split("\0")):
        if (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, target / name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
