"""NaN has an owner: which part of a run was the first to give an image values that are no numbers of an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

__all__ = ["LARGEST", "Fault", "Seen", "bad_rows", "network_fault", "sizes"]

LARGEST = 1e6
"""Latents are normalised and images lie in [0, 1]: nothing of one is as large as this."""

Part = Literal["text", "network", "callback", "decode", "upscale", "encode"]

_OWNERS: Mapping[Part, tuple[str, str]] = {
    "text": ("text encoder", "run it in bfloat16 or float32"),
    "network": ("network", "run it in bfloat16 or float32"),
    "callback": ("callback or method that changes latents", "check what it returns"),
    "decode": ("VAE's decoder", "run the VAE in float32"),
    "upscale": ("upscaler", "load it in float32, or use another file"),
    "encode": ("VAE's encoder", "run the VAE in float32"),
}


@dataclass(frozen=True)
class Fault:
    """The first part of a run that gave an image NaN, infinity or values above `LARGEST`.

    Attributes:
        part: "text", "network", "decode", "upscale", "encode", or "callback": the latents went wrong between two steps
            of the network, or after its last, where only a callback or a method changes them.
        stage: In which stage, from 1; encoding and upscaling belong to the stage that they lead to.
        step: For the network, the step of that stage, from 1; for a callback, the step after which it came; None where
            it is not known.
    """

    part: Part
    stage: int
    step: int | None = None

    def sentence(self, number: int, kept: bool) -> str:
        """One sentence for the user.

        Args:
            number: Of the image in its batch, from 1.
            kept: Whether an earlier image is there to take its place.

        Returns:
            Which part failed, what became of the image and what to do.
        """
        owner, advice = _OWNERS[self.part]
        step = "" if self.step is None else f"step {self.step} of "
        outcome = "the image before it is kept" if kept else "there is no image"
        return (
            f"Image {number}: the {owner} returned NaN, infinity or values above {LARGEST:.0e} in {step}stage "
            f"{self.stage}, so {outcome}; {advice}."
        )


def sizes(values: Tensor) -> Tensor:
    """The largest magnitude in each row of a batch; two small kernels, nothing is waited for.

    Args:
        values: (B, ...).

    Returns:
        (B,), on the device of `values`; NaN where there is one.
    """
    return values.detach().abs().flatten(1).amax(1)


def bad_rows(values: Tensor) -> set[int]:
    """Which images of a batch are none: NaN, infinity or values above `LARGEST`.

    Args:
        values: (B, ...), latents or images.

    Returns:
        Their numbers, from 0.
    """
    return _above(sizes(values))


@dataclass(frozen=True)
class Seen:
    """One evaluation of the network.

    Attributes:
        step: Of the stage, from 1.
        given: The `sizes` of the latents that it was given.
        estimate: The `sizes` of its clean estimate.
    """

    step: int
    given: Tensor
    estimate: Tensor


def network_fault(stage: int, image: int, seen: Sequence[Seen], text: Any) -> Fault:
    """Whose fault an image's bad latents at the end of a stage are: the network's, the text encoder's, a callback's.

    Args:
        stage: From 1.
        image: Its number in the batch, from 0.
        seen: Every evaluation of the stage.
        text: What the engine's `encode_text` returned.

    Returns:
        The fault.
    """
    first = next((index for index, each in enumerate(seen) if image in _above(each.estimate)), len(seen))
    whole = seen[:first]
    if whole and (first == len(seen) or image in _above(seen[first].given)):
        return Fault("callback", stage, whole[-1].step)
    step = seen[first].step if seen else None
    if step in (None, 1) and image in _bad_text(text, len(seen[0].given) if seen else 1):
        return Fault("text", stage)
    return Fault("network", stage, step)


def _above(found: Tensor) -> set[int]:
    return _rows(~(found <= LARGEST))  # NaN is not either


def _rows(bad: Tensor) -> set[int]:
    """Where (B,) booleans are true; the device is waited for once."""
    known = bad.cpu()
    return {row for row in range(len(known)) if bool(known[row])}


def _bad_text(text: Any, batch: int) -> set[int]:
    """Images of the batch whose conditioning holds NaN or infinity; minus infinity is a mask."""
    found: set[int] = set()
    for tensor in _tensors(text):
        wrong = tensor.isnan() | (tensor == torch.inf)
        if tensor.ndim and len(tensor) == batch:
            found |= _rows(wrong.flatten(1).any(1) if wrong.ndim > 1 else wrong)
        elif bool(wrong.any()):
            found |= set(range(batch))
    return found


def _tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """The float tensors in a value: in its attributes, entries and items."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    inner: Sequence[Any] = ()
    if isinstance(value, Mapping):
        inner = list(cast("Mapping[Any, Any]", value).values())
    elif isinstance(value, (list, tuple)):
        inner = cast("Sequence[Any]", value)
    elif hasattr(value, "__dict__"):
        inner = list(cast("dict[str, Any]", vars(value)).values())
    for each in inner if depth else ():
        yield from _tensors(each, depth - 1)
