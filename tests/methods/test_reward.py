"""Gradients of a reward through surrogate paths: what equals what, against autograd and by hand, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.methods.reward import Leg, Surrogate, handed_over, refined_back, roll_out, walk
from mrflow_sched.methods.reward.trajectory import euler_weights, quadrature_weights
from mrflow_sched.methods.reward.variants import spread_picks

SIGMAS = (*(1.0 - step / 6 for step in range(6)), 0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Toy:
    """A velocity that is a small network of the state and the step, and a smooth reward of the result."""

    def __init__(self, sigmas: tuple[float, ...] = SIGMAS, depends: bool = True) -> None:
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        self.depends = depends
        self.noise = torch.randn(2, 4, dtype=torch.float64)
        self.sigmas, self.calls = sigmas, list[int]()
        self.rollout = roll_out(self.velocity, self.noise, sigmas)
        self.calls.clear()

    def velocity(self, step: int, state: Tensor) -> Tensor:
        self.calls += [step] if torch.is_grad_enabled() else []
        level = torch.full((len(state), 1), self.sigmas[step], dtype=state.dtype)
        return self.net(torch.cat([state if self.depends else torch.ones_like(state), level], 1))

    def reward(self, result: Tensor) -> Tensor:
        return torch.sin(result).sum() + (result**2).sum() / 3

    def gradient(self, result: Tensor) -> Tensor:
        found = torch.autograd.grad(self.reward(result), list(self.net.parameters()), allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, self.net.parameters(), strict=True)]
        return torch.cat([part.flatten() for part in parts])

    def exact(self) -> Tensor:
        state = self.noise
        for step in range(self.rollout.steps):
            state = state + (self.sigmas[step + 1] - self.sigmas[step]) * self.velocity(step, state)
        return self.gradient(state)

    def by(self, surrogate: Surrogate, seed: int = 0) -> Tensor:
        return self.gradient(surrogate.backward(self.rollout, self.velocity, generator(seed)).latents)


def legs(toy: Toy, joint: int, first: set[int], second: set[int]) -> list[Leg]:
    return [
        Leg(0, euler_weights(toy.sigmas, 0, joint), frozenset(first), joint),
        Leg(joint, euler_weights(toy.sigmas, joint, 6), frozenset(second), 6),
    ]


def test_full_is_autograd() -> None:
    toy = Toy()
    torch.testing.assert_close(toy.by(Surrogate("full")), toy.exact(), rtol=1e-12, atol=1e-12)


def test_where_the_velocity_ignores_the_state_all_active_steps_are_exact() -> None:
    toy = Toy(depends=False)
    for surrogate in (Surrogate("sparse", count=6), Surrogate("bridge", count=6, coupling=0.3)):
        torch.testing.assert_close(toy.by(surrogate), toy.exact(), rtol=1e-12, atol=1e-12)


def test_all_active_sparse_is_near_and_coupling_brings_it_nearer() -> None:
    toy = Toy()
    exact = toy.exact()
    error = {
        coupling: float(
            (
                toy.gradient(walk(toy.rollout, toy.velocity, legs(toy, 3, {0, 1, 2}, {3, 4, 5}), coupling)[0]) - exact
            ).norm()
        )
        for coupling in (0.0, 0.5, 1.0)
    }
    assert 0 < error[1.0] < error[0.5] < error[0.0] < 0.5 * float(exact.norm())


def test_what_equals_what() -> None:
    toy = Toy()
    last = [Leg(0, euler_weights(SIGMAS, 0, 6), frozenset([5]), 6)]
    draft = toy.gradient(walk(toy.rollout, toy.velocity, last, 0.0)[0])
    clean = walk(toy.rollout, toy.velocity, [Leg(5, {5: -SIGMAS[5]}, frozenset([5]), None)], 0.0)[0]
    torch.testing.assert_close(toy.gradient(clean), draft, rtol=1e-12, atol=1e-12)
    renoised = Surrogate("renoised", copies=0)
    torch.testing.assert_close(toy.by(renoised), draft, rtol=1e-12, atol=1e-12)
    # Bridge without coupling is sparse with the same steps.
    apart = toy.gradient(walk(toy.rollout, toy.velocity, legs(toy, 2, {1}, {2, 4}), 0.0)[0])
    whole = [Leg(0, euler_weights(SIGMAS, 0, 6), frozenset([1, 2, 4]), 6)]
    torch.testing.assert_close(
        toy.gradient(walk(toy.rollout, toy.velocity, whole, 0.0)[0]), apart, rtol=1e-12, atol=1e-12
    )
    # A leap is an interpolation of order 1.
    for seed in range(5):
        options: Any = {"coupling": 0.3, "least": 0.1}
        one, other = (Surrogate("leap", **options), Surrogate("lagrange", order=1, **options))
        torch.testing.assert_close(toy.by(one, seed), toy.by(other, seed), rtol=0, atol=0)


def test_two_steps_are_exact_with_full_coupling() -> None:
    toy = Toy((1.0, 0.4, 0.0))
    bridge = Surrogate("bridge", count=2, coupling=1.0)
    torch.testing.assert_close(toy.by(bridge), toy.exact(), rtol=1e-12, atol=1e-12)


def test_a_scalar_by_hand() -> None:
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def velocity(_: int, state: Tensor) -> Tensor:
        return theta * state

    path = roll_out(velocity, torch.full((1, 1), 1.3, dtype=torch.float64), SIGMAS)

    def gradient(found: list[Leg], coupling: float) -> float:
        return float(torch.autograd.grad(walk(path, velocity, found, coupling)[0].sum(), theta)[0])

    sparse = [Leg(0, euler_weights(SIGMAS, 0, 6), frozenset(range(6)), 6)]
    full = Surrogate("full")._full(path, generator())
    assert gradient(full, 1.0) == pytest.approx(-0.6991, abs=5e-5)
    assert gradient(sparse, 0.0) == pytest.approx(-0.9749, abs=5e-5)
    assert gradient(legs(Toy(), 3, {0, 1, 2}, {3, 4, 5}), 1.0) == pytest.approx(-0.9076, abs=5e-5)


@pytest.mark.parametrize("path", ["full", "sparse", "bridge", "lagrange", "leap"])
def test_the_value_is_the_sampled_one_and_only_active_steps_are_run(path: Any) -> None:
    toy = Toy()
    found = [Surrogate(path, coupling=each).backward(toy.rollout, toy.velocity, generator(4)) for each in (0.0, 1.0)]
    for each in found:
        torch.testing.assert_close(each.latents, toy.rollout.result, rtol=0, atol=1e-15)
        assert each.latents.requires_grad
    assert sorted(toy.calls) == sorted((*found[0].active, *found[1].active))
    assert not any(state.requires_grad for state in (*toy.rollout.states, *toy.rollout.velocities))


def test_gradients_are_affine_in_the_coupling() -> None:
    toy = Toy()
    found = [toy.by(Surrogate("bridge", count=4, coupling=each), 7) for each in (0.0, 0.5, 1.0)]
    torch.testing.assert_close((found[0] + found[2]) / 2, found[1], rtol=1e-10, atol=1e-10)


def test_rescaling_makes_a_constant_velocity_exact_for_any_steps() -> None:
    toy = Toy(depends=False)
    bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def velocity(_: int, state: Tensor) -> Tensor:
        return bias.expand_as(state)

    path = roll_out(velocity, toy.noise, SIGMAS)
    for seed in range(5):
        surrogate = Surrogate("sparse", count=2, rescale=1.0, late=2.0)
        result = surrogate.backward(path, velocity, generator(seed)).latents
        found = torch.autograd.grad(result.sum(), bias)[0]
        torch.testing.assert_close(found, torch.full_like(found, -2.0))  # two rows, each moved by the whole of sigma


def test_unbiased_weights_follow_all_steps_on_average() -> None:
    toy = Toy()
    every = toy.gradient(
        walk(toy.rollout, toy.velocity, [Leg(0, euler_weights(SIGMAS, 0, 6), frozenset(range(6)), 6)], 0.0)[0]
    )

    def mean(surrogate: Surrogate) -> Tensor:
        shared = generator(1)
        ends = [surrogate.backward(toy.rollout, toy.velocity, shared).latents for _ in range(600)]
        return torch.stack([toy.gradient(end) for end in ends]).mean(0)

    options: Any = {"count": 2, "late": 1.5}
    far = float((mean(Surrogate("sparse", **options)) - every).norm() / every.norm())
    near = float((mean(Surrogate("sparse", unbiased=True, **options)) - every).norm() / every.norm())
    assert near < 0.05 < 0.3 < far


def test_quadrature_is_exact_for_its_order() -> None:
    for order, power in ((1, 0), (2, 1), (3, 2)):
        weights = quadrature_weights(SIGMAS, 1, 6, order)
        assert sum(weights.values()) == pytest.approx(SIGMAS[6] - SIGMAS[1], abs=1e-12)
        value = sum(weight * SIGMAS[step] ** power for step, weight in weights.items())
        assert value == pytest.approx((SIGMAS[6] ** (power + 1) - SIGMAS[1] ** (power + 1)) / (power + 1), abs=1e-12)
    assert quadrature_weights(SIGMAS, 2, 5, 1) == {2: pytest.approx(SIGMAS[5] - SIGMAS[2])}


@pytest.mark.parametrize(("count", "late"), [(1, 2.0), (3, 0.0), (4, 3.0), (9, 1.0)])
def test_picks_are_exact_in_number_and_chance(count: int, late: float) -> None:
    chances = torch.arange(1, 10, dtype=torch.float64) ** late
    chances = chances / chances.sum()
    shared, seen, inside = generator(), torch.zeros(9), torch.zeros(9)
    for _ in range(4000):
        picked, inside = spread_picks(chances, count, shared)
        assert len(set(picked)) == count
        seen[picked] += 1
    torch.testing.assert_close(seen / 4000, inside.float(), rtol=0, atol=0.03)
    assert float(inside.sum()) == pytest.approx(count)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"path": "short"}, "path must be one of full, sparse, bridge"),
        ({"count": 0}, "count must lie from 1 to 1000, got 0"),
        ({"coupling": 1.5}, "coupling must lie from 0.0 to 1.0"),
        ({"path": "sparse", "unbiased": True, "rescale": 0.5}, "with rescale 0"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(given: Any, words: str) -> None:
    with pytest.raises(MrFlowError, match=words):
        Surrogate(**given)


def test_all_ways_reach_a_target() -> None:
    target = torch.tensor([[0.4, -0.3]], dtype=torch.float64)
    noise = torch.randn(4, 2, generator=generator(), dtype=torch.float64)
    for path in ("full", "sparse", "bridge", "lagrange", "leap", "clean", "renoised", "detached"):
        theta = nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))

        def velocity(_: int, state: Tensor, theta: Any = theta) -> Tensor:
            return theta.repeat(len(state) // 4, 1)

        optimiser, shared = torch.optim.SGD([theta], lr=0.4), generator(2)
        for _ in range(200):
            rollout = roll_out(velocity, noise, SIGMAS)
            end = Surrogate(path, least=0.0, copies=0).backward(rollout, velocity, shared)  # pyright: ignore[reportArgumentType]
            loss = ((end.latents - target) ** 2).sum(1) @ end.weights.to(end.latents)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert float((roll_out(velocity, noise, SIGMAS).result - target).abs().max()) < 1e-3, path


# -------------------------------------------------------------------------------------------------------- staged runs


class Staged:
    """One convolution for both sizes, one step each, and an upsampler for the hand-off."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1)).double()
        shape = (2, 3, 4, 4)
        self.first, self.more = torch.randn(shape, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
        self.low = roll_out(self.velocity, self.first, (1.0, 0.0))
        self.high = roll_out(self.velocity, self.noised(self.carry(self.low.result)).detach(), (0.3, 0.0))

    def velocity(self, _: int, state: Tensor) -> Tensor:
        return self.net(state)

    def carry(self, low: Tensor) -> Tensor:
        return nn.functional.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)

    def noised(self, clean: Tensor) -> Tensor:
        return 0.7 * clean + 0.3 * self.more

    def gradient(self, result: Tensor) -> Tensor:
        found = torch.autograd.grad((torch.sin(result) + result**2 / 3).sum(), list(self.net.parameters()))
        return torch.cat([part.flatten() for part in found])

    def exact(self) -> Tensor:
        state = self.noised(self.carry(self.first - self.velocity(0, self.first)))
        return self.gradient(state - 0.3 * self.velocity(0, state))

    def by(self, through: Any, coupling: float = 1.0) -> Tensor:
        low = Surrogate("full").backward(self.low, self.velocity, generator()).latents
        value = self.carry(self.low.result)
        handed = handed_over(low, value, through, self.carry)
        result = refined_back(self.high, self.velocity, handed, coupling=coupling)
        torch.testing.assert_close(result, self.high.result, rtol=0, atol=1e-14)
        return self.gradient(result)


def test_a_staged_run_is_followed_back_exactly_with_full_coupling() -> None:
    staged = Staged()
    exact = staged.exact()
    for through in ("vjp", "up"):  # the same here, where the hand-off is that very upsampler
        torch.testing.assert_close(staged.by(through), exact, rtol=1e-10, atol=1e-12)
    half, none = staged.by("vjp", 0.5), staged.by("vjp", 0.0)
    torch.testing.assert_close((exact + none) / 2, half, rtol=1e-10, atol=1e-12)
    alone = staged.by("none")
    assert float((alone - exact).norm()) > 0.3 * float(exact.norm())
    assert float((none - exact).norm()) < float((alone - exact).norm())


def test_what_cannot_be_followed_back_is_refused() -> None:
    low, value = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8)
    with pytest.raises(MrFlowError, match="through must be one of none, up, vjp, got 'down'"):
        handed_over(low, value, "down")  # pyright: ignore[reportArgumentType]
    with pytest.raises(MrFlowError, match="give carry too"):
        handed_over(low, value, "vjp")
