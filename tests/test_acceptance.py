"""The twelve acceptance tests of docs/method.md, section 5.3, through the public functions, one each.

Where a scheduler is known to do the wrong thing, diffusers' own is run beside ours and seen to do it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mrflow_sched.engines.analytic import GaussianFieldEngine, power_law
from mrflow_sched.plan.families import FAMILIES
from mrflow_sched.plan.make import make_native_plan, make_plan
from mrflow_sched.plan.schedule import refine_sigmas
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import StagedResult, sample_staged
from mrflow_sched.sampling.noise import add_noise, draw_noise
from mrflow_sched.sampling.solvers import SOLVERS
from mrflow_sched.upscaling.fit import upscale_to

FIELD = GaussianFieldEngine()
# Small enough for sums by hand: 8-pixel grid, pixels are latents.
FAMILY = replace(FIELD.family, vae_factor=1, patch=8, latent_channels=3)


class Scripted:
    """An engine whose VAE is exact and whose network is any function of (x, sigma); it notes what it is asked."""

    def __init__(self, denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], family: Any = FAMILY) -> None:
        self.family, self.device = family, torch.device("cpu")
        self.network = denoise
        self.seen: list[tuple[int, float]] = []
        self.noisy: list[torch.Tensor] = []

    def encode_text(self, prompts, negative_prompts=None):
        return None

    def latent_shape(self, width, height):
        return 3, height, width

    def denoise(self, x, sigma, text, *, guidance):
        self.seen.append((x.shape[-1], sigma[0].item()))
        self.noisy.append(x.clone())
        return self.network(x, sigma.reshape(-1, 1, 1, 1))

    def encode(self, images, *, posterior="mode", seeds=None):
        return 2 * images - 1

    def decode(self, latents):
        return (latents + 1) / 2


class Repeat:
    """Super-resolution of a given scale by repetition."""

    def __init__(self, scale: int) -> None:
        self.name, self.scale = f"repeat {scale}", scale

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)


def field_plan(**changes: Any) -> StagedPlan:
    settings: dict[str, Any] = {"low_steps": 3, "refine_steps": 1, "sigma": 0.12, "seed": 3} | changes
    return make_plan(FIELD.family, 32, 32, **settings)


def run(engine: Any, plan: StagedPlan, **changes: Any) -> StagedResult:
    settings: dict[str, Any] = {"upscaler": Repeat(2), **changes}
    return sample_staged(engine, plan, "", **settings)


def picture(size: int = 16) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def diffusers_levels(start: float, mu: float, **config: Any) -> list[float]:
    """What diffusers' scheduler makes of a list of one level."""
    library: Any = pytest.importorskip("diffusers")
    scheduler = library.FlowMatchEulerDiscreteScheduler.from_config(config, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.array([start]), mu=mu)
    return scheduler.sigmas.tolist()


def test_acceptance_01_refine_lists_match_the_published_tables() -> None:
    linear = {1: [0.12, 0], 2: [0.12, 0.06, 0], 3: [0.12, 0.08, 0.04, 0], 4: [0.12, 0.09, 0.06, 0.03, 0]}
    shifted = {
        1: [0.12, 0],
        2: [0.12, 0.06746, 0],
        3: [0.12, 0.09208, 0.05422, 0],
        4: [0.12, 0.10368, 0.08150, 0.04965, 0],
    }
    for curve, table in (("linear", linear), ("shifted", shifted)):
        for steps, levels in table.items():
            assert refine_sigmas(0.12, steps, curve) == pytest.approx(levels, abs=1e-5)
            plan = make_plan("flux1-dev", 1024, 1024, refine_steps=steps, sigma=0.12, refine_curve=curve)  # type: ignore[arg-type]
            assert plan.stages[1].sigmas == pytest.approx(levels, abs=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "careful"])
def test_acceptance_02_one_refine_step_is_z_minus_s_times_v(solver: str) -> None:
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) / 3

    def velocity(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("cd,bdhw->bchw", mix, x)

    engine = Scripted(lambda x, sigma: x - sigma * velocity(x))
    plan = make_plan(FAMILY, 16, 16, refine_steps=1, sigma=0.15, solver=solver, seed=8)
    result = run(engine, plan, image=picture())
    z = add_noise(engine.encode(picture()), draw_noise((3, 16, 16), [9]), 0.15)
    torch.testing.assert_close(engine.encode(result.images), z - 0.15 * velocity(z), rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "careful"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("curve", ["linear", "shifted"])
def test_acceptance_03_a_true_velocity_recovers_the_image_exactly(solver: str, steps: int, curve: str) -> None:
    """The network knows the noise that was drawn: v = e - z0. Then any number of refine steps returns z0."""
    noise = draw_noise((3, 16, 16), [6])
    clean = 2 * picture() - 1
    engine = Scripted(lambda x, sigma: x - sigma * (noise - clean))
    plan = make_plan(FAMILY, 16, 16, refine_steps=steps, sigma=0.3, solver=solver, refine_curve=curve, seed=5)  # type: ignore[arg-type]
    result = run(engine, plan, image=picture())
    torch.testing.assert_close(result.images, picture(), rtol=0, atol=1e-6)


def test_acceptance_04_vanishing_noise_leaves_the_round_trip_of_the_upscaled_image() -> None:
    """And nearer and nearer to it: the distance falls with s0."""
    distances: list[float] = []
    for sigma in (0.1, 1e-2, 1e-4, 1e-6):
        result = run(FIELD, field_plan(sigma=sigma), keep_stages=True)
        upscaled = result.stages[-1].image
        round_trip = FIELD.decode(FIELD.encode(upscaled))
        distances.append((result.images - round_trip).abs().max().item())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-5 < distances[0]


def test_acceptance_05_no_scheduler_setting_reaches_the_refine_list() -> None:
    """Qwen-Image's terminal stretch makes any single sigma 0.020 (docs/method.md, section 1.5).

    The plan's sigmas reach the network.
    """
    scheduler: Any = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler()
    if "shift_terminal" in scheduler.config:  # from diffusers 0.33 on
        assert diffusers_levels(0.12, 0.694, shift_terminal=0.02) == pytest.approx([0.02, 0.0], abs=1e-6)
        assert diffusers_levels(0.50, 0.694, shift_terminal=0.02) == pytest.approx([0.02, 0.0], abs=1e-6)
    for name, family in FAMILIES.items():
        plan = make_plan(name, 1024, 1024, refine_steps=1, sigma=0.12)
        assert plan.stages[-1].sigmas == (0.12, 0.0), name
        if family.prediction == "flow":
            shaped = replace(FAMILY, shift=family.shift)
            engine = Scripted(lambda x, sigma: x, shaped)
            low_steps = len(family.shift.lists[0]) - 1 if family.shift.lists else 2
            run(engine, make_plan(shaped, 16, 16, low_steps=low_steps, refine_steps=1, sigma=0.12))
            assert engine.seen[-1] == (16, pytest.approx(0.12))


def test_acceptance_06_seeds_repeat_and_streams_and_images_are_apart() -> None:
    first = run(FIELD, field_plan(), batch=3)
    assert torch.equal(first.images, run(FIELD, field_plan(), batch=3).images)
    assert not torch.equal(first.images, run(FIELD, field_plan(seed=4), batch=3).images)
    for i in range(3):
        alone = run(FIELD, field_plan(seed=3 + i))
        torch.testing.assert_close(first.images[i : i + 1], alone.images, rtol=0, atol=1e-6)
    # A network that answers 0 lays the noises bare: the state is the noise itself, times sigma.
    engine = Scripted(lambda x, sigma: torch.zeros_like(x))
    run(engine, make_plan(FAMILY, 32, 32, low_steps=1, refine_steps=1, sigma=0.5))
    stage_1, refine = engine.noisy[0], engine.noisy[-1] / 0.5
    assert stage_1.shape[-1] * 2 == refine.shape[-1] == 32
    assert not torch.equal(stage_1.flatten(), refine.flatten()[: stage_1.numel()])
    correlation = torch.corrcoef(torch.stack([stage_1.flatten(), refine.flatten()[: stage_1.numel()]]))[0, 1]
    assert abs(correlation.item()) < 0.15


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("size", [(48, 48), (50, 35), (97, 41)])
def test_acceptance_07_any_scale_reaches_any_target_exactly_and_unstretched(scale, factor, size) -> None:
    """Images are made on the grid and come out exactly as asked; a disc in the source is a disc in the target."""
    plan = make_plan(FAMILY, *size, factor=factor, low_steps=1, refine_steps=0)
    low, high = plan.stages
    assert high.width % 8 == high.height % 8 == low.width % 8 == low.height % 8 == 0
    assert 0 <= high.width - size[0] < 8
    assert 0 <= high.height - size[1] < 8
    made = run(Scripted(lambda x, sigma: torch.zeros_like(x)), plan, upscaler=Repeat(scale)).images
    assert made.shape[2:] == size[::-1]
    # Odd targets directly, from a source of another shape: covered by scaling, cropped at the centre.
    side = 40
    ys, xs = torch.meshgrid(torch.arange(side) - 19.5, torch.arange(side) - 19.5, indexing="ij")
    disc = ((xs**2 + ys**2).sqrt() < 8).float().expand(1, 3, -1, -1)
    width, height = round(side * factor) + 1, round(side * factor * 0.8)
    made = upscale_to(disc, width, height, Repeat(scale))
    assert made.shape == (1, 3, height, width)
    inside = made[0, 0] > 0.5
    across, down = inside.any(0).sum().item(), inside.any(1).sum().item()
    assert abs(across - down) <= 2
    assert across == pytest.approx(16 * width / side, abs=2.5)


@pytest.mark.parametrize("error", [None, RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 3, 4])
def test_acceptance_08_everything_touched_is_as_it_was(error: BaseException | None, at: int) -> None:
    """A real network with parameters, buffers, hooks and mode; a plan; a random state; gradient recording."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5)).eval()
    calls: list[int] = []

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if error is not None and len(calls) == at:
            raise error
        assert not torch.is_grad_enabled()
        return network(x)

    engine = Scripted(denoise)
    plan = make_plan(FAMILY, 16, 16, low_steps=3, refine_steps=1)

    def snapshot() -> list[Any]:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in network.modules()]
        own = {key: copy.copy(value) for key, value in vars(engine).items() if key not in ("seen", "noisy")}
        return [
            hooks,
            own,
            plan.to_string(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
        ]

    before, weights, random = snapshot(), copy.deepcopy(network.state_dict()), torch.get_rng_state()
    if error is None:
        run(engine, plan)
    else:
        with pytest.raises(type(error)):
            run(engine, plan)
    assert snapshot() == before
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("solver", ["euler", "multistep", "careful", "heun"])
@pytest.mark.parametrize(("guidance", "factor"), [(1.0, 1), (4.0, 2)])
@pytest.mark.parametrize("refine_steps", [0, 1, 3])
def test_acceptance_09_forwards_are_factor_times_steps(solver, guidance, factor, refine_steps) -> None:
    family = replace(FAMILY, guidance_kind="cfg", guidance=guidance)
    plan = make_plan(family, 32, 32, low_steps=5, refine_steps=refine_steps, solver=solver)
    engine = Scripted(lambda x, sigma: x, family)
    result = run(engine, plan)
    per_stage = {width: factor * sum(seen == width for seen, _ in engine.seen) for width in (16, 32)}
    heun = solver == "heun"
    assert per_stage[16] == factor * (2 * 5 - 1 if heun else 5) == plan.stages[0].forwards
    assert per_stage[32] == factor * (max(2 * refine_steps - 1, 0) if heun else refine_steps) == plan.stages[1].forwards
    assert result.forwards == sum(per_stage.values())


def test_acceptance_10_colours_do_not_drift_to_grey() -> None:
    """Channel means: upscaled, after the VAE's round trip, and final, for pictures with strong mean colours."""
    engine = replace(FIELD, power=power_law(variance=0.05), means={"": (3.0, -2.0, 1.0)})
    result = run(engine, field_plan(sigma=0.18), batch=4, keep_stages=True)
    upscaled = result.stages[-1].image
    round_trip = engine.decode(engine.encode(upscaled))

    def drift(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a.mean((2, 3)) - b.mean((2, 3))).abs().max().item()

    assert drift(upscaled, round_trip) < 1e-6
    assert drift(round_trip, result.images) < 0.004  # one step of 8 bits
    assert (result.images.mean((0, 2, 3)) - torch.tensor([0.8, 0.3, 0.6])).abs().max() < 0.05


def test_acceptance_11_the_first_refine_level_is_the_one_asked_for_under_dynamic_shifting() -> None:
    """FLUX.2's scheduler takes 0.12 to 0.578 at 4096 tokens, FLUX.1's to 0.301; ours stays 0.12.

    Source: docs/method.md, section 1.5.
    """
    assert diffusers_levels(0.12, 2.309)[0] == pytest.approx(0.578, abs=1e-3)
    assert diffusers_levels(0.12, 1.15)[0] == pytest.approx(0.301, abs=1e-3)
    for name in ("flux2-klein-base", "flux2-klein", "flux1-dev"):
        plan = make_plan(name, 1024, 1024, refine_steps=2, sigma=0.12)
        assert plan.stages[1].mu is None
        assert plan.stages[1].sigmas == pytest.approx((0.12, 0.06, 0.0))
        engine = Scripted(lambda x, sigma: x, replace(FAMILY, shift=FAMILIES[name].shift))
        run(engine, make_plan(engine.family, 16, 16, low_steps=2, refine_steps=2, sigma=0.12))
        assert [level for _, level in engine.seen[2:]] == pytest.approx([0.12, 0.06])


def test_acceptance_12_the_cost_model_predicts_a_dummy_backbone() -> None:
    """A backbone that counts the multiplications of its layers; the plan's ratio against what native and staged
    counted.

    Then the published timings predict the measured ratios: 0.133 s and 0.49 s a forward, and 0.51 s besides
    (docs/method.md, section 2.3).
    """
    width, layers = 64, 2
    family = replace(FAMILY, linear_cost=24.0 * layers * width**2, attention_cost=4.0 * layers * width, text_tokens=20)
    spent: list[float] = []

    def backbone(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[-1] * x.shape[-2] // 64 + 20
        spent.append(layers * (24.0 * tokens * width**2 + 4.0 * tokens**2 * width))
        return torch.zeros_like(x)

    engine = Scripted(backbone, family)
    staged = make_plan(family, 128, 128, low_steps=12, refine_steps=1, guidance=1.0)
    native = make_native_plan(family, 128, 128, steps=family.native_steps, guidance=1.0)
    run(engine, native)
    native_cost = sum(spent)
    spent.clear()
    run(engine, staged)
    assert staged.cost_ratio == pytest.approx(native_cost / sum(spent), rel=1e-4)
    shares = [sum(spent[:12]), spent[12]]
    assert [cost / sum(staged.stage_costs()) for cost in staged.stage_costs()] == pytest.approx(
        [share / sum(spent) for share in shares], rel=1e-4
    )

    for low_steps, measured in ((10, 11.9), (12, 10.3), (16, 8.3), (20, 7.0)):
        plan = make_plan("qwen-image", 1024, 1024, low_steps=low_steps, refine_steps=1)
        low, high = (stage.forwards for stage in plan.stages)
        speedup = 49.32 / (low * 0.133 + high * 0.49 + 0.51)
        assert speedup == pytest.approx(measured, rel=0.05)


def test_every_solver_name_of_the_plan_exists() -> None:
    from mrflow_sched.plan.solver_table import SOLVER_NAMES

    assert set(SOLVER_NAMES) <= set(SOLVERS)
