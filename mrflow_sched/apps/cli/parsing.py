"""How the value of an option is read: one function for each kind."""

from __future__ import annotations

import argparse
import math
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.console import say
from mrflow_sched.apps.cli.inputs import STDIN, LoraChoice
from mrflow_sched.images.record import MAX_PROMPT
from mrflow_sched.plan.checks import MAX_SEED

_RANDOM_SEEDS = 2**32
"""Random seeds are drawn below this, as WebUIs do, so that they are short."""


def size_option(text: str) -> tuple[int, int]:
    """Parse the value of --size.

    Args:
        text: "WIDTHxHEIGHT" in pixels, each of 1 to 6 digits.

    Returns:
        (width, height), each 1 or more.

    Raises:
        ArgumentTypeError: The text is no size.
    """
    found = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text.strip())
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT in pixels, for example 1024x768")
    return size


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Make a parser of whole numbers within limits.

    Args:
        low: The least number allowed.
        high: The largest; None: no limit.

    Returns:
        A function for argparse's `type=`.
    """

    def parse(text: str) -> int:
        span = f"from {low} up" if high is None else f"from {low} to {high}"
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {span}")
        return number

    return parse


def seed_option(text: str) -> int:
    """Read a seed.

    Args:
        text: A whole number from 0 to 2^63 - 1; or "random", or "-1" as WebUIs have it.

    Returns:
        The seed; a random one is drawn here, once, and told.

    Raises:
        ArgumentTypeError: The text is no seed.
    """
    if text.strip().lower() in ("random", "-1"):
        seed = secrets.randbelow(_RANDOM_SEEDS)
        say(f"The random seed is {seed}.")
        return seed
    try:
        return whole_number(0, MAX_SEED)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or random") from None


def check_seeds(seed: int, count: int) -> None:
    """Refuse a seed where a later image of the run would get one that cannot be given.

    Args:
        seed: Seed of the first image; each further one has the next.
        count: How many images.

    Raises:
        MrFlowError: The last seed is above the limit.
    """
    most = MAX_SEED - count + 1
    if seed > most:
        raise MrFlowError(f"--seed is {seed}, above which there are no seeds for {count} images; give at most {most}.")


def format_option(text: str) -> str:
    """Read the value of --format.

    Args:
        text: A name, in any case; "jpeg" is "jpg".

    Returns:
        "png", "jpg" or "webp".

    Raises:
        ArgumentTypeError: It is none of these.
    """
    name = {"jpeg": "jpg"}.get(text.lower(), text.lower())
    if name not in ("png", "jpg", "webp"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of png, jpg and webp")
    return name


def tile_option(text: str) -> int | None:
    """Read the value of --upscaler-tile.

    Args:
        text: Pixels.

    Returns:
        16 or more; None for 0, which is no tiles as in --tile.
    """
    return None if text.strip() == "0" else whole_number(16)(text)


def text_option(text: str) -> str:
    """Check text, which may be empty.

    Args:
        text: An argument as the system handed it over.

    Returns:
        The same text; where the locale could not read its bytes as text (LANG=C), what they are in UTF-8.

    Raises:
        ArgumentTypeError: It contains bytes that are not UTF-8, or more letters than a record holds.
    """
    try:
        found = text.encode(sys.getfilesystemencoding(), "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise argparse.ArgumentTypeError("it contains bytes that are not UTF-8; type the text again") from None
    if len(found) > MAX_PROMPT:
        raise argparse.ArgumentTypeError(f"it has {len(found)} letters; at most {MAX_PROMPT} are allowed")
    return found


def prompt_option(text: str) -> str:
    """Check a prompt.

    Args:
        text: An argument as the system handed it over.

    Returns:
        The text, as `text_option` reads it.

    Raises:
        ArgumentTypeError: It is empty, or `text_option` refuses it.
    """
    prompt = text_option(text)
    if not prompt.strip():
        raise argparse.ArgumentTypeError("it is empty; say what the image shows")
    return prompt


def prompts_option(text: str) -> Path | Literal["-"]:
    """Check the path of a file of prompts.

    Args:
        text: An argument as the system handed it over.

    Returns:
        The path, or "-" for standard input.

    Raises:
        ArgumentTypeError: As in `path_option`.
    """
    return STDIN if text == STDIN else path_option(text)


def path_option(text: str) -> Path:
    """Check the path of a file or folder.

    Args:
        text: An argument as the system handed it over.

    Returns:
        The path.

    Raises:
        ArgumentTypeError: It is empty, an address on the web, or contains a NUL character, which no path has.
    """
    return Path(path_text_option(text))


def path_text_option(text: str) -> str:
    """Check the path of a file or folder that is named in messages as it was typed.

    Args:
        text: An argument as the system handed it over.

    Returns:
        The same text.

    Raises:
        ArgumentTypeError: As in `path_option`.
    """
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("it is empty; give a path" if not text else "a path has no NUL character")
    if re.match(r"(?i)[a-z][a-z0-9+.-]+://", text):
        raise argparse.ArgumentTypeError(f"{text!r} is an address and not a file here; download it first")
    return text


def lora_option(text: str) -> LoraChoice:
    """Read a value of --lora.

    Args:
        text: FILE or FILE:SCALE.

    Returns:
        The choice.

    Raises:
        ArgumentTypeError: The file or the scale cannot be used.
    """
    try:
        path_option(text)
        return LoraChoice.from_text(text)
    except MrFlowError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


def number_option(text: str) -> float:
    """Read a finite number.

    Args:
        text: An argument.

    Returns:
        The number.

    Raises:
        ArgumentTypeError: It is no number, or not finite.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number
