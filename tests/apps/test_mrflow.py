"""`MrFlow`: one call for any pipeline, and what people use with pipelines beside it."""

from __future__ import annotations

import copy
import inspect
import logging
import threading
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
from mrflow_sched.apps.pipeline import MrFlowOutput
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
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
    assert any("70x64 is made at 64x64" in warning for warning in result.warnings)
    assert (result.plan.seed, result.plan.stages[1].sigmas) == (3, (0.12, 0.0))
    assert not result.cancelled
    assert MrFlow(flux).plan(128, 64, sigma=0.2).stages[1].sigmas == (0.2, 0.0)


# ------------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_inference_steps": 4}, "num_inference_steps is not accepted, as the plan decides it; use low_steps and"),
        ({"sigmas": [1.0]}, "use low_steps, refine_steps and sigma"),
        ({"latents": None}, "use seed, or image with strength"),
        (
            {"low_stepz": 3},
            "low_stepz is neither a plan option nor .* of FluxPipeline; did you mean low_steps",
        ),
        ({"zzz": 3}, "zzz is neither a plan option nor an argument of FluxPipeline; make_plan and"),
        ({"seed": [1, 2]}, "seed must be one, or one per image, got 2 for 1 images"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator are both given"),
        ({"strength": 0.5}, "strength=0.5 needs an image to start from"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": []}, "prompt is empty; describe the image"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number of at least 1, got 0"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt must be one text or one per prompt, got 2 for 1 prompts"),
        ({"sigma": 1.5}, "sigma must lie between 0 and 1, got 1.5"),
        ({"preset": "99+1"}, "preset '99\\+1' is not one of family 'flux1-dev'"),
        ({"image": "file.png"}, "image is str; give a PIL image, an array or a tensor"),
        ({"image": torch.full((3, 8, 8), 2.0)}, "image must hold floats from 0 to 1"),
        ({"image": torch.rand(3, 8, 8), "strength": 1.5}, "start_sigma must be above 0 and at most 1, got 1.5"),
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
    alpha = torch.zeros((1, 32, 32))
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
    assert float(found[0, 3, 2, 2]) == pytest.approx(0.0, abs=0.01)


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
    numbers: dict[str, Any] = {"width": 64, "height": 64, "seed": 3, "output_type": "pt", "keep_stages": True}
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
