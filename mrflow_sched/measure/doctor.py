"""`mrflow doctor`: what is installed, what this machine does fast, what models and files would run, what would fail.

Every check is one `Finding`; none of them changes anything or loads a model's weights.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from mrflow_sched._runtime.errors import first_line
from mrflow_sched.plan.families import FAMILIES

__all__ = ["Finding", "examine"]

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
    """

    name: str
    text: str
    good: bool = True


def examine(model: str | None = None, upscaler: str | None = None) -> Iterator[Finding]:
    """Look at the installation, the devices, and a model folder and an upscaler file where they are named.

    Args:
        model: A diffusers folder; None: not looked at.
        upscaler: A super-resolution file; None: not looked at.

    Yields:
        One finding at a time, as it is made; the rest of them is left out where torch is missing.
    """
    yield Finding("python", platform.python_version())
    for name in _REQUIRED:
        found = _version(name)
        yield Finding(name, found or "missing; install it with pip install mrflow-sched", found is not None)
    for name, loss in _OPTIONAL.items():
        yield Finding(name, _version(name) or f"not installed: {loss}")
    if _version("torch") is None:
        return
    yield from _devices()
    yield _operators()
    if _version("diffusers") is not None:
        yield _families()
    yield _embedded()
    if model is not None:
        yield from _model(Path(model))
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
    """Whether torchvision, which diffusers and spandrel import, was made for the torch that is installed."""
    from mrflow_sched._runtime.torchvision_ops import ensure_ops

    try:
        ensure_ops()
        import_module("torchvision")
    except Exception as error:
        return Finding(
            "torchvision operators",
            f"torchvision cannot be imported ({first_line(error)}); install the one for torch {_version('torch')}",
            False,
        )
    return Finding("torchvision operators", "importable")


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


def _model(folder: Path) -> Iterator[Finding]:
    """What can be known of a model folder from its small files: its class, its parts, its weights."""
    import json

    name = f"model {folder}"
    try:
        index = cast("dict[str, Any]", json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
        kind = str(index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"its model_index.json cannot be read ({first_line(error)}); give a local diffusers folder"
        yield Finding(name, text, False)
        return
    import diffusers

    library: Any = diffusers
    if not hasattr(library, kind):
        yield Finding(name, f"made for {kind}, which diffusers {_version('diffusers')} does not have; update it", False)
        return
    lacking = list(_missing(folder, index))
    if lacking:
        yield Finding(name, f"{kind}, but it lacks {', '.join(lacking)}; download all of it", False)
        return
    yield _layout(name, kind, folder)


def _missing(folder: Path, index: dict[str, Any]) -> Iterator[str]:
    """Parts that the index names and the folder does not have, and those of them without weights that can be read."""
    for part, made_by in index.items():
        if part.startswith("_") or not isinstance(made_by, list) or cast("list[Any]", made_by)[0] is None:
            continue
        place = folder / part
        if not place.is_dir():
            yield part
        elif (place / "config.json").is_file() and not any(place.glob("*.safetensors")):
            yield f"{part}/*.safetensors"


def _layout(name: str, kind: str, folder: Path) -> Finding:
    """The family that the pipeline would be treated as, found on its networks without their weights."""
    from mrflow_sched.engines.diffusers.folder import read_layout

    try:
        layout = read_layout(folder)
    except ValueError as error:
        return Finding(name, f"{kind}, whose stages cannot be run: {first_line(error)}", False)
    mark = ", experimental" if layout.experimental else ""
    return Finding(name, f"{kind}, family {layout.family.name} ({layout.family.title}){mark}")


def _upscaler(file: str) -> Finding:
    from mrflow_sched.upscaling.load import load_upscaler

    try:
        upscaler: Any = load_upscaler(file, device="cpu")
    except (ValueError, OSError, MemoryError) as error:
        return Finding(f"upscaler {file}", first_line(error), False)
    return Finding(f"upscaler {file}", f"{upscaler.model.architecture.name}, x{upscaler.scale}")
