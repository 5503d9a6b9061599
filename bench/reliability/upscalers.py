"""Hostile upscaler files: payloads, archives that unpack to gigabytes, weights that declare what is not there."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench.reliability.runner import EXECUTED, MEMORY, MIB, TIME, Bench, Case, Tally, common_faults, count, found_bad
from mrflow_sched import demo

TITLE = "hostile upscaler files"
ESCAPE = "\x1b]0;title\x07\x1b[31mred"
"""Sets a terminal's title and colour."""


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.made = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.made


class Files:
    """Writes the files of this group into a folder."""

    def __init__(self, folder: Path, mark: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.mark = folder, mark
        self.good: dict[str, torch.Tensor] = load_file(demo.upscaler_path())

    def put(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def saved(self, name: str, value: object, *, zipped: bool = True) -> Path:
        path = self.folder / name
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        return path

    def archive(self, name: str, pickled: bytes, **more: bytes) -> Path:
        """A file as torch.save lays it out, around any pickle; members are compressed."""
        path = self.folder / name
        members = {"a/data.pkl": pickled, "a/version": b"3\n", "a/byteorder": b"little"} | more
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for member, data in members.items():
                file.writestr(member, data)
        return path

    def safetensors(self, name: str, header: bytes | dict[str, Any], body: bytes = b"", length: int = -1) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return self.put(name, struct.pack("<Q", len(text) if length < 0 else length) + text + body)


# --- payloads ----------------------------------------------------------------------------------


def payloads(files: Files) -> Iterator[tuple[str, Path]]:
    """Files that write the mark where something in them is executed."""
    mark = str(files.mark)
    shell = f"echo executed > {mark}"
    calls = {
        "os.system": Call(os.system, shell),
        "eval": Call(eval, f"open({mark!r}, 'w')"),
        "exec": Call(exec, f"open({mark!r}, 'w')"),
        "open": Call(open, mark, "w"),
        "Path.touch": Call(Path.touch, Path(mark)),
        "getattr": Call(getattr, os, "system"),
        "torch.load": Call(torch.load, mark),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(open, mark, "w"))),
    }
    for name, call in calls.items():
        for form, zipped in (("zip", True), ("legacy", False)):
            try:
                yield (
                    f"{name}, {form}",
                    files.saved(f"call-{name}-{form}.pth", {"params": {**files.good, "x": call}}, zipped=zipped),
                )
            except (TypeError, AttributeError, pickle.PicklingError):
                continue  # this Python cannot pickle that function
    text = shell.encode()
    codes = {
        "global and reduce": b"cposix\nsystem\n(S'" + text + b"'\ntR.",
        "inst": b"(S'" + text + b"'\niposix\nsystem\n.",
        "obj": b"(cposix\nsystem\nS'" + text + b"'\no.",
        "stack_global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(text)]) + text + b"\x85R.",
        "build": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemscposix\nsystem\nsb.",
        "extension": b"\x80\x04\x82\x01.",
    }
    for name, code in codes.items():
        yield f"opcode {name}, raw", files.put(f"code-{name}.pth", code)
        yield f"opcode {name}, zip", files.archive(f"code-{name}-zip.pth", code)
    raw = codes["global and reduce"]
    for form, opener in {"tar": open, "tar.gz": gzip.open, "tar.bz2": bz2.open, "tar.xz": lzma.open}.items():
        path = files.folder / f"{form}.pth"
        with opener(path, "wb") as packed, tarfile.open(fileobj=packed, mode="w") as archive:  # pyright: ignore[reportArgumentType]
            for member in ("pickle", "storages", "tensors"):
                entry = tarfile.TarInfo(member)
                entry.size = len(raw)
                archive.addfile(entry, io.BytesIO(raw))
        yield f"payload in {form}", path
    path = files.folder / "script.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    yield "TorchScript", path
    yield "whole module", files.saved("module.pth", torch.nn.Linear(2, 2))
    yield "safetensors that is a pickle", files.put("pickled.safetensors", raw)


# --- bombs -------------------------------------------------------------------------------------


_ZEROS = bytes(16 * MIB)


def _tar_header(kind: bytes, size: int) -> bytes:
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = kind, size
    return entry.tobuf(tarfile.GNU_FORMAT)


def _giant(width: int) -> OrderedDict[str, torch.Tensor]:
    """An ESRGAN of `width` features, all of whose weights are one number in the file."""

    def weight(*shape: int) -> torch.Tensor:
        return torch.zeros(1).expand(*shape)

    found: OrderedDict[str, torch.Tensor] = OrderedDict()

    def layer(name: str, into: int, out: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = weight(out, into, 3, 3), weight(out)

    layer("model.0", 3, width)
    for block in (1, 2, 3):
        for conv in range(1, 6):
            layer(f"model.1.sub.0.RDB{block}.conv{conv}.0", width + 32 * (conv - 1), width if conv == 5 else 32)
    layer("model.1.sub.1", width, width)
    for number in (3, 6, 8):
        layer(f"model.{number}", width, width)
    layer("model.10", width, 3)
    return found


def _nested_tuples(depth: int, *, key: bool) -> bytes:
    """A pickle of tuples that hold each other twice, 2^depth leaves, as a key or a value of a dict."""
    code = b"\x80\x02K\x01K\x02\x86q\x00"
    for number in range(1, depth):
        last = bytes([number - 1])
        code += b"h" + last + b"h" + last + b"\x86q" + bytes([number])
    end, name = b"h" + bytes([depth - 1]), b"X\x01\x00\x00\x00a"
    return code + b"}" + (end + name if key else name + end) + b"s."


def zip_bomb(files: Files, member: str, blocks: int) -> Path:
    """A file as torch.save lays it out, with a member of so many times 16 MiB of zeros."""
    path = files.folder / f"bomb-{member.replace('/', '-')}.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a/version", "3\n")
        if member != "a/data.pkl":
            archive.writestr("a/data.pkl", pickle.dumps({"params": 1}, 2))
        with archive.open(member, "w", force_zip64=True) as entry:
            for _ in range(blocks):
                entry.write(_ZEROS)
    return path


def bombs(files: Files, *, quick: bool) -> Iterator[tuple[str, Path]]:
    """Small files that cost gigabytes or minutes where they are unpacked or believed."""
    blocks = 32 if quick else 64
    packers: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    for form, pack in packers.items():
        block = pack(_ZEROS)  # readers of all three take several streams in a row
        for name, kind in (("long name", tarfile.GNUTYPE_LONGNAME), ("pax", tarfile.XHDTYPE)):
            data = pack(_tar_header(kind, blocks * len(_ZEROS))) + blocks * block
            yield f"tar header of {blocks / 64:g} GiB ({name}, {form})", files.put(f"tar-{name}.{form}.pth", data)
    for member in ("a/data.pkl", "a/data/0", "a/unused"):
        yield f"zip bomb in {member}", zip_bomb(files, member, blocks)
    for width in (2048, 8192):
        yield f"one number as {width} features", files.saved(f"giant-{width}.pth", _giant(width))
        meta = {name: torch.empty(value.shape, device="meta") for name, value in _giant(width).items()}
        yield f"{width} features without data", files.saved(f"meta-{width}.pth", meta)
    yield "tuples as a key, 2^60", files.archive("key-60.pth", _nested_tuples(60, key=True))
    yield "tuples as a key, 2^30", files.archive("key-30.pth", _nested_tuples(30, key=True))
    yield "tuples as a key, 2^30, raw", files.put("key-30-raw.pth", _nested_tuples(30, key=True))
    yield "tuples as a value, 2^60", files.archive("value-60.pth", _nested_tuples(60, key=False))
    yield "200,000 nested lists", files.archive("deep.pth", b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
    yield (
        "a string of 1 GiB that is not there",
        files.archive("string.pth", b"\x80\x04\x8e" + struct.pack("<Q", 2**30) + b"x."),
    )
    yield "memo of 2^31", files.archive("memo.pth", b"\x80\x02Nr\xff\xff\xff\x7f.")


# --- what is wrong in other ways ---------------------------------------------------------------


def odd_weights(files: Files) -> Iterator[tuple[str, Path]]:
    """Weights of a known network with values, names or shapes that no loader should trip over."""
    good = files.good
    first = next(iter(good))

    def each(change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
        return {name: change(value) for name, value in good.items()}

    changed: dict[str, Any] = {
        "NaN": each(lambda v: torch.full_like(v, float("nan"))),
        "infinite": each(lambda v: torch.full_like(v, float("inf"))),
        "int8": each(lambda v: (v * 100).to(torch.int8)),
        "complex": each(lambda v: v.to(torch.complex64)),
        "sparse": each(lambda v: v.to_sparse()),
        "empty": each(lambda v: v[:0]),
        "lists": each(lambda v: v.tolist()),
        "arrays": each(lambda v: v.numpy()),
        "scalars": each(lambda v: v.flatten()[0]),
        "an int as a name": {**good, 1: torch.zeros(1)},
        "None as a name": {**good, None: torch.zeros(1)},
        "bytes as a name": {**good, b"x": torch.zeros(1)},
        "None as a value": {**good, "x": None},
        "a text of 20 MB as a value": {**good, first: "A" * 20_000_000},
        "escape codes in a name": {**good, ESCAPE: torch.zeros(1)},
        "escape codes in a name of a layer": {**good, f"model.1.sub.0.RDB1.{ESCAPE}": torch.zeros(1)},
        "a line break in a name": {**good, "model.0.a\nmrflow: all is well": torch.zeros(1)},
        "layer 99,999,999": {**good, "model.1.sub.99999999.RDB1.conv1.0.weight": torch.zeros(32, 24, 3, 3)},
        "five dimensions": {**good, first: torch.zeros(2, 2, 2, 2, 2)},
        "no dimensions": {**good, first: torch.tensor(1.0)},
        "params is a number": {"params": 3},
        "params_ema is a list": {"params_ema": [1, 2]},
        "a list": [good],
        "a tensor": torch.zeros(3),
        "a text": "x",
        "nothing": {},
    }
    for name, value in changed.items():
        yield f"weights: {name}", files.saved(f"odd-{len(name)}-{abs(hash(name)) % 10**6}.pth", value)


def odd_safetensors(files: Files) -> Iterator[tuple[str, Path]]:
    """Headers that lie."""

    def one(**entry: Any) -> dict[str, Any]:
        return {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}

    headers: dict[str, tuple[bytes | dict[str, Any], int]] = {
        "length 2^63": (b"{}", 2**63),
        "length 90 MB": (b"{}", 90_000_000),
        "10 GB that is not there": (one(shape=[50_000, 50_000], data_offsets=[0, 10**10]), -1),
        "2^64 values": (one(shape=[2**62, 4], data_offsets=[0, 0]), -1),
        "negative offsets": (one(data_offsets=[-4, 0]), -1),
        "overlapping": (one() | {"y": one()["x"]}, -1),
        "unknown type with escape codes": (one(dtype=ESCAPE), -1),
        "raw escape codes": (b'{"x":{"dtype":"' + ESCAPE.encode() + b'","shape":[1],"data_offsets":[0,4]}}', -1),
        "100,000 nested lists": (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", -1),
        "no JSON": (b"\xff\xfe\x00", -1),
        "a number": (b"7", -1),
        "zero sizes": ({name: one(shape=[0] * 4, data_offsets=[0, 0])["x"] for name in files.good}, -1),
    }
    for number, (name, (header, length)) in enumerate(headers.items()):
        yield f"safetensors: {name}", files.safetensors(f"head-{number}.safetensors", header, bytes(4), length)
    for name, weights in {
        "escape codes in all names": {ESCAPE + name: value for name, value in files.good.items()},
        "escape codes in one name": {**files.good, f"model.1.sub.0.{ESCAPE}": torch.zeros(1)},
    }.items():
        path = files.folder / f"{name.replace(' ', '-')}.safetensors"
        save_file(weights, path)
        yield f"safetensors: {name}", path
    whole = demo.upscaler_path().read_bytes()
    yield "safetensors: cut", files.put("cut.safetensors", whole[:200_000])


def other_kinds(files: Files) -> Iterator[tuple[str, Path]]:
    """Files that are no weights, under a name of weights."""
    heads = {
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a web page": b"<!DOCTYPE html><html><body>403</body></html>",
        "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(64),
        "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(64),
        "escape codes": ESCAPE.encode() * 20,
        "nothing": b"",
        "zeros": bytes(4096),
        "half a zip": b"PK\x03\x04" + bytes(40),
    }
    for name, data in heads.items():
        for ending in ("pth", "safetensors"):
            yield f"{name} as .{ending}", files.put(f"{name.replace(' ', '-')}.{ending}", data)
    loop, pipe, folder = (files.folder / f"{name}.pth" for name in ("loop", "pipe", "folder"))
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    folder.mkdir()
    yield "a link to itself", loop
    yield "a pipe", pipe
    yield "a folder", folder
    yield "escape codes in a file's name", files.put(f"{ESCAPE.replace('/', '')}.pth", b"no weights")
    yield "a name of 5,000 letters", files.folder / ("x" * 5000 + ".pth")
    yield "an unknown user", Path("~nosuchuser/x.pth")
    yield "no name", Path("")


def cases(bench: Bench) -> Iterator[Case]:
    """Every file through `load_upscaler`, and a part of them through the command line."""
    files = Files(bench.folder / "upscalers", bench.mark)
    found = [*payloads(files), *bombs(files, quick=bench.quick), *odd_weights(files), *odd_safetensors(files)]
    found += other_kinds(files)
    for name, path in found:
        yield Case(name, "upscaler", {"path": str(path)}, need=_size(path), seconds=10)
    for name, path in found[:: 12 if bench.quick else 3]:
        words = ["doctor", f"--upscaler={path}"]
        yield Case(f"{name}: doctor", "command", {"arguments": words}, need=_size(path), seconds=20)


def _size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def run(bench: Bench) -> Tally:
    """Try every file."""
    tally = count(bench, cases(bench))
    folder = bench.folder / "upscalers"
    good = Case("the embedded upscaler", "upscaler", {"path": str(demo.upscaler_path())}, need=5 * MIB)
    tally.checked = not common_faults(good, bench.one(good)) and found_bad(
        bench,
        (Case("believed pickle", "bad_torch_load", {"path": str(folder / "call-open-zip.pth")}), EXECUTED),
        (Case("unpacked bomb", "bad_unpack", {"path": str(folder / "bomb-a-unused.pth")}), MEMORY),
        (Case("endless", "bad_wait", {}, seconds=0.5), TIME),
    )
    return tally
