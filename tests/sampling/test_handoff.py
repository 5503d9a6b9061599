"""From a finished picture to the start of the next stage: upscale, encode, noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched.engines.analytic import GaussianFieldEngine
from mrflow_sched.plan.stages import Stage
from mrflow_sched.sampling.handoff import PARTS, handoff
from mrflow_sched.sampling.noise import add_noise, draw_noise, sigma_to_ve
from mrflow_sched.upscaling.fit import NO_MODEL, upscale_to

ENGINE = GaussianFieldEngine()


def stage(width: int = 32, height: int = 32, sigmas: tuple[float, ...] = (0.12, 0.0)) -> Stage:
    tokens, steps = width * height // 64, max(len(sigmas) - 1, 0)
    return Stage(width, height, tokens, None, sigmas, "euler", 1.0, steps)


def pictures(batch: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(5))


class Limited:
    """An engine whose encoder runs out of memory above `most` images, and that remembers what it was asked."""

    def __init__(self, most: int = 100, error: BaseException | None = None) -> None:
        self.family, self.device = ENGINE.family, torch.device("cpu")
        self.latent_shape = ENGINE.latent_shape
        self.most, self.error = most, error or torch.OutOfMemoryError("CUDA out of memory.")
        self.asked: list[tuple[int, str, Sequence[int] | None]] = []

    def encode(self, images: Tensor, *, posterior: str = "mode", seeds: Sequence[int] | None = None) -> Tensor:
        self.asked.append((len(images), posterior, seeds))
        if len(images) > self.most:
            raise self.error
        return ENGINE.encode(images, posterior=posterior, seeds=seeds)


def limited(most: int = 100, error: BaseException | None = None) -> Any:
    return Limited(most, error)


def test_the_start_is_the_upscaled_picture_encoded_with_fresh_noise() -> None:
    result = handoff(ENGINE, pictures(), stage(), None, seeds=[7, 8])
    assert result.latents is not None
    assert result.encoded is not None
    assert torch.equal(result.image, upscale_to(pictures(), 32, 32))
    assert torch.allclose(result.encoded, ENGINE.encode(result.image))
    noise = draw_noise(ENGINE.latent_shape(32, 32), [7, 8])
    assert torch.allclose(result.latents, 0.88 * result.encoded + 0.12 * noise, atol=1e-6)
    assert result.latents.dtype == torch.float32
    assert result.warnings == (NO_MODEL,)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_variance_exploding_models_get_noise_of_equal_signal_to_noise(prediction: Any) -> None:
    engine = GaussianFieldEngine(family=replace(ENGINE.family, prediction=prediction))
    result = handoff(engine, pictures(), stage(), None, seeds=[7, 8])
    assert result.latents is not None
    assert result.encoded is not None
    noise = draw_noise(ENGINE.latent_shape(32, 32), [7, 8])
    assert torch.allclose(result.latents, result.encoded + sigma_to_ve(0.12) * noise, atol=1e-5)


def test_with_little_noise_the_round_trip_of_the_upscaled_picture_is_left() -> None:
    result = handoff(ENGINE, pictures(), stage(sigmas=(1e-6, 0.0)), None, seeds=[1, 2])
    assert result.latents is not None
    assert torch.allclose(ENGINE.decode(result.latents), result.image, atol=1e-5)


def test_a_batch_equals_its_images_one_by_one() -> None:
    both = handoff(ENGINE, pictures(), stage(), None, seeds=[7, 3], posterior="sample")
    assert both.latents is not None
    for index, seed in enumerate((7, 3)):
        one = handoff(ENGINE, pictures()[index : index + 1], stage(), None, seeds=[seed], posterior="sample")
        assert one.latents is not None
        assert torch.equal(one.image, both.image[index : index + 1])
        assert torch.allclose(one.latents, both.latents[index : index + 1], atol=1e-6)


def test_a_posterior_takes_the_first_numbers_of_a_seed_and_the_noise_the_next() -> None:
    engine = limited()
    sampled = handoff(engine, pictures(), stage(), None, seeds=[7, 8], posterior="sample")
    centred = handoff(engine, pictures(), stage(), None, seeds=[7, 8])
    assert engine.asked == [(2, "sample", [7, 8]), (2, "mode", None)]
    for result, after in ((sampled, 1), (centred, 0)):
        assert result.latents is not None
        assert result.encoded is not None
        noise = draw_noise(ENGINE.latent_shape(32, 32), [7, 8], after=after)
        assert torch.equal(result.latents, add_noise(result.encoded, noise, 0.12))
    # One generator, asked twice, as the official scripts do.
    generator = torch.Generator().manual_seed(7)
    for after in range(2):
        expected = torch.randn(ENGINE.latent_shape(32, 32), generator=generator)
        assert torch.equal(draw_noise(expected.shape, [7], after=after)[0], expected)


def test_parts_are_announced_in_order() -> None:
    heard: list[str] = []
    handoff(ENGINE, pictures(), stage(), None, seeds=[1, 2], on_part=heard.append)
    assert tuple(heard) == PARTS == ("upscale", "encode", "noise")


def test_a_stage_without_steps_keeps_the_upscaled_picture() -> None:
    heard: list[str] = []
    engine = limited()
    result = handoff(engine, pictures(), stage(40, 24, ()), None, seeds=[1, 2], on_part=heard.append)
    assert (result.latents, result.encoded) == (None, None)
    assert result.image.shape == (2, 3, 24, 40)
    assert (heard, engine.asked) == (["upscale"], [])


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_a_batch_that_does_not_fit_is_encoded_one_by_one(posterior: str) -> None:
    tight, wide = limited(1), limited()
    arguments: Any = (pictures(3), stage(), None)
    result = handoff(tight, *arguments, seeds=[4, 5, 6], posterior=posterior)
    whole = handoff(wide, *arguments, seeds=[4, 5, 6], posterior=posterior)
    assert result.latents is not None
    assert whole.latents is not None
    assert [count for count, _, _ in tight.asked] == [3, 1, 1, 1]
    assert torch.allclose(result.latents, whole.latents, atol=1e-6)


@pytest.mark.parametrize(("batch", "tries"), [(1, [1]), (3, [3, 1])])
def test_an_image_that_does_not_fit_is_one_sentence(batch: int, tries: list[int]) -> None:
    engine = limited(0, RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    with pytest.raises(MemoryError, match="encoding one image of 32x32"):
        handoff(engine, pictures(batch), stage(), None, seeds=list(range(batch)))
    assert [count for count, _, _ in engine.asked] == tries


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"):
        handoff(limited(0, RuntimeError("shapes differ")), pictures(), stage(), None, seeds=[1, 2])


@pytest.mark.parametrize("part", PARTS)
def test_cancel_is_polled_in_every_part(part: str) -> None:
    heard: list[str] = []
    with pytest.raises(Cancelled):
        handoff(ENGINE, pictures(), stage(), None, seeds=[1, 2], on_part=heard.append, cancel=lambda: heard[-1] == part)
    assert heard[-1] == part


def test_cancel_is_polled_between_images_that_are_encoded_one_by_one() -> None:
    engine = limited(1)
    with pytest.raises(Cancelled):
        handoff(engine, pictures(3), stage(), None, seeds=[1, 2, 3], cancel=lambda: len(engine.asked) == 2)
    assert [count for count, _, _ in engine.asked] == [3, 1]


def test_seeds_and_posterior_are_checked() -> None:
    with pytest.raises(ValueError, match="seeds must hold one seed per image, got 1 for 2 images"):
        handoff(ENGINE, pictures(), stage(), None, seeds=[1])
    with pytest.raises(ValueError, match="posterior must be 'mode' or 'sample', got 'mean'"):
        handoff(ENGINE, pictures(), stage(), None, seeds=[1, 2], posterior="mean")


class Own:
    """An upscaler of a user's."""

    name, scale = "own", 2

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, images: Tensor) -> Tensor:
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result(images)


def doubled(images: Tensor) -> Tensor:
    return images.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (RuntimeError("shapes do not fit\nmore"), "the upscaler own failed (RuntimeError: shapes do not fit), so"),
        (KeyError("a"), "the upscaler own failed (KeyError: 'a'), so"),
        (lambda images: doubled(images) * float("nan"), "the upscaler own returned NaN or infinity, so"),
        (lambda images: images, "asks for (2, 3, 32, 32), so"),
        (lambda images: doubled(images) * 255, "instead of 0 to 1, so"),
        (lambda images: None, "the upscaler own returned NoneType instead of a float tensor in [0, 1], so"),
    ],
)
def test_an_upscaler_that_fails_costs_the_detail_and_not_the_run(result: Any, said: str) -> None:
    made = handoff(ENGINE, pictures(), stage(), Own(result), seeds=[7, 8])
    assert torch.equal(made.image, upscale_to(pictures(), 32, 32))
    [sentence] = made.warnings
    assert said in sentence
    assert sentence.endswith("upscaled with Lanczos, which leaves fine detail soft; use another upscaler.")


@pytest.mark.parametrize("error", [Cancelled(), MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_stopping_and_memory_are_not_the_upscalers_failures(error: Exception) -> None:
    with pytest.raises((Cancelled, MemoryError)):
        handoff(ENGINE, pictures(), stage(), Own(error), seeds=[7, 8])


def test_a_picture_that_is_not_finite_is_not_the_upscalers_failure() -> None:
    images = pictures()
    images[1] = float("nan")
    made = handoff(ENGINE, images, stage(sigmas=()), Own(doubled), seeds=[7, 8])
    assert made.warnings == ()
    assert torch.equal(made.image[0], doubled(images)[0])
    assert bool(made.image[1].isnan().all())
