"""How far the scores of drafts tell those of the finished pictures: `python -m bench.previews.ranks`.

Many seeds of a few prompts of the embedded model, drafted in 12, 6 and 4 steps and finished. "Gain" is what finishing
the best of n drafts gives over finishing one at random, counted over all sets of n seeds, in standard deviations of the
finished score; the oracle chooses by the finished scores themselves.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.command import results_folder, run_command
from bench.markdown import table
from bench.previews.pictures import DRAFT_STEPS, FINISHED, FULL_DRAFT, pictures, scenes
from bench.quality.metrics import interval
from mrflow_sched.demo.captions import caption
from mrflow_sched.measure.ranking import Gain, expected_gain, spearman
from mrflow_sched.measure.scores import NAMES, Score, get_score

MOST_PROMPTS, LEAST_SEEDS = 4, 64
RESAMPLES = 200
LARGEST_NORMAL = {4: 1.0294, 8: 1.4236}
"""Expected value of the largest of n draws from a standard normal distribution (Teichroew 1956)."""
RANDOM, OTHER = "random numbers", "drafts of another prompt"


@dataclass(frozen=True)
class Row:
    """One score by one kind of draft against the finished pictures of one prompt.

    Attributes:
        score: Its name.
        drafts: Where the order comes from: a name of `DRAFT_STEPS`, `RANDOM` or `OTHER`.
        rho: Spearman's rank correlation, with its 95 % interval over resampled seeds; NaN where a side is all equal.
        best: The best draft of all is the best finished picture.
        gains: By the number of drafts to choose from.
        shares: 95 % intervals of `Gain.share`.
    """

    score: str
    drafts: str
    rho: tuple[float, float, float]
    best: bool
    gains: Mapping[int, Gain]
    shares: Mapping[int, tuple[float, float]]


def measured(score: str, drafts: str, draft_scores: Tensor, finished_scores: Tensor, resamples: int) -> Row:
    """Compare two lists of scores, (seeds,) each."""
    generator = torch.Generator().manual_seed(0)
    count = len(draft_scores)
    drawn = [torch.randint(count, (count,), generator=generator) for _ in range(resamples)]
    pairs = [(draft_scores[rows], finished_scores[rows]) for rows in drawn]
    rhos = [_number(spearman(*pair)) for pair in pairs]
    shares = {n: [_number(expected_gain(*pair, n).share) for pair in pairs] for n in LARGEST_NORMAL}
    return Row(
        score,
        drafts,
        (_number(spearman(draft_scores, finished_scores)), *_interval(rhos)),
        bool(finished_scores[draft_scores.argmax()] == finished_scores.max()),
        {n: expected_gain(draft_scores, finished_scores, n) for n in LARGEST_NORMAL},
        {n: _interval(values) for n, values in shares.items()},
    )


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of what could be computed."""
    return interval([value for value in values if not math.isnan(value)] or [float("nan")])


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def rows_of(
    scores: Sequence[Score],
    shown: Mapping[str, Tensor],
    prompt: str,
    others: Tensor,
    other_prompt: str,
    resamples: int,
) -> list[Row]:
    """All rows of one prompt; `others` are full drafts of another one, for the row that must be near nothing."""
    found: list[Row] = []
    for score in scores:
        values = {name: score(images, [prompt] * len(images)) for name, images in shown.items()}
        rows = {name: values[name] for name in DRAFT_STEPS}
        rows[OTHER] = score(others, [other_prompt] * len(others))
        rows[RANDOM] = torch.rand(len(others), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found += [measured(score.name, name, drafts, values[FINISHED], resamples) for name, drafts in rows.items()]
    return found


def section(*, prompts: int, seeds: int, folder: Path) -> str:
    """The section for the page of the whole package: ranks need many seeds, and few prompts.

    Args:
        prompts: How many prompts; those above `MOST_PROMPTS` are left out.
        seeds: Seeds of each, at least `LEAST_SEEDS`.
        folder: Keeps the pictures; a run that was stopped goes on from there.

    Returns:
        Markdown.
    """
    return f"## Scores of drafts\n\n{ranked(min(prompts, MOST_PROMPTS), max(seeds, LEAST_SEEDS), folder)}"


def ranked(prompts: int, seeds: int, folder: Path, more_scores: Sequence[str] = (), resamples: int = RESAMPLES) -> str:
    """Measure and report.

    Args:
        prompts: How many prompts, 2 or more.
        seeds: Seeds of each.
        folder: Keeps the pictures.
        more_scores: Scores beside our own, for instance "clip:FOLDER".
        resamples: Bootstrap samples of seeds for the intervals.

    Returns:
        Markdown without a heading.

    Raises:
        ValueError: There are fewer than two prompts, or fewer seeds than drafts to choose from.
    """
    if prompts < 2 or seeds < max(LARGEST_NORMAL):
        raise ValueError(f"{prompts} prompts and {seeds} seeds are too few: 2 and {max(LARGEST_NORMAL)} are needed")
    chosen = scenes(prompts)
    made = [pictures(scene, seeds, folder) for scene in chosen]
    scores = [get_score(name) for name in (*NAMES, *more_scores)]
    texts = [caption(scene) for scene in chosen]
    tables: dict[str, list[Row]] = {}
    for index, text in enumerate(texts):
        other = (index + 1) % len(texts)
        tables[text] = rows_of(scores, made[index], text, made[other][FULL_DRAFT], texts[other], resamples)
    parts = [_introduction(seeds), _summary(tables)]
    parts += [f"### “{text}”\n\n{_table(rows)}" for text, rows in tables.items()]
    return "\n\n".join(parts)


def _introduction(seeds: int) -> str:
    return (
        f"Scores of drafts against those of the finished pictures, {seeds} seeds a prompt. A draft of 12 steps is "
        "stage 1 of the run itself. Gains are over one picture at random, in standard deviations of the finished "
        "score, over all sets of n seeds: of the best draft, of the oracle (the best finished picture), and what the "
        "normal rule (correlation × expected largest of n) promises. Share: gain / oracle. In brackets 95 % intervals "
        f"over resampled seeds. Rows “{RANDOM}” and “{OTHER}” order the same pictures by what cannot know them; the "
        "latter have the same seeds, and what a seed's noise gives to every picture (brightness, most of all) shows "
        "there."
    )


def _summary(tables: Mapping[str, Sequence[Row]]) -> str:
    every = [row for rows in tables.values() for row in rows]
    lines: list[list[str]] = []
    for name in dict.fromkeys(row.score for row in every):
        cells = [name]
        for drafts in (*DRAFT_STEPS, OTHER, RANDOM):
            rows = [row for row in every if (row.score, row.drafts) == (name, drafts)]
            cells += [_range([row.rho[0] for row in rows]), _range([_number(row.gains[4].share) for row in rows])]
        lines.append(cells)
    head = ["score"] + [f"{drafts}: {what}" for drafts in (*DRAFT_STEPS, OTHER, RANDOM) for what in ("ρ", "share of 4")]
    return f"Least and largest over the prompts:\n\n{table(head, lines)}"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} … {max(values):.2f}"


def _table(rows: Sequence[Row]) -> str:
    head = ["score", "order by", "ρ", "best of all"]
    for n in LARGEST_NORMAL:
        head += [f"best of {n}: gain", "oracle", "normal rule", "share", "same choice"]
    lines: list[list[str]] = []
    for row in rows:
        cells = [row.score, row.drafts, f"{row.rho[0]:+.2f} [{row.rho[1]:.2f}, {row.rho[2]:.2f}]"]
        cells.append("same" if row.best else "another")
        for n, gain in row.gains.items():
            low, high = row.shares[n]
            cells += [f"{each / gain.spread if gain.spread else 0:.2f}" for each in (gain.gain, gain.oracle)]
            cells += [f"{row.rho[0] * LARGEST_NORMAL[n]:.2f}", f"{_number(gain.share):.2f} [{low:.2f}, {high:.2f}]"]
            cells.append(f"{gain.agreement:.2f}")
        lines.append(cells)
    return table(head, lines, "llr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=MOST_PROMPTS)
    parser.add_argument("--seeds", type=int, default=LEAST_SEEDS)
    parser.add_argument("--score", action="append", default=[], help="a score beside our own: clip:FOLDER")
    parser.add_argument("--folder", type=Path, default=Path("out/previews"), help="keeps the pictures")
    parser.add_argument("--out", type=results_folder, default="bench/results")
    asked = parser.parse_args()
    text = ranked(asked.prompts, asked.seeds, asked.folder, more_scores=asked.score)
    (asked.out / "ranks.md").write_text(f"# Scores of drafts\n\n{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_command(main)
