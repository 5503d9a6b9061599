"""What must come out as known, before anything else is believed: the bench tests itself.

Some rows need no sampler: another rendering of the same captions is the ceiling, and what is done to it below makes it
worse in a known way. Of some ways it is known, too, that they differ, and of some which is better. The two-sample rule
(two_sample.py) must tell the pairs of these apart at full size, must not tell one rendering from another, and what is
known to be better must be nearer to the ground truth. A bench that fails this cannot tell, so it ranks nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.markdown import table
from bench.quality import full_size, patch_judge, two_sample
from bench.quality.scores import Measured, Truth
from mrflow_sched.upscaling.lanczos import resize_lanczos

TRUE, CEILING, AGAIN = "ground truth", "ceiling: another rendering", "ceiling: a third rendering"
VAE = "through the VAE"
TOLD, CONTROL = 0.9, 0.6
"""Pairs must be told apart in this share of scenes at least, and one rendering from another in this share at most."""
DRAWS = 5
"""Renderings of every caption: the ground truth, the ceiling, and more for the control."""


def _halved(pictures: Tensor) -> Tensor:
    return functional.interpolate(pictures, scale_factor=0.5, mode="area")


def _lanczos(pictures: Tensor) -> Tensor:
    return resize_lanczos(_halved(pictures), pictures.shape[-1], pictures.shape[-2]).clamp(0, 1)


def _nearest(pictures: Tensor) -> Tensor:
    return functional.interpolate(_halved(pictures), scale_factor=2, mode="nearest")


HALVED = "halved, Lanczos"
WORN: dict[str, Callable[[Tensor], Tensor]] = {
    "blurred by 1 px": lambda pictures: patch_judge.blurred(pictures, 1.0),
    HALVED: _lanczos,
    "halved, nearest": _nearest,
}
"""What makes pictures (N, 3, H, W) worse, without a sampler."""


@dataclass(frozen=True)
class Pair:
    """Two rows known to differ. The self-test needs them told apart (`needed`) and the first nearer to the ground
    truth (`ordered`); what it does not need it only shows."""

    better: str
    worse: str
    needed: bool = True
    ordered: bool = True


SAMPLED = (
    Pair("native 50", "native 4"),
    Pair("staged 12+1", "no refine, 12+0", needed=False, ordered=False),
    Pair("staged 12+1", "no SR network, 12+1", needed=False, ordered=False),
    Pair("staged 12+1", "hires fix, latent, 12+1, denoise 0.12 (sigma 0.31)", needed=False, ordered=False),
)
"""Pairs of ways. Our own upscaler knows this world, so with it a refine step has nothing to mend; and whether it mends
more than the VAE takes is what the bench is there to find out, with any upscaler."""


def pairs(names: Iterable[str]) -> list[Pair]:
    """The known pairs among rows: worn ones, ways, and every "NAME 12+1" with a "NAME 12+0" beside it, with an upscaler
    that does not know this world (`ways.refined_and_not`)."""
    present = list(names)
    refined = {name: name.removesuffix("12+1") + "12+0" for name in present if name.endswith("12+1")}
    foreign = [Pair(better, worse, ordered=False) for better, worse in refined.items() if worse in present]
    every = [*(Pair(TRUE, name) for name in WORN), *SAMPLED, *foreign]
    return [pair for pair in every if {pair.better, pair.worse} <= set(present)]


# ---------------------------------------------------------------------------------------------------- without a sampler


@dataclass(frozen=True)
class Rows:
    """The rows that need no sampler, and the statistics of all renderings for the control."""

    measured: Mapping[str, Measured]
    draws: Sequence[Tensor]

    @classmethod
    def of(cls, truth: Truth, draw: Callable[[int], Tensor], engine: Any) -> Rows:
        """`draw(n)` renders the scenes of `truth` for the n-th time, from 1 on; `engine` has the VAE."""
        other, third = draw(1), draw(2)
        with torch.no_grad():
            through = torch.cat([engine.decode(engine.encode(part)) for part in other.split(8)])
        made = {CEILING: other, AGAIN: third, **{name: worn(other) for name, worn in WORN.items()}, VAE: through}
        measured = {name: truth.measure(pictures) for name, pictures in made.items()}
        further = [full_size.measure((draw(n) * 255).round() / 255) for n in range(3, DRAWS)]
        return cls(measured, [truth.true.full, measured[CEILING].full, measured[AGAIN].full, *further])


# -------------------------------------------------------------------------------------------------------- the self-test


def test(truth: Truth, rows: Rows, ways: Mapping[str, Measured]) -> dict[str, Any]:
    """The bench tested on what is known: "could tell", "why" it could not (""), the pairs, the control and the rows."""
    every = {TRUE: truth.true, **rows.measured, **ways}
    asked = pairs(every)
    untrained = {
        name: patch_judge.read(every[name].pictures, patch_judge.untrained()).features
        for name in dict.fromkeys(name for pair in asked for name in (pair.better, pair.worse))
    }
    found = [_tested(truth, pair, every, untrained) for pair in asked]
    control = [two_sample.told_apart(*both) for both in combinations(rows.draws, 2)]
    result: dict[str, Any] = {
        "scenes": len(truth.scenes),
        "control": sum(control) / len(control),
        "pairs": found,
        "rows": {name: _row(truth, each) for name, each in rows.measured.items()},
    }
    why = _why(result)
    return {"could tell": not why, "why": why, **result}


def with_pairs(result: Mapping[str, Any], more: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What `test` found, with the pairs of another test on the same scenes."""
    found = {**result, "pairs": [*result["pairs"], *more]}
    why = _why(found)
    return {**found, "could tell": not why, "why": why}


def _tested(truth: Truth, pair: Pair, rows: Mapping[str, Measured], untrained: Mapping[str, Tensor]) -> dict[str, Any]:
    """How often the two are told apart, by three kinds of features, and how far each is from the ground truth."""
    better, worse = rows[pair.better], rows[pair.worse]
    apart = {
        "statistics": two_sample.told_apart(better.full, worse.full),
        "patch judge": two_sample.told_apart(better.patches.features, worse.patches.features),
        "untrained network": two_sample.told_apart(untrained[pair.better], untrained[pair.worse]),
    }
    # The ground truth itself is at distance 0: the ceiling stands for it.
    nearer = rows[CEILING] if pair.better == TRUE else better
    distances = [full_size.distance(each.full, truth.true.full) for each in (nearer, worse)]
    return {
        "better": pair.better,
        "worse": pair.worse,
        "needed": pair.needed,
        "ordered": pair.ordered,
        "told apart": apart,
        "distances": distances,
        "in order": distances[0] < distances[1],
    }


def _row(truth: Truth, measured: Measured) -> dict[str, Any]:
    return {
        **truth.parts(measured),
        "distance at full size": full_size.distance(measured.full, truth.true.full),
        "logit": float(measured.patches.logit.mean()),
        "patch distance": patch_judge.distance(measured.patches, truth.true.patches),
    }


def _why(result: Mapping[str, Any]) -> str:
    """Why the bench could not tell, in a sentence; empty where it could."""
    if result["scenes"] < two_sample.LEAST:
        return f"{result['scenes']} scenes are too few: give at least {two_sample.LEAST}."
    if not result["control"] <= CONTROL:
        return f"it tells one rendering of the same captions from another ({result['control']:.2f} of pairs)."
    for pair in result["pairs"]:
        told = pair["told apart"]["statistics"]
        name = f"{pair['worse']} from {pair['better']}"
        if pair["needed"] and not told >= TOLD:
            return f"it does not tell {name} ({told:.2f} of pairs, {TOLD:g} are needed)."
        if pair["ordered"] and not pair["in order"]:
            return f"{pair['worse']} came out nearer to the ground truth than {pair['better']}."
    return ""


def to_markdown(result: Mapping[str, Any]) -> str:
    """Whether the bench could tell, the known pairs, and the rows without a sampler."""
    word = "yes" if result["could tell"] else f"no: {result['why']} So nothing is ranked below."
    kinds = ("statistics", "patch judge", "untrained network")
    lines = [
        [
            pair["better"],
            pair["worse"],
            *(_share(pair["told apart"][kind]) for kind in kinds),
            " / ".join(f"{each:.2f}" for each in pair["distances"]),
            "yes" if pair["needed"] else "",
            "yes" if pair["in order"] else "no" if pair["ordered"] else "open",
        ]
        for pair in result["pairs"]
    ]
    lines.append([TRUE, CEILING, _share(result["control"]), "", "", "", f"at most {CONTROL:g}", ""])
    ceiling = result["rows"][CEILING]["composite"]
    rows = [
        [name, f"{row['composite']:.3f}", f"{row['composite'] / ceiling:.3f}"]
        + [f"{row[part]:.3f}" if part in row else "" for part in ("local structure", "look", "spectrum")]
        + [f"{row['distance at full size']:.2f}", f"{row['logit']:+.2f}", f"{row['patch distance']:.2f}"]
        for name, row in result["rows"].items()
    ]
    head = ["known pair", "", *(f"told apart, {kind}" for kind in kinds), "distances", f"needed, {TOLD:g}"]
    known = table([*head, "first nearer"], lines, "llr")
    parts = ["local structure", "look", "spectrum"]
    columns = ["row", "composite", "over ceiling", *parts, "distance at full size", "logit", "patch distance"]
    return "\n\n".join([f"**Could tell its known pairs apart: {word}**", known, table(columns, rows)])


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"
