"""Training of the fine judge (`mrflow_sched.demo.fine_judge`), on rendered scenes only.

``python -m tools.train_demo.fine_classifier`` measures the shipped one: on true scenes, on the same through the VAE,
shrunk to 128 pixels and enlarged, and blurred.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from mrflow_sched import demo
from mrflow_sched.demo.drawing import render
from mrflow_sched.demo.fine_judge import (
    FIELDS,
    FINE_GROUPS,
    VIEWS,
    WEIGHTS,
    FineJudge,
    LinesReader,
    PartReader,
    Place,
    View,
    fine_confidence,
    fine_hits,
    load_fine_judge,
    places,
    resampled,
    windows,
)
from mrflow_sched.demo.scenes import FINE_KINDS, FINE_SIZE, FineKind, Scene, fine_scene, random_scene

TRAIN_STREAM, TEST_STREAM = 41, 43
_UNKNOWN = -1
ENLARGEMENTS = ("bicubic", "bilinear", "nearest")


@dataclass(frozen=True)
class FineSettings:
    """Pictures of each kind, steps of each network, and what pictures are made worse by."""

    small_letters: int = 900
    small_sign: int = 350
    birds: int = 700
    faces: int = 1100
    lines: int = 300
    vae_letters: int = 500  # of the pictures with small letters and with lines: once more, through the VAE
    vae_lines: int = 200
    faded: float = 0.15  # of the contrast between neighbours: what is left of lines that cannot be told
    letter_steps: int = 3600
    face_steps: int = 1200
    thing_steps: int = 400
    bird_steps: int = 500
    line_steps: int = 1500
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.02
    enlarged_share: float = 0.3  # of tiny letters and of hairlines three apart: shrunk to 128 pixels, nothing to tell
    mixed_share: float = 0.25  # averaged with another, with the targets of both
    noise: float = 0.05
    blur: float = 0.12  # weight of either neighbour
    seed: int = 41

    def scaled(self, factor: float) -> FineSettings:
        """With so many times the steps."""
        steps = {name: max(1, round(value * factor)) for name, value in asdict(self).items() if name.endswith("_steps")}
        return replace(self, **steps)


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Windows:
    """What a network is trained on: windows in eight bits, places in them, and the numbers of what they show."""

    pixels: Tensor  # (N, 3, H, W), uint8
    boxes: Tensor  # (N, 4)
    targets: dict[str, Tensor]  # (N,), -1 where unknown
    vanish: Tensor  # (N,): whether nothing can be told in an image of 128 pixels

    def joined(self, other: Windows) -> Windows:
        targets = {name: torch.cat([value, other.targets[name]]) for name, value in self.targets.items()}
        parts = (self.pixels, other.pixels), (self.boxes, other.boxes), (self.vanish, other.vanish)
        pixels, boxes, vanish = (torch.cat(pair) for pair in parts)
        return Windows(pixels, boxes, targets, vanish)


def drawn(kind: FineKind, count: int, stream: int) -> tuple[Tensor, list[Scene]]:
    """Scenes of one kind and their pictures: (count, 3, 256, 256) in eight bits."""
    scenes = [fine_scene(np.random.default_rng([stream, index]), kind) for index in range(count)]
    return pictures_of(scenes, stream), scenes


def pictures_of(scenes: Sequence[Scene], stream: int) -> Tensor:
    out = torch.empty(len(scenes), 3, FINE_SIZE, FINE_SIZE, dtype=torch.uint8)
    for index, scene in enumerate(scenes):
        picture = np.rint(render(scene, FINE_SIZE, seed=index * 10 + stream) * 255).astype(np.uint8)
        out[index] = torch.from_numpy(picture).permute(2, 0, 1)
    return out


def cut_out(pictures: Tensor, scenes: Sequence[Scene], view: str) -> Windows:
    """The windows of all places of one view in the pictures of scenes."""
    return cut_places(pictures, [(row, place) for row, place in all_places(scenes) if place.view == view], view)


def cut_places(pictures: Tensor, found: Sequence[tuple[int, Place]], view: str) -> Windows:
    """The windows of places of one view, each with the number of its picture."""
    fields = [name for name in FIELDS if any(name in place.asks for _, place in found)]
    targets = {name: torch.tensor([_number(name, place) for _, place in found]) for name in fields}
    vanish = torch.tensor([_vanishes(place) for _, place in found])
    parts = [windows(pictures[row : row + 1] / 255, [0], [place.box], VIEWS[view]) for row, place in found]
    pixels = torch.cat([(cut * 255).round().to(torch.uint8) for cut, _ in parts])
    return Windows(pixels, torch.cat([boxes for _, boxes in parts]), targets, vanish)


def _number(name: str, place: Place) -> int:
    return FIELDS[name].index(place.asks[name][1]) if name in place.asks else _UNKNOWN


def _vanishes(place: Place) -> bool:
    asked = set(place.asks.values())
    return ("gap", "three") in asked or "tiny letters" in dict(asked)


def all_places(scenes: Sequence[Scene]) -> list[tuple[int, Place]]:
    return [(row, place) for row, scene in enumerate(scenes) for place in places(scene)]


def training_data(settings: FineSettings) -> dict[str, Windows]:
    """Windows for every view; "bare" are walls without lines."""
    signs = drawn("small sign", settings.small_sign, TRAIN_STREAM + 1)
    walls = drawn("small letters", settings.small_letters, TRAIN_STREAM + 2)
    flock = drawn("birds", settings.birds, TRAIN_STREAM + 3)
    faces = drawn("faces", settings.faces, TRAIN_STREAM + 5)
    out = {view: cut_out(*faces, view) for view in ("face", "small face")}
    out["thing"] = cut_out(*signs, "thing").joined(cut_out(*flock, "thing"))
    out["birds"] = _birds(flock, signs, settings.birds // 8)
    out["letter"] = _letters(signs, walls, flock, settings.vae_letters)
    out["lines"] = _lines(settings)
    out["bare"] = _bare(walls[0][: settings.lines // 4])
    return out


Drawn = tuple[Tensor, list[Scene]]


def _letters(signs: Drawn, walls: Drawn, flock: Drawn, vae_letters: int) -> Windows:
    """Small letters, some of them through the VAE, and the same places in pictures that have none."""
    boxes = [place.box for _, scenes in (signs, walls) for _, place in all_places(scenes) if place.view == "letter"]
    blank = [(row, Place("letter", boxes[row % len(boxes)])) for row in range(len(flock[1]))]
    out = cut_out(*signs, "letter").joined(cut_out(*walls, "letter"))
    out = out.joined(_nothing(cut_places(flock[0], blank, "letter"), ("letter",)))
    for pictures, scenes, count in ((*walls, 3 * vae_letters // 4), (*signs, vae_letters // 4)):
        if count:
            part = cut_out(_kept_by_vae(pictures[:count]), scenes[:count], "letter")
            out = out.joined(replace(part, vanish=torch.zeros_like(part.vanish)))
    return out


def _birds(flock: Drawn, signs: Drawn, none: int) -> Windows:
    """Birds, and skies without: over `none` landscapes and over as many objects."""
    smooth = [random_scene(np.random.default_rng([TRAIN_STREAM + 4, k]), "smooth") for k in range(none)]
    boxes = [place for _, place in all_places(flock[1]) if place.view == "birds"]
    out = cut_out(*flock, "birds")
    for pictures in (pictures_of(smooth, TRAIN_STREAM + 4), signs[0][:none]):
        empty = cut_places(pictures, [(row, Place("birds", boxes[0].box)) for row in range(len(pictures))], "birds")
        out = out.joined(_as(empty, birds=0))
    return out


def _lines(settings: FineSettings) -> Windows:
    """Hairlines, some of them through the VAE: where that leaves no contrast, nothing can be told."""
    pictures, scenes = drawn("lines", settings.lines, TRAIN_STREAM + 6)
    out = cut_out(pictures, scenes, "lines")
    if not settings.vae_lines:
        return out
    part = cut_out(_kept_by_vae(pictures[: settings.vae_lines]), scenes[: settings.vae_lines], "lines")
    before, after = (pixels.float().mean(1).diff(dim=-1).flatten(1).std(1) for pixels in (out.pixels, part.pixels))
    faded = after < settings.faded * before[: len(after)]
    targets = {name: torch.where(faded, len(FIELDS[name]), value) for name, value in part.targets.items()}
    return out.joined(replace(part, targets=targets, vanish=torch.zeros_like(part.vanish)))


def _kept_by_vae(pictures: Tensor) -> Tensor:
    return (through_vae(pictures / 255) * 255).round().to(torch.uint8)


def _bare(walls: Tensor) -> Windows:
    """What is above the words of walls."""
    found = cut_places(walls, [(row, Place("lines", (0, 0, 1, 1))) for row in range(len(walls))], "lines")
    return _nothing(replace(found, pixels=found.pixels[:, :, :100]), ("pattern", "gap"))


def _nothing(blank: Windows, fields: Sequence[str]) -> Windows:
    return _as(blank, **{name: len(FIELDS[name]) for name in fields})


def _as(blank: Windows, **values: int) -> Windows:
    count = len(blank.pixels)
    targets = {name: torch.full((count,), value) for name, value in values.items()}
    return Windows(blank.pixels, blank.boxes, targets, torch.zeros(count, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------------- augmentation


def blurred(x: Tensor, weight: float) -> Tensor:
    """Every pixel mixed with its neighbours, each of which counts `weight` along either axis."""
    kernel = torch.tensor([weight, 1 - 2 * weight, weight])
    for shape in ((1, 1, 3, 1), (1, 1, 1, 3)):
        padding = (0, 0, 1, 1) if shape[2] == 3 else (1, 1, 0, 0)
        padded = nn.functional.pad(x, padding, mode="replicate")
        x = nn.functional.conv2d(padded, kernel.view(shape).expand(x.shape[1], 1, *shape[2:]), groups=x.shape[1])
    return x


def shrunk(x: Tensor, mode: str) -> Tensor:
    """What an image of half the size would show."""
    small = nn.functional.avg_pool2d(x, 2)
    return nn.functional.interpolate(small, scale_factor=2.0, mode=mode)


class _Worn:
    """Slight changes, as samplers make them without changing what an image shows."""

    def __init__(self, settings: FineSettings) -> None:
        self.settings, self.rng = settings, np.random.default_rng(settings.seed)

    def __call__(self, x: Tensor) -> Tensor:
        if self.rng.random() < 0.5:
            x = blurred(x, float(self.rng.uniform(0, self.settings.blur)))
        contrast = torch.empty(len(x), 1, 1, 1).uniform_(0.85, 1.1)
        x = (x - 0.5) * contrast + 0.5 + torch.empty(len(x), 3, 1, 1).uniform_(-0.03, 0.03)
        return x + torch.empty(len(x), 1, 1, 1).uniform_(0, self.settings.noise) * torch.randn_like(x)

    def vanished(self, x: Tensor, vanish: Tensor) -> tuple[Tensor, Tensor]:
        """Some of those in which nothing can be told in 128 pixels, as such, and which these are."""
        chosen = vanish & (torch.rand(len(x)) < self.settings.enlarged_share)
        if bool(chosen.any()):
            mode = ENLARGEMENTS[int(self.rng.integers(len(ENLARGEMENTS)))]
            x = x.clone()
            x[chosen] = shrunk(x[chosen], mode)
        return x, chosen

    def mixed(self, x: Tensor, targets: dict[str, Tensor]) -> _Mixed:
        """Some averaged with another, if something can be told in both: a judge of averages must not be sure."""
        partner = torch.from_numpy(self.rng.permutation(len(x)))
        legible = torch.stack([value < len(FIELDS[name]) for name, value in targets.items()]).all(0)
        chosen = (torch.rand(len(x)) < self.settings.mixed_share) & legible & legible[partner]
        share = torch.where(chosen, torch.empty(len(x)).uniform_(0.3, 0.7), torch.ones(len(x)))
        own = share.view(-1, 1, 1, 1)
        return _Mixed(own * x + (1 - own) * x[partner], targets, partner, share)


@dataclass(frozen=True)
class _Mixed:
    """A batch: every image holds `share` of itself, the rest of its partner."""

    x: Tensor
    targets: dict[str, Tensor]
    partner: Tensor
    share: Tensor

    def cross_entropy(self, logits: dict[str, Tensor]) -> Tensor:
        losses = []
        for name, value in logits.items():
            target = self.targets[name]
            own, other = (
                nn.functional.cross_entropy(value, each, ignore_index=_UNKNOWN, reduction="none")
                for each in (target, target[self.partner])
            )
            losses.append((self.share * own + (1 - self.share) * other).mean())
        return torch.stack(losses).sum()


def recoloured(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Other colours for what is told by form alone."""
    x = x[:, torch.from_numpy(rng.permutation(3))]
    return 1 - x if rng.random() < 0.5 else x


# ------------------------------------------------------------------------------------------------------------- training


def part_loss(
    reader: PartReader, data: Sequence[tuple[Windows, View]], worn: _Worn, shift: float
) -> Callable[[], Tensor]:
    """Loss of a batch drawn evenly from all windows; places are off by up to `shift` pixels."""
    sizes = np.cumsum([len(each.pixels) for each, _ in data])
    by_form = any("letter" in each.targets for each, _ in data)

    def loss() -> Tensor:
        part, view = data[int(np.searchsorted(sizes, worn.rng.integers(sizes[-1]), side="right"))]
        rows = torch.from_numpy(worn.rng.integers(0, len(part.pixels), worn.settings.batch))
        x, chosen = worn.vanished(part.pixels[rows] / 255, part.vanish[rows])
        if by_form:
            x = recoloured(x, worn.rng)
        x = worn(x)
        nudge = torch.empty(len(x), 2).uniform_(-shift, shift).repeat(1, 2)
        if view.size:
            x = resampled(x, part.boxes[rows] + nudge, view.size)
        elif worn.rng.random() < 0.5:
            x = x.flip(-1)
        mix = worn.mixed(x, _targets(part, rows, chosen))
        with torch.autocast("cpu", torch.bfloat16):
            logits = reader(mix.x.contiguous(memory_format=torch.channels_last))
        return mix.cross_entropy(logits)

    return loss


def line_loss(reader: LinesReader, data: Sequence[Windows], worn: _Worn) -> Callable[[], Tensor]:
    """Loss of a batch of patches, one in eight without lines."""
    side = LinesReader.PATCH

    def patches(part: Windows, rows: Tensor) -> Tensor:
        room = [(length - side) // 2 for length in part.pixels.shape[-2:]]
        starts = 2 * worn.rng.integers(0, room, (len(rows), 2))
        return torch.stack(
            [part.pixels[row, :, y : y + side, x : x + side] for row, (y, x) in zip(rows, starts, strict=True)]
        )

    def loss() -> Tensor:
        part = data[int(worn.rng.random() < 1 / 8)]
        rows = torch.from_numpy(worn.rng.integers(0, len(part.pixels), worn.settings.batch))
        x, chosen = worn.vanished(patches(part, rows) / 255, part.vanish[rows])
        mix = worn.mixed(worn(x), _targets(part, rows, chosen))
        return mix.cross_entropy(reader.read(mix.x))

    return loss


def _targets(part: Windows, rows: Tensor, vanished: Tensor) -> dict[str, Tensor]:
    targets = {name: value[rows] for name, value in part.targets.items()}
    return {
        name: torch.where(vanished, len(FIELDS[name]), value) if name in ("letter", "pattern", "gap") else value
        for name, value in targets.items()
    }


def _fit(name: str, model: nn.Module, loss_of_batch: Callable[[], Tensor], steps: int, settings: FineSettings) -> Any:
    """Train with AdamW and linear decay; returns steps, seconds and the curve as [step, loss]."""
    opt = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    begin, curve, recent = time.time(), [], []
    model.train()
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = settings.lr * min(1, (step + 1) / 50) * max(0.01, 1 - step / steps)
        loss = loss_of_batch()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        recent.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            curve.append([step + 1, float(np.mean(recent))])
            print(name, *curve[-1], round(time.time() - begin), "s", flush=True)
            recent = []
    model.eval()
    return {"steps": steps, "seconds": time.time() - begin, "curve": curve}


def train(work: Path, settings: FineSettings | None = None) -> dict[str, Any]:
    """Train all networks; writes ``fine_classifier.pt`` and the record ``fine_classifier.json``."""
    settings = settings or FineSettings()
    torch.manual_seed(settings.seed)
    begin = time.time()
    data = training_data(settings)
    record: dict[str, Any] = {"settings": asdict(settings), "drawing_seconds": time.time() - begin}
    judge, worn = FineJudge(), _Worn(settings)
    for name, loss, steps in (
        ("lines", line_loss(judge.lines, (data["lines"], data["bare"]), worn), settings.line_steps),
        ("letters", part_loss(judge.letters, [(data["letter"], VIEWS["letter"])], worn, 1.0), settings.letter_steps),
        ("things", part_loss(judge.things, [(data["thing"], VIEWS["thing"])], worn, 2.0), settings.thing_steps),
        ("birds", part_loss(judge.birds, [(data["birds"], VIEWS["birds"])], worn, 0.0), settings.bird_steps),
        ("faces", part_loss(judge.faces, _faces(data), worn, 1.5), settings.face_steps),
    ):
        record[name] = _fit(name, getattr(judge, name), loss, steps, settings)
        torch.save(judge.state_dict(), work / "fine_classifier.pt")
    record["accuracy"] = table(judge, *test_set(40))
    (work / "fine_classifier.json").write_text(json.dumps(record))
    return record


def _faces(data: dict[str, Windows]) -> list[tuple[Windows, View]]:
    return [(data[view], VIEWS[view]) for view in ("small face", "face")]


def export(work: Path, file: Path = WEIGHTS) -> None:
    """Write the trained fine judge in half the bytes, without the counters of its normalisation."""
    state = torch.load(work / "fine_classifier.pt", weights_only=True)
    save_file({n: v.to(torch.bfloat16).contiguous() for n, v in state.items() if v.is_floating_point()}, file)


# ------------------------------------------------------------------------------------------------------------ measuring


def test_set(count: int) -> tuple[Tensor, list[Scene]]:
    """Scenes that no training saw, `count` of each kind, and their pictures in [0, 1]."""
    parts = [drawn(kind, count, TEST_STREAM) for kind in FINE_KINDS]
    return torch.cat([pictures for pictures, _ in parts]) / 255, [scene for _, scenes in parts for scene in scenes]


def enlarged(pictures: Tensor) -> Tensor:
    """The pictures as images of 128 pixels, enlarged by Lanczos."""
    small = (nn.functional.avg_pool2d(pictures, 2) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    size = (FINE_SIZE, FINE_SIZE)
    large = [np.asarray(Image.fromarray(each).resize(size, Image.Resampling.LANCZOS)) for each in small]
    return torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2) / 255


def gaussian(pictures: Tensor, sigma: float) -> Tensor:
    """The pictures blurred by so many pixels."""
    taps = torch.arange(-4, 5)
    kernel = (-(taps**2) / (2 * sigma**2)).exp()
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    padded = nn.functional.pad(pictures, (4,) * 4, mode="replicate")
    return nn.functional.conv2d(padded, kernel.expand(3, 1, 9, 9), groups=3)


@torch.inference_mode()
def through_vae(pictures: Tensor) -> Tensor:
    """The pictures encoded and decoded by the embedded model's VAE."""
    engine = demo.load_engine(device="cpu", dtype="float32")
    return torch.cat([engine.decode(engine.encode(part)).clamp(0, 1) for part in pictures.split(8)])


def table(judge: FineJudge, pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Share that is read as the scenes say, by group, of true pictures and of those that were made worse."""
    rows = {
        "true": pictures,
        "through the VAE": through_vae(pictures),
        "128 px enlarged": enlarged(pictures),
        "blurred by 1 px": gaussian(pictures, 1.0),
    }
    out = {}
    for row, shown in rows.items():
        out[row] = accuracy(judge, shown, scenes)
        out[row]["confidence"] = float(fine_confidence(judge, shown, scenes).nanmean())
    print(as_text(out), flush=True)
    return out


def accuracy(judge: FineJudge, pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of each group that is read as the scenes say; gaps also one by one."""
    found = fine_hits(judge, pictures, scenes)
    out: dict[str, float] = {}
    for group in FINE_GROUPS:
        out[group] = _mean([hit for row in found for hit in row.get(group, [])])
    for gap in FIELDS["gap"]:
        rows = [row["gap"] for row, scene in zip(found, scenes, strict=True) if scene.gap == gap]
        out[f"gap {gap}"] = _mean([hit for row in rows for hit in row])
    return out


def _mean(values: list[bool]) -> float:
    return float(np.mean(values)) if values else float("nan")


def as_text(rows: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(rows.values())))
    head = " " * 16 + "".join(f"{name:>18}" for name in rows)
    return "\n".join([head, *(f"{n:<16}" + "".join(f"{row[n]:>18.3f}" for row in rows.values()) for n in names)])


if __name__ == "__main__":
    table(load_fine_judge(), *test_set(60))
