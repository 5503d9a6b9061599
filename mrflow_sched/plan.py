"""All numbers of a run, decided before any tensor exists.

`make_plan` turns a family, a size and a preset into a `StagedPlan`: for every stage its size, sigma list, solver and
guidance, and for the run its seed, its expected cost and notes on what was rounded. Plans are frozen. They survive a
round trip through one short line (`to_string`) and through JSON (`to_json`) exactly; reading one back looks nothing up
that could change a number. Nothing here needs torch.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, TypeVar, cast

from mrflow_sched.families import FAMILIES, Family, ShiftRule, get_family
from mrflow_sched.schedule import MAX_MU, explicit_recipe, mu_flux2, mu_for_tokens, sigmas_from_recipe, validate_sigmas
from mrflow_sched.tiles import tile_sides

__all__ = [
    "SOLVER_NAMES",
    "Stage",
    "StagedPlan",
    "expected_speedup",
    "fit_box",
    "make_native_plan",
    "make_plan",
    "solver_evaluations",
]

SeedRule = Literal["offset", "hash"]
Posterior = Literal["mode", "sample"]
Number = TypeVar("Number", int, float)

SOLVER_NAMES = ("euler", "heun", "multistep", "careful", "dpmpp_2m")
MIN_FACTOR, MAX_FACTOR = 1.25, 4.0
MAX_SIDE = 32768
LEAST_TILE = 64
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
# Start levels outside this range have only been seen to go wrong (spec 5.1): a note says so.
USUAL_SIGMA = (0.02, 0.6)
# Noted where stage 1 has more than this many times the native area: FLUX.1's makers state up to two megapixels; other
# families not measured.
LARGEST_AREA = 2.0
# Rounding to the grid may take this share of a side before a note calls a stage too small.
SIDE_SLACK = 0.95

_FORMAT = "mrflow1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True)
class Stage:
    """One resolution with its own sigma list.

    `width`, `height` in pixels; `tokens` image tokens of the network. `mu` is the logarithm of the shift in `sigmas`,
    None where there is none. `sigmas` = () means that no step is taken and the upscaler's image is kept. `forwards`
    counts network evaluations per image. `guided`: the least and the highest sigma at which guidance is in force;
    outside it is off. `recipe` tells `sigmas` in short (see `schedule.sigmas_from_recipe`); left
    out, or not matching, it is made to spell the values out. Raises ValueError for values that cannot be a stage.
    """

    width: int
    height: int
    tokens: int
    mu: float | None
    sigmas: tuple[float, ...]
    solver: str
    guidance: float
    forwards: int
    recipe: str = ""
    guided: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_side(self.width, "width")
        _check_side(self.height, "height")
        _check_whole(self.tokens, "tokens", 1)
        _check_whole(self.forwards, "forwards", 0)
        _check_solver(self.solver)
        _check_finite(self.guidance, "guidance")
        if self.mu is not None:
            _check_finite(self.mu, "mu")
        object.__setattr__(self, "guided", _checked_interval(self.guided))
        sigmas = validate_sigmas(self.sigmas, "sigmas") if self.sigmas else ()
        object.__setattr__(self, "sigmas", sigmas)
        if not self.recipe or sigmas_from_recipe(self.recipe) != sigmas:
            object.__setattr__(self, "recipe", explicit_recipe(sigmas))

    @property
    def steps(self) -> int:
        """Solver steps: one less than there are sigmas."""
        return max(len(self.sigmas) - 1, 0)

    @property
    def always_guided(self) -> bool:
        """Whether guidance is in force at every level of the list."""
        return all(self.guided[0] <= sigma <= self.guided[1] for sigma in self.sigmas[:-1])

    def guidance_at(self, sigma: float) -> float:
        """The guidance in force at flow sigma `sigma`: the stage's, or 1, which is off."""
        # Levels go through float32 on their way to the network.
        return self.guidance if self.guided[0] - 1e-6 <= sigma <= self.guided[1] + 1e-6 else 1.0

    @property
    def start_sigma(self) -> float:
        """The noise level at which the stage starts; 0.0 for a stage without steps."""
        return self.sigmas[0] if self.sigmas else 0.0


@dataclass(frozen=True, slots=True)
class StagedPlan:
    """A whole run. `stages[0]` runs from pure noise to a clean image; each later one refines the enlarged result.

    `requested_width` and `requested_height` are what was asked for, `width` and `height` what is made.
    `posterior`: take the mode of the VAE encoder's distribution or a sample of it. `native_steps` and `native_forwards`
    describe plain sampling at the final size, to which costs are compared. One forward on n tokens, text included,
    costs n (1 + `attention` n) in units that cancel. `tile`: side in pixels of the tiles that the network sees in later
    stages larger than that, 0 for whole pictures. `notes` are sentences for the user; they are no part of equality.
    """

    family: str
    preset: str
    requested_width: int
    requested_height: int
    stages: tuple[Stage, ...]
    seed: int = 0
    seed_rule: SeedRule = "offset"
    posterior: Posterior = "mode"
    native_steps: int = 50
    native_forwards: int = 50
    text_tokens: int = 0
    attention: float = 0.0
    tile: int = 0
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name in ("family", "preset"):
            if not _NAME.fullmatch(getattr(self, name)):
                raise ValueError(f"{name} must be a plain name such as 'flux1-dev', got {getattr(self, name)!r}.")
        _check_side(self.requested_width, "requested_width")
        _check_side(self.requested_height, "requested_height")
        _check_stages(self.stages)
        _check_whole(self.seed, "seed", 0, MAX_SEED)
        _check_choice(self.seed_rule, "seed_rule", ("offset", "hash"))
        _check_choice(self.posterior, "posterior", ("mode", "sample"))
        _check_whole(self.native_steps, "native_steps", 1)
        _check_whole(self.native_forwards, "native_forwards", 1)
        _check_whole(self.text_tokens, "text_tokens", 0)
        _check_finite(self.attention, "attention")
        if self.attention < 0:
            raise ValueError(f"attention must not be negative, got {self.attention!r}.")
        _check_tile(self.tile)

    @property
    def width(self) -> int:
        """Width in pixels of the image as it is made."""
        return self.stages[-1].width

    @property
    def height(self) -> int:
        """Height in pixels of the image as it is made."""
        return self.stages[-1].height

    @property
    def forwards(self) -> int:
        """Network evaluations per image over all stages."""
        return sum(stage.forwards for stage in self.stages)

    @property
    def cost_ratio(self) -> float:
        """Expected cost of native sampling over that of this plan, counting the network only."""
        return self.native_forwards / sum(self.stage_costs())

    def stage_costs(self) -> tuple[float, ...]:
        """Network cost of each stage in native forwards, that is, in evaluations at the final size."""
        final = self._forward_weight(self.stages[-1].tokens)
        weights = (sum(map(self._forward_weight, self.tile_tokens(index))) for index in range(len(self.stages)))
        return tuple(stage.forwards * (weight / final) for stage, weight in zip(self.stages, weights, strict=True))

    def tiled(self, index: int) -> bool:
        """Whether the network sees stage `index` (0 is the first, which is always whole) in tiles."""
        return index > 0 and 0 < self.tile < max(self.stages[index].width, self.stages[index].height)

    def tile_tokens(self, index: int) -> tuple[int, ...]:
        """Image tokens of each forward that one evaluation of stage `index` takes: one, or one for every tile."""
        stage = self.stages[index]
        if not self.tiled(index):
            return (stage.tokens,)
        grid = round(math.sqrt(stage.width * stage.height / stage.tokens))
        return tuple(wide * high // grid**2 for wide, high in tile_sides(stage.width, stage.height, self.tile, grid))

    def _forward_weight(self, tokens: int) -> float:
        total = tokens + self.text_tokens
        return total * (1.0 + self.attention * total)

    def to_string(self) -> str:
        """The plan in one short line without commas, colons or quotes, for image metadata; `notes` are left out."""
        parts = [
            _FORMAT,
            self.family,
            self.preset,
            f"{self.requested_width}x{self.requested_height}",
            f"seed {self.seed} {self.seed_rule}",
            f"{self.posterior} tile {self.tile}" if self.tile else self.posterior,
            f"native {self.native_steps} {self.native_forwards}",
            f"cost {self.text_tokens} {self.attention!r}",
            *(_stage_to_string(stage) for stage in self.stages),
        ]
        text = ";".join(parts)
        return f"{text};#{_checksum(text, self.stages)}"

    @classmethod
    def from_string(cls, text: str) -> StagedPlan:
        """The plan that `to_string` wrote. Raises ValueError for other text, or if its checksum does not fit."""
        body, mark, checksum = text.strip().partition(";#")
        try:
            version, family, preset, size, seed, posterior, native, cost, *stages = body.split(";")
            if version != _FORMAT:
                raise ValueError(f"it begins with {version!r}, not {_FORMAT!r}")
            width, height = _parse_size(size)
            seed_value, seed_rule = _words(seed, "seed", 2)
            native_steps, native_forwards = _words(native, "native", 2)
            text_tokens, attention = _words(cost, "cost", 2)
            posterior, _, tile = posterior.partition(" tile ")
            plan = cls(
                family=family,
                preset=preset,
                requested_width=width,
                requested_height=height,
                stages=tuple(_stage_from_string(stage) for stage in stages),
                seed=int(seed_value),
                seed_rule=cast(SeedRule, seed_rule),
                posterior=cast(Posterior, posterior),
                native_steps=int(native_steps),
                native_forwards=int(native_forwards),
                text_tokens=int(text_tokens),
                attention=float(attention),
                tile=int(tile or 0),
            )
        except ValueError as error:
            raise ValueError(f"plan string {_shorten(text)!r} cannot be read: {error}") from error
        if mark and checksum != _checksum(body, plan.stages):
            raise ValueError(
                f"plan string {_shorten(text)!r} was edited or written by a version with other schedules; "
                "delete its end from ';#' on to use it all the same."
            )
        return replace(plan, notes=_notes(plan))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain lists, numbers and strings, with the keys of `mrflow plan --json` and all that is needed to
        read it back."""
        return {
            "family": self.family,
            "preset": self.preset,
            "cost_ratio": self.cost_ratio,
            "plan": self.to_string(),
            "stages": [_stage_to_dict(stage) for stage in self.stages],
            "requested": {"width": self.requested_width, "height": self.requested_height},
            "forwards": self.forwards,
            **{name: getattr(self, name) for name in _PLAN_NUMBERS},
            "tile": self.tile,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> StagedPlan:
        """The plan that `to_json` wrote, from its numbers, not its `plan` line. Raises ValueError for other text."""
        try:
            data = cast("Mapping[str, Any]", json.loads(text))
            return cls(
                family=data["family"],
                preset=data["preset"],
                requested_width=data["requested"]["width"],
                requested_height=data["requested"]["height"],
                stages=tuple(_stage_from_dict(stage) for stage in data["stages"]),
                **{name: data[name] for name in _PLAN_NUMBERS},
                tile=data.get("tile", 0),
                notes=tuple(str(note) for note in data["notes"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"plan JSON {_shorten(text)!r} cannot be read: {error!r}.") from error


_PLAN_NUMBERS = ("seed", "seed_rule", "posterior", "native_steps", "native_forwards", "text_tokens", "attention")


# ------------------------------------------------------------------------------------------------------------- making


def make_plan(
    family: str | Family,
    width: int,
    height: int,
    preset: str | None = None,
    *,
    factor: float | None = None,
    factors: Sequence[float] | None = None,
    low_steps: int | None = None,
    refine_steps: int | Sequence[int] | None = None,
    sigma: float | Sequence[float] | None = None,
    solver: str | None = None,
    refine_curve: str = "linear",
    shift_tokens: Literal["low", "final"] | int = "low",
    mu: float | None = None,
    guidance: float | None = None,
    refine_guidance: float | None = None,
    seed: int = 0,
    seed_rule: SeedRule = "offset",
    posterior: Posterior = "mode",
    tile: int = 0,
    guidance_interval: tuple[float, float] | None = None,
    stages: int | None = None,
    native: bool = False,
    steps: int | None = None,
) -> StagedPlan:
    """Decide all numbers of a staged run of `family` at `width` x `height` pixels.

    Start from a `preset` ("12+1", "fast", "best"; None: the family's default) and override what you like.
    `factor` (1.25 to 4) is the size step between stages and `stages` their count: 2048 px with factor 2 and 3 stages
    runs at 512, 1024 and 2048. `factors` gives each step its own factor instead. `low_steps` are the steps of stage 1;
    `refine_steps` (0: keep the upscaler's image) and `sigma` (the noise fraction a refine stage starts at, between 0
    and 1) take one value, or one per later stage. `solver`: one of SOLVER_NAMES. `refine_curve`: "linear" or
    "shifted". `shift_tokens`: the token count that sets mu of stage 1 ("low": its own, as diffusers does; "final"; or
    a number); `mu` sets it outright. `guidance`, `refine_guidance`: scales of stage 1 and of later stages; 1 turns CFG
    off and halves the cost. `guidance_interval`: the least and the highest sigma at which the CFG of stage 1 is in
    force; outside it a step costs one forward in place of two (Kynkaanniemi et al. 2024). `tile` lets the network see
    later stages in tiles of that many pixels a side, where they are larger: less work and memory at sizes far above the
    model's own. `native=True` with `steps` plans plain sampling at the final size (`make_native_plan`).
    Sizes are rounded to the family's grid; `notes` of the plan say what was rounded. Raises ValueError, one sentence,
    for anything out of range.
    """
    known = family if isinstance(family, Family) else get_family(family)
    if native:
        given = (
            preset,
            factor,
            factors,
            low_steps,
            refine_steps,
            sigma,
            refine_guidance,
            stages,
            tile or None,
            guidance_interval,
        )
        shaped = refine_curve != "linear" or shift_tokens != "low"
        if shaped or any(value is not None for value in given):
            raise ValueError("native=True plans one stage and takes steps, solver, mu, guidance and seed only.")
        return make_native_plan(
            known,
            width,
            height,
            steps=steps,
            solver=solver,
            mu=mu,
            guidance=guidance,
            seed=seed,
            seed_rule=seed_rule,
            posterior=posterior,
        )
    if steps is not None:
        raise ValueError(f"steps={steps!r} is for native=True; a staged plan takes low_steps and refine_steps.")
    chosen = known.get_preset(preset)
    sizes = _stage_sizes(known, width, height, _handoff_factors(known, factor, factors, stages))
    later = len(sizes) - 1
    low = chosen.low_steps if low_steps is None else low_steps
    refine = _one_each(chosen.refine_steps if refine_steps is None else refine_steps, later, "refine_steps")
    starts = _one_each(chosen.sigma if sigma is None else sigma, later, "sigma")
    low_guidance = known.guidance if guidance is None else guidance
    high_guidance = low_guidance if refine_guidance is None else refine_guidance
    solver = known.solver if solver is None else solver
    tokens = _shift_tokens(known, shift_tokens, sizes)
    first = _first_stage(known, sizes[0], low, tokens, mu, solver, low_guidance)
    made = [first if guidance_interval is None else _guided_within(first, known, guidance_interval)]
    for size, count, start in zip(sizes[1:], refine, starts, strict=True):
        made.append(_refine_stage(known, size, count, start, refine_curve, solver, high_guidance))
    name = chosen.name if low_steps is None and refine_steps is None else "+".join(map(str, (low, *refine)))
    plan = _assemble(known, name, width, height, made, low_guidance, None, seed, seed_rule, posterior)
    if tile:
        _check_tile(tile, known)
        plan = replace(plan, tile=tile)
        plan = replace(plan, notes=_notes(plan, known))
    return plan


def make_native_plan(
    family: str | Family,
    width: int,
    height: int,
    *,
    steps: int | None = None,
    solver: str | None = None,
    mu: float | None = None,
    guidance: float | None = None,
    seed: int = 0,
    seed_rule: SeedRule = "offset",
    posterior: Posterior = "mode",
) -> StagedPlan:
    """Plain sampling at the final size as a plan of one stage, named "native": what a staged run is compared with.

    `steps` defaults to the family's native count, `solver` to Euler, which is what native pipelines run. Other
    arguments and errors as in `make_plan`.
    """
    known = family if isinstance(family, Family) else get_family(family)
    size = _snap_size(known, width, height)
    count = known.native_steps if steps is None else steps
    scale = known.guidance if guidance is None else guidance
    stage = _first_stage(known, size, count, _tokens(known, size), mu, "euler" if solver is None else solver, scale)
    return _assemble(known, "native", width, height, [stage], scale, stage, seed, seed_rule, posterior)


def _assemble(
    family: Family,
    preset: str,
    width: int,
    height: int,
    stages: Sequence[Stage],
    guidance: float,
    native: Stage | None,
    seed: int,
    seed_rule: SeedRule,
    posterior: Posterior,
) -> StagedPlan:
    """The plan around its stages; `native` is the stage to compare with, by default Euler at the native step count."""
    native_steps = native.steps if native else family.native_steps
    native_forwards = native.forwards if native else native_steps * _per_step(family, guidance)
    plan = StagedPlan(
        family=family.name,
        preset=preset,
        requested_width=width,
        requested_height=height,
        stages=tuple(stages),
        seed=seed,
        seed_rule=seed_rule,
        posterior=posterior,
        native_steps=native_steps,
        native_forwards=native_forwards,
        text_tokens=family.text_tokens,
        # Six digits say all that is known of a cost and keep the plan's line short.
        attention=float(f"{family.attention_cost / family.linear_cost:.6g}"),
    )
    return replace(plan, notes=_notes(plan, family))


def _first_stage(
    family: Family, size: tuple[int, int], steps: int, shift_tokens: int, mu: float | None, solver: str, guidance: float
) -> Stage:
    _check_whole(steps, "low_steps", 1, MAX_STEPS)
    if mu is not None:
        mu = _given_mu(family, mu)
    else:
        mu = _mu_of(family, shift_tokens, steps)
        if mu is not None and mu > MAX_MU:
            raise ValueError(
                f"size or shift_tokens must be smaller for {family.title}: {shift_tokens} tokens would shift stage 1 "
                f"by mu = {mu:.1f}, and {MAX_MU:g} is the most; choose more stages or a larger factor, or give mu."
            )
    recipe = _first_recipe(family.shift, steps, mu)
    return _stage(family, size, mu, recipe, solver, guidance)


def _refine_stage(
    family: Family, size: tuple[int, int], steps: int, start: float, curve: str, solver: str, guidance: float
) -> Stage:
    _check_whole(steps, "refine_steps", 0, MAX_STEPS)
    _check_choice(curve, "refine_curve", ("linear", "shifted"))
    if not _is_number(start) or not 0.0 < start < 1.0:
        raise ValueError(f"sigma must lie between 0 and 1, got {start!r}; it is the noise fraction, usually 0.12.")
    recipe = f"{curve} {steps} start={float(start)!r}" if steps else "none"
    return _stage(family, size, None, recipe, solver, guidance)


def _stage(family: Family, size: tuple[int, int], mu: float | None, recipe: str, solver: str, guidance: float) -> Stage:
    _check_solver(solver)
    _check_finite(guidance, "guidance")
    sigmas = sigmas_from_recipe(recipe)
    evaluations = solver_evaluations(solver, max(len(sigmas) - 1, 0))
    return Stage(
        width=size[0],
        height=size[1],
        tokens=_tokens(family, size),
        mu=mu,
        sigmas=sigmas,
        solver=solver,
        guidance=float(guidance),
        forwards=evaluations * _per_step(family, guidance),
        recipe=recipe,
    )


def _guided_within(stage: Stage, family: Family, interval: tuple[float, float]) -> Stage:
    """`stage` with CFG between two levels only. Raises ValueError where that would save nothing."""
    if family.guidance_kind != "cfg" or stage.guidance == 1.0:
        raise ValueError(
            f"guidance_interval={interval!r} is for CFG, which takes a second forward; this run of {family.name} has "
            "none: leave it out."
        )
    limited = replace(stage, guided=interval)
    forwards = sum(1 if limited.guidance_at(sigma) == 1.0 else 2 for sigma in _evaluated(stage))
    return replace(limited, forwards=forwards)


def _evaluated(stage: Stage) -> list[float]:
    """The levels at which the stage's solver evaluates the network, in order."""
    if stage.solver != "heun":
        return list(stage.sigmas[:-1])
    return [sigma for pair in pairwise(stage.sigmas) for sigma in pair if sigma > 0]


def solver_evaluations(solver: str, steps: int) -> int:
    """How often `solver` evaluates the model over `steps` steps that end at sigma 0.

    Once per step; Heun twice, except in its last step. Raises ValueError for an unknown solver.
    """
    _check_solver(solver)
    return max(2 * steps - 1, 0) if solver == "heun" else steps


def _per_step(family: Family, guidance: float) -> int:
    """Forwards per model evaluation: two with CFG in force."""
    _check_finite(guidance, "guidance")
    if family.guidance_kind == "none" and guidance != 1.0:
        raise ValueError(f"guidance must be left out or 1 for {family.name}, which is distilled; got {guidance!r}.")
    if family.guidance_kind == "cfg" and guidance < 1.0:
        raise ValueError(f"guidance must be at least 1 for {family.name}, got {guidance!r}; 1 turns CFG off.")
    if guidance < 0.0:
        raise ValueError(f"guidance must not be negative, got {guidance!r}; {family.guidance!r} is usual.")
    return 2 if family.guidance_kind == "cfg" and guidance != 1.0 else 1


# ------------------------------------------------------------------------------------------------------------- shift


def _mu_of(family: Family, tokens: int, steps: int) -> float | None:
    rule = family.shift
    if rule.kind == "scaled-linear":
        return None
    if rule.kind == "flux2":
        return mu_flux2(tokens, steps)
    if rule.kind == "exponential":
        return mu_for_tokens(
            tokens,
            base_tokens=rule.base_tokens,
            max_tokens=rule.max_tokens,
            base_shift=rule.base_shift,
            max_shift=rule.max_shift,
        )
    return math.log(rule.shift) if rule.kind in ("static", "beta") else 0.0


def _given_mu(family: Family, mu: float) -> float:
    if family.shift.kind == "scaled-linear":
        raise ValueError(f"mu must be left out for {family.name}, whose schedule has no shift; got {mu!r}.")
    if not _is_number(mu):
        raise ValueError(f"mu must be a number from {-MAX_MU:g} to {MAX_MU:g}, got {mu!r}; it is log(shift).")
    return float(mu)


def _first_recipe(rule: ShiftRule, steps: int, mu: float | None) -> str:
    if rule.kind == "scaled-linear":
        return f"scaled-linear {steps}"
    words = ["beta" if rule.kind == "beta" else "native", str(steps), f"mu={mu!r}"]
    if rule.terminal is not None:
        words.append(f"terminal={rule.terminal!r}")
    if rule.sigma_min is not None:
        words.append(f"min={rule.sigma_min!r}")
    return " ".join(words)


def _shift_tokens(family: Family, rule: Literal["low", "final"] | int, sizes: Sequence[tuple[int, int]]) -> int:
    if rule == "low":
        return _tokens(family, sizes[0])
    if rule == "final":
        return _tokens(family, sizes[-1])
    if not _is_number(rule) or isinstance(rule, (str, float)) or rule < 1:
        raise ValueError(f"shift_tokens must be 'low', 'final' or a token count, got {rule!r}.")
    return rule


# ------------------------------------------------------------------------------------------------------------- sizes


def fit_box(src_w: int, src_h: int, dst_w: int, dst_h: int) -> tuple[int, int, int, int]:
    """How to fill a box of `dst_w` x `dst_h` pixels with an image of `src_w` x `src_h` without stretching it.

    Returns (resize_w, resize_h, left, top): scale the image to resize_w x resize_h, which covers the box and keeps the
    image's shape to half a pixel, then cut the box out at (left, top), centred. Raises ValueError for sides below 1.
    """
    for name, side in (("src_w", src_w), ("src_h", src_h), ("dst_w", dst_w), ("dst_h", dst_h)):
        _check_whole(side, name, 1)
    if dst_w * src_h >= dst_h * src_w:
        width, height = dst_w, (2 * src_h * dst_w + src_w) // (2 * src_w)
    else:
        width, height = (2 * src_w * dst_h + src_h) // (2 * src_h), dst_h
    return width, height, (width - dst_w) // 2, (height - dst_h) // 2


def _snap(side: float, grid: int) -> int:
    """The nearest multiple of `grid`, halves upwards, at least one grid."""
    return max(math.floor(side / grid + 0.5), 1) * grid


def _snap_size(family: Family, width: int, height: int) -> tuple[int, int]:
    _check_side(width, "width")
    _check_side(height, "height")
    return _snap(width, family.grid), _snap(height, family.grid)


def _tokens(family: Family, size: tuple[int, int]) -> int:
    return (size[0] // family.grid) * (size[1] // family.grid)


def _stage_sizes(family: Family, width: int, height: int, factors: Sequence[float]) -> list[tuple[int, int]]:
    """Sizes from first to last. Each is the final size over the product of the factors after it, to the grid."""
    final = _snap_size(family, width, height)
    sizes = [final]
    for index in range(len(factors) - 1, -1, -1):
        over = math.prod(factors[index:])
        sizes.insert(0, (_snap(final[0] / over, family.grid), _snap(final[1] / over, family.grid)))
    return sizes


def _handoff_factors(
    family: Family, factor: float | None, factors: Sequence[float] | None, stages: int | None
) -> tuple[float, ...]:
    """One size factor per handoff, from the three ways to ask for them."""
    if factors is not None:
        if factor is not None or (stages is not None and stages != len(factors) + 1):
            raise ValueError(f"factors={tuple(factors)!r} gives all size steps; leave factor and stages out beside it.")
        if not factors:
            raise ValueError("factors must hold at least one size step, got none; for one stage use native=True.")
        chosen = tuple(factors)
    else:
        count = 2 if stages is None else stages
        _check_whole(count, "stages", 2, 8, "for one stage use native=True")
        chosen = (family.factor if factor is None else factor,) * (count - 1)
    for value in chosen:
        if not _is_number(value) or not MIN_FACTOR <= value <= MAX_FACTOR:
            raise ValueError(
                f"factor must lie between {MIN_FACTOR} and {MAX_FACTOR:g}, got {value!r}; "
                "for a larger step use more stages."
            )
    return chosen


def _one_each(value: Number | Sequence[Number], count: int, name: str) -> tuple[Number, ...]:
    """One value per later stage, from one value for all or one for each."""
    if not isinstance(value, Sequence):
        return (value,) * count
    if len(value) != count:
        raise ValueError(f"{name} must be one number or {count} (one per later stage), got {value!r}.")
    return tuple(value)


# ------------------------------------------------------------------------------------------------------------- cost


def expected_speedup(
    plan: StagedPlan,
    *,
    native_seconds: float,
    overhead_seconds: float = 0.0,
    forward_seconds: Sequence[float] | None = None,
) -> float:
    """Expected wall-clock speedup: `native_seconds` over (sum of forwards x seconds per forward + overhead).

    `native_seconds` is the measured time of native sampling; `overhead_seconds` what a staged run spends outside the
    network (text, decoders, upscaler, encoder). `forward_seconds` is the measured time of one forward in each stage;
    without it each stage is scaled from the native time by FLOP, which is optimistic for small stages on a GPU that
    they do not fill. Source: the cost model of spec 2.3. Raises ValueError unless times are positive and there is one
    per stage.
    """
    if not native_seconds > 0 or not overhead_seconds >= 0:
        raise ValueError(f"seconds must be positive, got native {native_seconds!r}, overhead {overhead_seconds!r}.")
    if forward_seconds is None:
        network = native_seconds * sum(plan.stage_costs()) / plan.native_forwards
    else:
        if len(forward_seconds) != len(plan.stages) or not all(value > 0 for value in forward_seconds):
            raise ValueError(
                f"forward_seconds must hold {len(plan.stages)} positive numbers (one a stage), got {forward_seconds!r}."
            )
        network = sum(stage.forwards * each for stage, each in zip(plan.stages, forward_seconds, strict=True))
    return native_seconds / (network + overhead_seconds)


# ------------------------------------------------------------------------------------------------------------- notes


def _notes(plan: StagedPlan, family: Family | None = None) -> tuple[str, ...]:
    """What a user should know about a plan: what was rounded or cropped, and where it leaves tested ground."""
    known = FAMILIES.get(plan.family) if family is None else family
    notes = [*_size_notes(plan), *_refine_notes(plan)]
    first = plan.stages[0]
    if known is not None and first.width * first.height > LARGEST_AREA * math.prod(known.native_size):
        native = "x".join(map(str, known.native_size))
        notes.append(
            f"Stage 1 at {first.width}x{first.height} is more than {LARGEST_AREA:g} times the area of the {native} "
            f"that {known.title} is made for; expect repeated content, "
            "or choose a smaller size, a larger factor or more stages."
        )
    if known is not None and len(plan.stages) > 1:
        if math.sqrt(first.width * first.height) < SIDE_SLACK * known.min_low_side:
            notes.append(
                f"Stage 1 at {first.width}x{first.height} is smaller than the {known.min_low_side} px square "
                f"below which {known.title} is out of its range; expect weaker composition, "
                "or choose a larger size or a smaller factor."
            )
        if known.prediction != "flow":
            notes.append(
                f"{known.title} is no flow model: noise levels are converted at equal signal-to-noise ratio, which the "
                "method's authors have not tested."
            )
    if len(plan.stages) > 1 and plan.cost_ratio < 1.0:
        notes.append(f"This plan costs {1 / plan.cost_ratio:.2f} times as much as {plan.native_steps} native steps.")
    return tuple(notes)


def _size_notes(plan: StagedPlan) -> list[str]:
    notes: list[str] = []
    if (plan.width, plan.height) != (plan.requested_width, plan.requested_height):
        notes.append(
            f"The requested {plan.requested_width}x{plan.requested_height} is made at {plan.width}x{plan.height}, "
            "the nearest size on the model's grid."
        )
    for number, (small, large) in enumerate(pairwise(plan.stages), start=2):
        width, height, _, _ = fit_box(small.width, small.height, large.width, large.height)
        scale = max(large.width / small.width, large.height / small.height)
        if not MIN_FACTOR <= scale <= MAX_FACTOR:
            notes.append(
                f"Rounding to the grid makes stage {number} enlarge by {scale:.2f}; so small a size gains nothing."
            )
        if (width, height) != (large.width, large.height):
            share = 1.0 - large.width * large.height / (width * height)
            notes.append(
                f"Stage {number - 1} at {small.width}x{small.height} is not shaped like {large.width}x{large.height}"
                f": it is enlarged to {width}x{height} and cropped at the centre, losing {share:.1%} of the picture."
            )
    return notes


def _refine_notes(plan: StagedPlan) -> list[str]:
    notes: list[str] = []
    for number, stage in enumerate(plan.stages[1:], start=2):
        if not stage.sigmas:
            notes.append(f"Stage {number} takes no step: the upscaler's image is kept as it is.")
        elif not USUAL_SIGMA[0] <= stage.start_sigma <= USUAL_SIGMA[1]:
            notes.append(
                f"Stage {number} starts at sigma {stage.start_sigma:g}, outside the usual {USUAL_SIGMA[0]} to "
                f"{USUAL_SIGMA[1]}: below, nothing is refined; above, the picture is made anew."
            )
        if stage.steps > 1:
            notes.append(f"Stage {number} takes {stage.steps} refine steps; published results gain little beyond one.")
    return notes


# ------------------------------------------------------------------------------------------------------------- text


def _stage_to_string(stage: Stage) -> str:
    head = f"{stage.width}x{stage.height} {stage.tokens}t {stage.solver} g{_guidance(stage)} f{stage.forwards}"
    # A list recipe carries no mu; where the stage has one it is written in front.
    mu = "" if stage.mu is None or f"mu={stage.mu!r}" in stage.recipe.split(" ") else f" @mu={stage.mu!r}"
    return f"{head}{mu} {stage.recipe}"


def _guidance(stage: Stage) -> str:
    low, high = stage.guided
    return repr(stage.guidance) if (low, high) == (0.0, 1.0) else f"{stage.guidance!r}@{low!r}-{high!r}"


def _stage_from_string(text: str) -> Stage:
    size, tokens, solver, guidance, forwards, *rest = text.split(" ")
    if not rest or not (tokens.endswith("t") and guidance.startswith("g") and forwards.startswith("f")):
        raise ValueError(f"stage {text!r} is not written as '512x512 1024t euler g3.5 f12 recipe'")
    width, height = _parse_size(size)
    mu = next((word.partition("mu=")[2] for word in rest if word.startswith(("mu=", "@mu="))), None)
    recipe = " ".join(word for word in rest if not word.startswith("@"))
    scale, _, interval = guidance[1:].partition("@")
    low, _, high = interval.partition("-")
    return Stage(
        width=width,
        height=height,
        tokens=int(tokens[:-1]),
        mu=None if mu is None else float(mu),
        sigmas=sigmas_from_recipe(recipe),
        solver=solver,
        guidance=float(scale),
        forwards=int(forwards[1:]),
        recipe=recipe,
        guided=(float(low), float(high)) if interval else (0.0, 1.0),
    )


def _stage_to_dict(stage: Stage) -> dict[str, Any]:
    return {
        "width": stage.width,
        "height": stage.height,
        "tokens": stage.tokens,
        "mu": stage.mu,
        "sigmas": list(stage.sigmas),
        "forwards": stage.forwards,
        "solver": stage.solver,
        "guidance": stage.guidance,
        "recipe": stage.recipe,
        "guided": list(stage.guided),
    }


def _stage_from_dict(data: Mapping[str, Any]) -> Stage:
    names = ("width", "height", "tokens", "mu", "solver", "guidance", "forwards", "recipe")
    low, high = data.get("guided", (0.0, 1.0))
    return Stage(sigmas=tuple(data["sigmas"]), guided=(low, high), **{name: data[name] for name in names})


def _checksum(text: str, stages: Sequence[Stage]) -> str:
    """Eight hex digits over the line and the lists it stands for, at a precision no math library disagrees on."""
    lists = ";".join(" ".join(f"{sigma:.6f}" for sigma in stage.sigmas) for stage in stages)
    return f"{zlib.crc32(f'{text};{lists}'.encode()):08x}"


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 1024x1024")
    return int(match[1]), int(match[2])


def _words(text: str, label: str, count: int) -> list[str]:
    first, *words = text.split(" ")
    if first != label or len(words) != count:
        raise ValueError(f"{text!r} should be '{label}' and {count} values")
    return words


def _shorten(text: object) -> str:
    shown = str(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


# ------------------------------------------------------------------------------------------------------------- checks


def _check_whole(value: object, name: str, low: int, high: int | None = None, advice: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number {span}, got {value!r}{f'; {advice}' if advice else ''}.")


def _check_side(value: object, name: str) -> None:
    _check_whole(value, name, 1, MAX_SIDE, "it is a side of the image in pixels")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if not (_is_number(low) and _is_number(high) and 0.0 <= low < high <= 1.0):
        raise ValueError(f"guidance_interval must be two levels, 0 <= low < high <= 1, got {interval!r}.")
    return float(low), float(high)


def _check_tile(tile: int, family: Family | None = None) -> None:
    """A tile is a side in pixels, or 0; with a `family`, one that its network can see something in."""
    _check_whole(tile, "tile", 0, MAX_SIDE)
    least = LEAST_TILE if family is None else max(LEAST_TILE, round(family.min_low_side / 2))
    if 0 < tile < least:
        raise ValueError(f"tile must be 0 (none) or {least} pixels and more a side, got {tile!r}.")


def _check_finite(value: object, name: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")


def _check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}.")


def _check_solver(solver: str) -> None:
    if solver not in SOLVER_NAMES:
        raise ValueError(f"solver must be one of {', '.join(SOLVER_NAMES)}, got {solver!r}.")


def _check_stages(stages: Sequence[Stage]) -> None:
    if not stages:
        raise ValueError("stages must hold at least one stage, got none.")
    if not stages[0].sigmas or stages[0].sigmas[0] != 1.0:
        raise ValueError(f"stage 1 must start at sigma 1.0, got {stages[0].start_sigma!r}; later stages start lower.")
    for number, stage in enumerate(stages[1:], start=2):
        if stage.sigmas and stage.sigmas[0] >= 1.0:
            raise ValueError(f"stage {number} must start below sigma 1.0, got {stage.start_sigma!r}.")
