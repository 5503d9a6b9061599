"""What a file of weights holds, judged by its first bytes and its directory before a value is read or unpacked."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.upscaling.pickles import Declared, read_pickle

MOST_TABLE = 2 << 20
"""Bytes that names and shapes may take, and a zip's directory: several times what the largest checkpoints need."""

# A checkpoint in torch's format before zip files begins with this number and its version.
_OLD_FORMAT = 0x1950A86A20F9469CFC6C, 1001
_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FOREIGN = (
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GGUF", "a GGUF file"),
    (b"7767517", "an ncnn file"),
    (b"version https://git-lfs", "a Git LFS pointer, so the real file was not downloaded"),
    (b"<", "a web page"),
)


@dataclass(frozen=True)
class Contents:
    """What a file declares.

    Attributes:
        table: Dictionaries with text as keys, whose leaves are `Declared` or anything else.
        blocks: First byte in the file and number of bytes of every block of values, by name.
    """

    table: object
    blocks: Mapping[str, tuple[int, int]]


def read_contents(file: Path) -> Contents:
    """Read what a file declares. At most `MOST_TABLE` bytes of it are read, and nothing in it is run or unpacked.

    Args:
        file: A safetensors file, or what `torch.save` wrote, under any name.

    Returns:
        Its table of tensors and where their values lie.

    Raises:
        MrFlowError: It is another kind of file, is damaged, or declares more than it holds. The sentence has no
            subject: "it is cut short".
        OSError: It cannot be read.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(512)
        stream.seek(0)
        if head[8:9] == b"{":
            return _safetensors(stream, size)
        if head[:4] == b"PK\x03\x04":
            return _zip(stream, size)
        if head[:1] == b"\x80":
            return _old(stream, size)
        raise MrFlowError(_foreign(head))


def read_tensors(file: Path, contents: Contents, table: Mapping[str, Declared]) -> dict[str, Tensor]:
    """Read the values of some tensors.

    Args:
        file: The file of `contents`.
        contents: What `read_contents` found.
        table: The tensors to read.

    Returns:
        Tensors on the CPU, by name.

    Raises:
        MrFlowError: The file holds fewer values than it declares.
    """
    blocks: dict[str, bytearray] = {}
    tensors: dict[str, Tensor] = {}
    with file.open("rb", buffering=0) as stream:
        for name, found in table.items():
            if found.storage not in blocks:
                blocks[found.storage] = _block(stream, contents, found)
            data = blocks[found.storage]
            values = torch.frombuffer(data, dtype=found.dtype) if data else torch.empty(0, dtype=found.dtype)
            tensors[name] = values.as_strided(found.shape, found.stride, found.offset if found.numel else 0)
    return tensors


def check_declared(contents: Contents, table: Mapping[str, Declared]) -> None:
    """Hold the tensors of a table against the bytes of the file that are theirs, before any is read.

    Args:
        contents: What `read_contents` found.
        table: The tensors in question.

    Raises:
        MrFlowError: They declare more values than their blocks hold, alone or together.
    """
    needed = 0
    for found in table.values():
        needed += found.numel * found.dtype.itemsize
        if found.numel and contents.blocks.get(found.storage, (0, 0))[1] < found.available * found.dtype.itemsize:
            raise MrFlowError("it is cut short, or declares more values than it holds")
    held = sum(length for _, length in contents.blocks.values())
    if needed > 2 * held:  # a block may be shown by more than one tensor, but not by hundreds
        raise MrFlowError("it declares more values than it holds")


def _block(stream: IO[bytes], contents: Contents, found: Declared) -> bytearray:
    first, length = contents.blocks[found.storage] if found.numel else (0, 0)
    data = bytearray(length - length % found.dtype.itemsize)
    stream.seek(first)
    view = memoryview(data)
    while view:
        count = cast("io.FileIO", stream).readinto(view)
        if not count:
            raise MrFlowError("it is cut short")
        view = view[count:]
    return data


def _foreign(head: bytes) -> str:
    """What a file with these first bytes is."""
    if not head:
        return "it is empty"
    if head[257:262] == b"ustar":
        return "it is a tar archive"
    found = next((name for magic, name in _FOREIGN if head.lstrip().startswith(magic)), None)
    return f"it is {found}" if found else "it is no file of weights, or cut short"


# ---------------------------------------------------------------------------------------------------------- safetensors


def _safetensors(stream: IO[bytes], size: int) -> Contents:
    """Eight bytes of length, a JSON header of that length, then the values of all tensors."""
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > size - 8:
        raise MrFlowError("it is cut short, or no safetensors file")
    if length > MOST_TABLE:
        raise MrFlowError(f"its header has {length:,} bytes, more than the {MOST_TABLE:,} that any weights need")
    try:
        header = json.loads(stream.read(length))
    except (ValueError, RecursionError) as error:
        raise MrFlowError("its header is damaged") from error
    if not isinstance(header, dict):
        raise MrFlowError("it holds no table of weights")
    table: dict[str, Declared] = {}
    blocks: dict[str, tuple[int, int]] = {}
    for name, entry in cast("dict[str, Any]", header).items():
        if name == "__metadata__":
            continue
        table[name] = _entry(name, entry)
        first, last = entry["data_offsets"]
        blocks[name] = (8 + length + first, last - first)
        if last > size - 8 - length:
            raise MrFlowError("it is cut short")
    if sum(count for _, count in blocks.values()) > size:
        raise MrFlowError("it declares more values than it holds")
    return Contents(table, blocks)


def _entry(name: str, entry: Any) -> Declared:
    try:
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and 0 <= number < 2**48 for number in (*shape, first, last)) or last < first:
            raise ValueError("a size that cannot be")
        dtype = _SAFETENSORS[entry["dtype"]]
        stride: list[int] = []
        count = 1
        for side in reversed(shape):
            stride.insert(0, count)
            count *= side
        if len(shape) > 8 or count * dtype.itemsize != last - first:
            raise ValueError("a shape that does not fit its bytes")
    except (LookupError, TypeError, ValueError) as error:
        raise MrFlowError("its header declares sizes or types that weights do not have") from error
    return Declared(dtype, shape, tuple(stride), name, 0, count)


# ----------------------------------------------------------------------------------------------------------- torch.save


def _zip(stream: IO[bytes], size: int) -> Contents:
    """An archive of entries that are not compressed: `data.pkl` declares the tensors, `data/N` hold their values."""
    directory = _directory_size(stream, size)
    if directory > MOST_TABLE:
        raise MrFlowError(f"its directory has {directory:,} bytes, more than the {MOST_TABLE:,} that any weights need")
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise MrFlowError("it is a damaged zip archive") from error
    _check_entries(list(entries.values()), size)
    pickles = [name for name in entries if name.count("/") <= 1 and name.rpartition("/")[2] == "data.pkl"]
    if any("/code/" in name for name in entries):
        raise MrFlowError("it is a TorchScript program, and nothing in a file is run")
    if len(pickles) != 1:
        raise MrFlowError("it is a zip archive without a table of weights")
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{root}byteorder")
    if order is not None and _stored(stream, order) != b"little":
        raise MrFlowError("its values are stored in big-endian order")
    table = read_pickle(io.BytesIO(_stored(stream, entries[pickles[0]])))
    prefix = f"{root}data/"
    values = {name.removeprefix(prefix): info for name, info in entries.items() if name.startswith(prefix)}
    return Contents(table, {name: (_first_byte(stream, info), info.file_size) for name, info in values.items()})


def _stored(stream: IO[bytes], entry: zipfile.ZipInfo) -> bytes:
    if entry.file_size > MOST_TABLE:
        raise MrFlowError("its table is larger than any weights need")
    stream.seek(_first_byte(stream, entry))
    return stream.read(entry.file_size)


def _directory_size(stream: IO[bytes], size: int) -> int:
    """Bytes of a zip archive's directory, told by the record that ends the file."""
    tail = min(size, 98)
    stream.seek(size - tail)
    end = stream.read(tail)
    if end[-22:-18] != b"PK\x05\x06":
        raise MrFlowError("it is cut short, or a damaged zip archive")
    directory = struct.unpack("<L", end[-10:-6])[0]
    if end[-42:-38] == b"PK\x06\x07" and end[:4] == b"PK\x06\x06":  # the record of archives beyond 4 GB
        directory = max(directory if directory != 0xFFFFFFFF else 0, struct.unpack("<Q", end[40:48])[0])
    return directory


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    """`torch.save` compresses nothing, so no entry may grow and all of them together fit into the file."""
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise MrFlowError("it is a compressed or encrypted zip archive, which torch.save does not write")
    if any(entry.file_size != entry.compress_size for entry in entries) or sum(e.file_size for e in entries) > size:
        raise MrFlowError("its directory declares more bytes than the file has")


def _first_byte(stream: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: after its own header of 30 bytes, its name and its extra fields."""
    stream.seek(entry.header_offset)
    header = stream.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise MrFlowError("it is a damaged zip archive")
    name, extra = struct.unpack("<HH", header[26:30])
    return entry.header_offset + 30 + name + extra


def _old(stream: IO[bytes], size: int) -> Contents:
    """Torch's format before zip files: pickles one after the other, then a length and the values for every block."""
    pickles = io.BytesIO(stream.read(min(size, MOST_TABLE)))
    if (read_pickle(pickles), pickles.tell() < size and read_pickle(pickles)) != _OLD_FORMAT:
        raise MrFlowError("it holds no table of weights")
    read_pickle(pickles)  # of the machine that wrote it
    widths: dict[str, int] = {}
    table, keys = read_pickle(pickles, widths), read_pickle(pickles)
    blocks: dict[str, tuple[int, int]] = {}
    place = pickles.tell()
    for key in cast("list[Any]", keys) if isinstance(keys, list) else []:
        stream.seek(place)
        count = stream.read(8)
        if len(count) < 8:
            raise MrFlowError("it is cut short")
        length = struct.unpack("<Q", count)[0] * widths.get(str(key), 1)
        blocks[str(key)] = (place + 8, length)
        place += 8 + length
        if place > size:
            raise MrFlowError("it is cut short")
    return Contents(table, blocks)
