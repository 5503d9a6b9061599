"""Every layout against the pipeline that it describes: packing, scaling, text, guidance, schedule, refusals."""

from __future__ import annotations

import copy
import functools
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipelines
import torch
from torch import Tensor

from bench.tiny import special
from mrflow_sched import make_native_plan
from mrflow_sched.engines.diffusers.layouts import Layout, find_layout
from mrflow_sched.engines.diffusers.layouts.shift import shift_rule
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine

NAMES = tuple(name for name in tiny_pipelines.NAMES if name not in special.PIPELINES)  # see test_special_layouts.py
AS_TEXT = ("omnigen",)  # their prompts reach the network as text
BY_BETAS = ("sdxl", "sd15", "kolors", "pixart-alpha", "pixart-sigma", "hunyuan-dit", "cogview3-plus", "lcm")
EMBEDDED = tuple(name for name in NAMES if name not in AS_TEXT)
# The two with other units than flow sigma are looked at in test_other_times.
FLOWS = tuple(name for name in NAMES if name not in (*BY_BETAS, "cosmos-predict2", "sana-sprint"))
PROMPTS, NEGATIVES = ["a red star", "hills"], ["rain", "blur and noise"]


@functools.cache
def tiny(name: str) -> Any:
    """One pipeline of each name for all tests: none of them may change it."""
    return tiny_pipelines.make(name)


def layout_of(name: str) -> Layout:
    return find_layout(tiny(name))


def size_of(layout: Layout) -> tuple[int, int]:
    """A small picture, wider than high, on the layout's grid."""
    grid = max(layout.family.grid, 32)
    return 3 * grid, 2 * grid


def channels_of(layout: Layout) -> int:
    return 4 if layout.keeps_alpha else 3


def batch_of(name: str) -> int:
    # diffusers' PRXPipeline itself fails for a guided batch, and in a batch Lumina-Next's texts change each other; its
    # GlmImagePipeline draws tokens for a batch as a whole.
    return 1 if name in ("prx", "lumina-next", "glm-image") else 2


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def view_of(layout: Layout, guidance: float) -> tuple[Any, list[Tensor]]:
    """A copy of the pipeline that notes what its scheduler is given first and returns last."""
    view, heard = copy.copy(layout.pipe), list[Tensor]()
    view.scheduler = copy.deepcopy(layout.pipe.scheduler)
    step = view.scheduler.step

    def noted(model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        made = step(model_output, timestep, sample, **options)
        heard[:] = [heard[0] if heard else sample.clone(), made[0] if isinstance(made, tuple) else made.prev_sample]
        return made

    view.scheduler.step = noted
    for name, value in layout.view_attributes(guidance, *size_of(layout)).items():
        setattr(view, name, value)
    return view, heard


def run(
    layout: Layout, latents: Tensor, arguments: dict[str, Any], *, guidance: float | None = None
) -> SimpleNamespace:
    """Two steps of the pipeline's own loop from `latents`."""
    view, heard = view_of(layout, layout.family.guidance if guidance is None else guidance)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # schedulers of consistency models draw noise
        made = view(**arguments, latents=layout.call_latents(latents), num_inference_steps=2, output_type="pt")
    return SimpleNamespace(images=made.images, first=heard[0], last=heard[1], scheduler=view.scheduler)


def arguments_for(layout: Layout, text: dict[str, Any], guidance: float) -> dict[str, Any]:
    size, seeds = size_of(layout), range(len(next(iter(text.values()))))
    return {**layout.stage_arguments(text, guidance, *size), **layout.drawn_arguments(text, list(seeds), *size)}


def start_for(layout: Layout, batch: int) -> Tensor:
    return noise(batch, *layout.latent_shape(*size_of(layout)))


# ------------------------------------------------------------------------------------------------ against the pipeline


@pytest.mark.parametrize("name", NAMES)
def test_packing_and_decoding_are_the_pipelines(name: str) -> None:
    layout, size = layout_of(name), size_of(layout_of(name))
    latents = start_for(layout, batch_of(name))
    text = layout.encode_text(PROMPTS[: len(latents)], NEGATIVES[: len(latents)])
    made = run(layout, latents, arguments_for(layout, text, layout.family.guidance))
    assert latents.shape[1] == noise(1, *layout.latent_shape(*size)).shape[1]
    # The first state that the scheduler sees is the packed start (times what variance-exploding schedulers scale by).
    scale = float(getattr(made.scheduler, "init_noise_sigma", 1.0))
    torch.testing.assert_close(made.first, layout.pack(latents) * scale, atol=0, rtol=2e-7)
    assert torch.equal(layout.unpack(layout.pack(latents), *size), latents)
    # The last one decodes to the pipeline's own images.
    last = made.last.float() * (2.0 if name == "sana-sprint" else 1.0)  # in units of its latents' deviation, 0.5
    images = layout.decode(layout.unpack(last, *size))
    assert images.shape == (len(latents), channels_of(layout), size[1], size[0])
    assert images.dtype == torch.float32
    rounded = 1 / 255 if name == "cosmos-predict2" else 0.0  # its safety checker looks at whole numbers
    torch.testing.assert_close(images, made.images.float(), atol=1e-5 + rounded, rtol=0)
    assert images.std() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_encoding_undoes_the_scaling_of_decoding(name: str) -> None:
    layout, size = layout_of(name), size_of(layout_of(name))
    seen: list[Tensor] = []
    vae = copy.copy(layout.pipe.vae)
    images = noise(2, channels_of(layout), size[1], size[0]).sigmoid()
    decode = vae.decode
    vae.decode = lambda z, **options: (seen.append(z), decode(z, **options))[1]
    pipe = copy.copy(layout.pipe)
    pipe.register_modules(vae=vae)
    other = find_layout(pipe)
    latents = other.encode(images)
    assert latents.shape == (2, *layout.latent_shape(*size))
    assert latents.dtype == torch.float32
    other.decode(latents)
    # What the decoder is given is what the encoder gave, before any scaling.
    for image, z in zip(images, seen, strict=True):
        pixels = (2 * image - 1)[None, :, None] if z.ndim == 5 else (2 * image - 1)[None]
        answer = layout.pipe.vae.encode(pixels)
        plain = answer.latent_dist.mode() if hasattr(answer, "latent_dist") else answer.latent
        torch.testing.assert_close(z, plain, atol=1e-5, rtol=1e-4)


def img2img(name: str, kind: str) -> Any:
    """The family's image-to-image pipeline with a scheduler that adds no noise."""

    def unchanged(sample: Tensor, *_: Any, **__: Any) -> Tensor:
        return sample

    pipe = getattr(tiny_pipelines.diffusers(), kind)(**tiny(name).components)
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    pipe.scheduler.scale_noise = pipe.scheduler.add_noise = unchanged
    return pipe


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("flux1-dev", "FluxImg2ImgPipeline"),
        ("chroma", "ChromaImg2ImgPipeline"),
        ("qwen-image", "QwenImageImg2ImgPipeline"),
        ("sd3", "StableDiffusion3Img2ImgPipeline"),
        ("z-image", "ZImageImg2ImgPipeline"),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
        ("sd15", "StableDiffusionImg2ImgPipeline"),
    ],
)
def test_encoding_is_that_of_the_image_to_image_pipeline(name: str, kind: str) -> None:
    layout, pipe, images = layout_of(name), img2img(name, kind), noise(2, 3, 64, 96).sigmoid()
    ours = layout.encode(images, "sample", [5, 6])
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    pixels = 2 * images - 1
    if hasattr(pipe, "_encode_vae_image"):
        five = pixels[:, :, None] if name == "qwen-image" else pixels
        theirs = pipe._encode_vae_image(image=five, generator=generators).view_as(ours)
    else:
        known = {
            "image": pixels,
            "timestep": torch.tensor([500.0]),
            "batch_size": 2,
            "num_images_per_prompt": 1,
            "num_channels_latents": ours.shape[1],
            "height": 64,
            "width": 96,
            "dtype": torch.float32,
            "device": torch.device("cpu"),
            "generator": generators,
        }
        wanted = inspect.signature(pipe.prepare_latents).parameters
        theirs = pipe.prepare_latents(**{key: value for key, value in known.items() if key in wanted})
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, layout.encode(images), atol=1e-2)


@pytest.mark.parametrize("name", ["flux2-dev", "flux2-klein-base"])
def test_flux2_encodes_as_its_reference_images(name: str) -> None:
    layout, images = layout_of(name), noise(1, 3, 64, 96).sigmoid()
    theirs = layout.pipe._encode_vae_image(2 * images - 1, torch.Generator())
    torch.testing.assert_close(layout.encode(images), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_made_once_are_as_good_as_the_prompts(name: str) -> None:
    layout, size = layout_of(name), size_of(layout_of(name))
    latents, guidance = start_for(layout, batch_of(name)), layout.family.guidance
    prompts, negatives = PROMPTS[: len(latents)], NEGATIVES[: len(latents)]
    takes_negatives = "negative_prompt" in layout.call_names
    text = layout.encode_text(prompts, negatives if takes_negatives else None)
    assert ("prompt" in text) == (name in AS_TEXT)
    ours = run(layout, latents, arguments_for(layout, text, guidance)).last
    said: dict[str, Any] = {"prompt": list(prompts)}
    if takes_negatives:
        said["negative_prompt"] = list(negatives)
    fixed: dict[str, Any] = {"use_resolution_binning": False, "max_area": size[0] * size[1]}
    fixed |= {"intermediate_timesteps": None, "enable_prompt_rewrite": False}
    fixed = {word: value for word, value in fixed.items() if word in layout.call_names}
    plain = {**said, **fixed, **layout.guidance_arguments(guidance), "width": size[0], "height": size[1]}
    plain |= {"generator": torch.Generator().manual_seed(0)} if name == "glm-image" else {}
    theirs = run(layout, latents, plain).last
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    # The prompt matters, so that equality means something.
    other = layout.encode_text(["the word flow"] * len(latents), negatives if takes_negatives else None)
    assert not torch.equal(ours, run(layout, latents, arguments_for(layout, other, guidance)).last)


@pytest.mark.parametrize("name", FLOWS)
def test_a_plan_follows_the_pipelines_own_schedule(name: str) -> None:
    layout = layout_of(name)
    size, steps = size_of(layout), 8 if layout.family.shift.kind == "list" else 5
    text = layout.encode_text(PROMPTS[:1])
    view, _ = view_of(layout, layout.family.guidance)
    arguments = arguments_for(layout, text, layout.family.guidance)
    view(**arguments, num_inference_steps=steps, output_type="latent")
    planned = make_native_plan(layout.family, *size, steps=steps).stages[0].sigmas
    if name == "omnigen":  # rising
        planned = tuple(1.0 - sigma for sigma in planned)
    # DPMSolverMultistep and UniPC start at 0.999 where ours start at 1.
    tolerance = 2e-3 if name in ("sana", "hidream") else 1e-5
    assert [float(sigma) for sigma in view.scheduler.sigmas] == pytest.approx(planned, abs=tolerance)


# ---------------------------------------------------------------------------------------------------------------- text


def rows(name: str, value: Any) -> Any:
    """An argument with one entry per image: Llama's states have the layers first."""
    return value.transpose(0, 1) if "llama3" in name else value


@pytest.mark.parametrize("name", EMBEDDED)
def test_rows_of_text_are_what_single_prompts_give(name: str) -> None:
    layout = layout_of(name)
    prompts = ["a red star", "hills", "a red star"]
    text = layout.encode_text(prompts, ["rain", "fog", "rain"])
    again = layout.select_text(text, [2, 1, 0])
    for row, prompt in ((0, "a red star"), (1, "hills")):
        single = layout.encode_text([prompt], [["rain", "fog"][row]])
        picked = layout.select_text(text, [row])
        assert set(single) <= set(picked)
        for key, value in single.items():
            ours, value = rows(key, picked[key]), rows(key, value)
            if isinstance(value, list) and not isinstance(value[0], Tensor):
                assert ours == value
            elif isinstance(value, list):
                torch.testing.assert_close(ours[0], value[0], atol=1e-5, rtol=1e-4)
            elif ours.shape == value.shape:
                torch.testing.assert_close(ours, value, atol=1e-5, rtol=1e-4)
            else:  # padded to the longest of the batch, behind what counts
                torch.testing.assert_close(ours[:, : value.shape[1]], value, atol=1e-5, rtol=1e-4)
                hidden = picked.get(f"{key}_mask", ours)
                assert not hidden[:, value.shape[1] :].any()
    for key, value in text.items():
        first, third = rows(key, again[key])[0], rows(key, value)[2]
        assert torch.equal(first, third) if isinstance(first, Tensor) else first == third, key


def test_equal_prompts_are_encoded_once() -> None:
    layout = layout_of("flux1-dev")
    seen: list[int] = []
    handle = layout.pipe.text_encoder_2.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        text = layout.encode_text(["hills"] * 3 + ["stars"])
    finally:
        handle.remove()
    assert seen == [2]
    assert len(text["prompt_embeds"]) == len(text["pooled_prompt_embeds"]) == 4
    assert torch.equal(text["prompt_embeds"][0], text["prompt_embeds"][2])
    assert not torch.equal(text["prompt_embeds"][0], text["prompt_embeds"][3])


@pytest.mark.parametrize("name", EMBEDDED)
def test_ready_embeddings_pass_unchanged(name: str) -> None:
    layout = layout_of(name)
    text = layout.encode_text(PROMPTS, NEGATIVES)
    again = layout.encode_text(None, None, text)
    assert set(again) == set(text)
    for key, value in text.items():
        for mine, given in zip(again[key], value, strict=True):
            assert torch.equal(mine, given) if isinstance(given, Tensor) else mine is given, key


def test_text_options_reach_the_pipelines_encoder() -> None:
    layout = layout_of("flux1-dev")
    short = layout.encode_text(
        PROMPTS, None, {"max_sequence_length": 64, "prompt_2": ["x", "y"], "guidance_scale": 2.0}
    )
    assert short["prompt_embeds"].shape[1] == 64
    other = layout.encode_text(PROMPTS, None, {"max_sequence_length": 64})
    assert torch.equal(short["pooled_prompt_embeds"], other["pooled_prompt_embeds"])
    assert not torch.equal(short["prompt_embeds"], other["prompt_embeds"])
    ovis = layout_of("ovis-image").encode_text(["a"], None, {"max_sequence_length": 64})
    assert {value.shape[1] for value in ovis.values()} == {64}


# ------------------------------------------------------------------------------------------------------------ guidance


def test_guidance_in_each_pipelines_words() -> None:
    words = {
        "flux1-dev": {"guidance_scale": 3.0},
        "qwen-image": {"true_cfg_scale": 3.0},
        "z-image": {"guidance_scale": 3.0},
        "sana": {"guidance_scale": 3.0},
        "hunyuan-image": {},
        "krea2": {"guidance_scale": 2.0},
        "qwen-image-2.1": {"true_cfg_scale": 3.0},
        "longcat-image": {"guidance_scale": 3.0},
    }
    assert {name: layout_of(name).guidance_arguments(3.0) for name in words} == words
    off = {name: layout_of(name).guidance_arguments(1.0) for name in ("sd3", "z-image", "z-image-turbo", "krea2")}
    assert off == {
        "sd3": {"guidance_scale": 1.0},
        "z-image": {"guidance_scale": 0.0},
        "z-image-turbo": {"guidance_scale": 0.0},
        "krea2": {"guidance_scale": 0.0},
    }
    plans = [
        ("z-image", 0.0, 1.0),
        ("z-image", 4.0, 4.0),
        ("sd3", 0.0, 1.0),
        ("sd3", 7.0, 7.0),
        ("flux1-dev", 0.5, 0.5),
        ("krea2", 3.5, 4.5),
        ("krea2", 0.0, 1.0),
        ("krea2", -1.0, 1.0),
    ]
    for name, given, planned in plans:
        assert layout_of(name).plan_guidance(given) == planned


@pytest.mark.parametrize("name", NAMES)
def test_guidance_that_is_off_costs_one_forward(name: str) -> None:
    layout = layout_of(name)
    if layout.family.guidance_kind != "cfg":
        pytest.skip("has no second branch")
    latents = start_for(layout, 1)
    network = layout.pipe.unet if getattr(layout.pipe, "transformer", None) is None else layout.pipe.transformer
    counted: dict[float, int] = {}
    usual = max(layout.family.guidance, 2.0)  # some are better without
    for guidance in (usual, 1.0):
        seen: list[int] = []

        def note(_: Any, args: Any, kwargs: Any, seen: list[int] = seen) -> None:
            seen.append(len(kwargs.get("hidden_states", args[0] if args else None)))

        handle = network.register_forward_pre_hook(note, with_kwargs=True)
        try:
            text = layout.encode_text(PROMPTS[:1], NEGATIVES[:1] if "negative_prompt" in layout.call_names else None)
            run(layout, latents, arguments_for(layout, text, guidance), guidance=guidance)
        finally:
            handle.remove()
        counted[guidance] = sum(seen)
    dearer = 1 if layout.always_guided else 2  # the engine leaves out the other branch there (test_other_times)
    assert counted[usual] == dearer * counted[1.0] > 0


def test_hunyuan_guiders_stay_as_they_are() -> None:
    layout = layout_of("hunyuan-image")
    before = copy.deepcopy(layout.pipe.guider.get_state())
    text = layout.encode_text(PROMPTS[:1])
    start = start_for(layout, 1)
    made = [
        run(layout, start, arguments_for(layout, text, guidance), guidance=guidance).last for guidance in (3.5, 6.0)
    ]
    assert layout.pipe.guider.get_state() == before
    assert not torch.allclose(made[0], made[1], atol=1e-6)


# ------------------------------------------------------------------------------------------------- families and shifts


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_family_is_found_from_the_pipeline(name: str) -> None:
    layout = layout_of(name)
    assert layout.family.name == ("flux1-dev" if name == "flux1-kontext" else name)
    assert layout.experimental == (name in BY_BETAS)
    assert layout.family.sources["shift"]
    assert layout.family.grid % (layout.family.vae_factor * layout.family.patch) == 0


def with_scheduler(name: str, scheduler: Any = None, **config: Any) -> Any:
    """A copy of a pipeline with another scheduler, or its own with other settings."""
    pipe = copy.copy(tiny(name))
    pipe.scheduler = (
        type(pipe.scheduler).from_config(pipe.scheduler.config, **config) if scheduler is None else scheduler
    )
    return pipe


def test_the_users_scheduler_decides_the_shift() -> None:
    fixed = find_layout(with_scheduler("flux1-dev", use_dynamic_shifting=False, shift=2.5)).family
    assert (fixed.shift.kind, fixed.shift.shift) == ("static", 2.5)
    steep = find_layout(with_scheduler("flux1-dev", max_shift=2.0, shift_terminal=0.1)).family
    known = "shift_terminal" in tiny("flux1-dev").scheduler.config  # from diffusers 0.33 on
    assert (steep.shift.kind, steep.shift.max_shift, steep.shift.terminal) == (
        "exponential",
        2.0,
        0.1 if known else None,
    )
    assert find_layout(with_scheduler("z-image", shift=3.0)).family.name == "z-image-turbo"
    assert find_layout(with_scheduler("sdxl", prediction_type="v_prediction")).family.prediction == "v"


def test_our_own_scheduler_is_read_like_the_one_it_was_made_from() -> None:
    from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler

    for name in ("flux1-dev", "sana", "sd3", "sdxl"):
        own = with_scheduler(name, MrFlowScheduler.from_config(tiny(name).scheduler.config))
        assert find_layout(own).family == layout_of(name).family


def test_a_flow_on_a_unet_is_a_flow() -> None:
    layout = find_layout(with_scheduler("sdxl", tiny_pipelines.diffusers().FlowMatchEulerDiscreteScheduler(shift=2.0)))
    assert (layout.family.prediction, layout.family.shift.kind, layout.experimental) == ("flow", "static", True)


def test_kontext_renders_the_size_it_is_asked_for() -> None:
    layout = layout_of("flux1-kontext")
    size = size_of(layout)
    text = layout.encode_text(PROMPTS[:1])
    made = run(layout, start_for(layout, 1), layout.stage_arguments(text, 2.5, *size))
    assert made.images.shape == (1, 3, size[1], size[0])


# ------------------------------------------------------------------------------------------------------------ precision


def test_a_vae_that_overflows_in_half_precision_runs_in_single() -> None:
    pipe = tiny_pipelines.make("sdxl")
    pipe.vae.half()
    layout, latents = find_layout(pipe), noise(1, 4, 8, 12)
    wanted = find_layout(tiny_pipelines.make("sdxl"))
    wanted.pipe.vae.half().float()
    assert torch.equal(layout.decode(latents), wanted.decode(latents))
    assert torch.equal(layout.encode(wanted.decode(latents)), wanted.encode(wanted.decode(latents)))
    assert pipe.vae.dtype == torch.float16
    pipe.vae.register_to_config(force_upcast=False)
    assert not torch.equal(layout.decode(latents), wanted.decode(latents))


@pytest.mark.parametrize("name", ["lumina2", "sdxl", "hidream", "ernie-image"])
def test_latents_come_in_the_dtype_that_the_network_needs(name: str) -> None:
    pipe = tiny_pipelines.make(name).to(torch.bfloat16)
    layout = find_layout(pipe)
    size, latents = size_of(layout), start_for(layout, 1)
    text = layout.encode_text(PROMPTS[:1])
    made = run(layout, latents, arguments_for(layout, text, layout.family.guidance))
    assert layout.call_latents(latents).dtype == torch.bfloat16
    assert layout.decode(layout.unpack(made.last.float(), *size)).dtype == torch.float32


def test_final_images_go_through_the_pipelines_safety_checker_and_watermark() -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    images = noise(2, 3, 32, 32).sigmoid()
    pipe = copy.copy(tiny("sd15"))
    assert find_layout(pipe).finish(images) == (images, None)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=small, vision_config={**small, "patch_size": 112}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    pipe.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor())
    for parts, kept in ((2.0, True), (-2.0, False)):  # a cosine is never above 2, and always above -2
        checker.concept_embeds_weights.data.fill_(parts)
        checker.special_care_embeds_weights.data.fill_(2.0)
        finished, rejected = find_layout(pipe).finish(images)
        assert torch.equal(finished, images * kept)
        assert rejected == (not kept, not kept)
        engine = PipelineEngine(pipe)
        assert engine.rejected is None
        assert torch.equal(engine.finish(images), finished)
        assert engine.rejected == rejected
    marked = copy.copy(tiny("sdxl"))
    marked.watermark = SimpleNamespace(apply_watermark=lambda pixels: pixels.clamp(max=0.5))
    finished, rejected = find_layout(marked).finish(images)
    torch.testing.assert_close(finished, images.clamp(max=0.75))
    assert rejected is None


def test_gradients_are_kept_where_they_are_asked_for() -> None:
    layout = layout_of("sd3")
    latents = noise(1, 16, 4, 6).requires_grad_()
    layout.decode(latents).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0
    assert not layout.decode(latents.detach()).requires_grad


def test_an_autoencoder_without_a_distribution_has_one_answer() -> None:
    layout, images = layout_of("sana"), noise(1, 3, 64, 64).sigmoid()
    assert torch.equal(layout.encode(images, "sample", [1]), layout.encode(images))
    pipe = copy.copy(tiny("flux1-dev"))
    widths: dict[str, Any] = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks: dict[str, Any] = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    pipe.register_modules(vae=tiny_pipelines.diffusers().AutoencoderTiny(latent_channels=16, **widths, **blocks))
    assert find_layout(pipe).encode(images).shape == (1, 16, 8, 8)


# -------------------------------------------------------------------------------------------------------------- errors


def test_arguments_that_do_not_fit_get_one_sentence() -> None:
    layout, images = layout_of("flux1-dev"), noise(2, 3, 32, 32)
    for side in (0, 24, 40):
        with pytest.raises(ValueError, match=f"size is {side}x64; FLUX.1-dev needs positive multiples of 16"):
            layout.latent_shape(side, 64)
    with pytest.raises(ValueError, match="posterior is 'mean'; use mode or sample"):
        layout.encode(images, "mean")
    with pytest.raises(ValueError, match=r"seeds is \[1\].* each of 2 images"):
        layout.encode(images, "sample", [1])
    with pytest.raises(ValueError, match="288 tokens; this HiDream reads at most 256"):
        layout_of("hidream").latent_shape(288, 256)


class Bare:
    """The outline of a pipeline, to take things away from."""

    def __init__(self, **parts: Any) -> None:
        self.components = self.__dict__ | parts
        self.__dict__.update(parts)

    def __call__(self, prompt: str, width: int, height: int, num_inference_steps: int) -> None:
        raise NotImplementedError


def test_what_is_no_text_to_image_pipeline_is_refused_in_one_sentence() -> None:
    flux = tiny("flux1-dev")
    without = copy.copy(flux)
    without.register_modules(vae=None)
    cases = [
        ("text", "pipe is str; give a loaded diffusers text-to-image pipeline"),
        (without, "pipe is FluxPipeline without vae; load it"),
        (Bare(vae=1, scheduler=1), "pipe is Bare without transformer or unet"),
        (Bare(vae=1, scheduler=1, transformer=1), "pipe is Bare, whose call takes no latents"),
        (
            tiny_pipelines.diffusers().FluxImg2ImgPipeline(**flux.components),
            "FluxImg2ImgPipeline, which starts from an image",
        ),
        (
            with_scheduler("flux1-dev", tiny_pipelines.diffusers().DDIMScheduler()),
            "pipe.scheduler is DDIMScheduler, which is not a flow scheduler",
        ),
        (with_scheduler("sd15", prediction_type="sample"), "pipe.scheduler has prediction_type='sample'"),
        (
            with_scheduler("cogview4", use_karras_sigmas=True),
            "pipe.scheduler has use_karras_sigmas=True, while this pipeline tells its network times of sigmas that",
        ),
    ]
    for pipe, sentence in cases:
        with pytest.raises(ValueError, match=sentence) as caught:
            find_layout(pipe)
        assert str(caught.value).endswith(".")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="family 'flux9' is unknown"):
        find_layout(flux, family="flux9")


def test_a_schedulers_own_list_ends_at_its_smallest_step() -> None:
    scheduler = tiny_pipelines.diffusers().FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert shift_rule(scheduler, None, even_list=False).sigma_min == pytest.approx(0.002994, abs=1e-6)
    assert shift_rule(scheduler, None).sigma_min is None
    beta = SimpleNamespace(config={**scheduler.config, "use_beta_sigmas": True})  # diffusers' own needs scipy for it
    assert shift_rule(beta, None).beta == 0.6
    dynamic = tiny_pipelines.diffusers().FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert shift_rule(dynamic, None, even_list=False).sigma_min == 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_no_image_holds_is_not_clamped_into_one(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = copy.copy(tiny("flux1-dev"))
    whole = pipe.vae.decode

    def spoiled(latents: Tensor, return_dict: bool = True) -> Any:
        image = whole(latents, return_dict=False)[0].clone()
        image[0, 0, 0, 0] = value
        return (image,)

    monkeypatch.setattr(pipe.vae, "decode", spoiled)
    layout = find_layout(pipe)
    images = layout.decode(noise(2, *layout.latent_shape(32, 32)))
    assert images[:, 0, 0, 0].isnan().all()
    assert images[:, 1:].isfinite().all()
