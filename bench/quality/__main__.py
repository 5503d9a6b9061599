"""Measures what staged sampling costs in quality, on the embedded model, whose scenes are known exactly.

    python -m bench.quality --out DIR                   the ways at equal cost (16 scenes: 25 minutes on two CPU cores)
    python -m bench.quality --sweep sigma --out DIR     one option at a time; `--sweep all` for all sweeps
    python -m bench.quality --ideas --out DIR           ideas that may beat staged 12+1
    python -m bench.quality --quick                     a few scenes, prints only

Writes quality.json, .md, .png, -pictures.png and -worst.png (or sweep-NAME.*, ideas.*). Scenes, seeds and
resamples are fixed, and no part of the model was trained on the scenes. scores.py defines the composite.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.quality import ideas, metrics, report, scores, sweeps, ways
from mrflow_sched.demo.scenes import CATEGORIES, Scene, caption, render
from mrflow_sched.measure.metrics import psnr

TEST_STREAM, FIRST_SEED = 3, 1000
OURS = report.OURS


def scenes_of(each: int) -> list[Scene]:
    """`each` scenes of every category, of a stream that nothing was trained on."""
    from tools.train_demo import data

    found: dict[str, list[Scene]] = {category: [] for category in CATEGORIES}
    index = 0
    while min(len(rows) for rows in found.values()) < each:
        scene = data.scene_at(index, TEST_STREAM)
        if len(found[scene.category]) < each:
            found[scene.category].append(scene)
        index += 1
    return [scene for rows in found.values() for scene in rows]


def rendered(scenes: Sequence[Scene], size: int) -> Tensor:
    """The scenes as the generator renders them, (N, 3, size, size) in [0, 1]."""
    drawn = [torch.from_numpy(render(scene, size, seed=FIRST_SEED + row)) for row, scene in enumerate(scenes)]
    return torch.stack(drawn).permute(0, 3, 1, 2).float().contiguous()


def sample(model: ways.Model, way: ways.Way, prompts: Sequence[str], batch: int) -> tuple[ways.Made, float]:
    """All images of a way, and seconds per image. One image is made first as a warm-up and not counted."""
    seeds = range(FIRST_SEED, FIRST_SEED + len(prompts))
    way.make(model, prompts[:1], seeds[:1])
    parts: list[ways.Made] = []
    begin = time.perf_counter()
    for first in range(0, len(prompts), batch):
        parts.append(way.make(model, prompts[first : first + batch], seeds[first : first + batch]))
    seconds = (time.perf_counter() - begin) / len(prompts)

    def joined(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    images = joined("images")
    assert images is not None
    return ways.Made(images, joined("low"), joined("upscaled")), seconds


def measure(
    chosen: Sequence[ways.Way],
    base: str,
    *,
    size: int,
    each: int,
    count: int,
    batch: int = 8,
    tell: Callable[[str], object] = print,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All ways on all scenes, `count` bootstrap samples: the record, and the images by way (with `report.TRUTH`)."""
    scenes = scenes_of(each)
    prompts = [caption(scene) for scene in scenes]
    model = ways.Model.load(size)
    truth = scores.Truth(scenes, rendered(scenes, size))
    measured: dict[str, scores.Measured] = {}
    rows: dict[str, dict[str, Any]] = {}
    for way in chosen:
        made, seconds = sample(model, way, prompts, batch)
        measured[way.name] = truth.measure(made.images)
        rows[way.name] = {"kind": way.kind, "cost": way.cost, "seconds": seconds, **_stages(model, truth, made)}
        tell(f"{way.name}: {seconds:.2f} s per image, composite {truth.parts(measured[way.name])['composite']:.3f}")
    natives = [way.name for way in chosen if way.kind == "native"]
    groups = [truth.rows_of(category).tolist() for category in CATEGORIES]
    samples = metrics.resamples(count, len(scenes), groups)
    compared = scores.compared(truth, measured, base, samples)
    for name, each_measured in measured.items():
        rows[name] |= compared[name]
        rows[name]["accuracy"] = truth.accuracy(each_measured)
        rows[name]["groups"] = truth.groups(each_measured)
        rows[name]["categories"] = {
            category: truth.parts(each_measured, truth.rows_of(category)) for category in CATEGORIES
        }
        rows[name]["letters by height"] = truth.letters_by_height(each_measured)
        for held in dict.fromkeys((base, *natives[:1])):
            rows[name][f"to {held}"] = scores.against(each_measured, measured[held])
    record = {
        "scenes": len(scenes),
        "size": size,
        "base": base,
        "weights": dict(scores.WEIGHTS),
        "resamples": count,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ground truth": truth.parts(truth.true),
        "letters of the ground truth": truth.letters_by_height(truth.true),
        "ways": rows,
    }
    if OURS in measured:
        record["worst"] = scores.worst(measured[OURS], measured[base])[:8]
    pictures = {report.TRUTH: truth.true.pictures, **{name: each_m.pictures for name, each_m in measured.items()}}
    return record, pictures


def _stages(model: ways.Model, truth: scores.Truth, made: ways.Made) -> dict[str, Any]:
    """How each part of a staged way changes the colours, and the PSNR of the result to its low-resolution image."""
    if made.low is None or made.upscaled is None:
        return {}
    engine = model.engine
    with torch.no_grad():
        round_trip = torch.cat([engine.decode(engine.encode(part)) for part in made.upscaled.split(8)])
    chain = {"low": made.low, "upscaled": made.upscaled, "round trip": round_trip, "final": made.images}
    colours = {name: metrics.colour(images) for name, images in chain.items()}
    names = list(chain)
    drift = {
        f"{before} to {after}": {
            "mean": float((colours[after] - colours[before])[:, :3].mean() * 255),
            "absolute": float((colours[after] - colours[before])[:, :3].abs().mean() * 255),
            "saturation": float((colours[after] - colours[before])[:, 3].mean() * 255),
        }
        for before, after in [*pairwise(names), ("low", "final")]
    }
    small = torch.nn.functional.interpolate(made.images, made.low.shape[-2:], mode="area")
    return {"colour drift": drift, "psnr of the layout": float(psnr(small, made.low).clamp(max=100).mean())}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="final side in pixels (default 256)")
    parser.add_argument("--scenes", type=int, default=24, help="scenes per category (default 24)")
    parser.add_argument("--resamples", type=int, default=200, help="bootstrap samples (default 200)")
    parser.add_argument("--sweep", choices=[*sweeps.SWEEPS, "all"], help="sweep one option instead of the comparison")
    parser.add_argument("--ideas", action="store_true", help="compare ideas with staged 12+1")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these ways at equal cost; * matches any text")
    parser.add_argument("--quick", action="store_true", help="two scenes per category and few ways")
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args(arguments)
    each, count = (2, 20) if options.quick else (options.scenes, options.resamples)
    base = "native 50"
    jobs: dict[str, list[ways.Way]] = {}
    if options.ideas:
        tried = ideas.ideas(options.size)[: 2 if options.quick else None]
        jobs["ideas"] = [ways.staged(options.size), ways.native(options.size, 20, "multistep"), *tried]
        base = "staged 12+1"
    elif options.sweep is None:
        every = ways.equal_cost(options.size)
        if options.only:
            unknown = [name for name in options.only if not any(fnmatch(way.name, name) for way in every)]
            if unknown:
                parser.error(f"--only {unknown[0]!r} is no way; choose from {', '.join(way.name for way in every)}")
            every = [way for way in every if any(fnmatch(way.name, name) for name in (OURS, *options.only))]
            base = base if base in [way.name for way in every] else OURS
        jobs["quality"] = [every[0], ways.staged(options.size)] if options.quick else every
    else:
        names = list(sweeps.SWEEPS) if options.sweep == "all" else [options.sweep]
        base = "staged 12+1"
        for name in names:
            swept = sweeps.SWEEPS[name].ways(options.size)
            jobs[f"sweep-{name}"] = [ways.staged(options.size), *(swept[:2] if options.quick else swept)]
    swept_records: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, chosen in jobs.items():
        record, pictures = measure(
            chosen,
            base,
            size=options.size,
            each=each,
            count=count,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
        print(report.to_markdown(record), flush=True)
        if options.sweep == "all":
            short = name.removeprefix("sweep-")
            swept_records[short] = (sweeps.SWEEPS[short].question, record)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
            (options.out / f"{name}.md").write_text(report.to_markdown(record) + "\n")
            report.plot(record, options.out / f"{name}.png", sweep=options.sweep is not None)
            report.sheet(record, pictures, scenes_of(each), options.out / f"{name}-pictures.png")
            if name == "quality":
                report.worst_sheet(record, pictures, options.out / f"{name}-worst.png")
    if swept_records and options.out is not None:
        report.sweeps_plot(swept_records, options.out / "sweeps.png")


if __name__ == "__main__":
    main()
