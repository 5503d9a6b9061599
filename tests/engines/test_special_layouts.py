"""Pipelines with conventions of their own: text inside the call, two networks, pixels as latents, lists of sigmas."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from pipeline_tools import listening
from tiny_pipelines import TWICE
from torch import Tensor

from bench.tiny import special
from mrflow_sched import MrFlow
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.folder import read_layout
from mrflow_sched.engines.diffusers.layouts import Layout, find_layout
from mrflow_sched.engines.diffusers.layouts.shift import shift_rule
from mrflow_sched.engines.diffusers.view import remembering, returning, view_of
from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.make import make_native_plan
from mrflow_sched.sampling.noise import draw_noise

IN_CALL = ("ideogram4", "bria-fibo", "bria-fibo2", "dreamlite", "dreamlite-mobile")
NAMES = tuple(name for name in (*special.PIPELINES, "prx", "lumina-next") if name in tiny_pipelines.available())
LOW = (96, 64)
STEPS = 2


@functools.cache
def tiny(name: str) -> Any:
    """One pipeline of each name for all tests: none of them may change it."""
    return tiny_pipelines.make(name)


def made(pipe: Any, prompt: Any = "a red star", **changes: Any) -> Any:
    """A staged run from 96x64 to 192x128 on Euler steps."""
    short: dict[str, Any] = {"max_sequence_length": 64} if type(pipe).__name__ == "Ideogram4Pipeline" else {}
    numbers: dict[str, Any] = {
        "low_steps": STEPS,
        "solver": "euler",
        "seed": 3,
        "width": 2 * LOW[0],
        "height": 2 * LOW[1],
    }
    return MrFlow(pipe, upscaler=TWICE)(prompt, output_type="pt", keep_stages=True, **{**short, **numbers, **changes})


def available(name: str) -> None:
    if name not in tiny_pipelines.available():
        pytest.skip(f"the installed diffusers has no pipeline of {name}")


def natively(pipe: Any, layout: Layout, guidance: float, **options: Any) -> Tensor:
    """The pipeline's own picture of stage 1: its own scheduler, from the noise of seed 3."""
    view = view_of(pipe, **layout.view_attributes(guidance, *LOW))
    start = layout.pack(draw_noise(layout.latent_shape(*LOW), [3]))
    view.prepare_latents = returning(view.prepare_latents, start)
    size: dict[str, Any] = {"width": LOW[0], "height": LOW[1], "num_inference_steps": STEPS, "output_type": "pt"}
    return view("a red star", **size, **layout.guidance_arguments(guidance), **options).images


# ------------------------------------------------------------------------------------------------ against the pipeline


@pytest.mark.parametrize("guidance", [7.0, 1.0])
def test_ideograms_two_networks_draw_its_own_picture(guidance: float) -> None:
    available("ideogram4")
    pipe, layout = tiny("ideogram4"), find_layout(tiny("ideogram4"))
    ours = made(pipe, guidance_scale=guidance).stages[0].image
    theirs = natively(pipe, layout, guidance, max_sequence_length=64)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert ours.std() > 0.1


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_pixels_are_the_latents_of_a_pipeline_without_vae(guidance: float) -> None:
    available("prx-pixel")
    pipe, layout = tiny("prx-pixel"), find_layout(tiny("prx-pixel"))
    result = made(pipe, guidance_scale=guidance)
    pixels = natively(pipe, layout, guidance, use_resolution_binning=False)  # from -1 to 1 where a tensor is asked for
    torch.testing.assert_close(result.stages[0].image, (pixels / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layout.decode(layout.encode(images)), images)
    assert layout.encode(images).std() < images.mul(2).std()  # noise has a deviation of 2 there, which is 1 here
    assert layout.family.vae_factor == 1
    assert layout.family.latent_channels == 3


def test_a_pipeline_that_could_have_a_vae_is_asked_for_it() -> None:
    available("prx")
    pipe = tiny_pipelines.make("prx")
    pipe.vae = None
    with pytest.raises(MrFlowError, match="PRXPipeline without vae; load it with all of its components"):
        find_layout(pipe)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 10, 28])
def test_brias_plan_has_the_pipelines_own_list(steps: int, dynamic: bool) -> None:
    available("bria")
    pipe = tiny_pipelines.make("bria")
    kind: Any = type(pipe.scheduler)
    pipe.scheduler = kind(use_dynamic_shifting=True) if dynamic else kind(shift=1.5)
    layout = find_layout(pipe)
    text = layout.encode_text(["a red star"])
    pipe(**layout.stage_arguments(text, 1.0, *LOW), num_inference_steps=steps, output_type="latent")
    planned = make_native_plan(layout.family, *LOW, steps=steps).stages[0].sigmas
    assert [float(sigma) for sigma in pipe.scheduler.sigmas] == pytest.approx(planned, abs=1e-6)


def test_a_shift_of_ideograms_scheduler_moves_its_logits() -> None:
    scheduler: Any = tiny_pipelines.diffusers().FlowMatchEulerDiscreteScheduler(shift=2.0)
    rule = shift_rule(scheduler, get_family("ideogram4").shift)
    assert (rule.kind, rule.std) == ("logit-normal", 1.5)
    assert rule.base_shift == pytest.approx(0.6931, abs=1e-4)


def test_the_patch_is_the_networks_where_models_of_a_family_differ() -> None:
    available("prx")
    pipe = tiny_pipelines.make("prx")
    assert (find_layout(pipe).family.patch, find_layout(pipe).family.grid) == (2, 16)
    pipe.transformer.register_to_config(patch_size=1)
    assert (find_layout(pipe).family.patch, find_layout(pipe).family.grid) == (1, 8)


@pytest.mark.parametrize(("name", "time"), [("ideogram4", 1 - 0.12), ("dreamlite", 120.0), ("dreamlite-mobile", 120.0)])
def test_the_refine_stage_sees_the_plans_sigma_and_its_state_beside_other_things(name: str, time: float) -> None:
    available(name)
    pipe, layout = tiny(name), find_layout(tiny(name))
    with listening(pipe) as heard:
        upscaled = next(each.image for each in made(pipe).stages if each.name == "stage 2 upscaled")
    noise = draw_noise(layout.latent_shape(2 * LOW[0], 2 * LOW[1]), [4])
    wanted = layout.pack(0.12 * noise + 0.88 * layout.encode(upscaled))
    state = heard.states[-1][:1]
    seen = state[:, -wanted.shape[1] :] if name == "ideogram4" else state[..., : wanted.shape[-1]]
    torch.testing.assert_close(seen, wanted, atol=2e-5, rtol=0)
    assert float(heard.timesteps[-1][0]) == pytest.approx(time, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("name", NAMES)
def test_images_of_a_batch_are_what_they_are_alone(name: str) -> None:
    pipe, guided = tiny(name), find_layout(tiny(name)).family.guidance_kind == "cfg"
    prompts, words = ["", "a red star", "hills under a very long grey sky"], ["", "rain and fog", ""]
    takes = guided and "negative_prompt" in find_layout(pipe).call_names

    def negative(rows: slice) -> dict[str, Any]:
        return {"negative_prompt": words[rows]} if takes else {}

    together = made(pipe, prompts, seed=[3, 4, 5], **negative(slice(0, 3))).images
    for row in range(3):
        alone = made(pipe, prompts[row : row + 1], seed=3 + row, **negative(slice(row, row + 1))).images
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=0)
    assert float((together[1] - together[2]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_counts_what_the_networks_are_asked_for(name: str) -> None:
    pipe = tiny_pipelines.make(name)
    guided = find_layout(pipe).family.guidance_kind == "cfg"
    second: list[int] = []
    if name == "ideogram4":
        note = pipe.unconditional_transformer.register_forward_pre_hook
        note(lambda _module, _args, kwargs: second.append(len(kwargs["hidden_states"])), with_kwargs=True)
    usual, count = made(pipe), 0
    for options in ({}, {"refine_guidance": 1.0}, {"guidance_interval": (0.3, 0.95)}, {"guidance_scale": 1.0}):
        if not guided and options:
            continue
        second.clear()
        with listening(pipe) as heard:
            result = made(pipe, **options)
        told = sum(len(state) for state in heard.states) + sum(second)
        assert told == sum(stage.forwards for stage in result.plan.stages), options
        assert bool(result.images.isfinite().all())
        count = count or told
        if options:
            assert told < count
            assert not torch.equal(result.images, usual.images)


@pytest.mark.parametrize("name", IN_CALL)
def test_text_inside_the_call_is_encoded_once(name: str) -> None:
    available(name)
    pipe = tiny_pipelines.make(name)
    seen: list[int] = []
    layers = (
        pipe.text_encoder.language_model if hasattr(pipe.text_encoder, "language_model") else pipe.text_encoder.model
    )
    layers = getattr(layers, "language_model", layers)
    layers.layers[0].register_forward_pre_hook(lambda *_: seen.append(1))
    result = made(pipe, refine_prompt=None)
    once = len(seen)
    assert once == (2 if name.startswith("bria-fibo") else 1)  # a negative text by itself
    again = made(pipe)
    assert len(seen) == 2 * once  # nothing outlives a run
    assert torch.equal(result.images, again.images)
    seen.clear()
    other = made(pipe, refine_prompt="hills")
    assert len(seen) == 2 * once
    assert not torch.equal(other.images, result.images)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in IN_CALL])
def test_embeddings_that_are_given_are_as_good_as_the_prompts(name: str) -> None:
    pipe, layout = tiny(name), find_layout(tiny(name))
    prompts = ["a red star", "hills under a very long grey sky"]
    text = layout.encode_text(prompts)
    wanted = made(pipe, prompts, seed=[3, 4]).images
    assert torch.equal(made(pipe, None, seed=[3, 4], **text).images, wanted)
    positive = {key: value for key, value in text.items() if not key.startswith("negative_")}
    assert torch.equal(made(pipe, None, seed=[3, 4], **positive).images, wanted)


def test_a_negative_prompt_that_has_no_place_is_told_of() -> None:
    available("ideogram4")
    plain, said = made(tiny("ideogram4")), made(tiny("ideogram4"), negative_prompt="rain")
    assert torch.equal(plain.images, said.images)
    assert any("negative prompt" in warning for warning in said.warnings)
    assert not any("negative prompt" in warning for warning in plain.warnings)


@pytest.mark.parametrize("name", ["ideogram4", "prx-pixel", "dreamlite", "bria-fibo2", "kandinsky5"])
def test_a_folder_is_read_and_loaded(name: str, tmp_path: Path) -> None:
    available(name)
    tiny(name).save_pretrained(tmp_path)
    assert read_layout(tmp_path).family.name == name
    loaded = MrFlow.from_pretrained(tmp_path, device="cpu", dtype="float32")
    if name == "prx-pixel":
        loaded.pipe._tokenize_prompts = tiny(name)._tokenize_prompts
    torch.testing.assert_close(made(loaded.pipe).images, made(tiny(name)).images, atol=1e-4, rtol=0)


def test_what_is_encoded_is_remembered_by_all_that_was_asked() -> None:
    calls: list[Any] = []

    def encode(*values: Any, **named: Any) -> tuple[Any, ...]:
        calls.append((values, named))
        return (len(calls),)

    memory: dict[Any, Any] = {}
    asked = remembering(encode, memory)
    first = asked("a", ["b"], torch.tensor([1, 2]), device=torch.device("cpu"), scale=1)
    assert asked("a", ["b"], torch.tensor([1, 2]), scale=1, device=torch.device("cpu")) == first == (1,)
    assert asked("a", ["b"], torch.tensor([1, 3]), scale=1, device=torch.device("cpu")) == (2,)
    assert asked("a", ["b"], torch.tensor([1, 2]), scale=True, device=torch.device("cpu")) == (3,)
    assert asked(object()) != asked(object())  # what cannot be compared is never remembered
    assert len(memory) == 3
