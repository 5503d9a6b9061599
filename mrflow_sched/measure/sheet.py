"""One image that compares two runs: both results, their seconds, and where the seconds went."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from mrflow_sched.measure.fonts import Fonts
from mrflow_sched.measure.runs import Run

__all__ = ["INK", "PAPER", "QUIET", "SAMPLING", "Pen", "draw_sheet", "wrap"]

PAPER, INK, QUIET = (250, 249, 246), (28, 30, 34), (110, 114, 122)
SAMPLING = (52, 101, 164)
_PARTS = {
    "text": (117, 80, 123),
    "upscale": (204, 102, 0),
    "encode": (78, 154, 6),
    "noise": (164, 0, 0),
    "decode": (196, 160, 0),
    "save": (120, 120, 120),
}
_PANEL = 512
"""Images narrower than this are shown magnified by a whole factor, pixel for pixel."""
# A space before or not; then a letter of a script that breaks lines between any two letters, or a word.
_WIDE = "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\U00020000-\U0003fffd"
_WORD = re.compile(rf"(\s*)([{_WIDE}]|[^\s{_WIDE}]+)")


@dataclass(frozen=True)
class Pen:
    """A canvas and fonts at sizes relative to its pictures.

    Attributes:
        draw: The canvas.
        unit: Pixels of the size 1.
        fonts: What to write with.
    """

    draw: ImageDraw.ImageDraw
    unit: int
    fonts: Fonts

    def width(self, text: str, size: float) -> float:
        """Width of a line.

        Args:
            text: The line.
            size: Of the font, in units.

        Returns:
            Pixels.
        """
        return self.fonts.width(text, round(self.unit * size))

    def write(self, place: tuple[float, float], text: str, size: float = 1.0, fill: tuple[int, ...] = INK) -> None:
        """Write a line.

        Args:
            place: (x, y) of its upper left corner in pixels.
            text: The line.
            size: Of the font, in units.
            fill: RGB colour of 0 to 255.
        """
        self.fonts.write(self.draw, place, text, round(self.unit * size), fill)


def draw_sheet(
    prompt: str, native: Run, staged: Run, images: Sequence[Image.Image], fonts: Fonts | None = None
) -> Image.Image:
    """Draw the two images side by side under the prompt, each with its label, above bars of the seconds on one scale.

    Args:
        prompt: The title. A letter that no font has is drawn as a box, and a line below says so.
        native: The native run.
        staged: The staged run.
        images: The native and the staged image, of one size, in 8-bit RGB.
        fonts: What to write with; None: the installed fonts.

    Returns:
        An RGB image, some two images wide.
    """
    magnify = max(1, round(_PANEL / images[0].width))
    panel = (images[0].width * magnify, images[0].height * magnify)
    unit = max(14, panel[0] // 30)
    gap = unit * 3 // 2
    width = 2 * panel[0] + 3 * gap
    fonts = fonts or Fonts()
    pen = Pen(ImageDraw.Draw(Image.new("RGB", (1, 1))), unit, fonts)
    title = wrap(pen, f'"{prompt}"', 1.25, width - 2 * gap, lines=3)
    legend = _legend(pen, native, staged, width - 2 * gap)
    remark = _remark(fonts, prompt)
    below_title = gap + round(len(title) * unit * 1.7)
    top = below_title + (round(unit * 1.5) if remark else 0) + unit // 2
    bars = top + panel[1] + 5 * unit
    height = bars + round(unit * (5.2 + 1.6 * len(legend))) + gap
    canvas = Image.new("RGB", (width, height), PAPER)
    pen = Pen(ImageDraw.Draw(canvas), unit, fonts)
    for number, line in enumerate(title):
        pen.write((gap, gap + number * unit * 1.7), line, 1.25)
    if remark:
        pen.write((gap, below_title), remark, 0.9, QUIET)
    for column, (run, image) in enumerate(zip((native, staged), images, strict=True)):
        left = gap + column * (panel[0] + gap)
        canvas.paste(image.resize(panel, Image.Resampling.NEAREST), (left, top))
        _label(pen, (left, top + panel[1] + unit // 2), run, native, magnify)
    _bars(pen, (gap, bars), width - 2 * gap, (native, staged))
    _write_legend(pen, (gap, bars + 5.2 * unit), legend)
    return canvas


def _remark(fonts: Fonts, prompt: str) -> str:
    """What to say where letters of the prompt cannot be drawn."""
    if not fonts.lacking(prompt):
        return ""
    return f"{fonts.missing}: no installed font has this letter (Noto fonts do); the prompt is in this file's PNG text."


def _label(pen: Pen, place: tuple[float, float], run: Run, native: Run, magnify: int) -> None:
    left, top = place
    ratio = "" if run is native else f", {native.seconds / run.seconds:.1f} times as fast"
    pen.write((left, top), f"{run.title}: {run.seconds:.2f} s{ratio}", 1.2)
    shown = f", shown {magnify}x" if magnify > 1 else ""
    pen.write((left, top + 1.8 * pen.unit), f"{run.detail}{shown}", 0.9, QUIET)


def _bars(pen: Pen, place: tuple[float, float], width: float, runs: Sequence[Run]) -> None:
    """One bar per run, its length the run's seconds, cut into the run's parts in order."""
    left, top = place
    label = max(pen.width(run.name, 1.0) for run in runs) + pen.unit
    scale = (width - label - 5 * pen.unit) / max(run.seconds for run in runs)
    for number, run in enumerate(runs):
        line = top + number * 2.2 * pen.unit
        pen.write((left, line + 0.2 * pen.unit), run.name)
        start = left + label
        for part in run.parts:
            end = start + part.seconds * scale
            pen.draw.rectangle((start, line, max(start, end), line + 1.6 * pen.unit), fill=_colour(part.name))
            start = end
        pen.write((start + pen.unit / 2, line + 0.2 * pen.unit), f"{run.seconds:.2f} s")


def _legend(pen: Pen, native: Run, staged: Run, width: float) -> list[list[tuple[str, str, float]]]:
    """Lines of (part, text, x offset): the seconds of every part of both runs, wrapped to `width`."""
    lines: list[list[tuple[str, str, float]]] = []
    for run in (native, staged):
        lines.append([])
        offset = 0.0
        for part in run.parts:
            text = (
                f"{run.name} {part.name} {part.seconds:.2f} s" if not lines[-1] else f"{part.name} {part.seconds:.2f} s"
            )
            step = pen.width(text, 0.9) + 2.4 * pen.unit
            if lines[-1] and offset + step > width:
                lines.append([])
                offset = 0.0
            lines[-1].append((part.name, text, offset))
            offset += step
    return lines


def _write_legend(pen: Pen, place: tuple[float, float], lines: list[list[tuple[str, str, float]]]) -> None:
    left, top = place
    for number, line in enumerate(lines):
        y = top + number * 1.6 * pen.unit
        for name, text, offset in line:
            x = left + offset
            pen.draw.rectangle((x, y + 0.1 * pen.unit, x + 0.8 * pen.unit, y + 0.9 * pen.unit), fill=_colour(name))
            pen.write((x + 1.1 * pen.unit, y), text, 0.9)


def _colour(part: str) -> tuple[int, int, int]:
    return next((colour for word, colour in _PARTS.items() if word in part), SAMPLING)


def wrap(pen: Pen, text: str, size: float, width: float, lines: int) -> list[str]:
    """A text broken into lines, at spaces and between letters of Chinese, Japanese and Korean.

    Args:
        pen: Measures.
        text: Any text.
        size: Of the font, in units.
        width: Of a line in pixels.
        lines: How many at most; the last one ends in dots where words were left out.

    Returns:
        The lines.
    """
    found: list[str] = [""]
    for space, word in _WORD.findall(text):
        longer = f"{found[-1]}{' ' if space and found[-1] else ''}{word}"
        if pen.width(longer, size) <= width or not found[-1]:
            found[-1] = _clip(pen, longer, size, width)
        else:
            found.append(_clip(pen, word, size, width))
        if len(found) > lines:
            return [*found[: lines - 1], _clip(pen, found[lines - 1] + " ...", size, width)]
    return found


def _clip(pen: Pen, text: str, size: float, width: float) -> str:
    text = text[:1000]  # no line holds more, and measuring a page of text repeatedly takes minutes
    while len(text) > 1 and pen.width(text, size) > width:
        text = text[:-5] + "..." if len(text) > 8 else text[:-1]
    return text
