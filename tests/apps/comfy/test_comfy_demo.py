"""The embedded model as ComfyUI's objects: what it gives them is what the engine has."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from comfy_doubles import forget
from demo_doubles import demo_in_comfy
from safetensors.torch import load_file
from torch import Tensor, nn

from mrflow_sched import demo as embedded
from mrflow_sched.demo.autoencoder import load_autoencoder
from mrflow_sched.demo.drawing import render
from mrflow_sched.demo.scenes import random_scene

PROMPT = embedded.example_prompts()[0]


@pytest.fixture(scope="module")
def room() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        yield demo_in_comfy(patch)
    forget()


@pytest.fixture(scope="module")
def sockets(room: Any) -> tuple[Any, ...]:
    """What the node gives: MODEL, CLIP, VAE, UPSCALE_MODEL."""
    return room.MrFlowDemoModel.execute().args


@pytest.fixture(scope="module")
def engine() -> Any:
    return embedded.load_engine(device="cpu", dtype="float32")


def pictures(count: int, size: int) -> Tensor:
    """(count, size, size, 3) in [0, 1], as pictures are in ComfyUI."""
    drawn = [render(random_scene(np.random.default_rng([7, k])), size, k) for k in range(count)]
    return torch.from_numpy(np.stack(drawn))


def test_the_node_says_what_it_gives(room: Any) -> None:
    found = room.MrFlowDemoModel.define_schema()
    assert (found.node_id, found.category, found.inputs) == ("MrFlowDemoModel", "sampling/MrFlow", [])
    assert [socket.kind for socket in found.outputs] == ["Model", "Clip", "Vae", "UpscaleModel"]
    assert all(socket.words["tooltip"] for socket in found.outputs)


def test_every_execution_makes_its_own_objects(room: Any, sockets: tuple[Any, ...]) -> None:
    again = room.MrFlowDemoModel.execute().args
    assert not {id(each) for each in sockets} & {id(each) for each in again}
    assert again[2].first_stage_model is not sockets[2].first_stage_model


def test_the_network_is_a_flux_whose_heads_are_the_files(sockets: tuple[Any, ...]) -> None:
    patcher = sockets[0]
    config = patcher.model.model_config
    assert type(config).__name__ == "DemoFlux", "its family is found by this name"
    assert (config.unet_config["axes_dim"], config.unet_config["num_heads"]) == ([8, 28, 28], 4)
    assert config.unet_config["hidden_size"] == 256, "what ComfyUI found out and need not be mended stays"
    assert config.unet_config["dtype"] == torch.float32, "what ComfyUI chooses on a CPU"
    stored = load_file(embedded.weights_path() / "transformer" / "diffusion_pytorch_model.safetensors")
    assert set(patcher.model.weights) == {f"converted.{name}" for name in stored}


def test_latents_are_16_channels_at_a_quarter_as_they_come_from_the_vae(sockets: tuple[Any, ...], engine: Any) -> None:
    kind, vae = sockets[0].model.model_config.latent_format, sockets[2]
    shape = engine.latent_shape(256, 256)
    assert (kind.latent_channels, 256 // kind.spacial_downscale_ratio) == shape[:2]
    latents = vae.encode(pictures(3, 64))
    expected = engine.encode(pictures(3, 64).movedim(-1, 1))
    torch.testing.assert_close(kind.process_in(latents), expected, atol=1e-5, rtol=0)
    decoded = vae.decode(latents)
    torch.testing.assert_close(decoded.movedim(-1, 1), engine.decode(expected), atol=1e-5, rtol=0)


def test_nothing_of_the_autoencoder_that_stood_in_is_left(sockets: tuple[Any, ...]) -> None:
    vae = sockets[2]
    assert vae.patcher.model is vae.first_stage_model
    assert vae.model_size() == sum(4 * weight.numel() for weight in load_autoencoder().parameters())
    assert (vae.downscale_ratio, vae.upscale_ratio, vae.latent_channels) == (4, 4, 16)
    leaves = [each for each in vae.first_stage_model.modules() if list(each.parameters(recurse=False))]
    assert all(hasattr(each, "comfy_cast_weights") for each in leaves), "ComfyUI can stream every layer"
    # The image is as large as its latent is at four times the sides: half the bits, half the bytes.
    encode, decode = vae.memory_used_encode, vae.memory_used_decode
    assert encode((1, 3, 512, 256), torch.float32) == 2 * encode((1, 3, 256, 256), torch.float32)
    assert decode((1, 16, 64, 64), torch.float32) == 2 * decode((1, 16, 64, 64), torch.bfloat16)
    assert 1e7 < decode((1, 16, 64, 64), torch.float32) < 1e8, "some dozens of values a pixel of 256x256"


def test_live_previews_show_the_colours_that_are_decoded(sockets: tuple[Any, ...]) -> None:
    kind, images = sockets[0].model.model_config.latent_format, pictures(6, 128)
    latents = sockets[2].encode(images).movedim(1, -1)
    factors, bias = torch.tensor(kind.latent_rgb_factors), torch.tensor(kind.latent_rgb_factors_bias)
    shown = nn.functional.linear(latents, factors.T, bias).add(1).div(2)
    meant = nn.functional.avg_pool2d(images.movedim(-1, 1), 4).movedim(1, -1)
    assert (shown - meant).square().mean() < 1e-6
    known = torch.cat([latents[..., :3].reshape(-1, 3), torch.ones(latents[..., 0].numel(), 1)], 1)
    best = torch.linalg.lstsq(known.double(), (meant * 2 - 1).reshape(-1, 3).double()).solution
    torch.testing.assert_close(torch.cat([factors[:3], bias[None]]).double(), best, atol=1e-3, rtol=0)


@pytest.mark.parametrize("text", [PROMPT, "", "a cat on a sofa " * 40])
def test_a_text_means_what_it_means_to_the_engine(sockets: tuple[Any, ...], engine: Any, text: str) -> None:
    clip = sockets[1]
    [[words, more]] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    expected = engine.encode_text([text]).arguments
    assert set(more) == {"pooled_output"}
    torch.testing.assert_close(words, expected["prompt_embeds"], atol=1e-5, rtol=0)
    torch.testing.assert_close(more["pooled_output"], expected["pooled_prompt_embeds"], atol=1e-5, rtol=0)


def test_both_encoders_can_be_given_their_own_text(sockets: tuple[Any, ...]) -> None:
    """As core's CLIPTextEncodeFlux does."""
    clip = sockets[1]
    both = clip.tokenize(PROMPT)
    [[words, more]] = clip.encode_from_tokens_scheduled({**both, "t5xxl": clip.tokenize("")["t5xxl"]})
    [[all_words, all_more]] = clip.encode_from_tokens_scheduled(both)
    assert torch.equal(more["pooled_output"], all_more["pooled_output"])
    assert not torch.equal(words, all_words)


def test_what_is_not_known_of_a_prompt_is_logged_once(room: Any, caplog: pytest.LogCaptureFixture) -> None:
    clip = room.demo_clip()
    with caplog.at_level(logging.INFO, "mrflow"):
        for text in (PROMPT, "", "a cat", "a cat", "a dog", "a cat", "hills", "hills"):
            clip.tokenize(text)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert said[0].startswith("MrFlow: The embedded model does not know 'cat', so")
    assert said[0].endswith("For anything else load a model of your own in this node's place.")
    assert "'dog'" in said[1]
    assert said[2].startswith("MrFlow: The embedded model does not understand 'hills', though it knows the words")


def test_the_upscaler_is_as_core_loads_one(sockets: tuple[Any, ...]) -> None:
    found = sockets[3]
    assert found.scale == 2
    assert found.patcher.model is found.model
    assert not found.model.training
    with torch.inference_mode():
        assert found(torch.zeros(1, 3, 16, 24)).shape == (1, 3, 32, 48)
