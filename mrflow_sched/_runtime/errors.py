"""Refusals, and how text of others (another library's error, a name from a file) is quoted in one."""

from __future__ import annotations

__all__ = ["FileError", "MissingFileError", "MrFlowError", "first_line", "quoted", "shown"]


class MrFlowError(ValueError):
    """A refusal: what the user asked for cannot be done, said in one sentence.

    The sentence names the argument, the value that came, what is allowed and what to do. Every other exception that
    leaves this package is a fault of it, of a library or of the machine.
    """


class FileError(MrFlowError, OSError):
    """A refusal because a file cannot be read or written: no permission, disk full."""


class MissingFileError(FileError, FileNotFoundError):
    """A refusal because a file or folder does not exist."""


def shown(text: object, most: int = 80) -> str:
    """Foreign text made safe for a sentence: on one line, without control characters, and not too long.

    Args:
        text: A name from a file, a user's argument, any object: its `str` counts.
        most: Characters of the result, at least 4.

    Returns:
        The text with everything that does not print (ESC, line ends, text direction, lone surrogates) as Python
        escapes; what is left out at the end is marked with "...".
    """
    said = str(text)
    escaped = "".join(each if each.isprintable() else repr(each)[1:-1] for each in said[: most + 1])
    return escaped if len(escaped) <= most else f"{escaped[: most - 3]}..."


def quoted(value: object, most: int = 80) -> str:
    """A value that came, as Python writes it, for use in a sentence.

    Args:
        value: Anything, also what Python cannot write: a number of 5,000 digits, lists within lists without end.
        most: As in `shown`.

    Returns:
        Its `repr`, as `shown` gives it.
    """
    try:
        said = repr(value)
    except Exception:
        said = f"<{type(value).__name__} that cannot be shown>"
    return shown(said, most)


def first_line(error: BaseException) -> str:
    """The line of an error that says what is wrong, for use inside a sentence.

    Args:
        error: Any exception. Of torch's `load_state_dict` errors, whose first line is a heading, the second line
            counts.

    Returns:
        At most 160 characters as `shown` gives them, without final punctuation; the name of the error's type where it
        has no text.
    """
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and "loading state_dict" in lines[0]:  # a heading; what does not fit stands below it
        del lines[0]
    return shown(lines[0].strip(".:; \t") if lines else "", 160) or type(error).__name__
