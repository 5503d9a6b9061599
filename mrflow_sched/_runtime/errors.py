"""Refusals, and other people's errors told inside one sentence of ours."""

from __future__ import annotations

__all__ = ["FileError", "MissingFileError", "MrFlowError", "first_line"]


class MrFlowError(ValueError):
    """A refusal: what the user asked for cannot be done, said in one sentence.

    The sentence names the argument, the value that came, what is allowed and what to do. Every other exception that
    leaves this package is a fault of it, of a library or of the machine.
    """


class FileError(MrFlowError, OSError):
    """A refusal because a file cannot be read or written where it was asked for: no right, disk full."""


class MissingFileError(FileError, FileNotFoundError):
    """A refusal because a file or folder that was named is not there."""


def first_line(error: BaseException) -> str:
    """The line of `error` that says what is wrong, at most 160 letters, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and "loading state_dict" in lines[0]:  # a heading; what does not fit stands below it
        del lines[0]
    return (lines[0].strip(".:; \t")[:160] if lines else "") or type(error).__name__
