"""The tables of previews of native runs: how near each kind is, at which cost, and what the published order becomes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.markdown import table
from bench.previews import runs
from bench.quality import judge, metrics
from mrflow_sched.measure.metrics import paired_t, psnr, ssim
from mrflow_sched.methods.previews import Chain, CommutatorGuidance

SMALL_COST = 0.22
"""An evaluation at 128 px over one at 256 px, in CPU seconds in bfloat16 (0.044 / 0.199)."""

_MOST_DB = 99.0
_STEPS = runs.STEPS


def _chain(down: str, switch: int, **more: object) -> float:
    """Evaluations at the full size that a chain costs."""
    full, small = Chain(full=(256, 256), down=down, switch=switch, **more).evaluations(runs.SIGMAS)  # pyright: ignore[reportArgumentType]
    return full + SMALL_COST * small


_ALONE = SMALL_COST * _STEPS
_AGAIN = CommutatorGuidance(again=True)
COSTS: dict[str, float] = {
    "independent": _ALONE,
    "nested D_0": _ALONE,
    "nested Haar": _ALONE,
    "naive, switch 4": _chain("polyphase", 4, phase=0),
    "naive": _chain("polyphase", 10, phase=0),
    "random phase": _chain("polyphase", 10, phase=0),
    "argmax": _chain("polyphase", 10),
    "argmin": _chain("polyphase", 10),
    "argmin + guidance": _chain("polyphase", 10),
    "argmin + guidance, wrong sign": _chain("polyphase", 10),
    "argmin + guidance R": _chain("polyphase", 10, guidance=_AGAIN),
    "argmin + guidance R after": _chain("polyphase", 10, guidance=_AGAIN),
    "argmin + guidance from step 1": _chain("polyphase", 10),
    "argmin + guidance .01": _chain("polyphase", 10),
    "pixels, switch 4": _chain("pixels", 4),
    "pixels + guidance, switch 4": _chain("pixels", 4),
    "pixels, switch 10": _chain("pixels", 10),
    "pixels + guidance, switch 10": _chain("pixels", 10),
    "pixels + guidance, wrong sign": _chain("pixels", 10),
    "average": _chain("average", 10),
    "average + guidance": _chain("average", 10),
    "clean estimate at 4": 5,
    "clean estimate at 10": 11,
    "clean estimate at 20": 21,
    "few 4": 4,
    "few 6": 6,
    "few 8": 8,
    "stage 1": SMALL_COST * 12,
    "staged": SMALL_COST * 12 + 1,
    "D x1: polyphase": _STEPS,
    "D x1: average": _STEPS,
    "D x1: pixels": _STEPS,
    "other seed": _STEPS,
}
"""The rows in the order of the table, with their work in evaluations at the full size."""

PAPER: dict[str, float] = {
    "independent": 11.936,
    "naive": 18.221,
    "argmin + guidance": 21.182,
}
"""PSNR of arXiv 2604.09227, PixArt-Eval30K, FLUX.1-dev: direct, naive, theirs. As the paper gives them."""

ABLATION: dict[str, float] = {
    "random phase": 20.851,
    "argmax": 20.408,
    "argmin": 20.962,
    "no guidance": 19.115,
}
"""PSNR of the paper's ablation (all with its guidance, but for the last), on a subset that it does not name."""


class Scores(NamedTuple):
    """A row against the shrunk native pictures: values of each image, in the order seed by seed, prompt by prompt."""

    psnr: Tensor
    ssim: Tensor
    perceptual: Tensor
    own: Tensor
    staged: Tensor


class Measured:
    """All rows, with what is needed to compare them prompt by prompt."""

    def __init__(self, texts: Sequence[str], rows: dict[str, Tensor]) -> None:
        self.prompts, self.rows = len(texts), rows
        self.seeds = len(rows["native"]) // len(texts)
        pictures = {name: values.float() / 255 for name, values in rows.items() if values.dtype == torch.uint8}
        self._native, self._staged = pictures["native"], pictures["staged"]
        self._maps = judge.maps(self._native)
        phases = torch.stack([pictures.pop(f"phase {phase}") for phase in range(4)])
        pictures["naive"] = phases[0]
        pictures["other seed"] = self.other(self._native)
        chosen = rows["norms"].argmax(1)
        pictures["argmax"] = phases[chosen, torch.arange(len(chosen))]
        self.scores = {name: self._score(images) for name, images in pictures.items() if name != "native"}
        each = [self._score(images) for images in phases]
        self.phases = torch.stack([score.psnr for score in each])
        self.scores["random phase"] = Scores(*(torch.stack(values).mean(0) for values in zip(*each, strict=True)))

    def other(self, images: Tensor) -> Tensor:
        """The same prompt's picture of the next seed."""
        return images.reshape(self.seeds, self.prompts, *images.shape[1:]).roll(1, 0).flatten(0, 1)

    def of_row(self, values: Tensor, count: int) -> Tensor:
        """Values of all images, for a row that has only the first prompts of each seed."""
        if len(values) == count:
            return values
        return values.reshape(self.seeds, self.prompts, *values.shape[1:])[:, : count // self.seeds].flatten(0, 1)

    def by_prompt(self, values: Tensor) -> Tensor:
        """Means over seeds, (prompts,)."""
        return values.double().reshape(self.seeds, -1).mean(0)

    def gain(self, left: str, right: str, value: str = "psnr") -> tuple[float, float, str]:
        """Mean, paired t and interval of a difference, over the prompts that both rows have."""
        a, b = (getattr(self.scores[name], value) for name in (left, right))
        count = min(len(a), len(b))
        differences = self.by_prompt(self.of_row(a, count)) - self.by_prompt(self.of_row(b, count))
        low, high = interval(differences)
        return float(differences.mean()), paired_t(differences), f"{low:+.2f} to {high:+.2f}"

    def _score(self, images: Tensor) -> Scores:
        count = len(images)
        native, staged = self.of_row(self._native, count), self.of_row(self._staged, count)
        near, far = ssim(images, native), ssim(images, self.of_row(self.other(self._native), count))
        maps = [self.of_row(each, count) for each in self._maps]
        return Scores(
            psnr(images, native).clamp(max=_MOST_DB),
            near,
            metrics.perceptual(judge.maps(images), maps),
            (near > far).float(),
            psnr(images, staged).clamp(max=_MOST_DB),
        )


def interval(values: Tensor) -> tuple[float, float]:
    """The middle 95 per cent of the means of 1000 resamples of prompts."""
    drawn = torch.stack(metrics.resamples(1000, len(values), [range(len(values))]))
    return metrics.interval(values[drawn].mean(1).tolist())


def section(*, prompts: int, seeds: int, folder: Path) -> str:
    """The section on previews of native runs.

    Args:
        prompts: How many prompts.
        seeds: Seeds of each; 2 or more, since a preview must tell them apart.
        folder: Where pictures that were made are kept.

    Returns:
        Markdown.
    """
    texts, rows = runs.made(prompts, seeds, folder)
    return written(Measured(texts, rows))


def written(found: Measured) -> str:
    """The section's markdown."""
    count = f"{found.prompts} prompts x {found.seeds} seeds"
    return "\n\n".join(
        [
            f"Embedded model, torch {torch.__version__}, bfloat16. The native run is Euler, {_STEPS} steps, 256 px, "
            f"against which every preview (128 px) is compared, shrunk by area; {count}. Work is in evaluations "
            f"at the full size, one at 128 px being {SMALL_COST} of it. *own seed*: share of previews nearer (SSIM) to "
            "their own seed's picture than to the other seed's. Intervals (95 %) and paired t are over prompts. Rows "
            "with n = 16 or less settle a side question on the first prompts.",
            _main_table(found),
            "## What was asked",
            _asked(found),
            "## Which D keeps its word",
            _words(found),
            "## The published order, and ours",
            _paper(found),
            "## Inside the chain",
            _inside(found),
        ]
    )


def _main_table(found: Measured) -> str:
    lines: list[list[str]] = []
    for name, cost in COSTS.items():
        if name not in found.scores:
            continue
        score = found.scores[name]
        low, high = interval(found.by_prompt(score.psnr))
        lines.append(
            [
                name,
                f"{cost:.1f}",
                f"{_STEPS / cost:.1f}x",
                f"{float(score.psnr.mean()):.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{float(score.ssim.mean()):.3f}",
                f"{float(score.perceptual.mean()):.3f}",
                "-" if name == "random phase" else f"{float(score.own.mean()):.2f}",
                f"{float(score.staged.mean()):.2f}",
                str(len(score.psnr)),
            ]
        )
    head = ["preview", "evaluations", "speed", "PSNR", "95 %", "SSIM", "perceptual", "own seed", "PSNR to staged", "n"]
    return table(head, lines)


def _asked(found: Measured) -> str:
    few = float(found.scores["few 6"].psnr.mean())
    haar, pixels = found.gain("nested Haar", "nested D_0"), found.gain(*_PIXELS)
    plain, guided = (float(found.rows[f"distance: argmin{more}"].mean()) for more in ("", " + guidance"))
    fall = 1 - guided / plain
    rows = [
        ["few 6 comes to 30 dB", f"{few:.2f} dB", _verdict(few >= 30)],
        [
            "Haar noise is nearer than one phase of the noise (t > 2)",
            f"{haar[0]:+.2f} dB ({haar[2]}), t = {haar[1]:.1f}",
            _verdict(haar[1] > 2),
        ],
        [
            "guidance in pixels gains 1 dB",
            f"{pixels[0]:+.2f} dB ({pixels[2]}), t = {pixels[1]:.1f}",
            _verdict(pixels[0] >= 1),
        ],
        [
            "guidance brings the state nearer to D x1, by a quarter",
            f"{plain:.1f} to {guided:.1f}, {fall:.0%} less",
            _verdict(fall >= 0.25),
        ],
    ]
    return table(["asked", "measured", ""], rows, "ll")


def _words(found: Measured) -> str:
    """The rule of `mrflow preview --check` on these pictures."""
    chains = {"pixels": _PIXELS[0], "average": "average + guidance", "polyphase": "argmin + guidance"}
    lines: list[list[str]] = []
    for down, chain in chains.items():
        own, ideal = (found.gain(name, "nested Haar") for name in (chain, f"D x1: {down}"))
        kept = own[1] > 2 and ideal[1] > 2
        lines.append(
            [
                down,
                f"{own[0]:+.2f} dB, t = {own[1]:.1f}",
                f"{ideal[0]:+.2f} dB, t = {ideal[1]:.1f}",
                "yes" if kept else "NO",
            ]
        )
    head = ["D", "guided chain over nested Haar", "D x1 over nested Haar", "keeps its word (both t > 2)"]
    return table(head, lines, "l")


_PIXELS = ("pixels + guidance, switch 10", "pixels, switch 10")


def _verdict(kept: bool) -> str:
    return "pass" if kept else "FAIL"


def _paper(found: Measured) -> str:
    lines: list[list[str]] = []
    for name, theirs in PAPER.items():
        ours = float(found.scores[name].psnr.mean())
        lines.append([name, f"{theirs:.2f}", f"{ours:.2f}", f"{_STEPS / COSTS[name]:.2f}x"])
    first = table(["FLUX.1-dev / embedded model", "paper, PSNR", "ours, PSNR", "our speed"], lines)
    pairs = [
        ("nested D_0", "independent"),
        ("naive, switch 4", "nested D_0"),
        ("naive", "nested D_0"),
        ("random phase", "naive"),
        ("argmin", "random phase"),
        ("argmin", "argmax"),
        ("argmin + guidance", "argmin"),
        ("argmin + guidance, wrong sign", "argmin"),
        ("pixels, switch 10", "argmin"),
        _PIXELS,
        ("pixels + guidance, wrong sign", "pixels, switch 10"),
        ("average", "argmin"),
        ("average + guidance", "average"),
        ("clean estimate at 10", "pixels + guidance, switch 10"),
        ("few 6", "pixels + guidance, switch 10"),
    ]
    steps = [
        [f"{left} - {right}", f"{gain:+.2f}", between, f"{t:.1f}"]
        for left, right in pairs
        if left in found.scores and right in found.scores
        for gain, t, between in [found.gain(left, right)]
    ]
    second = table(["paired difference", "PSNR", "95 %", "t"], steps)
    theirs = ", ".join(f"{name} {value:.2f}" for name, value in ABLATION.items())
    return "\n\n".join(
        [first, f"The paper's ablation (its numbers, with guidance but for the last): {theirs}.", second]
    )


def _inside(found: Measured) -> str:
    rows = found.rows
    lines: list[list[str]] = []
    for name in sorted(name for name in rows if name.startswith("distance: ")):
        plain = "distance: argmin" if "argmin" in name else "distance: pixels, switch 4" if "switch 4" in name else None
        base = rows[plain or "distance: pixels, switch 10"]
        values = rows[name]
        kept = found.of_row(base, len(values))
        change = float(values.mean() / kept.mean()) - 1
        lines.append(
            [name.removeprefix("distance: "), f"{float(values.mean()):.1f}", f"{change:+.0%}", str(len(values))]
        )
    first = table(["state", "distance to D x1", "against no guidance", "n"], lines)
    norms = [
        [
            step,
            f"{float(values.mean()):.0f}",
            f"{float((values.amin(1) / values.amax(1)).mean()):.2f}",
            str(len(values)),
        ]
        for step, name in (("0", "norms at 0"), ("4", "norms at 4"), ("10", "norms"))
        if name in rows
        for values in [rows[name]]
    ]
    second = table(["switch", "commutator norm", "smallest over largest phase", "n"], norms)
    chosen, best = rows["norms"].argmin(1), found.phases.argmax(0)
    hit = float((chosen == best).float().mean())
    oracle = float(found.phases.amax(0).mean())
    note = (
        f"The phase of the smallest norm is the nearest of the four for {hit:.0%} of the images (chance 25 %); the "
        f"nearest phase, known only afterwards, would give {oracle:.2f} dB."
    )
    return "\n\n".join([first, second, note])
