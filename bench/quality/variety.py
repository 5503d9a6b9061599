"""Measures how different the embedded model's images are where a caption leaves things open, and how sure.

    python -m bench.quality.variety --out DIR                     the package's weights (half an hour on two CPU cores)
    python -m bench.quality.variety --weights OLD NEW --out DIR   pipeline folders side by side
    python -m bench.quality.variety --quick                       few captions and seeds at half the size, prints only

Writes variety.json, variety.md and a sheet of images a row. Twelve captions, sixteen seeds each, sampled natively with
12 multistep steps and staged with 12+1, at guidance 3.5 and 1. Four numbers, and what each must be:

std         root mean square difference of pixels from the mean image of a caption's seeds; at least 0.18
entropy     of what the judge reads in an open attribute over the seeds, in bits, mean over all open attributes; at
            least 80 % of that of true draws, since few seeds cannot show all that is possible
confidence  probability of the value that the judge reads there, mean; at least 95 % of that on true draws, so that
            blends of what is possible do not pass for variety
named       share of what 48 other open captions do name that the judge reads as named; at least 93 %

True draws are scenes that the generator draws and that a caption can mean, as often as training shows them. Rows that
must come out as known: other true draws pass; one image for all seeds, and the mean image, do not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.command import results_folder, run_command, side, to_json
from bench.markdown import table
from bench.quality import judge
from mrflow_sched import demo, load_upscaler, make_native_plan, make_plan
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.demo import fine_judge
from mrflow_sched.demo import judge as reading
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.drawing import render
from mrflow_sched.demo.scenes import (
    EYES,
    GAPS,
    HAIRS,
    MOODS,
    Face,
    FineKind,
    Scene,
    Thing,
    fine_scene,
    left_open,
    random_scene,
)
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import sample_staged

OPEN: tuple[Scene, ...] = (
    Scene("objects", (Thing("", "", "star"),)),
    Scene("objects", (Thing("", "", "circle"),), ground="green hills"),
    Scene("objects", (Thing("red", "plain", "circle"),), ground="green hills"),
    Scene("objects", (Thing("", "", "heart"), Thing("", "", "cross"))),
    Scene("objects", (Thing("", "striped", "ring"),), sky="night"),
    Scene("letters", word="FLOW"),
    Scene("letters", word="SUN", wall="blue", small_word="MAGIC", print="small"),
    Scene("detail", detail="windows"),
    Scene("detail", ink="yellow", detail="flowers"),
    Scene("smooth"),
    Scene("faces", faces=(Face("", "", ""),)),
    Scene("lines", pattern="grid"),
)
"""What the open captions name; all else that their scenes have is open."""
STREAM, FIRST_SEED = 5, 900
LEAST_STD, LEAST_ENTROPY, LEAST_CONFIDENCE, LEAST_NAMED = 0.18, 0.80, 0.95, 0.93
GUIDANCES = (3.5, 1.0)
SHIPPED = "shipped"

_OF_CATEGORY = {
    "objects": ("ground", "sky"),
    "letters": ("ink", "wall"),
    "detail": ("ink", "wall"),
    "smooth": ("ground", "sky", "light", "side"),
    "faces": ("wall",),
    "lines": ("ink", "wall", "gap"),
}
_MOST_TRIES = 1_000_000


# ------------------------------------------------------------------------------------------- what a caption leaves open


def open_fields(named: Scene) -> tuple[str, ...]:
    """The attributes that a caption leaves open.

    Args:
        named: What the caption names.

    Returns:
        Names as in the judge's `FIELDS`: "colour0", "sky"; those of faces likewise, "mood0".
    """
    parts = [(index, vars(part)) for part_of in (named.things, named.faces) for index, part in enumerate(part_of)]
    inside = [f"{name}{index}" for index, values in parts for name, value in values.items() if not value]
    return (*inside, *(name for name in _OF_CATEGORY[named.category] if not getattr(named, name)))


def true_draw(named: Scene, rng: np.random.Generator) -> Scene:
    """A scene that a caption can mean, as often as training shows it with that caption.

    Args:
        named: What the caption names.
        rng: Source of the randomness.

    Returns:
        A scene of the generator: what is named is put into random ones, but for colours and textures, on which the
        generator's rules rest; they must be as named. Of these scenes those are kept from which `left_open` leaves the
        caption.

    Raises:
        MrFlowError: The generator has no such scene.
    """
    for _ in range(_MOST_TRIES):
        other = _donor(named, rng)
        if not _may_mean(named, other):
            continue
        scene = _with_named(named, other)
        if left_open(scene, rng) == named:
            return scene
    raise MrFlowError(f"the caption {caption(named)!r} must be one that left_open makes; no scene was found for it.")


def _donor(named: Scene, rng: np.random.Generator) -> Scene:
    kind = _fine_kind(named)
    return random_scene(rng, named.category) if kind is None else fine_scene(rng, kind)


def _fine_kind(named: Scene) -> FineKind | None:
    if named.category == "faces" or named.category == "lines":
        return named.category
    if named.small_word:
        return "small letters" if named.category == "letters" else "small sign"
    return "birds" if named.birds else None


def _may_mean(named: Scene, other: Scene) -> bool:
    """Whether a scene is of the same make, and its colours and textures are as named."""
    if (other.category, len(other.things), len(other.faces)) != (
        *(named.category, len(named.things), len(named.faces)),
    ):
        return False
    same = [(getattr(named, name), getattr(other, name)) for name in ("ink", "wall", "sky", "pattern", "gap")]
    for mine, theirs in zip(named.things, other.things, strict=True):
        same += [(mine.colour, theirs.colour), (mine.texture, theirs.texture)]
    return all(mine in ("", theirs) for mine, theirs in same)


def _with_named(named: Scene, other: Scene) -> Scene:
    def merged(mine: Any, theirs: Any) -> Any:
        return replace(theirs, **{name: value for name, value in vars(mine).items() if value})

    parts = {name: tuple(map(merged, getattr(named, name), getattr(other, name, ()))) for name in ("things", "faces")}
    return replace(merged(named, other), **parts)


def open_scenes(count: int, *, with_fine: bool = True) -> list[tuple[Scene, Scene]]:
    """Scenes that nothing was trained on, with what an open caption of each names.

    Args:
        count: How many; a longer list begins with the shorter one.
        with_fine: Every second one has fine detail.

    Returns:
        Pairs of the scene and what is named of it, which is never all of it.
    """
    found: list[tuple[Scene, Scene]] = []
    for index in range(count):
        rng = np.random.default_rng([STREAM, index])
        scene = fine_scene(rng) if with_fine and index % 2 else random_scene(rng)
        named = scene
        while caption(named) == caption(scene):
            named = left_open(scene, rng)
        found.append((scene, named))
    return found


def rendered(scenes: Sequence[Scene], size: int, seed: int = FIRST_SEED) -> Tensor:
    """The scenes as the generator draws them, (N, 3, size, size) in [0, 1]."""
    drawn = [torch.from_numpy(render(scene, size, seed=seed + row)) for row, scene in enumerate(scenes)]
    return torch.stack(drawn).permute(0, 3, 1, 2).float().contiguous()


# --------------------------------------------------------------------------------------------------------- what is read


_READ_IN = {"faces": ("wall",), "lines": ()}
"""The fields that the judge of whole images reads in scenes of these categories; in others all."""


@lru_cache(maxsize=1)
def fine() -> fine_judge.FineJudge:
    """The judge of fine detail, ready to read."""
    return fine_judge.load_fine_judge()


@torch.inference_mode()
def probabilities(pictures: Tensor, named: Scene) -> dict[str, Tensor]:
    """What is read where a caption leaves things open.

    Args:
        pictures: (N, 3, H, W) in [0, 1], of one caption.
        named: What the caption names.

    Returns:
        For every open attribute that a judge reads, the probabilities (N, values) of its values.
    """
    fields = open_fields(named)
    found = _fine_probabilities(pictures, named, fields)
    whole = [field for field in fields if field in _READ_IN.get(named.category, reading.WHOLE)]
    if whole:
        parts = [judge.load().whole(part) for part in reading.at_reading_size(pictures).split(50)]
        found |= {field: torch.cat([part[field] for part in parts]).softmax(-1) for field in whole}
    return found


def _fine_probabilities(pictures: Tensor, named: Scene, fields: Sequence[str]) -> dict[str, Tensor]:
    """As `probabilities`, of fine detail: moods, hair and eyes of faces, gaps of lines."""
    if named.category not in _READ_IN:
        return {}
    images = fine_judge.at_full_size(pictures)
    found: dict[str, Tensor] = {}
    for index, place in enumerate(fine_judge.places(_filled(named))):
        view = fine_judge.VIEWS[place.view]
        cut, within = fine_judge.windows(images, range(len(images)), [place.box] * len(images), view)
        logits = getattr(fine(), view.reader)(fine_judge.resampled(cut, within, view.size) if view.size else cut)
        for name, values in logits.items():
            field = f"{name}{index}" if named.category == "faces" else name
            if field in fields:
                # That nothing can be told is no value.
                found[field] = values.softmax(-1)[:, : len(fine_judge.FIELDS[name])]
    return found


def _filled(named: Scene) -> Scene:
    """With any value in the open fields of fine detail: only where they belong counts."""
    faces = tuple(Face(face.mood or MOODS[0], face.hair or HAIRS[0], face.eyes or EYES[0]) for face in named.faces)
    return replace(named, faces=faces, gap=named.gap or next(iter(GAPS)))


def named_hits(pictures: Tensor, scenes: Sequence[Scene]) -> list[dict[str, list[bool]]]:
    """Which named attributes read as named.

    Args:
        pictures: (N, 3, H, W) in [0, 1].
        scenes: What the caption of each names.

    Returns:
        By picture and group of attributes, as `hits` of the judge and `fine_hits` of the judge of fine detail.
    """
    whole, detail = judge.hits(pictures, scenes), fine_judge.fine_hits(fine(), pictures, scenes)
    return [{**first, **second} for first, second in zip(whole, detail, strict=True)]


@dataclass(frozen=True)
class Measured:
    """The images of one open caption: their std, and by open attribute that is read, entropy in bits and confidence."""

    std: float
    entropy: dict[str, float]
    confidence: dict[str, float]


def measured(pictures: Tensor, named: Scene) -> Measured:
    """Measure the images (N, 3, H, W) of one caption's seeds, rounded to 8 bits as when saved."""
    saved = (pictures.clamp(0, 1) * 255).round() / 255
    read = probabilities(saved, named)
    return Measured(
        float((saved - saved.mean(0)).square().mean().sqrt()),
        {field: entropy(chances.argmax(-1)) for field, chances in read.items()},
        {field: float(chances.amax(-1).mean()) for field, chances in read.items()},
    )


def entropy(values: Tensor) -> float:
    """Entropy in bits of how often each number occurs in `values` (N,)."""
    share = torch.bincount(values).double() / len(values)
    share = share[share > 0]
    return abs(float((share * share.log2()).sum()))


def share_of(hits: Sequence[Mapping[str, Sequence[bool]]]) -> float | None:
    """Share of all that was read as named; None where nothing was."""
    every = [hit for each in hits for values in each.values() for hit in values]
    return sum(every) / len(every) if every else None


# ------------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Weights:
    """An engine and its upscaler, with the name that tables show."""

    name: str
    engine: PipelineEngine
    upscaler: Any


def load_weights(name: str, *, dtype: str = "auto") -> Weights:
    """Load weights of the embedded model.

    Args:
        name: A pipeline folder as `mrflow_sched/demo/weights` is one, or "shipped" for that. A folder without
            upscaler/x2.safetensors gets the shipped one.
        dtype: As in `PipelineEngine.from_folder`.

    Returns:
        The weights, ready to sample.

    Raises:
        MrFlowError: There is no such folder, or it holds no pipeline.
    """
    if name == SHIPPED:
        return Weights(name, demo.load_engine(dtype=dtype), load_upscaler(demo.upscaler_path()))
    own = Path(name) / "upscaler" / "x2.safetensors"
    engine = PipelineEngine.from_folder(name, family="demo", dtype=dtype)
    return Weights(name, engine, load_upscaler(own if own.exists() else demo.upscaler_path()))


def plans(size: int, guidance: float) -> dict[str, StagedPlan]:
    """The ways that are compared, at one guidance scale."""
    native = make_native_plan("demo", size, size, steps=12, solver="multistep", guidance=guidance)
    return {"native 12 multistep": native, "staged 12+1": make_plan("demo", size, size, "12+1", guidance=guidance)}


def sampled(weights: Weights, plan: StagedPlan, prompts: Sequence[str], seeds: Sequence[int], batch: int = 8) -> Tensor:
    """Images (N, 3, H, W) on the CPU, one for each prompt and seed."""
    parts: list[Tensor] = []
    for first in range(0, len(prompts), batch):
        part = slice(first, first + batch)
        done = sample_staged(weights.engine, plan, prompts[part], seeds=seeds[part], upscaler=weights.upscaler)
        parts.append(done.images.float().clamp(0, 1).cpu())
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Setting:
    """What is measured: the open captions, the seeds of each, how many captions for "named", and pixels a side."""

    captions: tuple[Scene, ...] = OPEN
    seeds: int = 16
    named: int = 48
    size: int = 256


QUICK = Setting((OPEN[1], OPEN[5], OPEN[9]), 4, 8, 128)


def true_pictures(setting: Setting, draw: int = 0) -> list[Tensor]:
    """True draws of every caption, as many as there are seeds; another `draw`, other scenes."""
    found: list[Tensor] = []
    for row, named in enumerate(setting.captions):
        rng = np.random.default_rng([STREAM, 1_000_000 + draw, row])
        scenes = [true_draw(named, rng) for _ in range(setting.seeds)]
        found.append(rendered(scenes, setting.size, seed=1000 * (draw + 1)))
    return found


def known_rows(setting: Setting, true: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Images of which it is known whether they pass: the first row does, the others do not."""
    return {
        "other true draws": true_pictures(setting, draw=1),
        "one image for all seeds": [pictures[:1].expand_as(pictures) for pictures in true],
        "the mean image": [pictures.mean(0, keepdim=True).expand_as(pictures) for pictures in true],
    }


def row_of(pictures: Sequence[Tensor], setting: Setting, hits: Sequence[Mapping[str, Sequence[bool]]]) -> Any:
    """A row of the record: by caption, and the means. `hits` are those of the captions for "named"; none: empty."""
    each = [measured(shown, named) for shown, named in zip(pictures, setting.captions, strict=True)]
    groups = dict.fromkeys(group for row in hits for group in row)
    return {
        "captions": {caption(named): asdict(found) for named, found in zip(setting.captions, each, strict=True)},
        "std": _mean([found.std for found in each]),
        "entropy": _mean([bits for found in each for bits in found.entropy.values()]),
        "confidence": _mean([chance for found in each for chance in found.confidence.values()]),
        "named": share_of(hits),
        "groups": {group: share_of([{group: row[group]} for row in hits if group in row]) for group in groups},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def measure(
    folders: Sequence[str],
    setting: Setting,
    *,
    guidances: Sequence[float] = GUIDANCES,
    keep: Callable[[str, list[Tensor]], object] = lambda name, pictures: None,
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Measure the known rows, and every way with every weights.

    Args:
        folders: As in `load_weights`.
        setting: What is measured.
        guidances: Guidance scales.
        keep: Is given the name of every row and its images, a tensor a caption.
        tell: Is given a line for every row.

    Returns:
        The record: what was measured, the row "true draws", and all other rows by name.
    """
    pairs = open_scenes(setting.named)
    true = true_pictures(setting)
    truth = row_of(true, setting, _true_hits(pairs, setting.size))
    keep("true draws", true)
    rows = {name: row_of(pictures, setting, []) for name, pictures in known_rows(setting, true).items()}
    for folder in folders:
        weights = load_weights(folder)
        for guidance in guidances:
            for way, plan in plans(setting.size, guidance).items():
                name = f"{folder}, {way}, guidance {guidance:g}"
                begin = time.perf_counter()
                pictures, hits = _of_way(weights, plan, setting, [named for _, named in pairs])
                rows[name] = row_of(pictures, setting, hits)
                keep(name, pictures)
                tell(f"{name}: {time.perf_counter() - begin:.0f} s, {verdicts(rows[name], truth)}")
    record = {"seeds": setting.seeds, "named": setting.named, "size": setting.size, "torch": torch.__version__}
    return record | {"true draws": truth, "rows": rows}


def _true_hits(pairs: Sequence[tuple[Scene, Scene]], size: int) -> list[dict[str, list[bool]]]:
    return named_hits(rendered([scene for scene, _ in pairs], size), [named for _, named in pairs])


def _of_way(
    weights: Weights, plan: StagedPlan, setting: Setting, named: Sequence[Scene]
) -> tuple[list[Tensor], list[dict[str, list[bool]]]]:
    seeds = range(FIRST_SEED, FIRST_SEED + setting.seeds)
    pictures = [sampled(weights, plan, [caption(each)] * len(seeds), seeds) for each in setting.captions]
    if not named:
        return pictures, []
    others = sampled(weights, plan, [caption(each) for each in named], range(FIRST_SEED, FIRST_SEED + len(named)))
    return pictures, named_hits((others * 255).round() / 255, named)


def verdicts(row: Mapping[str, Any], truth: Mapping[str, Any]) -> dict[str, bool]:
    """Which of the four numbers are as they must be; "named" only where it was measured."""
    found = {
        "std": row["std"] >= LEAST_STD,
        "entropy": row["entropy"] >= LEAST_ENTROPY * truth["entropy"],
        "confidence": row["confidence"] >= LEAST_CONFIDENCE * truth["confidence"],
    }
    return found if row["named"] is None else {**found, "named": row["named"] >= LEAST_NAMED}


# -------------------------------------------------------------------------------------------------------------- report


def to_markdown(record: Mapping[str, Any]) -> str:
    """Three tables: the numbers with yes or no, entropy by caption and attribute, and what is named by group."""
    truth, rows = record["true draws"], {"true draws": record["true draws"], **record["rows"]}
    limits = {
        "std": f"std, at least {LEAST_STD}",
        "entropy": f"entropy in bits, {LEAST_ENTROPY:.0%} of true",
        "confidence": f"confidence, {LEAST_CONFIDENCE:.0%} of true",
        "named": f"named, at least {LEAST_NAMED:.0%}",
    }
    numbers = [[name, *_judged(row, truth), _all(row, truth)] for name, row in rows.items()]
    by_caption = [
        [words, field, *(_bits(row["captions"][words]["entropy"], field) for row in rows.values())]
        for words, found in truth["captions"].items()
        for field in found["entropy"]
    ]
    spread = [
        [words, "std", *(f"{row['captions'][words]['std']:.3f}" for row in rows.values())]
        for words in truth["captions"]
    ]
    named = {name: row for name, row in rows.items() if row["named"] is not None}
    groups = [[group, *(_share(row["groups"].get(group)) for row in named.values())] for group in truth["groups"]]
    numbered = [f"({index})" for index in range(1, len(rows) + 1)]
    legend = "; ".join(f"{number} {name}" for number, name in zip(numbered, rows, strict=True))
    parts = [
        f"{len(truth['captions'])} open captions, {record['seeds']} seeds each, {record['size']} pixels; "
        f"{record['named']} further captions for what is named.",
        table(["row", *limits.values(), "all"], numbers),
        f"By caption and open attribute: entropy in bits; std. {legend}.",
        table(["caption", "attribute", *numbered], [*by_caption, *spread], "llr"),
    ]
    return "\n\n".join([*parts, *([table(["named", *named], groups)] if groups else [])])


def _bits(found: Mapping[str, float], field: str) -> str:
    return f"{found[field]:.2f}" if field in found else ""


def _judged(row: Mapping[str, Any], truth: Mapping[str, Any]) -> list[str]:
    passed = verdicts(row, truth)
    shown = {"std": f"{row['std']:.3f}", "entropy": f"{row['entropy']:.2f}", "confidence": f"{row['confidence']:.3f}"}
    shown["named"] = _share(row["named"])
    return [f"{text} {_yes(passed[name])}" if name in passed else text for name, text in shown.items()]


def _all(row: Mapping[str, Any], truth: Mapping[str, Any]) -> str:
    return _yes(all(verdicts(row, truth).values()))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def save_sheet(folder: Path, name: str, pictures: Sequence[Tensor], side: int = 96) -> None:
    """The images of a row: a line a caption, a column a seed."""
    from tools.train_demo.evaluate import sheet

    small = functional.interpolate(torch.cat(list(pictures)), (side, side), mode="area")
    words = "".join(letter if letter.isalnum() or letter in "+." else "-" for letter in name)
    sheet(small, len(pictures[0])).save(folder / f"variety-{words}.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.variety", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--weights", nargs="+", metavar="FOLDER", default=[SHIPPED], help="default: the package's")
    parser.add_argument("--seeds", type=int, default=16, help="images of each caption (default 16)")
    parser.add_argument("--named", type=int, default=48, help="captions to read what is named (default 48)")
    parser.add_argument("--size", type=side, default=256, help="pixels a side (default 256)")
    parser.add_argument(
        "--quick", action="store_true", help="three captions, four seeds, 128 pixels, one guidance scale"
    )
    parser.add_argument("--out", type=results_folder, help="folder for the results")
    asked = parser.parse_args(arguments)
    for name, least in (("seeds", 2), ("named", 0)):
        if getattr(asked, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(asked, name)}.")
    setting = QUICK if asked.quick else Setting(OPEN, asked.seeds, asked.named, asked.size)
    try:
        record = measure(
            asked.weights,
            setting,
            guidances=GUIDANCES[:1] if asked.quick else GUIDANCES,
            keep=lambda name, pictures: None if asked.out is None else save_sheet(asked.out, name, pictures),
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except MrFlowError as error:
        parser.error(str(error))
    text = to_markdown(record)
    print(text)
    if asked.out is not None:
        (asked.out / "variety.json").write_text(to_json(record), "utf-8")
        (asked.out / "variety.md").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    run_command(main)
