"""Images on disk: where float RGB becomes 8 bits, once, at the very end."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from PIL import Image, ImageFile, PngImagePlugin
from torch import Tensor

from mrflow_sched._runtime.cancel import Warn
from mrflow_sched._runtime.errors import FileError, MissingFileError, MrFlowError
from mrflow_sched._runtime.write import next_new, write_new, write_whole
from mrflow_sched.images.alpha import split_alpha
from mrflow_sched.images.convert import picture_of, to_8_bit
from mrflow_sched.images.formats import (
    MAX_PIXELS,
    READABLE,
    check_bytes,
    check_room,
    encode,
    reader_of,
    refusing,
    texts_of,
)
from mrflow_sched.images.pixels import low_bytes, read_pixels, upright
from mrflow_sched.plan.checks import MAX_SIDE

MAX_TEXT_BYTES = PngImagePlugin.MAX_TEXT_MEMORY
"""Most bytes of the texts in a PNG, Pillow's own limit on what they hold."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_END = len(_SIGNATURE) + 25  # where the first chunk, 13 bytes of header, ends


def save_png(path: str | os.PathLike[str], image: Tensor, text: Mapping[str, str] | None = None) -> None:
    """Write an image as an 8-bit PNG. The file appears whole or not at all.

    Values are rounded to the nearest of 256, not truncated, so the mean brightness does not fall by half a step. The
    file is written beside its target and renamed.

    Args:
        path: The file to write; an older file there is replaced.
        image: (3, H, W) or, with alpha, (4, H, W), float in [0, 1]; values outside are clamped.
        text: PNG text chunks, keyword -> text (any Unicode; keywords of 1 to 79 Latin-1 letters, as PNG requires).

    Raises:
        MrFlowError: `image` or a keyword is not as above.
        MissingFileError: The folder does not exist.
        FileError: The file cannot be written (no permission, disk full).
    """
    target = Path(path)
    data = encode(picture_of(to_8_bit(image)), ".png", text or {})
    try:
        write_whole(target, data)
    except OSError as error:
        _refuse_write(target, error)


def image_bytes(
    image: Tensor, text: Mapping[str, str], suffix: str = ".png", chunks: Mapping[bytes, bytes] | None = None
) -> bytes:
    """An image as the bytes of its file, for a place that is no folder of this machine.

    Args:
        image: As in `save_new`.
        text: As in `save_png`.
        suffix: As in `save_new`.
        chunks: As in `formats.encode`.

    Returns:
        What `save_new` would write.
    """
    return encode(picture_of(to_8_bit(image)), suffix, text, chunks)


def save_new(
    folder: str | os.PathLike[str],
    stem: str,
    image: Tensor,
    text: Mapping[str, str] | None = None,
    suffix: str = ".png",
    *,
    chunks: Mapping[bytes, bytes] | None = None,
) -> Path:
    """Write an image under the first free name of `stem`, `stem-2`, `stem-3` ..., never over another file.

    The file appears whole or not at all, and its name is taken in one step: of processes that save the same stem into
    one folder at the same time, each gets a name of its own. What a killed process left half written in the folder is
    removed.

    Args:
        folder: An existing folder.
        stem: Name of the file without suffix.
        image: (3, H, W) or, with alpha and no JPEG, (4, H, W), float in [0, 1]; values outside are clamped.
        text: As in `save_png`.
        suffix: ".png", ".jpg", ".jpeg" or ".webp", which decides the format (`formats.encode`). Ask
            `formats.check_writable` before a long run whether the format can hold the size.
        chunks: As in `formats.encode`.

    Returns:
        The path of the file, `folder` / (`stem`, perhaps "-2" ..., `suffix`).

    Raises:
        MrFlowError: `image`, a keyword or `suffix` is not as above.
        MissingFileError: The folder does not exist.
        FileError: The file cannot be written (no permission, disk full).
    """
    data = image_bytes(image, text or {}, suffix, chunks)
    try:
        return write_new(Path(folder), stem, suffix, data)
    except OSError as error:
        _refuse_write(next_new(Path(folder), stem, suffix), error)


def read_text(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in an image file.

    No pixel is decoded, so an image of any size takes no time.

    Args:
        path: A PNG, JPEG or WebP file.

    Returns:
        Keyword -> text, as it was saved; of files of other programs also what A1111 (`parameters`) and ComfyUI
        (`prompt`, `workflow`) write. Empty where the file has none.

    Raises:
        MissingFileError: There is no such file.
        MrFlowError: It is no whole file of these formats.
    """
    with _reading(path) as file:
        reader = _reader(file, path)
        if reader is PngImagePlugin.PngImageFile:
            image = PngImagePlugin.PngImageFile(_texts_on_one_pixel(file))
            return {str(keyword): str(value) for keyword, value in image.text.items()}
        return texts_of(reader(file))


def open_image(path: str | os.PathLike[str], *, own: bool = False) -> Image.Image:
    """The whole image in a file as Pillow holds it, the file closed.

    Args:
        path: A PNG, JPEG, WebP, TIFF, BMP or GIF file; its first bytes decide, not its name.
        own: The file was written by this process: it may then have up to 32768 pixels a side, the most that a plan
            allows. False: at most 16384x16384 pixels in all.

    Returns:
        The decoded image, in the file's own mode.

    Raises:
        MissingFileError: There is no such file.
        MrFlowError: It is not a whole image of these formats, or has more pixels than allowed or than memory holds.
    """
    with _reading(path) as file:
        image = _opened(file, path, own=own)
        image.load()
    return image


def load_image(path: str | os.PathLike[str], warn: Warn | None = None, *, alpha: bool = False) -> Tensor:
    """The image in a file as a tensor in sRGB, turned upright as its EXIF orientation says.

    Every mode becomes RGB, 16 bits a channel are kept, and a colour profile is applied (`pixels.read_pixels`).

    Args:
        path: As in `open_image`.
        warn: Receives a sentence for whatever the file left open: an unusable profile, further frames ...
        alpha: Keep transparency as a fourth channel. False: colours that it hides are filled in from their neighbours.

    Returns:
        (3, H, W) float32 RGB in [0, 1]; (4, H, W) with `alpha` where the file has transparency.

    Raises:
        MissingFileError: There is no such file.
        MrFlowError: As in `open_image`, or values whose range cannot be told.
    """
    with _reading(path) as file:
        image = _opened(file, path)
        low = low_bytes(file, image)
        image.load()
        values = read_pixels(upright(image), warn, low=None if low is None else upright(low))
    return values if alpha else split_alpha(values[None])[0][0]


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Generator[BinaryIO, None, None]:
    """The image file at `path`, open; whatever goes wrong with it is one sentence."""
    with refusing(_named(path)):
        try:
            found = os.stat(path)
        except FileNotFoundError as error:
            raise MissingFileError(f"there is no image file {str(path)!r}; check the path.") from error
        if stat.S_ISDIR(found.st_mode):
            raise MrFlowError(f"{str(path)!r} is a folder; give an image file in it.")
        if not stat.S_ISREG(found.st_mode):  # waits for a writer, or cannot be read from its start again
            raise MrFlowError(f"{str(path)!r} is a pipe or a device; save the image as a file, and give that.")
        check_bytes(found.st_size)
        with open(path, "rb") as file:
            yield file


def _no_image(path: str | os.PathLike[str]) -> MrFlowError:
    return MrFlowError(f"{str(path)!r} is not an image file of a known format; give a {READABLE}.")


def _named(path: str | os.PathLike[str]) -> str:
    return f"the image file {str(path)!r}"


def _reader(file: BinaryIO, path: str | os.PathLike[str]) -> Any:
    reader = reader_of(file)
    if reader is None:
        raise _no_image(path)
    return reader


def _opened(file: BinaryIO, path: str | os.PathLike[str], *, own: bool = False) -> ImageFile.ImageFile:
    """The image in an open file, no pixel decoded yet, after its size was found to be possible."""
    image: ImageFile.ImageFile = _reader(file, path)(file)
    width, height = image.size
    long = max(width, height) > MAX_SIDE
    if long or (not own and width * height > MAX_PIXELS):
        most = f"{MAX_SIDE} a side" if long else f"{MAX_PIXELS / 1e6:.0f} million in all"
        raise MrFlowError(f"{_named(path)} has {width}x{height} pixels, more than {most}; make it smaller first.")
    check_room(width, height)
    return image


def _refuse_write(target: Path, error: OSError) -> NoReturn:
    if isinstance(error, FileNotFoundError):
        raise MissingFileError(
            f"the image {str(target)!r} cannot be written: the folder does not exist; make it first."
        ) from error
    reason = error.strerror or type(error).__name__
    left = "the file that was there is unchanged" if os.path.lexists(target) else "nothing was left there"
    raise FileError(f"the image {str(target)!r} cannot be written: {reason}; {left}.") from error


def _texts_on_one_pixel(file: BinaryIO) -> io.BytesIO:
    """A PNG of one pixel that carries all text chunks of `file`, for Pillow to read in place of a large one."""
    texts: list[bytes] = []
    room = MAX_TEXT_BYTES
    file.seek(len(_SIGNATURE))
    kind = b""
    while kind != b"IEND":
        head = file.read(8)
        if len(head) < 8:
            raise EOFError("the file ends too early")
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            room -= length
            if room < 0:
                raise MrFlowError(
                    f"the image's texts have more than {MAX_TEXT_BYTES >> 20} MiB; save the image without them."
                )
            texts.append(head + file.read(length + 4))  # the checksum follows; Pillow compares it
        else:
            file.seek(length + 4, os.SEEK_CUR)
    pixel = encode(Image.new("RGB", (1, 1)), ".png", {})
    return io.BytesIO(pixel[:_HEADER_END] + b"".join(texts) + pixel[_HEADER_END:])
