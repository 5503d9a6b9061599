"""What a run has made so far: the best image of each, and which part failed for which."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mrflow_sched.sampling.faults import Fault, bad_rows
from mrflow_sched.sampling.progress import Tracker
from mrflow_sched.upscaling.colours import with_colours_of
from mrflow_sched.upscaling.fit import upscale_to

__all__ = ["Kept", "StageImage"]

logger = logging.getLogger(__name__)

_STAND_IN = 0.5


@dataclass(frozen=True)
class StageImage:
    """An intermediate image of a run.

    Attributes:
        name: "stage 1" (decoded) or "stage 2 upscaled", and so on.
        image: (B, 3, H, W), float32 in [0, 1], on the engine's device; NaN where an image has none.
    """

    name: str
    image: Tensor


@dataclass
class Kept:
    """The best images of a run so far, the intermediate ones if they are kept, faults and warnings for the user.

    Attributes:
        batch: Number of images.
        keep_stages: Whether intermediate images are kept.
        images: (B, 3, H, W), float32 in [0, 1]; mid grey in the rows of `missing`, since engines get whole batches.
        origin: The first of them, which the later ones were made from.
        latents: What `images` were decoded from, where they are the result.
        stages: The intermediate images.
        warnings: One sentence each (`warn`).
        faults: For each image, the first part that failed.
        missing: Numbers of images, from 0, of which no part made one.
        out_of_memory: Memory ran out, and what there was by then is the result.
    """

    batch: int
    keep_stages: bool
    images: Tensor | None = None
    origin: Tensor | None = None
    latents: Tensor | None = None
    stages: list[StageImage] = field(default_factory=list[StageImage])
    warnings: list[str] = field(default_factory=list[str])
    faults: list[Fault | None] = field(default_factory=list["Fault | None"])
    missing: set[int] = field(default_factory=set[int])
    out_of_memory: bool = False

    def __post_init__(self) -> None:
        self.faults = [None] * self.batch
        self.origin = self.images

    @property
    def hopeless(self) -> bool:
        """Whether a part failed for every image, so that later stages have nothing to work on."""
        return all(fault is not None for fault in self.faults)

    def warn(self, sentence: str) -> None:
        """Tell the user and the log something, once.

        Args:
            sentence: One sentence.
        """
        if sentence not in self.warnings:
            self.warnings.append(sentence)
            logger.warning("%s", sentence)

    def blame(self, faults: Mapping[int, Fault]) -> None:
        """Note whose fault it is that images went wrong; only the first fault of an image counts.

        Args:
            faults: By the image's number, from 0.
        """
        for number, fault in sorted(faults.items()):
            if self.faults[number] is None:
                self.faults[number] = fault
                there = self.images is not None and number not in self.missing
                self.warn(fault.sentence(number + 1, there))

    def upscaled(self, name: str, images: Tensor, stage: int) -> None:
        """Take upscaled images.

        Args:
            name: What to keep them as among the stages.
            images: (B, 3, H, W), float32.
            stage: The stage that they lead to, from 1.
        """
        bad = bad_rows(images)
        self.blame(dict.fromkeys(bad, Fault("upscale", stage)))
        self.take(name, images, bad)

    def take(self, name: str | None, images: Tensor, bad: Set[int]) -> None:
        """Take `images` as the best so far, but for those that are none.

        Args:
            name: What to keep them as among the stages; None: they are the result, no intermediate image.
            images: (B, 3, H, W), float32 in [0, 1].
            bad: Numbers of images, from 0, whose row is none: the image before takes its place, at the new size.
        """
        if bad:
            rows = sorted(bad)
            images = images.clone()
            if self.images is None:
                self.missing |= bad
                images[rows] = _STAND_IN
            else:
                height, width = images.shape[-2:]
                images[rows] = upscale_to(self.images[rows], width, height).to(images)
        self.images = images
        self.origin = images if self.origin is None else self.origin
        if self.keep_stages and name is not None:
            self.stages.append(StageImage(name, self.result(images)))

    def guard_colours(self) -> None:
        """Give the images the mean colours of those that they were made from."""
        if self.images is None or self.origin is None or self.images is self.origin:
            return
        guarded = with_colours_of(self.origin, self.images)
        if guarded is not self.images:
            self.images, self.latents = guarded, None

    def result(self, images: Tensor) -> Tensor:
        """Images as they are handed to the caller.

        Args:
            images: (B, 3, H, W).

        Returns:
            In the same shape, with NaN in the rows of `missing`.
        """
        if not self.missing:
            return images
        images = images.clone()
        images[sorted(self.missing)] = torch.nan
        return images

    def best(self) -> Tensor:
        """The images of the stage before.

        Returns:
            (B, 3, H, W), float32 in [0, 1].

        Raises:
            RuntimeError: A method left stage 1 without any.
        """
        if self.images is None:
            raise RuntimeError("stage 1 made no image; a method's start must not return None.")
        return self.images

    def warn_of_memory(self, track: Tracker) -> None:
        """Note that memory ran out in the current part, so the best images so far are the result.

        Args:
            track: Knows the current part and stage.
        """
        self.out_of_memory = True
        self.warn(
            f"Memory ran out in {track.part!r} of stage {track.index + 1}: this is the best image before it; choose a "
            "smaller size or batch, or free memory."
        )
