"""The embedded model: small enough to ship, a FLUX.1 pipeline to everyone, and it draws what it is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrflow_sched import demo, load_upscaler, make_native_plan, make_plan, sample_staged
from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.drawing import render, word_boxes
from mrflow_sched.demo.glyphs import LETTERS
from mrflow_sched.demo.scenes import COLOURS, Scene, random_scene
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.upscaling.lanczos import resize_lanczos


@pytest.fixture(scope="module")
def engine() -> PipelineEngine:
    return demo.load_engine(device="cpu", dtype="float32")


def scenes(count: int, size: int) -> torch.Tensor:
    pictures = [render(random_scene(np.random.default_rng([99, k])), size, k) for k in range(count)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())


def test_all_weights_together_stay_below_25_megabytes() -> None:
    files = [path for path in demo.weights_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors", ".txt"}
    assert not [path for path in files if path.suffix == ".json" and "/tmp/" in path.read_text()]


def test_any_flux_script_can_load_the_folder(engine: PipelineEngine) -> None:
    import diffusers

    library: Any = diffusers  # what it exports, a type checker cannot see
    pipe = library.FluxPipeline.from_pretrained(demo.weights_path(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red circle over white snow under a blue sky"
    generator = torch.Generator().manual_seed(5)
    found = pipe(prompt, height=128, width=128, num_inference_steps=2, output_type="pt", generator=generator).images
    assert found.shape == (1, 3, 128, 128)
    assert torch.isfinite(found).all()
    # 512 text tokens, as pipelines pad by default, must mean nearly what the short text means.
    generator = torch.Generator().manual_seed(5)
    size: Any = {"height": 128, "width": 128, "num_inference_steps": 2, "output_type": "pt"}
    short = pipe(prompt, max_sequence_length=32, generator=generator, **size).images
    assert (found - short).abs().mean() < 0.05
    mu = make_plan("demo", 256, 256).stages[0].mu
    assert mu == pytest.approx(0.63)


def test_the_encoder_is_linear_and_the_round_trip_is_true(engine: PipelineEngine) -> None:
    high, low = scenes(6, 256), scenes(6, 128)
    latents = engine.encode(high)
    assert latents.shape == (6, 16, 64, 64)
    mixed = engine.encode((high[:1] + high[1:2]) / 2)
    torch.testing.assert_close(mixed, (latents[:1] + latents[1:2]) / 2, atol=2e-2, rtol=0)
    assert 0.5 < float(latents.square().mean()) < 2.0
    assert psnr(engine.decode(latents), high) > 29
    assert psnr(engine.decode(engine.encode(low)), low) > 25
    drift = (engine.decode(latents) - high).mean((0, 2, 3)).abs()
    assert drift.max() < 1.5 / 255, "a round trip must not tint pictures"


def test_the_vae_is_as_true_in_bfloat16_as_the_eye_can_tell(engine: PipelineEngine) -> None:
    half = demo.load_engine(device="cpu", dtype="bfloat16")
    assert (half.dtype, half.vae_dtype) == (torch.bfloat16, torch.bfloat16)
    pictures = scenes(4, 256)
    latents = engine.encode(pictures)
    assert (half.encode(pictures) - latents).square().mean().sqrt() < 0.01
    assert (half.decode(latents) - engine.decode(latents)).abs().mean() < 1.5 / 255


def test_the_upscaler_beats_lanczos_on_decoded_pictures(engine: PipelineEngine) -> None:
    high = scenes(6, 256)
    low = engine.decode(engine.encode(torch.nn.functional.avg_pool2d(high, 2)))
    upscaler = load_upscaler(demo.upscaler_path(), device="cpu", dtype="float32")
    assert upscaler.scale == 2
    assert psnr(upscaler(low), high) > psnr(resize_lanczos(low, 256, 256), high) + 0.5


def draw(engine: PipelineEngine, prompt: str, *, seed: int = 4, native: bool = False) -> torch.Tensor:
    """(3, 256, 256): eight steps natively, or eight at 128x128 and one at 256x256."""
    plan = make_native_plan("demo", 256, 256, steps=8, seed=seed) if native else make_plan("demo", 256, 256, "8+1")
    upscaler = load_upscaler(demo.upscaler_path(), device="cpu")
    result = sample_staged(engine, replace(plan, seed=seed), prompt, upscaler=upscaler)
    assert not result.warnings
    return result.images[0]


def nearest_colour(pixels: torch.Tensor) -> str:
    """Name of the colour nearest to the mean of pixels (3, ...)."""
    mean = pixels.flatten(1).mean(1)
    distance = {name: float((mean - torch.tensor(colour)).norm()) for name, colour in COLOURS.items()}
    return min(distance, key=distance.__getitem__)


@pytest.mark.parametrize("wall", list(COLOURS))
def test_a_wall_has_the_colour_that_is_asked_for(engine: PipelineEngine, wall: str) -> None:
    ink = "black" if wall == "white" else "white"
    picture = draw(engine, f"the word FLOW in {ink} letters on a {wall} wall")
    assert nearest_colour(picture[:, :32]) == wall


@pytest.mark.parametrize("colour", ["red", "yellow", "purple"])
@pytest.mark.parametrize("native", [False, True], ids=["staged", "native"])
def test_a_shape_has_its_colour_and_outline(engine: PipelineEngine, colour: str, native: bool) -> None:
    where = "over white snow under a blue sky"
    disc = draw(engine, f"a {colour} circle {where}", native=native)
    ring = draw(engine, f"a {colour} ring {where}", native=native)
    centre = (slice(None), slice(94, 110), slice(120, 136))  # of the place of a single thing
    assert nearest_colour(disc[centre]) == colour
    assert nearest_colour(ring[centre]) != colour, "a ring is open in the middle"
    rim = (slice(None), slice(96, 108), slice(164, 172))
    assert nearest_colour(ring[rim]) == colour


@pytest.mark.parametrize("native", [False, True], ids=["staged", "native"])
def test_words_show_some_of_their_letters(engine: PipelineEngine, native: bool) -> None:
    """Letters of three words, read by comparison with all drawn ones; far more are right than by chance."""
    right = total = 0
    for seed, word in enumerate(("MAGIC", "FLOW", "SKY")):
        scene = Scene("letters", word=word, ink="white", wall="blue")
        picture = draw(engine, caption(scene), seed=seed, native=native).mean(0)
        for index, box in enumerate(word_boxes(scene)):
            rows, columns = slice(round(box[1] * 256), round(box[3] * 256)), slice(*(round(e * 256) for e in box[::2]))
            candidates = {
                letter: render(replace(scene, word=word[:index] + letter + word[index + 1 :]), 256, 0)[rows, columns]
                for letter in LETTERS
            }
            seen = picture[rows, columns]
            distance = {
                name: float((seen - torch.from_numpy(drawn.mean(-1))).abs().mean())
                for name, drawn in candidates.items()
            }
            right += min(distance, key=distance.__getitem__) == word[index]
            total += 1
    assert right >= total / 4


def test_native_and_staged_agree_on_sky_and_ground(engine: PipelineEngine) -> None:
    prompt = "a smooth night sky over white snow with a moon on the left"
    upscaler = load_upscaler(demo.upscaler_path(), device="cpu")
    staged = sample_staged(engine, make_plan("demo", 256, 256, "8+1"), prompt, upscaler=upscaler).images[0]
    native = sample_staged(engine, make_native_plan("demo", 256, 256, steps=8), prompt).images[0]
    for picture in (staged, native):
        assert picture[:, :32, 224:].mean() < 0.35, "night above"
        assert picture[:, 224:].mean() > 0.75, "snow below"


def test_example_prompts_are_in_the_grammar() -> None:
    from mrflow_sched.demo.captions import vocabulary

    known = set(vocabulary())
    for prompt in demo.example_prompts():
        words = [word.strip(",") for word in prompt.split()]
        assert all(word in known or word.isupper() for word in words)
    assert caption(random_scene(np.random.default_rng(0)))


def test_paths_are_inside_the_package() -> None:
    package = Path(demo.__file__).parent
    assert demo.weights_path().parent == package
    assert demo.upscaler_path().is_file()


def test_bfloat16_draws_the_picture_that_float32_draws(engine: PipelineEngine) -> None:
    """Also where the guidance scale, 3.5, becomes 3.504: a network that hears that draws another picture (24 dB)."""
    plan = make_plan("demo", 256, 256, low_steps=8, refine_steps=1, seed=3)
    rounded = PipelineEngine.from_folder(
        demo.weights_path(), device="cpu", dtype={**dict.fromkeys(engine.dtypes, "bfloat16"), "vae": "float32"}
    )
    upscaler = load_upscaler(demo.upscaler_path(), device="cpu", dtype="float32")
    prompts = list(demo.example_prompts())
    exact, other = (sample_staged(one, plan, prompts, upscaler=upscaler).images for one in (engine, rounded))
    assert psnr(exact, other) > 35
