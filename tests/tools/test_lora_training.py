"""Training LoRAs of the embedded model: what a step is shown, and that the file is what other programs read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mrflow_sched import demo
from mrflow_sched.sampling.solvers import get_solver
from tools.train_demo import finetune, flow, lora, turbo

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def networks() -> lora.Networks:
    return lora.load_networks("shipped", 4)


def velocity(network: Any, x: Tensor, networks: lora.Networks) -> Tensor:
    tokens, pooled = networks.encode(["a red star"] * len(x))
    sigma = torch.full((len(x),), 0.7)
    return flow.velocity(network, x, sigma, tokens, pooled, torch.full((len(x),), 3.5))


def test_a_fresh_lora_changes_nothing_and_only_it_is_trained(networks: lora.Networks) -> None:
    x = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(velocity(networks.transformer, x, networks), velocity(networks.plain, x, networks))
    names = [name for name, weight in networks.transformer.named_parameters() if weight.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    assert not any(weight.requires_grad for weight in networks.plain.parameters())
    assert len(names) == 2 * len(lora._targets(networks.plain))


def test_the_file_is_a_lora_of_a_flux_pipeline(networks: lora.Networks, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in networks.transformer.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    lora.save(tmp_path / "one.safetensors", networks.transformer)
    pipe: Any = demo.load_engine(device="cpu", dtype="float32").pipe
    pipe.load_lora_weights(str(tmp_path / "one.safetensors"))
    x = torch.randn(2, 16, 16, 16, generator=generator)
    found, wanted = velocity(pipe.transformer, x, networks), velocity(networks.transformer, x, networks)
    plain = velocity(networks.plain, x, networks)
    assert float((wanted - plain).abs().mean()) > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)  # the file holds float16


def test_training_goes_on_from_the_weights_of_a_file(networks: lora.Networks, tmp_path: Path) -> None:
    own: Any = copy.deepcopy(networks.transformer)
    written = {name: weight for name, weight in own.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        for weight in written.values():
            weight.fill_(0.5)  # as exact in the file's float16
    lora.save(tmp_path / "some.safetensors", own)
    fresh: Any = copy.deepcopy(networks.transformer)
    assert not any(torch.equal(fresh.get_parameter(name), weight) for name, weight in written.items())
    lora.load(tmp_path / "some.safetensors", fresh)
    assert written
    assert all(torch.equal(fresh.get_parameter(name), weight) for name, weight in written.items())


def test_turbo_walks_as_plans_do_and_the_teacher_passes_its_levels() -> None:
    few, many = turbo.sigmas(turbo.STEPS), turbo.sigmas(turbo.STEPS * turbo.FINER)
    assert few == pytest.approx(many[:: turbo.FINER])
    noise = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return x * (1 - sigma) / (1 + sigma**2)

    states = turbo.walk("multistep", noise, few, denoise)
    wanted = get_solver("multistep")(lambda x, sigma: denoise(x, float(sigma[0])), noise, few)
    assert len(states) == turbo.STEPS
    torch.testing.assert_close(states[-1], wanted)


def test_turbos_loss_is_that_of_few_steps_before_it_has_learnt(networks: lora.Networks) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in networks.transformer.named_parameters():
            weight *= 0.0 if "lora_B" in name else 1.0
    lesson = turbo.Turbo()
    lesson.begin(networks, lora.LoraSettings(batch=2), 0)
    loss = lesson.loss(0)
    loss.backward()
    gradient = sum(float(each.grad.abs().sum()) for each in networks.transformer.parameters() if each.grad is not None)
    networks.transformer.zero_grad()
    assert 0.0 < float(loss) < 2.0
    assert gradient > 0.0


@pytest.mark.parametrize("kind", ["inked", "arrow"])
def test_fine_tunes_differ_from_the_world_in_what_they_are_named_for(kind: Any) -> None:
    number = finetune.TEST_FIRST + 2
    scene = finetune.scene_of(kind, number)
    mine, plain = finetune.picture_of(kind, scene, number), finetune.further.picture_of(scene, number)
    assert mine.shape == (256, 256, 3)
    assert 0.0 <= mine.min() < mine.max() <= 1.0
    changed = np.abs(mine - plain).max(-1) > 0.05
    assert 0.005 < changed.mean() < 0.95
    text = finetune.caption_of(kind, scene)
    assert ("arrow" in text) == (kind == "arrow")
    assert finetune.STAND_IN not in text or kind != "arrow"
    assert np.array_equal(plain, finetune.further.picture_of(scene, number))  # the world draws as it did
