"""What the commands of the bench share: where results go and how they are written, sizes, and Ctrl-C."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["INTERRUPTED", "results_file", "results_folder", "run_command", "side", "to_json"]

SIDES = range(64, 513, 8)
"""Sides that staged sampling of the embedded model makes in two stages, on its grid; smaller ones hold no patches."""
INTERRUPTED = 130
"""What a command that Ctrl-C ends exits with, as in a shell."""


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run the command of a module and exit with what it returns; Ctrl-C ends it with a sentence."""
    try:
        code = main()
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C; what was not written before is lost.", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def results_folder(value: str) -> Path:
    """The folder of `--out`, made where there is none: an argparse type, so that it is known before any work whether
    the results can be written.

    Raises:
        argparse.ArgumentTypeError: It is no folder in which a file can be written.
    """
    if not value:
        raise argparse.ArgumentTypeError("'' is no folder; give one for the results, '.' for the current one.")
    try:
        Path(value).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=value):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"no file can be written in {value!r} ({error.strerror}); give a folder that can be made and written in."
        ) from None
    return Path(value)


def results_file(value: str) -> Path:
    """The file of `--out`, in a folder as `results_folder` wants it.

    Raises:
        argparse.ArgumentTypeError: It can be no file there.
    """
    if not value or Path(value).is_dir():
        raise argparse.ArgumentTypeError(f"{value!r} is no file; give the name of one for the results.")
    return results_folder(str(Path(value).parent)) / Path(value).name


def side(value: str) -> int:
    """The side in pixels of `--size`, with the embedded model.

    Raises:
        argparse.ArgumentTypeError: It is none of `SIDES`.
    """
    if not value.isdecimal() or int(value) not in SIDES:
        raise argparse.ArgumentTypeError(
            f"must be a multiple of {SIDES.step} from {SIDES.start} to {SIDES[-1]}, a size of the embedded model, "
            f"got {value!r}."
        )
    return int(value)


def to_json(record: Any) -> str:
    """The JSON text of a record. NaN and infinity, for which JSON has no word, are written as null."""
    return json.dumps(_finite(record), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
