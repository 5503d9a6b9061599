from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrflow_sched.plan.families import Prediction
from mrflow_sched.sampling.noise import (
    add_noise,
    denoised_to_velocity,
    draw_noise,
    model_sigmas,
    sigma_to_ve,
    stage_seed,
    to_denoised,
    ve_to_sigma,
)

quick = settings(deadline=None, max_examples=25)
LEVELS = st.floats(0.01, 0.99)
SEEDS = st.integers(0, 2**63 - 1)
PREDICTIONS: list[Prediction] = ["flow", "epsilon", "v"]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted.to(found), rtol=1e-5, atol=1e-6)


def tensors(seed: int = 0, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    clean = draw_noise((3, 4, 4), range(seed, seed + batch), dtype=torch.float64)
    return clean, draw_noise((3, 4, 4), range(seed + 100, seed + 100 + batch), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize(
    ("sigma", "sigma_ve"), [(0.10, 0.111), (0.12, 0.136), (0.15, 0.176), (0.16, 0.190), (0.20, 0.250), (0.25, 0.333)]
)
def test_equal_snr_table_of_the_specification(sigma: float, sigma_ve: float) -> None:
    assert sigma_to_ve(sigma) == pytest.approx(sigma_ve, abs=1e-3)


@quick
@given(LEVELS)
def test_equal_snr_means_equal_snr_and_inverts(sigma: float) -> None:
    flow_ratio = (1 - sigma) / sigma
    assert 1 / sigma_to_ve(sigma) == pytest.approx(flow_ratio)
    assert ve_to_sigma(sigma_to_ve(sigma)) == pytest.approx(sigma)
    level = torch.tensor([sigma], dtype=torch.float64)
    assert ve_to_sigma(sigma_to_ve(level)).item() == pytest.approx(sigma)


def test_pure_noise_is_infinitely_far() -> None:
    assert sigma_to_ve(1.0) == math.inf
    assert ve_to_sigma(math.inf) == 1.0


@pytest.mark.parametrize("sigma", [-0.1, 1.1, math.nan])
def test_levels_outside_their_range_are_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must"):
        sigma_to_ve(sigma)
    with pytest.raises(ValueError, match="sigma must"):
        add_noise(*tensors(), sigma)
    with pytest.raises(ValueError, match="sigma_ve must not"):
        ve_to_sigma(min(sigma, -sigma) if sigma == sigma else sigma)


def test_lists_are_told_in_the_models_own_measure() -> None:
    assert model_sigmas((1.0, 0.5, 0.0), "flow") == (1.0, 0.5, 0.0)
    largest, middle, last = model_sigmas((1.0, 0.5, 0.0), "epsilon")
    assert largest == pytest.approx(14.6146, abs=1e-3)
    assert (middle, last) == (1.0, 0.0)


# -------------------------------------------------------------------------------------------------------------- mixing


@quick
@given(LEVELS, st.integers(0, 1000))
def test_flow_mixing_and_recovery(sigma: float, seed: int) -> None:
    clean, noise = tensors(seed)
    mixed = add_noise(clean, noise, sigma)
    assert_close(mixed, (1 - sigma) * clean + sigma * noise)
    assert_close(to_denoised(noise - clean, mixed, sigma), clean)
    assert_close(denoised_to_velocity(clean, mixed, sigma), noise - clean)


@quick
@given(LEVELS, st.integers(0, 1000), st.sampled_from(["epsilon", "v"]))
def test_variance_exploding_mixing_and_recovery(sigma: float, seed: int, prediction: Prediction) -> None:
    clean, noise = tensors(seed)
    # The models end at sigma_ve 14.6; below it the conversion is exact.
    sigma = min(sigma, 0.93)
    mixed = add_noise(clean, noise, sigma, prediction)
    ve = sigma_to_ve(sigma)
    assert_close(mixed, clean + ve * noise)
    # v of the variance-preserving process at the same ratio: alpha eps - beta x0
    alpha, beta = 1 / math.hypot(1, ve), ve / math.hypot(1, ve)
    output = noise if prediction == "epsilon" else alpha * noise - beta * clean
    assert_close(to_denoised(output, mixed, ve, prediction), clean)
    assert_close(denoised_to_velocity(clean, mixed, ve), noise)


def test_equal_snr_models_see_the_flow_latents_scaled() -> None:
    clean, noise = tensors()
    flow, exploding = add_noise(clean, noise, 0.12), add_noise(clean, noise, 0.12, "epsilon")
    assert_close(exploding * (1 - 0.12), flow)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_sample_of_a_batch_may_have_its_level(prediction: Prediction) -> None:
    clean, noise = tensors()
    levels = torch.tensor([0.2, 0.6], dtype=torch.float64)
    mixed = add_noise(clean, noise, levels, prediction)
    for index, level in enumerate((0.2, 0.6)):
        alone = add_noise(clean[index : index + 1], noise[index : index + 1], level, prediction)
        assert_close(mixed[index : index + 1], alone)


def test_pure_noise_of_an_exploding_model_is_finite() -> None:
    clean, noise = tensors()
    assert_close(add_noise(0 * clean, noise, 1.0, "epsilon"), 14.614647 * noise)


def test_state_is_float32_whatever_the_network_computes_in() -> None:
    clean, noise = (tensor.to(torch.bfloat16) for tensor in tensors())
    mixed = add_noise(clean, noise, 0.12)
    assert mixed.dtype == torch.float32
    assert to_denoised(clean, mixed, 0.12).dtype == torch.float32
    # 0.12 is not rounded to bfloat16, as schedulers in model precision do
    assert_close(mixed, 0.88 * clean.float() + 0.12 * noise.float())


def test_what_does_not_fit_is_refused() -> None:
    clean, noise = tensors()
    with pytest.raises(ValueError, match="shape of x0"):
        add_noise(clean, noise[:1], 0.1)
    with pytest.raises(ValueError, match="one per sample"):
        add_noise(clean, noise, torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="above 0"):
        denoised_to_velocity(clean, noise, 0.0)
    wrong: Any = "score"
    with pytest.raises(ValueError, match="prediction must be"):
        to_denoised(clean, noise, 0.1, wrong)


# ---------------------------------------------------------------------------------------------------------- randomness


@quick
@given(SEEDS, st.integers(0, 63))
def test_the_offset_rule_counts_up(seed: int, image: int) -> None:
    assert stage_seed(seed, image, 0) == (seed + image) % 2**63
    assert stage_seed(seed, image, 1) == (seed + image + 1) % 2**63


@quick
@given(SEEDS)
def test_the_hash_rule_gives_every_stage_of_every_image_its_own(seed: int) -> None:
    drawn = [stage_seed(seed, image, stage, "hash") for image in range(8) for stage in range(3)]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= value < 2**63 for value in drawn)


def test_hashed_seeds_never_change() -> None:
    assert stage_seed(2026, 0, 1, "hash") == 2017987905426023963


def test_seeds_refuse() -> None:
    with pytest.raises(ValueError, match="seed_rule must be"):
        stage_seed(0, 0, 0, "random")
    with pytest.raises(ValueError, match="0 or more"):
        stage_seed(0, -1, 0)


@quick
@given(st.lists(SEEDS, min_size=1, max_size=4))
def test_a_batch_of_noise_is_its_single_draws(seeds: list[int]) -> None:
    batch = draw_noise((4, 5, 7), seeds)
    assert batch.shape == (len(seeds), 4, 5, 7)
    assert batch.dtype == torch.float32
    for index, seed in enumerate(seeds):
        assert torch.equal(batch[index], draw_noise((4, 5, 7), [seed])[0])


def test_noise_is_standard_normal_and_leaves_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    noise = draw_noise((64, 64), range(8))
    assert torch.equal(before, torch.random.get_rng_state())
    assert abs(noise.mean().item()) < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert abs((noise[0] * noise[1]).mean().item()) < 0.06


def test_noise_is_drawn_in_float32_and_then_converted() -> None:
    assert torch.equal(draw_noise((8,), [3], dtype=torch.float16), draw_noise((8,), [3]).half())


def test_noise_needs_a_seed() -> None:
    with pytest.raises(ValueError, match="at least one seed"):
        draw_noise((4,), [])
