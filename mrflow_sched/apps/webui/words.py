"""The user's language: which of our files belongs to a translation pack of the host, and our sentences in it.

`languages/<tag>.json` maps English to the language. A key is a text of the page, which the host's page translates by
itself once our file is listed with the pack's, or a sentence with {} for what varies, which is translated here.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

__all__ = ["FOLDER", "add_languages", "in_language", "language_of", "register", "translated"]

FOLDER = Path(__file__).with_name("languages")
"""Where our files of translations are."""

# The beginning or the words of a pack's name, in lower case. Codes that are also those of countries count only first.
_PACKS = (
    ("zh-Hant", r"(?<![a-z])zh[-_ ]?(?:hant|tw|hk|mo)|(?<![a-z])cht(?![a-z])|trad.*chinese|chinese.*trad|繁"),
    ("zh-Hans", r"(?<![a-z])(?:zh|chs)(?![a-z])|chinese|中文|简|汉化"),
    ("ja", r"(?<![a-z])ja(?![a-z])|japanese|日本"),
    ("ko", r"(?<![a-z])ko(?![a-z])|korean|한국|한글"),
    ("de", r"^de(?![a-z])|german|deutsch"),
    ("es", r"^es(?![a-z])|spanish|español|espanol|castellano"),
    ("fr", r"^fr(?![a-z])|french|français|francais"),
)


# --------------------------------------------------------------------------------------------------- the host's packs


def language_of(name: str) -> str | None:
    """Tell the language of a translation pack.

    Args:
        name: Its name in the host's menu, such as "zh-Hans (Stable)", "ja_JP" or "chinese-english-0831".

    Returns:
        The tag of our file, such as "zh-Hans"; None where we have no such language, or the name does not tell.
    """
    said = name.strip().lower()
    return next((tag for tag, pattern in _PACKS if re.search(pattern, said)), None)


def register() -> None:
    """Add our translations to the running host's packs; a hook for `on_before_ui`, safe to run again after a reload."""
    try:
        packs = import_module("modules.localization").localizations
    except (ImportError, AttributeError):
        return
    add_languages(packs)


def add_languages(packs: Mapping[str, Any]) -> None:
    """Add our file to each pack of a language that we have. No language is added to the host's menu.

    Args:
        packs: The host's packs: lists of files by name. A pack that is one path (A1111 1.6) has no room for a second
            file, and stays as it is.
    """
    for name, files in packs.items():
        tag = language_of(str(name))
        ours = str(FOLDER / f"{tag}.json")
        if tag is not None and isinstance(files, list) and ours not in files:
            cast("list[str]", files).insert(0, ours)  # hosts read the files in this order: the pack's own words win


# ---------------------------------------------------------------------------------------------------------- sentences


def translated(sentence: str) -> str:
    """Translate a sentence of ours into the language that the user chose in the host's settings.

    Args:
        sentence: English.

    Returns:
        The sentence in that language, or as it is.
    """
    opts = getattr(sys.modules.get("modules.shared"), "opts", None)
    return in_language(sentence, str(getattr(opts, "localization", None) or "None"))


def in_language(sentence: str, pack: str) -> str:
    """Translate a sentence of ours.

    What stands for a {} is translated too where it is a sentence or a word of ours.

    Args:
        sentence: English.
        pack: Name of the translation pack that the user chose; "None" is English.

    Returns:
        The sentence in the pack's language; as it is where the language or the sentence is not known.
    """
    tag = language_of(pack)
    return sentence if tag is None else _translate(sentence, tag)


def _translate(text: str, tag: str) -> str:
    words, patterns = _read(tag)
    if text in words:
        return words[text]
    for pattern, translation in patterns:
        found = pattern.fullmatch(text)
        if found:
            return translation.format(*(_translate(part, tag) for part in found.groups()))
    return text


@functools.cache
def _read(tag: str) -> tuple[dict[str, str], list[tuple[re.Pattern[str], str]]]:
    """Return the translations of a language: all by their English, and those with {} as patterns, longest first."""
    words: dict[str, str] = json.loads((FOLDER / f"{tag}.json").read_text(encoding="utf-8"))
    varying = sorted((key for key in words if "{}" in key), key=lambda key: -len(key.replace("{}", "")))
    # Whatever the case: sentences of the library begin with a small letter where they are quoted, else with a capital.
    patterns = (re.compile("(.*?)".join(map(re.escape, key.split("{}"))), re.IGNORECASE | re.DOTALL) for key in varying)
    return words, list(zip(patterns, (words[key] for key in varying), strict=True))
