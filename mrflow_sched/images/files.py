"""Images on disk: where float RGB becomes 8 bits, once, at the very end."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import uuid
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import BinaryIO, NoReturn

import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from mrflow_sched._runtime.errors import FileError, MissingFileError, MrFlowError, first_line
from mrflow_sched.images.convert import pixels_of, to_8_bit
from mrflow_sched.plan.checks import MAX_SIDE

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_END = len(_SIGNATURE) + 25  # where the first chunk, 13 bytes of header, ends
_COMPRESSION = 4
"""Compression level. zlib's default, 6, takes twice as long for nearly the same size (`bench/speed --outside`)."""


def save_png(path: str | os.PathLike[str], image: Tensor, text: Mapping[str, str] | None = None) -> None:
    """Write an image as an 8-bit RGB PNG. The file appears whole or not at all.

    Values are rounded to the nearest of 256, not truncated, so the mean brightness does not fall by half a step. The
    file is written beside its target and renamed.

    Args:
        path: The file to write; an older file there is replaced.
        image: (3, H, W), float in [0, 1]; values outside are clamped.
        text: PNG text chunks, keyword -> text (any Unicode; keywords of 1 to 79 Latin-1 letters, as PNG requires).

    Raises:
        MrFlowError: `image` or a keyword is not as above.
        MissingFileError: The folder does not exist.
        FileError: The file cannot be written (no permission, disk full).
    """
    target = Path(path)
    data = _encode_png(to_8_bit(image), text or {})
    temporary = target.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        # Not tempfile: its files are readable by their owner alone, and a rename keeps that.
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        _refuse_write(target, error)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_png_text(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text chunks of a PNG.

    No pixel is decoded, so an image of any size takes no time.

    Args:
        path: A PNG file.

    Returns:
        Keyword -> text; empty where the file has none.

    Raises:
        MissingFileError: There is no such file.
        MrFlowError: It is not a whole PNG.
    """
    with _refusing(path), open(path, "rb") as file:
        if _is_png(file):
            image = PngImagePlugin.PngImageFile(_texts_on_one_pixel(file))
            return {str(keyword): str(value) for keyword, value in image.text.items()}
        kind = Image.open(file).format
    raise MrFlowError(f"{str(path)!r} is a {kind} image, not a PNG; text is read from PNG files only.")


def open_image(path: str | os.PathLike[str], *, own: bool = False) -> Image.Image:
    """The whole image in a file as Pillow holds it, the file closed.

    Args:
        path: An image file of any format that Pillow reads.
        own: The file was written by this process: a PNG may then have up to 32768 pixels a side, the most that a plan
            allows. False: Pillow's guard refuses files that would unpack to about 178 million pixels or more.

    Returns:
        The decoded image, in the file's own mode.

    Raises:
        MissingFileError: There is no such file.
        MrFlowError: It is not a whole image of a known format, or too large.
    """
    with _refusing(path), open(path, "rb") as file:
        if own and _is_png(file):
            image: Image.Image = PngImagePlugin.PngImageFile(file)  # Image.open would ask the guard
            if max(image.size) > MAX_SIDE:
                raise MrFlowError(f"{image.width}x{image.height} pixels; at most {MAX_SIDE} a side are allowed")
        else:
            image = Image.open(file)
        image.load()
    return image


def load_image(path: str | os.PathLike[str]) -> Tensor:
    """The image in a file as a tensor, turned upright as its EXIF orientation says.

    Grey and palette images become RGB, 16-bit grey keeps its 16 bits, and transparency is dropped.

    Args:
        path: An image file of any format that Pillow reads.

    Returns:
        (3, H, W) float32 RGB in [0, 1].

    Raises:
        MissingFileError: There is no such file.
        MrFlowError: It is not a whole image of a known format, or too large.
    """
    opened = open_image(path)
    with _refusing(path):
        image = ImageOps.exif_transpose(opened)
        deep = image.mode.startswith("I;16")
        image = image.convert("I" if deep else "RGB")
    if deep:
        return (pixels_of(image, torch.int32, 1).float() / 65535).clamp(0, 1).expand(3, -1, -1).contiguous()
    return pixels_of(image, torch.uint8, 3).float() / 255


def _encode_png(pixels: Tensor, text: Mapping[str, str]) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in text.items():
        if not 1 <= len(keyword) <= 79 or not all(" " <= letter <= "ÿ" for letter in keyword):
            raise MrFlowError(f"text has the keyword {keyword!r}; PNG allows 1 to 79 printable Latin-1 letters.")
        chunks.add_text(keyword, value)
    height, width = pixels.shape[:2]
    stream = io.BytesIO()
    image = Image.frombytes("RGB", (width, height), pixels.numpy().tobytes())
    image.save(stream, "PNG", pnginfo=chunks, compress_level=_COMPRESSION)
    return stream.getvalue()


def _refuse_write(target: Path, error: OSError) -> NoReturn:
    if isinstance(error, FileNotFoundError):
        raise MissingFileError(
            f"the image {str(target)!r} cannot be written: the folder does not exist; make it first."
        ) from error
    reason = error.strerror or type(error).__name__
    raise FileError(f"the image {str(target)!r} cannot be written: {reason}; nothing was left there.") from error


def _is_png(file: BinaryIO) -> bool:
    """Whether `file`, read from its start, is a PNG; it is left at its start."""
    start = file.read(len(_SIGNATURE))
    file.seek(0)
    return start == _SIGNATURE


def _texts_on_one_pixel(file: BinaryIO) -> io.BytesIO:
    """A PNG of one pixel that carries all text chunks of `file`, for Pillow to read in place of a large one."""
    texts: list[bytes] = []
    file.seek(len(_SIGNATURE))
    kind = b""
    while kind != b"IEND":
        head = file.read(8)
        if len(head) < 8:
            raise EOFError("the file ends too early")
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            texts.append(head + file.read(length + 4))  # the checksum follows; Pillow compares it
        else:
            file.seek(length + 4, os.SEEK_CUR)
    pixel = _encode_png(torch.zeros(1, 1, 3, dtype=torch.uint8), {})
    return io.BytesIO(pixel[:_HEADER_END] + b"".join(texts) + pixel[_HEADER_END:])


@contextlib.contextmanager
def _refusing(path: str | os.PathLike[str]) -> Generator[None, None, None]:
    """Turn whatever goes wrong while the image at `path` is read into one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"there is no image file {str(path)!r}; check the path.") from error
    except (UnidentifiedImageError, IsADirectoryError) as error:
        raise MrFlowError(f"{str(path)!r} is not an image file of a known format; give a PNG, JPEG or WebP.") from error
    except MemoryError:
        raise
    except Exception as error:  # whatever Pillow's readers may raise for a damaged file
        raise MrFlowError(
            f"the image file {str(path)!r} cannot be read ({_reason(error)}); it is damaged or too large."
        ) from error


def _reason(error: BaseException) -> str:
    """What the system says of a file, without the number and the path, else what the reader says."""
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)
