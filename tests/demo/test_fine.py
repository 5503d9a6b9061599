"""Fine detail can be read, counted and measured in an image of 256 pixels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mrflow_sched.demo.canvas import Mark
from mrflow_sched.demo.drawing import layout, render
from mrflow_sched.demo.fine import face_boxes, hairlines, small_word_boxes
from mrflow_sched.demo.glyphs import GRID_HEIGHT
from mrflow_sched.demo.scenes import COLOURS, COUNTS, GAPS, OUTLINED, PRINTS, SHAPES, Face, Scene, Thing

SIZE = 256
Array = NDArray[Any]


def changed(scene: Scene, other: Scene, seed: int = 3) -> Array:
    """Which pixels differ between two scenes of one seed: (256, 256)."""
    return np.abs(render(scene, SIZE, seed) - render(other, SIZE, seed)).max(-1) > 0.05


def runs(row: Array) -> list[int]:
    """Lengths of the runs of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
    return [int(last - first) for first, last in edges.reshape(-1, 2)]


# ------------------------------------------------------------------------------------------------------- small letters


@pytest.mark.parametrize("size", PRINTS)
@pytest.mark.parametrize("word", ["AB", "WMQXG"])
@pytest.mark.parametrize("category", ["letters", "objects"])
def test_small_letters_are_drawn_inside_their_boxes(category: Any, word: str, size: str) -> None:
    if category == "letters":
        bare = Scene("letters", word="FLOW", ink="white", wall="black")
        scene = Scene("letters", word="FLOW", ink="white", wall="black", small_word=word, print=size)
    else:
        things = (Thing("red", "plain", "circle"),)
        bare = Scene("objects", things, "white snow", "blue")
        scene = Scene("objects", things, "white snow", "blue", small_word=word, print=size)
    boxes = [np.array(box) * SIZE for box in small_word_boxes(scene)]
    assert [box[3] - box[1] for box in boxes] == pytest.approx([PRINTS[size]] * len(word))
    assert all(left[2] < right[0] for left, right in pairwise(boxes))
    if category == "letters":
        ink = changed(scene, bare)
    else:  # the sign's own edge is dark
        ink = render(scene, SIZE, 3).max(-1) < 0.3
        rows, columns = (slice(int(boxes[0][edge]) - 3, int(boxes[-1][edge + 2]) + 3) for edge in (1, 0))
        ink &= np.pad(np.ones_like(ink[rows, columns]), [(part.start, SIZE - part.stop) for part in (rows, columns)])
    stroke = 0.52 * PRINTS[size] / GRID_HEIGHT + 0.5
    inside = np.zeros_like(ink)
    for left, top, right, bottom in boxes:
        rows = slice(int(np.floor(top - stroke)), int(np.ceil(bottom + stroke)))
        columns = slice(int(np.floor(left - stroke)), int(np.ceil(right + stroke)))
        assert ink[rows, columns].sum() >= PRINTS[size]
        inside[rows, columns] = True
    assert not (ink & ~inside).any()
    assert [mark.index for mark in layout(scene, 3) if mark.kind == "small letter"] == list(range(len(word)))


@pytest.mark.parametrize(("size", "cell"), [("tiny", 8), ("small", 16)])
@pytest.mark.parametrize("category", ["letters", "objects"])
def test_small_letters_stand_in_cells_of_a_raster(size: str, cell: int, category: Any) -> None:
    """As small type on a screen does: tokens of the model are eight pixels wide."""
    for word in ("AB", "ABC"):
        boxes = small_word_boxes(Scene(category, word="A", small_word=word, print=size))
        across = [((box[0] + box[2]) / 2 * SIZE - cell / 2) / 8 for box in boxes]
        assert across == pytest.approx([round(across[0]) + k * cell / 8 for k in range(len(word))])
        down = ((boxes[0][1] + boxes[0][3]) / 2 * SIZE - cell / 2) / 8
        assert down == pytest.approx(round(down))


# ----------------------------------------------------------------------------------------------------------- hairlines


def period(profile: Array) -> float:
    """Pixels from one line to the next, by the strongest frequency of a row of pixels."""
    power = np.abs(np.fft.rfft(profile - profile.mean()))
    power[:5] = 0  # the light across the wall
    return float(len(profile) / power.argmax())


@pytest.mark.parametrize("gap", GAPS)
def test_hairlines_have_the_period_that_is_named(gap: str) -> None:
    lines, grid = (Scene("lines", ink="black", wall="white", pattern=pattern, gap=gap) for pattern in ("lines", "grid"))
    upright, crossed = (render(scene, SIZE, 2).mean(-1) for scene in (lines, grid))
    for profile in (upright.mean(0), crossed.mean(0), crossed.mean(1)):
        assert period(profile) == pytest.approx(GAPS[gap], rel=0.01)
    assert np.ptp(upright.mean(1)) < 0.1, "upright lines change nothing from row to row but the light"


def test_hatching_is_slanted_and_six_apart() -> None:
    drawn = render(Scene("lines", ink="black", wall="white", pattern="hatching", gap="six"), SIZE, 2).mean(-1)
    along, down = period(drawn[100]), period(drawn[:, 100])
    assert along == pytest.approx(6 * np.sqrt(2), rel=0.03)
    assert down == pytest.approx(6 * np.sqrt(2), rel=0.03)


@pytest.mark.parametrize("gap", GAPS.values())
def test_half_the_pixels_cover_as_much(gap: int) -> None:
    full, half = hairlines(gap, 256), hairlines(gap, 128)
    np.testing.assert_allclose(full.reshape(128, 2).mean(1), half, atol=1e-6)


# -------------------------------------------------------------------------------------------------- birds and outlines


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("sky", ["blue", "night"])
def test_birds_can_be_counted(count: str, sky: str) -> None:
    scene = Scene("smooth", ground="green hills", sky=sky, light="moon", side="left", birds=count)
    bare = Scene("smooth", ground="green hills", sky=sky, light="moon", side="left")
    assert len(runs(changed(scene, bare).max(0))) == COUNTS.index(count) + 2


@pytest.mark.parametrize("shape", SHAPES)
def test_outlined_shapes_are_hollow(shape: str) -> None:
    full, hollow = (
        Scene("objects", (Thing("black", texture, shape),), "white snow", "blue") for texture in ("plain", OUTLINED)
    )
    dark = [render(scene, SIZE, 1).max(-1) < 0.4 for scene in (full, hollow)]
    assert 0 < dark[1].sum() < 0.3 * dark[0].sum()
    assert not (dark[1] & ~dark[0]).any(), "the edge lies within the shape"
    middle = dark[1][round(0.40 * SIZE)]
    assert not middle[SIZE // 2]
    assert all(1 <= length <= 6 for length in runs(middle))


# --------------------------------------------------------------------------------------------------------------- faces


def pixel(picture: Array, mark: Mark, x: float, y: float) -> Array:
    """Colour at a place of a mark, from 0 at its left and upper edges to 1."""
    column = mark.left + x * (mark.right - mark.left)
    return picture[int((mark.top + y * (mark.bottom - mark.top)) * SIZE), int(column * SIZE)]


FACES = [
    Scene("faces", faces=(Face("happy", "red", "blue"),), wall="white"),
    Scene(
        "faces", faces=(Face("sad", "yellow", "green"), Face("calm", "black", "black")), face_size="small", wall="blue"
    ),
]


@pytest.mark.parametrize("scene", FACES)
def test_faces_show_their_eyes_and_hair_where_the_layout_says(scene: Scene) -> None:
    picture, marks = render(scene, SIZE, 5), layout(scene, 5)
    for index, (face, box) in enumerate(zip(scene.faces, face_boxes(scene), strict=True)):
        [head] = [mark for mark in marks if (mark.kind, mark.index) == ("face", index)]
        assert (head.left + head.right) / 2 == pytest.approx((box[0] + box[2]) / 2, abs=0.013)
        assert np.abs(pixel(picture, head, 0.5, 0.15) - COLOURS[face.hair]).max() < 0.15
        eyes = [pixel(picture, mark, 0.5, 0.5) for mark in marks if (mark.kind, mark.index) == ("eye", index)]
        assert len(eyes) == 2
        for eye in eyes:
            others = np.delete(eye, {"blue": 2, "green": 1, "black": 0}[face.eyes])
            assert eye.max() < 0.2 if face.eyes == "black" else eye.max() > others.max() + 0.3


@pytest.mark.parametrize("scene", [each for each in FACES if each.face_size])
def test_small_faces_are_where_they_are_whatever_the_seed(scene: Scene) -> None:
    first, other = layout(scene, 1), layout(scene, 2)
    assert first == other
    for mark in (each for each in first if each.kind == "mouth"):
        assert (mark.left + mark.right) / 2 * SIZE % 8 == pytest.approx(0, abs=1e-6)


def test_every_mood_has_its_mouth() -> None:
    def mouth(mood: str) -> Array:
        scene = Scene("faces", faces=(Face(mood, "black", "black"),), wall="white")
        picture, [mark] = render(scene, SIZE, 5), [mark for mark in layout(scene, 5) if mark.kind == "mouth"]
        part = picture[int(mark.top * SIZE) : int(mark.bottom * SIZE), int(mark.left * SIZE) : int(mark.right * SIZE)]
        return np.abs(part - (0.55, 0.12, 0.15)).max(-1) < 0.1

    def bend(dark: Array) -> float:
        """How much lower the middle of a mouth is than its ends, in pixels."""
        rows, columns = np.nonzero(dark)
        near = np.abs(columns - columns.mean()) < 5
        return float(rows[near].mean() - rows[np.abs(columns - columns.mean()) > 15].mean())

    assert bend(mouth("happy")) > 5
    assert bend(mouth("sad")) < -5
    assert abs(bend(mouth("calm"))) < 2
    assert mouth("surprised").any(0).sum() < 0.7 * mouth("calm").any(0).sum(), "round, not wide"
