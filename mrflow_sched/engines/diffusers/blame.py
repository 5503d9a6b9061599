"""Errors of a pipeline's own code up to the first answer of its network: they are about what it was given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched._runtime.memory import is_callers_own

__all__ = ["in_a_library", "told", "unread_prompt", "unrun", "unstarted"]

_OF_INPUT = (AttributeError, TypeError, LookupError, ValueError, AssertionError, OverflowError)
"""What libraries raise where a value or a configuration is not what they expect."""


_READERS = ("text_encoder", "tokenizer", "prompt_upsampler")
"""How the names of a pipeline's components that read a prompt begin."""


@contextlib.contextmanager
def told(
    sentence: Callable[[Exception], str], *, if_: Callable[[Exception], bool] | None = None
) -> Generator[None, None, None]:
    """Turn what a library raises about its input into one sentence; everything else passes through as it is.

    Memory that runs out, errors of the device, a cancelled run, refusals, and what a caller's own function raised are
    none of these.

    Args:
        sentence: Made of the error.
        if_: Whether the error is about the input; None: always.

    Yields:
        Nothing.

    Raises:
        MrFlowError: In place of the library's error, which is its cause.
    """
    try:
        yield
    except Exception as error:
        theirs = isinstance(error, _OF_INPUT) or type(error) is Exception or type(error).__module__.startswith("jinja2")
        refused = isinstance(error, MrFlowError) or is_callers_own(error)
        if refused or not theirs or not (if_ is None or if_(error)):
            raise
        raise MrFlowError(sentence(error)) from error


def in_a_library(error: Exception) -> bool:
    """Whether code of diffusers or of a library beneath raised an error, rather than a hook or a processor of the user.

    Args:
        error: The error, as it was caught.

    Returns:
        True where the innermost frame is theirs.
    """
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = "" if frame is None else str(frame.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in ("diffusers", "torch", "transformers")


def unread_prompt(pipe: Any, prompts: Sequence[str], given: Sequence[str], error: Exception) -> str:
    """The sentence for an error of `encode_prompt`.

    Args:
        pipe: The pipeline.
        prompts: All texts that it was to read.
        given: Names of the caller's own arguments about text.
        error: The error.

    Returns:
        What failed, in the library's words, and what to look at.
    """
    kind = type(pipe).__name__
    readers = [name for name in pipe.components if name.startswith(_READERS)]
    missing = [name for name in readers if getattr(pipe, name) is None]
    if missing and isinstance(error, (AttributeError, TypeError)):
        return (
            f"{kind} has no {' and no '.join(missing)}, so it cannot read a prompt; load the model with all of its "
            "components, or give prompt_embeds."
        )
    if any("\ud800" <= letter <= "\udfff" for text in prompts for letter in text):
        advice = "the prompt holds half a character, which no tokenizer reads: write it anew"
    elif given:
        advice = f"look at what was given as {', '.join(given)}"
    elif isinstance(error, OverflowError):  # of a tokenizer whose configuration has no length, or one beyond all texts
        advice = "give model_max_length in the model's tokenizer_config.json (77 for CLIP), or max_sequence_length"
    else:
        advice = f"look at the configurations of {', '.join(readers) or 'its parts'}, or download the model again"
    return f"{kind} could not read the prompt ({_said(error)}); {advice}."


def unstarted(pipe: Any, given: Sequence[str], error: Exception) -> str:
    """The sentence for an error of the pipeline's call before its network first runs.

    Args:
        pipe: The pipeline.
        given: Names of the caller's own arguments of the call.
        error: The error.

    Returns:
        What failed, in the library's words, and what to look at.
    """
    advice = f"look at what was given as {', '.join(given)}" if given else "see whether it runs by itself"
    return f"{type(pipe).__name__} could not begin a stage ({_said(error)}); {advice}."


def unrun(network: Any, error: Exception) -> str:
    """The sentence for an error of the network's first call.

    Args:
        network: The module.
        error: The error.

    Returns:
        What failed, in the library's words, and what to look at.
    """
    kind = type(getattr(network, "_orig_mod", network)).__name__
    return f"{kind} could not be run ({_said(error)}); look at its config.json, or at what the call was given."


def _said(error: Exception) -> str:
    """The library's own words, with the kind of error, which often says more."""
    kind, words = type(error).__name__, first_line(error)
    return kind if words == kind else f"{kind}: {words}"
