"""Text in any script on an image: for every letter a font that has it.

Pillow's own font has little more than ASCII, and no font has every letter. So the letters that the first font lacks are
looked for in matplotlib's fonts, where that is installed, and in the system's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import ImageDraw, ImageFont

__all__ = ["Fonts", "installed_fonts"]

BOX = "□"
"""Stands for a letter that no font has."""

_SUFFIXES = (".ttf", ".otf", ".ttc")
_NOWHERE = "\U0010ffff"  # not a character: what a font draws for it, it draws for every letter that it lacks
_PROBE_SIZE = 16
# Names of fonts that have many letters, looked at first. "LastResort" has a box for every letter.
_BROAD = ("dejavusans.", "notosans", "arialuni", "unifont", "wqy", "msgothic", "msyh", "pingfang", "hiragino")
_USELESS = ("lastresort",)


class Fonts:
    """Fonts to write with, at any size.

    Args:
        files: Font files that are tried in their order for letters that Pillow's own font lacks; None:
            `installed_fonts()`.
    """

    def __init__(self, files: Sequence[Path] | None = None) -> None:
        self._given = files
        self._probes: dict[Path | None, Any] = {}
        self._home: dict[str, Path | None] = {}
        self._sized: dict[tuple[Path | None, int], Any] = {}
        self._lacking: set[str] = set()

    def lacking(self, text: str) -> str:
        """The letters that no font has.

        Args:
            text: What is to be written.

        Returns:
            Those letters, each once.
        """
        return "".join(letter for letter in dict.fromkeys(text) if self._lacks(letter))

    def width(self, text: str, size: int) -> float:
        """Width of a text.

        Args:
            text: One line.
            size: Font size in pixels.

        Returns:
            Pixels.
        """
        return sum(float(self._font(file, size).getlength(part)) for file, part in self._parts(text))

    def write(
        self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, fill: tuple[int, ...]
    ) -> None:
        """Draw a text, all of it on one baseline.

        Args:
            draw: The canvas.
            place: (x, y) of the upper left corner in pixels.
            text: One line.
            size: Font size in pixels.
            fill: RGB colour of 0 to 255.
        """
        left, top = place
        for file, part in self._parts(text):
            font = self._font(file, size)
            draw.text((left, top + self._ascent(None, size) - self._ascent(file, size)), part, font=font, fill=fill)
            left += float(font.getlength(part))

    @cached_property
    def _files(self) -> tuple[Path, ...]:
        return installed_fonts() if self._given is None else tuple(self._given)

    @property
    def missing(self) -> str:
        """What is written for a letter that no font has: a box, or a question mark where no font has the box."""
        return "?" if self._lacks(BOX) else BOX

    def _parts(self, text: str) -> Iterator[tuple[Path | None, str]]:
        """(font file, letters) of `text`, cut where the font changes."""
        shown = "".join(self.missing if self._lacks(letter) else letter for letter in text)
        for file, letters in groupby(shown, self._font_of):
            yield file, "".join(letters)

    def _lacks(self, letter: str) -> bool:
        self._font_of(letter)
        return letter in self._lacking

    def _font_of(self, letter: str) -> Path | None:
        """The file of a font that has `letter`; None is Pillow's own, also where none has it."""
        if letter not in self._home:
            self._home[letter] = None
            if letter != " " and not self._has(None, letter):
                found = next((file for file in self._files if self._has(file, letter)), None)
                self._home[letter] = found
                if found is None:
                    self._lacking.add(letter)
        return self._home[letter]

    def _has(self, file: Path | None, letter: str) -> bool:
        """Whether a font draws `letter` differently from a letter that it lacks."""
        if file not in self._probes:
            self._probes[file] = self._probe(file)
        font, nothing = self._probes[file]
        if font is None:
            return file is None and letter.isascii()
        return not letter.isprintable() or _drawn(font, letter) != nothing

    def _probe(self, file: Path | None) -> tuple[Any, object]:
        """A font of a small size and what it draws for letters that it lacks; (None, None) where it cannot be asked."""
        try:
            font = self._font(file, _PROBE_SIZE)
            return (font, _drawn(font, _NOWHERE)) if isinstance(font, ImageFont.FreeTypeFont) else (None, None)
        except OSError:  # not a font, or damaged
            return None, None

    def _font(self, file: Path | None, size: int) -> Any:
        if (file, size) not in self._sized:
            self._sized[file, size] = _open(file, size)
        return self._sized[file, size]

    def _ascent(self, file: Path | None, size: int) -> float:
        font = self._font(file, size)
        return float(font.getmetrics()[0]) if isinstance(font, ImageFont.FreeTypeFont) else 0.0


def installed_fonts() -> tuple[Path, ...]:
    """Font files of matplotlib, where that is installed, and of the system.

    Returns:
        Paths, those of fonts with many letters first.
    """
    files = [path for folder in _folders() if folder.is_dir() for path in folder.rglob("*") if _is_font(path)]
    names = {path: path.name.lower().replace("-", "").replace(" ", "") for path in dict.fromkeys(files)}

    def rank(path: Path) -> tuple[int, int, str]:
        first = next((place for place, word in enumerate(_BROAD) if names[path].startswith(word)), len(_BROAD))
        return first, "bold" in names[path] or "italic" in names[path] or "oblique" in names[path], str(path)

    return tuple(sorted((path for path in names if not names[path].startswith(_USELESS)), key=rank))


def _folders() -> Iterator[Path]:
    spec = find_spec("matplotlib")
    if spec is not None and spec.submodule_search_locations:
        yield Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"
    home = Path.home()
    if sys.platform == "win32":
        yield Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts"
        yield home / "AppData/Local/Microsoft/Windows/Fonts"
    elif sys.platform == "darwin":
        yield from (Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts")
    else:
        yield from (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".local/share/fonts")
        yield home / ".fonts"


def _is_font(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES


def _open(file: Path | None, size: int) -> Any:
    if file is not None:
        return ImageFont.truetype(str(file), size)
    try:
        return ImageFont.load_default(size=size)
    except (TypeError, OSError, ImportError):  # Pillow before 10.1, or without FreeType: one small bitmap font
        return ImageFont.load_default()


def _drawn(font: Any, letter: str) -> object:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
