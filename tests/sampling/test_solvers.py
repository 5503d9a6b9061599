"""Solvers: against formulas written out here, against the exact solution, and against each other on mixture flows."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched.engines.analytic import MixtureEngine
from mrflow_sched.plan.schedule import native_sigmas
from mrflow_sched.sampling.solvers import SOLVERS, get_solver, solver_forwards, solver_steps

SECOND_ORDER = ("heun", "multistep", "careful", "dpmpp_2m")
VE_SIGMAS = (14.6, 9.0, 5.4, 3.1, 1.7, 0.9, 0.45, 0.2, 0.08, 0.0)


def gaussian(mean: float = 0.4, variance: float = 0.3, *, ve: bool = False):
    """Denoiser of one Gaussian mode, and its exact path: the solution keeps its quantile of the marginal."""

    def scale(sigma: float) -> float:
        return 1.0 if ve else 1.0 - sigma

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        s = sigma.reshape(-1, *([1] * (x.ndim - 1)))
        a = torch.ones_like(s) if ve else 1.0 - s
        return mean + a * variance / (a**2 * variance + s**2) * (x - a * mean)

    def solution(x: torch.Tensor, start: float, end: float) -> torch.Tensor:
        def spread(sigma: float) -> float:
            return math.sqrt(scale(sigma) ** 2 * variance + sigma**2)

        return scale(end) * mean + spread(end) / spread(start) * (x - scale(start) * mean)

    return model, solution


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture_error(
    engine: MixtureEngine, solver: str, steps: int, guidance: float, truth: torch.Tensor, *, typical: bool = False
) -> float:
    """RMS distance to the converged solution; `typical`: the geometric mean over samples, which no single one rules."""
    extra = {"text": engine.encode_text(["label 0"] * len(truth)), "guidance": guidance}
    found = SOLVERS[solver](engine.denoise, noise(*truth.shape), native_sigmas(steps, mu=0.63), extra)
    square = (found - truth).square().flatten(1).mean(1)
    return (square.log().mean() / 2).exp().item() if typical else square.mean().sqrt().item()


def mixture_reference(engine: MixtureEngine, guidance: float, batch: int = 8) -> torch.Tensor:
    text = engine.encode_text(["label 0"] * batch)
    start = noise(batch, *engine.latent_shape(0, 0))
    return SOLVERS["heun"](engine.denoise, start, native_sigmas(160, mu=0.63), {"text": text, "guidance": guidance})


# -------------------------------------------------------------------------------------------- the calling convention


@pytest.mark.parametrize("name", SOLVERS)
def test_callback_hears_every_step_under_the_keys_of_k_diffusion(name: str) -> None:
    model, _ = gaussian()
    heard: list[dict[str, torch.Tensor]] = []
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    SOLVERS[name](model, noise(2, 3), sigmas, callback=heard.append, disable=True)
    assert [event["i"] for event in heard] == [0, 1, 2]
    assert [round(event["sigma"].item(), 6) for event in heard] == [1.0, 0.7, 0.3]
    assert all(set(event) == {"x", "i", "sigma", "sigma_hat", "denoised"} for event in heard)
    last = heard[-1]
    torch.testing.assert_close(model(last["x"], torch.full((2,), 0.3, dtype=torch.float64)), last["denoised"])


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_forwards_are_what_solver_forwards_says(name: str, steps: int) -> None:
    model, _ = gaussian()
    calls: list[torch.Size] = []

    def counting(x: torch.Tensor, sigma: torch.Tensor, *, extra: str) -> torch.Tensor:
        assert extra == "passed on"
        assert sigma.shape == (4,)
        calls.append(x.shape)
        return model(x, sigma)

    SOLVERS[name](counting, noise(4, 2), native_sigmas(steps), {"extra": "passed on"})
    assert len(calls) == solver_forwards(name, steps)


@pytest.mark.parametrize("name", SOLVERS)
def test_cancel_in_the_callback_stops_before_the_step(name: str) -> None:
    def stop(event: dict[str, torch.Tensor]) -> None:
        if event["i"] == 2:
            raise Cancelled

    model, _ = gaussian()
    with pytest.raises(Cancelled):
        SOLVERS[name](model, noise(1, 2), native_sigmas(6), callback=stop)


@pytest.mark.parametrize("name", SOLVERS)
def test_state_is_float32_whatever_the_network_runs_in(name: str) -> None:
    model, _ = gaussian()
    seen: set[torch.dtype] = set()

    def half(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.add(x.dtype)
        return model(x, sigma).bfloat16()

    out = SOLVERS[name](half, noise(2, 3, dtype=torch.bfloat16), native_sigmas(3))
    assert out.dtype == torch.float32
    assert seen == {torch.float32}


@pytest.mark.parametrize(
    "sigmas", [[0.5], [], [0.5, 0.5, 0.0], [0.2, 0.5, 0.0], [float("nan"), 0.0], [1.0, -0.1], [float("inf"), 0.0]]
)
@pytest.mark.parametrize("name", SOLVERS)
def test_bad_sigma_lists_are_refused(name: str, sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="sigmas must"):
        SOLVERS[name](gaussian()[0], noise(1, 2), sigmas)


def test_unknown_names_and_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'rk4'.*euler, heun, multistep, careful"):
        get_solver("rk4")
    with pytest.raises(ValueError, match="'rk4'"):
        solver_forwards("rk4", 3)
    with pytest.raises(ValueError, match="steps"):
        solver_forwards("euler", -1)
    assert [solver_forwards(name, 0) for name in SOLVERS] == [0] * len(SOLVERS)


# ---------------------------------------------------------------------------------------------------- exact answers


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_to_zero_is_the_denoised_estimate_bit_for_bit(name: str) -> None:
    weight = noise(6, 6, seed=3, dtype=torch.float32)

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x - sigma[:, None] * (x @ weight)

    x = noise(2, 6, dtype=torch.float32)
    assert torch.equal(SOLVERS[name](model, x, [0.12, 0.0]), model(x, torch.full((2,), 0.12)))


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(SOLVERS)),
    levels=st.lists(st.floats(0.01, 14.0), min_size=1, max_size=6, unique=True),
    seed=st.integers(0, 99),
)
def test_a_straight_path_is_walked_exactly(name: str, levels: list[float], seed: int) -> None:
    """With a constant slope every solver returns the clean image, whatever the list."""
    levels = [level for i, level in enumerate(sorted(levels)) if i == 0 or level > 1.001 * sorted(levels)[i - 1]]
    clean, noisy = noise(2, 5, seed=seed), noise(2, 5, seed=seed + 1)

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x - sigma[:, None] * noisy

    out = SOLVERS[name](model, clean + max(levels) * noisy, [*levels[::-1], 0.0])
    torch.testing.assert_close(out, clean, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SECOND_ORDER)
@pytest.mark.parametrize("ve", [False, True])
def test_second_order_solvers_converge_at_second_order(name: str, ve: bool) -> None:
    """Halving the steps quarters the error (nearly), for flow levels and for levels above 1; Euler's is only halved.

    Down to a level above 0, where the log-sigma steps of DPM++ 2M shrink with the others.
    """
    model, solution = gaussian(ve=ve)
    start, end = (4.0, 0.3) if ve else (0.95, 0.2)
    x = noise(3, 4)

    def error(solver: str, steps: int) -> float:
        sigmas = torch.linspace(start, end, steps + 1, dtype=torch.float64)
        return (SOLVERS[solver](model, x, sigmas) - solution(x, start, end)).abs().max().item()

    assert error(name, 320) < error(name, 160) / 3.0
    assert error(name, 160) < error("euler", 160) / 5
    assert 1.8 < error("euler", 160) / error("euler", 320) < 2.2


@pytest.mark.parametrize("name", SOLVERS)
def test_lists_above_one_are_solved_as_truly(name: str) -> None:
    """sigma_ve lists as SD1.5 and SDXL use them; second-order solvers come closer than Euler."""
    model, solution = gaussian(ve=True)
    x = VE_SIGMAS[0] * noise(64, 4)
    truth = solution(x, VE_SIGMAS[0], 0.0)
    euler = (SOLVERS["euler"](model, x, VE_SIGMAS) - truth).abs().mean()
    found = (SOLVERS[name](model, x, VE_SIGMAS) - truth).abs().mean()
    assert found <= euler
    assert found < 0.1


def test_euler_gives_the_same_image_in_flow_and_in_ve_form() -> None:
    """Equal signal-to-noise lists: x_flow = (1 - sigma) x_ve at every level. Multistep agrees only in the limit."""
    (flow, _), (ve, _) = gaussian(), gaussian(ve=True)
    coarse = (0.95, 0.8, 0.55, 0.3, 0.1, 0.0)
    x = noise(4, 3)

    def gap(name: str, sigmas: tuple[float, ...]) -> float:
        in_ve = SOLVERS[name](ve, x / (1 - sigmas[0]), [s / (1 - s) for s in sigmas])
        return (SOLVERS[name](flow, x, sigmas) - in_ve).abs().max().item()

    assert gap("euler", coarse) < 1e-12
    assert gap("multistep", coarse) > 1e-3
    fine = tuple(0.95 * (1 - i / 400) for i in range(401))
    assert gap("multistep", fine) < 1e-3


# --------------------------------------------------------------------------------------- formulas, written out again


def formula_multistep(model, x, sigmas):
    """Adams–Bashforth 2 from its Lagrange form: weights of the line through two slopes, integrated over the step."""
    slopes: list[torch.Tensor] = []
    for i in range(len(sigmas) - 1):
        slopes.append((x - model(x, x.new_full((len(x),), sigmas[i]))) / sigmas[i])
        h = sigmas[i + 1] - sigmas[i]
        if i == 0:
            x = x + h * slopes[0]
        else:
            omega = h / (sigmas[i] - sigmas[i - 1])
            x = x + h * ((1 + omega / 2) * slopes[-1] - omega / 2 * slopes[-2])
    return x


def formula_dpmpp_2m(model, x, sigmas):
    """DPM-Solver++(2M), from the paper's formula: lambda = -log sigma, x' = (s'/s) x - (exp(-h) - 1) D."""
    old, h_old = None, 0.0
    for i in range(len(sigmas) - 1):
        data = model(x, x.new_full((len(x),), sigmas[i]))
        if sigmas[i + 1] == 0:
            return data
        h = math.log(sigmas[i]) - math.log(sigmas[i + 1])
        r = h_old / h
        mixed = data if old is None else (1 + 1 / (2 * r)) * data - 1 / (2 * r) * old
        x = sigmas[i + 1] / sigmas[i] * x - math.expm1(-h) * mixed
        old, h_old = data, h
    return x


def formula_heun(model, x, sigmas):
    for a, b in pairwise(sigmas):
        d = (x - model(x, x.new_full((len(x),), a))) / a
        y = x + (b - a) * d
        if b > 0:
            d = (d + (y - model(y, x.new_full((len(x),), b))) / b) / 2
        x = x + (b - a) * d
    return x


def formula_careful(model, x, sigmas):
    """Predictor and corrector of one sample at a time, with the weights of the rule written out."""

    def size(t):
        return float(t.square().mean()) ** 0.5

    samples: list[torch.Tensor] = []
    for y in x.split(1):
        base, base_slope, told = y, y, None
        for i, (a, b) in enumerate(pairwise(sigmas)):
            slope = (y - model(y, y.new_full((1,), a))) / a
            if i == 0:
                base, y = y, y + (b - a) * slope
            else:
                last = a - sigmas[i - 1]
                turn = slope - base_slope
                trust = 1.0
                if told is not None:
                    trust = 1 - (size(slope - told) / (size(turn) + size(told - base_slope))) ** 4
                behind = trust / (1 + (size(turn) / size(slope)) ** 2)
                base = (1 - behind) * y + behind * (base + last * (base_slope + slope) / 2)
                told = slope + (b - a) / last * turn
                y = base + (b - a) * ((1 - trust) * slope + trust * (slope + told) / 2)
            base_slope = slope
        samples.append(y)
    return torch.cat(samples)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("multistep", formula_multistep),
        ("dpmpp_2m", formula_dpmpp_2m),
        ("heun", formula_heun),
        ("careful", formula_careful),
    ],
)
@pytest.mark.parametrize("sigmas", [native_sigmas(7, mu=0.63), VE_SIGMAS])
def test_solvers_follow_their_formula(name, formula, sigmas) -> None:
    ve = sigmas[0] > 1
    model, _ = gaussian(ve=ve)
    x = sigmas[0] * noise(3, 4)
    torch.testing.assert_close(SOLVERS[name](model, x, sigmas), formula(model, x, sigmas), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("sigmas", [native_sigmas(7, mu=0.63), VE_SIGMAS])
def test_parity_with_k_diffusion_where_it_is_installed(name: str, sigmas: tuple[float, ...]) -> None:
    sampling = pytest.importorskip("k_diffusion.sampling")
    model, _ = gaussian(ve=sigmas[0] > 1)
    x = sigmas[0] * noise(3, 4)
    theirs = getattr(sampling, f"sample_{name}")(model, x, torch.tensor(sigmas, dtype=x.dtype), disable=True)
    torch.testing.assert_close(SOLVERS[name](model, x, sigmas), theirs, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------- truth on mixture flows


@pytest.mark.parametrize("name", SOLVERS)
def test_a_batch_equals_its_samples_alone(name: str) -> None:
    engine = MixtureEngine.random(4, dimensions=8, components=6, labels=2)
    prompts = ["label 0", "label 1", ""]
    x = noise(3, 8, 1, 1, dtype=torch.float32)
    sigmas = native_sigmas(6, mu=0.63)
    together = SOLVERS[name](engine.denoise, x, sigmas, {"text": engine.encode_text(prompts), "guidance": 3.0})
    for i, prompt in enumerate(prompts):
        text = engine.encode_text([prompt])
        alone = SOLVERS[name](engine.denoise, x[i : i + 1], sigmas, {"text": text, "guidance": 3.0})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-6)


def test_multistep_at_12_steps_is_truer_than_euler_at_28() -> None:
    """The analytic case: 64 dimensions, 16 components, mu 0.63; distance to the converged solution."""
    engine = MixtureEngine.random(0)
    truth = mixture_reference(engine, 1.0)
    multistep = {steps: mixture_error(engine, "multistep", steps, 1.0, truth) for steps in (6, 8, 12)}
    euler = {steps: mixture_error(engine, "euler", steps, 1.0, truth) for steps in (12, 20, 28)}
    assert multistep[12] < euler[28] < euler[20] < euler[12]
    assert multistep[6] < euler[12]
    assert multistep[8] < euler[20]


def test_extrapolating_into_the_last_step_is_truer_than_returning_the_estimate() -> None:
    """Why multistep does not end in `denoised` where it has a history."""
    engine = MixtureEngine.random(0)
    truth = mixture_reference(engine, 1.0)
    sigmas = native_sigmas(12, mu=0.63)
    extra = {"text": engine.encode_text(["label 0"] * len(truth)), "guidance": 1.0}
    almost = SOLVERS["multistep"](engine.denoise, noise(*truth.shape), sigmas[:-1], extra)
    estimate = SOLVERS["euler"](engine.denoise, almost, sigmas[-2:], extra)
    plain = (estimate - truth).square().mean().sqrt().item()
    assert mixture_error(engine, "multistep", 12, 1.0, truth) < plain / 2


POOL = (  # seed, components, labels, spread, std, decay: far and near, few and many, flat and picture-like
    (0, 16, 4, 1.0, 0.3, 0.0),
    (1, 40, 8, 0.3, 0.1, 1.0),
    (2, 8, 2, 0.6, 0.3, 0.5),
    (3, 16, 4, 1.0, 0.6, 1.5),
    (5, 40, 8, 0.6, 0.3, 1.0),
)


def test_careful_is_truer_than_the_best_of_the_others() -> None:
    """From 8 steps on, in the mean over mixtures and guidance 1 and 3, against an oracle that picks the best of Euler,
    multistep and DPM++ 2M for each; at 6 steps it is level with the oracle."""
    others = ("euler", "multistep", "dpmpp_2m")
    logs: dict[tuple[str, int], list[float]] = {}
    for seed, components, labels, spread, std, decay in POOL:
        engine = MixtureEngine.random(seed, components=components, labels=labels, spread=spread, std=std, decay=decay)
        for guidance in (1.0, 3.0):
            truth = mixture_reference(engine, guidance)
            for steps in (6, 8, 12, 20):
                error = {
                    n: mixture_error(engine, n, steps, guidance, truth, typical=True) for n in (*others, "careful")
                }
                best = min(error[name] for name in others)
                for name, value in error.items():
                    logs.setdefault((name, steps), []).append(math.log(value / best))
    ratio = {key: math.exp(sum(values) / len(values)) for key, values in logs.items()}
    assert ratio["careful", 6] < 1.1, ratio
    for steps in (8, 12, 20):
        assert ratio["careful", steps] < 0.95, ratio
        assert ratio["careful", steps] < 0.95 * min(ratio[name, steps] for name in others), ratio


def test_careful_with_guidance_3_is_as_true_as_any_single_solver_at_every_count() -> None:
    """In the mean over mixtures, within 5 %, from 4 steps to 12: no count where another solver is the better choice."""
    errors: dict[tuple[str, int], list[float]] = {}
    for seed, components, labels, spread, std, decay in POOL:
        engine = MixtureEngine.random(seed, components=components, labels=labels, spread=spread, std=std, decay=decay)
        truth = mixture_reference(engine, 3.0, batch=32)  # with 8 samples, a single one decides at some counts
        for steps in range(4, 13):
            for name in ("euler", "multistep", "dpmpp_2m", "careful"):
                found = mixture_error(engine, name, steps, 3.0, truth, typical=True)
                errors.setdefault((name, steps), []).append(math.log(found))
    mean = {key: math.exp(sum(values) / len(values)) for key, values in errors.items()}
    for (name, steps), value in mean.items():
        assert mean["careful", steps] <= 1.05 * value, (name, steps, mean)


def test_careful_trusts_a_line_and_distrusts_a_turn() -> None:
    """A slope that goes on straight is trusted fully, one that turns back not at all; the first has no history.

    Steps of one width h and slopes that we choose: 0, 1, then one per sample.
    """
    sigmas, h = (1.0, 0.75, 0.5, 0.25), -0.25
    steps = solver_steps("careful", torch.zeros(3, 2), sigmas)
    x, sigma = next(steps)
    x, sigma = steps.send(x)
    assert torch.equal(x, torch.zeros(3, 2))
    # No prediction yet: trust 1. The slope changed by as much as it is, bend = 1, so half of the correction from 0 to
    # the trapezoid's h/2 is made; then a step with 1 + (1 - 0)/2, the mean slope ahead on the line.
    x, sigma = steps.send(x - sigma * torch.ones(3, 2))
    torch.testing.assert_close(x, torch.full((3, 2), h / 4 + 1.5 * h))
    # That line predicts 2. 1.5 misses it by 0.5 of 0.5 + 1; 0 by all of 1 + 1.
    with pytest.raises(StopIteration) as end:
        steps.send(x - sigma * torch.tensor([2.0, 1.5, 0.0])[:, None])
    trust = 1 - (1 / 3) ** 4
    behind = trust / (1 + (0.5 / 1.5) ** 2)
    half = 1.75 * h + behind * (h / 4 + 1.25 * h - 1.75 * h)
    expected = torch.tensor([1.75 * h + 2.5 * h, half + h * (1.5 + trust * 0.25), 1.75 * h])
    torch.testing.assert_close(end.value.value, expected[:, None].expand(3, 2))
