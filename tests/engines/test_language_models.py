"""Pipelines that read prompts with a language model: against the pipelines themselves; alpha; rewritten prompts."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from pipeline_tools import listening, network_of
from tiny_pipelines import TWICE
from torch import Tensor

from mrflow_sched import MrFlow, demo
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.folder import read_layout
from mrflow_sched.engines.diffusers.layouts import find_layout
from mrflow_sched.sampling.noise import draw_noise, stage_seed

GUIDED = ("qwen-image-2.1", "krea2", "ernie-image", "longcat-image", "ovis-image", "nucleus-image")
DISTILLED = ("qwen-image-2.1-turbo", "krea2-turbo", "ernie-image-turbo")
PROMPTS, NEGATIVES = ["a red star", "hills and a river in the rain"], ["fog", "words"]
SMALL: dict[str, Any] = {"width": 128, "height": 128, "preset": "2+1", "solver": "euler", "seed": 3}


@functools.cache
def tiny(name: str) -> Any:
    """One pipeline of each name for all tests: none of them may change it."""
    return tiny_pipelines.make(name)


def as_asked(name: str, scale: float | None) -> dict[str, Any]:
    """Guidance and switches, as both `MrFlow` and the pipeline's own call take them."""
    layout = find_layout(tiny(name))
    word = "true_cfg_scale" if "true_cfg_scale" in layout.call_names else "guidance_scale"
    asked: dict[str, Any] = {} if scale is None else {word: scale}
    return asked | ({layout.rewrite_switch: False} if layout.rewrite_switch else {})


@pytest.mark.parametrize(
    ("name", "scale"),
    [*((name, 3.0) for name in GUIDED), ("qwen-image-2.1", 1.0), ("krea2", 0.0), *((name, None) for name in DISTILLED)],
)
def test_stage_one_is_the_pipelines_own_picture(name: str, scale: float | None) -> None:
    pipe, off = tiny(name), scale is None or scale == as_off(name)
    mrflow, given = MrFlow(pipe, upscaler=TWICE), as_asked(name, scale)
    asked = {**SMALL, "preset": "8+1" if name == "qwen-image-2.1-turbo" else "3+1"}
    if not off:
        given["negative_prompt"] = NEGATIVES
    with listening(pipe) as heard:
        made = mrflow(PROMPTS, **asked, **given, output_type="pt", keep_stages=True)
    assert torch.equal(made.images, mrflow(PROMPTS, **asked, **given, output_type="pt").images)
    layout, stage = find_layout(pipe), made.plan.stages[0]
    noise = draw_noise(
        layout.latent_shape(64, 64), [stage_seed(seed, 0, 0, made.plan.seed_rule) for seed in made.seeds]
    )
    if scale is None:
        given |= layout.guidance_arguments(1.0)
    more: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": stage.steps, "output_type": "pt"}
    times: list[Tensor] = []
    for row, prompt in enumerate(PROMPTS):
        own = given if off else {**given, "negative_prompt": NEGATIVES[row]}
        with listening(pipe) as told:
            native = pipe(prompt=prompt, latents=layout.call_latents(noise[row : row + 1]), **own, **more).images
        torch.testing.assert_close(made.stages[0].image[row : row + 1], native, atol=2e-5, rtol=0)
        times = told.timesteps
    # The network is told the same times, and in the refine stage the plan's sigma in the pipeline's own unit.
    assert times[0][0] == heard.timesteps[0][0]
    last = heard.timesteps[-1] / times[0][0]
    assert last.tolist() == pytest.approx([0.12] * len(last), abs=1e-6)
    assert made.plan.stages[1].sigmas == (0.12, 0.0)


def as_off(name: str) -> float:
    return 0.0 if name.startswith("krea2") else 1.0


def test_a_prompt_does_not_change_the_images_of_others() -> None:
    # Qwen-Image 2.1 puts image tokens behind the text, padding included: natively a longer prompt beside it moves them.
    mrflow = MrFlow(tiny("qwen-image-2.1"), upscaler=TWICE)
    both = mrflow(PROMPTS, **SMALL, output_type="pt").images
    for row, prompt in enumerate(PROMPTS):
        asked: dict[str, Any] = {**SMALL, "seed": 3 + row}
        alone = mrflow(prompt, **asked, output_type="pt").images
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", GUIDED)
def test_the_given_embeddings_of_a_prompt_make_its_picture(name: str) -> None:
    mrflow, layout = MrFlow(tiny(name), upscaler=TWICE), find_layout(tiny(name))
    scale = as_asked(name, 3.0)
    wanted = mrflow("a red star", **SMALL, **scale, negative_prompt="fog", output_type="pt").images
    text = layout.encode_text(["a red star"], ["fog"])
    made = mrflow(**SMALL, **scale, **text, output_type="pt").images
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=0)
    positive = {word: value for word, value in text.items() if not word.startswith("negative_")}
    again = mrflow(**SMALL, **scale, **positive, negative_prompt="fog", output_type="pt").images
    torch.testing.assert_close(again, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["qwen-image-2.1", "longcat-image", "nucleus-image", "krea2"])
def test_guidance_for_some_steps_is_that_guidance(name: str) -> None:
    # Over the whole run it is the one scale; outside the interval the second branch is not run, nor its cache needed.
    mrflow, scale = MrFlow(tiny(name), upscaler=TWICE), as_asked(name, 3.0)
    asked = {**SMALL, "preset": "4+1", "negative_prompt": "fog", "output_type": "pt", "keep_stages": True}
    whole = mrflow("a star", **asked, **scale).stages[0].image
    within = mrflow("a star", **asked, **scale, guidance_interval=(0.0, 1.0)).stages[0].image
    torch.testing.assert_close(within, whole, atol=2e-5, rtol=0)
    with listening(tiny(name)) as heard:
        part = mrflow("a star", **asked, **scale, guidance_interval=(0.0, 0.9), refine_guidance=1).stages[0].image
    assert len(heard.states) == 1 + 3 * 2 + 1
    assert not torch.allclose(part, whole, atol=1e-4)


def test_the_norm_of_longcats_guidance_is_held_in_stages() -> None:
    mrflow, scale = MrFlow(tiny("longcat-image"), upscaler=TWICE), as_asked("longcat-image", 4.0)
    on, off = (
        mrflow("a star", **SMALL, **scale, enable_cfg_renorm=value, output_type="pt", keep_stages=True).stages[0].image
        for value in (True, False)
    )
    assert not torch.allclose(on, off, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ its own numbers


def test_turbo_walks_the_sigmas_of_its_model_index() -> None:
    pipe = tiny("qwen-image-2.1-turbo")
    family = MrFlow(pipe, upscaler=TWICE).family
    assert family.shift.lists == ((*pipe.config.sample_sigmas, 0.0),)
    with pytest.raises(MrFlowError, match="must take 8 steps, for which the model has sigmas of its own, got 6"):
        MrFlow(pipe, upscaler=TWICE)("a star", low_steps=6)
    shifted = tiny_pipelines.make("qwen-image-2.1-turbo")
    shifted.scheduler = type(shifted.scheduler)(shift=3.0)
    assert MrFlow(shifted, upscaler=TWICE).family.shift.lists[0][1] == pytest.approx(3 * 0.978453 / (1 + 2 * 0.978453))
    shifted.scheduler = type(shifted.scheduler)(use_dynamic_shifting=True)
    with pytest.raises(MrFlowError, match=r"moves the pipeline's own sample_sigmas.* turn use_dynamic_shifting"):
        MrFlow(shifted, upscaler=TWICE)
    for wrong in ([1.0, 1.2], [0.5, 0.2], "1, 0.5", [1.0, "x"]):
        shifted = tiny_pipelines.make("qwen-image-2.1-turbo")
        shifted.register_to_config(sample_sigmas=wrong)
        with pytest.raises(MrFlowError):
            MrFlow(shifted, upscaler=TWICE)


def test_krea_2_turbo_has_one_mu_for_every_size() -> None:
    mrflow = MrFlow(tiny("krea2-turbo"), upscaler=TWICE)
    for side in (512, 2048):
        assert mrflow.plan(side, side).stages[0].mu == pytest.approx(1.15)
    raw = MrFlow(tiny("krea2"), upscaler=TWICE)
    assert raw.plan(1024, 1024).stages[0].mu == pytest.approx(0.5 + (1024 - 256) * 0.65 / (6400 - 256))
    assert raw.plan(1024, 1024, guidance=4.5).stages[0].guidance == 4.5


def test_qwen_image_21_draws_on_a_grid_of_two_tokens() -> None:
    made = MrFlow(tiny("qwen-image-2.1"), upscaler=TWICE)("a star", width=100, height=90, preset="2+1", seed=1)
    assert [(stage.width, stage.height) for stage in made.plan.stages] == [(64, 64), (128, 96)]
    assert made.images[0].size == (100, 90)
    assert made.plan.stages[0].tokens == 16


# --------------------------------------------------------------------------------------------------------- transparency


def half_clear() -> Image.Image:
    """A red disc on nothing, whose hidden colour is green."""
    rows, columns = np.mgrid[:64, :64]
    inside = (rows - 32) ** 2 + (columns - 32) ** 2 < 400
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., 1] = 255
    pixels[inside] = (255, 0, 0, 255)
    return Image.fromarray(pixels, "RGBA")


def test_alpha_is_kept_from_the_first_stage_to_the_last() -> None:
    pipe = tiny("qwen-image-2.1")
    mrflow = MrFlow(pipe, upscaler=str(demo.upscaler_path()), colour_guard=True)
    made = mrflow("a star", **SMALL, keep_stages=True)
    assert [stage.image.shape[1] for stage in made.stages] == [4, 4]
    assert (made.images[0].mode, made.images[0].size) == ("RGBA", (128, 128))
    assert pipe("a star", width=64, height=64, num_inference_steps=1).images[0].mode == "RGBA"
    assert mrflow("a star", **SMALL, output_type="np").images.shape == (1, 128, 128, 4)
    pixels = mrflow("a star", **SMALL, output_type="pt").images
    assert torch.equal(
        (pixels[0] * 255).round().to(torch.uint8), torch.as_tensor(np.array(made.images[0])).permute(2, 0, 1)
    )
    draft = mrflow.draft("a star", **SMALL)[0]
    assert draft.image.mode == "RGBA"
    assert np.array_equal(np.array(mrflow.finish(draft).images[0]), np.array(made.images[0]))
    stopped = mrflow("a star", **SMALL, cancel=lambda: True).images[0]
    assert stopped.getpixel((0, 0)) == (128, 128, 128, 255)


def test_hidden_colour_leaves_no_fringe_and_the_model_reads_alpha() -> None:
    pipe, seen = tiny("qwen-image-2.1"), list[Tensor]()
    vae = pipe.vae
    plain, pipe_encode = MrFlow(pipe, upscaler=TWICE), vae.encode
    vae.encode = lambda pixels, *more, **named: (seen.append(pixels), pipe_encode(pixels, *more, **named))[1]
    try:
        made = plain("a star", image=half_clear(), width=128, height=128, preset="2+1", seed=1)
        flat = plain("a star", image=half_clear().convert("RGB"), width=128, height=128, preset="2+1", seed=1)
    finally:
        del vae.encode
    disc, opaque = (each[0, :, 0] / 2 + 0.5 for each in seen)
    assert disc.shape == (4, 128, 128)
    visible = disc[3] > 0.02
    assert float(disc[1][visible].max()) < 0.02  # no green at the disc's edge
    assert (float(disc[3].min()), float(disc[3].max())) == (0.0, 1.0)
    assert float(opaque[3].min()) > 1 - 1e-6
    assert made.images[0].mode == flat.images[0].mode == "RGBA"
    kept = plain("a star", image=half_clear(), width=128, height=128, preset="2+0", seed=1).images[0]
    assert (kept.getpixel((0, 0))[3], kept.getpixel((64, 64))) == (0, (255, 0, 0, 255))


def test_models_without_alpha_still_give_it_back() -> None:
    made = MrFlow(tiny("krea2-turbo"), upscaler=TWICE)("a star", image=half_clear(), preset="2+1", seed=1).images[0]
    assert (made.mode, made.getpixel((0, 0))[3]) == ("RGBA", 0)


# ---------------------------------------------------------------------------------------------------- rewritten prompts


@pytest.mark.parametrize(
    ("name", "switch"), [("ernie-image-enhancer", "use_pe"), ("longcat-image", "enable_prompt_rewrite")]
)
def test_a_prompt_is_rewritten_once_and_always_alike(name: str, switch: str) -> None:
    pipe = tiny(name)
    mrflow, layout = MrFlow(pipe, upscaler=TWICE), find_layout(pipe)
    state = torch.get_rng_state()
    made = mrflow("a red star", **SMALL, output_type="pt")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(made.images, mrflow("a red star", **SMALL, output_type="pt").images)
    [note] = [each for each in made.warnings if "rewrote the prompt" in each]
    assert note.endswith(f"{switch}=False leaves it as it is.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        native = layout.rewritten(["a red star", "a red star"], {}, (128, 128))
    assert native[0] == native[1] != "a red star"
    off: dict[str, Any] = {**SMALL, switch: False}
    plain = mrflow(native[0], **off, output_type="pt")
    assert torch.equal(plain.images, made.images)
    assert not any("rewrote" in each for each in plain.warnings)


def test_the_enhancer_is_told_the_final_size() -> None:
    pipe = tiny_pipelines.make("ernie-image-enhancer")
    told: list[dict[str, Any]] = []
    object.__setattr__(
        pipe, "_enhance_prompt_with_pe", lambda prompt, device, **size: (told.append(size), prompt + "!")[1]
    )
    mrflow = MrFlow(pipe, upscaler=TWICE)
    mrflow(["a star", "a star", "hills"], width=128, height=64, preset="2+1", seed=1)
    mrflow.draft("a star", width=128, height=64, preset="2+1", seed=1)
    assert told == [{"width": 128, "height": 64}] * 3


# -------------------------------------------------------------------------------------------------------------- folders


def test_a_constructor_that_asks_its_processor_is_looked_at_without_weights(tmp_path: Any) -> None:
    tiny("qwen-image-2.1").save_pretrained(tmp_path / "model")
    layout = read_layout(tmp_path / "model")
    assert layout.family.name == "qwen-image-2.1"
    assert network_of(layout.pipe).device.type == "meta"
    made = MrFlow.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")(
        "a star", **SMALL, output_type="pt"
    )
    wanted = MrFlow(tiny("qwen-image-2.1"))("a star", **SMALL, output_type="pt")
    torch.testing.assert_close(made.images, wanted.images, atol=1e-4, rtol=0)
