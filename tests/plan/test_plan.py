from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.families import FAMILIES, ShiftRule, get_family
from mrflow_sched.plan.make import make_native_plan, make_plan, make_sized_plan
from mrflow_sched.plan.recipes import sigmas_from_recipe
from mrflow_sched.plan.schedule import mu_for_tokens, native_sigmas, refine_sigmas, scaled_linear_sigmas
from mrflow_sched.plan.sizes import fit_box
from mrflow_sched.plan.solver_table import SOLVER_NAMES, SOLVERS, evaluated_sigmas, solver_evaluations
from mrflow_sched.plan.stages import Stage, StagedPlan

quick = settings(max_examples=40)
NAMES = st.sampled_from(list(FAMILIES))
SIDES = st.integers(1, 4096)
# The embedded model's shift follows its few tokens steeply: at sides of thousands it would be refused.
TOKENS = 1024
FACTORS = st.floats(1.25, 4)


_UNSHIFTED = ("scaled-linear", "betas", "edm", "trigflow")


@st.composite
def plans(draw: st.DrawFn) -> StagedPlan:
    family = get_family(draw(NAMES))
    later = draw(st.integers(1, 3))
    own_list = family.shift.kind == "list"
    return make_plan(
        family,
        draw(SIDES),
        draw(SIDES),
        draw(st.sampled_from([preset.name for preset in family.presets])),
        factors=draw(st.lists(FACTORS, min_size=later, max_size=later)),
        low_steps=None if own_list else draw(st.none() | st.integers(1, 30)),
        refine_steps=draw(st.none() | st.lists(st.integers(0, 4), min_size=later, max_size=later)),
        sigma=draw(st.none() | st.floats(0.001, 0.999)),
        solver=draw(st.none() | st.sampled_from(SOLVER_NAMES)),
        refine_curve=draw(st.sampled_from(["linear", "shifted"])),
        shift_tokens=draw(st.integers(1, 4 * TOKENS)),
        guidance=None if family.guidance_kind == "none" else draw(st.none() | st.floats(1, 20)),
        mu=None if own_list or family.shift.kind in _UNSHIFTED else draw(st.none() | st.floats(-3, 3)),
        seed=draw(st.integers(0, 2**63 - 1)),
        seed_rule=draw(st.sampled_from(["offset", "hash"])),
        posterior=draw(st.sampled_from(["mode", "sample"])),
    )


def notes(plan: StagedPlan) -> str:
    return " ".join(plan.notes)


# ------------------------------------------------------------------------------------------------------ what is planned


def test_the_papers_flux_run() -> None:
    plan = make_plan("flux1-dev", 1024, 1024)
    low, high = plan.stages
    assert (plan.family, plan.preset, plan.width, plan.height) == ("flux1-dev", "12+1", 1024, 1024)
    assert (low.width, low.height, low.tokens, low.steps, low.forwards) == (512, 512, 1024, 12, 12)
    assert low.mu == pytest.approx(0.63, abs=1e-3)
    assert low.sigmas == native_sigmas(12, mu=mu_for_tokens(1024))
    assert (high.width, high.height, high.tokens, high.forwards) == (1024, 1024, 4096, 1)
    assert (high.mu, high.sigmas, high.start_sigma) == (None, (0.12, 0.0), 0.12)
    assert (low.guidance, high.guidance) == (3.5, 3.5)
    assert (plan.forwards, plan.native_steps, plan.native_forwards) == (13, 50, 50)
    assert plan.notes == ()


def test_its_cost_is_the_flop_ratio_with_text_counted() -> None:
    family, plan = get_family("flux1-dev"), make_plan("flux1-dev", 1024, 1024)
    native = 50 * family.forward_cost(4096)
    staged = 12 * family.forward_cost(1024) + family.forward_cost(4096)
    assert native / 1e12 == pytest.approx(3720, rel=0.002)
    assert staged / 1e12 == pytest.approx(332, rel=0.002)
    assert plan.cost_ratio == pytest.approx(11.2, abs=0.05)
    assert plan.cost_ratio == pytest.approx(native / staged, rel=1e-5)
    assert plan.stage_costs()[1] == 1.0


@pytest.mark.parametrize(("low_steps", "speedup"), [(10, 11.9), (12, 10.5), (16, 8.6), (20, 7.2)])
def test_speedups_of_the_specification_on_qwen(low_steps: int, speedup: float) -> None:
    """docs/method.md, section 2.3: 49.32 s native; 0.133 s and 0.49 s a forward, and 0.51 s besides."""
    plan = make_plan("qwen-image", 1024, 1024, low_steps=low_steps)
    low, high = (stage.forwards for stage in plan.stages)
    assert (low, high, plan.native_forwards) == (2 * low_steps, 2, 100)
    assert 49.32 / (low * 0.133 + high * 0.49 + 0.51) == pytest.approx(speedup, abs=0.06)
    # by FLOP alone: a small stage does not fill a GPU, so this is optimistic, but not wild
    assert speedup < 49.32 / (49.32 / plan.cost_ratio + 0.51) < 1.2 * speedup


@pytest.mark.parametrize(
    ("family", "mu"),
    [("flux2-klein-base", 1.974), ("flux2-klein", 2.031), ("qwen-image", 0.539), ("z-image-turbo", math.log(3))],
)
def test_mu_of_stage_1_per_family(family: str, mu: float) -> None:
    assert make_plan(family, 1024, 1024).stages[0].mu == pytest.approx(mu, abs=1e-3)


def test_no_shift_ever_reaches_a_refine_list() -> None:
    for name in FAMILIES:
        for terminal_or_not in make_plan(name, 1024, 1024, sigma=0.12, refine_steps=2, mu=None).stages[1:]:
            assert terminal_or_not.sigmas == refine_sigmas(0.12, 2)


def test_qwen_is_stretched_and_stable_diffusion_keeps_its_own_list() -> None:
    assert make_plan("qwen-image", 1024, 1024).stages[0].sigmas[-2] == 0.02
    sdxl = make_plan("sdxl", 2048, 2048)
    assert sdxl.stages[0].sigmas == scaled_linear_sigmas(12)
    assert sdxl.stages[0].mu is None
    assert "equal signal-to-noise" in notes(sdxl)


@pytest.mark.parametrize(("shift_tokens", "tokens"), [("low", 1024), ("final", 4096), (2000, 2000)])
def test_which_token_count_sets_the_shift(shift_tokens: Any, tokens: int) -> None:
    low = make_plan("flux1-dev", 1024, 1024, shift_tokens=shift_tokens).stages[0]
    assert low.mu == mu_for_tokens(tokens)
    assert low.sigmas == native_sigmas(12, mu=mu_for_tokens(tokens))


def test_any_number_of_stages() -> None:
    plan = make_plan("flux1-dev", 2048, 2048, stages=3, sigma=(0.15, 0.1), refine_steps=(2, 1))
    assert [(stage.width, stage.height) for stage in plan.stages] == [(512, 512), (1024, 1024), (2048, 2048)]
    assert [stage.start_sigma for stage in plan.stages] == [1.0, 0.15, 0.1]
    assert [stage.forwards for stage in plan.stages] == [12, 2, 1]
    assert plan.preset == "12+2+1"
    assert make_plan("flux1-dev", 2048, 1024, factors=(1.5, 2)).stages[0].width == 688


def test_overrides_reach_the_stages() -> None:
    plan = make_plan(
        "qwen-image", 1024, 1024, low_steps=8, sigma=0.18, solver="euler", guidance=3.0, refine_guidance=1.0, mu=1.0
    )
    assert (plan.preset, plan.stages[0].mu, plan.stages[1].start_sigma) == ("8+1", 1.0, 0.18)
    assert [stage.guidance for stage in plan.stages] == [3.0, 1.0]
    assert [stage.forwards for stage in plan.stages] == [16, 1]
    assert {stage.solver for stage in plan.stages} == {"euler"}


def test_a_refine_stage_without_steps_keeps_the_upscaled_image() -> None:
    plan = make_plan("flux1-dev", 1024, 1024, refine_steps=0)
    assert (plan.preset, plan.stages[1].sigmas, plan.stages[1].forwards) == ("12+0", (), 0)
    assert (plan.stages[1].steps, plan.stages[1].start_sigma, plan.stage_costs()[1]) == (0, 0.0, 0.0)
    assert "no step" in notes(plan)


# ------------------------------------------------------------------------------------------------------ explicit sigmas

OWN = (1.0, 0.9, 0.6, 0.2)


def test_a_list_of_ones_own_is_stage_1() -> None:
    plan = make_plan("flux1-dev", 1024, 1024, sigmas=OWN)
    first = plan.stages[0]
    assert (plan.preset, first.sigmas, first.mu, first.steps, first.forwards) == ("4+1", (*OWN, 0.0), None, 4, 4)
    assert make_plan("flux1-dev", 1024, 1024, sigmas=(*OWN, 0.0), low_steps=4) == plan
    assert StagedPlan.from_string(plan.to_string()) == plan
    assert StagedPlan.from_json(plan.to_json()) == plan
    native = make_native_plan("flux1-dev", 1024, 1024, sigmas=OWN)
    assert (native.stages[0].sigmas, native.native_steps) == ((*OWN, 0.0), 4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sigmas": OWN, "low_steps": 5}, "low_steps=5 does not fit sigmas, which make 4 steps"),
        ({"sigmas": OWN, "mu": 0.5}, "mu=0.5 shifts a schedule, and given sigmas are never shifted"),
        ({"sigmas": OWN, "shift_tokens": "low"}, "shift_tokens='low' shifts a schedule"),
        ({"sigmas": OWN, "native": True, "steps": 5}, "steps=5 does not fit sigmas"),
        ({"sigmas": (0.9, 0.5)}, "sigmas must start at 1, which is pure noise, got 0.9"),
        ({"sigmas": (1.0, 0.5, 0.5)}, "sigmas must fall from each value to the next"),
        ({"sigmas": (1.0, math.nan)}, "sigmas must be a number from 0 to 1, got nan"),
        ({"sigmas": ()}, "sigmas must hold at least two values"),
        ({"sigmas": "1 0"}, "sigmas must be a list of numbers"),
        ({"sigmas": [1 - index / 2000 for index in range(2000)]}, "sigmas must make at most 1000 steps, got 2000"),
    ],
)
def test_lists_that_cannot_be_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_plan("flux1-dev", 1024, 1024, **options)


def test_a_family_may_ship_its_own_lists() -> None:
    four = (1.0, 0.9, 0.7, 0.4, 0.0)
    family = replace(get_family("flux1-schnell"), name="mine", shift=ShiftRule("list", lists=(four, (1.0, 0.5, 0.0))))
    assert make_plan(family, 1024, 1024).stages[0].sigmas == four
    assert make_plan(family, 1024, 1024, "2+1").stages[0].sigmas == (1.0, 0.5, 0.0)
    assert make_plan(family, 1024, 1024, sigmas=OWN).stages[0].sigmas == (*OWN, 0.0)
    with pytest.raises(ValueError, match=r"stage 1 of FLUX\.1-schnell must take 2 or 4 steps, .* got 3"):
        make_plan(family, 1024, 1024, low_steps=3)
    with pytest.raises(ValueError, match="mu must be left out for mine"):
        make_plan(family, 1024, 1024, mu=1.0)
    with pytest.raises(ValueError, match="lists must start at 1"):
        ShiftRule("list", lists=((0.9, 0.0),))
    with pytest.raises(ValueError, match="lists must be given for the shift rule 'list' and no other"):
        ShiftRule("static", lists=(four,))


def test_native_plans() -> None:
    plan = make_native_plan("qwen-image", 1024, 1024)
    assert (plan.preset, len(plan.stages), plan.forwards, plan.cost_ratio) == ("native", 1, 100, 1.0)
    assert plan.stages[0].mu == pytest.approx(0.694, abs=1e-3)
    assert plan.stages[0].solver == "euler"
    assert make_plan("qwen-image", 1024, 1024, native=True) == plan
    assert make_native_plan("flux1-dev", 1024, 1024, steps=20, solver="heun").forwards == 39


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 5), ("multistep", 5), ("careful", 5), ("heun", 9)])
def test_evaluations_per_solver(solver: str, evaluations: int) -> None:
    assert solver_evaluations(solver, 5) == evaluations
    assert solver_evaluations(solver, 0) == 0


def test_the_solvers_of_plans_are_those_there_are() -> None:
    solvers = pytest.importorskip("mrflow_sched.sampling.solvers")
    assert set(SOLVER_NAMES) == set(solvers.SOLVERS)
    for name in SOLVER_NAMES:
        assert [solver_evaluations(name, n) for n in range(4)] == [solvers.solver_forwards(name, n) for n in range(4)]


@pytest.mark.parametrize("name", SOLVER_NAMES)
def test_evaluated_sigmas_are_those_of_the_solver_itself(name: str) -> None:
    solvers = pytest.importorskip("mrflow_sched.sampling.solvers")
    sigmas = native_sigmas(5)
    assert evaluated_sigmas(name, sigmas) == solvers.evaluation_sigmas(name, sigmas)
    assert len(evaluated_sigmas(name, sigmas)) == solver_evaluations(name, 5)
    assert SOLVERS[name].evaluations_per_step == (2 if name == "heun" else 1)
    assert SOLVERS[name].order == (1 if name == "euler" else 2)


def test_plans_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        make_plan("demo", 256, 256).seed = 3  # type: ignore[misc]


# -------------------------------------------------------------------------------------------------------------- sizes


@quick
@given(NAMES, SIDES, SIDES, st.lists(FACTORS, min_size=1, max_size=3))
def test_sizes_are_on_the_grid_and_near_what_was_asked(
    name: str, width: int, height: int, factors: list[float]
) -> None:
    family = get_family(name)
    plan = make_plan(family, width, height, factors=factors, shift_tokens=TOKENS)
    assert len(plan.stages) == len(factors) + 1
    for made, asked in ((plan.width, width), (plan.height, height)):
        assert 0 <= made - asked < family.grid
    for index, stage in enumerate(plan.stages):
        over = math.prod(factors[index:])
        for side, final in ((stage.width, plan.width), (stage.height, plan.height)):
            assert side % family.grid == 0
            assert abs(side - final / over) <= family.grid / 2 + 1e-9 or side == family.grid
        assert stage.tokens == stage.width * stage.height // (family.vae_factor * family.patch) ** 2


@quick
@given(NAMES, SIDES, SIDES)
def test_nothing_is_rounded_or_cropped_in_silence(name: str, width: int, height: int) -> None:
    plan = make_plan(name, width, height, shift_tokens=TOKENS)
    assert ((width, height) == (plan.width, plan.height)) != (f"{width}x{height} is made at" in notes(plan))
    pairs = [(fit_box(low.width, low.height, high.width, high.height), high) for low, high in pairwise(plan.stages)]
    kept = all(box[:2] == (high.width, high.height) for box, high in pairs)
    assert kept != ("cropped at the centre" in notes(plan))


def test_notes_on_odd_sizes_say_what_happens() -> None:
    plan = make_plan("qwen-image", 1361, 749)
    assert plan.notes == (
        "The requested 1361x749 is made at 1376x752, in multiples of 16 pixels, and trimmed at its edges.",
        "Stage 1 at 688x384 is not shaped like 1376x752: it is upscaled to 1376x768 and cropped at the centre, "
        "losing 2.1% of the image.",
    )
    assert plan.asked_area == (slice(1, 750), slice(7, 1368))


def test_sizes_of_a_hosts_own_are_kept_and_noted() -> None:
    flux = get_family("flux1-dev")
    plan = make_sized_plan(flux, [(496, 304), (1000, 616)], (1003, 616), stretches=True, grid=8, low_steps=8)
    low, high = plan.stages
    assert [(stage.width, stage.height, stage.tokens) for stage in plan.stages] == [(496, 304, 589), (1000, 616, 2457)]
    assert (low.mu, plan.preset, high.start_sigma) == (mu_for_tokens(589), "8+1", 0.12)
    assert plan.notes[:2] == (
        "The requested 1003x616 is made at 1000x616, the nearest size in multiples of 8 pixels.",
        "Stage 1 at 496x304 is not shaped like 1000x616: the image is stretched by 0.5%.",
    )
    assert "cropped at the centre" in notes(make_sized_plan(flux, [(496, 304), (1000, 616)], (1000, 616)))
    assert make_sized_plan(flux, [(512, 512), (1024, 1024)], (1024, 1024)) == make_plan(flux, 1024, 1024)
    with pytest.raises(ValueError, match="factor has no meaning where sizes"):
        make_sized_plan(flux, [(512, 512), (1024, 1024)], (1024, 1024), factor=2.0)
    with pytest.raises(ValueError, match=r"sizes must hold the sizes of 2 to 8 stages, got \[\(1024, 1024\)\]"):
        make_sized_plan(flux, [(1024, 1024)], (1024, 1024))


def test_a_stage_is_small_from_five_percent_on() -> None:
    """Rounding to the grid may take a twentieth of the 512 px: 488 px is fine, 480 is not."""
    flux = get_family("flux1-dev")
    for side, small in ((488, False), (480, True)):
        plan = make_sized_plan(flux, [(side, side), (1024, 1024)], (1024, 1024))
        assert ("smaller than the 512 px square" in notes(plan)) is small


def test_a_stage_below_the_models_range_is_noted_never_refused() -> None:
    assert "below which FLUX.1-dev is out of its range" in notes(make_plan("flux1-dev", 512, 512))
    assert notes(make_plan("flux1-dev", 1344, 768)) == ""
    assert "so small a size gains nothing" in notes(make_plan("flux1-dev", 16, 16))


def test_a_stage_above_the_models_range_is_noted_until_it_means_nothing() -> None:
    large = "Stage 1 at 2048x2048 is more than 2 times the area of the 1024x1024 that FLUX.1-dev is made for"
    assert large in notes(make_plan("flux1-dev", 4096, 4096, factor=2))
    assert large in notes(make_plan("flux1-dev", 2048, 2048, native=True))
    assert notes(make_plan("flux1-dev", 2816, 2816, factor=2)) == ""
    assert notes(make_plan("flux1-dev", 4096, 4096, stages=3)) == ""
    with pytest.raises(
        ValueError, match=r"size or shift_tokens must be smaller for FLUX\.1-dev: 262144 tokens would shift stage 1"
    ):
        make_plan("flux1-dev", 16384, 16384, factor=2)
    assert make_plan("flux1-dev", 16384, 16384, factor=2, mu=1.15).stages[0].mu == 1.15


def test_a_presets_own_sigma_gets_no_note_and_the_users_gets_one() -> None:
    own = make_plan("sana-sprint", 1024, 1024, "detail")
    assert [stage.steps for stage in own.stages] == [2, 1]
    assert own.stages[1].start_sigma == 0.75
    assert "outside the usual" not in notes(own)
    assert "outside the usual" not in notes(StagedPlan.from_string(own.to_string()))
    chosen = make_plan("sana-sprint", 1024, 1024, "detail", sigma=0.8)
    assert "outside the usual" in notes(chosen)
    assert "outside the usual" in notes(StagedPlan.from_string(chosen.to_string()))
    assert "outside the usual" in notes(make_plan("sana-sprint", 1024, 1024, sigma=0.75))
    assert "outside the usual" in notes(make_plan("flux1-dev", 1024, 1024, "detail", refine_steps=1))
    for name in FAMILIES:
        for preset in ("text", "detail", "balanced"):
            assert "outside the usual" not in notes(make_plan(name, 1024, 1024, preset)), (name, preset)


def test_other_notes() -> None:
    assert "outside the usual" in notes(make_plan("flux1-dev", 1024, 1024, sigma=0.8))
    several = [make_plan("flux1-dev", 1024, 1024, sigma=sigma, refine_steps=6) for sigma in (0.75, 0.95, 0.01)]
    assert ["outside the usual" in notes(plan) for plan in several] == [False, True, True]
    assert "gain little beyond one" in notes(make_plan("flux1-dev", 1024, 1024, refine_steps=2))
    assert "times as much as 4 native steps" in notes(make_plan("flux1-schnell", 1024, 1024, refine_steps=4))


@quick
@given(SIDES, SIDES, SIDES, SIDES)
def test_fitting_a_box_covers_it_and_never_stretches(src_w: int, src_h: int, dst_w: int, dst_h: int) -> None:
    width, height, left, top = fit_box(src_w, src_h, dst_w, dst_h)
    assert width >= dst_w
    assert height >= dst_h
    assert (width == dst_w) or (height == dst_h)
    assert 0 <= left <= width - dst_w
    assert 0 <= top <= height - dst_h
    assert abs((width - dst_w) - 2 * left) <= 1
    assert abs((height - dst_h) - 2 * top) <= 1
    scale = max(dst_w / src_w, dst_h / src_h)
    assert abs(width - src_w * scale) <= 0.5 + 1e-6
    assert abs(height - src_h * scale) <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("box", "fitted"),
    [
        ((512, 512, 1024, 1024), (1024, 1024, 0, 0)),
        ((688, 384, 1360, 768), (1376, 768, 8, 0)),
        ((384, 688, 768, 1360), (768, 1376, 0, 8)),
    ],
)
def test_fitting_examples(box: tuple[int, int, int, int], fitted: tuple[int, int, int, int]) -> None:
    assert fit_box(*box) == fitted


def test_fitting_refuses_empty_boxes() -> None:
    with pytest.raises(ValueError, match="dst_w must be a whole number from 1 to 2147483648, got 0"):
        fit_box(1, 1, 0, 1)


# -------------------------------------------------------------------------------------------------------------- text


@quick
@given(plans())
def test_plans_survive_their_line_and_their_json(plan: StagedPlan) -> None:
    line = plan.to_string()
    assert StagedPlan.from_string(line) == plan
    assert StagedPlan.from_string(line).notes == plan.notes
    assert StagedPlan.from_string(line).to_string() == line
    assert StagedPlan.from_json(plan.to_json()) == plan
    assert StagedPlan.from_json(plan.to_json()).notes == plan.notes
    assert not set(line) & set(',:"\n\\')


@quick
@given(plans(), st.lists(st.floats(1e-6, 0.9), min_size=1, max_size=9, unique=True), st.none() | st.floats(-3, 3))
def test_hand_made_lists_survive_too(plan: StagedPlan, levels: list[float], mu: float | None) -> None:
    sigmas = (1.0, *sorted(levels, reverse=True), 0.0)
    changed = replace(plan, stages=(replace(plan.stages[0], sigmas=sigmas, mu=mu), *plan.stages[1:]))
    assert changed.stages[0].recipe.startswith("list")
    assert StagedPlan.from_string(changed.to_string()) == changed
    assert StagedPlan.from_json(changed.to_json()) == changed


@quick
@given(NAMES)
def test_lines_are_short(name: str) -> None:
    assert len(make_plan(name, 1024, 1024, seed=2**32).to_string()) <= 480


def test_reading_a_line_needs_no_table() -> None:
    line = make_plan("flux1-dev", 1024, 1024).to_string().partition(";#")[0].replace("flux1-dev", "unheard-of")
    plan = StagedPlan.from_string(line)
    assert plan.family == "unheard-of"
    assert plan.cost_ratio == make_plan("flux1-dev", 1024, 1024).cost_ratio


def test_json_has_the_keys_of_the_command_line() -> None:
    plan = make_plan("flux1-dev", 1024, 1024)
    data = json.loads(plan.to_json())
    assert {"family", "preset", "cost_ratio", "plan", "stages"} <= set(data)
    assert {"width", "height", "tokens", "mu", "sigmas", "forwards"} <= set(data["stages"][0])
    assert data["plan"] == plan.to_string()
    assert data["cost_ratio"] == plan.cost_ratio
    assert data["stages"][1]["sigmas"] == [0.12, 0.0]


def test_the_guidance_interval_is_read_under_both_of_its_names() -> None:
    plan = make_plan("sd3", 1024, 1024, guidance_interval=(0.3, 0.9))
    assert plan.stages[0].guidance_interval == plan.stages[0].guided == (0.3, 0.9)
    for name in ("guided", "guidance_interval"):
        data = plan.to_dict()
        for stage in data["stages"]:
            del stage[name]
        assert StagedPlan.from_json(json.dumps(data)) == plan


def test_guidance_reaches_an_interval_ends_rounded_to_float32() -> None:
    """float32(0.3) is 0.30000001 and float32(0.9) is 0.89999998: a bound must not turn CFG off by that."""
    stage = make_plan("sd3", 1024, 1024, guidance_interval=(0.3, 0.9)).stages[0]
    for sigma in (0.3 - 5e-8, 0.3, 0.9, 0.9 + 5e-8):
        assert stage.guidance_at(sigma) == 7.0
    for sigma in (0.3 - 1e-5, 0.9 + 1e-5):
        assert stage.guidance_at(sigma) == 1.0


def test_an_edited_line_is_noticed_but_may_be_used() -> None:
    line = make_plan("flux1-dev", 1024, 1024, seed=1).to_string()
    edited = line.replace("seed=1;", "seed=2;")
    with pytest.raises(ValueError, match="was edited"):
        StagedPlan.from_string(edited)
    assert StagedPlan.from_string(edited.partition(";#")[0]).seed == 2


@quick
@given(plans(), st.data())
def test_a_damaged_line_never_gives_another_plan(plan: StagedPlan, data: st.DataObject) -> None:
    line = plan.to_string()
    place = data.draw(st.integers(0, len(line) - 1))
    damaged = line[:place] + data.draw(st.characters(min_codepoint=33, max_codepoint=126)) + line[place + 1 :]
    assume(damaged != line and ";#" in damaged)
    try:
        read = StagedPlan.from_string(damaged)
    except ValueError:
        return
    # What is read all the same must be the same plan: "+" for the space in front of a number, for instance.
    assert read == plan


FIRST_LINES = {  # lines of the first version, as it wrote them
    "plain": (
        "mrflow1;flux1-dev;12+1;1024x1024;seed 0 offset;mode;native 50 50;cost 512 5.42535e-05;"
        "512x512 1024t multistep g3.5 f12 native 12 mu=0.63;"
        "1024x1024 4096t multistep g3.5 f1 linear 1 start=0.12;#52520cf2"
    ),
    "three": (
        "mrflow1;qwen-image;12+2+0;2048x1360;seed 7 hash;sample;native 50 100;cost 64 5.42535e-05;"
        "512x336 672t careful g4.0 f24 native 12 mu=0.5209677419354839 terminal=0.02;"
        "1024x688 2752t careful g4.0 f4 shifted 2 start=0.15;2048x1360 10880t careful g4.0 f0 none;"
        "#9d221203"
    ),
    "tile": (
        "mrflow1;flux1-dev;12+1;4096x4096;seed 0 offset;mode tile 1024;native 50 50;"
        "cost 512 5.42535e-05;1024x1024 4096t multistep g3.5 f12 native 12 mu=1.15;"
        "2048x2048 16384t multistep g3.5 f1 linear 1 start=0.12;"
        "4096x4096 65536t multistep g3.5 f1 linear 1 start=0.12;#f78adc49"
    ),
    "interval": (
        "mrflow1;sd3;12+1;1024x1024;seed 0 offset;mode;native 28 56;cost 333 0.000108507;"
        "512x512 1024t careful g7.0@0.3-0.9 f19 native 12 mu=1.0986122886681098 min=0.002994;"
        "1024x1024 4096t careful g7.0 f2 linear 1 start=0.12;#40173995"
    ),
    "sdxl": (
        "mrflow1;sdxl;12+1;1024x1024;seed 0 offset;mode;native 50 100;cost 0 6.06634e-06;"
        "768x768 9216t heun g5.0 f46 scaled-linear 12;1024x1024 16384t heun g5.0 f2 linear 1 start=0.12;"
        "#6dfec125"
    ),
    "native": (
        "mrflow1;chroma;native;1024x1024;seed 9223372036854775807 offset;mode;native 20 40;"
        "cost 512 5.42535e-05;1024x1024 4096t euler g5.0 f40 beta 20 mu=0.5;#3b25c5e9"
    ),
    "mu": (
        "mrflow1;flux1-dev;12+1;1024x1024;seed 0 offset;mode;native 50 50;cost 512 5.42535e-05;"
        "512x512 1024t multistep g3.5 f3 @mu=0.63 list 1.0 0.5 0.25 0.0;"
        "1024x1024 4096t multistep g3.5 f1 linear 1 start=0.12;#4a83d66d"
    ),
}


def _with_list() -> StagedPlan:
    plan = make_plan("flux1-dev", 1024, 1024)
    first = replace(plan.stages[0], sigmas=(1.0, 0.5, 0.25, 0.0), mu=0.63, forwards=3)
    return replace(plan, stages=(first, *plan.stages[1:]))


def _first_plans() -> dict[str, StagedPlan]:
    many = {"stages": 3, "refine_steps": (2, 0), "sigma": (0.15, 0.1), "refine_curve": "shifted"}
    return {
        "plain": make_plan("flux1-dev", 1024, 1024),
        "three": make_plan("qwen-image", 2048, 1360, seed=7, seed_rule="hash", posterior="sample", **many),
        "tile": make_plan("flux1-dev", 4096, 4096, stages=3, tile=1024, tile_positions="own"),
        "interval": make_plan("sd3", 1024, 1024, guidance_interval=(0.3, 0.9)),
        "sdxl": make_plan("sdxl", 1024, 1024, solver="heun"),
        "native": make_native_plan("chroma", 1024, 1024, steps=20, mu=0.5, seed=2**63 - 1),
        "mu": _with_list(),
    }


@pytest.mark.parametrize("name", list(FIRST_LINES))
def test_lines_of_the_first_version_are_the_plans_they_were(name: str) -> None:
    read = StagedPlan.from_string(FIRST_LINES[name])
    assert read == _first_plans()[name]
    assert StagedPlan.from_string(read.to_string()) == read


def test_a_line_names_its_fields() -> None:
    assert make_plan("flux1-dev", 1024, 1024).to_string().partition(";#")[0] == (
        "mrflow2;family=flux1-dev;preset=12+1;size=1024x1024;seed=0;seed_rule=offset;posterior=mode;native_steps=50;"
        "native_forwards=50;text_tokens=512;attention=5.42535e-05;stage size=512x512 tokens=1024 solver=multistep "
        "guidance=3.5 forwards=12 sigmas=native 12 mu=0.63;stage size=1024x1024 tokens=4096 solver=multistep "
        "guidance=3.5 forwards=1 sigmas=linear 1 start=0.12"
    )
    assert " guidance_interval=0.3/0.9 " in _first_plans()["interval"].to_string()
    assert " mu=0.63 sigmas=list 1.0 0.5" in _with_list().to_string()
    assert ";tile=1024;" in _first_plans()["tile"].to_string()


def test_fields_at_their_default_may_be_left_out() -> None:
    plan = make_plan("flux1-dev", 1024, 1024)
    body = plan.to_string().partition(";#")[0]
    assert StagedPlan.from_string(body.replace(";seed_rule=offset;posterior=mode", "")) == plan


@quick
@given(st.floats(0, 0.9), st.floats(0.001, 0.1))
def test_intervals_survive_their_line(low: float, width: float) -> None:
    plan = make_plan("sd3", 1024, 1024, guidance_interval=(low, low + width))
    assert StagedPlan.from_string(plan.to_string()) == plan


def test_a_shift_that_the_recipe_does_not_tell_survives() -> None:
    plan = make_plan("flux1-dev", 1024, 1024)
    for mu in (None, 0.5):
        changed = replace(plan, stages=(replace(plan.stages[0], mu=mu), *plan.stages[1:]))
        assert StagedPlan.from_string(changed.to_string()) == changed


_HEAD = "mrflow2;family=a;preset=b;size=1x1;seed=0;native_steps=1;native_forwards=1;text_tokens=0;attention=0.0"
_STAGE = "stage size=8x8 tokens=1 solver=euler guidance=1.0 forwards=1 sigmas=native 1 mu=0.0"


def test_the_shortest_line_reads() -> None:
    assert StagedPlan.from_string(f"{_HEAD};{_STAGE}").stages[0].sigmas == (1.0, 0.0)


BROKEN_SECOND = [
    (_HEAD, "must hold at least one stage"),
    (f"mrflow3;family=a;{_STAGE}", "it is of version 'mrflow3', which this mrflow_sched does not know; update"),
    (f"{_HEAD};colour=pink;{_STAGE}", "field 'colour' is unknown, perhaps of a newer mrflow_sched; update it"),
    (f"{_HEAD};noise=pink;{_STAGE}", "noise must be 'own' or 'nested', got 'pink'"),
    (f"{_HEAD};{_STAGE}".replace("solver=", "colour=red solver="), "field 'colour' is unknown"),
    (f"{_HEAD};seed=1;{_STAGE}", "is not of the form name=value, or repeats a name"),
    (f"{_HEAD};word;{_STAGE}", "is not of the form name=value"),
    (f"{_HEAD};{_STAGE}".replace(";seed=0", ""), "it lacks seed"),
    (f"{_HEAD};{_STAGE}".replace(" tokens=1", ""), "it lacks tokens"),
    (f"{_HEAD};stage size=8x8", "lacks sigmas"),
    (f"{_HEAD};{_STAGE}".replace("size=1x1", "size=1x1x1"), "is not a size"),
    (f"{_HEAD};{_STAGE}".replace("size=1x1", "size=999999x1"), "requested_width must be a whole number from 1"),
    (f"{_HEAD};{_STAGE}".replace("seed=0", f"seed={'9' * 400}"), "is not a whole number"),
    (f"{_HEAD};{_STAGE}".replace("seed=0", "seed=9999999999999999999"), "seed must be a whole number from 0"),
    (f"{_HEAD};{_STAGE}".replace("forwards=1", "forwards=9999999999"), "forwards must be a whole number"),
    (f"{_HEAD};{_STAGE}".replace("tokens=1", "tokens=99999999999"), "tokens must be a whole number"),
    (f"{_HEAD};{_STAGE}".replace("guidance=1.0", "guidance=nan"), "'nan' is not a number"),
    (f"{_HEAD};{_STAGE}".replace("guidance=1.0", "guidance=1e400"), "guidance must be a number from 0 to 100, got inf"),
    (f"{_HEAD};{_STAGE}".replace("guidance=1.0", f"guidance={'9' * 400}"), "is not a number"),
    (f"{_HEAD};{_STAGE}".replace("attention=0.0", "attention=-1.0"), "attention must be a number from 0"),
    (f"{_HEAD};{_STAGE}".replace("mu=0.0", "mu=1e400"), "mu must be a number from -20 to 20"),
    (f"{_HEAD};{_STAGE}".replace("mu=0.0", "mu=0.0 mu=0.1"), "the recipe has a number twice"),
    (
        f"{_HEAD};{_STAGE}".replace("native 1 mu=0.0", "native 3 mu=0.0 beta=1e9"),
        "alpha must be a number from 0.2 to 10",
    ),
    (f"{_HEAD};{_STAGE}".replace("native 1 ", "native 999999999 "), "asks for more than 1000 steps"),
    (f"{_HEAD};{_STAGE}".replace("native 1 ", f"native {'9' * 400} "), "asks for more than 1000 steps"),
    (f"{_HEAD};{_STAGE}".replace("native 1 mu=0.0", "list" + " 1.0" * 2000), "holds more than 1000 steps"),
    (f"{_HEAD}{(';' + _STAGE) * 9}", "it has 9 stages, and a plan has at most 8"),
    (f"{_HEAD};tile=7;{_STAGE}", "tile must be"),
    (f"{_HEAD};{_STAGE}{' ' * 300_000}", "and the longest plan has"),
]


@pytest.mark.parametrize(("line", "sentence"), BROKEN_SECOND)
def test_hostile_and_broken_lines_end_in_a_sentence(line: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"plan string .* cannot be read") as caught:
        StagedPlan.from_string(line + "." if line.endswith(" ") else line)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 10**400},
        {"attention": 1e400},
        {"attention": math.nan},
        {"native_steps": 10**400},
        {"stages": [{"sigmas": [10**400, 0]}]},
    ],
)
def test_hostile_json_ends_in_a_sentence(change: dict[str, Any]) -> None:
    data = {**make_plan("demo", 256, 256).to_dict(), **change}
    if "stages" in change:
        data["stages"] = [{**make_plan("demo", 256, 256).to_dict()["stages"][0], **change["stages"][0]}]
    with pytest.raises(ValueError, match=r"plan JSON .* cannot be read") as caught:
        StagedPlan.from_json(json.dumps(data))
    assert len(str(caught.value)) < 500


BROKEN_LINES = [
    "",
    "nonsense",
    "mrflow9;a;b;1x1;seed 0 offset;mode;native 1 1;cost 0 0.0",
    "mrflow1;a;b;1x1;seed 0 offset;mode;native 1 1;cost 0 0.0",
    "mrflow1;a b;c;1x1;seed 0 offset;mode;native 1 1;cost 0 0.0;8x8 1t euler g1.0 f1 native 1 mu=0.0",
    "mrflow1;a;b;1by1;seed 0 offset;mode;native 1 1;cost 0 0.0;8x8 1t euler g1.0 f1 native 1 mu=0.0",
    "mrflow1;a;b;1x1;sed 0 offset;mode;native 1 1;cost 0 0.0;8x8 1t euler g1.0 f1 native 1 mu=0.0",
    "mrflow1;a;b;1x1;seed 0 offset;mode;native 1 1;cost 0 -1.0;8x8 1t euler g1.0 f1 native 1 mu=0.0",
    "mrflow1;a;b;1x1;seed 0 offset;mode;native 1 1;cost 0 nan;8x8 1t euler g1.0 f1 native 1 mu=0.0",
    "mrflow1;a;b;1x1;seed 0 offset;mode;native 1 1;cost 0 0.0;8x8 1 euler g1.0 f1 native 1 mu=0.0",
    "mrflow1;a;b;1x1;seed 0 offset;mode;native 1 1;cost 0 0.0;8x8 1t euler g1.0 f1",
    "mrflow1;a;b;1x1;seed 0 offset;mode;native 1 1;cost 0 0.0;8x8 1t euler g1.0 f1 linear 1 start=0.1",
    "mrflow1;a;b;1x1;seed 0 offset;mode;native 1 1;cost 0 0.0;8x8 1t euler g1.0 f1 native 999999999 mu=0.0",
]


@pytest.mark.parametrize("line", BROKEN_LINES)
def test_broken_lines_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"plan string .* cannot be read"):
        StagedPlan.from_string(line)


@pytest.mark.parametrize(
    "change", [{"stages": []}, {"seed": "1"}, {"stages": [{}]}, {"family": 3}, {"requested": None}]
)
def test_broken_json_is_refused(change: dict[str, Any]) -> None:
    data = {**make_plan("demo", 256, 256).to_dict(), **change}
    with pytest.raises(ValueError, match=r"plan JSON .* cannot be read"):
        StagedPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", "{"])
def test_json_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="plan JSON"):
        StagedPlan.from_json(text)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"family": "flux9"}, "family 'flux9' is unknown"),
        ({"width": 0}, "width must be a whole number from 1 to 32768, got 0"),
        ({"height": 40000}, "height must be a whole number from 1 to 32768, got 40000"),
        ({"width": 512.0}, "width must be a whole number"),
        ({"width": True}, "width must be a whole number"),
        ({"preset": "13x"}, "preset '13x' is not one of family 'flux1-dev'; choose from fast"),
        ({"factor": "2"}, "factor must be a number from 1.25 to 4, got '2'"),
        ({"sigma": "0.1"}, "sigma must lie between 0 and 1, got '0.1'"),
        ({"mu": "1"}, "mu must be a number from -20 to 20, got '1'"),
        ({"mu": True}, "mu must be a number from -20 to 20, got True"),
        ({"guidance": "x"}, "guidance must be a number from 0 to 100, got 'x'"),
        ({"shift_tokens": 1.5}, "shift_tokens must be"),
        ({"native": True, "refine_curve": "shifted"}, "native=True plans one stage"),
        ({"native": True, "shift_tokens": "final"}, "native=True plans one stage"),
        ({"factor": 1.2}, "factor must be a number from 1.25 to 4, got 1.2"),
        ({"factor": 4.5}, "factor must be a number from 1.25 to 4, got 4.5"),
        ({"factor": math.nan}, "factor must be a number from 1.25 to 4"),
        ({"factors": (2.0,), "factor": 2.0}, "leave factor and stages out"),
        ({"factors": (2.0,), "stages": 3}, "leave factor and stages out"),
        ({"factors": ()}, "factors must hold at least one"),
        ({"stages": 1}, "stages must be a whole number from 2 to 8, got 1; one stage is native sampling"),
        ({"low_steps": 0}, "low_steps must be a whole number from 1 to 1000, got 0"),
        ({"refine_steps": -1}, "refine_steps must be a whole number from 0 to 1000, got -1"),
        ({"refine_steps": (1, 2)}, "refine_steps must be one number, as there is one later stage, got"),
        ({"sigma": 1.5}, "sigma must lie between 0 and 1, got 1.5"),
        ({"sigma": 0.0}, "sigma must lie between 0 and 1"),
        ({"solver": "ddim"}, "solver must be one of euler, heun"),
        ({"refine_curve": "karras"}, "refine_curve must be 'linear' or 'shifted', got 'karras'"),
        ({"shift_tokens": "high"}, "shift_tokens must be"),
        ({"shift_tokens": 0}, "shift_tokens must be"),
        ({"mu": math.inf}, "mu must be a number"),
        ({"family": "sdxl", "mu": 1.0}, "mu must be left out for sdxl"),
        ({"guidance": -1.0}, "guidance must be a number from 0 to 100, got -1.0"),
        ({"guidance": math.nan}, "guidance must be a number from 0 to 100, got nan"),
        (
            {"family": "qwen-image", "guidance": 0.0},
            "the guidance scale must be at least 1 for qwen-image, got 0.0; 1 turns CFG off",
        ),
        ({"family": "flux1-schnell", "guidance": 3.5}, "the guidance scale must be left out or 1 for flux1-schnell"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 2**63}, "seed must be a whole number"),
        ({"seed_rule": "random"}, "seed_rule must be 'offset' or 'hash'"),
        ({"posterior": "mean"}, "posterior must be 'mode' or 'sample'"),
        ({"steps": 20}, "steps=20 is for native=True"),
        ({"low_step": 20}, "low_step is no option of make_plan; did you mean low_steps"),
        ({"qqqqq": 20}, "qqqqq is no option of make_plan; it takes preset, "),
        ({"native": True, "preset": "12+1"}, "native=True plans one stage"),
        ({"native": True, "steps": 0}, "steps must be a whole number"),
    ],
)
def test_every_wrong_argument_gets_one_sentence(change: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"family": "flux1-dev", "width": 1024, "height": 1024, **change}
    with pytest.raises(ValueError, match=sentence) as caught:
        make_plan(**arguments)
    assert "\n" not in str(caught.value)


WRONG: list[Any] = [None, True, "512", "x" * 5000, b"x", [], [[[]]], {}, 1.5, -1, 0, 10**400, 10**5000, math.nan, 1e308]


@pytest.mark.parametrize("value", WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_wrong_values_are_named_and_cut(value: Any) -> None:
    low = make_plan("flux1-dev", 1024, 1024).stages[0]
    plan = make_plan("flux1-dev", 1024, 1024)
    for name in ("width", "height", "tokens", "forwards", "solver", "sigmas", "guidance_interval"):
        if name == "sigmas" and value == []:  # no steps, which a later stage may have
            continue
        with pytest.raises(MrFlowError, match=f"^{name} must") as caught:
            replace(low, **{name: value})
        assert len(str(caught.value)) < 300
    for name in (
        "requested_width",
        "requested_height",
        "stages",
        "family",
        "preset",
        "seed_rule",
        "posterior",
        "notes",
    ):
        if isinstance(value, str) and len(value) < 9 and name in ("family", "preset"):
            continue
        with pytest.raises(MrFlowError, match=f"^{name} must") as caught:
            replace(plan, **{name: value})
        assert len(str(caught.value)) < 300
    cases: list[Any] = [(value, 512, 512), ("demo", value, 512), ("demo", 512, value)]
    for arguments in cases:
        with pytest.raises(MrFlowError, match=r"^(family|width|height) ") as caught:
            make_plan(*arguments)
        assert len(str(caught.value)) < 300


def test_limits_of_a_plan() -> None:
    plan = make_plan("flux1-dev", 1024, 1024)
    low, high = plan.stages
    for change, sentence in (
        ({"guidance": 1e308}, "guidance must be a number from 0 to 100, got 1e[+]308"),
        ({"guidance": -5}, "guidance must be a number from 0 to 100, got -5"),
        ({"guidance": 10**400}, "guidance must be a number from 0 to 100, got 1000"),
        ({"forwards": 0}, "forwards must be a whole number from 1 to 1000000, got 0"),
        ({"mu": 21}, "mu must be a number from -20 to 20, got 21"),
        ({"sigmas": [1 - index / 3000 for index in range(3000)]}, "sigmas must hold at most 1001 numbers, got more"),
        ({"sigmas": (1.0, "0.5", 0.0)}, "sigmas must be a list of numbers"),
    ):
        with pytest.raises(MrFlowError, match=sentence):
            replace(low, **change)
    with pytest.raises(MrFlowError, match="stages must hold at most 8 stages, got 300"):
        replace(plan, stages=(low, *[high] * 299))
    with pytest.raises(MrFlowError, match=r"stage 1 must have at most 67108864 pixels \(8192x8192\), got 32768x32768"):
        make_native_plan("sdxl", 32768, 32768)
    with pytest.raises(
        MrFlowError, match="refine_steps must be a whole number from 1 to 125, got 126; the curve 'linear'"
    ):
        make_plan("flux1-dev", 1024, 1024, refine_curve="shifted", refine_steps=126)
    assert make_plan("flux1-dev", 1024, 1024, refine_curve="shifted", refine_steps=125).stages[1].steps == 125
    with pytest.raises(MrFlowError, match="start_sigma must be larger for 20 steps, got 5e-324"):
        make_plan("flux1-dev", 1024, 1024, sigma=5e-324, refine_steps=20)


def test_numbers_of_numpy_are_written_as_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    plan = make_plan("flux1-dev", 1024, 1024, guidance=numpy.float64(2.5), sigma=numpy.float64(0.2))
    assert "guidance=2.5 " in plan.to_string()
    assert StagedPlan.from_string(plan.to_string()) == plan
    stage = Stage(64, 64, 16, numpy.float64(0.5), numpy.array([1.0, 0.5, 0.0]), "euler", numpy.float64(1), 2)
    assert StagedPlan.from_string(StagedPlan("mine", "2+0", 64, 64, (stage,)).to_string()).stages == (stage,)


def test_a_preset_may_count_the_steps_of_every_stage() -> None:
    plan = make_plan("flux1-dev", 2048, 2048, "10+1+2")
    assert ([stage.steps for stage in plan.stages], plan.preset, plan.stages[0].width) == ([10, 1, 2], "10+1+2", 512)
    assert [stage.start_sigma for stage in plan.stages[1:]] == [0.12, 0.12]
    assert make_plan("flux1-dev", 2048, 2048, plan.preset) == plan
    assert make_plan("flux1-dev", 1024, 1024, "10+1") == make_plan("flux1-dev", 1024, 1024, low_steps=10)
    assert make_plan("flux1-dev", 1024, 1024, "10+1", sigma=0.3).stages[1].start_sigma == 0.3
    with pytest.raises(MrFlowError, match="refine_steps must be one number or 3, one for each later stage"):
        make_plan("flux1-dev", 2048, 2048, "10+1+2", stages=4)


@pytest.mark.parametrize(
    ("family", "size", "options", "note"),
    [
        ("flux1-dev", 1024, {"guidance": 0}, "Guidance 0 is far from the 3.5 that FLUX.1-dev is made for"),
        ("flux1-dev", 1024, {"guidance": 100}, "expect a spoiled image, or choose 1 to 10.5."),
        ("sdxl", 1024, {"guidance": 99}, "Guidance 99 is far"),
        ("flux1-dev", 1, {}, "Stage 1 at 16x16 has 1 token, too few to draw anything in"),
        ("flux1-dev", 2048, {"stages": 8}, "Stage 1 at 16x16 has 1 token"),
        ("demo", 112, {}, "Stage 1 at 56x56 has 49 tokens, too few"),
    ],
)
def test_what_spoils_an_image_is_noted(family: str, size: int, options: Any, note: str) -> None:
    plan = make_plan(family, size, size, **options)
    assert note in notes(plan)
    assert note in notes(StagedPlan.from_string(plan.to_string()))
    usual = make_plan(family, 1024 if family != "demo" else 256, 1024 if family != "demo" else 256, guidance=5)
    assert usual.notes == make_plan(family, usual.width, usual.height).notes


def test_hostile_lines_work_out_few_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule is what costs time: eight are read at most, and none of a line that has more stages than a plan."""
    made: list[str] = []

    def noted(recipe: str) -> tuple[float, ...]:
        made.append(recipe)
        return sigmas_from_recipe(recipe)

    monkeypatch.setattr("mrflow_sched.plan.text.sigmas_from_recipe", noted)
    beta = "stage size=8x8 tokens=1 solver=euler guidance=1.0 forwards=1 sigmas=beta {} mu=0.0"
    lines = [
        f"{_HEAD};{';'.join(beta.format(count) for count in range(1000, 1000 - stages, -1))}" for stages in (8, 900)
    ]
    wild = ("mrflow2;" + ";" * 150_000, "mrflow2;stage " * 20_000, f"mrflow1;{'9' * 190_000}")
    for line, schedules in ((lines[0], 8), (lines[1], 0), *((each, 0) for each in wild)):
        made.clear()
        with pytest.raises(MrFlowError) as caught:
            StagedPlan.from_string(line)
        assert len(str(caught.value)) < 500
        assert len(made) <= schedules


def test_stages_that_cannot_be_are_refused() -> None:
    plan = make_plan("demo", 256, 256)
    low, high = plan.stages
    with pytest.raises(ValueError, match=r"stage 1 must start at sigma 1\.0, got 0\.6"):
        replace(plan, stages=(high,))
    with pytest.raises(ValueError, match=r"stage 2 must start below sigma 1\.0"):
        replace(plan, stages=(low, low))
    with pytest.raises(ValueError, match="tokens must"):
        replace(low, tokens=0)
    with pytest.raises(ValueError, match="mu must be a number from -20 to 20, got nan"):
        replace(low, mu=math.nan)


def test_a_stage_may_be_written_by_hand() -> None:
    stage = Stage(64, 64, 16, None, (1.0, 0.5, 0.0), "euler", 1.0, 2)
    assert stage.recipe == "list 1.0 0.5 0.0"
    assert replace(stage, recipe="native 2 mu=0.0").recipe == "native 2 mu=0.0"
    plan = StagedPlan("mine", "2+0", 64, 64, (stage,), native_forwards=4)
    assert plan.cost_ratio == 2.0
