"""Measures tiles of a refine stage on the embedded model: seams, spectra, quality, seconds; and plans of 1024 px.

    python -m bench.tiles --out bench/results          512 and 1024 px, four scenes (half an hour on two CPU cores)
    python -m bench.tiles --sides 512 --scenes 1       prints only

Writes tiles.json and tiles.md. Rows: the whole image at once (the ceiling), tiles side by side without overlap (known
to be bad), and tiles as `tile` makes them, with positions of their own and with those of the whole image.

seam     gradient of what tiles changed, across the lines where they are blended, over that across their neighbours on
         the token grid; 1: nothing to be seen there
period   power of that gradient at the tiles' period and its harmonics, over its mean power; 1: no more than elsewhere
read     share of the caption's attributes and letters that the judge of bench.quality reads
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.command import results_folder, run_command, to_json
from bench.markdown import table
from bench.quality import judge
from bench.quality.__main__ import FIRST_SEED, scenes_of
from bench.quality.ways import AUTHORS_SIGMA
from mrflow_sched import demo, load_upscaler, make_plan
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import Scene
from mrflow_sched.measure.metrics import psnr
from mrflow_sched.methods.tiled import Tiled, TiledEngine
from mrflow_sched.plan.tiles import cells
from mrflow_sched.sampler import sample_staged

TILE = 256
GRID = 8  # pixels of a token of the embedded model


class SideBySide(TiledEngine):
    """Tiles without overlap, each an image of its own: the known-bad way."""

    def denoise(self, x: Tensor, sigma: Tensor, text: Any, *, guidance: float) -> Tensor:
        side = self._tile * int(self._engine.latent_shape(GRID, GRID)[-1]) // GRID
        rows = [
            torch.cat([self._engine.denoise(each, sigma, text, guidance=guidance) for each in row.split(side, -1)], -1)
            for row in x.split(side, -2)
        ]
        return torch.cat(rows, -2)


@dataclass(frozen=True)
class Hard(Tiled):
    """`SideBySide` where the plan wants tiles."""

    def stage(self, run: Any, latents: Tensor) -> Tensor:
        if not run.plan.tiled(run.index):
            return self.inner.stage(run, latents)
        return self.inner.stage(run.with_engine(SideBySide(run.engine, run.plan.tile)), latents)


# --------------------------------------------------------------------------------------------------------------- seams


def borders(side: int, tile: int, *, overlap: bool = True) -> list[int]:
    """Pixel columns at which tiles begin to be blended, are blended half and half, and end; or where they meet."""
    if not overlap:
        return list(range(tile, side, tile))
    parts = [(start * GRID, stop * GRID) for start, stop in cells(side, tile, GRID)]
    found: set[int] = set()
    for (_, stop), (start, _) in pairwise(parts):
        shared = stop - start
        found |= {start + shared // 4, start + shared // 2, stop - shared // 4}
    return sorted(round(each / GRID) * GRID for each in found)


def seam(changed: Tensor, lines: Sequence[int]) -> float:
    """Mean gradient of (N, 3, H, W) across `lines` over that across lines next to them; rows or columns, the larger.

    What tiles change is strongest where an image has detail, so each line is compared with its neighbours.
    """
    ratios: list[float] = []
    for profile in _profiles(changed):
        each: list[float] = []
        for line in lines:
            near = [line + GRID * step for step in (-2, -1, 1, 2) if line + GRID * step not in lines]
            each.append(float(profile[line - 1] / profile[[other - 1 for other in near]].mean()))
        ratios.append(sum(each) / len(each))
    return max(ratios)


def period(changed: Tensor, step: int) -> float:
    """Power of the gradient's profile at the period `step` in pixels and its harmonics, over its mean power.

    The profile, one value a token, is taken relative to its surroundings, as in `seam`; of rows and columns the larger.
    """
    ratios: list[float] = []
    for profile in _profiles(changed):
        values = profile[GRID - 1 :: GRID]
        around = functional.pad(values[None, None], (2, 2), mode="reflect").unfold(-1, 5, 1).median(-1).values[0, 0]
        values = values / around - (values / around).mean()
        at = torch.arange(len(values)) * GRID

        def power(frequency: float, values: Tensor = values, at: Tensor = at) -> float:
            return float((values * torch.exp(-2j * math.pi * frequency * at)).sum().abs().square())

        side = len(profile) + 1
        every = [power(each / side) for each in range(1, side // (2 * GRID))]
        on = [power(each / step) for each in range(1, step // (2 * GRID))]
        ratios.append(sum(on) / len(on) / (sum(every) / len(every)))
    return max(ratios)


def _profiles(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute gradient across every column and every row."""
    return images.diff(dim=-1).abs().mean((0, 1, 2)), images.diff(dim=-2).abs().mean((0, 1, 3))


# ---------------------------------------------------------------------------------------------------------------- rows


def ways(side: int, tile: int) -> dict[str, tuple[dict[str, Any], Any]]:
    """Name of a row -> options of its plan and its method, the ceiling first."""
    found: dict[str, tuple[dict[str, Any], Any]] = {
        "whole image": ({}, None),
        "side by side, no overlap": ({"tile": tile}, Hard()),
        "tiles, own positions": ({"tile": tile, "tile_positions": "own"}, None),
        "tiles, positions of the whole": ({"tile": tile}, None),
    }
    if side == 4 * TILE:
        found["2 stages, tiles"] = ({"tile": tile, "stages": 2}, None)
        found["4 stages from 128, tiles"] = ({"tile": tile, "stages": 4, "factor": 2.0}, None)
    return found


def measure(side: int, tile: int, scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    """The rows of one size."""
    engine, upscaler = demo.load_engine(), load_upscaler(demo.upscaler_path())
    pictures: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for name, (options, method) in ways(side, tile).items():
        made: list[Tensor] = []
        begin = time.perf_counter()
        # From the embedded model's own 0.6 every tile would draw anew.
        plan = make_plan("demo", side, side, sigma=AUTHORS_SIGMA, **options)
        for index, scene in enumerate(scenes):
            plan = replace(plan, seed=FIRST_SEED + index)
            made.append(sample_staged(engine, plan, caption(scene), upscaler=upscaler, method=method).images)
        seconds = (time.perf_counter() - begin) / len(scenes)
        pictures[name] = torch.cat(made)
        whole = pictures["whole image"]
        row: dict[str, Any] = {"side": side, "way": name, "stages": [stage.width for stage in plan.stages]}
        row |= {"seconds": seconds, "read": judge.share_read(pictures[name], scenes)}
        if name != "whole image" and len(plan.stages) == len(make_plan("demo", side, side).stages):
            changed, hard = pictures[name] - whole, method is not None
            first, second, *_ = cells(side, tile, GRID)
            row |= {
                "psnr": float(psnr(pictures[name], whole).mean()),
                "seam": seam(changed, borders(side, tile, overlap=not hard)),
            }
            if side > 2 * tile:  # a single border has no period
                row["period"] = period(changed, tile if hard else (second[0] - first[0]) * GRID)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    cells_of: list[list[object]] = []
    for row in rows:
        measured = [f"{row[name]:.2f}" if name in row else "" for name in ("seam", "period", "psnr")]
        stages = ", ".join(map(str, row["stages"]))
        cells_of.append(
            [row["side"], row["way"], stages, f"{row['seconds']:.1f}", *measured, f"{100 * row['read']:.0f} %"]
        )
    head = ["side", "way", "stages", "s", "seam", "period", "PSNR to whole", "read"]
    return table(head, cells_of, "rllrrrrr")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tiles", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--tile", type=int, default=TILE)
    parser.add_argument("--scenes", type=int, default=4, help="how many")
    parser.add_argument("--out", type=results_folder, help="folder for tiles.json and tiles.md")
    asked = parser.parse_args(words)
    # One scene of each kind first, then the next of each.
    drawn = scenes_of(math.ceil(asked.scenes / 4))
    each = len(drawn) // 4
    scenes = [drawn[kind * each + index] for index in range(each) for kind in range(4)][: asked.scenes]
    rows = [row for side in asked.sides for row in measure(side, asked.tile, scenes)]
    print(report(rows))
    if asked.out is not None:
        record = {"tile": asked.tile, "scenes": len(scenes), "torch": torch.__version__, "rows": rows}
        (asked.out / "tiles.json").write_text(to_json(record), "utf-8")
        (asked.out / "tiles.md").write_text(report(rows) + "\n", "utf-8")


if __name__ == "__main__":
    run_command(main)
