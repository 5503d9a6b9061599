"""Formats of image files: told by first bytes, opened by Pillow's reader of that format and no other, and written.

Pillow's own way in tries all formats it knows, among them some that start another program (EPS starts Ghostscript) and
many that no user of ours has; its limit on pixels is a global that this package must not change.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Generator, Mapping
from types import MappingProxyType
from typing import Any, BinaryIO, cast

import torch
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from mrflow_sched._runtime.errors import MrFlowError, first_line, quoted
from mrflow_sched._runtime.memory import free_bytes

READABLE = "PNG, JPEG, WebP, TIFF, BMP or GIF"

MAX_PIXELS = 2**28
"""Most pixels of a file from elsewhere: 16384x16384, whose floats take 3 GiB."""

MAX_FILE_BYTES = 16 * MAX_PIXELS
"""Most bytes of a file from elsewhere: four floats a pixel."""

BYTES_PER_PIXEL = 24
"""Memory while an image is read: 4 bytes a value of the result in floats, and at most as much again."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of the files that can be written."""

OPAQUE = (".jpg", ".jpeg")
"""Those of them that hold no transparency."""

_READERS: tuple[tuple[tuple[bytes, ...], Callable[[BinaryIO], ImageFile.ImageFile]], ...] = (
    ((b"\x89PNG\r\n\x1a\n",), PngImagePlugin.PngImageFile),
    ((b"\xff\xd8\xff",), JpegImagePlugin.JpegImageFile),
    ((b"RIFF",), WebPImagePlugin.WebPImageFile),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
    ((b"BM",), BmpImagePlugin.BmpImageFile),
    ((b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
)

_LARGEST_SIDE: Mapping[str, int] = MappingProxyType({".jpg": 65500, ".jpeg": 65500, ".webp": 16383})

# EXIF tags (CIPA DC-008), and what a JPEG's comment begins with that holds our texts.
_DESCRIPTION, _MAKE, _MODEL, _EXIF_IFD, _USER_COMMENT = 0x010E, 0x010F, 0x0110, 0x8769, 0x9286
_COMMENT = b"mrflow-text:"
_SEGMENT = 65533  # bytes that a JPEG segment holds
_PARAMETERS = "parameters"


def reader_of(file: BinaryIO) -> Callable[[BinaryIO], ImageFile.ImageFile] | None:
    """Pillow's reader of the format that a file begins like.

    Args:
        file: An image file, read from its start; it is left there.

    Returns:
        The reader; None for any other format.
    """
    start = file.read(16)
    file.seek(0)
    return next((reader for heads, reader in _READERS if start.startswith(heads)), None)


@contextlib.contextmanager
def refusing(what: str) -> Generator[None, None, None]:
    """Turn whatever goes wrong while an image is read into one sentence.

    Args:
        what: Names the image at the beginning of the sentence.

    Yields:
        Nothing.

    Raises:
        MrFlowError: Something went wrong; a refusal passes as it is.
        MemoryError: Memory ran out.
    """
    try:
        yield
    except (MrFlowError, MemoryError):
        raise
    except Exception as error:  # whatever Pillow's readers may raise for a damaged file
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise MrFlowError(f"{what} cannot be read ({reason}); it is damaged or too large.") from error


def check_room(width: int, height: int) -> None:
    """Refuse an image whose pixels the machine cannot hold, before any is decoded.

    Args:
        width: Pixels.
        height: Pixels.

    Raises:
        MrFlowError: The image needs more memory than is free.
    """
    needed, free = width * height * BYTES_PER_PIXEL, free_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise MrFlowError(
            f"{width}x{height} pixels need {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free; "
            "make the image smaller first."
        )


def check_bytes(count: int) -> None:
    """Refuse an image file that is larger than any image, before it is read: some readers take it whole.

    Args:
        count: The file's size in bytes.

    Raises:
        MrFlowError: It has more bytes than the largest image, or than are free.
    """
    free = free_bytes(torch.device("cpu"))
    most = MAX_FILE_BYTES if free is None else min(MAX_FILE_BYTES, free)
    if count > most:
        raise MrFlowError(
            f"the image file has {count / 2**30:.1f} GiB, and at most {most / 2**30:.1f} GiB are read; "
            "make the image smaller first."
        )


def check_writable(suffix: str, width: int, height: int) -> None:
    """Refuse a format that cannot hold an image; meant to be asked before a run.

    Args:
        suffix: Ending of the file's name, with its dot.
        width: Pixels.
        height: Pixels.

    Raises:
        MrFlowError: `suffix` is none of `SUFFIXES`, or the format's sides end earlier.
    """
    if suffix not in SUFFIXES:
        raise MrFlowError(f"the suffix of an image must be one of {', '.join(SUFFIXES)}, got {quoted(suffix)}.")
    most = _LARGEST_SIDE.get(suffix)
    if most is not None and max(width, height) > most:
        raise MrFlowError(f"{width}x{height} pixels do not fit into a {suffix} file (at most {most} a side); use .png.")


# -------------------------------------------------------------------------------------------------------------- writing


def encode(
    image: Image.Image, suffix: str, text: Mapping[str, str], chunks: Mapping[bytes, bytes] | None = None
) -> bytes:
    """An image as the bytes of a file.

    PNG and WebP are lossless; JPEG has quality 95 and full colour resolution (4:4:4). PNG holds texts as text chunks.
    JPEG and WebP hold them as one JSON object, in a comment and in EXIF's ImageDescription, and the text `parameters`
    in EXIF's UserComment too, where other programs look for it.

    Args:
        image: An RGB image, or RGBA where the format is none of `OPAQUE`.
        suffix: One of `SUFFIXES`.
        text: Keyword -> text; keywords of 1 to 79 printable Latin-1 letters.
        chunks: Of a PNG: further chunks, type -> content, behind the image; other formats have none.

    Returns:
        The file's bytes.

    Raises:
        MrFlowError: A keyword is not as above, or the format cannot hold the image.
    """
    check_writable(suffix, *image.size)
    if suffix in OPAQUE and image.mode == "RGBA":
        raise MrFlowError(f"a {suffix} file holds no transparency; use .png or .webp, or leave alpha out.")
    for keyword in text:
        if not 1 <= len(keyword) <= 79 or not all(" " <= letter <= "ÿ" for letter in keyword):
            raise MrFlowError(f"text has the keyword {quoted(keyword)}; PNG allows 1 to 79 printable Latin-1 letters.")
    stream = io.BytesIO()
    if suffix == ".png":
        info = PngImagePlugin.PngInfo()
        for keyword, value in text.items():
            info.add_text(keyword, value)
        for kind, body in (chunks or {}).items():
            info.add(kind, body, after_idat=True)
        # zlib's default level, 6, takes twice as long for nearly the same size (`bench/speed --outside`).
        image.save(stream, "PNG", pnginfo=info, compress_level=4)
        return stream.getvalue()
    packed = json.dumps(dict(text)) if text else ""
    if suffix == ".webp":
        image.save(stream, "WEBP", lossless=True, quality=20, method=2, exif=_exif(text, packed).tobytes())
        return stream.getvalue()
    exif = _exif(text, "").tobytes()
    image.save(stream, "JPEG", quality=95, subsampling=0, exif=exif if len(exif) <= _SEGMENT else b"")
    return _with_comments(stream.getvalue(), packed.encode("ascii"))


def _exif(text: Mapping[str, str], packed: str) -> Image.Exif:
    exif = Image.Exif()
    if packed:
        exif[_DESCRIPTION] = packed
    if _PARAMETERS in text:
        exif[_EXIF_IFD] = {_USER_COMMENT: b"UNICODE\0" + text[_PARAMETERS].encode("utf-16-be", "replace")}
    return exif


def _with_comments(jpeg: bytes, packed: bytes) -> bytes:
    """A JPEG with `packed` in as many comments as it takes, behind its application segments."""
    end = 2
    while jpeg[end] == 0xFF and 0xE0 <= jpeg[end + 1] <= 0xEF:
        end += 2 + int.from_bytes(jpeg[end + 2 : end + 4], "big")
    room = _SEGMENT - len(_COMMENT)
    parts = [_COMMENT + packed[start : start + room] for start in range(0, len(packed), room)]
    comments = b"".join(b"\xff\xfe" + (len(part) + 2).to_bytes(2, "big") + part for part in parts)
    return jpeg[:end] + comments + jpeg[end:]


# -------------------------------------------------------------------------------------------------------- reading texts


def texts_of(image: ImageFile.ImageFile) -> dict[str, str]:
    """The texts in a JPEG or WebP: ours, and those that A1111 and ComfyUI write.

    Args:
        image: An open image; nothing of it is decoded.

    Returns:
        Keyword -> text.
    """
    exif: Any = image.getexif()
    found: dict[str, str] = {}
    comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if isinstance(comment, bytes) and comment:
        found[_PARAMETERS] = _user_comment(comment)
    for tag in (_MAKE, _MODEL):  # ComfyUI writes "prompt:{...}" and "workflow:{...}" there
        keyword, _, value = str(exif.get(tag, "")).partition(":")
        if keyword in ("prompt", "workflow"):
            found[keyword] = value.rstrip("\0")
    comments = [part for name, part in getattr(image, "applist", ()) if name == "COM" and part.startswith(_COMMENT)]
    packed = b"".join(part[len(_COMMENT) :] for part in comments).decode("ascii", "replace")
    return found | _unpacked(packed or str(exif.get(_DESCRIPTION, "")))


def _unpacked(packed: str) -> dict[str, str]:
    """Our texts from their JSON object; none where a description is anything else."""
    try:
        values: Any = json.loads(packed)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    pairs = cast("dict[str, Any]", values).items()
    return {keyword: value for keyword, value in pairs if isinstance(value, str)}


def _user_comment(comment: bytes) -> str:
    """EXIF's UserComment as text: eight bytes name its code."""
    code, value = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        # The order of bytes is not said; in text of any Latin share the high bytes are the zeros.
        small = value[1::2].count(0) > value[::2].count(0)
        return value.decode("utf-16-le" if small else "utf-16-be", "replace")
    known = code in (b"ASCII\0\0\0", b"\0" * 8)
    return (value if known else comment).decode("utf-8", "replace").rstrip("\0")
