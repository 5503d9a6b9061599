"""Just-in-Time sampling on a stand-in network of tokens: what is exact, what is counted, what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from token_engine import TokenEngine, pack
from torch import Tensor

from mrflow_sched import MrFlowError
from mrflow_sched.methods import Jit, Plain, StageRun
from mrflow_sched.plan.make import make_native_plan, make_plan
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import StagedResult, sample_staged
from mrflow_sched.sampling.engine import Capabilities
from mrflow_sched.sampling.network import NetworkCall, Next
from mrflow_sched.sampling.tokens import Lift, TokenGrid, on_tokens

SIDE = 256  # 16x16 tokens


def _pointwise(tokens: Tensor, positions: Tensor, sigma: float) -> Tensor:
    """A velocity that depends on nothing but the token."""
    return tokens - torch.tanh(tokens * 0.5 + 0.3)


def _attending(tokens: Tensor, positions: Tensor, sigma: float) -> Tensor:
    weights = (tokens @ tokens.transpose(1, 2) / 8.0).softmax(-1)
    return tokens - torch.tanh(weights @ tokens)


def _run(engine: TokenEngine, plan: StagedPlan, seeds: list[int], method: Jit | None = None) -> StagedResult:
    return sample_staged(engine, plan, ["a"] * len(seeds), seeds=seeds, method=method)


def _latents(engine: TokenEngine, plan: StagedPlan, seed: int = 3, method: Jit | None = None) -> Tensor:
    found = sample_staged(engine, plan, "a", seeds=[seed], until=1, method=method).latents
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "steps"), [("jit-4x", [7, 11, 18]), ("jit-7x", [4, 7, 11])])
def test_the_network_sees_the_published_shares(name: str, steps: list[int]) -> None:
    engine = TokenEngine(_pointwise)
    plan = make_plan("flux1-dev", 512, 512, method=name)  # pyright: ignore[reportArgumentType]
    _latents(engine, plan)
    first, second = (int(share * 1024) for share in ((0.35, 0.62) if name == "jit-4x" else (0.32, 0.6)))
    assert engine.seen == [first] * steps[0] + [second] * (steps[1] - steps[0]) + [1024] * (steps[2] - steps[1])
    assert plan.forwards == steps[2]


def test_anchors_of_a_pointwise_network_follow_the_dense_run() -> None:
    plan = make_plan("flux1-dev", SIDE, SIDE, method="jit-7x")
    dense = replace(plan, stages=(replace(plan.stages[0], shares=()),))
    engine = TokenEngine(_pointwise)
    sparse, whole = pack(_latents(engine, plan)), pack(_latents(engine, dense))
    same = (sparse[0] == whole[0]).all(-1)
    assert int(same.sum()) >= int(0.32 * 256)
    assert not bool(same.all())


def test_anchors_of_an_attending_network_do_not() -> None:
    plan = make_plan("flux1-dev", SIDE, SIDE, method="jit-7x")
    dense = replace(plan, stages=(replace(plan.stages[0], shares=()),))
    engine = TokenEngine(_attending)
    same = (pack(_latents(engine, plan))[0] == pack(_latents(engine, dense))[0]).all(-1)
    assert int(same.sum()) < 10


def test_a_constant_velocity_needs_no_tokens() -> None:
    engine = TokenEngine(lambda tokens, positions, sigma: torch.full_like(tokens, 0.5 + sigma))
    plan = make_plan("flux1-dev", SIDE, SIDE, method="jit-4x")
    dense = replace(plan, stages=(replace(plan.stages[0], shares=()),))
    sparse, whole = _latents(engine, plan, method=Jit(micro_flow="off")), _latents(engine, dense)
    torch.testing.assert_close(sparse, whole, atol=2e-6, rtol=0)


@pytest.mark.parametrize("doubled", [False, True])
def test_all_tokens_are_the_dense_run_bit_for_bit(doubled: bool) -> None:
    engine, grid = TokenEngine(_attending, doubled=doubled), TokenGrid(16, 16)
    every, calls = torch.arange(grid.count), list[int]()
    lift = Lift(grid, every)

    @dataclass(frozen=True)
    class All(Plain):
        def stage(self, run: StageRun, latents: Tensor) -> Tensor:
            def around(call: NetworkCall, go: Next) -> Tensor:
                calls.append(call.step)
                return on_tokens(call, go, grid, [every], lambda out, image: lift(out))

            return run.sample(latents, around=around)

    plan = make_native_plan("flux1-dev", SIDE, SIDE, steps=6)
    through = sample_staged(engine, plan, "a", seeds=[3], until=1, method=All()).latents
    assert calls == list(range(6))
    assert through is not None
    assert torch.equal(through, _latents(engine, plan))
    assert torch.equal(_latents(engine, plan, method=Jit()), _latents(engine, plan))


@pytest.mark.parametrize(
    ("method", "expected"),
    # Spec B.4, 5: at sigma .7584 joining tokens have noise of std .759 exactly placed, 1.007 left where they are.
    [(Jit(), 0.759), (Jit(micro_flow="off"), 1.007), (Jit(micro_flow="blend", noise="fresh"), 0.717)],
)
def test_joining_tokens_have_the_noise_of_the_level_that_the_run_has_reached(method: Jit, expected: float) -> None:
    """On a constant image the anchors' velocity is exact: noise - image, and only lifted noise reaches the others."""
    image = 0.7
    calls: list[tuple[float, Tensor, Tensor]] = []

    def exact(tokens: Tensor, positions: Tensor, sigma: float) -> Tensor:
        calls.append((sigma, tokens.clone(), (positions[:, 1] * 64 + positions[:, 2]).long()))
        return (tokens - image) / sigma

    _latents(TokenEngine(exact), make_plan("flux1-dev", 1024, 1024, method="jit-4x"), method=method)
    first = next(number for number, (_, tokens, _) in enumerate(calls) if tokens.shape[1] == 4096)
    sigma, state, _ = calls[first]
    assert sigma == pytest.approx(0.7584, abs=1e-4)
    old = torch.zeros(4096, dtype=torch.bool)
    old[calls[first - 1][2]] = True
    noise = state[0] - (1 - sigma) * image
    assert float(noise[calls[0][2]].std()) == pytest.approx(0.757, abs=0.012)
    assert float(noise[~old].std()) == pytest.approx(expected, abs=0.012)


def test_a_batch_is_its_images_alone_also_where_memory_splits_it() -> None:
    plan = make_plan("flux1-dev", SIDE, SIDE, method="jit-7x")
    alone = [_run(TokenEngine(_attending), plan, [seed]).images for seed in (3, 4, 5)]
    for engine in (
        TokenEngine(_attending),
        TokenEngine(_attending, one_by_one=True),
        TokenEngine(_attending, doubled=True),
    ):
        together = _run(engine, plan, [3, 4, 5]).images
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)


def test_runs_repeat_and_leave_global_random_state_alone() -> None:
    plan = make_plan("flux1-dev", SIDE, SIDE, method="jit-4x")
    before = torch.random.get_rng_state()
    one, two = (_latents(TokenEngine(_attending), plan) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(one, _latents(TokenEngine(_attending), plan, seed=4))


def test_progress_counts_the_steps_of_the_whole_stage() -> None:
    said: list[tuple[int, int]] = []
    plan = make_plan("flux1-dev", SIDE, SIDE, method="jit-7x")
    sample_staged(
        TokenEngine(_pointwise),
        plan,
        "a",
        callback=lambda now: said.append((now.step, now.steps)) if now.name.endswith("sample") else None,
    )
    assert [step for step, _ in said] == list(range(12))
    assert {steps for _, steps in said} == {11}


def test_networks_without_positions_are_refused() -> None:
    plan = make_plan("flux1-dev", SIDE, SIDE, method="jit-4x")
    engine = TokenEngine(_pointwise, capabilities=Capabilities(whole_stages=True))
    with pytest.raises(MrFlowError, match="needs a network that takes tokens with their positions"):
        _latents(engine, plan)


def test_tokens_in_another_order_are_refused() -> None:
    class Columns(TokenEngine):
        def _run(self, hidden_states: Tensor, img_ids: Tensor, sigma: float) -> Tensor:
            return hidden_states

        def sample_stage(self, *args: object, around: object = None, **named: object) -> Tensor:  # type: ignore[override]
            def turned(call, run):  # type: ignore[no-untyped-def]
                return around(call.replace(img_ids=call.inputs["img_ids"][:, [0, 2, 1]]), run)  # type: ignore[operator]

            return super().sample_stage(*args, around=turned, **named)  # type: ignore[arg-type]

    with pytest.raises(MrFlowError, match="row by row"):
        _latents(Columns(_pointwise), make_plan("flux1-dev", SIDE, SIDE, method="jit-4x"))


def test_other_solvers_are_refused() -> None:
    plan = make_plan("flux1-dev", SIDE, SIDE, method="jit-4x")
    plan = replace(plan, stages=(replace(plan.stages[0], solver="multistep"),))
    with pytest.raises(MrFlowError, match="solver euler"):
        _latents(TokenEngine(_pointwise), plan)
