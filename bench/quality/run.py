"""How the ways are measured: a setting of scenes, all ways on it, and a record of what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.quality import by_upscaler, full_size, known, metrics, patch_judge, report, scores, ways
from bench.quality.kinds import FIRST_SEED, all_scenes, rendered
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import Scene
from mrflow_sched.measure.metrics import psnr

STOPPED = "Stopped by Ctrl-C: the record is made of what was measured before; Ctrl-C once more ends it without one."


@dataclass(frozen=True, eq=False)
class Setting:
    """What all ways are measured with: the scenes, their ground truth, the model and the rows without a sampler."""

    scenes: list[Scene]
    truth: scores.Truth
    model: ways.Model
    known: known.Rows


@lru_cache(maxsize=1)
def setting(size: int, each: int) -> Setting:
    """The setting of `each` scenes of every category, and as many with fine detail."""
    scenes = all_scenes(each)
    truth, model = scores.Truth(scenes, rendered(scenes, size)), ways.Model.load(size)
    rows = known.Rows.of(truth, lambda draw: rendered(scenes, size, draw), model.engine)
    return Setting(scenes, truth, model, rows)


def compared_scenes(here: Setting, count: int) -> by_upscaler.Scenes:
    """The scenes of a setting as the sweep of upscalers takes them, with `count` bootstrap samples."""
    samples = metrics.resamples(count, len(here.scenes), _groups(here.truth))
    seeds = range(FIRST_SEED, FIRST_SEED + len(here.scenes))
    return by_upscaler.Scenes(here.truth, [caption(scene) for scene in here.scenes], seeds, samples, here.known)


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
    """All ways on all scenes, `count` bootstrap samples: the record, and the images by way (with `report.TRUTH`) in 8
    bits, (N, 3, H, W). Ctrl-C leaves out the ways that are not measured by then, once the base is."""
    here = setting(size, each)
    scenes, truth, model = here.scenes, here.truth, here.model
    prompts = [caption(scene) for scene in scenes]
    missing = ways.not_installed(chosen)
    chosen = [way for way in chosen if way.name not in missing]
    measured: dict[str, scores.Measured] = {}
    rows: dict[str, dict[str, Any]] = {}
    try:
        for way in chosen:
            made, seconds = sample(model, way, prompts, batch)
            mine = truth.measure(made.images)
            rows[way.name] = {"kind": way.kind, "cost": way.cost, "seconds": seconds, **_stages(model, truth, made)}
            measured[way.name] = mine
            tell(f"{way.name}: {seconds:.2f} s per image, composite {truth.parts(mine)['composite']:.3f}")
    except KeyboardInterrupt:
        if base not in measured:
            raise
        tell(STOPPED)
    left = [way.name for way in chosen if way.name not in measured]
    chosen = [way for way in chosen if way.name in measured]
    rows = {name: rows[name] for name in measured}
    samples = metrics.resamples(count, len(scenes), _groups(truth))
    tested = known.test(truth, here.known, measured)
    compared = scores.compared(truth, measured, base, samples)
    for name, mine in measured.items():
        ceiling = tested["rows"][known.CEILING]["composite"]
        rows[name] |= {**compared[name], "over ceiling": compared[name]["composite"] / ceiling}
        rows[name] |= _measured(truth, mine, measured[base])
        structure = compared[name]["local structure to base, interval"]
        rows[name]["patches"] = patch_judge.compared(
            mine.patches, measured[base].patches, truth.true.patches, samples, structure
        )
    _against(rows, measured, base, chosen, scenes)
    record = {
        "scenes": len(scenes),
        "size": size,
        "base": base,
        "weights": dict(scores.WEIGHTS),
        "resamples": count,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "known": tested,
        "ground truth": truth.parts(truth.true),
        "letters of the ground truth": truth.letters_by_height(truth.true),
        "ways": rows,
        "not installed": missing,
        "not measured": left,
    }
    if report.OURS in measured:
        record["worst"] = scores.worst(measured[report.OURS], measured[base])[:8]
        if base != report.OURS:
            both = measured[report.OURS], measured[base]
            record["by kind"] = scores.by_kind(truth, *both, here.known.measured[known.CEILING], samples)
    return record, {report.TRUTH: truth.true.levels, **{name: mine.levels for name, mine in measured.items()}}


def _groups(truth: scores.Truth) -> list[list[int]]:
    """Scenes are resampled within their kind, or, where a kind has only one, all together."""
    kinds: list[list[int]] = [truth.rows_of(kind).tolist() for kind in truth.kinds]
    return kinds if min(map(len, kinds)) > 1 else [list(range(len(truth.scenes)))]


def _measured(truth: scores.Truth, mine: scores.Measured, base: scores.Measured) -> dict[str, Any]:
    """What is told of a way beside the composite."""
    return {
        "accuracy": truth.accuracy(mine),
        "groups": truth.groups(mine),
        "kinds": {kind: truth.parts(mine, truth.rows_of(kind)) for kind in truth.kinds},
        "letters by height": truth.letters_by_height(mine),
        "full size": {
            "distance": full_size.distance(mine.full, truth.true.full),
            "to ground truth": full_size.paired(mine.full, truth.true.full),
            "to base": full_size.paired(mine.full, base.full),
        },
    }


def _against(
    rows: dict[str, dict[str, Any]],
    measured: dict[str, scores.Measured],
    base: str,
    chosen: Sequence[ways.Way],
    scenes: Sequence[Scene],
) -> None:
    """Add to every way's row its distance to the base and to the first native way, and to a native way's that to the
    one of most steps, which began from the same noise."""
    natives = [way for way in chosen if way.kind == "native"]
    for name, row in rows.items():
        for held in dict.fromkeys((base, *(way.name for way in natives[:1]))):
            row[f"to {held}"] = scores.against(measured[name], measured[held])
    if natives:
        converged = max(natives, key=lambda way: way.cost).name
        for way in natives:
            found = scores.same_noise(measured[way.name], measured[converged], scenes)
            rows[way.name]["same noise"] = {"converged": converged, **found}


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
