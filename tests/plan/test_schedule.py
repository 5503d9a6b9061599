from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan import schedule
from mrflow_sched.plan.recipes import explicit_recipe, sigmas_from_recipe
from mrflow_sched.plan.schedule import (
    LOGIT_NORMAL_LARGEST,
    beta_sigmas,
    logit_normal_sigmas,
    mu_flux2,
    mu_for_tokens,
    native_sigmas,
    refine_sigmas,
    scaled_linear_sigmas,
    scaled_linear_ve,
    shift_sigma,
    stretch_to_terminal,
    unshift_sigma,
    validate_sigmas,
)

quick = settings(max_examples=40)
STEPS = st.integers(1, 60)
MUS = st.floats(-3, 4)


def assert_stage1(sigmas: tuple[float, ...], steps: int) -> None:
    assert len(sigmas) == steps + 1
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    assert all(after < before for before, after in pairwise(sigmas))


# ---------------------------------------------------------------------------------------------------------------- shift


@quick
@given(st.floats(0, 1), st.floats(1e-3, 1e3))
@example(1.0, 1 / 3)  # rounds to just above 1
def test_shift_and_unshift_invert_each_other(sigma: float, shift: float) -> None:
    assert unshift_sigma(shift_sigma(sigma, shift), shift) == pytest.approx(sigma, abs=1e-9)
    assert shift_sigma(unshift_sigma(sigma, shift), shift) == pytest.approx(sigma, abs=1e-9)


@quick
@given(st.floats(0.01, 0.99), st.floats(-5, 5))
def test_shift_is_the_exponential_form_of_flux(sigma: float, mu: float) -> None:
    assert shift_sigma(sigma, math.exp(mu)) == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / sigma - 1))


@pytest.mark.parametrize("function", [shift_sigma, unshift_sigma])
@pytest.mark.parametrize(("sigma", "shift"), [(-0.1, 1.0), (1.1, 1.0), (math.nan, 1.0), (0.5, 0.0), (0.5, math.inf)])
def test_shift_refuses(function: object, sigma: float, shift: float) -> None:
    with pytest.raises(ValueError, match=r"sigma must|shift must"):
        function(sigma, shift)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("sigma", "shift", "shifted"),
    [  # what unpatched schedulers make of a refine start (docs/method.md, section 1.5): FLUX.1, shift-3 models, FLUX.2
        (0.12, math.exp(1.15), 0.301),
        (0.12, 3.0, 0.290),
        (0.10, math.exp(2.309), 0.528),
        (0.12, math.exp(2.309), 0.578),
        (0.15, math.exp(2.309), 0.640),
        (0.25, math.exp(2.309), 0.770),
    ],
)
def test_shift_matches_the_traps_of_the_specification(sigma: float, shift: float, shifted: float) -> None:
    assert shift_sigma(sigma, shift) == pytest.approx(shifted, abs=1e-3)


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (1024, 0.63), (4096, 1.15)])
def test_mu_of_flux1(tokens: int, mu: float) -> None:
    assert mu_for_tokens(tokens) == pytest.approx(mu, abs=1e-3)


@pytest.mark.parametrize(("tokens", "mu"), [(1024, 0.539), (4096, 0.694), (8192, 0.9)])
def test_mu_of_qwen(tokens: int, mu: float) -> None:
    assert mu_for_tokens(tokens, max_tokens=8192, max_shift=0.9) == pytest.approx(mu, abs=1e-3)


@pytest.mark.parametrize(
    ("tokens", "steps", "mu"),
    [(1024, 12, 1.974), (1024, 4, 2.031), (4096, 1, 2.309), (5000, 20, 1.30301666), (5000, 4, 1.30301666)],
)
def test_mu_of_flux2(tokens: int, steps: int, mu: float) -> None:
    assert mu_flux2(tokens, steps) == pytest.approx(mu, abs=1e-3)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_counts_must_be_whole_and_positive(bad: int) -> None:
    with pytest.raises(ValueError, match="tokens"):
        mu_for_tokens(bad)
    with pytest.raises(ValueError, match="steps"):
        mu_flux2(1024, bad)
    with pytest.raises(ValueError, match="steps"):
        native_sigmas(bad)


# ------------------------------------------------------------------------------------------------------- stage-1 lists


@quick
@given(STEPS, MUS, st.none() | st.floats(1e-3, 0.5))
def test_native_lists_run_from_one_to_zero(steps: int, mu: float, sigma_min: float | None) -> None:
    sigmas = native_sigmas(steps, mu=mu, sigma_min=sigma_min)
    assert_stage1(sigmas, steps)
    unshifted = [unshift_sigma(sigma, math.exp(mu)) for sigma in sigmas[:-1]]
    gaps = [before - after for before, after in pairwise(unshifted)]
    assert all(gap == pytest.approx(gaps[0], abs=1e-9) for gap in gaps)
    if steps > 1:
        assert unshifted[-1] == pytest.approx(sigma_min or 1 / steps, abs=1e-9)


def test_native_list_of_flux1_at_512_px() -> None:
    # diffusers 0.42, FlowMatchEulerDiscreteScheduler with mu = 0.63 and four steps
    assert native_sigmas(4, mu=0.63) == pytest.approx([1.0, 0.8492, 0.6525, 0.3849, 0.0], abs=1e-4)


def test_native_list_of_qwen_at_512_px() -> None:
    # the same scheduler with mu = 0.539 and shift_terminal = 0.02
    sigmas = native_sigmas(4, mu=0.539, terminal=0.02)
    assert sigmas == pytest.approx([1.0, 0.7493, 0.4326, 0.0200, 0.0], abs=1e-4)


def test_native_list_of_sd3_ends_where_its_scheduler_does() -> None:
    assert native_sigmas(28, mu=math.log(3), sigma_min=0.002994)[-2] == pytest.approx(0.0089286, abs=1e-6)


@pytest.mark.parametrize("mu", [math.nan, math.inf, 21.0])
def test_native_list_refuses_mu(mu: float) -> None:
    with pytest.raises(ValueError, match="mu must"):
        native_sigmas(4, mu=mu)


@pytest.mark.parametrize("sigma_min", [0.0, 1.0, -0.1, math.nan])
def test_native_list_refuses_sigma_min(sigma_min: float) -> None:
    with pytest.raises(ValueError, match="sigma_min must"):
        native_sigmas(4, sigma_min=sigma_min)


@quick
@given(st.integers(2, 60), MUS, st.floats(1e-3, 0.9))
def test_stretching_meets_its_terminal(steps: int, mu: float, terminal: float) -> None:
    plain, stretched = native_sigmas(steps, mu=mu), native_sigmas(steps, mu=mu, terminal=terminal)
    assert_stage1(stretched, steps)
    assert stretched[-2] == terminal
    ratio = (1 - terminal) / (1 - plain[-2])
    assert all(1 - b == pytest.approx((1 - a) * ratio) for a, b in zip(plain[1:-1], stretched[1:-1], strict=True))


def test_stretching_one_step_changes_nothing() -> None:
    assert stretch_to_terminal((1.0, 0.0), 0.02) == (1.0, 0.0)


def test_stretching_refuses_refine_lists_and_wild_terminals() -> None:
    with pytest.raises(ValueError, match=r"must start at 1\.0"):
        stretch_to_terminal((0.12, 0.0), 0.02)
    with pytest.raises(ValueError, match="terminal must"):
        stretch_to_terminal((1.0, 0.5, 0.0), 1.0)


@quick
@given(st.integers(1, 12), st.floats(0.3, 5), st.floats(0.3, 5), st.floats(-2, 2))
def test_beta_lists_run_from_one_to_zero(steps: int, alpha: float, beta: float, mu: float) -> None:
    assert_stage1(beta_sigmas(steps, alpha=alpha, beta=beta, mu=mu), steps)


def test_beta_quantiles_match_closed_forms() -> None:
    fractions = [1 - index / 8 for index in range(9)]
    arcsine = [math.sin(math.pi * fraction / 2) ** 2 for fraction in fractions]
    assert beta_sigmas(8, alpha=0.5, beta=0.5) == pytest.approx(arcsine, abs=1e-12)
    assert beta_sigmas(8, alpha=1.0, beta=1.0) == pytest.approx(fractions, abs=1e-12)
    assert beta_sigmas(8, alpha=3.0, beta=1.0) == pytest.approx([f ** (1 / 3) for f in fractions], abs=1e-12)


def test_beta_list_of_the_paper_is_symmetric_and_crowds_at_the_ends() -> None:
    sigmas = beta_sigmas(8)
    assert sigmas == pytest.approx([1 - sigma for sigma in reversed(sigmas)], abs=1e-12)
    assert sigmas[1] == pytest.approx(0.942844, abs=1e-5)
    assert sigmas[0] - sigmas[1] < 0.5 * (sigmas[3] - sigmas[4])


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_beta_refuses(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        beta_sigmas(4, **{name: 0.0})


def test_beta_distribution_function_at_its_ends_and_middle() -> None:
    assert [schedule._beta_cdf(x, 0.6, 0.6) for x in (0.0, 0.5, 1.0)] == pytest.approx([0.0, 0.5, 1.0], abs=1e-12)


@quick
@given(st.integers(1, 1000))
def test_scaled_linear_lists_run_from_one_to_zero(steps: int) -> None:
    assert_stage1(scaled_linear_sigmas(steps), steps)


def test_scaled_linear_matches_stable_diffusion() -> None:
    table = scaled_linear_ve()
    assert table[-1] == pytest.approx(14.614647, abs=1e-5)
    # Trailing spacing of 30 steps in diffusers' EulerDiscreteScheduler
    assert [s / (1 - s) for s in scaled_linear_sigmas(30)[1:3]] == pytest.approx([12.017748, 9.917175], abs=1e-4)
    with pytest.raises(ValueError, match="steps must be a whole number from 1 to 1000, got 1001"):
        scaled_linear_sigmas(1001)


@pytest.mark.parametrize(
    ("sigma", "timestep"), [(0.10, 13), (0.12, 20), (0.15, 32), (0.16, 37), (0.20, 60), (0.25, 95)]
)
def test_nearest_training_step_of_equal_snr(sigma: float, timestep: int) -> None:
    wanted = sigma / (1 - sigma)
    table = scaled_linear_ve()
    assert min(range(1000), key=lambda index: abs(table[index] - wanted)) == timestep


# -------------------------------------------------------------------------------------------------------- refine lists


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ("linear", [0.12, 0.0]),
        ("linear", [0.12, 0.06, 0.0]),
        ("linear", [0.12, 0.08, 0.04, 0.0]),
        ("linear", [0.12, 0.09, 0.06, 0.03, 0.0]),
        ("shifted", [0.12, 0.0]),
        ("shifted", [0.12, 0.06746, 0.0]),
        ("shifted", [0.12, 0.09208, 0.05422, 0.0]),
        ("shifted", [0.12, 0.10368, 0.08150, 0.04965, 0.0]),
    ],
)
def test_refine_tables_of_the_specification(curve: str, expected: list[float]) -> None:
    assert refine_sigmas(0.12, len(expected) - 1, curve) == pytest.approx(expected, abs=1e-5)


@quick
@given(st.floats(1e-3, 0.999), st.integers(1, 20), st.sampled_from(["linear", "shifted"]))
def test_refine_lists_start_at_the_given_level_and_scale_with_it(start: float, steps: int, curve: str) -> None:
    sigmas = refine_sigmas(start, steps, curve)
    assert sigmas[0] == start
    assert sigmas[-1] == 0.0
    assert len(sigmas) == steps + 1
    shape = refine_sigmas(0.5, steps, curve)
    assert sigmas == pytest.approx([2 * start * sigma for sigma in shape], rel=1e-9)


@pytest.mark.parametrize("start", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_refine_refuses_start(start: float) -> None:
    with pytest.raises(ValueError, match="start_sigma must lie between 0 and 1"):
        refine_sigmas(start, 1)


def test_refine_refuses_curve_and_steps() -> None:
    with pytest.raises(ValueError, match="refine_curve must be"):
        refine_sigmas(0.12, 1, "karras")
    with pytest.raises(ValueError, match="steps must"):
        refine_sigmas(0.12, 0)


@pytest.mark.parametrize(
    ("sigmas", "complaint"),
    [
        ([0.5], "at least two"),
        ([1.0, math.nan, 0.0], "from 0 to 1"),
        ([1.2, 0.0], "from 0 to 1"),
        ([1.0, 0.5, 0.5, 0.0], "must fall"),
        ([0.1, 0.2, 0.0], "must fall"),
        ([1.0, 0.5], "exactly 0"),
    ],
)
def test_validate_refuses(sigmas: list[float], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"levels .*{complaint}"):
        validate_sigmas(sigmas, "levels")


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("recipe", "sigmas"),
    [
        ("native 12 mu=0.63", native_sigmas(12, mu=0.63)),
        ("native 12 mu=0.539 terminal=0.02", native_sigmas(12, mu=0.539, terminal=0.02)),
        ("native 28 mu=1.1 min=0.003", native_sigmas(28, mu=1.1, sigma_min=0.003)),
        ("beta 6 mu=0.2", beta_sigmas(6, mu=0.2)),
        ("scaled-linear 20", scaled_linear_sigmas(20)),
        ("linear 2 start=0.12", (0.12, 0.06, 0.0)),
        ("shifted 3 start=0.15", refine_sigmas(0.15, 3, "shifted")),
        ("list 1.0 0.25 0.0", (1.0, 0.25, 0.0)),
        ("none", ()),
    ],
)
def test_recipes(recipe: str, sigmas: tuple[float, ...]) -> None:
    assert sigmas_from_recipe(recipe) == sigmas


@quick
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=12, unique=True))
def test_explicit_recipes_keep_every_bit(levels: list[float]) -> None:
    sigmas = (*sorted(levels, reverse=True), 0.0)
    assert sigmas_from_recipe(explicit_recipe(sigmas)) == sigmas


def test_the_empty_list_has_a_recipe() -> None:
    assert explicit_recipe(()) == "none"


@pytest.mark.parametrize(
    "recipe",
    [
        "",
        "karras 12",
        "native",
        "native 12",
        "native x mu=1",
        "native 12 mu=x",
        "native 12 mu=1 rho=7",
        "native 1001 mu=1",
        "linear 1",
        "list 1.0 0.5",
        "none 1.0",
    ],
)
def test_bad_recipes_are_refused(recipe: str) -> None:
    with pytest.raises(ValueError):
        sigmas_from_recipe(recipe)


def wrong(function: Any) -> Any:
    """The same function without its types."""
    return function


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: wrong(shift_sigma)(1, 1e-320), None),
        (lambda: unshift_sigma(1, 1e308), None),
        (lambda: wrong(shift_sigma)("0.5", 2), "sigma must lie between 0 and 1, got '0.5'"),
        (lambda: wrong(shift_sigma)(0.5, 10**400), "shift must be a positive number, got 1000"),
        (lambda: wrong(shift_sigma)(0.5, None), "shift must be a positive number, got None"),
        (lambda: mu_for_tokens(10**400), "tokens must be a whole number from 1 to 2147483648"),
        (lambda: mu_for_tokens(64, base_tokens=8, max_tokens=8), "max_tokens must differ from base_tokens, got 8"),
        (lambda: mu_flux2(64, 1001), "steps must be a whole number from 1 to 1000, got 1001"),
        (lambda: wrong(native_sigmas)(10**9), "steps must be a whole number from 1 to 1000, got 1000000000"),
        (lambda: wrong(native_sigmas)(True), "steps must be a whole number from 1 to 1000, got True"),
        (lambda: wrong(native_sigmas)(3, sigma_min="x"), "sigma_min must lie between 0 and 1, got 'x'"),
        (lambda: wrong(beta_sigmas)(57_872), "steps must be a whole number from 1 to 1000, got 57872"),
        (lambda: wrong(beta_sigmas)(9, alpha="x"), "alpha must be a number from 0.2 to 10, got 'x'"),
        (lambda: wrong(refine_sigmas)("0.1", 2), "start_sigma must lie between 0 and 1, got '0.1'"),
        (
            lambda: wrong(refine_sigmas)(0.12, 126, "shifted"),
            "refine_steps must be a whole number from 1 to 125, got 126",
        ),
        (
            lambda: wrong(refine_sigmas)(0.12, 1000, "shifted"),
            "refine_steps must be a whole number from 1 to 125, got 1000",
        ),
        (lambda: wrong(refine_sigmas)(0.12, 2, None), "refine_curve must be 'linear' or 'shifted', got None"),
        (lambda: wrong(validate_sigmas)(3), "sigmas must be a list of numbers, got 3"),
        (lambda: wrong(validate_sigmas)("10"), "sigmas must be a list of numbers, got '10'"),
        (lambda: wrong(validate_sigmas)([1, True, 0]), "sigmas must be a list of numbers"),
        (lambda: wrong(validate_sigmas)(iter([0.5] * 10**6)), "sigmas must hold at most 1001 numbers"),
        (
            lambda: validate_sigmas([1.0, 0.5, 0.5, 0.0]),
            "sigmas must fall from each value to the next, got 0.5 after 0.5",
        ),
        (lambda: wrong(sigmas_from_recipe)(5), "recipe must be text"),
        (lambda: wrong(sigmas_from_recipe)("native 12x mu=0.0"), "lacks its number of steps"),
        (lambda: wrong(sigmas_from_recipe)("native 12"), "lacks mu"),
        (lambda: wrong(sigmas_from_recipe)("native 12 mu=0.5 te\x1b=0.02"), r"do not take: 'te\\x1b'"),
        (
            lambda: wrong(sigmas_from_recipe)("native 2 mu=0 a=1 b=2 c=3 d=4 e=5 f=6 g=7"),
            "has a number twice, or too many",
        ),
    ],
)
def test_numbers_that_no_schedule_has_end_in_a_sentence(call: Any, sentence: str | None) -> None:
    if sentence is None:
        assert call() == 1.0
        return
    with pytest.raises(MrFlowError, match=sentence.replace("+", "[+]")) as caught:
        call()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("count", [1, 2, 3, 12, 125])
def test_the_shifted_curve_falls_up_to_its_limit(count: int) -> None:
    sigmas = refine_sigmas(0.12, count, "shifted")
    assert (len(sigmas), sigmas[0], sigmas[-1]) == (count + 1, 0.12, 0.0)


# ------------------------------------------------------------------------------------------------ models' own schedules


@quick
@given(STEPS, st.floats(-2, 2), st.floats(0.5, 2))
def test_logit_normal_sigmas_are_evenly_spaced_quantiles(steps: int, mu: float, std: float) -> None:
    sigmas = logit_normal_sigmas(steps, mu=mu, std=std)
    assert_stage1(sigmas, steps)
    for index, sigma in enumerate(sigmas[1:-1], 1):
        below = 0.5 * (1 + math.erf((math.log(sigma / (1 - sigma)) - mu) / (std * math.sqrt(2))))
        assert below == pytest.approx(1 - index / steps, abs=1e-9)
    assert sigmas_from_recipe(f"logit-normal {steps} mu={mu:.15f} std={std:.15f}") == pytest.approx(sigmas, abs=1e-9)


def test_logit_normal_sigmas_are_those_of_ideogram_4() -> None:
    # diffusers' _logit_normal_sigmas(4, 0.0, 1.5)
    assert logit_normal_sigmas(4, mu=0.0, std=1.5) == pytest.approx([1.0, 0.733359, 0.5, 0.266641, 0.0], abs=1e-6)
    assert pytest.approx(0.99987661, abs=1e-8) == LOGIT_NORMAL_LARGEST
    with pytest.raises(MrFlowError, match="std must be a number"):
        logit_normal_sigmas(4, mu=0.0, std=0.0)


def test_whole_training_steps_may_be_rounded_up() -> None:
    # diffusers' get_original_sigmas of Bria: indices int(linspace(0, 999, 4)) of 1000 steps
    assert native_sigmas(4, sigma_min=0.001, whole=1000, up=True) == (1.0, 0.667, 0.334, 0.001, 0.0)
    assert native_sigmas(5, sigma_min=0.001, whole=1000, up=True) == (1.0, 0.751, 0.501, 0.251, 0.001, 0.0)
    assert native_sigmas(5, sigma_min=0.001, whole=1000)[1] == 0.75
    assert sigmas_from_recipe("native 5 mu=0.0 min=0.001 whole=1000 up=1")[1] == 0.751
