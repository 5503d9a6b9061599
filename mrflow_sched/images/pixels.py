"""The one reader of pixels: a Pillow image of any mode as float RGB in sRGB, upright, with what had to be decided told.

Images are converted strip by strip, so that the result in floats and Pillow's own bytes are all that is held at once.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

import torch
from PIL import Image, ImageCms, ImageFile, ImageOps
from torch import Tensor

from mrflow_sched._runtime.cancel import Warn, ignore
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.images.formats import check_room, reader_of

_STRIP = 2**21  # pixels that are converted at a time
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_ORIENTATION = 0x0112
# Modes whose colours a profile of a kind describes, and the mode to hand to the colour engine.
_PROFILED = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_OTHER_ORDER = {
    f"{mode};16{here}": f"{mode};16{there}" for mode in ("RGB", "RGBA") for here, there in ("BL", "LB", "NB")
}
"""Raw modes of 16 bits a channel, of which Pillow keeps the high byte; read in the other order it keeps the low one."""


def read_pixels(image: Image.Image, warn: Warn | None = None, *, low: Image.Image | None = None) -> Tensor:
    """A Pillow image as a tensor, in sRGB.

    Grey, palette, CMYK and other modes become RGB, 16-bit grey keeps its bits, a colour profile is applied, and
    transparency stays as a fourth channel. The image is not turned (`upright`).

    Args:
        image: Any image; a file that Pillow has open is decoded.
        warn: Receives a sentence for whatever the file left open: a profile that cannot be used, a range that was
            guessed, further frames.
        low: The low bytes of 16-bit colour, in the mode and size of `image`, which holds the high ones.

    Returns:
        (3, H, W) or, with alpha, (4, H, W), float32 in [0, 1].

    Raises:
        MrFlowError: Values whose range cannot be told, or more pixels than the machine can hold.
    """
    say = warn or ignore
    if 0 in image.size:
        raise MrFlowError(f"image has {image.width}x{image.height} pixels; give one that has some.")
    check_room(*image.size)
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a phone's photo with a second view
        say(f"The image has several frames or pages; number {image.tell() + 1} is used.")
    if image.mode.startswith(("I", "F")):
        return _one_channel(image, say)
    alpha = _has_alpha(image)
    mode = "RGBA" if alpha else "RGB"
    to_srgb = _profile_transform(image, say)
    if to_srgb is not None and low is not None:
        say("The image's 16 bits a channel are read as 8, as its colour profile is applied to 8.")
        low = None
    values = torch.empty((len(mode), image.height, image.width))
    for strip, rows in _strips(image):
        converted = strip.convert(mode) if to_srgb is None else to_srgb(strip, alpha)
        block = values[:, rows]
        block.copy_(pixels_of(converted, torch.uint8, len(mode)))
        if low is None:
            block.div_(255)
        else:
            small = low.crop((0, rows.start, low.width, rows.stop)).convert(mode)
            block.mul_(256).add_(pixels_of(small, torch.uint8, len(mode))).div_(65535)
    return values


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says.

    Args:
        image: Any image, decoded.

    Returns:
        The turned image, without the orientation; `image` itself where it says none or nothing readable.

    Raises:
        MemoryError: Memory ran out.
    """
    if image.format == "TIFF":  # Pillow turns these while it decodes, and old versions keep the tag
        return image
    try:
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)  # without any, Pillow would make a copy
        return ImageOps.exif_transpose(image) if turned else image
    except MemoryError:
        raise
    except Exception:  # EXIF that Pillow cannot read says nothing of the pixels
        return image


def low_bytes(file: BinaryIO, image: ImageFile.ImageFile) -> Image.Image | None:
    """The low bytes of an image of 16 bits a channel in colour, of which Pillow keeps only the high ones.

    Args:
        file: The open file of `image`.
        image: As it was opened, not yet decoded.

    Returns:
        An image in the mode of `image`, decoded and not turned; None where the file has 8 bits.
    """
    tiles: list[Any] = list(image.tile)
    if sys.byteorder != "little" or not tiles or _raw_mode(tiles[0]) not in _OTHER_ORDER:
        return None
    place = file.tell()
    file.seek(0)
    reader = reader_of(file)
    if reader is None:
        return None
    other = reader(file)
    swapped: list[Any] = [_with_raw_mode(tile, _OTHER_ORDER[_raw_mode(tile)]) for tile in cast("list[Any]", other.tile)]
    other.tile = swapped
    other.load()
    file.seek(place)
    return other


def _raw_mode(tile: Any) -> str:
    arguments: Any = tile[3]
    return arguments if isinstance(arguments, str) else str(arguments[0])


def _with_raw_mode(tile: Any, mode: str) -> Any:
    arguments: Any = tile[3]
    changed: Any = mode if isinstance(arguments, str) else (mode, *arguments[1:])
    return tile._replace(args=changed) if hasattr(tile, "_replace") else (*tile[:3], changed)


def pixels_of(image: Image.Image, dtype: torch.dtype, channels: int) -> Tensor:
    """The bytes of a Pillow image as a tensor, unscaled.

    Args:
        image: An image whose mode has `channels` channels of `dtype` per pixel.
        dtype: Of one channel: uint8 for 8-bit modes, int32 for mode "I", float32 for mode "F".
        channels: 1 for grey, 3 for RGB, 4 for RGBA.

    Returns:
        (channels, H, W) of `dtype`.
    """
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=dtype)
    return flat.reshape(image.height, image.width, channels).permute(2, 0, 1)


def _has_alpha(image: Image.Image) -> bool:
    in_palette = image.palette is not None and image.palette.mode.endswith("A")
    marked = image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info
    return image.mode in _ALPHA_MODES or marked or (image.mode == "P" and in_palette)


def _strips(image: Image.Image) -> Iterator[tuple[Image.Image, slice]]:
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        end = min(image.height, top + rows)
        yield image.crop((0, top, image.width, end)), slice(top, end)


# ------------------------------------------------------------------------------------------------------- many bits grey


def _one_channel(image: Image.Image, say: Warn) -> Tensor:
    """Modes of more than 8 bits in one channel, by the range that their kind or their values tell."""
    whole = not image.mode.startswith("F")
    grey = torch.empty((1, image.height, image.width))
    for strip, rows in _strips(image):
        deep = strip.convert("I") if whole else strip
        grey[:, rows] = pixels_of(deep, torch.int32 if whole else torch.float32, 1).float()
    if "icc_profile" in image.info:
        say("The image's colour profile was ignored, as its grey has more than 8 bits; tones may be off.")
    known = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    low, high = float(grey.min()), float(grey.max())
    tops = (65535.0,) if known else (255.0, 65535.0) if whole else (1.0, 255.0, 65535.0)
    top = next((each for each in tops if high <= each), None)
    # Floats a little above 1 may be light beyond white: to take those for 8 bits would turn the image black.
    if top is None or not low >= 0 or (top == 255.0 and not whole and high < 32):
        raise MrFlowError(
            f"image has mode {image.mode} with values from {low:g} to {high:g}; scale them to 0..1 as floats, or save "
            "the image with 8 or 16 bits a channel."
        )
    if not known and top > 1:
        say(f"The image has mode {image.mode} and values up to {high:g}, read as 0 (black) to {top:g} (white).")
    return grey.div_(top).expand(3, -1, -1).contiguous()


# ------------------------------------------------------------------------------------------------------ colour profiles


def _profile_transform(image: Image.Image, say: Warn) -> Callable[[Image.Image, bool], Image.Image] | None:
    """What brings strips of an image to sRGB by its own profile; None where it has none that changes anything."""
    data = image.info.get("icc_profile")
    if not data:
        return None
    cms: Any = ImageCms  # its annotations are partial
    try:
        profile = cms.ImageCmsProfile(io.BytesIO(data))
        mode = _PROFILED[profile.profile.xcolor_space]
        own = "CMYK" if image.mode == "CMYK" else "L" if image.mode in ("L", "LA", "1") else "RGB"
        if mode != own and (mode, own) != ("RGB", "L"):  # grey may lie in a colour space; no other pair makes sense
            raise ValueError(own)
        transform = cms.buildTransform(profile, cms.createProfile("sRGB"), mode, "RGB")
        if mode == "RGB" and _changes_nothing(transform):
            return None
    except MemoryError:
        raise
    except Exception:  # whatever the colour engine finds wrong with it
        say("The image's colour profile is damaged or not for its mode, and was ignored; colours may be off.")
        return None

    def convert(strip: Image.Image, alpha: bool) -> Image.Image:
        done = cast("Image.Image", ImageCms.applyTransform(strip.convert(mode), transform))
        if alpha:
            done.putalpha(strip.convert("RGBA").getchannel("A"))
        return done

    return convert


def _changes_nothing(transform: Any) -> bool:
    """Whether a transform is sRGB to sRGB but for rounding; then the image keeps its exact values, and 16 bits."""
    levels = [round(step * 255 / 8) for step in range(9)]
    colours = bytes(value for r in levels for g in levels for b in levels for value in (r, g, b))
    probe = Image.frombytes("RGB", (27, 27), colours)
    moved = cast("Image.Image", ImageCms.applyTransform(probe, transform)).tobytes()
    return max(abs(before - after) for before, after in zip(colours, moved, strict=True)) <= 1
