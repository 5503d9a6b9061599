"""Drafts on disk: a PNG of stage 1's image with the record of the whole run, and stage 1's latents in a chunk.

The latents are float32 in safetensors. Their chunk is private, ancillary and not safe to copy (its name's letters say
so), so that an editor which changes the pixels is to drop it, and every viewer shows the image all the same.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.images.convert import to_8_bit
from mrflow_sched.images.files import load_image, read_text, save_new
from mrflow_sched.images.record import KEY, RunRecord

__all__ = ["DraftFile", "mark", "read_draft", "save_draft"]

CHUNK = b"mrLT"
"""Type of the PNG chunk that holds the latents."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NAME = "latents"
RGBA = " RGBA"
"""Ends the mark of an image with transparency."""


@dataclass(frozen=True, eq=False)
class DraftFile:
    """A draft as it was read.

    Attributes:
        path: Its file.
        record: Of the whole run; `draft` is the mark of the pixels as they were made.
        latents: Stage 1's, float32; None where the file has none, or damaged ones.
        image: (3, h, w), float32 in [0, 1]: the pixels of the file, 8 bits a channel.
        changed: The pixels are not those that were made.
    """

    path: Path
    record: RunRecord
    latents: Tensor | None
    image: Tensor
    changed: bool


def mark(pixels: Any) -> str:
    """The mark by which a changed draft is noticed.

    Args:
        pixels: (h, w, 3 or 4) uint8.

    Returns:
        The CRC-32 of its colours, eight hexadecimal digits; "RGBA" after them where it has transparency.
    """
    colours = np.ascontiguousarray(pixels[..., :3]).tobytes()
    return f"{zlib.crc32(colours):08x}{RGBA if pixels.shape[-1] == 4 else ''}"


def mark_of(image: Tensor) -> str:
    """The mark of an image, as it is saved.

    Args:
        image: (3, h, w), float in [0, 1].

    Returns:
        As in `mark`.
    """
    return mark(to_8_bit(image))


def save_draft(
    folder: str | os.PathLike[str], stem: str, image: Tensor, latents: Tensor | None, text: Mapping[str, str]
) -> Path:
    """Write a draft under the first free name, as `save_new` does.

    Args:
        folder: An existing folder.
        stem: Name of the file without suffix.
        image: Stage 1's, (3, h, w), float in [0, 1].
        latents: Stage 1's; None: the file holds none.
        text: The texts of the file: the record under `record.KEY`, and what other programs read.

    Returns:
        The path of the file.

    Raises:
        MrFlowError: As in `save_new`.
    """
    chunks: dict[bytes, bytes] = {}
    if latents is not None:
        chunks[CHUNK] = safetensors.torch.save({_NAME: latents.detach().float().cpu().contiguous()})
    return save_new(folder, stem, image, text, chunks=chunks)


def read_draft(path: str | os.PathLike[str]) -> DraftFile:
    """Read a draft's file.

    Args:
        path: A file of `save_draft`, or what another program made of it: texts, latents or pixels may be gone.

    Returns:
        The draft.

    Raises:
        MissingFileError: There is no such file.
        MrFlowError: It is no image, has no record, or one of a finished image.
    """
    texts = read_text(path)
    name = f"the draft {str(path)!r}"
    if KEY not in texts:
        raise MrFlowError(
            f"{name} has no mrflow record, so its run and its latents are not known; give a file as it was saved. What "
            "is made of a picture alone is near, not equal: mrflow generate PROMPT --image FILE."
        )
    record = RunRecord.from_json(texts[KEY])
    if record.draft is None:
        raise MrFlowError(f"{name} is no draft: its record is that of a whole run (mrflow generate --from repeats it).")
    image = load_image(path)
    return DraftFile(Path(path), record, _latents(Path(path)), image, mark_of(image) != record.draft)


def _latents(path: Path) -> Tensor | None:
    """What the chunk of a PNG holds; None where there is no whole one."""
    data = path.read_bytes()
    place = len(_SIGNATURE)
    while data.startswith(_SIGNATURE) and place + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        body, end = data[place + 8 : place + 8 + length], place + 8 + length
        if kind == CHUNK:
            whole = data[end : end + 4] == struct.pack(">I", zlib.crc32(kind + body))
            return _read(body) if whole else None
        place = end + 4
    return None


def _read(body: bytes) -> Tensor | None:
    try:
        found = safetensors.torch.load(body).get(_NAME)
    except Exception:  # whatever safetensors says of bytes that are none of its own
        return None
    whole = found is not None and found.dtype == torch.float32 and bool(found.isfinite().all())
    return found if whole else None
