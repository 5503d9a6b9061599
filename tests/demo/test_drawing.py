"""Drawing: the same picture at every size, each part where the layout says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrflow_sched.demo.canvas import letter_boxes
from mrflow_sched.demo.drawing import layout, render, word_boxes
from mrflow_sched.demo.glyphs import GLYPHS, GRID_HEIGHT, GRID_WIDTH, LETTERS
from mrflow_sched.demo.scenes import CATEGORIES, COLOURS, FINE_KINDS, Scene, Thing, fine_scene, random_scene

EXAMPLE = Scene(
    "objects", (Thing("red", "striped", "circle"), Thing("blue", "plain", "star")), "green hills", "orange", word="FLOW"
)


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.sampled_from(CATEGORIES))
def test_both_sizes_show_the_same_picture(seed: int, category: str) -> None:
    scene = random_scene(np.random.default_rng(seed), category)  # type: ignore[arg-type]
    high, low = render(scene, 128, seed), render(scene, 64, seed)
    shrunk = high.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert (high.dtype, high.shape) == (np.float32, (128, 128, 3))
    assert high.min() >= 0.0
    assert high.max() <= 1.0
    assert np.abs(shrunk - low).mean() < 0.035  # many small flowers come to 0.026
    assert np.array_equal(high, render(scene, 128, seed))
    assert not np.array_equal(high, render(scene, 128, seed + 1))


@pytest.mark.parametrize("kind", FINE_KINDS)
def test_fine_detail_is_averaged_down_as_a_photograph_is(kind: str) -> None:
    scene = fine_scene(np.random.default_rng(4), kind)  # type: ignore[arg-type]
    high = render(scene, 256, 7)
    for size in (128, 64):
        factor = 256 // size
        shrunk = high.reshape(size, factor, size, factor, 3).mean((1, 3))
        np.testing.assert_allclose(render(scene, size, 7), shrunk, atol=1e-6)
    assert (high.dtype, high.shape) == (np.float32, (256, 256, 3))
    assert 0.0 <= high.min() < high.max() <= 1.0
    assert np.array_equal(high, render(scene, 256, 7))
    assert not np.array_equal(high, render(scene, 256, 8))


def test_the_drawing_follows_the_words() -> None:
    wall = render(Scene("letters", word="I", ink="white", wall="blue"), 64, 0)
    assert np.abs(wall[2, 2] - COLOURS["blue"]).max() < 0.15
    one, two = (render(Scene("objects", EXAMPLE.things[:n], "white snow", "blue"), 128, 5) for n in (1, 2))
    blueish = [(picture[..., 2] - picture[..., 0] > 0.5) & (picture[..., 1] < 0.5) for picture in (one, two)]
    assert blueish[0].sum() == 0 < blueish[1].sum()
    assert blueish[1][:, 64:].sum() == blueish[1].sum(), "the second object stands on the right"


def test_every_letter_is_drawn_inside_its_box_and_unlike_the_others() -> None:
    assert len(LETTERS) == 26
    points = [point for lines in GLYPHS.values() for line in lines for point in line]
    assert min(x for x, _ in points) >= 0 and max(x for x, _ in points) <= GRID_WIDTH + 0.2  # noqa: PT018
    assert min(y for _, y in points) >= 0 and max(y for _, y in points) <= GRID_HEIGHT + 0.2  # noqa: PT018
    shown = {letter: render(Scene("letters", word=letter, ink="white", wall="black"), 64, 1) for letter in LETTERS}
    flat = np.stack([picture.ravel() for picture in shown.values()])
    apart = np.abs(flat[:, None] - flat[None]).sum(-1) + 1e9 * np.eye(26)
    assert apart.min() > 20


def test_a_size_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="size must be 8 pixels or more, got 4"):
        render(EXAMPLE, 4, 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_layout_says_where_things_are_drawn(seed: int) -> None:
    scene = Scene("objects", (Thing("red", "plain", "circle"), Thing("black", "plain", "square")), "white snow", "blue")
    picture = render(scene, 128, seed)
    marks = layout(scene, seed)
    assert [(mark.kind, mark.index) for mark in marks] == [("thing", 0), ("thing", 1)]
    for mark, thing in zip(marks, scene.things, strict=True):
        x, y = round((mark.left + mark.right) * 64), round((mark.top + mark.bottom) * 64)
        assert np.abs(picture[y, x] - COLOURS[thing.colour]).max() < 0.2
        assert np.abs(picture[y, round(mark.left * 128) - 6] - COLOURS[thing.colour]).max() > 0.2


def test_every_letter_has_its_box() -> None:
    scene = Scene("letters", word="FLOW", ink="white", wall="black")
    marks = layout(scene, 3)
    assert [mark.index for mark in marks] == [0, 1, 2, 3]
    bright = render(scene, 256, 3).mean(-1) > 0.5
    inside = np.zeros_like(bright)
    for mark in marks:
        rows, columns = (round(mark.top * 256) - 4, round(mark.bottom * 256) + 4), (mark.left, mark.right)
        part = slice(*rows), slice(round(columns[0] * 256) - 4, round(columns[1] * 256) + 4)
        assert bright[part].any()
        inside[part] = True
    assert not (bright & ~inside).any()
    for mark, box in zip(marks, word_boxes(scene), strict=True):
        assert abs(mark.left - box[0]) <= 0.015
        assert abs(mark.top - box[1]) <= 0.12


def test_letter_boxes_are_centred() -> None:
    boxes = letter_boxes("ABC", 0.5, 0.4, 0.12)
    assert (boxes[0][0] + boxes[-1][2]) / 2 == pytest.approx(0.5)
    assert all(box[3] - box[1] == pytest.approx(0.12) and (box[1] + box[3]) / 2 == pytest.approx(0.4) for box in boxes)


def test_a_sun_is_marked_on_its_side() -> None:
    scene = Scene("smooth", ground="blue waves", sky="pink", light="sun", side="left")
    (mark,) = layout(scene, 5)
    assert mark.kind == "light"
    assert mark.right < 0.5
