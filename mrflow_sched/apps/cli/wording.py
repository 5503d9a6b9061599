"""Names on the command line: refusals name arguments as Python does, and here those become options."""

from __future__ import annotations

import re

from mrflow_sched.plan.options import OPTIONS

_NAMES = (*OPTIONS, "size", "family", "strength", "refine_mask")
_ANY, _LONG = "|".join(_NAMES), "|".join(name for name in _NAMES if "_" in name)
_PLACES = re.compile(
    rf"""
    (?<!\w)(?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")          # what came from outside stays as it is
    | \A(?P<side>width|height)(?=\ must\b)
    | \b(?P<given>{_ANY})=(?P<value>\([^()]*\)|'(?:[^'\\]|\\.)*'|[^\s,;]*[^\s,;.])
    | \bgot\ (?P<list>\([^()]*\))
    | \b(?P<long>{_LONG})\b
    | (?:\A|(?<=\bleave\ )|(?<=\bgive\ )|(?<=\bfit\ )|(?<=\blower\ ))
      (?P<word>{_ANY})(?=\ (?:must|is|has|or|and|out|too)\b|\ '|[.,;]|$)
    | (?<=\band\ )(?P<last>{_ANY})(?=\ out\b)
    """,
    re.VERBOSE,
)
_LOADED = re.compile(r"\A(model|device|upscaler|config)(?= is\b)")


def option_name(word: str) -> str:
    """Return the name on the command line of a Python keyword.

    Args:
        word: A keyword such as "low_steps".

    Returns:
        The option, "--low-steps".
    """
    return "--model-config" if word == "config" else f"--{word.replace('_', '-')}"


def with_options(sentence: str) -> str:
    """A sentence on a plan, with its arguments named and their values written as on the command line.

    Args:
        sentence: A refusal or a note of `plan`, such as "leave factor and stages out".

    Returns:
        The sentence with options, "leave --factor and --stages out". Quoted text is left as it is.
    """
    mark = "-" if "interval" in sentence else ","

    def written(found: re.Match[str]) -> str:
        part = found.groupdict()
        if part["side"]:
            return f"the {part['side']} of --size"
        if part["given"]:
            name = option_name(part["given"])
            return name if part["value"] == "True" else f"{name} {_as_typed(part['value'], mark)}"
        if part["list"]:
            return f"got {_as_typed(part['list'], mark)}"
        word = part["long"] or part["word"] or part["last"]
        return option_name(word) if word else found[0]

    return _PLACES.sub(written, sentence)


def with_loaded_options(sentence: str) -> str:
    """A refusal of a model, a device or an upscaler, named by the option that gave it.

    Args:
        sentence: Such as "model is 'x', which is not a folder; ...".

    Returns:
        The sentence, beginning with "--model is".
    """
    return _LOADED.sub(lambda found: option_name(found[0]), sentence)


def _as_typed(value: str, mark: str) -> str:
    """A value as it is typed: several numbers without brackets and spaces, text without quotation marks."""
    if re.fullmatch(r"\([-+.\w]+(, [-+.\w]+)*,?\)", value):
        return value.strip("(,)").replace(", ", mark)
    return value.strip("'")
