"""Measures what few native steps cost: the distance to the converged run of the same noise, and images that flip.

    python -m bench.quality.few_steps --out DIR                     the package's weights
    python -m bench.quality.few_steps --weights OLD NEW --out DIR   pipeline folders side by side
    python -m bench.quality.few_steps --quick                       few images and steps at 128 pixels, prints only

The default numbers of images are meant for a quarter of an hour on two CPU cores.

Writes few_steps.json and few_steps.md. Full and open captions of the same scenes, at guidance 1, 2 and 3.5; Euler,
multistep and careful at several step counts against multistep at 100 steps (60 at 256 pixels). By image:

PSNR      to the converged run of the same caption and noise; median and mean
reads     the judge reads another colour or another sky, of those that the scene has
layout    the root mean square difference of the latents, averaged over 4 x 4 of them, is more than 0.3
flip      either of the two
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.command import results_folder, run_command, to_json
from bench.markdown import table
from bench.quality import judge
from bench.quality.variety import FIRST_SEED, SHIPPED, Weights, load_weights, open_scenes
from mrflow_sched import make_native_plan
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.demo import judge as reading
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import Scene
from mrflow_sched.measure.metrics import psnr
from mrflow_sched.sampler import sample_staged

SOLVERS = ("euler", "multistep", "careful")
IMAGES, LARGE = 16, 4
"""Images at 128 and 256 pixels."""
FLIP_RMS = 0.3
"""Of pooled latents, whose spread over images is about 1."""
_POOL, _TOGETHER = 4, 8
_SEEN = ("colour0", "colour1", "ink", "wall", "sky")


@dataclass(frozen=True)
class Setting:
    """What is measured: how many images at each size, guidance scales, and step counts."""

    images: Mapping[int, int]
    guidances: tuple[float, ...] = (1.0, 2.0, 3.5)
    steps: tuple[int, ...] = (4, 6, 8, 12, 20)


QUICK = Setting({128: 2}, (3.5,), (4, 8))


def converged_steps(size: int) -> int:
    """Multistep steps of the run that counts as converged, at a size in pixels."""
    return 60 if size >= 256 else 100


def prompts_of(count: int) -> tuple[list[Scene], dict[str, list[str]]]:
    """Scenes that nothing was trained on, and by kind, "full" and "open", a caption of each."""
    pairs = open_scenes(count)
    full, named = [caption(scene) for scene, _ in pairs], [caption(part) for _, part in pairs]
    return [scene for scene, _ in pairs], {"full": full, "open": named}


def sampled(weights: Weights, prompts: Sequence[str], **options: Any) -> Tensor:
    """Native images (N, 3, size, size) on the CPU, each prompt with a noise of its own.

    Args:
        weights: What samples.
        prompts: The captions.
        **options: `size`, and options of `make_native_plan`.

    Returns:
        Floats in [0, 1].
    """
    size = options.pop("size")
    plan = make_native_plan("demo", size, size, **options)
    parts: list[Tensor] = []
    for first in range(0, len(prompts), _TOGETHER):
        part = prompts[first : first + _TOGETHER]
        seeds = range(FIRST_SEED + first, FIRST_SEED + first + len(part))
        parts.append(sample_staged(weights.engine, plan, part, seeds=seeds).images.float().clamp(0, 1).cpu())
    return torch.cat(parts)


@torch.inference_mode()
def pooled(weights: Weights, images: Tensor) -> Tensor:
    """Latents of images, averaged over 4 x 4 of them: the layout. The encoder is linear, so this loses nothing."""
    parts = [weights.engine.encode(part).float().cpu() for part in images.split(_TOGETHER)]
    return functional.avg_pool2d(torch.cat(parts), _POOL)


@torch.inference_mode()
def read(images: Tensor, scenes: Sequence[Scene]) -> list[dict[str, int]]:
    """What the judge reads of colours and sky, of those that each scene has."""
    logits = judge.load().whole(reading.at_reading_size(images))
    labels = [reading.labels(scene) for scene in scenes]
    return [
        {field: int(logits[field][row].argmax()) for field in _SEEN if wanted[field] >= 0}
        for row, wanted in enumerate(labels)
    ]


@dataclass(frozen=True)
class Seen:
    """Images with what they are compared by."""

    images: Tensor
    layout: Tensor
    read: list[dict[str, int]]

    @classmethod
    def of(cls, weights: Weights, images: Tensor, scenes: Sequence[Scene]) -> Seen:
        return cls(images, pooled(weights, images), read(images, scenes))


def compared(few: Seen, converged: Seen) -> dict[str, Any]:
    """Compare images of few steps with the converged ones of the same noise.

    Args:
        few: Images of few steps.
        converged: As many, in the same order.

    Returns:
        By image: "psnr" in dB (at most 100), "reads" and "layout", whether these differ. See the module.
    """
    rms = (few.layout - converged.layout).square().flatten(1).mean(1).sqrt()
    return {
        "psnr": psnr(few.images, converged.images).clamp(max=100).tolist(),
        "reads": [mine != theirs for mine, theirs in zip(few.read, converged.read, strict=True)],
        "layout": (rms > FLIP_RMS).tolist(),
    }


def summary(row: Mapping[str, Any]) -> dict[str, float]:
    """Median and mean PSNR in dB, and shares of the images whose reading or layout differs, and where either does."""
    values = torch.tensor(row["psnr"], dtype=torch.float64)
    either = [a or b for a, b in zip(row["reads"], row["layout"], strict=True)]
    shares = {name: sum(found) / len(found) for name, found in (*_flips(row), ("flip", either))}
    return {"median": float(values.quantile(0.5)), "mean": float(values.mean()), **shares}


def _flips(row: Mapping[str, Any]) -> list[tuple[str, list[bool]]]:
    return [(name, row[name]) for name in ("reads", "layout")]


def measure(folders: Sequence[str], setting: Setting, *, tell: Callable[[str], object] = print) -> dict[str, Any]:
    """Measure every solver and step count.

    Args:
        folders: As in `variety.load_weights`.
        setting: What is measured.
        tell: Is given a line for every guidance scale.

    Returns:
        The record: its "rows" say the weights, caption kind, size, guidance, solver and steps, and what `compared` and
        `summary` give.
    """
    rows: list[dict[str, Any]] = []
    for folder in folders:
        weights = load_weights(folder)
        for size, count in setting.images.items():
            scenes, kinds = prompts_of(count)
            for kind, prompts in kinds.items():
                for guidance in setting.guidances:
                    begin = time.perf_counter()
                    cell = {"weights": folder, "captions": kind, "size": size, "guidance": guidance}
                    rows += [{**cell, **row} for row in _of_cell(weights, scenes, prompts, cell, setting.steps)]
                    tell(f"{folder}, {kind}, {size} px, guidance {guidance:g}: {time.perf_counter() - begin:.0f} s")
    return {"images": dict(setting.images), "flip rms": FLIP_RMS, "torch": torch.__version__, "rows": rows}


def _of_cell(
    weights: Weights, scenes: Sequence[Scene], prompts: Sequence[str], cell: Mapping[str, Any], steps: Sequence[int]
) -> list[dict[str, Any]]:
    def seen(solver: str, count: int) -> Seen:
        asked = {"size": cell["size"], "guidance": cell["guidance"], "solver": solver, "steps": count}
        return Seen.of(weights, sampled(weights, prompts, **asked), scenes)

    converged = seen("multistep", converged_steps(cell["size"]))
    rows: list[dict[str, Any]] = []
    for solver in SOLVERS:
        for count in steps:
            found = compared(seen(solver, count), converged)
            rows.append({"solver": solver, "steps": count, **found, **summary(found)})
    return rows


def to_markdown(record: Mapping[str, Any]) -> str:
    """A table a caption kind."""
    counted = ", ".join(f"{count} images at {size} px" for size, count in record["images"].items())
    parts = [
        f"{counted}. Distance to the converged run of the same noise: PSNR in dB, median / mean; share of flips "
        "(of these: read differently, other layout)."
    ]
    for kind in dict.fromkeys(row["captions"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["captions"] == kind]
        columns = list(dict.fromkeys((row["size"], row["guidance"]) for row in rows))
        lines: dict[tuple[Any, ...], dict[tuple[Any, ...], str]] = {}
        for row in rows:
            line = lines.setdefault((row["weights"], row["solver"], row["steps"]), {})
            line[row["size"], row["guidance"]] = _cell(row)
        head = ["weights", "solver", "steps", *(f"{size} px, guidance {guidance:g}" for size, guidance in columns)]
        body = [[*map(str, name), *(line[column] for column in columns)] for name, line in lines.items()]
        parts.append(f"{kind.capitalize()} captions\n\n{table(head, body, 'llr')}")
    return "\n\n".join(parts)


def _cell(row: Mapping[str, Any]) -> str:
    flips = f"{row['flip']:.0%} ({row['reads']:.0%}, {row['layout']:.0%})"
    return f"{row['median']:.1f} / {row['mean']:.1f}; {flips}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.few_steps", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--weights", nargs="+", metavar="FOLDER", default=[SHIPPED], help="default: the package's")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"images at 128 pixels (default {IMAGES})")
    parser.add_argument("--large-images", type=int, default=LARGE, help=f"at 256 pixels (default {LARGE}; 0: none)")
    parser.add_argument(
        "--quick", action="store_true", help="two images at 128 pixels, one guidance scale, 4 and 8 steps"
    )
    parser.add_argument("--out", type=results_folder, help="folder for the results")
    asked = parser.parse_args(arguments)
    for name, least in (("images", 1), ("large_images", 0)):
        if getattr(asked, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more, got {getattr(asked, name)}.")
    counts = {128: asked.images} | ({256: asked.large_images} if asked.large_images else {})
    try:
        record = measure(
            asked.weights,
            QUICK if asked.quick else Setting(counts),
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except MrFlowError as error:
        parser.error(str(error))
    text = to_markdown(record)
    print(text)
    if asked.out is not None:
        (asked.out / "few_steps.json").write_text(to_json(record), "utf-8")
        (asked.out / "few_steps.md").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    run_command(main)
