"""What people give `MrFlow` by habit or by mistake: taken where it is clear, else refused in the caller's own words."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from pipeline_tools import snapshot

from mrflow_sched import MrFlow, sample_staged
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.images.convert import from_pictures
from mrflow_sched.methods.tiled import Tiled
from mrflow_sched.sampler import Fault

SMALL: dict[str, Any] = {"width": 64, "height": 64, "low_steps": 2, "seed": 3, "output_type": "pt"}


@pytest.fixture(scope="module")
def flux() -> Any:
    return tiny_pipelines.make("flux1-dev")


def run(pipe: Any, prompt: Any = "a cat", **arguments: Any) -> Any:
    return MrFlow(pipe)(prompt, **{**SMALL, **arguments})


def test_numbers_of_numpy_and_torch_are_numbers(flux: Any) -> None:
    plain = run(flux, ["a", "b"], seed=[5, 9], guidance_scale=2.0, refine_steps=1, factor=2.0)
    same = run(
        flux,
        ["a", "b"],
        width=np.int64(64),
        height=torch.tensor(64),
        low_steps=np.int32(2),
        num_images_per_prompt=np.int64(1),
        seed=np.array([5, 9]),
        guidance_scale=np.float32(2),
        refine_steps=np.array([1]),
        factor=np.float16(2),
    )
    assert torch.equal(same.images, plain.images)
    assert (same.plan, same.seeds) == (plain.plan, plain.seeds)
    assert same.plan.to_json() == plain.plan.to_json()
    assert run(flux, ["a", "b"], seed=torch.tensor([5, 9])).seeds == (5, 9)
    picture = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(1))
    half = run(flux, image=picture, strength=np.float32(0.5))
    assert torch.equal(half.images, run(flux, image=picture, strength=0.5).images)
    assert all(type(sigma) is float for stage in half.plan.stages for sigma in stage.sigmas)


def test_arrays_that_torch_cannot_take_as_they_are_are_copied() -> None:
    exact = np.random.default_rng(2).integers(0, 256, (6, 8, 3), np.uint8)
    picture = Image.fromarray(exact)
    expected = torch.from_numpy(exact).permute(2, 0, 1)[None] / 255
    frozen = exact.copy()
    frozen.flags.writeable = False
    floats = (exact / 255).astype(">f4")
    given = (np.asarray(picture), frozen, exact[..., ::-1][..., ::-1], np.flip(np.flip(exact, 0).copy(), 0), floats)
    for each in given:
        torch.testing.assert_close(from_pictures(each), expected, rtol=0, atol=1e-6)
    assert torch.equal(from_pictures(exact[..., ::-1]), expected.flip(1))


def test_images_are_one_for_all_one_per_prompt_or_one_each(flux: Any) -> None:
    pictures = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    four = run(flux, ["a", "b"], num_images_per_prompt=2, image=pictures).images
    spread = run(flux, ["a", "b"], num_images_per_prompt=2, image=pictures[[0, 0, 1, 1]]).images
    assert torch.equal(four, spread)
    with pytest.raises(
        MrFlowError, match="image holds 3 images for 2 prompts of 2 images each; give one image, or one"
    ):
        run(flux, ["a", "b"], num_images_per_prompt=2, image=torch.rand(3, 3, 32, 32))


def test_options_of_stage_1_have_no_effect_beside_an_image_and_a_note_says_so(flux: Any) -> None:
    picture = torch.rand(3, 32, 32)
    sentence = (
        "The image replaces stage 1, so low_steps had no effect; give strength too, to start stage 1 from the image."
    )
    assert sentence in run(flux, image=picture).warnings
    assert sentence not in run(flux, image=picture, low_steps=None).warnings
    assert sentence not in run(flux, image=picture, strength=0.5).warnings


CUBE = torch.linspace(0, 1, 192).view(3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"guidance_scale": "3"}, "guidance_scale must be a number from 0 to 100, got '3'"),
        ({"guidance_scale": True}, "guidance_scale must be a number from 0 to 100, got True"),
        ({"true_cfg_scale": "3"}, "true_cfg_scale must be a number from 0 to 100, got '3'"),
        ({"image": CUBE, "strength": True}, "strength must be above 0 and at most 1, got True"),
        ({"image": CUBE, "width": "64", "height": None}, "width must be a whole number from 1 to 32768, got '64'"),
        ({"keep_stages": "x"}, "keep_stages must be True or False, got 'x'"),
        ({"callback_on_step_end": "x"}, "callback_on_step_end is str; give a function, or leave it out"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "must be a list of latents, prompt_embeds, got 'latents'"),
        ({"callback_on_step_end_tensor_inputs": ["nope"]}, r"must be a list of latents, prompt_embeds, got \['nope'\]"),
        ({"method": Tiled}, r"method is the class Tiled; give an object of it: Tiled\(...\)"),
        ({"image": CUBE * 255}, r"image must hold floats from 0 to 1, got 0 to 255; divide them by 255"),
        ({"image": CUBE * 2 - 1}, r"image must hold floats from 0 to 1, got -1 to 1; scale them by x / 2 \+ 0.5"),
        ({"image": CUBE * 1.1}, r"image must hold floats from 0 to 1, got 0 to 1.1; clamp them"),
        ({"image": CUBE.log().sub(9).sqrt()}, "image holds NaN or infinity; mend it, or give another"),
        ({"image": CUBE.numpy()}, r"image is an array of shape \(3, 8, 8\); give \(H, W, C\) as an array"),
        ({"image": CUBE.permute(1, 2, 0)}, r"image is a tensor of shape \(8, 8, 3\); give .* \(C, H, W\) as a tensor"),
        ({"image": CUBE.to_sparse()}, "image is a sparse tensor; give a dense one"),
        ({"image": CUBE.to("meta")}, 'image is a tensor on the device "meta", which holds no values'),
        ({"refine_steps": []}, r"refine_steps must be one number, as there is one later stage, got \[\]"),
        ({"stages": 1}, "stages must be a whole number from 2 to 8, got 1; one stage is native sampling: .* itself"),
        (
            {"native": True},
            "native is not accepted, as the plan decides it; use the pipeline itself for native sampling",
        ),
        (
            {"num_steps": 4},
            "num_steps is neither .*; did you mean (refine|low)_steps or (refine|low)_steps",
        ),
        ({"promt_2": "x"}, "promt_2 is neither .*; did you mean prompt_2"),
        ({"upscaler": None}, r"upscaler is an option of MrFlow itself, not of its call; say MrFlow\(pipe, upscaler="),
        ({"colour_guard": True}, "colour_guard is an option of MrFlow itself"),
        ({"prompt": None, "prompt_embeds": 3}, "prompt_embeds must be a tensor, or a list of tensors, got 3"),
        ({"prompt": None, "prompt_embeds": torch.full((1, 4, 32), torch.nan)}, "prompt_embeds holds NaN or infinity"),
    ],
)
def test_a_refusal_names_what_the_caller_wrote(flux: Any, arguments: dict[str, Any], sentence: str) -> None:
    if "true_cfg_scale" in set(arguments) - set(inspect.signature(flux.__call__).parameters):
        pytest.skip("the installed FluxPipeline takes no true_cfg_scale")
    before = snapshot(flux)
    with pytest.raises(MrFlowError, match=sentence) as caught:
        run(flux, **{"prompt": "a cat", **arguments})
    assert "\n" not in str(caught.value)
    assert snapshot(flux) == before


def test_a_guidance_that_the_model_lacks_is_refused_by_its_name() -> None:
    with pytest.raises(MrFlowError, match="the guidance scale must be left out or 1 for z-image-turbo"):
        run(tiny_pipelines.make("z-image-turbo"), guidance_scale=3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pipe": "FLUX.1-dev"}, r"pipe is a path, 'FLUX.1-dev'; load .* with MrFlow.from_pretrained\(path\)"),
        ({"pipe": PipelineEngine}, "pipe is the class PipelineEngine; give a loaded pipeline"),
        ({"upscaler_dtype": "fp16", "upscaler": "x.pth"}, "upscaler_dtype must be 'auto', 'float32', .* got 'fp16'"),
        ({"upscaler_tile": "64", "upscaler": "x.pth"}, "upscaler_tile must be a whole number of at least 16, got '64'"),
        ({"upscaler_tile": 64.0, "upscaler": "x.pth"}, "upscaler_tile must be a whole number of at least 16, got 64.0"),
        ({"upscaler_tile": True, "upscaler": "x.pth"}, "upscaler_tile must be a whole number of at least 16, got True"),
        ({"upscaler": "nope.pth"}, "there is no upscaler file 'nope.pth'"),
        ({"upscaler": dict}, r"upscaler is the class dict; give an object of it"),
        ({"colour_guard": "no"}, "colour_guard must be True or False, got 'no'"),
    ],
)
def test_options_of_mrflow_are_refused_by_their_names(flux: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MrFlowError, match=sentence):
        MrFlow(options.pop("pipe", flux), **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"torch_dtype": "x"}, "torch_dtype is no option of MrFlow.from_pretrained; say dtype"),
        ({"variant": "fp16"}, "variant is no option .*; leave it out"),
        ({"device_map": "auto"}, "device_map is no option .*; say device, or offload=True"),
        ({"upscalr": "x"}, "upscalr is no option .*; did you mean upscaler"),
        ({"family": "nope"}, "family 'nope' is unknown"),
        ({"compile_mode": "x"}, "compile_mode must be None or one of"),
        ({"upscaler": "nope.pth"}, "there is no upscaler file 'nope.pth'"),
        ({"upscaler": "a.pth", "upscaler_tile": 3}, "upscaler_tile must be"),
        ({"colour_guard": 2}, "colour_guard must be True or False"),
        ({"offload": "x"}, "offload must be True, False, 'model' or 'layers', got 'x'"),
        ({"config": 3}, "config=3 is for a single file; leave it out for a folder"),
        (
            {"dtype": {"nope": "float32"}},
            "dtype names 'nope', which is no part of this model; its parts are .*transformer",
        ),
        ({"dtype": 3}, "dtype is 3; use auto"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"path": None}, "path is None; give the path of a local diffusers folder or checkpoint"),
        ({"path": 3}, "path is int; give the path"),
    ],
)
def test_from_pretrained_looks_at_its_options_before_it_reads_weights(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], sentence: str
) -> None:
    from mrflow_sched.engines.diffusers import folder

    def read(*_given: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(folder, "load_part", read)
    with pytest.raises(MrFlowError, match=sentence):
        MrFlow.from_pretrained(options.pop("path", tiny_folder), **{"device": "cpu", **options})


def test_a_mrflow_says_what_it_is(flux: Any) -> None:
    assert repr(MrFlow(flux)) == "MrFlow(FluxPipeline, family='flux1-dev', upscaler='lanczos')"


def test_an_upscaler_of_a_file_is_read_again_where_a_copy_of_it_runs(flux: Any) -> None:
    from mrflow_sched import demo

    mrflow = MrFlow(flux, upscaler=demo.upscaler_path())
    kept: Any = mrflow._upscaler
    copied = pickle.loads(pickle.dumps(kept))
    assert copied.loaded is None
    assert copied.name == kept.name
    assert repr(copied.on(torch.device("cpu"))) == repr(kept.loaded)


def test_a_model_that_spandrel_loaded_is_an_upscaler(flux: Any) -> None:
    from spandrel import ModelLoader

    from mrflow_sched import demo, load_upscaler

    path = demo.upscaler_path()
    model = ModelLoader(device="cpu").load_from_file(path)
    upscaler = load_upscaler(path, device="cpu", dtype="float32")
    engine, plan = PipelineEngine(flux), MrFlow(flux).plan(64, 64, low_steps=2)
    expected = sample_staged(engine, plan, "a cat", upscaler=upscaler).images
    torch.testing.assert_close(sample_staged(engine, plan, "a cat", upscaler=model).images, expected)  # type: ignore[arg-type]
    mrflow = MrFlow(flux, upscaler=model)  # type: ignore[arg-type]
    assert mrflow("a cat", **SMALL).images.shape == (1, 3, 64, 64)
    assert "upscaler='lanczos'" not in repr(mrflow)


@pytest.mark.parametrize("at", [0, 1])
def test_a_callback_that_spoils_the_latents_is_named(flux: Any, at: int) -> None:
    """In the middle of stage 1, and after its last step; stage 2 is spoilt by none."""

    def spoil(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * (float("nan") if step == at else 1.0)}

    made = run(flux, callback_on_step_end=spoil)
    assert made.faults == (Fault("callback", 1, at + 1),)
    (sentence,) = (each for each in made.warnings if each.startswith("Image 1"))
    assert (
        f"callback or method that changes latents returned NaN, infinity or values above 1e+06 in step {at + 1}"
        in sentence
    )
