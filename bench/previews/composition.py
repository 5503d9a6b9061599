"""How much of a seed's native picture a staged picture keeps, with noise of its own and with nested noise.

    python -m bench.previews.composition --out bench/results       24 prompts x 2 seeds; 40 minutes on one CPU core

All pictures of a row are compared with native pictures of the same prompts and seeds at the same size. Made pictures
are kept in the work folder, and a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from bench.command import results_folder, run_command
from bench.markdown import table
from bench.previews.open_captions import open_caption
from bench.quality import metrics, scores
from bench.quality.__main__ import rendered, scenes_of
from mrflow_sched import demo, load_upscaler, make_native_plan, make_plan
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import CATEGORIES, Scene
from mrflow_sched.measure.metrics import psnr
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import sample_staged

FAMILY = "demo"
NATIVE_STEPS = 30
FIRST_SEED = 1000
OTHER_SEEDS = 500_000
"""Added to every seed for a row that starts from the noise of other seeds."""
BATCH = 4
RESAMPLES = 1000
QUALITY_RESAMPLES = 100
PARTS_OF_SETS = ("local structure", "look", "spectrum")
"""The parts of the quality score that do not ask what is in the picture."""

Captions = Literal["full", "open"]


@dataclass(frozen=True)
class Row:
    """A way of making the pictures of one set of captions.

    Attributes:
        name: What the table calls it.
        captions: "full" or "open".
        plan: Its plan.
        added: Added to every seed.
        given: It starts from the native picture, shrunk, in place of a first stage.
    """

    name: str
    captions: Captions
    plan: StagedPlan
    added: int = 0
    given: bool = False


@dataclass
class Pictures:
    """Makes pictures and keeps them.

    Attributes:
        prompts: Number of prompts, a multiple of four.
        seeds: Number of seeds for each prompt.
        folder: Where pictures are kept.
    """

    prompts: int
    seeds: int
    folder: Path

    @cached_property
    def scenes(self) -> list[Scene]:
        """The scenes of the prompts."""
        return scenes_of(self.prompts // len(CATEGORIES))

    @cached_property
    def engine(self) -> Any:
        """The embedded model."""
        return demo.load_engine(dtype="bfloat16")

    @cached_property
    def upscaler(self) -> Any:
        """Its upscaler."""
        return load_upscaler(demo.upscaler_path())

    def texts(self, captions: Captions) -> list[str]:
        """The captions of all pictures: every prompt with the first seed, then with the next."""
        scenes = self.scenes
        once = [caption(s) if captions == "full" else open_caption(s, row) for row, s in enumerate(scenes)]
        return once * self.seeds

    def seed_of(self, picture: int) -> int:
        """The seed of a picture; the one after it belongs to its refine stage."""
        return FIRST_SEED + 2 * picture

    def native(self, captions: Captions, width: int, height: int) -> Tensor:
        """The native pictures of a set of captions, (N, 3, height, width)."""
        return self.of(Row("native", captions, make_native_plan(FAMILY, width, height, steps=NATIVE_STEPS)))

    def of(self, row: Row) -> Tensor:
        """All pictures of a row, (N, 3, H, W) in [0, 1]; what the folder holds is not made again."""
        texts = self.texts(row.captions)
        seeds = [self.seed_of(picture) + row.added for picture in range(len(texts))]
        told = repr((row.plan.to_string(), row.given, texts, seeds))
        path = self.folder / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.pt"
        made: list[Tensor] = list(torch.load(path, weights_only=True)) if path.exists() else []
        starts = self.native(row.captions, *_size(row.plan)) if row.given else None
        begin = time.process_time()
        for first in range(len(made), len(texts), BATCH):
            part = slice(first, first + BATCH)
            given = None if starts is None else _halved(starts[part])
            made += self._make(row, texts[part], seeds[part], given)
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(torch.stack(made), path)
            spent = (time.process_time() - begin) / (first + BATCH)
            print(
                f"{row.name} ({row.captions}): {len(made)} of {len(texts)}, {spent:.1f} s", file=sys.stderr, flush=True
            )
        return torch.stack(made).float() / 255

    def _make(self, row: Row, texts: Sequence[str], seeds: Sequence[int], given: Tensor | None) -> list[Tensor]:
        asked: dict[str, Any] = {"upscaler": self.upscaler, "seeds": seeds, "image": given}
        done = sample_staged(self.engine, row.plan, texts, **asked)
        return list((done.images * 255).round().to(torch.uint8))


def rows() -> list[Row]:
    """All rows, those that matter most first."""
    plan, few = make_plan(FAMILY, 256, 256, "12+1"), make_native_plan(FAMILY, 256, 256, steps=6, solver="multistep")

    def pair(name: str, captions: Captions, own: StagedPlan) -> list[Row]:
        nested = replace(own, noise="nested")
        return [Row(f"{name}, own noise", captions, own), Row(f"{name}, nested noise", captions, nested)]

    def around(captions: Captions) -> list[Row]:
        return [
            *pair("staged 12+1", captions, plan),
            Row("staged 12+1, nested noise of another seed", captions, replace(plan, noise="nested"), OTHER_SEEDS),
            Row("later stages alone, from the native picture shrunk", captions, plan, given=True),
            Row("native, 6 multistep steps", captions, few),
        ]

    return [
        *around("full"),
        *pair("three stages, 12+1+1", "full", make_plan(FAMILY, 256, 256, "12+1+1")),
        *pair("stage 1 of 168 px", "full", make_plan(FAMILY, 256, 256, "12+1", factor=1.5)),
        *pair("stage 1 of 136 px", "full", make_plan(FAMILY, 256, 256, "12+1", factor=1.88)),
        *around("open"),
    ]


# -------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Kept:
    """What each picture of a row keeps of the native one, (N,) each; compared at half their size.

    Attributes:
        own: 1 where it is nearer (SSIM) to the native picture of its own seed than to that of another seed, a mean
            over the other seeds.
        psnr: In dB.
        ssim: Structural similarity.
    """

    own: Tensor
    psnr: Tensor
    ssim: Tensor


def compare(pictures: Tensor, native: Tensor, seeds: int) -> Kept:
    """Compare pictures with native ones.

    Args:
        pictures: (N, 3, H, W), every prompt with the first seed, then with the next.
        native: The native pictures in the same order and size.
        seeds: Number of seeds.
    """
    made, true = _halved(pictures), _halved(native)
    prompts = len(made) // seeds
    similar = metrics.ssim(made, true)
    others = [metrics.ssim(made, true.roll(prompts * other, 0)) for other in range(1, seeds)]
    own = torch.stack([(similar > other).float() + 0.5 * (similar == other) for other in others]).mean(0)
    return Kept(own, psnr(made, true).clamp(max=100), similar)


def interval_of(values: Tensor, seeds: int, count: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % interval of a mean, by resampling prompts of each category with all their seeds.

    Args:
        values: (N,), every prompt with the first seed, then with the next.
        seeds: Number of seeds.
        count: How many samples are drawn.
    """
    means = [float(values[chosen].mean()) for chosen in _samples(len(values) // seeds, seeds, count)]
    return metrics.interval(means)


@cache
def _samples(prompts: int, seeds: int, count: int) -> list[Tensor]:
    each = prompts // len(CATEGORIES)
    groups = [range(first, first + each) for first in range(0, prompts, each)]
    drawn = metrics.resamples(count, prompts, groups)
    return [torch.cat([chosen + seed * prompts for seed in range(seeds)]) for chosen in drawn]


def _halved(pictures: Tensor) -> Tensor:
    return functional.interpolate(pictures, scale_factor=0.5, mode="area")


def _size(plan: StagedPlan) -> tuple[int, int]:
    return plan.stages[-1].width, plan.stages[-1].height


# ------------------------------------------------------------------------------------------------------------ the text


def section(*, prompts: int, seeds: int, folder: Path) -> str:
    """Measure all rows.

    Args:
        prompts: Number of prompts, a multiple of four.
        seeds: Number of seeds for each, at least 2.
        folder: Where made pictures are kept.

    Returns:
        A section in markdown.
    """
    store = Pictures(prompts, seeds, folder)
    lines: dict[str, list[list[str]]] = {"full": [], "open": []}
    quality: dict[str, Tensor] = {}
    own: dict[tuple[str, StagedPlan], Kept] = {}
    for row in rows():
        pictures, native = store.of(row), store.native(row.captions, *_size(row.plan))
        kept = compare(pictures, native, seeds)
        base = own.setdefault((row.captions, replace(row.plan, noise="own")), kept)
        lines[row.captions].append(_cells(row, kept, base, seeds))
        if row.name in SCORED:
            quality[f"{row.captions}: {row.name}"] = pictures
            quality.setdefault(f"{row.captions}: native, {NATIVE_STEPS} steps", native)
    head = ["pictures", "own seed", "nested − own", "PSNR, dB", "nested − own", "SSIM", "nested − own"]
    count = prompts * seeds
    parts = [
        "## The composition of a seed",
        _INTRODUCTION.format(count=count, prompts=prompts, seeds=seeds, steps=NATIVE_STEPS),
        "Full captions, which name everything in the scene:",
        table(head, lines["full"]),
        _OPEN.format(examples="; ".join(f'"{text}"' for text in store.texts("open")[: prompts : prompts // 4])),
        table(head, lines["open"]),
        _QUALITY,
        _quality_table(store, quality),
    ]
    return "\n\n".join(parts)


SCORED = ("staged 12+1, own noise", "staged 12+1, nested noise")

_INTRODUCTION = (
    "{count} pictures of the embedded model ({prompts} prompts x {seeds} seeds, 256 px, bfloat16) beside native ones "
    "of the same seeds ({steps} Euler steps), both shrunk to half their size. Own seed: the share that is nearer in "
    "SSIM to the native picture of its own seed than to another seed's of the same prompt; chance is 0.50. Differences "
    "are paired; in brackets 95 % intervals over prompts."
)
_OPEN = "Open captions, which leave attributes out (such as {examples}), so that the seed decides more:"
_QUALITY = (
    "Quality by the score of `python -m bench.quality`; for open captions only its parts on sets of pictures (local "
    "structure, look, spectrum), since the caption does not say what should be there:"
)


def _cells(row: Row, kept: Kept, base: Kept, seeds: int) -> list[str]:
    cells, nested = [row.name], row.plan.noise == "nested"
    for value, before, digits in (
        (kept.own, base.own, 2),
        (kept.psnr, base.psnr, 2),
        (kept.ssim, base.ssim, 3),
    ):
        cells.append(f"{float(value.mean()):.{digits}f}")
        gap = value - before
        low, high = interval_of(gap, seeds)
        cells.append(f"{float(gap.mean()):+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})" if nested else "")
    return cells


def _quality_table(store: Pictures, pictures: dict[str, Tensor]) -> str:
    scenes = store.scenes * store.seeds
    truth = scores.Truth(scenes, rendered(scenes, 256))
    samples = _samples(store.prompts, store.seeds, QUALITY_RESAMPLES)
    score = {name: _scored(truth, truth.measure(made), name) for name, made in pictures.items()}
    drawn = {name: [each(chosen) for chosen in samples] for name, each in score.items()}
    lines: list[list[str]] = []
    for name, each in score.items():
        base = f"{name.partition(':')[0]}: {SCORED[0]}"
        gap = ""
        if name != base:
            low, high = metrics.interval([mine - own for mine, own in zip(drawn[name], drawn[base], strict=True)])
            gap = f"{each(None) - score[base](None):+.3f} ({low:+.3f} to {high:+.3f})"
        lines.append([name, f"{each(None):.3f}", gap])
    return table(["captions: pictures", "score", "difference to own noise"], lines)


def _scored(truth: scores.Truth, made: scores.Measured, name: str) -> Callable[[Tensor | None], float]:
    def score(chosen: Tensor | None) -> float:
        parts = truth.parts(made, chosen)
        if name.startswith("full"):
            return parts["composite"]
        return sum(scores.WEIGHTS[part] * parts[part] for part in PARTS_OF_SETS) / sum(
            scores.WEIGHTS[part] for part in PARTS_OF_SETS
        )

    return score


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the measurement from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.previews.composition", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--prompts", type=int, default=24, help="prompts, a multiple of four (default 24)")
    parser.add_argument("--seeds", type=int, default=2, help="seeds for each prompt (default 2)")
    parser.add_argument("--work", type=Path, help="folder where made pictures are kept")
    parser.add_argument("--out", type=results_folder, help="folder for composition.md")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        text = section(prompts=options.prompts, seeds=options.seeds, folder=options.work or Path(scratch))
    print(text)
    if options.out is not None:
        (options.out / "composition.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
