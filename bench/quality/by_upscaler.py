"""How much noise and how many refine steps an upscaler needs: the refine stage of 12+N, swept for every upscaler.

Stage 1 is the same for every setting, so it runs once per scene, and every upscaler once on what it made. A setting
costs only its own refine steps, and its images equal those of the whole run bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.markdown import table
from bench.quality import foreign, known, metrics
from bench.quality.scores import Measured, Truth
from bench.quality.ways import FAMILY, NOT_OURS, UPSCALERS, Model
from mrflow_sched import make_native_plan, make_plan
from mrflow_sched.measure.calibrate import calibrate
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import sample_staged
from mrflow_sched.upscaling.fit import upscale_to

LOSS = 0.01
"""The composite that a setting of the flat top may lose to the best one: one percent, as the goals of this bench."""
BATCH = 8
GROUPS = {"networks of others": tuple(foreign.NETWORKS), "our network": ("SR",), "no network": ("Lanczos",)}
"""The kinds of upscaler that a preset may tell apart."""
_SAME = ("scenes", "size", "loss", "resamples")


@dataclass(frozen=True)
class Setting:
    """A refine stage: its steps, the sigma that it starts from, and how. Guidance None is the family's; `tokens` is the
    share of them that is refined."""

    steps: int = 0
    sigma: float = 0.0
    curve: str = "linear"
    guidance: float | None = None
    posterior: str = "mode"
    tokens: float = 1.0

    @property
    def name(self) -> str:
        said = [f"{self.steps} from {self.sigma:g}" if self.steps else "0"]
        said += [self.curve] if self.curve != "linear" else []
        said += [f"guidance {self.guidance:g}"] if self.guidance is not None else []
        said += [f"{self.tokens:.0%} of the tokens"] if self.tokens < 1.0 else []
        return ", ".join([*said, *(["posterior sample"] if self.posterior == "sample" else [])])

    def plan(self, size: int) -> StagedPlan:
        """The family's 12+1 with this refine stage."""
        numbers: dict[str, Any] = {"refine_steps": self.steps}
        if self.steps:
            numbers |= {"sigma": self.sigma, "refine_curve": self.curve, "posterior": self.posterior}
            numbers |= {"refine_guidance": self.guidance, "refine_tokens": self.tokens}
        return make_plan(FAMILY, size, size, "12+1", **numbers)


REFINED = Setting(1, 0.6)
"""12+1 as its preset is."""
_SIGMAS: dict[int, tuple[float, ...]] = {
    1: (0.06, 0.12, 0.2, 0.3, 0.45, 0.6, 0.75, 0.85),
    2: (0.45, 0.6, 0.75),
    4: (0.6, 0.75),
}
GRID = (
    Setting(),
    *(Setting(steps, sigma) for steps, sigmas in _SIGMAS.items() for sigma in sigmas),
    *(Setting(4, sigma, "shifted") for sigma in _SIGMAS[4]),
)
VARIED: tuple[dict[str, Any], ...] = (*({"guidance": scale} for scale in (1.0, 2.0, 5.0)), {"posterior": "sample"})
"""What is changed, one at a time, in the two best settings of every upscaler."""


def name_in_pair(upscaler: str, setting: Setting) -> str | None:
    """What known.py calls the 12+1 and the 12+0 of an upscaler, which it knows to differ; None for all else. Our own
    upscalers know this world, so the bench needs no pair of theirs, and only shows that of SR."""
    if setting not in (Setting(), REFINED):
        return None
    if upscaler == "SR":
        return "staged 12+1" if setting.steps else "no refine, 12+0"
    return f"{upscaler} 12+{setting.steps}" if upscaler in NOT_OURS else None


# ----------------------------------------------------------------------------------------------------------- the images


def low_pictures(model: Model, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """What stage 1 makes, (N, 3, h, w): the same for every setting."""
    plan = Setting().plan(model.size)
    parts = [
        sample_staged(model.engine, plan, prompts[rows], seeds=seeds[rows], until=1).images
        for rows in _batches(prompts)
    ]
    return torch.cat(parts)


def upscaled_by(upscaler: Any, low: Tensor, size: int) -> Tensor:
    """Low pictures as the upscaler brings them to (N, 3, size, size)."""
    return torch.cat([upscale_to(part, size, size, upscaler) for part in low.split(BATCH)])


def refined(model: Model, setting: Setting, prompts: Sequence[str], seeds: Sequence[int], upscaled: Tensor) -> Tensor:
    """The images of a setting from pictures that were upscaled before, (N, 3, size, size).

    They take stage 1's place, and are of the final size already, so that only the refine stage runs.
    """
    plan = setting.plan(model.size)
    parts = [
        sample_staged(model.engine, plan, prompts[rows], seeds=seeds[rows], image=upscaled[rows]).images
        for rows in _batches(prompts)
    ]
    return torch.cat(parts)


def _batches(prompts: Sequence[str]) -> list[slice]:
    return [slice(first, first + BATCH) for first in range(0, len(prompts), BATCH)]


# ----------------------------------------------------------------------------------------------------------- the scores


@dataclass(frozen=True)
class Scored:
    """A setting's composite, the composites of the same setting on resampled scenes, and the parts of the former.

    `cost` is that of the whole run, in forwards at the final size.
    """

    setting: Setting
    cost: float
    composite: float
    drawn: Sequence[float]
    parts: Mapping[str, float] = field(default_factory=dict[str, float])

    def gap(self, other: Scored) -> dict[str, Any]:
        """How much it is above another one, with its interval on the same resampled scenes."""
        gaps = [mine - theirs for mine, theirs in zip(self.drawn, other.drawn, strict=True)]
        return {"difference": self.composite - other.composite, "interval": metrics.interval(gaps)}


def best_of(scored: Sequence[Scored]) -> Scored:
    """The highest composite, the cheaper one where two are equal."""
    return max(scored, key=lambda each: (each.composite, -each.cost))


def flat_top(scored: Sequence[Scored]) -> list[Scored]:
    """The settings that lose less than `LOSS` to the best, with an interval that holds 0; the cheapest first."""
    best = best_of(scored)
    top = [each for each in scored if in_flat_top(each, best)]
    return sorted(top, key=lambda each: (each.cost, -each.composite))


def shared(group: Sequence[Sequence[Scored]], steps: int | None = None) -> tuple[Setting, float]:
    """One setting for several upscalers, of `steps` or of any: the cheapest that lies in the flat top of all of them,
    else the one that loses least where it loses most. Returns it and that loss."""
    losses = {
        own.setting: max(best_of(each).composite - _of(each, own.setting).composite for each in group)
        for own in group[0]
        if steps in (None, own.setting.steps)
    }
    tops = [{each.setting for each in flat_top(scored)} for scored in group]
    common = [setting for setting in losses if all(setting in top for top in tops)]
    least = min(common, key=lambda each: (_of(group[0], each).cost, losses[each]), default=None)
    chosen = min(losses, key=lambda each: losses[each]) if least is None else least
    return chosen, losses[chosen]


def in_flat_top(scored: Scored, best: Scored) -> bool:
    """Whether it loses less than `LOSS` to the best, with an interval that holds 0."""
    gap = scored.gap(best)
    low, high = gap["interval"]
    return low <= 0 <= high and gap["difference"] > -LOSS


def _of(scored: Sequence[Scored], setting: Setting) -> Scored:
    return next(each for each in scored if each.setting == setting)


# ----------------------------------------------------------------------------------------------------- mrflow calibrate


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What `mrflow calibrate` recommends for an upscaler from these prompts: their native images are sampled once.

    It depends on the kinds of image that they name, so they name those of the sweep.
    """

    model: Model
    prompts: Sequence[str]
    native_steps: int | None = None

    def __call__(self, upscaler: Any) -> Setting:
        size = self.model.size
        asked: dict[str, Any] = {"prompts": self.prompts, "width": size, "height": size, "images": self._native}
        found = calibrate(self.model.engine, upscaler, **asked)
        return Setting(found.refine_steps, found.sigma)

    @cached_property
    def _native(self) -> Tensor:
        plan = make_native_plan(FAMILY, self.model.size, self.model.size, steps=self.native_steps)
        parts = [
            sample_staged(self.model.engine, plan, prompt, seeds=[seed]) for seed, prompt in enumerate(self.prompts)
        ]
        return torch.cat([part.images for part in parts])


# ------------------------------------------------------------------------------------------------------------ the sweep


@dataclass(frozen=True)
class Scenes:
    """What is drawn and compared: a prompt and a seed for every scene of `truth`, the resamples of the scenes, and the
    rows without a sampler that the bench tests itself with."""

    truth: Truth
    prompts: Sequence[str]
    seeds: Sequence[int]
    samples: Sequence[Tensor]
    known: known.Rows


def measure(
    model: Model,
    scenes: Scenes,
    *,
    names: Sequence[str] = UPSCALERS,
    grid: Sequence[Setting] = GRID,
    varied: Sequence[Mapping[str, Any]] = VARIED,
    recommended: Callable[[Any], Setting] | None = None,
    tell: Callable[[str], object] = print,
    keep: Callable[[dict[str, Any]], object] = lambda record: None,
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Every setting with every upscaler of `names`: the record. `recommended` tells a setting for an upscaler, which is
    scored like the others. `keep` gets the record as far as it is, after each upscaler. What `earlier`, a record of the
    same scenes, says of other upscalers in the same settings is kept."""
    missing = [name for name in names if name not in model.upscalers]
    here = [name for name in names if name not in missing]
    low = low_pictures(model, scenes.prompts, scenes.seeds) if here else torch.empty(0)
    record: dict[str, Any] = {
        "scenes": len(scenes.prompts),
        "size": model.size,
        "loss": LOSS,
        "resamples": len(scenes.samples),
        "known": {},
        "upscalers": {},
        "groups": {},
        "not installed": dict.fromkeys(missing, foreign.COMMAND),
    }
    if earlier is not None and all(earlier[key] == record[key] for key in _SAME):
        settings = [setting.name for setting in grid]
        others = {name: row for name, row in earlier["upscalers"].items() if name not in here}
        record["upscalers"] = {name: row for name, row in others.items() if list(row["settings"]) == settings}
        record["groups"] = {name: dict(group) for name, group in earlier["groups"].items()}
    kept = {name_in_pair(name, REFINED) for name in record["upscalers"]}
    old = {} if earlier is None else earlier.get("known", {})  # records of before the self-test have none
    more = [pair for pair in old.get("pairs", ()) if pair["better"] in kept]
    sampled: dict[str, Measured] = {}
    record["known"] = known.with_pairs(known.test(scenes.truth, scenes.known, sampled), more)
    grids: dict[str, list[Scored]] = {}
    for name in here:
        upscaled = upscaled_by(model.upscalers[name], low, model.size)

        def score(setting: Setting, upscaled: Tensor = upscaled, name: str = name) -> Scored:
            scored, measured = _score(model, scenes, setting, upscaled)
            if pair := name_in_pair(name, setting):
                sampled[pair] = measured
            tell(f"{name}, {setting.name}: composite {scored.composite:.3f}")
            return scored

        grids[name] = [score(setting) for setting in grid]
        pairs = [(of, score(setting)) for of, setting in _variations(grids[name], varied)]
        record["upscalers"][name] = _row(grids[name], pairs)
        if recommended is not None:
            advised = score(recommended(model.upscalers[name]))
            best = best_of(grids[name])
            told = {"to best": advised.gap(best), "in the flat top": in_flat_top(advised, best)}
            record["upscalers"][name]["calibrated"] = {**_figures(advised), **told}
        record["groups"] |= _groups(grids)
        record["known"] = known.with_pairs(known.test(scenes.truth, scenes.known, sampled), more)
        keep(record)
    return record


def _score(model: Model, scenes: Scenes, setting: Setting, upscaled: Tensor) -> tuple[Scored, Measured]:
    begin = time.perf_counter()
    images = refined(model, setting, scenes.prompts, scenes.seeds, upscaled)
    seconds = (time.perf_counter() - begin) / len(images)
    measured = scenes.truth.measure(images.cpu())
    parts = scenes.truth.parts(measured)
    drawn = [scenes.truth.parts(measured, rows)["composite"] for rows in scenes.samples]
    cost = sum(setting.plan(model.size).stage_costs())
    return Scored(setting, cost, parts["composite"], drawn, {"refine seconds": seconds, **parts}), measured


def _row(scored: Sequence[Scored], varied: Sequence[tuple[Scored, Scored]]) -> dict[str, Any]:
    """An upscaler's settings, the best of them, the flat top, the cheapest of it, the best sigma for every number of
    steps, and what was varied in which setting."""
    best, top = best_of(scored), flat_top(scored)
    counts = sorted({each.setting.steps for each in scored})
    return {
        "settings": {each.setting.name: {**_figures(each), "to best": each.gap(best)} for each in scored},
        "best": best.setting.name,
        "flat top": [each.setting.name for each in top],
        "cheapest": top[0].setting.name,
        "by steps": {
            str(steps): best_of([each for each in scored if each.setting.steps == steps]).setting.name
            for steps in counts
        },
        "varied": [{"setting": of.setting.name, **_figures(each), "to setting": each.gap(of)} for of, each in varied],
    }


def _figures(scored: Scored) -> dict[str, Any]:
    """Everything about a setting but its resamples."""
    own = {"name": scored.setting.name, **asdict(scored.setting), "cost": scored.cost, **scored.parts}
    return {**own, "interval": metrics.interval(scored.drawn)}


def _variations(scored: Sequence[Scored], varied: Sequence[Mapping[str, Any]]) -> list[tuple[Scored, Setting]]:
    """The two best settings that refine, each with every change."""
    refining = sorted((each for each in scored if each.setting.steps), key=lambda each: -each.composite)[:2]
    return [(each, replace(each.setting, **change)) for each in refining for change in varied]


def _groups(grids: Mapping[str, Sequence[Scored]]) -> dict[str, Any]:
    """What a preset should have for every kind of upscaler: in all, and for every number of steps."""
    found: dict[str, Any] = {}
    for group, names in GROUPS.items():
        members = {name: grids[name] for name in names if name in grids}
        if not members:
            continue
        counts = sorted({each.setting.steps for each in next(iter(members.values()))})
        chosen = {"chosen": shared(list(members.values()))}
        chosen |= {str(steps): shared(list(members.values()), steps) for steps in counts}
        found[group] = {
            "upscalers": list(members),
            **{name: {"setting": setting.name, "loss": loss} for name, (setting, loss) in chosen.items()},
        }
    return found


# ----------------------------------------------------------------------------------------------------------- the tables


def to_markdown(record: Mapping[str, Any]) -> str:
    """What the bench knows of itself, and the composite of every setting. If it could tell its known pairs apart: what
    presets should have, a line per upscaler, and what was varied."""
    found: Mapping[str, Any] = record["upscalers"]
    told = record["known"]["could tell"]
    parts = [known.to_markdown(record["known"])]
    if told:
        parts += [_presets(record["groups"]), _each(found, record["not installed"])]
    elif record["not installed"]:
        parts.append(f"Not installed: {', '.join(record['not installed'])}.")
    parts += [_settings(found, told=told), _varied(found) if told else ""]
    return "\n\n".join(part for part in parts if part)


def _presets(groups: Mapping[str, Any]) -> str:
    if not groups:
        return ""
    counts = [name for name in next(iter(groups.values())) if name.isdigit()]
    rows = [
        [
            group,
            ", ".join(row["upscalers"]),
            *(f"{row[key]['setting']} ({row[key]['loss']:.3f})" for key in ("chosen", *counts)),
        ]
        for group, row in groups.items()
    ]
    titles = ["1 step" if count == "1" else f"{count} steps" for count in counts]
    head = ["upscaler", "measured with", "what a preset should have (most that it loses)", *titles]
    return table(head, rows, "l")


def _each(found: Mapping[str, Any], missing: Mapping[str, str]) -> str:
    rows: list[list[str]] = []
    for name, row in found.items():
        best, cheapest = row["settings"][row["best"]], row["settings"][row["cheapest"]]
        low, high = best["interval"]
        own = f"{best['composite']:.3f} ({low:.3f} to {high:.3f})"
        rows.append([name, row["best"], own, _gap(row["cheapest"], cheapest["to best"]), "; ".join(row["flat top"])])
        advised = row.get("calibrated")
        rows[-1].append(_gap(advised["name"], advised["to best"]) if advised else "")
        rows[-1].append("yes" if advised and advised["in the flat top"] else "no" if advised else "")
    rows += [[name, "not installed", f"`{command}`", "", "", "", ""] for name, command in missing.items()]
    head = ["upscaler", "best", "composite (95 %)", "cheapest of the flat top", "flat top"]
    return table([*head, "`mrflow calibrate` says", "in the flat top"], rows, "l")


def _gap(name: str, gap: Mapping[str, Any]) -> str:
    low, high = gap["interval"]
    return f"{name}: {gap['difference']:+.3f} ({low:+.3f} to {high:+.3f})"


def _settings(found: Mapping[str, Any], *, told: bool) -> str:
    """Composites; those of the flat top in bold, if the bench could tell."""
    if not found:
        return ""

    def shown(row: Mapping[str, Any], name: str) -> str:
        value = f"{row['settings'][name]['composite']:.3f}"
        return f"**{value}**" if told and name in row["flat top"] else value

    settings = next(iter(found.values()))["settings"]
    rows = [
        [name, f"{own['cost']:.2f}", *(shown(row, name) for row in found.values())] for name, own in settings.items()
    ]
    return table(["refine steps and sigma", "cost", *found], rows)


def _varied(found: Mapping[str, Any]) -> str:
    rows = [[name, _gap(each["name"], each["to setting"])] for name, row in found.items() for each in row["varied"]]
    return table(["upscaler", "varied: to the setting without it (95 %)"], rows, "l") if rows else ""
