"""Analytic engines: their estimates against independent mathematics, and the sampling chain against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import mrflow_sched.engines as engines
from mrflow_sched.engines.analytic import GaussianFieldEngine, MixtureEngine, power_law, refined_variance
from mrflow_sched.plan.families import ShiftRule
from mrflow_sched.plan.make import make_native_plan, make_plan
from mrflow_sched.sampler import sample_staged
from mrflow_sched.sampling.noise import draw_noise, sigma_to_ve

FIELD = GaussianFieldEngine()


def in_ve(engine: GaussianFieldEngine) -> GaussianFieldEngine:
    return replace(engine, family=replace(engine.family, prediction="epsilon"))


def waves(latents: torch.Tensor, factor: int = 4) -> torch.Tensor:
    """Orthonormal Fourier coefficients of the pixels behind latents."""
    return torch.fft.fft2(torch.nn.functional.pixel_shuffle(latents.double(), factor), norm="ortho")


def test_both_fulfil_the_protocol_and_the_package_lists_them() -> None:
    assert isinstance(FIELD, engines.Engine)
    assert isinstance(MixtureEngine.random(0), engines.Engine)
    ours = ["GaussianFieldEngine", "MixtureEngine"]
    assert dir(engines) == ["Engine", *ours, "MrFlowScheduler", "PipelineEngine"]
    with pytest.raises(AttributeError, match="nonsense"):
        _ = engines.nonsense


# ------------------------------------------------------------------------------------------------------ Gaussian fields


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
def test_field_estimate_is_the_conditional_mean_of_the_full_covariance(prediction: str) -> None:
    """Build the field's covariance matrix pixel by pixel from its spectrum and condition on x with linear algebra."""
    engine = replace(FIELD, family=replace(FIELD.family, prediction=prediction, vae_factor=1))
    size, sigma = 6, 0.37
    spectrum = engine.spectrum(size, size)
    covariance = torch.zeros(size * size, size * size, dtype=torch.float64)
    for pixel in range(size * size):
        impulse = torch.zeros(size, size, dtype=torch.float64)
        impulse.view(-1)[pixel] = 1
        covariance[pixel] = torch.fft.ifft2(torch.fft.fft2(impulse) * spectrum).real.flatten()
    a = 1 - sigma if prediction == "flow" else 1.0
    x = draw_noise((3, size, size), [1]).double()
    gain = a * covariance @ torch.linalg.inv(a**2 * covariance + sigma**2 * torch.eye(size * size, dtype=torch.float64))
    expected = (x.reshape(3, -1) @ gain.T).reshape(1, 3, size, size)
    found = engine.denoise(x, torch.tensor([sigma], dtype=torch.float64), engine.encode_text([""]), guidance=1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_field_draws_have_its_spectrum_at_every_size() -> None:
    """Per wave, and per pixel: larger pictures hold the same scene with finer waves besides."""
    variances: list[float] = []
    for size in (16, 32):
        draws = waves(FIELD.sample(size, size, range(300)))
        power = draws.abs().square().mean((0, 1)) / FIELD.spectrum(size, size)
        assert abs(power.mean().item() - 1) < 0.02
        assert (power - 1).abs().max() < 0.35
        variances.append(FIELD.spectrum(size, size).mean().item())
    assert variances[0] < variances[1] < 1.1 * variances[0]


def test_field_pictures_survive_the_round_trip_through_latents() -> None:
    latents = FIELD.sample(32, 16, [3, 4])
    assert latents.shape[1:] == FIELD.latent_shape(32, 16) == (48, 4, 8)
    images = FIELD.decode(latents)
    assert images.shape == (2, 3, 16, 32)
    assert images.dtype == torch.float32
    torch.testing.assert_close(FIELD.encode(images), latents, rtol=0, atol=2e-6)


def test_field_posterior_sample_needs_and_uses_seeds() -> None:
    images = torch.full((2, 3, 8, 8), 0.5)
    drawn = FIELD.encode(images, posterior="sample", seeds=[5, 6])
    assert torch.equal(drawn[1:], FIELD.encode(images[1:], posterior="sample", seeds=[6]))
    assert 0 < drawn.abs().max() < 0.01
    with pytest.raises(ValueError, match="seeds must be given"):
        FIELD.encode(images, posterior="sample")


def test_prompts_have_mean_colours_and_guidance_extrapolates_them() -> None:
    engine = replace(FIELD, means={"red": (2.0, -1.0, -1.0)})
    x = torch.zeros(1, 48, 2, 2)
    text = engine.encode_text(["red"])
    # At sigma 1 nothing of the picture is seen: the estimate is the mean, or guided, beyond it.
    one, sigma = torch.tensor([2.0, -1.0, -1.0]), torch.ones(1)
    for guidance in (1.0, 3.0):
        found = engine.decode(engine.denoise(x, sigma, text, guidance=guidance))[0, :, 0, 0]
        torch.testing.assert_close(found, (0.5 + 0.1 * guidance * one).clamp(0, 1))


def test_power_law_falls_and_starts_at_its_variance() -> None:
    power = power_law(exponent=2.0, variance=0.5, corner=3.0)
    k = torch.tensor([0.0, 3.0, 6.0, 30.0])
    assert power(k[:1], k[:1]).item() == 0.5
    assert power(k[1:2], k[:1]).item() == pytest.approx(0.25)
    assert bool((power(k, torch.zeros(4)).diff() < 0).all())


# ------------------------------------------------------------------------------------------- the chain, in closed form


@pytest.mark.parametrize("sigma", [0.05, 0.12, 0.4])
def test_one_refine_step_shrinks_each_mode_as_the_formula_says(sigma: float) -> None:
    """The golden value, through the real sampler: exact per wave for one picture, in variance over many."""
    seeds = range(150)
    plan = make_plan(FIELD.family, 16, 16, refine_steps=1, sigma=sigma, seed=70)
    start = FIELD.sample(16, 16, seeds)
    result = sample_staged(FIELD, plan, "", batch=len(seeds), image=FIELD.decode(start))
    before, after = waves(start), waves(FIELD.encode(result.images))
    variance = FIELD.spectrum(16, 16)

    # One draw: keep = (1-s)v / ((1-s)²v + s²) of the noised wave, with the noise of the refine stream, seed + 1.
    noise = waves(draw_noise(FIELD.latent_shape(16, 16), [71 + i for i in range(len(seeds))]))
    keep = (1 - sigma) * variance / ((1 - sigma) ** 2 * variance + sigma**2)
    torch.testing.assert_close(after, keep * ((1 - sigma) * before + sigma * noise), rtol=0, atol=1e-4)

    measured = after.abs().square().mean((0, 1)).flatten()
    golden = torch.tensor([refined_variance(v.item(), sigma) for v in variance.flatten()], dtype=torch.float64)
    assert ((measured / golden).mean() - 1).abs() < 0.02
    assert (measured / golden - 1).abs().max() < 0.4


def test_refined_variance_keeps_strong_modes_and_removes_weak_ones() -> None:
    assert refined_variance(100.0, 0.1) == pytest.approx(100.0, rel=1e-3)
    assert refined_variance(1e-4, 0.3) < 1e-6
    assert refined_variance(0.7, 1e-9) == pytest.approx(0.7)


@pytest.mark.parametrize("ve", [False, True])
def test_native_sampling_maps_noise_to_the_prior_wave_by_wave(ve: bool) -> None:
    """The exact path scales each wave of the noise to the field's power v: x0 = sqrt(v) noise in flow form.

    In VE form sampling starts at sigma_ve 14.6, where x = 14.6 noise: x0 = 14.6 sqrt(v / (v + 14.6²)) noise.
    """
    engine = in_ve(FIELD) if ve else FIELD
    family = replace(engine.family, shift=ShiftRule("scaled-linear" if ve else "none"))
    plan = make_native_plan(family, 16, 16, steps=400, solver="heun", seed=5)
    result = sample_staged(replace(engine, family=family), plan, "")
    noise = waves(draw_noise(engine.latent_shape(16, 16), [5]))
    variance = engine.spectrum(16, 16)
    top = 14.6146 if ve else math.inf
    scale = (variance / (1 + variance / top**2)).sqrt()
    torch.testing.assert_close(waves(engine.encode(result.images)), scale * noise, rtol=0.06 if ve else 0.02, atol=1e-3)


def test_flow_and_ve_engines_are_one_model_at_equal_signal_to_noise() -> None:
    sigma = 0.3
    x = draw_noise(FIELD.latent_shape(16, 16), [2])
    text = FIELD.encode_text([""])
    flow = FIELD.denoise(x, torch.tensor([sigma]), text, guidance=1.0)
    ve = in_ve(FIELD).denoise(x / (1 - sigma), torch.tensor([sigma_to_ve(sigma)]), text, guidance=1.0)
    torch.testing.assert_close(flow, ve, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- mixtures


def log_density(engine: MixtureEngine, x: torch.Tensor, a: float, s: float, label: int | None) -> torch.Tensor:
    """log p of noisy x, from torch's own distributions."""
    parts = [
        torch.distributions.Normal(a * mean, (a**2 * std**2 + s**2).sqrt()).log_prob(x.flatten()).sum()
        for mean, std, own in zip(engine.means, engine.stds, engine.labels, strict=True)
        if label is None or int(own) == label
    ]
    return torch.logsumexp(torch.stack(parts), 0) - math.log(len(parts))


@pytest.mark.parametrize("prediction", ["flow", "v"])
@pytest.mark.parametrize(("prompt", "label"), [("label 1", 1), ("", None)])
def test_mixture_estimate_follows_from_the_gradient_of_its_density(prediction, prompt, label) -> None:
    """Tweedie's formula: E[x0 | x] = (x + s² d log p / dx) / a."""
    engine = MixtureEngine.random(1, dimensions=5, components=6, labels=3, std=0.5, decay=0.5, prediction=prediction)
    sigma = 0.6
    a = 1 - sigma if prediction == "flow" else 1.0
    x = draw_noise((5, 1, 1), [4]).double().requires_grad_()
    (score,) = torch.autograd.grad(log_density(engine, x, a, sigma, label), x)
    found = engine.denoise(
        x.detach(), torch.tensor([sigma], dtype=torch.float64), engine.encode_text([prompt]), guidance=1.0
    )
    torch.testing.assert_close(found, (x.detach() + sigma**2 * score) / a, rtol=0, atol=1e-10)


def test_mixture_guidance_extrapolates_from_the_negative_prompt() -> None:
    engine = MixtureEngine.random(2, dimensions=4, components=4, labels=2)
    x, sigma = draw_noise((4, 1, 1), [1, 2]), torch.tensor([0.9, 0.5])

    def at(prompt: str, negative: str | None, guidance: float) -> torch.Tensor:
        text = engine.encode_text([prompt] * 2, None if negative is None else [negative] * 2)
        return engine.denoise(x, sigma, text, guidance=guidance)

    asked, plain, other = at("label 0", None, 1.0), at("", None, 1.0), at("label 1", None, 1.0)
    torch.testing.assert_close(at("label 0", None, 3.0), plain + 3 * (asked - plain))
    torch.testing.assert_close(at("label 0", "label 1", 2.0), other + 2 * (asked - other))
    assert not torch.allclose(asked, plain)


def test_mixture_samples_belong_to_the_label_that_was_asked_for() -> None:
    engine = MixtureEngine.random(3, components=8, labels=4, std=0.2)
    plan = make_native_plan(engine.family, 8, 8, steps=30, solver="multistep")
    result = sample_staged(engine, plan, [f"label {i}" for i in range(4)])
    latents = engine.encode(result.images).flatten(1).double()
    nearest = torch.cdist(latents, engine.means).argmin(1)
    assert engine.labels[nearest].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dimensions", [1, 7, 48, 64])
def test_mixture_pictures_survive_the_round_trip(dimensions: int) -> None:
    engine = MixtureEngine.random(0, dimensions=dimensions)
    latents = draw_noise(engine.latent_shape(512, 8), [1, 2])
    images = engine.decode(latents)
    assert images.shape[1] == 3
    torch.testing.assert_close(engine.encode(images), latents, rtol=0, atol=2e-6)


@pytest.mark.parametrize("prompt", ["label 9", "label x", "a cat"])
def test_mixture_refuses_prompts_without_a_label(prompt: str) -> None:
    with pytest.raises(ValueError, match="names no label"):
        MixtureEngine.random(0, labels=4).encode_text([prompt])
