"""Starts an installed WebUI headless on the loopback, speaks to its API, and reads what the probe extension saw.

The environment says which one: MRFLOW_WEBUI_ROOT (its folder), MRFLOW_WEBUI_PYTHON (default: <root>/venv/bin/python),
MRFLOW_WEBUI_CHECKPOINT (the checkpoint's title or a part of it; default: the host's first) and MRFLOW_WEBUI_ARGS (more
command-line flags). The host gets settings files of its own in a temporary folder, so that the user's stay untouched.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
PROBE = Path(__file__).parent / "probe_extension"
PROBE_NAME = "zz_mrflow_probe"  # sorts last, so that its hooks see what the extension's left
EXTENSION_NAME = "mrflow-sched"  # as "Install from URL" calls it
X2 = REPOSITORY / "mrflow_sched" / "demo" / "weights" / "upscaler" / "x2.safetensors"
X2_NAME = "mrflow-test-x2"
READY = "Startup time:"
JOB_SECONDS = 900.0
# The user's own settings count, except for these. A live preview may want to fetch a model. Hosts undo a job's
# override of a setting only where the setting was saved before.
SETTINGS: Mapping[str, Any] = {
    "samples_save": False,
    "outdir_samples": "",
    "save_to_dirs": False,
    "grid_save": False,
    "save_txt": False,
    "live_previews_enable": False,
    "auto_launch_browser": "Disable",
    "CLIP_stop_at_last_layers": 1,
    "always_discard_next_to_last_sigma": False,
    "img2img_extra_noise": 0.0,
    "sgm_noise_multiplier": False,
    "randn_source": "GPU",
    "eta_noise_seed_delta": 0,
}


@dataclass(frozen=True)
class Installation:
    """Where a WebUI lies and how it is started."""

    root: Path
    python: Path
    checkpoint: str
    arguments: tuple[str, ...]

    @property
    def forge(self) -> bool:
        return (self.root / "modules_forge").is_dir()

    def command(self, port: int, folder: Path) -> list[str]:
        """API and page on `port` of the loopback, settings in `folder`; nothing installed, fetched or opened."""
        flags = [
            "--api",
            "--port",
            str(port),
            "--server-name",
            "127.0.0.1",
            "--skip-prepare-environment",
            "--skip-torch-cuda-test",
        ]
        flags += ["--ui-settings-file", str(folder / "config.json"), "--ui-config-file", str(folder / "ui-config.json")]
        if not self._has_cuda():
            flags += self._processor_flags()
        return [str(self.python), "launch.py", *flags, *self.arguments]

    def _processor_flags(self) -> list[str]:
        if not self.forge:
            return ["--use-cpu", "all", "--no-half", "--precision", "full"]
        known = (self.root / "backend" / "args.py").read_text("utf-8")
        return ["--always-cpu", "--all-in-fp32"] if "--always-cpu" in known else ["--cpu", "--force-fp32"]

    def _has_cuda(self) -> bool:
        test = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
        return subprocess.run([str(self.python), "-c", test], cwd=self.root, check=False).returncode == 0


def find_installation(environment: Mapping[str, str]) -> tuple[Installation | None, str]:
    """The WebUI that the environment names, or None and one sentence why there is none."""
    named = environment.get("MRFLOW_WEBUI_ROOT", "")
    if not named:
        return None, "no WebUI: set MRFLOW_WEBUI_ROOT to the folder of an installed one to run these tests on it."
    root = Path(named).expanduser()
    if not (root / "launch.py").is_file():
        return None, f"MRFLOW_WEBUI_ROOT={named!r} holds no launch.py; name the folder of an installed WebUI."
    python = Path(environment.get("MRFLOW_WEBUI_PYTHON") or root / "venv" / "bin" / "python")
    if not python.is_file():
        return None, f"the WebUI's Python {str(python)!r} does not exist; set MRFLOW_WEBUI_PYTHON to it."
    arguments = tuple(shlex.split(environment.get("MRFLOW_WEBUI_ARGS", "")))
    return Installation(root, python, environment.get("MRFLOW_WEBUI_CHECKPOINT", ""), arguments), ""


@dataclass(frozen=True)
class Answer:
    """What one job gave: its pictures, the API's info, the probe's events, and the seconds it took."""

    images: tuple[Image.Image, ...]
    info: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...]
    seconds: float
    log: str = ""
    _files: tuple[str, ...] = ()

    def of(self, event: str, **wanted: Any) -> list[Mapping[str, Any]]:
        """Events of one kind, in order, whose values are as `wanted`."""
        found = [entry for entry in self.events if entry["event"] == event]
        return [entry for entry in found if all(entry.get(name) == value for name, value in wanted.items())]

    def forwards(self, *, hires: bool) -> list[Mapping[str, Any]]:
        return self.of("network", hires=hires)

    def sigmas(self, *, hires: bool) -> list[float]:
        """One sigma for each model call of a pass, as the denoiser got it."""
        return [entry["sigma"][0] for entry in self.of("sigma", hires=hires)]

    def encoded(self, index: int) -> str:
        """A picture with its metadata, as the API takes files."""
        return self._files[index]

    @property
    def infotext(self) -> str:
        return self.info["infotexts"][0]

    @property
    def comments(self) -> str:
        return "\n".join(str(entry.get("comments", "")) for entry in self.of("postprocess"))


@dataclass
class Host:
    """A running WebUI. `start` waits until it answers, `stop` ends it and removes what was put into its folder."""

    installation: Installation
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="mrflow-webui-")))
    checkpoint: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _port: int = 0
    _log: IO[bytes] | None = None
    _read: int = 0
    _placed: list[Path] = field(default_factory=list)

    # --------------------------------------------------------------------------------------------------------- life

    def start(self, seconds: float = 900.0) -> None:
        extensions = self.installation.root / "extensions"
        extensions.mkdir(exist_ok=True)
        self._place(extensions)
        self._port = _free_port()
        settings = {**_read_settings(self.installation.root / "config.json"), **SETTINGS}
        settings["outdir_txt2img_samples"] = str(self.saved)
        (self.folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        environment = {
            **os.environ,
            "MRFLOW_PROBE_FILE": str(self.probe_file),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            # Hosts of 2024 load pickled upscalers without saying weights_only.
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        }
        environment.pop("PYTHONPATH", None)
        before = self.log().count(READY)
        self._log = (self.folder / "host.log").open("ab")
        self._process = subprocess.Popen(
            self.installation.command(self._port, self.folder),
            cwd=self.installation.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._await_ready(seconds, before + 1)
        self.checkpoint = self._choose_checkpoint()

    def stop(self) -> None:
        if self._process is not None:
            children = []
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(self._process.pid).children(recursive=True)
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(20)
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            self._process = None
        if self._log is not None:
            self._log.close()
        for path in reversed(self._placed):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        self._placed.clear()

    def _place(self, extensions: Path) -> None:
        """The probe and an upscaler as copies; the extension as a link, unless it is installed there already."""
        probe = extensions / PROBE_NAME
        shutil.rmtree(probe, ignore_errors=True)
        self._placed.append(probe)
        shutil.copytree(PROBE, probe, ignore=shutil.ignore_patterns("__pycache__"))
        models = self.installation.root / "models" / "ESRGAN"
        models.mkdir(exist_ok=True)
        upscaler = models / f"{X2_NAME}.safetensors"
        self._placed.append(upscaler)
        shutil.copyfile(X2, upscaler)
        if not any(entry.resolve() == REPOSITORY for entry in extensions.iterdir()):
            link = extensions / EXTENSION_NAME
            if link.exists() or link.is_symlink():
                raise RuntimeError(f"{link} is in the way: it is not a link to {REPOSITORY}.")
            self._placed.append(link)
            link.symlink_to(REPOSITORY, target_is_directory=True)

    def reload(self) -> None:
        """What the page's "Reload UI" does: all scripts are loaded anew by the same process."""
        before = self.log().count(READY)
        self.post("/mrflow-probe/reload", {})
        self._await_ready(900.0, before + 1)

    def _await_ready(self, seconds: float, times: int = 1) -> None:
        """Until the log says so: the port answers before the scripts' defaults exist."""
        end = time.monotonic() + seconds
        while self.log().count(READY) < times:
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"the WebUI ended while starting:\n{self.log()[-4000:]}")
            if time.monotonic() > end:
                raise RuntimeError(f"the WebUI was not ready after {seconds:.0f} s:\n{self.log()[-4000:]}")
            time.sleep(5)

    def _choose_checkpoint(self) -> str:
        titles = [entry["title"] for entry in self.get("/sdapi/v1/sd-models")]
        found = [title for title in titles if self.installation.checkpoint in title]
        if not found:
            raise RuntimeError(f"no checkpoint like {self.installation.checkpoint!r} in this WebUI; it has {titles}.")
        return found[0]

    # ---------------------------------------------------------------------------------------------------------- jobs

    @property
    def probe_file(self) -> Path:
        return self.folder / "probe.jsonl"

    @property
    def saved(self) -> Path:
        """Where pictures of jobs that save theirs lie."""
        return self.folder / "saved"

    def log(self) -> str:
        path = self.folder / "host.log"
        return path.read_text("utf-8", "replace") if path.is_file() else ""

    def memory(self) -> int:
        """Bytes of main memory that the host holds."""
        assert self._process is not None
        return psutil.Process(self._process.pid).memory_info().rss

    def get(self, path: str) -> Any:
        return self._send(urllib.request.Request(self._url(path)))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        data = json.dumps(body).encode("utf-8")
        return self._send(urllib.request.Request(self._url(path), data, {"Content-Type": "application/json"}))

    def txt2img(
        self,
        mrflow: Any = None,
        *,
        probe: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        scripts: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Answer:
        """One job. `mrflow`: the extension's argument list, a dict for its one-dict form, or None to send nothing."""
        asked: dict[str, Any] = dict(scripts or {})
        if mrflow is not None:
            asked["mrflow"] = {"args": mrflow if isinstance(mrflow, list) else [mrflow]}
        if probe is not None:
            asked["mrflow probe"] = {"args": [json.dumps(probe)]}
        body = {
            "prompt": "a red circle on green",
            "negative_prompt": "",
            "seed": 1234,
            "steps": 20,
            "width": 512,
            "height": 512,
            "cfg_scale": 1.0,
            "sampler_name": "Euler",
            "send_images": True,
            "override_settings": {"sd_model_checkpoint": self.checkpoint, **(settings or {})},
            "alwayson_scripts": asked,
            **fields,
        }
        before = len(self.log())
        self.events()
        start = time.perf_counter()
        reply = self.post("/sdapi/v1/txt2img", body)
        seconds = time.perf_counter() - start
        pictures = tuple(_picture(text) for text in reply["images"])
        return Answer(
            pictures, json.loads(reply["info"]), self.events(), seconds, self.log()[before:], tuple(reply["images"])
        )

    def events(self) -> tuple[Mapping[str, Any], ...]:
        """What the probe wrote since the last call."""
        if not self.probe_file.is_file():
            return ()
        with self.probe_file.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self._read += len(data)
        return tuple(json.loads(line) for line in data.decode("utf-8").splitlines())

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _url(self, path: str) -> str:
        return self.address + path

    def _send(self, request: urllib.request.Request) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=JOB_SECONDS) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            raise RuntimeError(f"the WebUI answered {error.code}: {text[:2000]}\n{self.log()[-3000:]}") from error


def _read_settings(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _picture(text: str) -> Image.Image:
    picture = Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2] or text)))
    picture.load()
    return picture


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
