"""`MrFlow`: one call for any pipeline, and what people use with pipelines beside it."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from pipeline_tools import listening, network_of, snapshot
from torch import Tensor

from mrflow_sched import MrFlow
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.pipeline import MrFlowOutput
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.sampler import Fault
from mrflow_sched.upscaling.fit import upscale_to

SIDE = 64
NUMBERS: dict[str, Any] = {"width": SIDE, "height": SIDE, "low_steps": 2, "output_type": "pt"}


class Doubler:
    """A pixel upscaler of scale 2 by repetition."""

    name, scale = "doubler", 2

    def __call__(self, images: Tensor) -> Tensor:
        return images.repeat_interleave(2, -1).repeat_interleave(2, -2)


def run(pipe: Any, prompt: Any = "a cat", **more: Any) -> MrFlowOutput:
    seed: dict[str, Any] = {} if "generator" in more else {"seed": 3}
    return MrFlow(pipe, upscaler=Doubler())(prompt, **{**NUMBERS, **seed, **more})


@pytest.fixture(scope="module")
def flux() -> Any:
    """A pipeline that no test changes."""
    return tiny_pipelines.make("flux1-dev")


@pytest.fixture(scope="module")
def sd3() -> Any:
    return tiny_pipelines.make("sd3")


# --------------------------------------------------------------------------------------------------------------- images


def test_output_types_are_the_pipelines(flux: Any) -> None:
    tensors = run(flux).images
    assert tensors.shape == (1, 3, SIDE, SIDE)
    pictures = run(flux, output_type="pil").images
    assert isinstance(pictures, list)
    assert isinstance(pictures[0], Image.Image)
    assert (pictures[0].mode, pictures[0].size) == ("RGB", (SIDE, SIDE))
    array = run(flux, output_type="np").images
    assert array.shape == (1, SIDE, SIDE, 3)
    assert np.abs(array - tensors.permute(0, 2, 3, 1).numpy()).max() < 1e-6
    assert np.abs(np.asarray(pictures[0]) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    latents = run(flux, output_type="latent").images
    native = flux("a cat", width=SIDE, height=SIDE, num_inference_steps=1, output_type="latent").images
    assert latents.shape == native.shape
    unpacked = flux._unpack_latents(latents, SIDE, SIDE, flux.vae_scale_factor)
    config = flux.vae.config
    decoded = flux.vae.decode(unpacked / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), tensors, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="output_type must be one of pil, np, pt, latent, got 'jpg'"):
        run(flux, output_type="jpg")


def test_latents_without_a_refine_step_are_those_of_the_upscaled_image(flux: Any) -> None:
    """Not those of stage 1, which are a quarter of the size."""
    asked: dict[str, Any] = {"refine_steps": 0}
    latents = run(flux, output_type="latent", **asked).images
    engine = PipelineEngine(flux)
    expected = engine.layout.pack(engine.encode(run(flux, **asked).images))
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


def test_prompts_times_images_come_in_the_pipelines_order(flux: Any) -> None:
    four = run(flux, ["a cat", "blue"], num_images_per_prompt=2)
    assert four.seeds == (3, 4, 5, 6)
    for number, (prompt, seed) in enumerate((("a cat", 3), ("a cat", 4), ("blue", 5), ("blue", 6))):
        alone = run(flux, prompt, seed=seed).images[0]
        torch.testing.assert_close(alone, four.images[number], rtol=0, atol=1e-3)


def test_seeds_generators_and_neither(flux: Any) -> None:
    given = run(flux, ["a cat"] * 2, seed=[9, 4])
    assert given.seeds == (9, 4)
    drawn = run(flux, num_images_per_prompt=2, generator=torch.Generator().manual_seed(1))
    again = run(flux, num_images_per_prompt=2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn.images, again.images)
    assert len(set(drawn.seeds)) == 2
    torch.testing.assert_close(run(flux, seed=drawn.seeds[1]).images[0], drawn.images[1], rtol=0, atol=1e-3)
    one = torch.Generator().manual_seed(1)
    assert run(flux, generator=one).seeds != run(flux, generator=one).seeds
    both = run(flux, num_images_per_prompt=2, generator=[torch.Generator().manual_seed(each) for each in (1, 2)])
    assert both.seeds[0] == drawn.seeds[0]
    assert run(flux, seed=None).seeds != run(flux, seed=None).seeds


def test_no_global_random_state_is_read_or_changed(flux: Any) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = run(flux)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(run(flux).images, first.images)


def test_what_comes_back_beside_the_images(flux: Any) -> None:
    result = run(flux, keep_stages=True, width=70)
    assert [stage.name for stage in result.stages] == ["stage 1", "stage 2 upscaled"]
    assert result.timings[0].name == "text"
    assert any("70x64 is made at 80x64" in warning for warning in result.warnings)
    assert (result.plan.seed, result.plan.stages[1].sigmas) == (3, (0.12, 0.0))
    assert not result.cancelled
    assert MrFlow(flux).plan(128, 64, sigma=0.2).stages[1].sigmas == (0.2, 0.0)


# ------------------------------------------------------------------------------------------------------------ arguments


def test_a_scale_of_the_pipelines_call_is_a_number_of_any_kind(flux: Any) -> None:
    if "true_cfg_scale" not in inspect.signature(type(flux).__call__).parameters:
        pytest.skip("the installed diffusers has a FluxPipeline without true_cfg_scale")
    plain = run(flux, negative_prompt="blue", true_cfg_scale=2.0).images
    assert torch.equal(run(flux, negative_prompt="blue", true_cfg_scale=np.float64(2.0)).images, plain)
    for value in ("3", float("nan"), [3], {"scale": 3}):
        with pytest.raises(MrFlowError, match="true_cfg_scale must be a number from 0 to 100, got "):
            run(flux, negative_prompt="blue", true_cfg_scale=value)


def test_flux_control_takes_its_hint_as_every_controlled_pipeline() -> None:
    library = tiny_pipelines.diffusers()
    if not hasattr(library, "FluxControlPipeline"):
        pytest.skip("the installed diffusers has no FluxControlPipeline")
    source = tiny_pipelines.make("flux1-dev")
    config = dict(source.transformer.config)
    wider = library.FluxTransformer2DModel(**{**config, "in_channels": 128, "out_channels": 64})
    names = inspect.signature(library.FluxControlPipeline.__init__).parameters
    parts = {name: part for name, part in source.components.items() if name in names}
    pipe = library.FluxControlPipeline(**{**parts, "transformer": wider.eval().requires_grad_(False)})
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(MrFlowError, match="control_image is missing; FluxControlPipeline needs a control image"):
        run(pipe)
    with pytest.raises(MrFlowError, match="control_image is missing, as image is what MrFlow starts from"):
        run(pipe, image=torch.rand(3, 32, 32))
    hints = [torch.zeros(1, 3, SIDE, SIDE), torch.rand(1, 3, SIDE, SIDE)]
    first, second = (run(pipe, control_image=hint).images for hint in hints)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_inference_steps": 4}, "num_inference_steps is not accepted, as the plan decides it; use low_steps and"),
        ({"sigmas": [1.0]}, "use low_steps, refine_steps and sigma"),
        ({"denoising_end": 0.8}, "denoising_end is not accepted, as the plan decides it; use low_steps and refine"),
        ({"denoising_start": 0.2}, "denoising_start is not accepted, as the plan decides it; use image with strength"),
        ({"max_timesteps": 1.5}, "max_timesteps is not accepted"),
        ({"max_sequence_length": "x"}, "max_sequence_length must be a finite number, got 'x'"),
        ({"joint_attention_kwargs": "x"}, "joint_attention_kwargs must be a dict such as {'scale': 0.8}, got 'x'"),
        ({"prompt": None, "prompt_embeds": 3}, "prompt_embeds must be a tensor, or a list of tensors, got 3"),
        ({"pooled_prompt_embeds": ["x"]}, "pooled_prompt_embeds must be a tensor, or a list of tensors, got \\['x'\\]"),
        ({"callback_on_step_end": "x"}, "callback_on_step_end is str; give a function"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "callback_on_step_end_tensor_inputs must be a list of latents"),
        ({"latents": None}, "use seed, or image with strength"),
        (
            {"low_stepz": 3},
            "low_stepz is neither a plan option nor .* of FluxPipeline; did you mean low_steps",
        ),
        ({"zzz": 3}, "zzz is neither a plan option nor an argument of FluxPipeline; a plan.s options are factor, "),
        ({"seed": [1, 2]}, "seed must be one, or one per image, got 2 for 1 images"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator are both given"),
        ({"strength": 0.5}, "strength=0.5 needs an image to start from"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": []}, "prompt is empty; describe the image"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number of at least 1, got 0"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt must be one text or one per prompt, got 2 for 1 prompts"),
        ({"sigma": 1.5}, "sigma must lie between 0 and 1, got 1.5"),
        ({"preset": "99+"}, "preset '99\\+' is not one of family 'flux1-dev'"),
        ({"image": "file.png"}, "image is str; give a PIL image, an array or a tensor"),
        ({"image": torch.full((3, 8, 8), 2.0)}, "image must hold floats from 0 to 1"),
        ({"image": torch.rand(3, 8, 8), "strength": 1.5}, "strength must be above 0 and at most 1, got 1.5"),
        ({"image": torch.rand(3, 8, 8), "strength": 0.0}, "strength must be above 0 and at most 1, got 0.0"),
        ({"image": torch.rand(3, 8, 8), "strength": float("nan")}, "strength must be above 0 and at most 1, got nan"),
        ({"image": torch.rand(3, 8, 8), "strength": "0.5"}, "strength must be above 0 and at most 1, got '0.5'"),
        ({"seed": None, "generator": 5}, "generator is int; give a torch.Generator, or a list of them"),
        ({"seed": None, "generator": [5]}, "generator holds int; give a torch.Generator, or a list of them"),
        ({"seed": 1.5}, "seed must be a whole number, or one per image"),
        ({"seed": ["1"]}, "seed must be a whole number, or one per image"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt must be a whole number of at least 1, got 1.5"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"refine_prompt": ["a", "b"]}, "refine_prompt must be one text or one per prompt, got 2 for 1 prompts"),
        ({"refine_prompt": 3}, "refine_prompt must be a text or a list of texts, got int"),
        ({"negative_prompt": 3}, "negative_prompt must be a text or a list of texts, got int"),
        ({"refine_negative_prompt": ["a", "b"]}, "refine_negative_prompt must be one text or one per prompt, got 2"),
        ({"refine_prompt": "a", "prompt_2": "b"}, "refine_prompt and prompt_2 are both given"),
        ({"refine_lora_scale": "half"}, "refine_lora_scale must be a finite number; .* got 'half'"),
    ],
)
def test_arguments_that_do_not_fit_get_one_sentence(flux: Any, arguments: dict[str, Any], sentence: str) -> None:
    before = snapshot(flux)
    with pytest.raises(ValueError, match=sentence) as caught:
        run(flux, **{"prompt": "a cat", **arguments})
    assert str(caught.value).count("\n") == 0
    assert snapshot(flux) == before


def test_guidance_is_said_in_the_pipelines_words() -> None:
    assert run(tiny_pipelines.make("qwen-image"), true_cfg_scale=2.5).plan.stages[0].guidance == 2.5
    assert run(tiny_pipelines.make("z-image-turbo"), guidance_scale=0.0).plan.stages[0].guidance == 1.0
    sd3 = tiny_pipelines.make("sd3")
    guided, free = run(sd3, guidance_scale=5.0), run(sd3, guidance_scale=1.0)
    assert (guided.plan.forwards, free.plan.forwards) == (6, 3)
    assert not torch.allclose(guided.images, free.images, atol=1e-3)
    refused = run(sd3, guidance_scale=5.0, negative_prompt="blue")
    assert not torch.allclose(guided.images, refused.images, atol=1e-4)


@pytest.mark.parametrize("name", ["flux1-dev", "sd3", "qwen-image", "z-image", "sdxl", "sana"])
def test_embeddings_given_in_place_of_prompts_make_the_same_picture(name: str) -> None:
    pipe = tiny_pipelines.make(name)
    from mrflow_sched.engines.diffusers.layouts import find_layout

    text = find_layout(pipe).encode_text(["a cat", "blue"], None, {})
    mask = {"prompt_embeds_mask": None} if name == "qwen-image" else {}
    said = run(pipe, ["a cat", "blue"], num_images_per_prompt=2)
    given = run(pipe, None, num_images_per_prompt=2, **{**mask, **text})
    torch.testing.assert_close(given.images, said.images, rtol=0, atol=1e-4)
    if name == "sd3":
        own = {key: value for key, value in text.items() if not key.startswith("negative")}
        said = run(pipe, ["a cat", "blue"], num_images_per_prompt=2, negative_prompt=["red", "x"])
        given = run(pipe, None, num_images_per_prompt=2, negative_prompt=["red", "x"], **own)
        torch.testing.assert_close(given.images, said.images, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="prompt and prompt_embeds are both given"):
        run(pipe, "a cat", **text)


def test_callbacks_of_ours_and_of_the_pipeline(flux: Any) -> None:
    fractions: list[float] = []
    states: list[tuple[str, ...]] = []

    def each_step(pipe: Any, step: int, timestep: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(tuple(sorted(kwargs)))
        return {}

    run(
        flux,
        callback=lambda event: fractions.append(event.fraction),
        callback_on_step_end=each_step,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert states == [("latents", "prompt_embeds")] * 3
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    stopped = run(flux, cancel=lambda: True)
    assert stopped.cancelled
    assert stopped.unfinished


# ----------------------------------------------------------------------------------------------- pictures to start from


def test_upscale_mode_refines_a_given_picture_at_the_plans_sigma(flux: Any) -> None:
    picture = torch.rand((3, 32, 40), generator=torch.Generator().manual_seed(4))
    with listening(flux) as heard:
        result = run(flux, image=picture, width=None, height=None, keep_stages=True)
    assert result.images.shape == (1, 3, 64, 80)
    assert len(heard.states) == 1
    torch.testing.assert_close(result.stages[0].image, upscale_to(picture[None], 80, 64, Doubler()))
    assert not any(warning.startswith("Stage 1") for warning in result.warnings)
    weak = run(flux, image=picture, sigma=0.02, width=None, height=None).images
    strong = run(flux, image=picture, sigma=0.6, width=None, height=None).images
    assert float((weak - result.images).abs().mean()) < float((strong - result.images).abs().mean())
    wide = run(flux, image=picture, width=160, height=None, factor=4.0)
    assert wide.images.shape == (1, 3, 128, 160)


@pytest.mark.parametrize("form", ["pil", "np", "pt"])
def test_alpha_is_kept_by_resampling_it_apart(flux: Any, form: str) -> None:
    colour = torch.rand((3, 32, 32), generator=torch.Generator().manual_seed(4)).mul(255).round() / 255
    alpha = torch.full((1, 32, 32), 51 / 255)
    alpha[:, 8:24, 8:24] = 1.0
    tensor = torch.cat([colour, alpha])
    array = (tensor * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    image: Any = {"pil": Image.fromarray(array, "RGBA"), "np": array, "pt": tensor}[form]
    result = run(flux, image=image, width=None, height=None, output_type=form)
    plain = run(flux, image=colour, width=None, height=None)
    if form == "pil":
        assert result.images[0].mode == "RGBA"
        found = torch.as_tensor(np.asarray(result.images[0])).permute(2, 0, 1)[None] / 255
    else:
        found = result.images if form == "pt" else torch.as_tensor(result.images).permute(0, 3, 1, 2)
    assert found.shape == (1, 4, 64, 64)
    torch.testing.assert_close(found[:, :3], plain.images, rtol=0, atol=0.51 / 255)
    assert float(found[0, 3, 32, 32]) == pytest.approx(1.0, abs=0.01)
    assert float(found[0, 3, 2, 2]) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("upscaler", [None, Doubler()])
def test_a_transparent_image_gets_no_fringe(flux: Any, upscaler: Any) -> None:
    """A white disc on the transparent black that editors write stays white on white, as in viewers."""
    y, x = np.mgrid[0:40, 0:48]
    alpha = (np.clip(15.5 - np.hypot(y - 20, x - 24), 0, 1) * 255).astype(np.uint8)
    array = np.concatenate([np.repeat(np.where(alpha > 2, 255, 0)[..., None], 3, -1), alpha[..., None]], -1)
    logo = Image.fromarray(array.astype(np.uint8))
    result = MrFlow(flux, upscaler=upscaler)("a", image=logo, seed=1, refine_steps=0).images[0]
    made = np.asarray(result).astype(float)
    on_white = made[..., :3] * made[..., 3:] / 255 + 255 - made[..., 3:]
    assert result.size == (96, 80)
    assert on_white.min() >= 253


@pytest.mark.parametrize("refine_steps", [0, 1])
def test_an_odd_size_comes_out_as_asked_with_its_transparency(flux: Any, refine_steps: int) -> None:
    logo = torch.rand(4, 32, 32)
    asked: dict[str, Any] = {"image": logo, "refine_steps": refine_steps, "output_type": "pt"}
    odd = run(flux, width=61, height=58, **asked)
    even = run(flux, width=64, height=64, **asked)
    assert torch.equal(odd.images, even.images[..., 3:-3, 1:-2])
    assert any("The requested 61x58 is made at 64x64" in warning for warning in odd.warnings)
    latents = run(flux, width=61, height=58, **{**asked, "output_type": "latent"}).images
    assert latents.shape == run(flux, width=64, height=64, **{**asked, "output_type": "latent"}).images.shape


def test_what_was_cropped_guessed_or_overruled_is_told(flux: Any) -> None:
    photo = Image.new("RGB", (24, 32), (200, 90, 30))
    photo.getexif()[0x0112] = 6
    photo.info["icc_profile"] = b"no profile"
    result = run(flux, image=photo, width=64, height=64, refine_steps=0)
    assert any("colour profile is damaged" in warning for warning in result.warnings)
    assert (
        "The image of 32x24 is not shaped like 64x64: it is upscaled to 85x64 and cropped at the centre, losing 24.7% "
        "of the image."
    ) in result.warnings
    result = run(flux, image=torch.rand(3, 64, 64), strength=0.05, sigma=0.2, low_steps=2)
    assert any("strength=0.05 is below the sigma 0.2 at which" in warning for warning in result.warnings)
    result = run(flux, image=torch.rand(3, 32, 32), strength=0.5, low_steps=2)
    assert not any("strength" in warning or "cropped" in warning for warning in result.warnings)
    with pytest.raises(MrFlowError, match="image holds 2 images for 1 prompt"):
        run(flux, image=torch.rand(2, 3, 32, 32))


def test_image_and_strength_are_where_stage_1_begins(sd3: Any) -> None:
    picture = Image.fromarray((np.random.default_rng(5).random((64, 64, 3)) * 255).astype(np.uint8))
    with listening(sd3) as heard:
        result = run(sd3, image=picture, strength=0.7, low_steps=4, width=None, height=None)
    assert result.images.shape == (1, 3, 64, 64)
    first = [float(time[0]) / 1000 for time in heard.timesteps]
    below = [sigma for sigma in result.plan.stages[0].sigmas if 0 < sigma < 0.7]
    assert first == pytest.approx([0.7, *below, 0.12], abs=1e-4)
    faint = run(sd3, image=picture, strength=0.05, low_steps=4, width=None, height=None, keep_stages=True)
    other = run(
        sd3, "blue", seed=8, image=picture, strength=1.0, low_steps=4, width=None, height=None, keep_stages=True
    )
    pure = run(sd3, "blue", seed=8, low_steps=4, keep_stages=True)
    assert torch.equal(other.stages[0].image, pure.stages[0].image)  # all noise: nothing is left of the picture
    assert not torch.allclose(faint.stages[0].image, other.stages[0].image, atol=0.05)


# ------------------------------------------------------------------------------------- other words in the later stages


@pytest.mark.parametrize("name", ["flux1-dev", "sd3", "sdxl"])
def test_later_stages_may_have_words_of_their_own(name: str) -> None:
    """Stage 1 is that of the first prompt alone; the refine stage is what the other prompt refines from its image."""
    pipe = tiny_pipelines.make(name)
    plain = run(pipe, keep_stages=True)
    other = run(pipe, keep_stages=True, refine_prompt="blue")
    assert torch.equal(other.stages[0].image, plain.stages[0].image)
    low = plain.stages[0].image
    torch.testing.assert_close(other.images, run(pipe, "blue", image=low, seed=3).images, rtol=0, atol=1e-5)
    assert float((other.images - plain.images).abs().max()) > 1e-4
    assert torch.equal(run(pipe, refine_prompt="a cat").images, plain.images)
    two = run(pipe, ["a cat", "red"], refine_prompt=["blue", "red"], num_images_per_prompt=2, seed=3)
    torch.testing.assert_close(two.images[0], other.images[0], rtol=0, atol=1e-3)


def test_later_stages_may_have_a_negative_prompt_of_their_own() -> None:
    pipe = tiny_pipelines.make("sd3")
    plain = run(pipe, keep_stages=True, guidance_scale=5.0)
    other = run(pipe, keep_stages=True, guidance_scale=5.0, refine_negative_prompt="blue")
    assert torch.equal(other.stages[0].image, plain.stages[0].image)
    low = plain.stages[0].image
    alone = run(pipe, image=low, guidance_scale=5.0, negative_prompt="blue").images
    torch.testing.assert_close(other.images, alone, rtol=0, atol=1e-5)
    assert float((other.images - plain.images).abs().max()) > 1e-4


def test_texts_are_encoded_once_for_each_set_of_words(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    usual = PipelineEngine.encode_text

    def counted(self: PipelineEngine, prompts: Any, *rest: Any, **more: Any) -> Any:
        asked.append(tuple(prompts))
        return usual(self, prompts, *rest, **more)

    monkeypatch.setattr(PipelineEngine, "encode_text", counted)
    run(flux, stages=3, width=128, height=128, refine_prompt="blue")
    assert asked == [("a cat",), ("blue",)]
    asked.clear()
    run(flux, refine_prompt="a cat")
    run(flux, image=torch.rand(3, 32, 32), refine_prompt="blue")  # stage 1 is not run: nobody reads its words
    assert asked == [("a cat",), ("blue",)]


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("flux1-dev", "joint_attention_kwargs"),
        ("sdxl", "cross_attention_kwargs"),
        ("flux2-klein", "attention_kwargs"),  # and its network takes joint_attention_kwargs
    ],
)
def test_a_lora_may_have_another_scale_in_the_later_stages(name: str, argument: str) -> None:
    pytest.importorskip("peft")
    pipe = tiny_pipelines.make(name)
    torch.manual_seed(0)
    network = network_of(pipe)
    _lora(network)
    full = run(pipe, keep_stages=True)
    before = snapshot(pipe)
    off = run(pipe, keep_stages=True, refine_lora_scale=0.0)
    assert snapshot(pipe) == before
    assert torch.equal(off.stages[0].image, full.stages[0].image)
    low: dict[str, Any] = {"image": full.stages[0].image}
    torch.testing.assert_close(off.images, run(pipe, **low, **{argument: {"scale": 0.0}}).images, rtol=0, atol=1e-5)
    assert float((off.images - full.images).abs().max()) > 1e-4
    given = {"scale": 0.0}
    back = run(pipe, keep_stages=True, refine_lora_scale=1.0, **{argument: given})
    torch.testing.assert_close(back.images, run(pipe, image=back.stages[0].image).images, rtol=0, atol=1e-5)
    assert given == {"scale": 0.0}
    assert torch.equal(run(pipe).images, full.images)  # nothing of it stays


def test_a_copy_or_a_pickle_makes_the_same_image(flux: Any) -> None:
    from mrflow_sched import demo

    first = MrFlow(flux, upscaler=demo.upscaler_path(), compile_mode="default")
    wanted = first("a cat", seed=3, **NUMBERS)
    for made in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert made.pipe is not flux
        again = made("a cat", seed=3, **NUMBERS)
        assert torch.equal(again.images, wanted.images)
        assert (again.plan, again.warnings) == (wanted.plan, wanted.warnings)


def test_a_lora_scale_that_can_do_nothing_is_told(flux: Any) -> None:
    made = run(flux, refine_lora_scale=0.5)
    assert "The pipeline has no LoRA loaded: the scale of LoRAs changes nothing." in made.warnings
    assert torch.equal(made.images, run(flux).images)
    with pytest.raises(ValueError, match=r"refine_lora_scale=0.5 cannot be used, as Lumina.* takes no LoRA scale"):
        run(tiny_pipelines.make("lumina-next"), refine_lora_scale=0.5)


# -------------------------------------------------------------------------------------------------- what a result says


def test_a_network_of_no_numbers_is_named_and_its_black_image_is_unfinished() -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    torch.nn.init.constant_(pipe.transformer.proj_out.weight, float("nan"))
    made = run(pipe, output_type="pil", num_images_per_prompt=2)
    assert made.unfinished
    assert made.faults == (Fault("network", 1, 1),) * 2
    assert sum("the network returned NaN" in warning for warning in made.warnings) == 2
    assert not any("upscaler" in warning for warning in made.warnings)
    assert [image.getextrema() for image in made.images] == [((0, 0),) * 3] * 2
    assert run(tiny_pipelines.make("flux1-dev")).faults == (None,)


def test_a_text_encoder_of_no_numbers_is_named() -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    for parameter in pipe.text_encoder_2.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    assert run(pipe).faults == (Fault("text", 1),)


def test_a_vae_that_fails_in_the_last_stage_keeps_the_upscaled_image(
    flux: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = run(flux, keep_stages=True)
    usual = PipelineEngine.decode

    def decode(self: PipelineEngine, latents: Tensor) -> Tensor:
        images = usual(self, latents)
        return images * float("nan") if images.shape[-1] == SIDE else images

    monkeypatch.setattr(PipelineEngine, "decode", decode)
    made = run(flux)
    assert made.faults == (Fault("decode", 2),)
    assert torch.equal(made.images, good.stages[1].image)
    latents = run(flux, output_type="latent").images
    engine = PipelineEngine(flux)
    torch.testing.assert_close(latents, engine.layout.pack(engine.encode(made.images)))


def test_images_that_the_safety_checker_made_black_are_told() -> None:
    pipe = tiny_pipelines.make("sd15")
    assert run(pipe).nsfw_content_detected is None
    pipe.safety_checker = object()
    pipe.run_safety_checker = lambda images, *_: (images, [False, True])
    made = run(pipe, num_images_per_prompt=2, output_type="pil")
    assert made.nsfw_content_detected == (False, True)
    assert made.images[1].getextrema() == ((0, 0),) * 3
    assert made.images[0].getextrema() != ((0, 0),) * 3
    assert "Image 2 is black, as the pipeline's safety checker rejected it." in made.warnings


class Tinting(Doubler):
    """Doubles and makes all redder."""

    def __call__(self, images: Tensor) -> Tensor:
        return (super().__call__(images) + torch.tensor([0.06, 0.0, 0.0]).view(1, 3, 1, 1)).clamp(0, 1)


def test_the_colour_guard_takes_back_a_cast_and_leaves_all_else(flux: Any) -> None:
    asked: Any = {**NUMBERS, "seed": 3, "keep_stages": True, "refine_steps": 0}
    tinted = MrFlow(flux, upscaler=Tinting())("a cat", **asked)
    guarded = MrFlow(flux, upscaler=Tinting(), colour_guard=True)("a cat", **asked)
    low = tinted.stages[0].image.mean((0, 2, 3))
    assert float((tinted.images.mean((0, 2, 3)) - low)[0]) > 0.04
    torch.testing.assert_close(guarded.images.mean((0, 2, 3)), low, rtol=0, atol=2 / 255)
    plain = MrFlow(flux, upscaler=Doubler())("a cat", **asked)
    same = MrFlow(flux, upscaler=Doubler(), colour_guard=True)("a cat", **asked)
    assert torch.equal(plain.images, same.images)


def test_a_run_tells_the_logger_what_it_tells_its_caller(flux: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mrflow_sched"):
        asked: Any = {**NUMBERS, "width": 70}
        made = MrFlow(flux)("a cat", seed=3, **asked)
    heard = [(record.levelname, record.getMessage()) for record in caplog.records if record.name.startswith("mrflow")]
    assert ("INFO", f"plan {made.plan.to_string()}") in heard
    assert any(level == "INFO" and "stage 2 decode" in said for level, said in heard)
    assert any(level == "WARNING" and "Lanczos" in said for level, said in heard)
    assert all(note in [said for _, said in heard] for note in made.plan.notes)


def test_every_warning_is_in_the_result_and_the_log_and_no_filter_ends_the_run(
    flux: Any, caplog: pytest.LogCaptureFixture
) -> None:
    picture = Image.fromarray(np.zeros((30, 32), np.uint8)).convert("RGB")
    asked: Any = {"width": SIDE, "height": SIDE, "negative_prompt": "x", "refine_lora_scale": 0.5, "image": picture}
    with caplog.at_level(logging.INFO, logger="mrflow_sched"), warnings.catch_warnings():
        warnings.simplefilter("error")
        made = run(flux, "cat " * 2000, **asked)
    heard = [record.getMessage() for record in caplog.records if record.name.startswith("mrflow_sched")]
    for part in ("no negative prompt", "its end was cut off", "no LoRA loaded", "upscaled to 68x64 and cropped"):
        assert [part in each for each in made.warnings].count(True) == 1
    assert set(made.warnings) < set(heard)
    assert len(heard) == len(set(heard))
    assert not any("Stage 1 at" in each for each in heard)  # which is not run


def test_nothing_is_printed_by_a_program_that_sets_no_logging_up() -> None:
    code = "import mrflow_sched, logging; logging.getLogger('mrflow_sched.sampler').warning('x')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("", "")


@pytest.mark.parametrize("error", [MemoryError("mine"), RuntimeError("out of memory, I say")])
def test_memory_that_runs_out_in_the_pipelines_callback_is_the_callers(flux: Any, error: Exception) -> None:
    def fail(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        raise error

    with pytest.raises(type(error)) as caught:
        run(flux, image=torch.rand(3, 32, 32), num_images_per_prompt=2, callback_on_step_end=fail)
    assert caught.value is error


# -------------------------------------------------------------------------------------------- what people use with them


def _lora(network: Any) -> None:
    from peft import LoraConfig

    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False), "style")


def test_a_lora_is_at_work_in_both_stages() -> None:
    pytest.importorskip("peft")
    pipe = tiny_pipelines.make("flux1-dev")
    plain = run(pipe, keep_stages=True)
    picture = plain.stages[0].image[0]
    torch.manual_seed(0)
    _lora(pipe.transformer)
    before = snapshot(pipe)
    styled = run(pipe, keep_stages=True)
    assert float((styled.stages[0].image - plain.stages[0].image).abs().max()) > 1e-3
    refined = run(pipe, image=picture)
    assert snapshot(pipe) == before
    pipe.transformer.disable_adapters()
    assert torch.equal(run(pipe, keep_stages=True).images, plain.images)
    assert float((run(pipe, image=picture).images - refined.images).abs().max()) > 1e-3


def test_the_scale_of_a_lora_reaches_both_stages() -> None:
    pytest.importorskip("peft")
    pipe = tiny_pipelines.make("flux1-dev")
    plain = run(pipe)
    torch.manual_seed(0)
    _lora(pipe.transformer)
    scales = {"scale": 0.0}
    off = run(pipe, joint_attention_kwargs=scales)
    torch.testing.assert_close(off.images, plain.images, rtol=0, atol=1e-5)
    assert scales == {"scale": 0.0}
    assert not torch.allclose(run(pipe).images, plain.images, atol=1e-3)


def _controlled() -> Any:
    """A FLUX.1 pipeline with a ControlNet of random weights."""
    diffusers = tiny_pipelines.diffusers()
    if not hasattr(diffusers, "FluxControlNetPipeline"):
        pytest.skip("the installed diffusers has no FluxControlNetPipeline")
    base = tiny_pipelines.make("flux1-dev")
    torch.manual_seed(1)
    network = diffusers.FluxControlNetModel.from_transformer(
        base.transformer, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
    )
    for parameter in network.parameters():  # a new ControlNet ends in zeros, which would hide it
        torch.nn.init.normal_(parameter, std=0.2)
    pipe = diffusers.FluxControlNetPipeline(**base.components, controlnet=network.eval().requires_grad_(False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("form", ["picture", "tensor", "function"])
def test_a_control_hint_is_made_for_every_stage(form: str) -> None:
    pipe = _controlled()
    array = np.zeros((80, 80, 3), dtype=np.uint8)
    array[20:60, 20:60] = 255
    picture = Image.fromarray(array)
    asked: list[tuple[int, int]] = []

    def draw(width: int, height: int) -> Image.Image:
        asked.append((width, height))
        return picture.resize((width, height))

    tensor = torch.as_tensor(array).permute(2, 0, 1)[None] / 255
    hint: Any = {"picture": picture, "tensor": tensor, "function": draw}[form]
    sizes: list[int] = []
    handle = pipe.controlnet.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(kwargs["controlnet_cond"].shape[1]), with_kwargs=True
    )
    result = run(pipe, control_image=hint, controlnet_conditioning_scale=1.0)
    handle.remove()
    assert sizes == [4, 4, 16]
    assert asked == ([(32, 32), (64, 64)] if form == "function" else [])
    without = run(pipe, control_image=hint, controlnet_conditioning_scale=0.0)
    assert float((result.images - without.images).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="every tile the whole control_image"):
        run(pipe, control_image=hint, tile=256)


def test_a_hints_window_goes_by_the_noise_that_is_gone_where_steps_are_asked_alone() -> None:
    """Nobody says how far such a run is: at sigma 0.9 a tenth is behind, at 0.2 four fifths."""
    pipe = _controlled()
    engine = PipelineEngine(pipe, arguments={"control_image": torch.zeros(1, 3, 32, 32), "control_guidance_end": 0.5})
    scales: list[float] = []
    handle = pipe.controlnet.register_forward_pre_hook(
        lambda _module, _args, kwargs: scales.append(float(kwargs["conditioning_scale"])), with_kwargs=True
    )
    text, state = engine.encode_text(["a cat"]), torch.ones((1, *engine.latent_shape(32, 32)))
    for sigma in (0.9, 0.2):
        engine.denoise(state, torch.tensor([sigma]), text, guidance=3.5)
    handle.remove()
    assert scales == [1.0, 0.0]


def test_what_a_pipeline_draws_besides_noise_is_seeded() -> None:
    pipe = _controlled()
    if "generator" not in inspect.getsource(type(pipe).__call__).partition("vae.encode")[2][:200]:
        pytest.skip("this diffusers draws the hint's posterior from the global generator")
    hint = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(6))
    torch.manual_seed(0)
    first = run(pipe, ["a cat", "blue"], control_image=hint)
    torch.manual_seed(1)
    assert torch.equal(run(pipe, ["a cat", "blue"], control_image=hint).images, first.images)


@pytest.mark.parametrize("kind", ["model", "sequential"])
@pytest.mark.parametrize("name", ["flux1-dev", "sd3"])
def test_offloaded_pipelines_run_and_stay_offloaded(name: str, kind: str) -> None:
    pytest.importorskip("accelerate")
    pipe = tiny_pipelines.make(name)
    plain = run(pipe)
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        pipe.enable_sequential_cpu_offload(device="cpu")
    try:
        pipe("a cat", width=32, height=32, num_inference_steps=1, output_type="latent")
    except TypeError as error:
        pytest.skip(f"this accelerate cannot offload layer by layer to a CPU ({error})")
    before = snapshot(pipe)
    result = run(pipe)
    torch.testing.assert_close(result.images, plain.images, rtol=0, atol=1e-5)
    assert _without_addresses(snapshot(pipe)) == _without_addresses(before)
    assert len(getattr(pipe, "_all_hooks", [])) == (len(before.get("_all_hooks", [])))
    if kind == "model":
        assert all(hook.hook is hook.model._hf_hook for hook in pipe._all_hooks)  # those that are on the modules now
    with pytest.raises(ZeroDivisionError):
        run(pipe, callback_on_step_end=lambda *_: 1 / 0)
    assert _without_addresses(snapshot(pipe)) == _without_addresses(before)
    torch.testing.assert_close(run(pipe).images, plain.images, rtol=0, atol=1e-5)


def _without_addresses(found: dict[str, Any]) -> dict[str, Any]:
    """A snapshot without where weights lie, which moving them to and fro changes."""
    return {key: value[:3] if isinstance(value, tuple) and len(value) == 5 else value for key, value in found.items()}


@pytest.mark.parametrize("switch", ["tiling", "slicing"])
def test_tiling_and_slicing_of_the_vae_stay_switched_on(switch: str) -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    plain = run(pipe)
    getattr(pipe.vae, f"enable_{switch}")()
    before = snapshot(pipe)
    result = run(pipe, ["a cat"] * 2, seed=[3, 4])
    assert snapshot(pipe) == before
    assert getattr(pipe.vae, f"use_{switch}")
    if switch == "slicing":
        torch.testing.assert_close(result.images[0], plain.images[0], rtol=0, atol=1e-3)
    else:
        assert not torch.allclose(result.images[0], plain.images[0], atol=1e-3)  # seams of random weights show


class _Int8(torch.nn.Module):
    """A linear layer with weights of 8 bits and a scale per row."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight, scale = self.get_buffer("weight"), self.get_buffer("scale")
        return torch.nn.functional.linear(x, weight.to(x.dtype) * scale.to(x.dtype), self.bias)


def test_a_network_of_8_bit_weights_runs_in_both_stages() -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    plain = run(pipe)
    for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        for name in ("to_q", "to_k", "to_v"):
            setattr(block.attn, name, _Int8(getattr(block.attn, name)))
    result = run(pipe)
    assert 0 < float((result.images - plain.images).abs().max()) < 0.1


def test_a_compiled_network_is_called_in_both_stages() -> None:
    pipe = tiny_pipelines.make("flux1-dev")
    plain = run(pipe)
    shapes: list[tuple[int, ...]] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        shapes.append(tuple(inputs[0].shape) if isinstance(inputs[0], Tensor) else ())
        return graph.forward

    pipe.transformer = torch.compile(pipe.transformer, backend=backend, dynamic=False)
    result = run(pipe)
    torch.testing.assert_close(result.images, plain.images, rtol=0, atol=1e-4)
    first = len(shapes)
    assert first > 0
    run(pipe, sigma=0.3)
    assert len(shapes) == first  # other numbers of the same sizes recompile nothing


def test_two_threads_on_one_pipeline_give_what_two_runs_in_a_row_give(sd3: Any) -> None:
    wanted = [run(sd3, prompt, seed=seed, low_steps=3, sigma=sigma) for prompt, seed, sigma in _JOBS]
    found: list[MrFlowOutput | None] = [None] * len(_JOBS)
    together = threading.Barrier(len(_JOBS))

    def work(number: int) -> None:
        prompt, seed, sigma = _JOBS[number]
        together.wait()
        found[number] = run(sd3, prompt, seed=seed, low_steps=3, sigma=sigma)

    before = snapshot(sd3)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(_JOBS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert snapshot(sd3) == before
    for alone, beside in zip(wanted, found, strict=True):
        assert beside is not None
        assert torch.equal(beside.images, alone.images)


_JOBS = (("a cat", 3, 0.12), ("blue", 8, 0.3))


def test_parts_that_are_changed_between_calls_count(flux: Any) -> None:
    pipe = copy.copy(flux)
    mrflow = MrFlow(pipe, upscaler=Doubler())
    first = mrflow("a cat", seed=3, **NUMBERS)
    other = tiny_pipelines.make("flux1-dev").transformer
    torch.nn.init.normal_(other.proj_out.weight, generator=torch.Generator().manual_seed(1))
    pipe.transformer = other
    assert not torch.allclose(mrflow("a cat", seed=3, **NUMBERS).images, first.images, atol=1e-3)


def test_memory_that_runs_out_in_the_upscaler_gives_the_small_picture(flux: Any) -> None:
    class Full(Doubler):
        def __call__(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    before = snapshot(flux)
    result = MrFlow(flux, upscaler=Full())("a cat", seed=3, **NUMBERS)
    assert result.images.shape == (1, 3, 32, 32)
    assert result.unfinished
    assert not result.cancelled
    assert any("Memory ran out in 'upscale' of stage 2" in warning for warning in result.warnings)
    assert snapshot(flux) == before
    assert network_of(flux) is flux.transformer


def test_an_upscaler_file_is_read_once_and_early(flux: Any) -> None:
    from mrflow_sched import demo

    with pytest.raises(FileNotFoundError, match="there is no upscaler file"):
        MrFlow(flux, upscaler="nowhere.safetensors")
    made = MrFlow(flux, upscaler=demo.upscaler_path())("a cat", seed=3, **NUMBERS)
    assert made.images.shape == (1, 3, SIDE, SIDE)
    assert not any("Lanczos" in warning for warning in made.warnings)
    assert any("Lanczos" in warning for warning in MrFlow(flux)("a cat", seed=3, **NUMBERS).warnings)


def test_an_upscaler_files_dtype_and_tile_are_options(flux: Any) -> None:
    from mrflow_sched import demo

    path = demo.upscaler_path()
    mrflow = MrFlow(flux, upscaler=path, upscaler_dtype="float32", upscaler_tile=16)
    tiled = mrflow("a cat", seed=3, **NUMBERS)
    kept: Any = mrflow._upscaler
    upscaler = kept.loaded
    assert (upscaler.dtype, upscaler.tile) == (torch.float32, 16)
    assert tiled.images.shape == (1, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="dtype must be"):
        MrFlow(flux, upscaler=path, upscaler_dtype="float8")
    with pytest.raises(ValueError, match="upscaler_tile must be a whole number of at least 16"):
        MrFlow(flux, upscaler=path, upscaler_tile=4)
    for own in (None, Doubler()):
        with pytest.raises(ValueError, match="upscaler_dtype and upscaler_tile are for an upscaler that is loaded"):
            MrFlow(flux, upscaler=own, upscaler_dtype="float32")


def test_lanczos_is_a_word_here_too(flux: Any) -> None:
    said = MrFlow(flux, upscaler="lanczos")("a cat", seed=3, **NUMBERS)
    assert torch.equal(said.images, MrFlow(flux)("a cat", seed=3, **NUMBERS).images)


@pytest.mark.parametrize("wrong", [torch.nn.Identity(), 7, b"x2.pth", lambda images: images])
def test_what_is_no_upscaler_is_refused_at_once(flux: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match="upscaler is"):
        MrFlow(flux, upscaler=wrong)


def test_without_an_upscaler_the_plan_refines_more(flux: Any) -> None:
    plain, sharp = MrFlow(flux), MrFlow(flux, upscaler=Doubler())
    for own, steps, sigma in ((plain, 2, 0.45), (sharp, 1, 0.12)):
        later = own.plan(64, 64).stages[1]
        assert (later.steps, later.start_sigma) == (steps, sigma)
        assert own("a cat", seed=3, **NUMBERS).plan.stages[1] == later
    assert plain.plan(64, 64, upscaler_kind="network").stages[1].start_sigma == 0.12
    assert len(plain.plan(64, 64, native=True, steps=2).stages) == 1
    with pytest.raises(MrFlowError, match=r"upscaler_kind is not accepted.*use MrFlow\(pipe, upscaler"):
        plain("a cat", upscaler_kind="network")


def test_an_upscaler_that_fails_costs_the_detail(flux: Any) -> None:
    class Broken(Doubler):
        def __call__(self, images: Tensor) -> Tensor:
            raise RuntimeError("boom")

    made = MrFlow(flux, upscaler=Broken())("a cat", seed=3, **NUMBERS)
    assert torch.equal(made.images, MrFlow(flux)("a cat", seed=3, **NUMBERS, sigma=0.12, refine_steps=1).images)
    assert not made.unfinished
    assert any("the upscaler doubler failed (RuntimeError: boom), so" in said for said in made.warnings)


def test_images_pass_the_pipelines_own_last_step(sd3: Any) -> None:
    sdxl = tiny_pipelines.make("sdxl")
    plain = run(sdxl).images
    sdxl.watermark = SimpleNamespace(apply_watermark=lambda pixels: pixels.clamp(max=0.0))
    marked = run(sdxl).images
    assert plain.max() > 0.6
    torch.testing.assert_close(marked, plain.clamp(max=0.5))


@pytest.mark.parametrize("name", ["sana", "qwen-image"])
def test_a_stage_says_nothing_that_only_looks_like_a_warning(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers warns of what a scheduler does not know of another's configuration, and of masks that were left out
    as they hide nothing."""
    logger, said = logging.getLogger("diffusers"), list[str]()
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr(logger, "level", logging.WARNING)
    pipe = tiny_pipelines.make(name)
    pipe.scheduler.register_to_config(of_another_version=1)
    logger.addHandler(handler)
    try:
        run(pipe, guidance_scale=1.0)
    finally:
        logger.removeHandler(handler)
    assert not [sentence for sentence in said if "config attributes" in sentence or "prompt_embeds_mask" in sentence]


def test_step_caching_of_diffusers_works_within_stages_and_is_forgotten_between_them() -> None:
    """First-block caching, as a user turns it on: steps of stage 1 are skipped, the refine step is a whole one."""
    diffusers = tiny_pipelines.diffusers()
    if not hasattr(diffusers, "FirstBlockCacheConfig"):
        pytest.skip("the installed diffusers has no first-block cache")
    pipe = tiny_pipelines.make("flux1-dev")
    numbers: dict[str, Any] = {
        "width": 64,
        "height": 64,
        "seed": 3,
        "output_type": "pt",
        "keep_stages": True,
        "refine_steps": 1,
    }
    plain = MrFlow(pipe)("a star", low_steps=6, **numbers)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    cached, again = (MrFlow(pipe)("a star", low_steps=6, **numbers) for _ in range(2))
    pipe.transformer.disable_cache()
    assert torch.equal(cached.images, again.images)
    assert float((cached.images - plain.images).abs().max()) > 1e-3  # something was skipped
    low = next(stage.image for stage in cached.stages if stage.name == "stage 1")
    refined = MrFlow(pipe)("a star", image=low, **numbers)
    assert torch.allclose(refined.images, cached.images, atol=1e-5)
    assert torch.equal(MrFlow(pipe)("a star", low_steps=6, **numbers).images, plain.images)
