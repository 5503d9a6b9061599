"""Pixel super-resolution to an exact size: ESRGAN-type files, or Lanczos where there is none.

`load_upscaler` reads a model file without running anything in it. `upscale_to` makes any target size from any model
scale: the model as often as it helps, an antialiased resize for the rest, a centre crop where the shapes differ, never
a stretch. Images are float32 RGB in [0, 1] from end to end; only the model itself may run in half precision.
"""

# spandrel ships its types without the marker that says so.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import math
import os
import pickle
import re
import tarfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched._device import has_bfloat16, resolve_device
from mrflow_sched._errors import first_line
from mrflow_sched._torchvision_ops import ensure_ops
from mrflow_sched.plan import fit_box
from mrflow_sched.solvers import Cancelled
from mrflow_sched.tiles import feathered, spans

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor, ModelBase

__all__ = [
    "LanczosUpscaler",
    "ModelUpscaler",
    "PixelUpscaler",
    "choose_dtype",
    "free_memory",
    "is_memory_error",
    "load_upscaler",
    "resize_lanczos",
    "stop_if",
    "upscale_to",
]

Cancel = Callable[[], bool]
Warn = Callable[[str], object]

SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")
MIN_TILE = 16
# Tile sides tried, from large to small, after the full frame ran out of memory.
FALLBACK_TILES = (1024, 512, 256, 128, 64)
NO_MODEL = (
    "no super-resolution model was given, so the picture was enlarged with Lanczos, which leaves fine detail soft; "
    "give an ESRGAN-type file (.safetensors or .pth) for sharper results."
)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Purely convolutional: these run a third faster with channels last; others may rely on the plain layout.
_CHANNELS_LAST = frozenset({"ESRGAN", "Compact"})
_MEMORY_WORDS = re.compile(r"out of memory|(can't|cannot) allocate memory|not enough memory", re.IGNORECASE)
# A name in a file may claim any layer number, and the layers up to it would be built; no real model comes near this.
_MAX_LAYER = 256
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


class PixelUpscaler(Protocol):
    """Anything that enlarges RGB images by a whole factor."""

    @property
    def name(self) -> str:
        """What to call it in metadata and messages."""
        ...

    @property
    def scale(self) -> int:
        """Output side over input side, 1 for restoration models."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) float32 in [0, 1] -> (B, 3, h*scale, w*scale) float32 in [0, 1], on the same device."""
        ...


@dataclass(frozen=True)
class LanczosUpscaler:
    """Plain windowed-sinc enlargement: no detail is added. `upscale_to` takes it to any size in one resize."""

    scale: int = 2
    name: str = "Lanczos"

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 3, h*scale, w*scale), clamped to [0, 1]."""
        _check_images(images)
        height, width = images.shape[-2:]
        return resize_lanczos(images, width * self.scale, height * self.scale).clamp(0, 1)


@dataclass(frozen=True)
class ModelUpscaler:
    """A super-resolution model read by spandrel, ready to run.

    `tile` limits the side, in input pixels, of what the model sees at once; None tries the full frame and goes over to
    tiles only where memory runs out. Tiles overlap by `overlap` input pixels (at most half a tile) and are blended.
    Images of a batch go through one by one: that is the contract of spandrel's models, and it makes a batch of N equal
    N single runs bit for bit.
    """

    name: str
    model: ImageModelDescriptor[torch.nn.Module] = field(repr=False)
    tile: int | None = None
    overlap: int = 32
    cancel: Cancel | None = None

    @property
    def scale(self) -> int:
        """Output side over input side."""
        return self.model.scale

    @property
    def device(self) -> torch.device:
        """Where the model runs; images come back to where they were."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision the model runs in."""
        return self.model.dtype

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) float32 in [0, 1] -> (B, 3, h*scale, w*scale) float32 in [0, 1], on the device of `images`."""
        return self.run(images)

    @torch.no_grad()
    def run(self, images: Tensor, *, cancel: Cancel | None = None, warn: Warn | None = None) -> Tensor:
        """As calling it; `cancel` is polled before every tile, and `warn` hears a sentence where tiles were needed.

        Raises ValueError for images that are not (B, 3, h, w) in float and for a model whose result is not finite,
        MemoryError where the smallest tile does not fit, and `solvers.Cancelled` once `cancel` answers True.
        """
        _check_images(images)
        say = warn or _ignore
        side = self._first_side(max(images.shape[-2:]), say)
        done: list[Tensor] = []
        for index in range(len(images)):
            image = images[index : index + 1].float()
            result, side = self._fit_memory(image, side, cancel or self.cancel, say)
            done.append(result)
        return torch.cat(done).clamp_(0, 1)

    def _first_side(self, longest: int, say: Warn) -> int:
        """The tile side to begin with; the image's own longest side means the full frame."""
        if self.tile is None or self.tile >= longest:
            return longest
        if self._tiling == "INTERNAL":
            say(f"the upscaler {self.name} does its own tiling, so the limit of {self.tile} pixels was not applied.")
            return longest
        if self._tiling == "DISCOURAGED":
            say(f"the upscaler {self.name} looks at the whole picture, so tiles of {self.tile} pixels may show.")
        return self.tile

    def _fit_memory(self, image: Tensor, side: int, cancel: Cancel | None, say: Warn) -> tuple[Tensor, int]:
        """One image's result in the largest pieces that memory allows, and their side, where the next image begins."""
        while True:
            result = self._attempt(image, side, cancel)
            if result is not None:
                return result, side
            smaller = [tile for tile in FALLBACK_TILES if tile < side]
            if not smaller or self._tiling == "INTERNAL":
                raise MemoryError(
                    f"memory ran out while the upscaler {self.name} enlarged {side}x{side} pixels at once; "
                    "free memory, or choose a smaller size or upscaler."
                )
            side = smaller[0]
            say(f"memory ran out in the upscaler {self.name}; the picture was enlarged in tiles of {side} pixels.")

    def _attempt(self, image: Tensor, side: int, cancel: Cancel | None) -> Tensor | None:
        """The result in pieces of at most `side`, or None where memory ran out; its tensors are gone by then."""
        try:
            if side >= max(image.shape[-2:]):
                stop_if(cancel)
                return self._piece(image)
            return self._tiled(image, side, cancel)
        except Exception as error:
            if not is_memory_error(error):
                raise
        free_memory(self.device)
        return None

    def _tiled(self, image: Tensor, side: int, cancel: Cancel | None) -> Tensor:
        """One image through overlapping tiles, blended with weights that fall linearly across each overlap."""
        height, width = image.shape[-2:]
        multiple = self.model.size_requirements.multiple_of
        rows = spans(height, side, self.overlap, multiple)
        columns = spans(width, side, self.overlap, multiple)
        scale = self.scale
        total = image.new_zeros((1, 3, height * scale, width * scale))
        weight = image.new_zeros((1, 1, height * scale, width * scale))
        for (top, bottom), down in feathered(rows, scale):
            for (left, right), across in feathered(columns, scale):
                stop_if(cancel)
                piece = self._piece(image[..., top:bottom, left:right])
                mask = (down[:, None] * across).to(image.device)
                area = (..., slice(top * scale, bottom * scale), slice(left * scale, right * scale))
                total[area] += piece * mask
                weight[area] += mask
        return total / weight

    def _piece(self, image: Tensor) -> Tensor:
        """One forward of the model, back on the image's device in float32."""
        layout = torch.channels_last if self._id in _CHANNELS_LAST else torch.contiguous_format
        ready = image.to(self.device, self.dtype).contiguous(memory_format=layout)
        result = self.model(ready).to(image.device, torch.float32)
        if not bool(result.isfinite().all()):
            raise ValueError(
                f"the upscaler {self.name} gave values that are not finite in {str(self.dtype)[6:]}; "
                "load it with dtype='float32', or use another file."
            )
        return result

    @property
    def _tiling(self) -> str:
        return self.model.tiling.name

    @property
    def _id(self) -> str:
        return str(self.model.architecture.id)


# ---------------------------------------------------------------------------------------------------- exact target size


def upscale_to(
    images: Tensor,
    width: int,
    height: int,
    upscaler: PixelUpscaler | None = None,
    *,
    cancel: Cancel | None = None,
    warn: Warn | None = None,
) -> Tensor:
    """`images` (B, 3, h, w, float in [0, 1]) as (B, 3, height, width) float32 in [0, 1], on the same device.

    The model runs until its result is nearest the needed factor (on a ratio scale); bicubic resizing with antialiasing,
    in float32, does the rest either way. Where the shapes differ the picture fills the target and is cropped at the
    centre (`plan.fit_box`). None and `LanczosUpscaler` resize with Lanczos, and `warn` hears so. `warn` gets one
    sentence at a time. Raises ValueError for bad sizes or images, MemoryError, and `solvers.Cancelled` once `cancel`
    answers True.
    """
    _check_images(images)
    say = warn or _ignore
    now_height, now_width = images.shape[-2:]
    wide, high, left, top = fit_box(now_width, now_height, width, height)
    stop_if(cancel)
    result = images.float()
    if upscaler is None or isinstance(upscaler, LanczosUpscaler):
        if wide > now_width or high > now_height:
            say(NO_MODEL)
        result = resize_lanczos(result, wide, high)
    else:
        for _ in range(_passes(max(wide / now_width, high / now_height), upscaler.scale)):
            stop_if(cancel)
            result = _apply(upscaler, result, cancel, say)
        result = _resize_bicubic(result, wide, high)
    return result[..., top : top + height, left : left + width].clamp(0, 1).contiguous()


def _apply(upscaler: PixelUpscaler, images: Tensor, cancel: Cancel | None, say: Warn) -> Tensor:
    if isinstance(upscaler, ModelUpscaler):
        return upscaler.run(images, cancel=cancel, warn=say)
    result = _whole_or_one_by_one(upscaler, images, cancel)
    expected = (*images.shape[:2], *(side * upscaler.scale for side in images.shape[-2:]))
    if result.shape != expected:
        raise ValueError(
            f"the upscaler {upscaler.name} gave shape {tuple(result.shape)} where its scale {upscaler.scale} "
            f"asks for {expected}; correct its scale."
        )
    return result.to(images)


def _whole_or_one_by_one(upscaler: PixelUpscaler, images: Tensor, cancel: Cancel | None) -> Tensor:
    """Somebody else's upscaler: a batch that does not fit into memory goes through image by image."""
    for size in dict.fromkeys((len(images), 1)):
        try:
            done: list[Tensor] = []
            for first in range(0, len(images), size):
                stop_if(cancel)
                done.append(upscaler(images[first : first + size]))
            return torch.cat(done)
        except Exception as error:
            if not is_memory_error(error):
                raise
        free_memory(images.device)
    height, width = images.shape[-2:]
    raise MemoryError(
        f"memory ran out while the upscaler {upscaler.name} enlarged {width}x{height} pixels; free memory, or choose a "
        "smaller size or upscaler."
    )


def _passes(factor: float, scale: int) -> int:
    """How often to run a model of `scale` for `factor`: once where it enlarges at all, more while that comes nearer.

    Nearer on a ratio scale: another pass where more than sqrt(scale) is left, since too large is resized down to the
    target, sharp, and too small is stretched up to it, soft. A restoration model (scale 1) runs once.
    """
    if scale == 1:
        return 1
    if factor <= 1:
        return 0
    passes = 1
    while factor / scale**passes > math.sqrt(scale):
        passes += 1
    return passes


def _resize_bicubic(images: Tensor, width: int, height: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    return functional.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)


def resize_lanczos(images: Tensor, width: int, height: int) -> Tensor:
    """(..., h, w) float -> (..., height, width) float32 by separable Lanczos with three lobes, antialiased.

    The kernel sinc(x) sinc(x/3), |x| < 3, is widened by the factor when shrinking, so nothing aliases; weights are
    renormalised at the borders. This is Pillow's LANCZOS without its rounding to 8 bits. Overshoot beyond the input's
    range is kept: clamp where a range is promised. Raises ValueError for sides below 1.
    """
    if width < 1 or height < 1:
        raise ValueError(f"width and height must be 1 or more, got {width}x{height}.")
    across = _lanczos_axis(images.float(), width)
    return _lanczos_axis(across.transpose(-1, -2), height).transpose(-1, -2).contiguous()


def _lanczos_axis(x: Tensor, size: int) -> Tensor:
    """Resample the last axis to `size` values, one tap of the kernel at a time: no matrix product, so no TF32."""
    if x.shape[-1] == size:
        return x
    indices, weights = _lanczos_taps(x.shape[-1], size)
    result = x.new_zeros((*x.shape[:-1], size))
    for index, weight in zip(indices.to(x.device), weights.to(x), strict=True):
        result += x.index_select(-1, index) * weight
    return result


def _lanczos_taps(source: int, target: int) -> tuple[Tensor, Tensor]:
    """Source positions and weights (taps, target) of each output value; pixel centres lie at half-integers."""
    ratio = source / target
    width = max(ratio, 1.0)
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * ratio
    first = torch.floor(centres - 3 * width)
    offsets = torch.arange(math.ceil(6 * width) + 2, dtype=torch.float64)
    positions = first + offsets[:, None]
    x = (positions + 0.5 - centres) / width
    kernel = torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)
    kernel = torch.where((positions >= 0) & (positions < source), kernel, 0.0)
    return positions.clamp(0, source - 1).long(), kernel / kernel.sum(0)


# ------------------------------------------------------------------------------------------------------ memory, cancel


def is_memory_error(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on any device: torch's own types, or an allocator's RuntimeError."""
    kinds: list[Any] = [MemoryError, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)]
    if isinstance(error, tuple(kinds)):
        return True
    return isinstance(error, RuntimeError) and _MEMORY_WORDS.search(str(error)) is not None


def free_memory(device: torch.device) -> None:
    """Give cached blocks of `device` back, so that a smaller attempt finds room in one piece."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def stop_if(cancel: Cancel | None) -> None:
    """Raise `solvers.Cancelled` where `cancel` answers True."""
    if cancel is not None and cancel():
        raise Cancelled


def _ignore(sentence: str) -> None:
    pass


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
        raise ValueError(
            f"images must be a float tensor (B, 3, h, w) of RGB in [0, 1], got {images.dtype} of shape "
            f"{tuple(images.shape)}; drop alpha and repeat grey three times before."
        )


# -------------------------------------------------------------------------------------------------------------- loading


def load_upscaler(
    path: str | os.PathLike[str] | None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    tile: int | None = None,
    overlap: int = 32,
    cancel: Cancel | None = None,
) -> LanczosUpscaler | ModelUpscaler:
    """The upscaler in the ESRGAN-type file at `path` (.pth, .pt, .ckpt or .safetensors; any scale); Lanczos for None.

    Nothing in the file is executed: .safetensors holds no code, and pickles are read with torch's weights-only reader.
    `device` "auto" is CUDA where there is one. `dtype` "auto" is half precision where model and device profit
    (`choose_dtype`). `tile`, `overlap`, `cancel`: see `ModelUpscaler`. Raises FileNotFoundError for a missing file and
    ValueError, in one sentence that names the file, for one that is no super-resolution model of RGB images.
    """
    _check_tile(tile, overlap)
    if path is None:
        return LanczosUpscaler()
    file = Path(path).expanduser()
    model = _build(file, _read_weights(file))
    where = resolve_device(device)
    precision = choose_dtype(where, model.supports_half, model.supports_bfloat16, dtype)
    model.to(where, precision).eval()
    if str(model.architecture.id) in _CHANNELS_LAST:
        model.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue, reportUnknownMemberType]
    model.model.requires_grad_(False)
    return ModelUpscaler(file.stem, model, tile, overlap, cancel)


def choose_dtype(
    device: torch.device, supports_half: bool, supports_bfloat16: bool, dtype: str | torch.dtype = "auto"
) -> torch.dtype:
    """The precision to run a model in, from what the model stands and the device does fast.

    "auto": on CUDA float16, which has eight times bfloat16's resolution, else bfloat16. On a CPU bfloat16 only where it
    has the instructions (AVX512-BF16 or AMX): an RRDBNet then takes half the time of float32, while float16 takes ten
    times as long. Anything else: float32. Raises ValueError for a name that is not known or that the model does not
    support.
    """
    if dtype == "auto":
        if device.type == "cuda" and supports_half:
            return torch.float16
        return torch.bfloat16 if supports_bfloat16 and has_bfloat16(device) else torch.float32
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _DTYPES.values():
        raise ValueError(f"dtype must be 'auto', 'float32', 'float16' or 'bfloat16', got {dtype!r}.")
    if (chosen == torch.float16 and not supports_half) or (chosen == torch.bfloat16 and not supports_bfloat16):
        raise ValueError(f"dtype is {dtype!r}, which this upscaler does not support; use 'auto' or 'float32'.")
    return chosen


def _check_tile(tile: int | None, overlap: int) -> None:
    if tile is not None and tile < MIN_TILE:
        raise ValueError(f"tile must be {MIN_TILE} pixels or more, got {tile!r}; leave it out for the full frame.")
    if overlap < 0:
        raise ValueError(f"overlap must be 0 pixels or more, got {overlap!r}.")


def _read_weights(file: Path) -> dict[str, Any]:
    """The tensors in `file`, on the CPU. Raises ValueError or FileNotFoundError in one sentence that names it."""
    if not file.exists():
        raise FileNotFoundError(f"there is no upscaler file {str(file)!r}; check the path.")
    if not file.is_file():
        raise ValueError(
            f"upscaler is {str(file)!r}, which is not a file; give an ESRGAN-type .safetensors or .pth file."
        )
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"upscaler is {str(file)!r}, but its name must end in one of {', '.join(SUFFIXES)}.")
    try:
        weights = _read_safetensors(file) if suffix == ".safetensors" else _read_pickle(file)
    except Exception as error:
        raise ValueError(
            f"the upscaler file {str(file)!r} cannot be read as {suffix} weights ({first_line(error)}); it is empty, "
            "cut short, of another format, or holds more than weights; download it again, as .safetensors if you can."
        ) from error
    if not isinstance(weights, dict):
        raise ValueError(f"the upscaler file {str(file)!r} holds no table of weights; give an ESRGAN-type file.")
    return cast("dict[str, Any]", weights)


def _read_safetensors(file: Path) -> object:
    from safetensors import torch as reader

    return reader.load_file(file)  # pyright: ignore[reportUnknownMemberType]


def _read_pickle(file: Path) -> object:
    # Before torch 2.6 the weights-only reader could be led around its checks through the tar format of torch 0.1
    # (CVE-2025-32434), and no upscaler is that old.
    if tarfile.is_tarfile(file):
        raise ValueError("it is a tar archive")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own sentence advises to read the file without the check; that advice must not reach a user.
        asked = _REFUSED.search(str(error))
        reason = f"it asks to run {asked.group(1)}, which was refused" if asked else "it holds no table of weights"
        raise ValueError(reason) from error
    except LookupError as error:  # bytes that are no pickle: the reader looks up what was never stored
        raise ValueError("it holds no table of weights") from error


def _build(file: Path, weights: dict[str, Any]) -> ImageModelDescriptor[torch.nn.Module]:
    """The model that fits `weights`. Raises ValueError in one sentence that names the file."""
    ensure_ops()
    import spandrel

    try:
        table = spandrel.canonicalize_state_dict(weights)
        _check_layers(table)
        _rehearse(table)
        model = spandrel.ModelLoader("cpu").load_from_state_dict(table)
    except spandrel.UnsupportedModelError as error:
        raise ValueError(
            f"the upscaler file {str(file)!r} holds weights of no known super-resolution model; "
            "give an ESRGAN-type file."
        ) from error
    except Exception as error:
        raise ValueError(
            f"the upscaler file {str(file)!r} looks like a model but its weights do not fit together "
            f"({first_line(error)}); download it again, or give another ESRGAN-type file."
        ) from error
    return _checked_model(file, model)


def _checked_model(file: Path, model: ModelBase[torch.nn.Module]) -> ImageModelDescriptor[torch.nn.Module]:
    import spandrel

    if not isinstance(model, spandrel.ImageModelDescriptor) or model.purpose not in ("SR", "Restoration"):
        raise ValueError(
            f"the upscaler file {str(file)!r} is a {model.architecture.name} model for {model.purpose}, which does not "
            "enlarge whole pictures; give an ESRGAN-type file."
        )
    if (model.input_channels, model.output_channels) != (3, 3):
        raise ValueError(
            f"the upscaler file {str(file)!r} takes {model.input_channels} and gives {model.output_channels} channels; "
            "give one for RGB pictures."
        )
    return model


def _check_layers(table: Mapping[Any, Any]) -> None:
    """Refuse layer numbers that no table of this length can mean: the builder would build every layer up to them."""
    most = min(2 * len(table), _MAX_LAYER)
    for name in table:
        if not isinstance(name, str) or any(len(number) > 9 or int(number) > most for number in _LAYER.findall(name)):
            raise ValueError(f"the entry {str(name)[:60]!r} names no layer of a real model")


def _rehearse(table: Mapping[str, Any]) -> None:
    """Build the model without memory first, so that shapes which do not fit are found before gigabytes are allocated.

    The builder sizes every layer by a few tensors of the file. Raises what `load_state_dict` raises for weights that do
    not fit. A model that cannot be built without memory is left to the real attempt.
    """
    import spandrel

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torch tells, once per weight, that copying into nothing does nothing
        try:
            spandrel.MAIN_REGISTRY.load(dict(table))
        except Exception as error:
            if isinstance(error, spandrel.UnsupportedModelError) or "loading state_dict" in str(error):
                raise
