"""A super-resolution model read by spandrel: run within memory, in tiles where needed."""

# spandrel ships its types without the marker that says so.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError, first_line, shown
from mrflow_sched.plan.checks import checked_whole
from mrflow_sched.plan.tiles import spans
from mrflow_sched.upscaling.blend import feathered

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

    from mrflow_sched.upscaling.role import PixelUpscaler
from mrflow_sched._runtime.cancel import Cancel, Warn, ignore, stop_if
from mrflow_sched._runtime.memory import free_memory, is_memory_error
from mrflow_sched.upscaling.role import check_images, check_upscaler

MIN_TILE = 16
# Tile sides tried, from large to small, after the full frame ran out of memory.
FALLBACK_TILES = (1024, 512, 256, 128, 64)
# Purely convolutional: these run a third faster with channels last; others may rely on the plain layout.
CHANNELS_LAST = frozenset({"ESRGAN", "Compact"})

# ITU-R BT.601: a grey network enlarges the luminance and bicubic resampling the colours, as the literature does.
LUMINANCE = 0.299, 0.587, 0.114


@dataclass(eq=False)
class ModelUpscaler:
    """A super-resolution model read by spandrel, ready to run.

    Images of a batch go through one by one: that is the contract of spandrel's models, and it makes a batch of N equal
    N single runs bit for bit.

    Attributes:
        name: Its name in metadata and messages.
        model: The model, on its device and in its dtype; replaced by one in float32 where it fails in half precision.
        tile: Largest side in input pixels that the model is given at once; None: the whole image, and tiles only where
            memory runs out.
        overlap: Input pixels that two neighbouring tiles share (at most half a tile), where they are blended.
        cancel: Polled before every tile, unless `run` is given one.
        reload: Reads the model again from its file, in float32 on the CPU; None: its weights are cast.
    """

    name: str
    model: ImageModelDescriptor[torch.nn.Module] = field(repr=False)
    tile: int | None = None
    overlap: int = 32
    cancel: Cancel | None = None
    reload: Callable[[], ImageModelDescriptor[torch.nn.Module]] | None = field(default=None, repr=False, compare=False)

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
        """The dtype that the model runs in."""
        return self.model.dtype

    def __call__(self, images: Tensor) -> Tensor:
        """Upscale a batch: `run` without messages.

        Args:
            images: (B, 3, h, w) float in [0, 1].

        Returns:
            (B, 3, h*scale, w*scale) float32 in [0, 1], on the device of `images`.
        """
        return self.run(images)

    def run(self, images: Tensor, *, cancel: Cancel | None = None, warn: Warn | None = None) -> Tensor:
        """Upscale a batch, in tiles where memory or `tile` asks for them.

        Where the model fails in half precision, it is run again in float32 and stays in it. A graph is kept where
        `images` require gradients.

        Args:
            images: (B, 3, h, w) float in [0, 1].
            cancel: Polled before every tile; None: the upscaler's own.
            warn: Receives a sentence where tiles or float32 were needed.

        Returns:
            (B, 3, h*scale, w*scale) float32 in [0, 1], on the device of `images`.

        Raises:
            MrFlowError: `images` is not as above, or the model's result is not finite though the image is.
            MemoryError: The smallest tile does not fit into memory.
            Cancelled: `cancel` answered True.
        """
        check_images(images)
        say = warn or ignore
        side = self._first_side(max(images.shape[-2:]), say)
        done: list[Tensor] = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            for index in range(len(images)):
                image = images[index : index + 1].float()
                result, side = self._in_half_or_float32(image, side, cancel or self.cancel, say)
                done.append(result)
            return torch.cat(done).clamp_(0, 1)

    def failure(self, sizes: Iterable[tuple[int, int]]) -> str | None:
        """Try the model on small images.

        Args:
            sizes: Height and width of each in pixels.

        Returns:
            Why it fails, in the words of its error; None where it does not, or where memory is short.
        """
        for height, width in sizes:
            ramp = torch.linspace(0, 1, 3 * height * width).view(1, 3, height, width)
            try:
                with torch.no_grad():
                    self._piece(ramp)
            except Exception as error:
                return None if is_memory_error(error) else first_line(error)
        return None

    def to_float32(self) -> None:
        """Let the model run in float32 from now on, read again from its file where the upscaler knows how."""
        with torch.inference_mode(False):  # weights made inside inference mode could not be moved outside it
            model = self.model if self.reload is None else self.reload()
            self.model = place(model, self.device, torch.float32)

    def _in_half_or_float32(self, image: Tensor, side: int, cancel: Cancel | None, say: Warn) -> tuple[Tensor, int]:
        dtype = self.dtype
        try:
            return self._fit_memory(image, side, cancel, say)
        except (RuntimeError, MrFlowError) as error:
            if dtype == torch.float32:
                raise
            say(f"the upscaler {self._shown} failed in {str(dtype)[6:]} ({first_line(error)}), so it runs in float32.")
        self.to_float32()
        return self._fit_memory(image, side, cancel, say)

    def _first_side(self, longest: int, say: Warn) -> int:
        """The tile side to begin with; the image's own longest side means the whole image."""
        if self.tile is None or self.tile >= longest:
            return longest
        if self._tiling == "INTERNAL":
            say(f"the upscaler {self._shown} does its own tiling, so the limit of {self.tile} pixels was not applied.")
            return longest
        if self._tiling == "DISCOURAGED":
            say(f"the upscaler {self._shown} looks at the whole image, so tiles of {self.tile} pixels may show.")
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
                    f"memory ran out while the upscaler {self._shown} upscaled {side}x{side} pixels at once; "
                    "free memory, or choose a smaller size or upscaler."
                )
            side = smaller[0]
            say(f"memory ran out in the upscaler {self._shown}; the image was upscaled in tiles of {side} pixels.")

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
        """One image (1, 3, h, w) through the model, back on the image's device in float32."""
        if self.model.input_channels == 1:
            grey = (image * image.new_tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)
            result = self._forward(grey)
            colours = functional.interpolate(image - grey, result.shape[-2:], mode="bicubic", align_corners=False)
            result = result + colours
        else:
            result = self._forward(image)
        if not bool(result.isfinite().all()) and bool(image.isfinite().all()):
            raise MrFlowError(f"the upscaler {self._shown} returned NaN or infinity in {str(self.dtype)[6:]}.")
        return result

    def _forward(self, image: Tensor) -> Tensor:
        layout = torch.channels_last if self._id in CHANNELS_LAST else torch.contiguous_format
        # A copy: some networks scale their input in place.
        ready = image.to(self.device, self.dtype, copy=True, memory_format=layout)
        return self.model(ready).to(image.device, torch.float32)

    @property
    def _shown(self) -> str:
        return shown(self.name)

    @property
    def _tiling(self) -> str:
        return self.model.tiling.name

    @property
    def _id(self) -> str:
        return str(self.model.architecture.id)


def as_upscaler(given: Any) -> PixelUpscaler | None:
    """What a caller gives as an upscaler, checked; a model that spandrel loaded is made one.

    Args:
        given: A `PixelUpscaler`, a spandrel `ImageModelDescriptor` on the device and in the dtype it is to run in, or
            None for Lanczos.

    Returns:
        The upscaler; a descriptor is run in tiles where memory asks for them.

    Raises:
        MrFlowError: It is none of these, or a model of other than RGB or grey images.
    """
    spandrel = sys.modules.get("spandrel")
    if spandrel is not None and isinstance(given, spandrel.ImageModelDescriptor):
        channels = given.input_channels, given.output_channels
        if channels not in ((1, 1), (3, 3)):
            raise MrFlowError(f"upscaler takes and gives {channels} channels; give one of RGB or grey images.")
        return ModelUpscaler(str(given.architecture.name), given)
    check_upscaler(given)
    return given


def place(
    model: ImageModelDescriptor[torch.nn.Module], device: torch.device, dtype: torch.dtype
) -> ImageModelDescriptor[torch.nn.Module]:
    """Make a model ready to run.

    Args:
        model: As spandrel reads it.
        device: Where it is to run.
        dtype: In which dtype.

    Returns:
        The same model, without gradients, in the memory layout that suits it.
    """
    model.to(device, dtype).eval()
    if str(model.architecture.id) in CHANNELS_LAST:
        model.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue, reportUnknownMemberType]
    model.model.requires_grad_(False)
    return model


def checked_tile_side(tile: object, name: str = "tile") -> int | None:
    """The largest side of an upscaler's tiles as Python's int.

    Args:
        tile: Side in input pixels; None: no limit.
        name: The argument's name, for the refusal.

    Returns:
        The same number, or None.

    Raises:
        MrFlowError: `tile` is no whole number of at least `MIN_TILE`.
    """
    advice = "leave it out for the full frame"
    return None if tile is None else checked_whole(tile, name, MIN_TILE, advice=advice)
