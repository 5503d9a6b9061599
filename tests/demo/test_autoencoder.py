"""The autoencoder without diffusers is diffusers' own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mrflow_sched import demo
from mrflow_sched._runtime.torchvision_ops import ensure_ops
from mrflow_sched.demo.autoencoder import Autoencoder, load_autoencoder


@pytest.fixture(scope="module")
def own() -> Autoencoder:
    return load_autoencoder()


@pytest.fixture(scope="module")
def theirs() -> Any:
    ensure_ops()
    import diffusers

    library: Any = diffusers
    return library.AutoencoderKL.from_pretrained(demo.weights_path() / "vae").eval()


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (3, 20, 36), (5, 4, 12), (2, 132, 8)])
@torch.no_grad()
def test_both_ways_are_those_of_diffusers(own: Autoencoder, theirs: Any, batch: int, height: int, width: int) -> None:
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(batch)) * 2 - 1
    latents = own.encode(images)
    assert latents.shape == (batch, 16, height // 4, width // 4)
    torch.testing.assert_close(latents, theirs.encode(images).latent_dist.mode(), atol=1e-5, rtol=0)
    decoded = own.decode(latents)
    assert decoded.shape == images.shape
    torch.testing.assert_close(decoded, theirs.decode(latents).sample, atol=1e-5, rtol=0)


def test_its_latents_are_what_the_network_works_on() -> None:
    config = json.loads((demo.weights_path() / "vae" / "config.json").read_text())
    assert (config["scaling_factor"], config["shift_factor"]) == (1.0, 0.0)
    assert (config["latents_mean"], config["latents_std"]) == (None, None)


def test_it_comes_ready_to_run(own: Autoencoder) -> None:
    assert not own.training
    assert {(weight.dtype, weight.requires_grad) for weight in own.parameters()} == {(torch.float32, False)}


def test_loading_draws_no_random_numbers() -> None:
    before = torch.random.get_rng_state()
    load_autoencoder()
    assert torch.equal(torch.random.get_rng_state(), before)
