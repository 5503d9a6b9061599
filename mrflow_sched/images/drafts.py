"""Drafts on disk: a PNG of stage 1's image with the record of the whole run, and stage 1's latents in a chunk.

The latents are float32 in safetensors. Their chunk is private, ancillary and not safe to copy (its name's letters say
so), so that an editor which changes the pixels is to drop it, and every viewer shows the image all the same.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.images.convert import to_8_bit
from mrflow_sched.images.files import image_bytes, load_image, open_image, read_text, save_new
from mrflow_sched.images.parameters import PARAMETERS, parameters_text
from mrflow_sched.images.record import KEY, RunRecord

__all__ = ["DraftFile", "draft_bytes", "mark", "read_draft", "save_draft"]

CHUNK = b"mrLT"
"""Type of the PNG chunk that holds the latents."""

_NAME = "latents"
RGBA = " RGBA"
"""Ends the mark of an image with transparency."""


@dataclass(frozen=True, eq=False)
class DraftFile:
    """A draft as it was read.

    Attributes:
        path: Its file.
        record: Of the whole run; `draft` is the mark of the pixels as they were made.
        latents: Stage 1's, float32; None where the file has none, or not those that were made.
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
    return f"{_crc(colours)}{RGBA if pixels.shape[-1] == 4 else ''}"


def save_draft(
    folder: str | os.PathLike[str], stem: str, image: Tensor, latents: Tensor | None, record: RunRecord
) -> tuple[Path, RunRecord]:
    """Write a draft under the first free name, as `save_new` does.

    Args:
        folder: An existing folder.
        stem: Name of the file without suffix.
        image: Stage 1's, (3, h, w), float in [0, 1].
        latents: Stage 1's; None: the file holds none.
        record: Of the whole run.

    Returns:
        The path of the file, and its record, in which the marks of pixels and latents are filled in.

    Raises:
        MrFlowError: As in `save_new`.
    """
    own, text, chunks = _parts(image, latents, record)
    return save_new(folder, stem, image, text, chunks=chunks), own


def draft_bytes(image: Tensor, latents: Tensor | None, record: RunRecord) -> bytes:
    """A draft as the bytes of its file, for a place that is no folder of this machine.

    Args:
        image: As in `save_draft`.
        latents: Likewise.
        record: Likewise.

    Returns:
        What `save_draft` would write.
    """
    _, text, chunks = _parts(image, latents, record)
    return image_bytes(image, text, ".png", chunks)


def _parts(
    image: Tensor, latents: Tensor | None, record: RunRecord
) -> tuple[RunRecord, dict[str, str], dict[bytes, bytes]]:
    """The record with its marks, the texts and the chunks of a draft's file."""
    chunks: dict[bytes, bytes] = {}
    if latents is not None:
        chunks[CHUNK] = safetensors.torch.save({_NAME: latents.detach().float().cpu().contiguous()})
    own = replace(
        record, unfinished=True, draft=mark(to_8_bit(image)), draft_latents=_crc(chunks[CHUNK]) if chunks else None
    )
    return own, {PARAMETERS: parameters_text(own), KEY: own.to_json()}, chunks


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
    chunks: Any = getattr(open_image(path), "private_chunks", ())
    body = next((each[1] for each in chunks if each[0] == CHUNK), None)
    whole = body is not None and _crc(body) == record.draft_latents
    latents = safetensors.torch.load(body)[_NAME] if body is not None and whole else None
    image = load_image(path)
    return DraftFile(Path(path), record, latents, image, mark(to_8_bit(image)) != record.draft)


def _crc(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"
