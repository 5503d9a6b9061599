"""Which kinds of picture staged sampling loses, by how much, and what helps: 12+N by kind, for one upscaler after the
other.

Stage 1 runs once per scene, and every upscaler once on what it made, as in by_upscaler.py. Two rows say what the
reading is worth: other renderings of the captions, and these halved and enlarged again, which keeps what the low size
can show and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from bench.markdown import table
from bench.quality import by_upscaler, known, metrics, ways
from bench.quality.by_upscaler import Setting
from bench.quality.run import Setting as Here
from bench.quality.run import compared_scenes, sample
from bench.quality.scores import Measured, Truth, resampled, shares
from mrflow_sched.images.convert import to_pil

UPSCALERS = ("SR", "compact x4", "anime x4", "Lanczos")
"""Our own, two of others, and none."""
SETTINGS = (
    Setting(),
    Setting(1, 0.12),
    Setting(1, 0.3),
    Setting(1, 0.6),
    Setting(4, 0.75, tokens=0.5),
    Setting(4, 0.75),
    Setting(6, 0.75, "shifted"),
    Setting(8, 0.85, "shifted"),
)
"""Refine stages, from none to one that draws nearly all anew."""
SHOWN = (Setting(1, 0.12), Setting(1, 0.6), Setting(4, 0.75), Setting(6, 0.75, "shifted"))
"""Columns of the sheet."""


@dataclass(frozen=True)
class Row:
    """One way of making the images: its cost in forwards at the final size, and what was measured of them."""

    cost: float
    measured: Measured


def measure(
    here: Here,
    count: int,
    *,
    names: Sequence[str] = UPSCALERS,
    settings: Sequence[Setting] = SETTINGS,
    natives: Sequence[ways.Way] | None = None,
    tell: Callable[[str], object] = print,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Every setting with every upscaler of `names` that is installed, beside native sampling.

    Returns the record, and the images in 8 bits by row, (N, 3, H, W).
    """
    scenes, model, truth = compared_scenes(here, count), here.model, here.truth
    rows = {
        known.CEILING: Row(0.0, here.known.measured[known.CEILING]),
        known.HALVED: Row(0.0, here.known.measured[known.HALVED]),
    }
    for way in natives or (ways.native(model.size, 50), ways.native(model.size, 8, "multistep")):
        made, _ = sample(model, way, scenes.prompts, by_upscaler.BATCH)
        rows[way.name] = Row(way.cost, truth.measure(made.images))
        tell(f"{way.name}: {truth.accuracy(rows[way.name].measured):.3f} read")
    base = next(name for name in rows if name.startswith("native"))
    sampled = {name: row.measured for name, row in rows.items() if name.startswith("native")}
    low = by_upscaler.low_pictures(model, scenes.prompts, scenes.seeds)
    for upscaler in [name for name in names if name in model.upscalers]:
        upscaled = by_upscaler.upscaled_by(model.upscalers[upscaler], low, model.size)
        for setting in settings:
            images = by_upscaler.refined(model, setting, scenes.prompts, scenes.seeds, upscaled)
            name = row_name(upscaler, setting)
            rows[name] = Row(sum(setting.plan(model.size).stage_costs()), truth.measure(images.cpu()))
            if pair := by_upscaler.name_in_pair(upscaler, setting):
                sampled[pair] = rows[name].measured
            tell(f"{name}: {truth.accuracy(rows[name].measured):.3f} read")
    record = {
        "scenes": len(scenes.prompts),
        "size": model.size,
        "base": base,
        "resamples": len(scenes.samples),
        "known": known.test(truth, here.known, sampled),
        "kinds": {kind: len(truth.rows_of(kind)) for kind in truth.kinds},
        "rows": {name: _figures(truth, row, rows[base], scenes.samples) for name, row in rows.items()},
        "not installed": [name for name in names if name not in model.upscalers],
    }
    return record, {known.TRUE: truth.true.levels, **{name: row.measured.levels for name, row in rows.items()}}


def row_name(upscaler: str, setting: Setting) -> str:
    return f"{upscaler} 12+{setting.name}"


def _figures(truth: Truth, row: Row, base: Row, samples: Sequence[Tensor]) -> dict[str, Any]:
    """Of every kind, the share that the judges read, its difference to the base with its interval, the composite, and
    the same difference of that; letters by their height."""
    found: dict[str, Any] = {"cost": row.cost, "letters by height": truth.letters_by_height(row.measured), "kinds": {}}
    for kind in truth.kinds:
        own = truth.rows_of(kind)
        within = resampled(own, samples)
        gaps = [read_share(row.measured, rows) - read_share(base.measured, rows) for rows in within]
        composite = truth.parts(row.measured, own)["composite"]
        found["kinds"][kind] = {
            "read": read_share(row.measured, own),
            "to base": read_share(row.measured, own) - read_share(base.measured, own),
            "to base, interval": metrics.interval(gaps) if gaps else None,
            "composite": composite,
            "composite to base": composite - truth.parts(base.measured, own)["composite"],
            **shares(row.measured.hits[number] for number in own.tolist()),
        }
    return found


def read_share(measured: Measured, rows: Tensor) -> float:
    """Share of all that the captions of these images name, letters too, that reads as named."""
    every = [hit for row in rows.tolist() for values in measured.hits[row].values() for hit in values]
    return sum(every) / len(every)


# ----------------------------------------------------------------------------------------------------------- the tables


def to_markdown(record: Mapping[str, Any]) -> str:
    """What the bench knows of itself; what is read of every kind; if it could tell its known pairs apart, what that is
    to native sampling; letters by height; composites."""
    rows, kinds, base = record["rows"], list(record["kinds"]), record["base"]
    counted = [f"{kind} ({count})" for kind, count in record["kinds"].items()]
    read = [
        [name, f"{row['cost']:.2f}" if row["cost"] else "", *(f"{row['kinds'][kind]['read']:.0%}" for kind in kinds)]
        for name, row in rows.items()
    ]
    staged = {name: row for name, row in rows.items() if row["cost"] and not name.startswith("native")}
    gaps = [[name, *(_gap(row["kinds"][kind]) for kind in kinds)] for name, row in staged.items()]
    heights = list(rows[base]["letters by height"])
    letters = [[name, *(f"{row['letters by height'][height]:.0%}" for height in heights)] for name, row in rows.items()]
    composites = [[name, *(f"{row['kinds'][kind]['composite']:.3f}" for kind in kinds)] for name, row in rows.items()]
    parts = [
        known.to_markdown(record["known"]),
        table(["read", "cost", *counted], read),
        *([table([f"read, to {base} (95 %)", *kinds], gaps)] if record["known"]["could tell"] else []),
        table(["letters by height", *(f"{height} px" for height in heights)], letters),
        table(["composite", *kinds], composites),
    ]
    if record["not installed"]:
        parts.append(f"Not installed: {', '.join(record['not installed'])}.")
    return "\n\n".join(parts)


def _gap(row: Mapping[str, Any]) -> str:
    gap, edges = f"{row['to base'] * 100:+.0f}", row["to base, interval"]
    return gap if edges is None else f"{gap} ({edges[0] * 100:+.0f} to {edges[1] * 100:+.0f})"


def sheet(record: Mapping[str, Any], pictures: Mapping[str, Tensor], truth: Truth, names: Sequence[str]) -> Image.Image:
    """A picture of every kind, a line each, by the rows of `names`, at full size."""
    side, left, top = record["size"], 120, 22
    out = Image.new("RGB", (left + side * len(names), top + side * len(truth.kinds)), (250, 249, 246))
    pen = ImageDraw.Draw(out)
    for column, name in enumerate(names):
        pen.text((left + column * side + 6, 5), name, fill=(28, 30, 34))
    for line, kind in enumerate(truth.kinds):
        pen.text((6, top + line * side + 8), kind, fill=(28, 30, 34))
        row = int(truth.rows_of(kind)[0])
        for column, name in enumerate(names):
            out.paste(to_pil(pictures[name][row] / 255), (left + column * side, top + line * side))
    return out


def shown_rows(record: Mapping[str, Any], upscaler: str) -> list[str]:
    """The columns of the sheet: the scenes, native sampling, and `SHOWN` with an upscaler."""
    wanted = [known.TRUE, record["base"], *(row_name(upscaler, setting) for setting in SHOWN)]
    return [name for name in wanted if name == known.TRUE or name in record["rows"]]


def write(record: Mapping[str, Any], pictures: Mapping[str, Tensor], truth: Truth, out: Path) -> None:
    """kinds.md, and kinds.jpg with the first upscaler of others that is installed, else our own."""
    (out / "kinds.md").write_text(to_markdown(record) + "\n")
    here = [name for name in UPSCALERS if any(row.startswith(f"{name} 12+") for row in record["rows"])]
    chosen = next((name for name in here if name not in ("SR", "Lanczos")), here[0])
    sheet(record, pictures, truth, shown_rows(record, chosen)).save(out / "kinds.jpg", quality=88)
