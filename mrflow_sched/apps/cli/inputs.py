"""Files that a run starts from (prompts, an image, LoRA weights), read before a model is loaded."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Literal

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.apps.cli.console import os_reason, say
from mrflow_sched.images.record import MAX_LORA_SCALE, MAX_PROMPT
from mrflow_sched.plan.notes import image_notes

if TYPE_CHECKING:
    from torch import Tensor

    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.sampling.engine import Engine

STDIN: Final = "-"
"""What stands for standard input in place of a file."""

# A LoRA, a word with a weight ("(red:1.3)", not "(16:9)"), and a new chunk of text, as WebUIs write them.
_SYNTAX = re.compile(
    r"<(?:lora|lyco|hypernet):[^<>\n]{1,200}>|\((?!\d+:)[^()\n]{1,200}:(?:\d{0,2}\.\d{1,9}|\d)\)|\bBREAK\b"
)
_MOST_LOST = 0.2
"""Largest share of an image that may be lost to the model's grid where nobody chose the size."""
_MOST_BYTES = 16 * 2**20
"""Largest text file that an option may name."""


@dataclass(frozen=True)
class StartImage:
    """An image that a run starts from.

    Attributes:
        file: Where it was read.
        sha256: Hash of the file.
        pixels: (3, H, W), float32 in [0, 1].
        strength: The sigma at which stage 1 starts from it; None: it takes the place of stage 1.
        alpha: (1, H, W), its transparency, where it has some; the colours that it hides are filled in.
    """

    file: Path
    sha256: str
    pixels: Tensor
    strength: float | None
    alpha: Tensor | None = None

    def for_engine(self, engine: Engine) -> Tensor:
        """The image as an engine reads it.

        Args:
            engine: Its `Capabilities.alpha` counts.

        Returns:
            (3, H, W), or (4, H, W) with the transparency where the engine makes transparent images.
        """
        import torch

        from mrflow_sched.sampling.engine import capabilities_of

        if self.alpha is None or not capabilities_of(engine).alpha:
            return self.pixels
        return torch.cat([self.pixels, self.alpha])

    def size(self, factor: float) -> tuple[int, int]:
        """The size of the final image where none was asked for.

        Args:
            factor: Side of the final image over that of stage 1.

        Returns:
            (width, height) in pixels: the image's own where it is started from, else `factor` times that.
        """
        rows, columns = self.pixels.shape[-2:]
        scale = 1.0 if self.strength is not None else factor
        return round(columns * scale), round(rows * scale)

    def check_shape(self, plan: StagedPlan) -> None:
        """Refuse an image of which little is left on the model's grid; for plans of the image's own `size`.

        Args:
            plan: The plan of the run.

        Raises:
            MrFlowError: A side is shorter than the grid by so much that more than a fifth would be cropped.
        """
        lost = 1 - plan.requested_width * plan.requested_height / (plan.width * plan.height)
        if lost > _MOST_LOST:
            rows, columns = self.pixels.shape[-2:]
            raise MrFlowError(
                f"--image is {str(self.file)!r} of {columns}x{rows} pixels, too thin: on the model's grid it would be "
                f"{plan.width}x{plan.height}, with {lost:.0%} of it cropped; pad it, or choose the shape with --size."
            )

    def notes(self, plan: StagedPlan) -> tuple[str, ...]:
        """The notes of a plan that hold for a run from this image.

        Args:
            plan: The plan of the run.

        Returns:
            Its notes, without those on a stage 1 that is left out; and what becomes of an image of another shape.
        """
        rows, columns = self.pixels.shape[-2:]
        return image_notes(plan, columns, rows, self.strength)


def read_start(file: Path, strength: float | None) -> StartImage:
    """Read the image of --image.

    Args:
        file: An image file.
        strength: The value of --strength, above 0 and at most 1; or None.

    Returns:
        The image and its hash.

    Raises:
        MrFlowError: The file cannot be read, or the strength is out of range.
    """
    if strength is not None and not 0.0 < strength <= 1.0:
        raise MrFlowError(
            f"--strength is {strength:g}; give a number above 0 and at most 1: the sigma at which stage 1 starts."
        )
    from mrflow_sched.images.alpha import split_alpha
    from mrflow_sched.images.files import load_image

    pixels, alpha = split_alpha(load_image(file, warn=say, alpha=True)[None])
    return StartImage(file, hash_of(file), pixels[0], strength, None if alpha is None else alpha[0])


@dataclass(frozen=True)
class Reference:
    """An image that an editing model looks at, or a mask.

    Attributes:
        file: Where it was read.
        sha256: Hash of the file.
        pixels: (3 or 4, H, W), float32 in [0, 1].
    """

    file: Path
    sha256: str
    pixels: Tensor


def read_references(files: Sequence[Path]) -> tuple[Reference, ...]:
    """Read the images of --reference.

    Args:
        files: Image files.

    Returns:
        The images with their hashes, in the same order.

    Raises:
        MrFlowError: A file cannot be read.
    """
    from mrflow_sched.images.files import load_image

    found: list[Reference] = []
    for file in files:
        try:
            pixels = load_image(file, warn=say, alpha=True)
        except MrFlowError as error:
            raise MrFlowError(f"--reference: {error}") from error
        found.append(Reference(file, hash_of(file), pixels))
    return tuple(found)


def read_mask(file: Path) -> Reference:
    """Read the picture of --refine-mask.

    Args:
        file: An image file.

    Returns:
        The picture with its hash.

    Raises:
        MrFlowError: The file cannot be read, or is black throughout.
    """
    from mrflow_sched.images.files import load_image

    try:
        pixels = load_image(file, warn=say)
    except MrFlowError as error:
        raise MrFlowError(f"--refine-mask: {error}") from error
    if float(pixels.mean(0).max()) <= 0.5:
        raise MrFlowError(
            f"--refine-mask: {str(file)!r} has nothing lighter than middle grey, so nothing would be refined; make "
            "white what to refine."
        )
    return Reference(file, hash_of(file), pixels)


def syntax_notes(*texts: str | None) -> tuple[str, ...]:
    """Say where prompts are written for a WebUI.

    Args:
        *texts: Prompts and negative prompts.

    Returns:
        One sentence where a text holds such syntax, else none.
    """
    found = next((match for text in texts if text and (match := _SYNTAX.search(text))), None)
    if found is None:
        return ()
    return (
        f"{quoted(found[0])} is the syntax of WebUIs, and plain words here: words have no weights, and a LoRA is given "
        "with --lora FILE:SCALE.",
    )


def read_prompts(file: Path | Literal["-"]) -> tuple[str, ...]:
    """Read a file of prompts: one a line, UTF-8. Blank lines and lines that begin with # are skipped.

    Args:
        file: The file of --prompts, or "-" for standard input.

    Returns:
        The prompts in their order, without white space at their ends.

    Raises:
        MrFlowError: The file cannot be read, holds no prompt, or a line is no text.
    """
    data = read_small(file, "--prompts", "a text file with a prompt on each line")
    prompts: list[str] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise MrFlowError(f"line {number} of {str(file)!r} is not UTF-8; save the file as UTF-8 text.") from None
        if any(ord(letter) < 32 and letter != "\t" for letter in text):
            raise MrFlowError(f"line {number} of {str(file)!r} has control characters; give a text file.")
        if len(text) > MAX_PROMPT:
            raise MrFlowError(f"line {number} of {str(file)!r} has more than {MAX_PROMPT} letters; shorten it.")
        if text and not text.startswith("#"):
            prompts.append(text)
    if not prompts:
        raise MrFlowError(f"--prompts is {str(file)!r}, which holds no prompt; write one a line.")
    return tuple(prompts)


def read_small(file: Path | Literal["-"], option: str, wanted: str) -> bytes:
    """Read a text file that the user named, up to a size that no such file has; it may be a device without end.

    Args:
        file: The file, or "-" for standard input.
        option: The option that named it, with its dashes.
        wanted: What to give there, for the refusal.

    Returns:
        What it holds, at most 16 MiB.

    Raises:
        MrFlowError: The file is missing, cannot be read or is larger.
    """
    named = f"{option} is {str(file)!r}, which"
    try:
        with _standard_input() if file == STDIN else file.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise MrFlowError(f"{named} does not exist; give {wanted}.") from error
    except OSError as error:
        raise MrFlowError(f"{named} cannot be read ({os_reason(error)}); give {wanted}.") from error
    if len(data) > _MOST_BYTES:
        raise MrFlowError(f"{named} is larger than {_MOST_BYTES >> 20} MiB; give {wanted}.")
    return data


def _standard_input() -> BinaryIO:
    """Standard input as a stream of its own, so that to close it changes nothing."""
    return open(os.dup(0), "rb")


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA to put on the model.

    Attributes:
        file: A .safetensors file.
        scale: How strongly it acts; 1 is as it was trained.
        scale_given: Whether the user wrote the scale.
    """

    file: Path
    scale: float = 1.0
    scale_given: bool = field(default=False, compare=False)

    @classmethod
    def from_text(cls, text: str) -> LoraChoice:
        """Read a value of --lora.

        Args:
            text: FILE or FILE:SCALE.

        Returns:
            The choice.

        Raises:
            MrFlowError: The scale is not a finite number, or the file is missing or of another kind.
        """
        name, colon, tail = text.rpartition(":")
        scale = _number(tail) if colon else None
        file = Path(text if scale is None else name)
        if scale is not None and not abs(scale) <= MAX_LORA_SCALE:
            raise MrFlowError(f"--lora has the scale {tail!r}; at most {MAX_LORA_SCALE:g} of either sign is allowed.")
        if file.suffix.lower() != ".safetensors":
            raise MrFlowError(f"--lora is {text!r}; give a .safetensors file, or FILE:SCALE.")
        if not file.is_file():
            raise MrFlowError(f"--lora is {str(file)!r}, which is not a file; check the path.")
        return cls(file, 1.0 if scale is None else scale, scale is not None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def hash_of(path: Path) -> str:
    """The hash by which a record knows a file.

    Args:
        path: The file.

    Returns:
        Its SHA-256, 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
