"""compare.png: any size and prompt, bars to scale, letters of any script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw, ImageFont

from mrflow_sched.measure.fonts import Fonts, installed_fonts
from mrflow_sched.measure.runs import Part, Run
from mrflow_sched.measure.sheet import PAPER, SAMPLING, draw_sheet


def a_run(name: str, *parts: tuple[str, float], peak: int = 100) -> Run:
    seconds = sum(part[1] for part in parts)
    return Run(name, f"{name}, 5 steps", "32x32", seconds, tuple(Part(*part) for part in parts), peak, Path(name))


NATIVE = a_run("native", ("text", 0.5), ("stage 1 sample", 9.0), ("stage 1 decode", 0.4), ("save", 0.1))
STAGED = a_run(
    "staged",
    *(("text", 0.5), ("stage 1 sample", 0.5), ("stage 1 decode", 0.25), ("upscale", 0.25), ("encode", 0.1)),
    *(("noise", 0.0), ("stage 2 sample", 0.25), ("stage 2 decode", 0.1), ("save", 0.05)),
    peak=110,
)


@pytest.mark.parametrize("size", [(32, 32), (256, 128), (640, 700)])
@pytest.mark.parametrize("prompt", ["a star", "星 über " * 60, "x" * 500])
def test_any_size_and_prompt_fit_on_the_sheet(size: tuple[int, int], prompt: str) -> None:
    pictures = [Image.new("RGB", size, colour) for colour in ((255, 0, 0), (0, 0, 255))]
    sheet = draw_sheet(prompt, NATIVE, STAGED, pictures)
    factor = max(1, round(512 / size[0]))
    colours = {colour: count for count, colour in sheet.getcolors(1 << 24) or []}
    assert colours[(255, 0, 0)] == colours[(0, 0, 255)] == size[0] * size[1] * factor**2
    # Text and bars end before the sheet does: its right and bottom margins are paper.
    paper = {sheet.getpixel((sheet.width - 3, y)) for y in range(0, sheet.height, 3)}
    paper |= {sheet.getpixel((x, sheet.height - 3)) for x in range(0, sheet.width, 3)}
    assert paper == {PAPER}


class Counting(Fonts):
    """Fonts that count the letters they are asked to measure."""

    measured = 0

    def width(self, text: str, size: int) -> float:
        self.measured += len(text)
        return super().width(text, size)


def test_a_word_without_end_is_cut_with_little_measuring() -> None:
    fonts = Counting()
    sheet = draw_sheet("x" * 100_000, NATIVE, STAGED, [Image.new("RGB", (32, 32))] * 2, fonts)
    assert fonts.measured < 1_000_000
    assert sheet.size == draw_sheet("x" * 500, NATIVE, STAGED, [Image.new("RGB", (32, 32))] * 2).size


def test_bars_are_as_long_as_the_seconds() -> None:
    pictures = [Image.new("RGB", (512, 8)) for _ in range(2)]
    sheet = draw_sheet("a star", NATIVE, STAGED, pictures)
    widths = [sum(1 for x in range(sheet.width) if sheet.getpixel((x, y)) == SAMPLING) for y in range(sheet.height)]
    assert max(widths) > 500
    staged = [width for width in widths if 30 < width < 200]
    assert staged
    assert max(widths) / max(staged) == pytest.approx(9.0 / 0.75, rel=0.1)


def test_old_pillow_draws_with_its_small_font(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ImageFont.load_default
    small = usual(size=10)

    def old(*args: Any, **words: Any) -> Any:
        if words:
            raise TypeError("load_default() got an unexpected keyword argument 'size'")
        return small

    monkeypatch.setattr(ImageFont, "load_default", old)
    assert draw_sheet("a star", NATIVE, STAGED, [Image.new("RGB", (32, 32))] * 2).width > 1000


# --- letters of any script

HARBOUR, CITY = "海港の夜明け", "Łódź"


def make_font(path: Path, letters: str) -> Path:
    """A font file in which every one of `letters` is a filled square, lower and narrower from letter to letter."""
    builder = FontBuilder(1000, isTTF=True)
    names = [".notdef", *(f"letter{number}" for number in range(len(letters)))]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    glyphs: dict[str, Any] = {}
    for number, name in enumerate(names):
        pen, side = TTGlyphPen(None), 900 - 40 * number
        for step, point in enumerate(((50, 0), (50, side), (side, side), (side, 0))):
            (pen.lineTo if step else pen.moveTo)(point)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def drawn(text: str, fonts: Fonts) -> bytes:
    image = Image.new("L", (900, 40))
    fonts.write(ImageDraw.Draw(image), (0, 0), text, 24, (255,))
    return image.tobytes()


def test_letters_are_drawn_by_a_font_that_has_them(tmp_path: Path) -> None:
    fonts = Fonts([make_font(tmp_path / "squares.ttf", HARBOUR + CITY)])
    none = Fonts([])
    for text in (HARBOUR, CITY, f"{CITY} and {HARBOUR}"):
        assert fonts.lacking(text) == ""
        assert none.lacking(text) != ""
        assert drawn(text, fonts) != drawn(text, none)
    assert len({drawn(letter, fonts) for letter in HARBOUR}) == len(HARBOUR), "each letter has its own shape"
    assert len({drawn(letter, none) for letter in HARBOUR}) == 1
    assert fonts.width(HARBOUR, 24) == pytest.approx(24 * len(HARBOUR))


def test_polish_is_written_with_matplotlibs_fonts() -> None:
    pytest.importorskip("matplotlib")
    assert Fonts().lacking("Łódź, smok nad rzeką – Привет") == ""


def test_the_title_is_the_prompt_and_missing_letters_are_owned_up_to(tmp_path: Path) -> None:
    images = [Image.new("RGB", (512, 8))] * 2

    def sheet(prompt: str, fonts: Fonts) -> Image.Image:
        return draw_sheet(prompt, NATIVE, STAGED, images, fonts)

    squares = Fonts([make_font(tmp_path / "squares.ttf", HARBOUR)])
    assert sheet(HARBOUR, squares).size == sheet("a star", squares).size
    assert sheet(HARBOUR, Fonts([])).height > sheet("a star", Fonts([])).height, "a line says what the boxes are"
    assert sheet(HARBOUR, squares).tobytes() != sheet(HARBOUR[::-1], squares).tobytes()


def test_chinese_and_japanese_break_between_letters(tmp_path: Path) -> None:
    fonts = Fonts([make_font(tmp_path / "squares.ttf", HARBOUR)])
    images = [Image.new("RGB", (512, 8))] * 2
    one, two = (draw_sheet(HARBOUR * times, NATIVE, STAGED, images, fonts) for times in (1, 12))
    assert two.height > one.height


def test_files_that_are_no_fonts_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"nothing")
    good = make_font(tmp_path / "squares.ttf", HARBOUR)
    assert Fonts([tmp_path / "broken.ttf", tmp_path / "none.ttf", good]).lacking(HARBOUR) == ""


def test_fonts_for_every_script_come_first_and_the_last_resort_never() -> None:
    names = [path.name.lower() for path in installed_fonts()]
    assert not [name for name in names if name.startswith("lastresort")]
    broad = [name.startswith("dejavusans.") for name in names]
    assert broad == sorted(broad, reverse=True)
