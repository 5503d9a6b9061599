"""Refusals, and how another library's error is quoted in one."""

from __future__ import annotations

__all__ = ["FileError", "MissingFileError", "MrFlowError", "first_line"]


class MrFlowError(ValueError):
    """A refusal: what the user asked for cannot be done, said in one sentence.

    The sentence names the argument, the value that came, what is allowed and what to do. Every other exception that
    leaves this package is a fault of it, of a library or of the machine.
    """


class FileError(MrFlowError, OSError):
    """A refusal because a file cannot be read or written: no permission, disk full."""


class MissingFileError(FileError, FileNotFoundError):
    """A refusal because a file or folder does not exist."""


def first_line(error: BaseException) -> str:
    """The line of an error that says what is wrong, for use inside a sentence.

    Args:
        error: Any exception. Of torch's `load_state_dict` errors, whose first line is a heading, the second line
            counts.

    Returns:
        At most 160 characters without final punctuation; the name of the error's type where it has no text.
    """
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and "loading state_dict" in lines[0]:  # a heading; what does not fit stands below it
        del lines[0]
    return (lines[0].strip(".:; \t")[:160] if lines else "") or type(error).__name__
