"""`make_plan`: from a family, a size and a preset to all numbers of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.checks import (
    MAX_STEPS,
    Number,
    Posterior,
    SeedRule,
    check_choice,
    check_finite,
    check_solver,
    check_tile,
    check_whole,
    is_number,
)
from mrflow_sched.plan.families import Family, ShiftRule, get_family
from mrflow_sched.plan.notes import plan_notes
from mrflow_sched.plan.schedule import (
    MAX_MU,
    mu_flux2,
    mu_for_tokens,
    sigmas_from_recipe,
)
from mrflow_sched.plan.sizes import handoff_factors, snap_size, stage_sizes, tokens_of
from mrflow_sched.plan.stages import Stage, StagedPlan

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
            raise MrFlowError("native=True plans one stage and takes steps, solver, mu, guidance and seed only.")
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
        raise MrFlowError(f"steps={steps!r} is for native=True; a staged plan takes low_steps and refine_steps.")
    chosen = known.get_preset(preset)
    sizes = stage_sizes(known, width, height, handoff_factors(known, factor, factors, stages))
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
        check_tile(tile, known)
        plan = replace(plan, tile=tile)
        plan = replace(plan, notes=plan_notes(plan, known))
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
    size = snap_size(known, width, height)
    count = known.native_steps if steps is None else steps
    scale = known.guidance if guidance is None else guidance
    stage = _first_stage(known, size, count, tokens_of(known, size), mu, "euler" if solver is None else solver, scale)
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
    return replace(plan, notes=plan_notes(plan, family))


def _first_stage(
    family: Family, size: tuple[int, int], steps: int, shift_tokens: int, mu: float | None, solver: str, guidance: float
) -> Stage:
    check_whole(steps, "low_steps", 1, MAX_STEPS)
    if mu is not None:
        mu = _given_mu(family, mu)
    else:
        mu = _mu_of(family, shift_tokens, steps)
        if mu is not None and mu > MAX_MU:
            raise MrFlowError(
                f"size or shift_tokens must be smaller for {family.title}: {shift_tokens} tokens would shift stage 1 "
                f"by mu = {mu:.1f}, and {MAX_MU:g} is the most; choose more stages or a larger factor, or give mu."
            )
    recipe = _first_recipe(family.shift, steps, mu)
    return make_stage(family, size, mu, recipe, solver, guidance)


def _refine_stage(
    family: Family, size: tuple[int, int], steps: int, start: float, curve: str, solver: str, guidance: float
) -> Stage:
    check_whole(steps, "refine_steps", 0, MAX_STEPS)
    check_choice(curve, "refine_curve", ("linear", "shifted"))
    if not is_number(start) or not 0.0 < start < 1.0:
        raise MrFlowError(f"sigma must lie between 0 and 1, got {start!r}; it is the noise fraction, usually 0.12.")
    recipe = f"{curve} {steps} start={float(start)!r}" if steps else "none"
    return make_stage(family, size, None, recipe, solver, guidance)


def make_stage(
    family: Family, size: tuple[int, int], mu: float | None, recipe: str, solver: str, guidance: float
) -> Stage:
    check_solver(solver)
    check_finite(guidance, "guidance")
    sigmas = sigmas_from_recipe(recipe)
    evaluations = solver_evaluations(solver, max(len(sigmas) - 1, 0))
    return Stage(
        width=size[0],
        height=size[1],
        tokens=tokens_of(family, size),
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
        raise MrFlowError(
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
    check_solver(solver)
    return max(2 * steps - 1, 0) if solver == "heun" else steps


def _per_step(family: Family, guidance: float) -> int:
    """Forwards per model evaluation: two with CFG in force."""
    check_finite(guidance, "guidance")
    if family.guidance_kind == "none" and guidance != 1.0:
        raise MrFlowError(f"guidance must be left out or 1 for {family.name}, which is distilled; got {guidance!r}.")
    if family.guidance_kind == "cfg" and guidance < 1.0:
        raise MrFlowError(f"guidance must be at least 1 for {family.name}, got {guidance!r}; 1 turns CFG off.")
    if guidance < 0.0:
        raise MrFlowError(f"guidance must not be negative, got {guidance!r}; {family.guidance!r} is usual.")
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
        raise MrFlowError(f"mu must be left out for {family.name}, whose schedule has no shift; got {mu!r}.")
    if not is_number(mu):
        raise MrFlowError(f"mu must be a number from {-MAX_MU:g} to {MAX_MU:g}, got {mu!r}; it is log(shift).")
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
        return tokens_of(family, sizes[0])
    if rule == "final":
        return tokens_of(family, sizes[-1])
    if not is_number(rule) or isinstance(rule, (str, float)) or rule < 1:
        raise MrFlowError(f"shift_tokens must be 'low', 'final' or a token count, got {rule!r}.")
    return rule


def _one_each(value: Number | Sequence[Number], count: int, name: str) -> tuple[Number, ...]:
    """One value per later stage, from one value for all or one for each."""
    if not isinstance(value, Sequence):
        return (value,) * count
    if len(value) != count:
        raise MrFlowError(f"{name} must be one number or {count} (one per later stage), got {value!r}.")
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
        raise MrFlowError(f"seconds must be positive, got native {native_seconds!r}, overhead {overhead_seconds!r}.")
    if forward_seconds is None:
        network = native_seconds * sum(plan.stage_costs()) / plan.native_forwards
    else:
        if len(forward_seconds) != len(plan.stages) or not all(value > 0 for value in forward_seconds):
            raise MrFlowError(
                f"forward_seconds must hold {len(plan.stages)} positive numbers (one a stage), got {forward_seconds!r}."
            )
        network = sum(stage.forwards * each for stage, each in zip(plan.stages, forward_seconds, strict=True))
    return native_seconds / (network + overhead_seconds)
