"""Previews: what is exact about nested noise and the commutator-zero chain, on models with closed-form answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from mrflow_sched import make_native_plan, sample_staged
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.analytic import GaussianFieldEngine
from mrflow_sched.methods.previews import (
    Chain,
    CommutatorGuidance,
    DownSelector,
    Head,
    Nested,
    Switched,
    averaged,
    commutator_norms,
    euler_tail,
    guided,
    in_pixels,
    select_phase,
    selected,
)
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampling.noise import draw_noise
from mrflow_sched.sampling.shrink import shrink_noise
from mrflow_sched.sampling.solvers import sample_euler

STEPS = 12
SIGMAS = tuple(1 - step / STEPS for step in range(STEPS + 1))
OFF = CommutatorGuidance(steps=0)
Velocity = Callable[[Tensor, Tensor], Tensor]
Model = Callable[[Tensor, Tensor], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model_of(velocity: Velocity) -> Model:
    """The clean estimate of a velocity u(x, sigma)."""
    return lambda x, sigma: x - sigma.reshape(-1, 1, 1, 1) * velocity(x, sigma)


def head_of(model: Model, noise: Tensor, switch: int) -> Head:
    state = noise if switch == 0 else sample_euler(model, noise, SIGMAS[: switch + 1])
    sigma = torch.full((len(state),), SIGMAS[switch], dtype=state.dtype)
    return Head(state, (state - model(state, sigma)) / SIGMAS[switch], noise, SIGMAS[switch:])


def pointwise(x: Tensor, sigma: Tensor) -> Tensor:
    """Each latent by itself, and nothing linear."""
    return torch.tanh(3 * x) + torch.cos(2 * x) + sigma.reshape(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------------- selectors and their noise


@pytest.mark.parametrize("size", [1, 2, 3])
def test_selectors_take_every_latent_once_and_give_it_back(size: int) -> None:
    x, fill = normal(2, 3, 6, 12), normal(2, 3, 6, 12, seed=1)
    seen = torch.zeros_like(x)
    for phase in range(size**2):
        selector = DownSelector(size, phase)
        full = selector.scatter(selector.down(x), fill)
        assert torch.equal(selector.down(full), selector.down(x))
        assert int((full != fill).sum()) == x.numel() // size**2 if size > 1 else torch.equal(full, x)
        seen += selector.scatter(torch.ones_like(selector.down(x)), torch.zeros_like(x))
    assert torch.equal(seen, torch.ones_like(seen))


def test_the_phases_of_white_noise_are_white_and_independent_and_an_average_is_too_weak() -> None:
    noise = normal(20000, 1, 4, 4, seed=2)
    phases = torch.stack([DownSelector(2, k).down(noise).flatten(1) for k in range(4)])  # (4, N, 4)
    rows = phases.transpose(0, 1).flatten(1)
    covariance = rows.T @ rows / len(rows)
    assert (covariance - torch.eye(16)).abs().max() < 0.05
    assert float(functional.avg_pool2d(noise, 2).var()) == pytest.approx(1 / 4, rel=0.05)
    assert float(shrink_noise(noise, 2, 2).var()) == pytest.approx(1.0, rel=0.05)


def test_odd_sides_and_wrong_phases_are_refused() -> None:
    with pytest.raises(MrFlowError, match="5 rows and 4 columns, which polyphase selectors cannot shrink by 2"):
        DownSelector(2, 0).down(normal(1, 1, 5, 4))
    with pytest.raises(MrFlowError, match="phase must be from 0 to 3, got 4"):
        DownSelector(2, 4)
    with pytest.raises(MrFlowError, match="size must be 1 or more, got 0"):
        DownSelector(0)
    with pytest.raises(MrFlowError, match="fill has the shape"):
        DownSelector(2).scatter(normal(1, 1, 2, 2), normal(1, 1, 6, 4))


# ----------------------------------------------------------------------------------------------- exact on closed forms


@pytest.mark.parametrize("phase", range(4))
def test_a_pointwise_velocity_commutes_to_the_last_bit(phase: int) -> None:
    model, noise, down = model_of(pointwise), normal(2, 3, 8, 8), DownSelector(2, phase).down
    full = sample_euler(model, noise, SIGMAS)
    assert torch.equal(down(full), sample_euler(model, down(noise), SIGMAS))
    for switch in (0, 4, 11):
        head = head_of(model, noise, switch)
        norms, _ = commutator_norms(head, model)
        assert float(norms.abs().max()) == 0.0
        switched = selected(head, [phase] * 2)
        assert torch.equal(euler_tail(model, switched, OFF), down(full))
        once = CommutatorGuidance(alpha=0.5, steps=1)  # the target is exact at the switch: nothing is moved
        assert torch.allclose(euler_tail(model, switched, once), down(full), rtol=0, atol=1e-12)


def test_an_average_does_not_commute_with_a_velocity_that_is_not_linear() -> None:
    x, sigma = normal(1, 1, 8, 8), torch.tensor([0.5])
    of_mean = pointwise(functional.avg_pool2d(x, 2), sigma)
    assert float((functional.avg_pool2d(pointwise(x, sigma), 2) - of_mean).abs().max()) > 0.1


def phased(variances: tuple[float, ...]) -> Velocity:
    """Exact for data whose phase k is white with variance s_k^2; the small model is that of phase 2."""

    def slope(variance: float, sigma: float) -> float:
        t = 1 - sigma
        return -(variance * t - sigma) / (variance * t**2 + sigma**2)  # u = -v

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma[0])
        if x.shape[-1] == 4:
            return slope(variances[2], level) * x
        full = torch.empty_like(x)
        for phase, variance in enumerate(variances):
            full[..., phase // 2 :: 2, phase % 2 :: 2] = slope(variance, level) * DownSelector(2, phase).down(x)
        return full

    return velocity


def test_argmin_finds_the_phase_whose_model_the_small_one_is() -> None:
    variances = (4.0, 0.25, 1.5, 9.0)
    model, noise = model_of(phased(variances)), normal(3, 2, 8, 8)
    head = head_of(model, noise, 5)
    norms, _ = commutator_norms(head, model)
    level = torch.tensor([SIGMAS[5]], dtype=torch.float64)
    unit = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    slopes = [float(DownSelector(2, k).down(phased(variances)(unit, level)).mean()) for k in range(4)]
    for k in range(4):
        wanted = abs(slopes[k] - slopes[2]) * DownSelector(2, k).down(head.state).flatten(1).norm(dim=1)
        assert torch.allclose(norms[k], wanted, atol=1e-9)
    phases, estimates = select_phase(head, model)
    assert phases == [2, 2, 2]
    small = DownSelector(2, 2).down(head.state)
    assert torch.equal(estimates, model(small, level.expand(3)))


def test_each_image_of_a_batch_has_a_phase_of_its_own() -> None:
    """The field of one image is exact in phase 1, that of the other in phase 3."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        y = pointwise(x, sigma)
        if x.shape[-1] == 8:
            for row, exact in enumerate((1, 3)):
                for phase in {0, 1, 2, 3} - {exact}:
                    y[row, :, phase // 2 :: 2, phase % 2 :: 2] += 0.3
        return y

    model, noise = model_of(velocity), normal(2, 1, 8, 8)
    head = head_of(model, noise, 3)
    phases, estimates = select_phase(head, model)
    assert phases == [1, 3]
    switched = selected(head, phases)
    assert torch.equal(switched.state[1], DownSelector(2, 3).down(head.state[1]))
    assert torch.equal(estimates[0], model(switched.state, torch.full((2,), SIGMAS[3], dtype=torch.float64))[0])


def test_before_the_first_step_the_norms_say_nothing_of_the_seed() -> None:
    mean_full, mean_small = normal(1, 1, 8, 8, seed=5), normal(1, 1, 4, 4, seed=6)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:  # exact at sigma 1 for data of these means
        return x - (mean_full if x.shape[-1] == 8 else mean_small)

    noise = normal(5, 1, 8, 8)
    head = head_of(model_of(velocity), noise, 0)
    norms, _ = commutator_norms(head, model_of(velocity))
    for k in range(4):
        wanted = float((DownSelector(2, k).down(mean_full) - mean_small).norm())
        assert norms[k].tolist() == pytest.approx([wanted] * 5, rel=1e-9)
    phases, estimates = select_phase(head, lambda x, sigma: pytest.fail("an evaluation that says nothing"))
    assert phases == [0] * 5
    assert estimates.numel() == 0


def test_haar_means_commute_with_gaussian_flows_of_their_own_covariance() -> None:
    """Sigma = D^T S D + tau^2 (I - D^T D) keeps the rows of D to themselves: the commutator is 0, not so a phase's."""
    side, tau = 8, 0.3
    basis = torch.eye(side * side, dtype=torch.float64).reshape(-1, 1, side, side)
    haar = 2 * functional.avg_pool2d(basis, 2).flatten(1).T  # (16, 64)
    root = normal(16, 16, seed=7) / 4
    small = root @ root.T + 0.1 * torch.eye(16, dtype=torch.float64)
    full = haar.T @ small @ haar + tau**2 * (torch.eye(64, dtype=torch.float64) - haar.T @ haar)

    def velocity(covariance: Tensor, x: Tensor, sigma: float) -> Tensor:
        t = 1 - sigma
        unit = torch.eye(len(covariance), dtype=torch.float64)
        return -(t * covariance - sigma * unit) @ torch.linalg.solve(t**2 * covariance + sigma**2 * unit, x)

    x = normal(64, 3, seed=8)
    gap = haar @ velocity(full, x, 0.6) - velocity(small, haar @ x, 0.6)
    assert float(gap.abs().max()) < 1e-12
    phase = DownSelector(2, 0).down(basis).flatten(1).T.contiguous()
    aliased = phase @ velocity(full, x, 0.6) - velocity(phase @ full @ phase.T, phase @ x, 0.6)
    assert float(aliased.abs().max()) > 0.05


# ------------------------------------------------------------------------------------------------------------ guidance


def in_t_form(
    v: Velocity, state: Tensor, target: Tensor, ts: tuple[float, ...], guidance: CommutatorGuidance
) -> Tensor:
    """The published loop, with t = 1 - sigma and v = dx/dt, written by itself."""
    x = state
    for i, t in enumerate(ts[:-1]):
        at, following = torch.full((len(x),), t, dtype=x.dtype), torch.full((len(x),), ts[i + 1], dtype=x.dtype)
        w = v(x, at)
        acts = guidance.first <= i < guidance.first + guidance.steps
        if acts and not guidance.after:
            x = x + guidance.alpha * (target - w)
            w = v(x, at) if guidance.again else w
        x = x + (ts[i + 1] - t) * w
        if acts and guidance.after and ts[i + 1] < 1:
            x = x + guidance.alpha * (target - (v(x, following) if guidance.again else w))
    return x


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_the_sigma_form_is_the_published_t_form(again: bool, after: bool, first: int) -> None:
    guidance = CommutatorGuidance(alpha=0.1, steps=3, first=first, again=again, after=after)
    model, noise = model_of(pointwise), normal(2, 3, 8, 8)
    head = head_of(model, noise, 4)._replace(velocity=normal(2, 3, 8, 8, seed=9))
    switched = selected(head, [1, 2])
    found = euler_tail(model, switched, guidance)
    times = tuple(1 - sigma for sigma in switched.sigmas)
    wanted = in_t_form(lambda x, t: -pointwise(x, 1 - t), switched.state, -switched.target, times, guidance)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    wrong = in_t_form(lambda x, t: -pointwise(x, 1 - t), switched.state, switched.target, times, guidance)
    assert float((found - wrong).abs().max()) > 0.1


@pytest.mark.parametrize("slope", [-2.0, -0.5, 0.7, 3.0])
@pytest.mark.parametrize("alpha", [0.01, 0.04, 0.5])
def test_the_residual_of_a_linear_field_shrinks_by_one_minus_alpha_lambda(slope: float, alpha: float) -> None:
    """In t-form v = lambda x and r = T - v: an update multiplies r by 1 - alpha lambda, whatever its sign."""
    model = model_of(lambda x, sigma: -slope * x)
    state, target = normal(1, 1, 4, 4), normal(1, 1, 4, 4, seed=1)
    sigmas = (0.5, 0.5 - 1e-9, 0.0)  # a step of next to no width shows the update alone
    guidance = CommutatorGuidance(alpha=alpha, steps=1)
    switched = Switched(state, target, sigmas)
    moved: list[Tensor] = []
    seen = guided(model, switched, guidance)

    def watch(x: Tensor, sigma: Tensor) -> Tensor:
        moved.append(x)
        return seen(x, sigma)

    sample_euler(watch, state, sigmas)
    before, after = target + slope * state, target + slope * moved[1]  # r = T - u, u = -lambda x
    assert torch.allclose(after, (1 - alpha * slope) * before, atol=1e-6)


def test_variant_s_with_alpha_of_the_step_takes_the_stored_velocity() -> None:
    model, noise = model_of(pointwise), normal(1, 2, 8, 8)
    head = head_of(model, noise, 6)._replace(velocity=normal(1, 2, 8, 8, seed=3))
    switched = selected(head, [0])
    width = SIGMAS[6] - SIGMAS[7]
    found = euler_tail(model, switched, CommutatorGuidance(alpha=width, steps=1))
    by_hand = switched.state - width * switched.target
    assert torch.allclose(found, sample_euler(model, by_hand, SIGMAS[7:]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "off", [CommutatorGuidance(alpha=0.0), CommutatorGuidance(steps=0), CommutatorGuidance(first=99)]
)
def test_no_guidance_is_the_plain_walk_to_the_last_bit(off: CommutatorGuidance) -> None:
    model, noise = model_of(pointwise), normal(2, 2, 8, 8)
    head = head_of(model, noise, 4)._replace(velocity=normal(2, 2, 8, 8, seed=3))
    switched = selected(head, [3, 1])
    assert torch.equal(euler_tail(model, switched, off), sample_euler(model, switched.state, SIGMAS[4:]))


def test_before_and_after_are_the_same_where_the_evaluation_is_shared() -> None:
    model, noise = model_of(pointwise), normal(1, 2, 8, 8)
    switched = selected(head_of(model, noise, 4)._replace(velocity=normal(1, 2, 8, 8, seed=3)), [0])
    before, after = (euler_tail(model, switched, CommutatorGuidance(after=after)) for after in (False, True))
    assert torch.equal(before, after)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(0, 3))
def test_the_small_run_drifts_no_further_than_the_bound(seed: int, phase: int) -> None:
    """|z(1) - D x(1)| <= integral of |[D, v](x_t)| e^(L (1 - t)) for a small velocity that is L-Lipschitz."""
    mixing = normal(64, 64, seed=seed) / 12
    small = normal(16, 16, seed=seed + 1) / 6
    lipschitz = float(torch.linalg.matrix_norm(small, 2))
    down = DownSelector(2, phase).down
    steps = 200

    def large_v(x: Tensor) -> Tensor:
        return (mixing @ x.flatten()).reshape(x.shape)

    def small_v(x: Tensor) -> Tensor:
        return (small @ x.flatten()).reshape(x.shape)

    x = normal(1, 1, 8, 8, seed=seed + 2)
    sigmas = tuple(1 - step / steps for step in range(steps + 1))
    found = sample_euler(model_of(lambda z, _: -small_v(z)), down(x), sigmas)
    bound = 0.0
    for step in range(steps):
        gap = float((down(large_v(x)) - small_v(down(x))).norm())
        bound += gap * math.exp(lipschitz * (1 - step / steps)) / steps
        x = x + large_v(x) / steps
    assert float((found - down(x)).norm()) <= bound


# --------------------------------------------------------------------------------------------------- other down-maps


def test_an_average_is_a_state_of_the_small_run_at_its_own_level() -> None:
    """x = (1 - s) x0 + s n: the scaled mean is (1 - s') mean(x0) + s' 2 mean(n), and the target their difference."""
    clean, noise, sigma = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1), SIGMAS[4]
    head = Head((1 - sigma) * clean + sigma * noise, noise - clean, noise, SIGMAS[4:])
    switched = averaged(head, 4, 4)
    level = switched.sigmas[0]
    assert level / (1 - level) == pytest.approx(sigma / (1 - sigma) / 2)
    mean, white = functional.avg_pool2d(clean, 2), 2 * functional.avg_pool2d(noise, 2)
    assert torch.allclose(switched.state, (1 - level) * mean + level * white, atol=1e-12)
    assert torch.allclose(switched.target, white - mean, atol=1e-12)
    assert all(left > right for left, right in zip(switched.sigmas, switched.sigmas[1:], strict=False))
    with pytest.raises(MrFlowError, match="no multiple of 3 and 4"):
        averaged(head, 3, 4)
    with pytest.raises(MrFlowError, match="noise alone"):
        averaged(head._replace(sigmas=SIGMAS), 4, 4)


def test_a_clean_estimate_shrunk_as_a_picture_gets_the_given_noise() -> None:
    clean, noise, small = normal(1, 3, 8, 8), normal(1, 3, 8, 8, seed=1), normal(1, 3, 4, 4, seed=2)
    sigma = SIGMAS[3]
    head = Head((1 - sigma) * clean + sigma * noise, noise - clean, noise, SIGMAS[3:])
    switched = in_pixels(head, lambda each: functional.avg_pool2d(each, 2), small)
    mean = functional.avg_pool2d(clean, 2)
    assert torch.allclose(switched.state, (1 - sigma) * mean + sigma * small, atol=1e-12)
    assert torch.allclose(switched.target, small - mean, atol=1e-12)
    assert torch.allclose(head.noise_estimate, noise, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- as methods


@dataclass(frozen=True)
class Counting:
    """An engine around the exact Gaussian field that counts its evaluations by height."""

    inner: GaussianFieldEngine
    seen: dict[int, int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def denoise(self, x: Tensor, sigma: Tensor, text: Any, *, guidance: float) -> Tensor:
        self.seen[x.shape[-2]] = self.seen.get(x.shape[-2], 0) + 1
        return self.inner.denoise(x, sigma, text, guidance=guidance)


ENGINE = GaussianFieldEngine()


def plans(steps: int = 9, **more: Any) -> tuple[StagedPlan, StagedPlan]:
    """A native plan of 64 px and the same schedule at 32 px."""
    full = make_native_plan(ENGINE.family, 64, 64, steps=steps, seed=5, **more)
    stage = replace(full.stages[0], width=32, height=32, tokens=16)
    return full, replace(full, stages=(stage,), requested_width=32, requested_height=32)


def latents(plan: StagedPlan, method: Any = None, engine: Any = ENGINE) -> Tensor:
    found = sample_staged(engine, plan, ["a", "b"], method=method).latents
    assert found is not None
    return found


@pytest.mark.parametrize("switch", [0, 1, 4, 8])
def test_a_chain_that_does_not_shrink_is_the_plain_run_to_the_last_bit(switch: int) -> None:
    full, _ = plans()
    chain = Chain(full=(64, 64), down="polyphase", size=1, switch=switch, guidance=OFF)
    assert torch.equal(latents(full, chain), latents(full))
    once = replace(chain, guidance=CommutatorGuidance(steps=1))
    assert torch.allclose(latents(full, once), latents(full), rtol=0, atol=1e-4)


def test_a_chain_without_head_and_guidance_is_a_small_run_from_the_noise_of_its_phase() -> None:
    _, small = plans()
    chain = Chain(full=(64, 64), down="polyphase", switch=0, phase=3, guidance=OFF)
    noise = draw_noise(ENGINE.latent_shape(64, 64), [5, 6])

    @dataclass(frozen=True)
    class From(Nested):
        def start(self, run: Any, image: Tensor | None) -> Tensor:
            return DownSelector(2, 3).down(noise).contiguous()

    assert torch.equal(latents(small, chain), latents(small, From(full=(64, 64))))
    unselected = replace(chain, phase=None)
    assert torch.equal(latents(small, unselected), latents(small, replace(chain, phase=0)))


def test_nested_starts_from_the_haar_mean_of_the_full_runs_noise() -> None:
    _, small = plans()
    noise = draw_noise(ENGINE.latent_shape(64, 64), [5, 6])

    class Starts(Exception):
        pass

    @dataclass(frozen=True)
    class Watch(Nested):
        def stage(self, run: Any, latents: Tensor) -> Tensor:
            assert torch.equal(latents, 2 * functional.avg_pool2d(noise, 2))
            raise Starts

    with pytest.raises(Starts):
        sample_staged(ENGINE, small, ["a", "b"], method=Watch(full=(64, 64)))
    picture = torch.zeros(1, 3, 32, 32)
    with pytest.raises(MrFlowError, match="leave the image out"):
        sample_staged(ENGINE, small, "a", image=picture, start_sigma=0.5, method=Nested(full=(64, 64)))


@pytest.mark.parametrize(
    ("chain", "wanted"),
    [
        (Chain(full=(64, 64), down="polyphase"), (4, 9)),  # 3 + 1; 6 left, the first of them among the four phases
        (Chain(full=(64, 64), down="polyphase", phase=1), (4, 6)),
        (Chain(full=(64, 64), down="polyphase", switch=0), (1, 9)),
        (Chain(full=(64, 64), down="pixels", switch=5), (6, 4)),
        (Chain(full=(64, 64), down="pixels", guidance=CommutatorGuidance(again=True, steps=2)), (4, 8)),
        (Chain(full=(64, 64), down="pixels", guidance=CommutatorGuidance(again=True, steps=99, after=True)), (4, 11)),
        (Chain(full=(64, 64), down="average"), (4, None)),
    ],
)
def test_evaluations_are_those_that_are_made(chain: Chain, wanted: tuple[int, int | None]) -> None:
    _, small = plans()
    engine = Counting(ENGINE, {})
    latents(small, chain, engine)
    full, rest = chain.evaluations(small.stages[0].sigmas)
    assert engine.seen == {ENGINE.latent_shape(64, 64)[1]: full, ENGINE.latent_shape(32, 32)[1]: rest}
    assert full == wanted[0]
    assert wanted[1] in (None, rest)


@pytest.mark.parametrize("down", ["pixels", "average", "polyphase"])
def test_the_chain_acts_on_the_guided_velocity(down: str) -> None:
    """For this field CFG at scale 3 is the plain model of a mean three times as far from the negative prompt's."""
    guided_family = replace(ENGINE.family, guidance_kind="cfg")
    far, near = ({"a": tuple(each * scale for each in (0.5, 0.1, -0.5))} for scale in (3.0, 1.0))
    chain, made = Chain(full=(64, 64), down=down), []
    for means, scale in ((far, 1.0), (near, 3.0), (near, 1.0)):
        engine = replace(ENGINE, means=means, family=guided_family)
        _, small = plans()
        plan = replace(small, stages=(replace(small.stages[0], guidance=scale),))
        made.append(latents(plan, chain, engine))
    assert torch.allclose(made[0], made[1], atol=1e-4)
    assert float((made[0] - made[2]).abs().max()) > 0.1


def test_what_the_chain_cannot_do_is_refused() -> None:
    _, small = plans()
    epsilon = replace(ENGINE, family=replace(ENGINE.family, prediction="epsilon"))
    plan = make_native_plan(epsilon.family, 32, 32, steps=4)
    with pytest.raises(MrFlowError, match="for flow models, and analytic predicts epsilon"):
        sample_staged(epsilon, plan, "a", method=Chain(full=(64, 64)))
    heun = replace(small, stages=(replace(small.stages[0], solver="heun"),))
    with pytest.raises(MrFlowError, match="Euler steps, and the plan's solver is heun"):
        sample_staged(ENGINE, heun, "a", method=Chain(full=(64, 64)))
    with pytest.raises(MrFlowError, match=r"strided position ids .* the image worse"):
        Chain(full=(64, 64), positions="strided")
    with pytest.raises(MrFlowError, match="down must be one of pixels, average, polyphase, got 'nearest'"):
        Chain(full=(64, 64), down="nearest")
    with pytest.raises(MrFlowError, match="switch is 9, and the run has 9 steps"):
        sample_staged(ENGINE, small, "a", method=Chain(full=(64, 64), switch=9))
    with pytest.raises(MrFlowError, match="choose a size that halves exactly"):
        sample_staged(ENGINE, small, "a", method=Chain(full=(96, 96), down="polyphase", phase=0))
    with pytest.raises(MrFlowError, match="alpha must be 0 or more, got -1"):
        CommutatorGuidance(alpha=-1)


def test_a_stopped_chain_stops_before_the_next_evaluation() -> None:
    _, small = plans()
    engine: Any = Counting(ENGINE, {})
    done = sample_staged(engine, small, "a", method=Chain(full=(64, 64)), cancel=lambda: sum(engine.seen.values()) >= 6)
    assert done.cancelled
    assert sum(engine.seen.values()) == 6
