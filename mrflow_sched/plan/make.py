"""`make_plan`: from a family, a size and a preset to all numbers of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.plan.checks import (
    MAX_STAGES,
    MAX_STEPS,
    Number,
    checked_side,
    checked_tile,
    checked_whole,
    listed,
)
from mrflow_sched.plan.families import Family, ShiftRule, get_family
from mrflow_sched.plan.families.base import steps_in
from mrflow_sched.plan.notes import chosen_note, plan_notes
from mrflow_sched.plan.options import OPTIONS, MadeOptions, NativeOptions, PlanOptions, check_options
from mrflow_sched.plan.recipes import explicit_recipe, recipe_of_betas, recipe_of_steps, sigmas_from_recipe
from mrflow_sched.plan.refining import for_upscaler
from mrflow_sched.plan.schedule import (
    MAX_MU,
    Sigmas,
    mu_flux2,
    mu_for_tokens,
    validate_sigmas,
)
from mrflow_sched.plan.sizes import chosen_sizes, covering_size, handoff_factors, stage_sizes, tokens_of
from mrflow_sched.plan.solver_table import evaluated_sigmas, solver_evaluations
from mrflow_sched.plan.stages import Stage, StagedPlan
from mrflow_sched.plan.token_shares import JIT

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mrflow_sched.plan.token_shares import JitMethod

_T = TypeVar("_T")
_UNSHIFTED = ("scaled-linear", "zero-snr", "betas", "edm", "trigflow")

# ------------------------------------------------------------------------------------------------------------- making


def make_plan(
    family: str | Family, width: int, height: int, preset: str | None = None, **options: Unpack[MadeOptions]
) -> StagedPlan:
    """Decide all numbers of a staged run.

    Args:
        family: A name of `FAMILIES`, or a `Family` of your own.
        width: Width in pixels of the final image, 1 to 32768; rounded to the family's grid.
        height: Height in pixels, likewise.
        preset: Where to start from: "fast", "balanced", "best", another preset of the family such as "text", or any
            "N+M", the steps of stage 1 and of the later ones ("10+1"; with "10+1+2" there are three stages). None: the
            family's default. Options override its numbers. With `upscaler_kind="interpolation"` (no network upscales
            the image) what is left to it is refined more: the default 12+1 is 12+2 from .45, and "12+1" by name is 1
            step from .45 (`refining.for_upscaler`).
        **options: What else to decide, see `options.OPTIONS`: each with its type, range and meaning. None is the same
            as leaving an option out. `stages` is the number of stages and `factor` the size step between them: 2048 px
            with factor 2 and 3 stages runs at 512, 1024 and 2048. Where neither they nor `factors` are given and the
            image is more than twice the native size, both are chosen (`sizes.chosen_sizes`). `refine_steps` and
            `sigma` take one value, or one per later stage. Outside `guidance_interval` a step costs one forward instead
            of two (Kynkaanniemi et al. 2024, arXiv 2404.07724). `native=True` with `steps` is `make_native_plan`.

    Returns:
        The plan; its `notes` say what was chosen, rounded or cropped.

    Raises:
        MrFlowError: An option is unknown, out of range, or does not go with another one.
    """
    known = family if isinstance(family, Family) else get_family(family)
    asked = cast("PlanOptions", check_options({"preset": preset, **options}))
    given = _spelled_out(asked)
    if "method" in given:
        return _jit_plan(known, width, height, given)
    if given.get("native"):
        return _native_by_options(known, width, height, given)
    if "steps" in given:
        raise MrFlowError(f"steps={given['steps']!r} is for native=True; a staged plan takes low_steps, refine_steps.")
    sizes = chosen_sizes(known, width, height, asked)
    if sizes is not None:
        plan = _staged_plan(known, sizes, (width, height), given)
        return replace(plan, notes=(chosen_note(plan, known), *plan.notes))
    factors = handoff_factors(known, given.get("factor"), given.get("factors"), given.get("stages"))
    return _staged_plan(known, stage_sizes(known, width, height, factors), (width, height), given)


def make_native_plan(family: str | Family, width: int, height: int, **options: Unpack[NativeOptions]) -> StagedPlan:
    """Plain sampling at the final size as a plan of one stage, named "native": what a staged run is compared with.

    Args:
        family: As in `make_plan`.
        width: Width in pixels of the image, 1 to 32768; rounded to the family's grid.
        height: Height in pixels, likewise.
        **options: `steps` (None: the family's native count), `solver` (None: Euler, which is what native pipelines
            run), and the other options of `OPTIONS` that apply to native plans.

    Returns:
        The plan; its `cost_ratio` is 1.

    Raises:
        MrFlowError: As in `make_plan`.
    """
    known = family if isinstance(family, Family) else get_family(family)
    given = cast("PlanOptions", check_options(options, "make_native_plan"))
    return _native_by_options(known, width, height, given)


def _spelled_out(given: PlanOptions) -> PlanOptions:
    """The options with a preset such as "10+1+2", which has a count for each of several later stages, as options."""
    low, *refine = steps_in(given.get("preset", "") or "") or (0,)
    if len(refine) < 2:
        return given
    counts: PlanOptions = {"low_steps": low, "refine_steps": refine}
    if "factors" not in given:
        counts["stages"] = len(refine) + 1
    kept = cast("PlanOptions", {name: value for name, value in given.items() if name != "preset"})
    return {**counts, **kept}


def _native_by_options(family: Family, width: int, height: int, given: PlanOptions) -> StagedPlan:
    for name, value in given.items():
        option = OPTIONS[name]
        if option.applies == "staged" and value != option.default:
            taken = ", ".join(
                other for other, each in OPTIONS.items() if each.applies != "staged" and other != "native"
            )
            raise MrFlowError(f"native=True plans one stage and takes {taken}; leave {name}={quoted(value)} out.")
    _check_first(family, given, "steps")
    size = covering_size(family, width, height)
    count, scale = _or(given.get("steps"), family.native_steps), _or(given.get("guidance"), family.guidance)
    solver = _or(given.get("solver"), "euler")
    stage = _first_stage(family, size, count, tokens_of(family, size), solver, scale, given)
    stage = replace(stage, precision=_value(given, "precision"), renoise=_renoise(family, given))
    return _assemble(family, "native", (width, height), [stage], scale, stage, given)


def _jit_plan(family: Family, width: int, height: int, given: PlanOptions) -> StagedPlan:
    """One stage at the final size with the schedule of a Just-in-Time method."""
    name = cast("JitMethod", given.get("method"))
    schedule, taken = JIT[name], ("method", "guidance", "seed", "seed_rule", "posterior", "precision")
    same = {"solver": "euler", "upscaler_kind": _value(given, "upscaler_kind")}  # nothing is upscaled
    for other, value in given.items():
        if other not in taken and value not in (OPTIONS[other].default, same.get(other)):
            raise MrFlowError(
                f"method={name} has its own steps and sigmas and takes {', '.join(taken[1:])}; leave "
                f"{other}={quoted(value)} out."
            )
    if family.prediction != "flow":
        raise MrFlowError(f"method={name} is for flow models whose network takes tokens; {family.title} is none.")
    size = covering_size(family, width, height)
    scale = _or(given.get("guidance"), family.guidance)
    stage = _make_stage(family, size, None, schedule.recipe, "euler", scale)
    stage = replace(stage, shares=schedule.shares, precision=_value(given, "precision"))
    return _assemble(family, name, (width, height), [stage], scale, None, given)


def make_sized_plan(
    family: Family,
    sizes: Sequence[tuple[int, int]],
    requested: tuple[int, int],
    *,
    stretches: bool = False,
    grid: int | None = None,
    **options: Unpack[MadeOptions],
) -> StagedPlan:
    """A staged plan whose stages have exactly these sizes, for a host that makes sizes of its own.

    Args:
        family: The model's family.
        sizes: (width, height) in pixels of each stage, first to last. They may lie off the family's grid: engines fill
            up a last row or column of tokens that is not whole.
        requested: (width, height) that the user asked for, which notes compare with.
        stretches: The host stretches an image into the next stage's shape; False: it is cropped at the centre.
        grid: Pixels of which the sides of its final images are multiples; None: the family's grid.
        **options: As in `make_plan`, without those that decide sizes.

    Returns:
        The plan; its `notes` say what was rounded, cropped or stretched.

    Raises:
        MrFlowError: As in `make_plan`, or `sizes` does not hold 2 to 8 stages.
    """
    given = cast("PlanOptions", check_options(options, "make_sized_plan"))
    wanted = _checked_sizes(sizes)
    asked = _checked_size(requested, "requested")
    clash = [name for name in ("factor", "factors", "stages", "native", "steps") if name in given]
    if clash:
        raise MrFlowError(f"{clash[0]} has no meaning where sizes={quoted(wanted)} are given; leave it out.")
    plan = _staged_plan(family, wanted, asked, given)
    notes = plan_notes(plan, family, stretches=stretches, grid=grid)
    return replace(plan, notes=(*notes, *_idle_notes(given)))


def with_first_steps(plan: StagedPlan, steps: int, solver: str | None = None) -> StagedPlan:
    """A plan with another number of steps in stage 1, as cheap drafts and previews take them.

    Args:
        plan: The plan.
        steps: 1 to 1000.
        solver: Of stage 1; None: the plan's.

    Returns:
        The plan; its notes are those of `plan`.

    Raises:
        MrFlowError: `steps` is out of range.
    """
    first = plan.stages[0]
    chosen = first.solver if solver is None else solver
    if checked_whole(steps, "steps", 1, MAX_STEPS) == first.steps and chosen == first.solver:
        return plan
    if first.shares:
        raise MrFlowError(f"steps must be {first.steps} for {plan.preset}, whose schedule is fixed, got {steps}.")
    recipe = recipe_of_steps(first.recipe, steps)
    each = first.forwards / solver_evaluations(first.solver, first.steps)
    stage = replace(
        first,
        sigmas=sigmas_from_recipe(recipe),
        recipe=recipe,
        solver=chosen,
        forwards=math.ceil(each * solver_evaluations(chosen, steps)),
    )
    return replace(plan, stages=(stage, *plan.stages[1:]))


def _checked_sizes(sizes: object) -> list[tuple[int, int]]:
    found = listed(sizes)
    if not 2 <= len(found) <= MAX_STAGES:
        raise MrFlowError(f"sizes must hold the sizes of 2 to {MAX_STAGES} stages, got {quoted(sizes)}.")
    return [_checked_size(size, f"sizes[{number}]") for number, size in enumerate(found)]


def _checked_size(size: object, name: str) -> tuple[int, int]:
    sides = listed(size)
    if len(sides) != 2:
        raise MrFlowError(f"{name} must be (width, height) in pixels, got {quoted(size)}.")
    width, height = sides
    return checked_side(width, name), checked_side(height, name)


def _staged_plan(
    family: Family, sizes: Sequence[tuple[int, int]], requested: tuple[int, int], given: PlanOptions
) -> StagedPlan:
    _check_first(family, given, "low_steps")
    name, later = given.get("preset"), len(sizes) - 1
    counted = "sigma" in given or bool(steps_in(name or ""))
    chosen = for_upscaler(family, family.get_preset(name), _value(given, "upscaler_kind"), counted=counted)
    low = _or(given.get("low_steps"), chosen.low_steps)
    refine = _one_per_stage(_or(given.get("refine_steps"), chosen.refine_steps), later, "refine_steps")
    starts = _one_per_stage(_or(given.get("sigma"), chosen.sigma), later, "sigma")
    scale, solver = _or(given.get("guidance"), family.guidance), _or(given.get("solver"), family.solver)
    tokens = _shift_tokens(family, _value(given, "shift_tokens"), sizes)
    renoise = _renoise(family, given)
    made = [_first_stage(family, sizes[0], low, tokens, "euler" if renoise else solver, scale, given)]
    made[0] = replace(made[0], renoise=renoise)
    interval = given.get("guidance_interval")
    if interval is not None:
        made[0] = _guided_within(made[0], family, interval)
    high, curve = _or(given.get("refine_guidance"), scale), _value(given, "refine_curve")
    for size, count, start in zip(sizes[1:], refine, starts, strict=True):
        made.append(_refine_stage(family, size, count, start, curve, solver, high))
    shares = _one_per_stage(_value(given, "refine_tokens"), later, "refine_tokens")
    made[1:] = [replace(stage, shares=(share,) * stage.steps) for stage, share in zip(made[1:], shares, strict=True)]
    made[0] = replace(made[0], few_step=chosen.few_step)
    bits = _value(given, "precision")
    later_bits = _or(given.get("refine_precision"), bits)
    made = [replace(stage, precision=later_bits if number else bits) for number, stage in enumerate(made)]
    own_steps = {"low_steps", "refine_steps", "sigmas"} & set(given)
    called = "+".join(map(str, (made[0].steps, *refine))) if own_steps else chosen.name
    return _assemble(family, called, requested, made, scale, None, given)


def _renoise(family: Family, given: PlanOptions) -> float:
    """The share of the noise that stage 1 draws anew. Raises MrFlowError beside a solver that cannot do so."""
    share = float(_or(given.get("renoise"), family.renoise))
    solver = given.get("solver")
    if share and solver not in (None, "euler"):
        asked = f"renoise={share:g}" if "renoise" in given else f"the sampler of this {family.title}"
        raise MrFlowError(
            f"solver must be euler with {asked}, which draws noise after each step, got {solver}; leave it out, or "
            "give renoise=0."
        )
    return share


def _or(value: _T | None, otherwise: _T) -> _T:
    return otherwise if value is None else value


def _value(given: PlanOptions, name: str) -> Any:
    """The option's value, or its default."""
    return given.get(name, OPTIONS[name].default)


def _assemble(
    family: Family,
    preset: str,
    requested: tuple[int, int],
    stages: Sequence[Stage],
    guidance: float,
    native: Stage | None,
    given: PlanOptions,
) -> StagedPlan:
    """The plan around its stages; `native` is the stage to compare with, by default Euler at the native step count."""
    native_steps = native.steps if native else family.native_steps
    native_forwards = native.forwards if native else native_steps * _per_step(family, guidance)
    plan = StagedPlan(
        family=family.name,
        preset=preset,
        requested_width=requested[0],
        requested_height=requested[1],
        stages=tuple(stages),
        seed=_value(given, "seed"),
        seed_rule=_value(given, "seed_rule"),
        posterior=_value(given, "posterior"),
        native_steps=native_steps,
        native_forwards=native_forwards,
        text_tokens=family.text_tokens,
        # Six digits say all that is known of a cost and keep the plan's line short.
        attention=float(f"{family.attention_cost / family.linear_cost:.6g}"),
        tile=checked_tile(_value(given, "tile"), family),
        tile_positions=_value(given, "tile_positions") if _value(given, "tile") else "own",
        noise=_value(given, "noise"),
        upscaler_kind=_value(given, "upscaler_kind"),
        context=float(_value(given, "refine_context")) if any(stage.shares for stage in stages[1:]) else 0.0,
    )
    return replace(plan, notes=(*plan_notes(plan, family), *_idle_notes(given)))


def _idle_notes(given: PlanOptions) -> tuple[str, ...]:
    """Which options that were given have no effect."""
    notes: list[str] = []
    asked, beside, sparse = given.get("tile_positions"), given.get("refine_context"), given.get("refine_tokens", 1.0)
    if asked is not None and not _value(given, "tile"):
        notes.append(f"tile_positions={asked} has no effect without tiles; give tile too.")
    if beside is not None and all(share == 1.0 for share in (sparse if isinstance(sparse, Sequence) else (sparse,))):
        notes.append(f"refine_context={beside:g} has no effect where all tokens are refined; give refine_tokens too.")
    return tuple(notes)


def _first_stage(
    family: Family,
    size: tuple[int, int],
    steps: int,
    shift_tokens: int,
    solver: str,
    guidance: float,
    given: PlanOptions,
) -> Stage:
    sigmas = given.get("sigmas")
    if sigmas is not None:
        return _make_stage(family, size, None, explicit_recipe(_whole_sigmas(sigmas)), solver, guidance)
    if family.shift.kind == "list":
        return _make_stage(family, size, None, explicit_recipe(_family_sigmas(family, steps)), solver, guidance)
    mu = given.get("mu")
    mu = _family_mu(family, shift_tokens, steps) if mu is None else float(mu)
    return _make_stage(family, size, mu, _first_recipe(family.shift, steps, mu), solver, guidance)


def _check_first(family: Family, given: PlanOptions, counted: Literal["low_steps", "steps"]) -> None:
    """Refuse options of stage 1's schedule that exclude each other; `counted` names its steps."""
    mu, sigmas, steps = given.get("mu"), given.get("sigmas"), given.get(counted)
    if mu is not None and family.shift.kind in (*_UNSHIFTED, "list"):
        raise MrFlowError(f"mu must be left out for {family.name}, whose schedule has no shift; got {mu!r}.")
    if sigmas is None:
        return
    for name, value in (("mu", mu), ("shift_tokens", given.get("shift_tokens"))):
        if value is not None:
            raise MrFlowError(f"{name}={value!r} shifts a schedule, and given sigmas are never shifted; leave one out.")
    own = len(_whole_sigmas(sigmas)) - 1
    if steps is not None and steps != own:
        raise MrFlowError(f"{counted}={steps} does not fit sigmas, which make {own} steps; leave {counted} out.")


def _whole_sigmas(sigmas: Sequence[float]) -> Sigmas:
    """The sigmas of a whole stage 1 with their final 0. Raises MrFlowError for anything else."""
    whole = (*sigmas, 0.0) if sigmas and sigmas[-1] != 0.0 else sigmas
    if len(whole) > MAX_STEPS + 1:
        raise MrFlowError(f"sigmas must make at most {MAX_STEPS} steps, got {len(whole) - 1}.")
    made = validate_sigmas(whole, "sigmas")
    if made[0] != 1.0:
        raise MrFlowError(f"sigmas must start at 1, which is pure noise, got {made[0]!r}.")
    return made


def _family_sigmas(family: Family, steps: int) -> Sigmas:
    """The sigmas that a family ships for that many steps."""
    lists = {len(sigmas) - 1: sigmas for sigmas in family.shift.lists}
    if steps not in lists:
        counts = " or ".join(map(str, sorted(lists)))
        raise MrFlowError(
            f"stage 1 of {family.title} must take {counts} steps, for which the model has sigmas of its own, got "
            f"{steps}; choose one of them, or give sigmas."
        )
    return lists[steps]


def _refine_stage(
    family: Family, size: tuple[int, int], steps: int, start: float, curve: str, solver: str, guidance: float
) -> Stage:
    recipe = f"{curve} {steps} start={float(start)!r}" if steps else "none"
    return _make_stage(family, size, None, recipe, solver, guidance)


def _make_stage(
    family: Family, size: tuple[int, int], mu: float | None, recipe: str, solver: str, guidance: float
) -> Stage:
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
    """`stage` with CFG between two sigmas only. Raises MrFlowError where that would save nothing."""
    if family.guidance_kind != "cfg" or stage.guidance == 1.0:
        raise MrFlowError(
            f"guidance_interval={interval!r} is for CFG, which takes a second forward; this run of {family.name} has "
            "none: leave it out."
        )
    limited = replace(stage, guidance_interval=interval)
    forwards = sum(
        1 if limited.guidance_at(sigma) == 1.0 else 2 for sigma in evaluated_sigmas(stage.solver, stage.sigmas)
    )
    return replace(limited, forwards=forwards)


def _per_step(family: Family, guidance: float) -> int:
    """Forwards per model evaluation: two where CFG is applied."""
    if family.guidance_kind == "none" and guidance != 1.0:
        raise MrFlowError(
            f"the guidance scale must be left out or 1 for {family.name}, which is distilled; got {guidance!r}."
        )
    if family.guidance_kind == "cfg" and guidance < 1.0:
        raise MrFlowError(
            f"the guidance scale must be at least 1 for {family.name}, got {guidance!r}; 1 turns CFG off."
        )
    return 2 if family.guidance_kind == "cfg" and guidance != 1.0 else 1


# ------------------------------------------------------------------------------------------------------------- shift


def _family_mu(family: Family, tokens: int, steps: int) -> float | None:
    """The mu of the family's own shift rule; None for a schedule without one."""
    mu = _mu_of(family.shift, tokens, steps)
    if mu is not None and mu > MAX_MU:
        raise MrFlowError(
            f"size or shift_tokens must be smaller for {family.title}: {tokens} tokens would shift stage 1 "
            f"by mu = {mu:.1f}, above the limit of {MAX_MU:g}; choose a smaller size, a larger factor or more stages."
        )
    return mu


def _mu_of(rule: ShiftRule, tokens: int, steps: int) -> float | None:
    if rule.kind in _UNSHIFTED:
        return None
    if rule.kind == "flux2":
        found = mu_flux2(tokens, steps)
    elif rule.kind == "logit-normal":
        found = rule.base_shift + 0.5 * math.log(tokens / rule.base_tokens)
    elif rule.kind == "root":
        found = rule.base_shift + rule.max_shift * math.sqrt(tokens / rule.base_tokens)
    elif rule.kind == "exponential":
        found = mu_for_tokens(
            tokens,
            base_tokens=rule.base_tokens,
            max_tokens=rule.max_tokens,
            base_shift=rule.base_shift,
            max_shift=rule.max_shift,
        )
    else:
        return math.log(rule.shift) if rule.kind in ("static", "beta") else 0.0
    return math.log(max(found, math.exp(-MAX_MU))) if rule.factor else found


def _first_recipe(rule: ShiftRule, steps: int, mu: float | None) -> str:
    if rule.kind == "edm":
        spacing = "" if rule.rho is None else f" rho={rule.rho!r}"
        return f"edm {steps} max={rule.sigma_max!r} min={rule.sigma_min!r}{spacing}"
    if rule.betas is not None:
        return recipe_of_betas(steps, rule.betas)
    if rule.kind == "trigflow" and steps == 2 and rule.middle is not None:
        return f"trigflow 2 middle={rule.middle!r}"
    if rule.kind in _UNSHIFTED:
        return f"{rule.kind} {steps}"
    if rule.kind == "logit-normal":
        return f"logit-normal {steps} mu={mu!r} std={rule.std!r}"
    numbers = {
        "terminal": rule.terminal,
        "min": rule.sigma_min,
        "beta": rule.beta,
        "roots": rule.roots,
        "ahead": rule.ahead,
        "whole": rule.whole,
        "up": 1 if rule.up else None,
    }
    words = ["beta" if rule.kind == "beta" else "native", str(steps), f"mu={mu!r}"]
    return " ".join([*words, *(f"{name}={number!r}" for name, number in numbers.items() if number is not None)])


def _shift_tokens(family: Family, rule: Literal["low", "final"] | int, sizes: Sequence[tuple[int, int]]) -> int:
    if rule == "low":
        return tokens_of(family, sizes[0])
    if rule == "final":
        return tokens_of(family, sizes[-1])
    return rule


def _one_per_stage(value: Number | Sequence[Number], count: int, name: str) -> tuple[Number, ...]:
    """One value per later stage, from one value for all or one for each."""
    if not isinstance(value, Sequence):
        return (value,) * count
    if len(value) != count:
        if count == 1:
            raise MrFlowError(
                f"{name} must be one number, as there is one later stage, got {quoted(value)}; ask for more stages."
            )
        raise MrFlowError(f"{name} must be one number or {count}, one for each later stage, got {quoted(value)}.")
    return tuple(value)
