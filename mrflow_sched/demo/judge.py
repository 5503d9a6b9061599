"""The judge: two small networks that read what an image shows of its caption, trained on rendered scenes only.

One classifies the attributes of the whole image, the other reads one letter in a strip around the place where the
caption's word belongs; a letter elsewhere, or none, is an error. The judge sees every image at 128 pixels (larger ones
are averaged down), so drafts, native and staged images are judged alike. On rendered scenes that it was not trained on
it reads 99.7 per cent of the attributes correctly. Fine detail it cannot read: at that size there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mrflow_sched.demo.drawing import word_boxes
from mrflow_sched.demo.glyphs import LETTERS
from mrflow_sched.demo.scenes import (
    CATEGORIES,
    COLOURS,
    DETAILS,
    GROUNDS,
    LIGHTS,
    MAX_LETTERS,
    OUTLINED,
    SHAPES,
    SIDES,
    SKIES,
    TEXTURES,
    Scene,
)

__all__ = [
    "FIELDS",
    "GROUPS",
    "READING_SIZE",
    "STRIP",
    "WEIGHTS",
    "WHOLE",
    "Classifier",
    "Judge",
    "LetterReader",
    "at_reading_size",
    "hits",
    "labels",
    "load_judge",
    "log_probability",
    "strips",
]

WEIGHTS = Path(__file__).parent / "judge.safetensors"
READING_SIZE = 128
"""Side in pixels of an image as the judge sees it."""
STRIP = (60, 24)
"""Pixels of a letter's strip, rows and columns."""
_TOGETHER, _STRIPS_TOGETHER = 50, 200
"""Images and strips that go through a network at once."""

FIELDS: dict[str, tuple[str, ...]] = {
    "category": CATEGORIES,
    **{
        f"{kind}{index}": options
        for index in range(2)
        for kind, options in (("colour", tuple(COLOURS)), ("texture", TEXTURES), ("shape", SHAPES))
    },
    "ground": GROUNDS,
    "sky": SKIES,
    "ink": tuple(COLOURS),
    "wall": tuple(COLOURS),
    "detail": DETAILS,
    "light": LIGHTS,
    "side": SIDES,
    **{f"letter{k}": tuple(LETTERS) for k in range(MAX_LETTERS)},
    "length": ("0", "2", "3", "4", "5"),
}
"""Every attribute that a caption can name, with its values."""

WHOLE = tuple(field for field in FIELDS if not field.startswith("letter"))
"""The fields that are read in the whole image."""

GROUPS = {
    "category": ("category",),
    "colour": ("colour0", "colour1", "ink", "wall"),
    "shape": ("shape0", "shape1"),
    "texture": ("texture0", "texture1"),
    "ground and sky": ("ground", "sky", "light", "side"),
    "detail": ("detail",),
}
"""The fields that count as attributes of the whole image, by kind."""


def labels(scene: Scene) -> dict[str, int]:
    """The attributes that a scene names, as numbers.

    Args:
        scene: A scene; what is empty in it is open. Where objects have neither a ground nor a word, the sign is open.

    Returns:
        For every field of `FIELDS` the index of its value; -1 where the scene has none, leaves it open, or names what
        this judge cannot read: lines, faces (but for their wall), outlined things, the length of a small word.
    """
    out = dict.fromkeys(FIELDS, -1)
    for field, value in _readable(scene).items():
        if value in FIELDS.get(field, ()):
            out[field] = FIELDS[field].index(value)
    return out


def _readable(scene: Scene) -> dict[str, str]:
    """Values of the fields that this judge can read at its size; on rendered scenes it reads these right, no others."""
    if scene.category not in CATEGORIES:
        return {"wall": scene.wall} if scene.category == "faces" else {}
    named = ("category", "ground", "sky", "ink", "wall", "detail", "light", "side")
    values: dict[str, str] = {field: getattr(scene, field) for field in named}
    for index, thing in enumerate(scene.things):
        if thing.texture != OUTLINED:
            values |= {f"colour{index}": thing.colour, f"texture{index}": thing.texture, f"shape{index}": thing.shape}
    values |= {f"letter{k}": char for k, char in enumerate(scene.word)}
    sign_open = scene.category == "objects" and not scene.ground
    if scene.word or not (sign_open or scene.small_word):
        values["length"] = str(len(scene.word))
    return values


# ------------------------------------------------------------------------------------------------------------- networks


class Classifier(nn.Module):
    """Reads the attributes of whole images."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 48, 64, 96)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += _convolution(a, b, 2) + _convolution(b, b, 1)
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], 48, 1), nn.ReLU(), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(48 * 64, 256), nn.ReLU())
        self.heads = nn.ModuleDict({field: nn.Linear(256, len(FIELDS[field])) for field in WHOLE})

    def features(self, images: Tensor) -> Tensor:
        """What the attributes are read from.

        Args:
            images: (B, 3, 128, 128) in [0, 1].

        Returns:
            (B, 256).
        """
        return self.hidden(self.body(images * 2 - 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Read images.

        Args:
            images: (B, 3, 128, 128) in [0, 1].

        Returns:
            Logits (B, values) for every field of `WHOLE`.
        """
        features = self.features(images)
        return {field: head(features) for field, head in self.heads.items()}


class LetterReader(nn.Module):
    """Reads a letter anywhere in a strip."""

    def __init__(self) -> None:
        super().__init__()
        layers = [*_convolution(3, 32, 1), *_convolution(32, 64, 2), *_convolution(64, 96, 2)]
        self.body = nn.Sequential(*layers, *_convolution(96, 96, 1), *_convolution(96, 96, 1), *_convolution(96, 96, 1))
        self.head = nn.Conv2d(96, len(LETTERS), 1)

    def forward(self, cut: Tensor) -> Tensor:
        """Read strips.

        Args:
            cut: (N, 3, 60, 24) in [0, 1].

        Returns:
            Logits (N, letters), gathered over all positions in the strip.
        """
        return self.head(self.body(cut * 2 - 1)).float().flatten(2).logsumexp(-1)


class Judge(nn.Module):
    """Both networks."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.letters = Classifier(), LetterReader()


def _convolution(a: int, b: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU()]


def load_judge() -> Judge:
    """The trained judge, ready to read.

    Returns:
        In float32, on the CPU.
    """
    from safetensors import torch as safetensors

    judge, weights = Judge(), cast("Any", safetensors).load_file(WEIGHTS)
    judge.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    return judge.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------------------- reading


def at_reading_size(images: Tensor) -> Tensor:
    """Images as the judge sees them.

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns:
        (B, 3, 128, 128), float32; other sizes are averaged.
    """
    if images.shape[-2:] != (READING_SIZE, READING_SIZE):
        images = nn.functional.interpolate(images, (READING_SIZE, READING_SIZE), mode="area")
    return images.float()


def strips(images: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """A strip around every letter of every scene's word.

    Args:
        images: (B, 3, H, W) in [0, 1].
        scenes: What each shows; at least one has a word.

    Returns:
        The strips (N, 3, 60, 24), and the numbers (N,) of the letters that belong there.
    """
    rows: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    wanted: list[int] = []
    for row, scene in enumerate(scenes):
        for letter, box in zip(scene.word, word_boxes(scene), strict=True):
            rows.append(row)
            boxes.append(box)
            wanted.append(LETTERS.index(letter))
    left, top, right, bottom = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4).T
    half = 0.8 * (right - left)
    place = torch.zeros(len(rows), 2, 3)
    place[:, 0, 0], place[:, 0, 2] = 2 * half, left + right - 1
    place[:, 1, 1], place[:, 1, 2] = 2 * half * STRIP[0] / STRIP[1], top + bottom - 1
    grid = nn.functional.affine_grid(place, [len(rows), 3, *STRIP], align_corners=False)
    cut = nn.functional.grid_sample(images[rows], grid, padding_mode="border", align_corners=False)
    return cut, torch.tensor(wanted)


def _read(judge: Judge, images: Tensor) -> dict[str, Tensor]:
    """Logits of every field for images at the reading size."""
    parts = [judge.whole(part) for part in _split(images, _TOGETHER)]
    return {field: torch.cat([part[field] for part in parts]) for field in WHOLE}


def _read_letters(judge: Judge, images: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Logits of every letter of the scenes' words, and the numbers of those that belong there."""
    cut, letters = strips(images, scenes)
    return torch.cat([judge.letters(part) for part in _split(cut, _STRIPS_TOGETHER)]), letters


def _split(values: Tensor, most: int) -> list[Tensor]:
    return [values[first : first + most] for first in range(0, len(values), most)]


@torch.inference_mode()
def hits(judge: Judge, images: Tensor, scenes: Sequence[Scene]) -> list[dict[str, list[bool]]]:
    """Which attributes and letters read as the captions say.

    Args:
        judge: From `load_judge`, or one in training.
        images: (B, 3, H, W) in [0, 1].
        scenes: What each should show.

    Returns:
        For every image, by group of attributes, whether each reads as its scene says; "letters" are those of its word.
    """
    judge.eval()
    images = at_reading_size(images)
    logits = _read(judge, images)
    truth = [labels(scene) for scene in scenes]
    found: list[dict[str, list[bool]]] = [{} for _ in scenes]
    for group, fields in GROUPS.items():
        for field in fields:
            read = cast("list[int]", cast("Any", logits[field].argmax(-1)).tolist())
            for row, wanted in enumerate(each[field] for each in truth):
                if wanted >= 0:
                    found[row].setdefault(group, []).append(read[row] == wanted)
    if any(scene.word for scene in scenes):
        read, letters = _read_letters(judge, images, scenes)
        right = iter(cast("list[bool]", cast("Any", read.argmax(-1) == letters).tolist()))
        for row, scene in enumerate(scenes):
            if scene.word:
                found[row]["letters"] = [next(right) for _ in scene.word]
    return found


def log_probability(judge: Judge, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """How sure the judge is that images show what their captions say. Differentiable in the images.

    Args:
        judge: From `load_judge`.
        images: (B, 3, H, W) in [0, 1].
        scenes: What each should show; attributes that a scene leaves open do not count.

    Returns:
        (B,), 0 or below: the mean log-probability of the right value over the attributes and the letters; 0 where a
        scene names none that it can read.
    """
    images = at_reading_size(images)
    logits = _read(judge, images)
    sums: list[list[Tensor]] = [[] for _ in scenes]
    for row, scene in enumerate(scenes):
        wanted = labels(scene)
        for field in WHOLE:
            if wanted[field] >= 0:
                sums[row].append(logits[field][row].float().log_softmax(-1)[wanted[field]])
    if any(scene.word for scene in scenes):
        read, letters = _read_letters(judge, images, scenes)
        right = iter(read.log_softmax(-1)[torch.arange(len(letters)), letters])
        for row, scene in enumerate(scenes):
            sums[row] += [next(right) for _ in scene.word]
    return torch.stack([torch.stack(each).mean() if each else images.new_zeros(()) for each in sums])
