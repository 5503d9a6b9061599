"""The fine judge: small networks that read what only the full size of an image holds, trained on rendered scenes only.

Each looks at the places where a scene's fine detail belongs, at 256 pixels: a strip around every small letter, a square
around every face and every thing, the row of birds, patches of hairlines. Where letters or hairlines cannot be told,
as in an image of 128 pixels that was enlarged, it says so instead of guessing: that counts as not read.
`python -m tools.train_demo.fine_classifier` measures how well it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.demo.canvas import Box
from mrflow_sched.demo.fine import face_boxes, small_word_boxes
from mrflow_sched.demo.glyphs import LETTERS
from mrflow_sched.demo.scenes import COUNTS, EYES, FINE_SIZE, HAIRS, MOODS, OUTLINED, PATTERNS, Scene

__all__ = [
    "FIELDS",
    "FINE_GROUPS",
    "VIEWS",
    "WEIGHTS",
    "FineJudge",
    "LinesReader",
    "PartReader",
    "Place",
    "View",
    "at_full_size",
    "fine_confidence",
    "fine_hits",
    "fine_log_probability",
    "load_fine_judge",
    "places",
    "resampled",
    "windows",
]

WEIGHTS = Path(__file__).parent / "fine_judge.safetensors"
_TOGETHER = 200
"""Windows that go through a network at once."""

FIELDS: dict[str, tuple[str, ...]] = {
    "letter": tuple(LETTERS),
    "mood": MOODS,
    "hair": HAIRS,
    "eyes": EYES,
    "pattern": PATTERNS,
    "gap": ("two", "three", "four", "six"),  # it was trained on more than `GAPS`
    "birds": ("", *COUNTS),
    "outline": ("", OUTLINED),
}
"""What is read, with its values. A sky without birds and a thing that is not outlined have the empty value."""
_MAY_BE_ILLEGIBLE = ("letter", "pattern", "gap")
"""Fields with one value more: nothing that can be told."""

FINE_GROUPS = {
    "small letters": "letter",
    "tiny letters": "letter",
    "mood": "mood",
    "hair": "hair",
    "eyes": "eyes",
    "small mood": "mood",
    "small hair": "hair",
    "small eyes": "eyes",
    "pattern": "pattern",
    "gap": "gap",
    "birds": "birds",
    "outline": "outline",
}
"""The groups of `fine_hits`, and the field of each. Letters are grouped by height (small: 12 pixels of 256, tiny: 8),
faces by size."""


# --------------------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class View:
    """How a network sees a place.

    Attributes:
        reader: Name of the network in `FineJudge`.
        window: Pixels that are cut out around the middle of the place, rows and columns.
        size: Pixels that the place is resampled to, rows and columns; None: the window as it is.
        halved: Cut from the image averaged down to 128 pixels: the place is large.
    """

    reader: str
    window: tuple[int, int]
    size: tuple[int, int] | None = None
    halved: bool = False


VIEWS = {
    "letter": View("letters", (32, 32), (24, 16)),
    "small face": View("faces", (72, 72), (64, 64)),
    "face": View("faces", (112, 112), (64, 64), halved=True),
    "thing": View("things", (88, 88), (64, 64), halved=True),
    "birds": View("birds", (32, 176)),
    "lines": View("lines", (FINE_SIZE, FINE_SIZE)),
}
"""By kind of place."""


@dataclass(frozen=True)
class Place:
    """Where fine detail belongs, and what it should be.

    Attributes:
        view: A key of `VIEWS`.
        box: (left, top, right, bottom) in units of the image's side.
        asks: For every field of `FIELDS` that a caption names here, its group and its value.
    """

    view: str
    box: Box
    asks: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])


_BIRDS_BOX = (40 / FINE_SIZE, 3 / FINE_SIZE, 216 / FINE_SIZE, 35 / FINE_SIZE)
_LINES_BOX = (0.0, 0.0, 1.0, 1.0)


def _grown(box: Box, across: float, down: float) -> Box:
    """The box around the same middle, so many times as wide and high."""
    cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    half_width, half_height = across * (box[2] - box[0]) / 2, down * (box[3] - box[1]) / 2
    return cx - half_width, cy - half_height, cx + half_width, cy + half_height


def places(scene: Scene) -> list[Place]:
    """Where a scene's fine detail belongs.

    Args:
        scene: What an image should show; what is empty in it is not asked.

    Returns:
        Every place of which the scene says something, from left to right; none for a scene without fine detail.
    """
    if not scene.is_fine:
        return []
    out: list[Place] = []
    if scene.small_word:
        boxes = (_grown(box, 1.8, 2.0) for box in small_word_boxes(scene))
        group = f"{scene.print} letters"
        out += [
            Place("letter", box, {"letter": (group, char)}) for char, box in zip(scene.small_word, boxes, strict=True)
        ]
    if scene.birds:
        out.append(Place("birds", _BIRDS_BOX, {"birds": ("birds", scene.birds)}))
    if scene.pattern:
        out.append(Place("lines", _LINES_BOX, _asks("", pattern=scene.pattern, gap=scene.gap)))
    return out + _faces(scene) + _things(scene)


def _asks(size: str, **values: str) -> dict[str, tuple[str, str]]:
    return {name: (f"{size} {name}".strip(), value) for name, value in values.items() if value}


def _faces(scene: Scene) -> list[Place]:
    if not scene.faces:
        return []
    view = f"{scene.face_size} face".strip()
    found = [
        Place(view, _grown(box, 1.3, 1.3), _asks(scene.face_size, mood=face.mood, hair=face.hair, eyes=face.eyes))
        for face, box in zip(scene.faces, face_boxes(scene), strict=True)
    ]
    return [place for place in found if place.asks]


def _things(scene: Scene) -> list[Place]:
    """The things of a scene of objects; a texture that a caption leaves open is not asked."""
    if scene.category != "objects":
        return []
    centres, radius = ((0.5,), 0.23) if len(scene.things) == 1 else ((0.27, 0.73), 0.19)
    return [
        Place(
            "thing",
            (cx - 1.25 * radius, 0.40 - 1.25 * radius, cx + 1.25 * radius, 0.40 + 1.25 * radius),
            {"outline": ("outline", OUTLINED if thing.texture == OUTLINED else "")},
        )
        for cx, thing in zip(centres, scene.things, strict=True)
        if thing.texture
    ]


# -------------------------------------------------------------------------------------------------------------- cutting


def at_full_size(images: Tensor) -> Tensor:
    """Images as the fine judge sees them.

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns:
        (B, 3, 256, 256), float32; images of whole multiples are averaged, others resampled bicubically.

    Raises:
        MrFlowError: The images are not of that shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise MrFlowError(f"images must have the shape (B, 3, H, W), got {tuple(images.shape)}: stack RGB images.")
    images = images.float()
    height, width = images.shape[-2:]
    if (height, width) == (FINE_SIZE, FINE_SIZE):
        return images
    if height % FINE_SIZE == 0 and width % FINE_SIZE == 0:
        return nn.functional.interpolate(images, (FINE_SIZE, FINE_SIZE), mode="area")
    return nn.functional.interpolate(images, (FINE_SIZE, FINE_SIZE), mode="bicubic", antialias=True)


def windows(images: Tensor, rows: Sequence[int], boxes: Sequence[Box], view: View) -> tuple[Tensor, Tensor]:
    """Pixels around places. Windows begin at even pixels, where those of an image of half the size do.

    Args:
        images: (B, 3, 256, 256) in [0, 1].
        rows: Number of the image of every place.
        boxes: The places, in units of the image's side.
        view: How large the windows are.

    Returns:
        The windows (N, 3, rows, columns), and the boxes (N, 4) within them in pixels: left, top, right, bottom.
    """
    if view.halved:
        images = nn.functional.avg_pool2d(images, 2)
    side, (height, width) = images.shape[-1], view.window
    cut: list[Tensor] = []
    within: list[list[float]] = []
    for row, box in zip(rows, boxes, strict=True):
        left, top, right, bottom = (edge * side for edge in box)
        x, y = _start((left + right) / 2, width, side), _start((top + bottom) / 2, height, side)
        cut.append(images[row, :, y : y + height, x : x + width])
        within.append([left - x, top - y, right - x, bottom - y])
    return torch.stack(cut), torch.tensor(within, dtype=torch.float32, device=images.device)


def _start(middle: float, length: int, side: int) -> int:
    return min(max(0, 2 * round((middle - length / 2) / 2)), side - length)


def resampled(cut: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes within windows, bilinearly resampled to one size.

    Args:
        cut: (N, C, H, W).
        boxes: (N, 4) in pixels of the windows: left, top, right, bottom.
        size: Rows and columns.

    Returns:
        (N, C, rows, columns).
    """
    height, width = cut.shape[-2:]
    left, top, right, bottom = boxes.T
    place = boxes.new_zeros(len(boxes), 2, 3)
    place[:, 0, 0], place[:, 0, 2] = (right - left) / width, (left + right) / width - 1
    place[:, 1, 1], place[:, 1, 2] = (bottom - top) / height, (top + bottom) / height - 1
    grid = nn.functional.affine_grid(place, [len(boxes), cut.shape[1], *size], align_corners=False)
    return nn.functional.grid_sample(cut, grid, padding_mode="border", align_corners=False)


# ------------------------------------------------------------------------------------------------------------- networks


def _values(name: str) -> int:
    return len(FIELDS[name]) + (name in _MAY_BE_ILLEGIBLE)


class PartReader(nn.Module):
    """Reads windows of one size.

    Args:
        layers: Channels and stride of every convolution.
        positions: Rows times columns that are left after the last.
        fields: What it reads, of `FIELDS`.
        hidden: Width of what all fields are read from.
    """

    def __init__(
        self, layers: Sequence[tuple[int, int]], positions: int, fields: Sequence[str], hidden: int = 64
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        before = 3
        for channels, stride in layers:
            parts += [nn.Conv2d(before, channels, 3, stride, 1), nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        self.body = nn.Sequential(*parts, nn.Flatten(), nn.Linear(before * positions, hidden), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, _values(name)) for name in fields})

    def forward(self, cut: Tensor) -> dict[str, Tensor]:
        """Read windows.

        Args:
            cut: (N, 3, rows, columns) in [0, 1].

        Returns:
            Logits (N, values) for every field; the last of a letter's says that none can be told.
        """
        features = self.body(cut * 2 - 1)
        return {name: head(features).float() for name, head in self.heads.items()}


class LinesReader(nn.Module):
    """Reads hairlines in the spectra of patches: how strongly brightness swings at each of some periods."""

    PATCH = 72
    """Side of a patch in pixels: whole periods of all gaps."""
    _PERIODS = (2, 3, 4, 5, 6, 8, 12)
    _SLANTED = (3, 4, 6, 8, 12)

    def __init__(self) -> None:
        super().__init__()
        straight = [(1 / period, 0.0) for period in self._PERIODS]
        slanted = [(1 / period / 2**0.5, 1 / period / 2**0.5) for period in self._SLANTED]
        waves = [*straight, *((b, a) for a, b in straight), *slanted, (slanted[2][0], -slanted[2][1])]
        self.register_buffer("waves", self._windowed(waves), persistent=False)
        self.body = nn.Sequential(nn.BatchNorm1d(len(waves)), nn.Linear(len(waves), 48), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(48, _values(name)) for name in ("pattern", "gap")})

    @classmethod
    def _windowed(cls, waves: Sequence[tuple[float, float]]) -> Tensor:
        """(2 * waves, pixels): cosines and sines under a Hann window, without the part that a flat patch would have."""
        window = torch.hann_window(cls.PATCH, periodic=False)
        weight = torch.outer(window, window) / window.sum() ** 2
        along = torch.arange(cls.PATCH) - (cls.PATCH - 1) / 2
        phases = torch.stack([2 * torch.pi * (fx * along[None, :] + fy * along[:, None]) for fx, fy in waves])
        table = torch.cat([phases.cos(), phases.sin()])
        return ((table - (table * weight).sum((1, 2), keepdim=True)) * weight).flatten(1)

    def read(self, patches: Tensor) -> dict[str, Tensor]:
        """Read single patches.

        Args:
            patches: (N, 3, 72, 72) in [0, 1].

        Returns:
            Logits (N, values) of pattern and gap; the last says that none can be told.
        """
        brightness = torch.einsum("nchw,c->nhw", patches.float(), patches.new_tensor((0.299, 0.587, 0.114)).float())
        cosines, sines = (brightness.flatten(1) @ cast("Tensor", self.waves).T).chunk(2, 1)
        features = self.body((cosines.square() + sines.square() + 1e-6).log())
        return {name: head(features) for name, head in self.heads.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Read images, in nine patches each.

        Args:
            images: (N, 3, 256, 256) in [0, 1].

        Returns:
            As `read`, averaged over the patches.
        """
        starts = (10, 92, 174)
        patches = [images[..., y : y + self.PATCH, x : x + self.PATCH] for y in starts for x in starts]
        logits = self.read(torch.cat(patches))
        return {name: torch.stack(value.chunk(len(patches))).mean(0) for name, value in logits.items()}


class FineJudge(nn.Module):
    """All networks."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = PartReader(((24, 1), (40, 2), (48, 1), (48, 2)), 6 * 4, ("letter",))
        self.faces = PartReader(((16, 2), (32, 2), (48, 2), (64, 2)), 4 * 4, ("mood", "hair", "eyes"))
        self.things = PartReader(((12, 2), (16, 2), (24, 2), (24, 2)), 4 * 4, ("outline",), 32)
        self.birds = PartReader(((16, 2), (32, 2), (48, 2), (48, 2)), 2 * 11, ("birds",), 32)
        self.lines = LinesReader()


def load_fine_judge() -> FineJudge:
    """The trained fine judge, ready to read.

    Returns:
        In float32, on the CPU.
    """
    from safetensors import torch as safetensors

    judge, weights = FineJudge(), cast("Any", safetensors).load_file(WEIGHTS)
    judge.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    return judge.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Reading:
    """What one network read of one field.

    Attributes:
        field: Of `FIELDS`.
        groups: Of every place.
        rows: Number of the image of every place.
        wanted: (N,), the numbers of the values that belong there.
        logits: (N, values).
    """

    field: str
    groups: list[str]
    rows: list[int]
    wanted: Tensor
    logits: Tensor


def _read(judge: FineJudge, images: Tensor, scenes: Sequence[Scene]) -> list[_Reading]:
    images = at_full_size(images)
    if len(images) != len(scenes):
        raise MrFlowError(f"images and scenes must be as many, got {len(images)} and {len(scenes)}.")
    found = [(row, place) for row, scene in enumerate(scenes) for place in places(scene)]
    out: list[_Reading] = []
    for name, view in VIEWS.items():
        here = [(row, place) for row, place in found if place.view == name]
        if here:
            rows, boxes = [row for row, _ in here], [place.box for _, place in here]
            out += _answers(_logits(judge, images, rows, boxes, view), here)
    return out


def _logits(
    judge: FineJudge, images: Tensor, rows: Sequence[int], boxes: Sequence[Box], view: View
) -> dict[str, Tensor]:
    cut, within = windows(images, rows, boxes, view)
    if view.size:
        cut = resampled(cut, within, view.size)
    reader = cast("nn.Module", getattr(judge, view.reader))
    parts = [cast("dict[str, Tensor]", reader(part)) for part in torch.split(cut, _TOGETHER)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _answers(logits: Mapping[str, Tensor], here: Sequence[tuple[int, Place]]) -> list[_Reading]:
    out: list[_Reading] = []
    for name, values in logits.items():
        asked = [(index, row, *place.asks[name]) for index, (row, place) in enumerate(here) if name in place.asks]
        if asked:
            indices, rows, groups, wanted = (list(each) for each in zip(*asked, strict=True))
            numbers = torch.tensor([FIELDS[name].index(value) for value in wanted], device=values.device)
            out.append(_Reading(name, groups, rows, numbers, values[indices]))
    return out


@torch.no_grad()
def fine_hits(judge: FineJudge, images: Tensor, scenes: Sequence[Scene]) -> list[dict[str, list[bool]]]:
    """Which fine attributes read as the captions say.

    Args:
        judge: From `load_fine_judge`, or one in training.
        images: (B, 3, H, W) in [0, 1]; sizes other than 256 are resampled to it, see `at_full_size`.
        scenes: What each should show; what is empty in them is not asked.

    Returns:
        For every image, by group of `FINE_GROUPS`, whether each attribute reads as its scene says; {} for a scene
        without fine detail. What cannot be told is not read.

    Raises:
        MrFlowError: The images have another shape, or are not as many as the scenes.
    """
    judge.eval()
    found: list[dict[str, list[bool]]] = [{} for _ in scenes]
    for reading in _read(judge, images, scenes):
        right = cast("list[bool]", cast("Any", reading.logits.argmax(-1) == reading.wanted).tolist())
        for row, group, hit in zip(reading.rows, reading.groups, right, strict=True):
            found[row].setdefault(group, []).append(hit)
    return found


def fine_log_probability(judge: FineJudge, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """How sure the fine judge is that images show what their captions say. Differentiable in the images.

    Args:
        judge: From `load_fine_judge`.
        images: As in `fine_hits`.
        scenes: As in `fine_hits`.

    Returns:
        (B,), 0 or below: the mean log-probability of the right values over all that the scene names; 0 where it names
        nothing fine.

    Raises:
        MrFlowError: The images have another shape, or are not as many as the scenes.
    """
    sums, counts = (
        images.new_zeros(len(scenes), dtype=torch.float32),
        images.new_zeros(len(scenes), dtype=torch.float32),
    )
    for reading in _read(judge, images, scenes):
        right = reading.logits.log_softmax(-1).gather(1, reading.wanted[:, None])[:, 0]
        sums, counts = _added(sums, counts, reading, right)
    return sums / counts.clamp(min=1)


@torch.no_grad()
def fine_confidence(judge: FineJudge, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """How sure the fine judge is of what it reads, be it what the captions say or not.

    An average of several images reads as none of them: its confidence is low.

    Args:
        judge: From `load_fine_judge`.
        images: As in `fine_hits`.
        scenes: As in `fine_hits`: the confidence is that of the attributes that they name.

    Returns:
        (B,) in [0, 1]: the mean over these attributes of the likeliest value's probability (that nothing can be told is
        no value); NaN where the scene names nothing fine.

    Raises:
        MrFlowError: The images have another shape, or are not as many as the scenes.
    """
    judge.eval()
    sums, counts = (
        images.new_zeros(len(scenes), dtype=torch.float32),
        images.new_zeros(len(scenes), dtype=torch.float32),
    )
    for reading in _read(judge, images, scenes):
        likeliest = reading.logits.softmax(-1)[:, : len(FIELDS[reading.field])].amax(-1)
        sums, counts = _added(sums, counts, reading, likeliest)
    return sums / counts


def _added(sums: Tensor, counts: Tensor, reading: _Reading, values: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.tensor(reading.rows, device=values.device)
    return sums.index_add(0, rows, values), counts.index_add(0, rows, torch.ones_like(values))
