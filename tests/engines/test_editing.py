"""Pipelines that edit pictures, staged: what they draw is what they draw by themselves at a stage's size."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from pipeline_tools import listening
from tiny_pipelines import TWICE
from torch import Tensor

from mrflow_sched import MrFlow
from mrflow_sched.apps.pictures import Reading, inpainting_of
from mrflow_sched.engines.diffusers.editing import Pictures, with_globals
from mrflow_sched.engines.diffusers.layouts.pictures import picture_arguments
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler
from mrflow_sched.sampling.noise import stage_seed
from mrflow_sched.upscaling.fit import upscale_to

_SEED = 3


def _noise_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


PICTURE, REFERENCE = _noise_picture(192, 128), _noise_picture(600, 400, 1)
MASK = Image.new("L", (192, 128), 0)
MASK.paste(255, (40, 30, 120, 90))

_INPAINT = {"inpaint_image": PICTURE, "mask_image": MASK}
_ONE = {"reference_image": REFERENCE, "width": 128, "height": 128}
_TWO = {"reference_image": [REFERENCE, PICTURE], "width": 128, "height": 128}
_CASES: dict[str, dict[str, Any]] = {
    "flux1-kontext": _ONE,
    "flux2-dev": _TWO,
    "flux2-klein": _TWO,
    "flux2-klein-base": _TWO,
    "flux2-klein-kv": _TWO,
    "qwen-image-edit": _ONE,
    "qwen-image-edit-plus": _TWO,
    "qwen-image-2.1-edit": _TWO,
    "longcat-image-edit": _ONE,
    "flux1-inpaint": _INPAINT,
    "flux1-kontext-inpaint": {**_INPAINT, "reference_image": REFERENCE},
    "flux1-fill": _INPAINT,
    "flux2-klein-inpaint": {**_INPAINT, "reference_image": REFERENCE},
    "sd3-inpaint": _INPAINT,
    "chroma-inpaint": _INPAINT,
    "z-image-inpaint": _INPAINT,
    "qwen-image-inpaint": _INPAINT,
    "qwen-image-edit-inpaint": _INPAINT,
    "qwen-image-controlnet-inpaint": _INPAINT,
    "sd3-controlnet-inpaint": _INPAINT,
    "sd15-inpaint": _INPAINT,
    "sd15-inpaint-plain": _INPAINT,
    "sdxl-inpaint": _INPAINT,
    "sdxl-inpaint-plain": _INPAINT,
}
_SIGMA = {"flux2-klein": 0.25, "flux2-klein-kv": 0.25, "flux2-klein-inpaint": 0.25, "z-image-inpaint": 0.11}
"""Start sigmas of refining other than 0.12."""


@contextlib.contextmanager
def _recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Each stage's size, start, end and the arguments that the pipeline's call was given."""
    stages: list[dict[str, Any]] = []
    run, call = PipelineEngine._stage, PipelineEngine._call

    def stage(self: Any, latents: Tensor, asked: Any, callback: Any = None) -> Tensor:
        stages.append({"start": latents.clone(), "size": self._pixels(latents), "engine": self, "asked": asked})
        stages[-1]["end"] = run(self, latents, asked, callback)
        return stages[-1]["end"]

    def arguments(self: Any, *values: Any) -> dict[str, Any]:
        stages[-1]["arguments"] = call(self, *values)
        return dict(stages[-1]["arguments"])

    with monkeypatch.context() as patch:
        patch.setattr(PipelineEngine, "_stage", stage)
        patch.setattr(PipelineEngine, "_call", arguments)
        yield stages


def _native(pipe: Any, stage: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the pipeline itself draws at a stage's size from the same noise and pictures, decoded."""
    (width, height), own = stage["size"], dict(stage["arguments"])
    module = sys.modules[type(pipe).__call__.__module__]
    start, scheduler = stage["start"], pipe.scheduler
    for name in ("callback_on_step_end", "callback_on_step_end_tensor_inputs"):
        own.pop(name, None)
    with monkeypatch.context() as patch:
        if stage["engine"].family.prediction != "flow":
            euler = tiny_pipelines.diffusers().EulerDiscreteScheduler
            patch.setattr(pipe, "scheduler", euler.from_config(scheduler.config, timestep_spacing="linspace"))
            own["sigmas"], start = list(stage["asked"].sigmas), start / stage["asked"].sigmas[0]
        if own.get("latents") is None:
            patch.setattr(module, "randn_tensor", lambda shape, **kind: start.reshape(tuple(shape)).to(kind["dtype"]))
        if hasattr(module, "calculate_dimensions"):
            theirs = module.calculate_dimensions
            fixed: Any = (width, height, None) if "mask_image" in own else None
            fixed = fixed or ((width, height) if "LongCat" in type(pipe).__name__ else None)
            patch.setattr(
                module, "calculate_dimensions", lambda area, ratio: fixed or theirs(min(area, width * height), ratio)
            )
        if hasattr(pipe, "controlnet"):  # draws the picture from the global random state
            posterior = sys.modules["diffusers.models.autoencoders.vae"].DiagonalGaussianDistribution
            patch.setattr(posterior, "sample", lambda self, generator=None: self.mode())
        generator = torch.Generator().manual_seed(stage_seed(_SEED, 0, 0, "hash"))
        unpacks = "Flux2" not in type(pipe).__name__  # FLUX.2's return the VAE's latents, not its loop's
        kind = "latent" if unpacks else "pt"
        images = pipe(**{**own, "generator": generator, "output_type": kind})[0]
    layout = stage["engine"].layout
    return layout.decode(layout.unpack(images, width, height)) if unpacks else images


@pytest.mark.parametrize("name", _CASES)
def test_stage_1_is_the_pipelines_own_picture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipelines.make(name)
    with _recorded(monkeypatch) as stages, listening(pipe) as heard:
        made = MrFlow(pipe, upscaler=TWICE)(
            "a cat", solver="euler", preset="2+1", seed=_SEED, output_type="pt", **_CASES[name]
        )
    assert [stage["size"] for stage in stages][-1] == (made.plan.width, made.plan.height)
    assert bool(made.images.isfinite().all())
    first = stages[0]
    with listening(pipe) as native:
        theirs = _native(pipe, first, monkeypatch)
    ours = first["engine"].layout.decode(first["end"])
    assert float((ours - theirs.clamp(0, 1)).abs().max()) <= 1e-5
    told = zip(heard.timesteps, native.timesteps, strict=False)
    assert all(torch.allclose(one, other, atol=2e-4) for one, other in told)
    assert float(heard.timesteps[-1][0]) == pytest.approx(_refined(name, made.plan.stages[1].start_sigma), rel=1e-4)
    assert made.plan.stages[1].start_sigma == _SIGMA.get(name, 0.12)


def _refined(name: str, sigma: float) -> float:
    """The time that a network of this kind is told for a flow sigma."""
    if name.startswith(("sd15", "sdxl")):
        return 19.5436  # the training step whose sigma_ve is 0.12 / 0.88
    if name.startswith("sd3"):
        return 1000 * sigma
    return 1.0 - sigma if name.startswith("z-image") else sigma


# ---------------------------------------------------------------------------------------------------------- references


@pytest.fixture(scope="module")
def kontext() -> Any:
    return MrFlow(tiny_pipelines.make("flux1-kontext"), upscaler=TWICE)


def _run(pipe: MrFlow, **options: Any) -> Any:
    asked: dict[str, Any] = {"solver": "euler", "preset": "1+1", "seed": _SEED, **options}
    return pipe("a cat", **asked)


def test_references_have_the_pixels_of_their_stage(kontext: MrFlow) -> None:
    with listening(kontext.pipe) as heard:
        _run(kontext, **_ONE)
    # 64x64 has 16 tokens; 600x400 of as many pixels is 80x64, which has 20: 48 would be too small for some pipelines.
    assert [state.shape[1] for state in heard.states] == [16 + 20, 64 + 70]


def test_a_reference_is_seen(kontext: MrFlow) -> None:
    one = _run(kontext, **_ONE, output_type="pt").images
    other = _run(kontext, **{**_ONE, "reference_image": PICTURE}, output_type="pt").images
    assert not torch.allclose(one, other, atol=1e-3)


def test_the_image_has_the_shape_of_its_reference(kontext: MrFlow) -> None:
    reference = _noise_picture(300, 100)
    plan = _run(kontext, reference_image=reference, factor=4, preset="1+0").plan
    assert (plan.requested_width, plan.requested_height) == (1776, 592)


@pytest.mark.parametrize(("asked", "size"), [({"width": 192}, (192, 64)), ({"height": 64}, (192, 64))])
def test_one_side_that_is_given_has_the_other_follow(
    asked: dict[str, int], size: tuple[int, int], kontext: MrFlow
) -> None:
    plan = _run(kontext, reference_image=_noise_picture(300, 100), **asked).plan
    assert (plan.requested_width, plan.requested_height) == size


def test_references_are_taken_in_any_form(kontext: MrFlow) -> None:
    forms: tuple[Any, ...] = (
        PICTURE,
        np.asarray(PICTURE),
        torch.from_numpy(np.asarray(PICTURE).transpose(2, 0, 1).copy()).float() / 255,
        [PICTURE.convert("RGBA")],
        lambda width, height: PICTURE.resize((80, 64), Image.Resampling.LANCZOS) if width == 64 else _shrunk_picture(),
    )
    made = [_run(kontext, **{**_ONE, "reference_image": form}, output_type="pt").images for form in forms]
    assert all(torch.equal(each, made[0]) for each in made)


def _shrunk_picture() -> Image.Image:
    return Pictures([PICTURE]).references_at(128, 128)[0]


def test_transparent_references_are_on_white(kontext: MrFlow) -> None:
    seen = _run(kontext, **{**_ONE, "reference_image": Image.new("RGBA", (96, 96), (0, 0, 0, 0))}, output_type="pt")
    white = _run(kontext, **{**_ONE, "reference_image": Image.new("RGB", (96, 96), "white")}, output_type="pt")
    assert torch.equal(seen.images, white.images)


def test_a_network_in_half_precision_sees_references_through_a_whole_vae() -> None:
    for name in ("flux1-kontext", "flux1-inpaint"):
        pipe = tiny_pipelines.make(name)
        for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
            part.to(torch.bfloat16)
        made = _run(MrFlow(pipe, upscaler=TWICE), **_CASES[name], output_type="pt").images
        assert bool(made.isfinite().all())
        assert pipe.vae.dtype == torch.float32


def test_a_batch_of_edits_is_its_images(kontext: MrFlow) -> None:
    for name in ("flux2-klein", "qwen-image-edit-plus"):
        pipe = MrFlow(tiny_pipelines.make(name), upscaler=TWICE)
        options: dict[str, Any] = {**_TWO, "solver": "euler", "preset": "1+1", "output_type": "pt"}
        both = pipe(["a", "b"], seed=5, **options).images
        alone = torch.cat([pipe(text, seed=5 + i, **options).images for i, text in enumerate("ab")])
        assert torch.allclose(both, alone, atol=2e-5)


def test_omnigen_sees_its_references_for_every_prompt() -> None:
    pipe, text = MrFlow(tiny_pipelines.make("omnigen"), upscaler=TWICE), "fog over <img><|image_1|></img>"
    options: dict[str, Any] = {"width": 128, "height": 128, "preset": "1+1", "solver": "euler", "output_type": "pt"}
    both = pipe([text, text], reference_image=REFERENCE, seed=[5, 6], **options).images
    alone = [pipe(text, reference_image=REFERENCE, seed=seed, **options).images for seed in (5, 6)]
    assert torch.allclose(both, torch.cat(alone), atol=2e-5)
    other = pipe(text, reference_image=PICTURE, seed=5, **options).images
    assert not torch.equal(alone[0], other)
    two = pipe(f"{text} and <img><|image_2|></img>", reference_image=[REFERENCE, PICTURE], seed=5, **options)
    assert bool(two.images.isfinite().all())


# ---------------------------------------------------------------------------------------------------------- inpainting


@pytest.fixture(scope="module")
def inpainting() -> Any:
    return MrFlow(tiny_pipelines.make("flux1-inpaint"), upscaler=TWICE)


def test_pixels_outside_the_mask_stay_bit_for_bit(inpainting: MrFlow) -> None:
    odd, mask = PICTURE.crop((0, 0, 190, 123)), MASK.crop((0, 0, 190, 123))
    kept = np.asarray(mask) == 0
    made = _run(inpainting, inpaint_image=odd, mask_image=mask)
    assert made.images[0].size == (190, 123)
    assert made.plan.width == 192
    assert np.array_equal(np.asarray(made.images[0])[kept], np.asarray(odd)[kept])
    assert not np.array_equal(np.asarray(made.images[0])[~kept], np.asarray(odd)[~kept])


def test_floats_outside_the_mask_stay_bit_for_bit(inpainting: MrFlow) -> None:
    picture, kept = torch.rand(3, 128, 192), torch.from_numpy(np.asarray(MASK) == 0)
    made = _run(inpainting, inpaint_image=picture, mask_image=MASK, output_type="pt").images[0]
    assert torch.equal(made[:, kept], picture[:, kept])
    array = _run(inpainting, inpaint_image=picture, mask_image=MASK, output_type="np").images[0]
    assert np.array_equal(array[kept.numpy()], picture.permute(1, 2, 0).numpy()[kept.numpy()])


def test_a_grey_mask_blends(inpainting: MrFlow) -> None:
    whole = _run(inpainting, **{**_INPAINT, "mask_image": torch.ones(128, 192)}, output_type="pt").images[0]
    half = _run(inpainting, **{**_INPAINT, "mask_image": torch.full((128, 192), 0.75)}, output_type="pt").images[0]
    picture = torch.from_numpy(np.asarray(PICTURE).copy()).permute(2, 0, 1) / 255
    assert torch.allclose(half, torch.lerp(picture, whole, 0.75), atol=1e-6)


def test_alpha_stays(inpainting: MrFlow) -> None:
    picture = PICTURE.convert("RGBA")
    picture.putalpha(_noise_picture(192, 128, 4).convert("L"))
    made, kept = _run(inpainting, inpaint_image=picture, mask_image=MASK).images[0], np.asarray(MASK) == 0
    assert np.array_equal(np.asarray(made)[kept], np.asarray(picture)[kept])
    assert np.array_equal(np.asarray(made)[..., 3], np.asarray(picture)[..., 3])


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "LA", "P", "bool", "half"])
def test_masks_are_taken_in_any_form(mode: str, inpainting: MrFlow) -> None:
    mask: Any = np.asarray(MASK) > 0 if mode == "bool" else MASK.resize((96, 64), Image.Resampling.NEAREST)
    if mode not in ("bool", "half"):
        mask = MASK.convert(mode)
    expected = _run(inpainting, **_INPAINT, output_type="pt").images
    found = _run(inpainting, inpaint_image=PICTURE, mask_image=mask, output_type="pt").images
    outside = torch.zeros(128, 192, dtype=torch.bool)
    outside[:20], outside[:, :30] = True, True
    assert torch.equal(found[..., outside], expected[..., outside])
    assert mode == "half" or torch.equal(found, expected)


def test_a_black_mask_gives_the_picture_back_and_says_so(inpainting: MrFlow) -> None:
    made = _run(inpainting, inpaint_image=PICTURE, mask_image=Image.new("L", PICTURE.size))
    assert np.array_equal(np.asarray(made.images[0]), np.asarray(PICTURE))
    assert any("masks nothing" in each for each in made.warnings)


def test_a_mask_of_0_and_1_in_8_bits_is_told(inpainting: MrFlow) -> None:
    zero_one = (np.asarray(MASK) > 0).astype(np.uint8)
    for mask in (zero_one, Image.fromarray(zero_one), torch.from_numpy(zero_one)):
        made = _run(inpainting, inpaint_image=PICTURE, mask_image=mask)
        assert any("multiply it by 255" in each for each in made.warnings)
    assert not any("255" in each for each in _run(inpainting, **_INPAINT).warnings)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_what_a_mask_leaves_open_is_told_of_the_mask(mode: str, inpainting: MrFlow) -> None:
    made = _run(inpainting, inpaint_image=PICTURE, mask_image=MASK.convert(mode))
    assert any(each.startswith(f"mask_image has mode {mode}") for each in made.warnings)


def test_the_handoff_takes_the_picture_outside_the_mask(inpainting: MrFlow) -> None:
    made = _run(inpainting, **_INPAINT, keep_stages=True)
    upscaled = next(stage.image for stage in made.stages if stage.name == "stage 2 upscaled")[0]
    picture = torch.from_numpy(np.asarray(PICTURE).copy()).permute(2, 0, 1) / 255
    kept = torch.from_numpy(np.asarray(MASK) == 0)
    assert torch.equal(upscaled[:, kept], picture[:, kept])
    assert not torch.equal(upscaled[:, ~kept], picture[:, ~kept])


def test_a_batch_of_pictures_is_its_images(inpainting: MrFlow) -> None:
    flipped = [each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in (PICTURE, MASK)]
    options: dict[str, Any] = {"solver": "euler", "preset": "1+1", "output_type": "pt"}
    pairs = [(PICTURE, MASK), (flipped[0], flipped[1])]
    both = inpainting(
        ["a", "b"], inpaint_image=[PICTURE, flipped[0]], mask_image=[MASK, flipped[1]], seed=5, **options
    ).images
    alone = [
        inpainting(text, inpaint_image=picture, mask_image=mask, seed=5 + i, **options).images
        for i, (text, (picture, mask)) in enumerate(zip("ab", pairs, strict=True))
    ]
    assert torch.allclose(both, torch.cat(alone), atol=2e-5)


def test_strength_starts_stage_1_from_the_picture(inpainting: MrFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    with _recorded(monkeypatch) as stages:
        made = _run(inpainting, **_INPAINT, strength=0.5, preset="4+1")
    assert stages[0]["asked"].sigmas[0] == 0.5
    assert made.images[0].size == (192, 128)


_SHAPES = [((1000, 700), {}), ((1200, 800), {}), ((720, 1280), {}), ((900, 600), {}), ((1000, 700), {"stages": 3})]
"""Final sizes whose stages differ in shape."""


def _waves(width: int, height: int) -> Tensor:
    """(3, H, W): waves of 24 pixels across and down."""
    across, down = (torch.sin(torch.arange(side) * (2 * torch.pi / 24)) / 2 + 0.5 for side in (width, height))
    return torch.stack(torch.broadcast_tensors(across, down[:, None], across * down[:, None]))


@pytest.mark.parametrize(("size", "options"), _SHAPES)
def test_what_a_stage_sees_lies_where_the_handoff_puts_it(
    size: tuple[int, int], options: dict[str, Any], inpainting: MrFlow
) -> None:
    plan = inpainting.plan(*size, **options)
    mask = torch.zeros(1, 1, size[1], size[0])
    mask[..., : size[1] // 4, : size[0] // 4] = 1.0
    reading = Reading(_waves(*size)[None], mask)
    said: list[str] = []
    pictures = inpainting_of(reading, plan, said.append).pictures
    assert not said
    for small, large in itertools.pairwise(plan.stages):
        seen, masked = pictures.at(small.width, small.height)
        expected, masked_there = pictures.at(large.width, large.height)
        handed = upscale_to(seen, large.width, large.height)
        assert float((handed - expected).abs().mean(dim=(0, 1, 2)).max()) <= 0.03
        assert float((handed - expected).abs().mean(dim=(0, 1, 3)).max()) <= 0.03
        whole = upscale_to(masked.expand(-1, 3, -1, -1), large.width, large.height)[:, :1]
        assert float((whole - masked_there).abs().mean()) <= 0.01


def test_strength_starts_from_what_the_loop_mixes_in(inpainting: MrFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, mask = _waves(250, 175), torch.zeros(175, 250)
    mask[50:100, 50:100] = 1.0
    seen: list[Tensor] = []
    encode = inpainting.pipe.vae.encode
    monkeypatch.setattr(
        inpainting.pipe.vae, "encode", lambda x, *values, **named: (seen.append(x), encode(x, *values, **named))[1]
    )
    made = _run(inpainting, inpaint_image=picture, mask_image=mask, strength=0.5)
    low = made.plan.stages[0]
    assert low.width / low.height != made.plan.width / made.plan.height
    start, loop, *_ = [x.float() for x in seen if x.shape[-2:] == (low.height, low.width)]
    assert torch.allclose(start, loop, atol=1e-5)
    assert not any("The image of" in each for each in made.warnings)


@pytest.mark.parametrize("solver", ["heun", "multistep", "careful"])
def test_every_solver_inpaints(solver: str, inpainting: MrFlow) -> None:
    made = _run(inpainting, **_INPAINT, solver=solver, preset="3+1", output_type="pt")
    assert bool(made.images.isfinite().all())


@pytest.mark.parametrize("strength", [None, 0.5])
def test_a_finished_draft_is_the_whole_run(strength: float | None, inpainting: MrFlow) -> None:
    options: dict[str, Any] = {**_INPAINT, "solver": "euler", "preset": "3+1", "seed": 4, "strength": strength}
    drafts = inpainting.draft("a cat", **options)
    finished, whole = (
        inpainting.finish(drafts[0], output_type="pt"),
        inpainting("a cat", **options, output_type="pt"),
    )
    assert torch.equal(finished.images, whole.images)
    assert set(finished.warnings) == set(whole.warnings)


def _values(picture: Image.Image) -> np.ndarray[Any, Any]:
    return np.array(picture)


@pytest.mark.parametrize(
    "form", [_values, lambda picture: torch.from_numpy(_values(picture)).float() / 255, lambda picture: picture.copy()]
)
def test_a_draft_keeps_its_pictures(form: Any, inpainting: MrFlow, kontext: MrFlow) -> None:
    def cleared(value: Any) -> None:
        value.paste(0, (0, 0, *value.size)) if isinstance(value, Image.Image) else value.__setitem__(..., 0)

    def made(image: Image.Image) -> Any:
        values = form(image)
        return values.movedim(-1, 0) if isinstance(values, Tensor) and values.ndim == 3 else values

    runs: list[tuple[MrFlow, dict[str, Any], list[Any]]] = []
    picture, mask, reference = made(PICTURE), made(MASK), made(PICTURE)
    runs.append((inpainting, {"inpaint_image": picture, "mask_image": [mask]}, [picture, mask]))
    runs.append((kontext, {"reference_image": [reference], "width": 128, "height": 128}, [reference]))
    for pipe, options, given in runs:
        draft = pipe.draft("a cat", solver="euler", preset="1+1", seed=4, **options)[0]
        before = pipe.finish(draft, output_type="pt").images
        for each in given:
            cleared(each)
        assert torch.equal(pipe.finish(draft, output_type="pt").images, before)


def test_more_than_a_megapixel_is_inpainted_at_its_size() -> None:
    pictures = Pictures(picture=torch.rand(1, 3, 1008, 1104), mask=torch.ones(1, 1, 1008, 1104))
    engine = PipelineEngine(tiny_pipelines.make("flux2-klein-inpaint"), pictures=pictures)
    shape = engine.latent_shape(1104, 1008)
    made = engine.denoise(torch.randn(1, *shape), torch.tensor([0.12]), engine.encode_text(["a cat"]), guidance=1.0)
    assert made.shape[1:] == shape


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("flux1-kontext", {"reference_image": [PICTURE, PICTURE]}, "takes one"),
        ("flux1-kontext", {"reference_image": []}, "empty list"),
        ("flux1-kontext", {"reference_image": "a.png"}, "reference_image is str"),
        ("flux1-kontext", {"reference_image": Image.new("RGB", (1, 1))}, "reference_image is 1x1; .* needs 16 pixels"),
        ("flux1-kontext", {"reference_image": Image.new("RGB", (2000, 4))}, "is 2000x4; .* between 1:16 and 16:1"),
        ("flux1-kontext", {"reference_image": Image.new("RGB", (40, 2000))}, "is 40x2000"),
        (
            "flux1-kontext",
            {"reference_image": lambda width, height: Image.new("RGB", (4, 4))},
            "reference_image is 4x4",
        ),
        ("flux1-kontext", {**_ONE, "tile": 256}, "tile=256 would give every tile the whole reference_image"),
        ("flux1-kontext", _INPAINT, "does not inpaint"),
        ("flux1-inpaint", {"image": PICTURE, "mask_image": MASK}, "give the picture as inpaint_image"),
        ("flux1-inpaint", {"inpaint_image": PICTURE}, "mask_image is missing"),
        ("flux1-inpaint", {}, "inpaint_image is missing"),
        ("flux1-inpaint", {**_INPAINT, "reference_image": PICTURE}, "takes no references"),
        ("flux1-inpaint", {**_INPAINT, "padding_mask_crop": 8}, "padding_mask_crop is not taken"),
        ("flux1-inpaint", {**_INPAINT, "mask_image": Image.new("L", (64, 64))}, "another shape"),
        ("flux1-inpaint", {**_INPAINT, "inpaint_image": [PICTURE] * 3}, "inpaint_image holds 3 images"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(
    name: str, options: dict[str, Any], words: str, kontext: MrFlow, inpainting: MrFlow
) -> None:
    with pytest.raises(ValueError, match=words):
        _run(kontext if name == "flux1-kontext" else inpainting, **options)


def test_references_that_a_pipeline_checks_itself_are_refused_before() -> None:
    pipe = MrFlow(tiny_pipelines.make("flux2-klein"), upscaler=TWICE)
    for size in ((32, 32), (1000, 100)):
        with pytest.raises(ValueError, match="needs 64 pixels or more on each side, and a shape between 1:8 and 8:1"):
            _run(pipe, reference_image=Image.new("RGB", size), width=128, height=128)


def test_an_edit_without_a_reference_is_refused() -> None:
    pipe = MrFlow(tiny_pipelines.make("qwen-image-edit"), upscaler=TWICE)
    with pytest.raises(ValueError, match="reference_image is missing; QwenImageEditPipeline edits a picture"):
        _run(pipe)
    with pytest.raises(ValueError, match="reference_image is missing, as image is"):
        _run(pipe, image=PICTURE)


def test_modular_pipelines_say_that_they_are() -> None:
    pipe = MrFlow(tiny_pipelines.make("flux1-kontext-modular"), upscaler=TWICE)
    with pytest.raises(ValueError, match=r"is modular, .* takes references \(FluxKontextPipeline"):
        _run(pipe, **_ONE)
    with pytest.raises(ValueError, match=r"is modular, .* that inpaints"):
        _run(pipe, **_INPAINT)
    assert any("is modular: to edit it" in each for each in _run(pipe, image=PICTURE).warnings)


def test_drafts_take_strength_with_a_picture_only(inpainting: MrFlow, kontext: MrFlow) -> None:
    with pytest.raises(ValueError, match="strength has no meaning for a draft without inpaint_image"):
        kontext.draft("a cat", **_ONE, strength=0.5)
    options: dict[str, Any] = {**_INPAINT, "preset": "1+1"}
    draft = inpainting.draft("a cat", **options)[0]
    with pytest.raises(ValueError, match="strength from the draft"):
        inpainting.finish(draft, strength=0.5)


# -------------------------------------------------------------------------------------------------------------- pieces


def test_a_small_mask_keeps_what_is_masked() -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 33, 17] = 1.0
    _, small = Pictures(picture=torch.rand(1, 3, 64, 64), mask=mask).at(32, 32)
    assert small.sum() == 1
    assert small[0, 0, 16, 8] == 1


def test_the_noise_of_a_stage_is_what_its_start_holds() -> None:
    clean, noise = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    scheduler = MrFlowScheduler.for_stage({}, (0.4, 0.1, 0.0), "euler", start=0.6 * clean + 0.4 * noise)
    scheduler.step(torch.zeros(1, 4, 8), scheduler.timesteps[0], torch.zeros(1, 4, 8))
    found = scheduler.scale_noise(clean, scheduler.timesteps[1], torch.zeros(1, 4, 8))
    assert torch.allclose(found, 0.9 * clean + 0.1 * noise, atol=1e-6)


def test_with_globals_changes_a_copy_only() -> None:
    copied = with_globals(_noise_picture, np=None)
    with pytest.raises(AttributeError):
        copied(8, 8)
    assert _noise_picture(8, 8).size == (8, 8)


def test_what_a_class_takes_is_read_from_its_call() -> None:
    library = tiny_pipelines.diffusers()
    for kind in (library.FluxPipeline, library.FluxImg2ImgPipeline, library.StableDiffusionControlNetPipeline):
        assert not picture_arguments(kind.__new__(kind)).reference
    kind = library.StableDiffusionXLInpaintPipeline
    found = picture_arguments(kind.__new__(kind))
    assert (found.picture, found.mask, found.noised) == ("image", "mask_image", True)
