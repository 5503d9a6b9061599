"""`mrflow doctor`: what is installed, what this machine does fast, what models and files would run, what would fail.

Every check is one `Finding`; none of them changes anything or loads a model's weights.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from mrflow_sched._runtime.errors import MrFlowError, first_line, shown
from mrflow_sched.plan.families import FAMILIES

__all__ = ["Finding", "examine", "own_import"]

_REQUIRED = ("torch", "diffusers", "transformers", "spandrel", "safetensors", "pillow")
_OPTIONAL = {
    "accelerate": "large folders load slower, and --offload-text does not work",
    "peft": "LoRA files cannot be loaded into pipelines",
    "torchvision": "upscaler files cannot be read",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        text: What was found, or why something fails.
        good: False: something that was asked for would fail.
        note: True: mrflow does what was asked for, but something else would fail.
    """

    name: str
    text: str
    good: bool = True
    note: bool = False


def examine(model: str | None = None, upscaler: str | None = None, *, config: str | None = None) -> Iterator[Finding]:
    """Look at the installation, the devices, and a model folder and an upscaler file where they are named.

    Args:
        model: A diffusers folder or a single file; None: not looked at.
        upscaler: A super-resolution file; None: not looked at.
        config: For a model in a single file: the diffusers folder that describes it.

    Yields:
        One finding at a time, as it is made; the rest of them is left out where torch is missing.
    """
    yield Finding("python", platform.python_version())
    for name in _REQUIRED:
        found = _version(name)
        yield Finding(name, found or "missing; install it with pip install mrflow-sched", found is not None)
    for name, loss in _OPTIONAL.items():
        found = _version(name)
        yield Finding(name, found or f"not installed: {loss}", note=found is None)
    if _version("torch") is None:
        return
    yield from _devices()
    yield _operators()
    if _version("diffusers") is not None:
        yield _families()
    yield _embedded()
    if model is not None:
        yield _model(Path(model), config)
    if upscaler is not None:
        yield _upscaler(upscaler)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    import torch

    from mrflow_sched._runtime.device import has_bfloat16

    places = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    for device in places:
        what = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
        if device.type == "cuda":
            cuda = cast("Any", torch.cuda)
            what += f", {cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"
        fast = "bfloat16 in hardware" if has_bfloat16(device) else "no bfloat16 in hardware: float32 is used"
        yield Finding(str(device), f"{what}, {fast}")


def _operators() -> Finding:
    """Whether torchvision, which diffusers and spandrel import, was made for the torch that is installed.

    This package repairs it for itself, so what a user's own program would see is asked of another process.
    """
    from mrflow_sched._runtime.torchvision_ops import ensure_ops

    fitting = f"install the torchvision that was made for torch {_version('torch')}"
    try:
        ensure_ops()
        import_module("torchvision")
    except Exception as error:
        return Finding(
            "torchvision operators", f"torchvision cannot be imported ({first_line(error)}); {fitting}", False
        )
    reason = own_import()
    if reason:
        return Finding(
            "torchvision operators",
            f"works inside mrflow only; your own import of diffusers fails ({reason}): {fitting}, or import "
            "mrflow_sched's MrFlow first",
            note=True,
        )
    return Finding("torchvision operators", "importable")


_IMPORT = """
import importlib
for name in ("torchvision", "diffusers.pipelines.flux.pipeline_flux"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        pass
    except Exception as error:
        print("reason:", *str(error).split("\\n"))
        break
"""


@cache
def own_import() -> str:
    """Import torchvision and diffusers as a program of the user's would: in a process of its own.

    Returns:
        Why that fails; empty where it works.
    """
    found = subprocess.run(
        [sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=False, cwd=sys.prefix, timeout=300
    )
    said = [line.removeprefix("reason:").strip() for line in found.stdout.splitlines() if line.startswith("reason:")]
    return shown(said[-1], 160) if said else ""


def _families() -> Finding:
    try:
        import diffusers
    except Exception as error:
        return Finding("families", f"diffusers cannot be imported ({first_line(error)})", False)
    library: Any = diffusers
    known = dict(pair for family in FAMILIES.values() if family.pipeline for pair in family.pipeline.titles)
    found = [title for title, name in known.items() if hasattr(library, name)]
    lacking = [title for title in known if title not in found]
    text = f"{', '.join(found)}; other flow pipelines where they can be probed"
    return Finding("families", text + (f"; not in this diffusers: {', '.join(lacking)}" if lacking else ""))


def _embedded() -> Finding:
    from mrflow_sched import demo

    missing = [str(path) for path in (demo.weights_path(), demo.upscaler_path()) if not path.exists()]
    if missing:
        return Finding("embedded model", f"{missing[0]} is missing; install the package again", False)
    return Finding("embedded model", "installed")


def _model(folder: Path, config: str | None) -> Finding:
    """What loading a model would find before it reads weights, and the family it would be treated as."""
    from mrflow_sched.engines.diffusers.folder import check_model, read_layout

    name = f"model {shown(folder, 200)}"
    try:
        kind = check_model(folder, config)["_class_name"]
        layout = read_layout(folder, config=config)
    except MrFlowError as error:
        return Finding(name, str(error).removesuffix("."), False)
    mark = ", experimental" if layout.experimental else ""
    return Finding(name, f"{kind}, family {layout.family.name} ({layout.family.title}){mark}")


def _upscaler(file: str) -> Finding:
    from mrflow_sched.upscaling.lanczos import LanczosUpscaler
    from mrflow_sched.upscaling.load import load_upscaler

    try:
        upscaler = load_upscaler(file, device="cpu")
    except (ValueError, OSError, MemoryError) as error:
        reason = str(error).removesuffix(".") if isinstance(error, MrFlowError) else first_line(error)
        return Finding(f"upscaler {shown(file, 200)}", reason, False)
    if isinstance(upscaler, LanczosUpscaler):
        return Finding(f"upscaler {shown(file, 200)}", "resampling without a model, which adds no detail")
    return Finding(f"upscaler {shown(file, 200)}", f"{upscaler.model.architecture.name}, x{upscaler.scale}")
