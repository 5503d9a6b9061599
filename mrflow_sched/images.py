"""Pictures on disk: where float RGB becomes 8 bits, once, at the very end. The only room that uses Pillow."""

from __future__ import annotations

import contextlib
import io
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

__all__ = ["load_image", "read_png_text", "save_png"]


def save_png(path: str | os.PathLike[str], image: Tensor, text: Mapping[str, str] | None = None) -> None:
    """Write `image` (3, H, W, float in [0, 1]; values outside are clamped) as an 8-bit RGB PNG at `path`.

    Values are rounded to the nearest of 256 levels, not truncated, so the mean brightness does not sink by half a
    level. `text` becomes PNG text chunks, keyword -> text (any Unicode; keywords of 1 to 79 Latin-1 letters, as PNG
    asks). The file appears whole or not at all: it is written beside its place and renamed. Raises ValueError for what
    is not such an image or keyword, and OSError in one sentence where it cannot be written (no folder, no right, disk
    full).
    """
    target = Path(path)
    data = _encode_png(_to_8_bit(image), text or {})
    temporary = target.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        # Not tempfile: its files are readable by their owner alone, and a rename keeps that.
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise type(error)(_why_not_written(target, error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_png_text(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text chunks of the PNG at `path`, keyword -> text; empty where it has none.

    Raises FileNotFoundError where there is no file and ValueError where it is not a whole PNG.
    """
    image = _open(path)
    if not isinstance(image, PngImagePlugin.PngImageFile):
        raise ValueError(f"{str(path)!r} is a {image.format} image, not a PNG; text is read from PNG files only.")
    return {str(keyword): str(value) for keyword, value in image.text.items()}


def load_image(path: str | os.PathLike[str]) -> Tensor:
    """The picture at `path` as (3, H, W) float32 RGB in [0, 1], turned upright as its EXIF orientation says.

    Grey and palette images become RGB, 16-bit grey keeps its 16 bits, and transparency is dropped. Raises
    FileNotFoundError where there is no file and ValueError where it is not a whole image of a known format.
    """
    image = ImageOps.exif_transpose(_open(path))
    if image.mode.startswith("I;16"):
        grey = _pixels(image.convert("I"), torch.int32, 1)
        return (grey.float() / 65535).clamp(0, 1).expand(3, -1, -1).contiguous()
    return _pixels(image.convert("RGB"), torch.uint8, 3).float() / 255


def _pixels(image: Image.Image, dtype: torch.dtype, channels: int) -> Tensor:
    """Pillow's own bytes as a (channels, H, W) tensor."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=dtype)
    return flat.reshape(image.height, image.width, channels).permute(2, 0, 1)


def _to_8_bit(image: Tensor) -> Tensor:
    """(3, H, W) float in [0, 1] -> (H, W, 3) uint8, rounded."""
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape or not image.is_floating_point():
        raise ValueError(f"image must be a float tensor (3, H, W), got {image.dtype} of shape {tuple(image.shape)}.")
    exact = image.detach().float().cpu()
    if not bool(exact.isfinite().all()):
        raise ValueError("image holds values that are not finite numbers; nothing was saved.")
    return (exact.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def _encode_png(pixels: Tensor, text: Mapping[str, str]) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in text.items():
        if not 1 <= len(keyword) <= 79 or not all(" " <= letter <= "ÿ" for letter in keyword):
            raise ValueError(f"text has the keyword {keyword!r}; PNG allows 1 to 79 printable Latin-1 letters.")
        chunks.add_text(keyword, value)
    height, width = pixels.shape[:2]
    stream = io.BytesIO()
    Image.frombytes("RGB", (width, height), pixels.numpy().tobytes()).save(stream, "PNG", pnginfo=chunks)
    return stream.getvalue()


def _why_not_written(target: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"the picture {str(target)!r} cannot be written: the folder does not exist; make it first."
    reason = error.strerror or type(error).__name__
    return f"the picture {str(target)!r} cannot be written: {reason}; nothing was left there."


def _open(path: str | os.PathLike[str]) -> Image.Image:
    """The whole image at `path`, read and closed."""
    try:
        image: Image.Image = Image.open(path)
        with image:
            image.load()
        return image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no image file {str(path)!r}; check the path.") from error
    except (UnidentifiedImageError, IsADirectoryError) as error:
        raise ValueError(f"{str(path)!r} is not an image file of a known format; give a PNG, JPEG or WebP.") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image file {str(path)!r} cannot be read ({error}); damaged or too large.") from error
