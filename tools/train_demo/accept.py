"""Accepts or refuses new weights of the embedded model, against old ones on the same captions and seeds.

    python -m tools.train_demo.accept --weights NEW --against OLD --out FILE

Full captions: scenes of the world without fine detail, read by the judge, and scenes with it, read by the judge of fine
detail; each sampled natively with 50 Euler steps and staged with 12+1. FILE gets a line of JSON for every weights, set,
way and scene as soon as it is read, so that a stopped run goes on where it was; lines of
weights that have changed since do not count.

Prints for each kind of attribute both shares, and the difference with the middle 95 % of resampled scenes. The new
weights must natively meet, without fine detail: attributes at least 95 % and not more than 1 % below the old ones,
letters at least 95 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.markdown import table
from bench.quality import judge
from bench.quality.variety import FIRST_SEED, STREAM, Weights, fine, load_weights, rendered, sampled
from mrflow_sched import make_native_plan, make_plan
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.fine_judge import fine_hits
from mrflow_sched.demo.scenes import Scene, fine_scene
from mrflow_sched.plan.stages import StagedPlan
from tools.train_demo.evaluate import test_scenes

SIZE = 256
OLD_WORLD, FINE = "old world", "fine"
TRUE = "true scenes"
ALL = "all"
LEAST, MOST_LOST = 0.95, 0.01
RESAMPLES = 2000
_TOGETHER = 4

Hits = Mapping[str, Sequence[bool]]
Row = dict[str, Any]


def scenes_of(kind: str, count: int) -> list[Scene]:
    """Scenes that nothing was trained on.

    Args:
        kind: `OLD_WORLD`, as many of each category, or `FINE`.
        count: How many; of the old world rounded up to a multiple of 4.

    Returns:
        The scenes; a longer list of `FINE` begins with the shorter one.
    """
    if kind == FINE:
        return [fine_scene(np.random.default_rng([STREAM, 2, index])) for index in range(count)]
    each = -(-count // 4)
    of_kind = test_scenes(each)
    return [of_kind[column * each + row] for row in range(each) for column in range(4)]


def plans(steps: int) -> dict[str, StagedPlan]:
    """The ways: native with so many Euler steps, and staged 12+1."""
    native = make_native_plan("demo", SIZE, SIZE, steps=steps, solver="euler")
    return {f"native {steps}": native, "staged 12+1": make_plan("demo", SIZE, SIZE, "12+1")}


def read(kind: str, images: Tensor, scenes: Sequence[Scene]) -> list[dict[str, list[bool]]]:
    """What the judge of a set of scenes reads right, by image and group."""
    return judge.hits(images, scenes) if kind == OLD_WORLD else fine_hits(fine(), images, scenes)


def kept_rows(path: Path) -> list[Row]:
    """The lines of an earlier run; one that was cut off by a stop is left out."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def _append(path: Path, rows: Sequence[Row]) -> None:
    whole = not path.exists() or path.read_text("utf-8")[-1:] in ("", "\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + "".join(json.dumps(row) + "\n" for row in rows))


def measure(
    folders: Sequence[str], path: Path, *, scenes: int = 96, steps: int = 50, tell: Callable[[str], object] = print
) -> list[Row]:
    """Read every scene that `path` does not hold yet.

    Args:
        folders: As in `variety.load_weights`.
        path: The file of lines.
        scenes: How many of each set.
        steps: Of the native way.
        tell: Is given a line for every set and way.

    Returns:
        All rows: "weights", "fingerprint", "set", "way", "caption", "seed" and "hits" by group.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {_name(row): row for row in kept_rows(path)}
    asked: list[Row] = []
    for folder in dict.fromkeys(folders):
        weights = load_weights(folder)
        for kind in (OLD_WORLD, FINE):
            every = scenes_of(kind, scenes)
            for way, plan in plans(steps).items():
                wanted = [_row(weights, kind, way, scene, row) for row, scene in enumerate(every)]
                left = [row for row, each in enumerate(wanted) if _name(each) not in found]
                for first in range(0, len(left), _TOGETHER):
                    part = left[first : first + _TOGETHER]
                    done = _read_part(weights, plan, kind, [every[row] for row in part], [wanted[row] for row in part])
                    _append(path, done)
                    found |= {_name(row): row for row in done}
                asked += [found[_name(row)] for row in wanted]
                tell(f"{folder}, {kind}, {way}: {len(left)} scenes read, {len(every) - len(left)} were there")
    return asked


def _row(weights: Weights, kind: str, way: str, scene: Scene, index: int) -> Row:
    what = {"weights": weights.name, "fingerprint": weights.engine.fingerprint, "set": kind, "way": way}
    return {**what, "caption": caption(scene), "seed": FIRST_SEED + index}


def _name(row: Row) -> tuple[Any, ...]:
    return tuple(row[part] for part in ("weights", "fingerprint", "set", "way", "caption", "seed"))


def _read_part(
    weights: Weights, plan: StagedPlan, kind: str, scenes: Sequence[Scene], rows: Sequence[Row]
) -> list[Row]:
    images = sampled(weights, plan, [row["caption"] for row in rows], [row["seed"] for row in rows])
    hits = read(kind, (images * 255).round() / 255, scenes)
    return [{**row, "hits": each} for row, each in zip(rows, hits, strict=True)]


def shares(hits: Sequence[Hits], group: str) -> tuple[Tensor, Tensor]:
    """How many were right and how many were asked, (N,) each; the group `ALL` is all but the large letters."""
    named = [[values for name, values in each.items() if name == group or _counts(group, name)] for each in hits]
    right = [sum(sum(values) for values in each) for each in named]
    asked = [sum(len(values) for values in each) for each in named]
    return torch.tensor(right, dtype=torch.float64), torch.tensor(asked, dtype=torch.float64)


def _counts(group: str, name: str) -> bool:
    return group == ALL and name != "letters"


def compared(new: Sequence[Hits], old: Sequence[Hits], group: str) -> dict[str, Any] | None:
    """Compare what is read of the same scenes.

    Args:
        new: By scene, what reads right with the new weights.
        old: With the old ones, of the same scenes in the same order.
        group: A group of the hits, or `ALL`.

    Returns:
        "new" and "old", the shares; their "difference" and its "interval", the middle 95 % over resampled scenes;
        "asked", how many attributes. None where no scene names one.
    """
    (right, asked), (old_right, _) = shares(new, group), shares(old, group)
    total = float(asked.sum())
    if not total:
        return None
    drawn = torch.randint(len(new), (RESAMPLES, len(new)), generator=torch.Generator().manual_seed(0))
    counts = asked[drawn].sum(1)
    differences = ((right - old_right)[drawn].sum(1) / counts.clamp(min=1))[counts > 0]
    edges = differences.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    share, before = float(right.sum()) / total, float(old_right.sum()) / total
    out = {"new": share, "old": before, "difference": share - before, "asked": int(total)}
    return {**out, "interval": (float(edges[0]), float(edges[1]))}


def report(rows: Sequence[Row], new: str, old: str, steps: int) -> str:
    """The tables, and what is met.

    Args:
        rows: From `measure`.
        new: The new weights' folder.
        old: The old weights' folder.
        steps: Of the native way.

    Returns:
        Markdown.
    """
    lines: list[list[str]] = []
    native: dict[str, dict[str, Any]] = {}
    for kind in (OLD_WORLD, FINE):
        true = _true_hits(kind, rows, new)
        for way in plans(steps):
            mine, theirs = (_hits(rows, folder, kind, way) for folder in (new, old))
            for group in dict.fromkeys((ALL, *(name for each in mine for name in each))):
                found = compared(mine, theirs, group)
                if found is None:
                    continue
                if kind == OLD_WORLD and way == f"native {steps}":
                    native[group] = found
                right, asked = shares(true, group)
                lines.append([kind, way, group, *_texts(found), f"{float(right.sum() / asked.sum()):.1%}"])
    head = ["scenes", "way", "kind", "new", "old", "new - old", "95 %", "asked", TRUE]
    return "\n\n".join([table(head, lines, "lllr"), *_met(native)])


def _hits(rows: Sequence[Row], folder: str, kind: str, way: str) -> list[Hits]:
    return [row["hits"] for row in rows if (row["weights"], row["set"], row["way"]) == (folder, kind, way)]


def _true_hits(kind: str, rows: Sequence[Row], folder: str) -> list[dict[str, list[bool]]]:
    ways = [row["way"] for row in rows if row["weights"] == folder and row["set"] == kind]
    scenes = scenes_of(kind, ways.count(ways[0]))
    return read(kind, rendered(scenes, SIZE), scenes)


def _texts(found: Mapping[str, Any]) -> list[str]:
    low, high = found["interval"]
    shown = [f"{found['new']:.1%}", f"{found['old']:.1%}", f"{found['difference']:+.1%}"]
    return [*shown, f"{low:+.1%} to {high:+.1%}", str(found["asked"])]


def _met(native: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences on what the new weights must meet natively in the old world."""
    checks: list[tuple[str, bool]] = []
    if ALL in native:
        checks.append((f"attributes at least {LEAST:.0%}", native[ALL]["new"] >= LEAST))
        lost = native[ALL]["difference"] >= -MOST_LOST
        checks.append((f"attributes not more than {MOST_LOST:.0%} below the old weights", lost))
    if "letters" in native:
        checks.append((f"letters at least {LEAST:.0%}", native["letters"]["new"] >= LEAST))
    return [f"{words}: {'yes' if met else 'no'}" for words, met in checks]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_demo.accept", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--weights", required=True, metavar="FOLDER", help="the new weights, a pipeline folder")
    parser.add_argument("--against", required=True, metavar="FOLDER", help='the old ones; "shipped": the package\'s')
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="lines of JSON; a stopped run goes on")
    parser.add_argument("--scenes", type=int, default=96, help="scenes of each set (default 96)")
    parser.add_argument("--steps", type=int, default=50, help="steps of the native way (default 50)")
    asked = parser.parse_args(arguments)
    for name in ("scenes", "steps"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(asked, name)}.")
    try:
        rows = measure(
            [asked.weights, asked.against],
            asked.out,
            scenes=asked.scenes,
            steps=asked.steps,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except MrFlowError as error:
        parser.error(str(error))
    print(report(rows, asked.weights, asked.against, asked.steps))


if __name__ == "__main__":
    main()
