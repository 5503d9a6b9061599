"""Contact sheets: every picture is there, whole, under its prompt."""

from __future__ import annotations

import pytest
from PIL import Image

from mrflow_sched.measure.contact import Tile, draw_contact

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 0, 200), (0, 200, 200)]


def tiles(count: int, size: tuple[int, int], prompts: int = 1) -> list[Tile]:
    made = [Image.new("RGB", size, COLOURS[number % 5]) for number in range(count)]
    each = -(-count // prompts)
    return [
        Tile(f"prompt {number // each}", image, f"#{number + 1}", ("score 1",)) for number, image in enumerate(made)
    ]


def amount(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return sum(count for count, found in sheet.getcolors(10**6) or [] if found == colour)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((128, 128), (256, 256)), ((100, 50), (200, 100)), ((300, 300), (300, 300)), ((768, 512), (384, 256))],
)
def test_small_pictures_are_magnified_by_whole_factors_and_large_ones_shrunk(
    size: tuple[int, int], shown: tuple[int, int]
) -> None:
    sheet = draw_contact(tiles(5, size))
    for colour in COLOURS:
        assert amount(sheet, colour) == shown[0] * shown[1]


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 3), (8, 4), (12, 5), (30, 6), (60, 8)])
def test_rows_stay_readable(count: int, columns: int) -> None:
    assert draw_contact(tiles(count, (128, 128))).width == 14 + columns * (256 + 14)


def test_prompts_have_rows_of_their_own() -> None:
    one, two = (draw_contact(tiles(4, (64, 64), prompts)) for prompts in (1, 2))
    assert two.height > one.height
    assert two.width < one.width


def test_pictures_of_several_shapes_and_long_words_fit() -> None:
    wide, tall = Image.new("RGB", (192, 64), COLOURS[0]), Image.new("RGB", (64, 192), COLOURS[1])
    sheet = draw_contact([Tile("a " * 500, wide, "x" * 200, ("y" * 200,)), Tile("日本" * 300, tall, "#2")])
    assert amount(sheet, COLOURS[0]) == 192 * 64
    assert amount(sheet, COLOURS[1]) > 64 * 192
