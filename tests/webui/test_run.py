"""The life of a job on doubles of A1111, Forge and Neo: what reaches the network, what the image says, what is left."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from doubles import (
    Anima,
    ErnieImage,
    Flux,
    Flux2,
    Img2Img,
    Krea2,
    Mugen,
    QwenImage,
    QwenImage21,
    Sd3Model,
    StableDiffusion,
    StableDiffusionXL,
    Wan,
    WebUI,
    attributes,
    close,
    create_infotext,
    engine,
    levels,
    parse_generation_parameters,
    pasted,
)
from PIL import Image

from mrflow_sched.apps.webui import axes, infotext, refusing, run
from mrflow_sched.apps.webui.controls import Controls
from mrflow_sched.apps.webui.host import probe_model
from mrflow_sched.apps.webui.job import ATTRIBUTE
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.schedule import refine_sigmas

ON = (True, "12+1")
KINDS = ("a1111", "forge", "neo")
# Host fields that a finished job fills in by itself, with hires fix or without.
MADE = {
    *("all_prompts", "all_negative_prompts", "all_seeds", "all_subseeds", "all_hr_prompts", "all_hr_negative_prompts"),
    *("prompts", "negative_prompts", "seeds", "subseeds", "hr_prompts", "hr_negative_prompts", "c", "uc", "rng"),
    *("hr_c", "hr_uc", "extra_network_data", "hr_extra_network_data", "iteration", "sampler"),
    *("hr_upscale_to_x", "hr_upscale_to_y", "extra_generation_params", "batch_index"),
}


def webui(kind: str, model: Any = None) -> WebUI:
    """A host with a flow model loaded on first use."""
    return WebUI(kind, model if model is not None else Sd3Model() if kind == "a1111" else Flux(neo=kind == "neo"))


def plan_lists(ui: WebUI, width: int, height: int, **choice: Any) -> tuple[list[float], list[float]]:
    """All levels the network should see in each pass, from the library's own plan."""
    family = "sd3" if isinstance(ui.model, Sd3Model) else "flux1-dev"
    plan = make_plan(family, width, height, "12+1", **choice)
    return list(plan.stages[0].sigmas[:-1]), list(plan.stages[1].sigmas[:-1])


def hires_fields(kind: str) -> dict[str, Any]:
    """What a page sends with hires fix."""
    fields: dict[str, Any] = {"enable_hr": True, "hr_upscaler": "None", "hr_scheduler": "Automatic"}
    return fields if kind == "a1111" else {**fields, "hr_additional_modules": ["Use same choices"]}


def noise_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def untouched(p: Any, before: dict[str, Any]) -> None:
    """Nothing differs but what the host fills in itself."""
    after = attributes(p)
    assert {name for name in after if name not in MADE and after[name] != before.get(name, "absent")} == set()
    assert set(after) - set(before) <= MADE
    assert not hasattr(p, ATTRIBUTE)


# ------------------------------------------------------------------------------------------------------ what is sampled


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "DPM2", "DPM++ 3M SDE", "DPM adaptive", "DDIM"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_called_with_the_plans_levels(kind: str, sampler: str, always: bool) -> None:
    ui = webui(kind)
    ui.opts.always_discard_next_to_last_sigma = always
    ui.opts.img2img_extra_noise = 0.3
    p = ui.job(width=384, height=256, sampler_name=sampler, scheduler="Karras")
    ui.generate(p, *ON)
    first, last = plan_lists(ui, 384, 256)
    assert close(levels(ui, "first"), first)
    assert close(levels(ui, "hires"), last)
    _, _, sigma = ui.mixed[0]
    assert sigma == pytest.approx(0.12, rel=1e-6)
    assert not ui.errors
    assert ui.opts.img2img_extra_noise == 0.3


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_several_refine_steps_run_exactly(kind: str, always: bool) -> None:
    ui = webui(kind)
    ui.opts.always_discard_next_to_last_sigma = always
    ui.generate(ui.job(width=384, height=256), {"preset": "7+3", "sigma": 0.6})
    assert len(levels(ui, "first")) == 7
    assert close(levels(ui, "hires"), refine_sigmas(0.6, 3)[:-1])


def test_the_noise_is_mixed_at_the_plans_level_only() -> None:
    ui = webui("forge")
    ui.opts.img2img_extra_noise = 0.5
    ui.generate(ui.job(width=512, height=512), *ON)
    x, noise, sigma = ui.mixed[0]
    # The network's output tanh(mixed)/2 is what the one Euler step returns.
    assert ui.calls[-1][2] == tuple(x.shape) == (1, 16, 64, 64)
    mixed = sigma * noise + (1 - sigma) * x
    assert torch.allclose(ui.samplers[-1].last_latent, torch.tanh(mixed) * 0.5, atol=1e-6)


@pytest.mark.parametrize("kind", ["forge", "neo"])
def test_ve_models_run_the_hosts_first_pass_and_the_equal_snr_refine(kind: str) -> None:
    for model, family in ((StableDiffusion(neo=kind == "neo"), "sd15"), (StableDiffusionXL(), "sdxl")):
        ui = WebUI(kind, model)
        p = ui.job(width=384, height=256, sampler_name="DPM++ 2M")
        ui.generate(p, True, "12+1", 4 / 3)
        assert len(levels(ui, "first")) == 12
        assert levels(ui, "first")[0] == pytest.approx(14.6)
        assert close(levels(ui, "hires"), [0.12 / 0.88])
        assert ui.calls[0][2][2:] == (24, 36)
        assert "experimental" in ui.infotexts[0]["MrFlow"], family


def test_a1111_sd15_runs_with_a_timestep_sampler_in_its_first_pass() -> None:
    ui = WebUI("a1111")
    ui.generate(ui.job(width=384, height=256, sampler_name="DDIM"), *ON)
    assert len(levels(ui, "first")) == 11  # the host's own count for such samplers
    assert close(levels(ui, "hires"), [0.12 / 0.88])
    assert ui.infotexts[0]["Sampler"] == "DDIM"
    assert not ui.errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(832, 1216), (1024, 1024), (1040, 624)])
def test_the_image_has_the_size_that_was_asked_for(kind: str, size: tuple[int, int]) -> None:
    ui = webui(kind)
    p = ui.job(width=size[0], height=size[1])
    result = ui.generate(p, *ON)
    assert [tuple(image.shape) for image in result.images] == [(3, size[1], size[0])]
    assert ui.infotexts[0]["Size"] == f"{size[0]}x{size[1]}"
    assert (result.width, result.height) == (p.width, p.height) == size


def test_neo_makes_1000x616_although_it_rounds_to_64_twice() -> None:
    ui = webui("neo")
    p = ui.job(width=1000, height=616)
    result = ui.generate(p, *ON)
    assert tuple(result.images[0].shape) == (3, 616, 1000)
    assert ui.calls[0][2][2:] == (38, 62)
    assert (p.width, p.height) == (1000, 616)
    assert any("stretched by 0.5%" in comment for comment in p.comments)


def test_klein_takes_the_next_multiple_of_16_and_says_so() -> None:
    ui = WebUI("neo", Flux2(name="flux-2-klein-4b", neo=True))
    p = ui.job(width=1000, height=616, cfg_scale=1.0)
    result = ui.generate(p, True)
    assert tuple(result.images[0].shape) == (3, 624, 1008)
    assert any("multiples of 16" in comment for comment in p.comments)
    assert close(levels(ui, "hires"), [0.25])


def test_the_old_hires_size_option_of_a1111_does_not_get_in_the_way() -> None:
    ui = webui("a1111")
    ui.opts.use_old_hires_fix_width_height = True
    result = ui.generate(ui.job(width=416, height=608), *ON)
    assert tuple(result.images[0].shape) == (3, 608, 416)
    assert ui.calls[0][2][2:] == (38, 26)


@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_of_a_job_runs_both_lists(kind: str) -> None:
    ui = webui(kind)
    p = ui.job(width=512, height=512, n_iter=3, batch_size=2)
    result = ui.generate(p, *ON)
    first, last = plan_lists(ui, 512, 512)
    assert close([level for _, level, _ in ui.calls], [*first, *last] * 3)
    assert len(result.images) == 6
    assert not ui.errors


def test_the_hosts_schedule_can_be_kept() -> None:
    ui = webui("forge")
    ui.generate(ui.job(width=512, height=512, scheduler="Simple"), {"shift": "host"})
    table = Flux().forge_objects.unet.model.predictor.sigmas
    assert close(levels(ui, "first")[:2], [1.0, float(table[999 - round(1000 / 12)])])
    assert close(levels(ui, "hires"), [0.12])


@pytest.mark.parametrize("solver", ["host sampler", "multistep"])
def test_a_host_schedule_above_one_is_replaced_on_flow_models(solver: str) -> None:
    ui = webui("forge")
    p = ui.job(width=384, height=256, scheduler="Turbo", n_iter=2)
    ui.generate(p, {"shift": "host", "solver": solver})
    first, last = plan_lists(ui, 384, 256)
    assert close([level for _, level, _ in ui.calls], [*first, *last] * 2)
    assert any("Turbo does not suit" in comment for comment in p.comments)
    assert p.sampler_noise_scheduler_override is None


def test_a_flow_model_without_a_family_keeps_the_hosts_schedule() -> None:
    ui = WebUI("neo", engine("Ideogram4")(neo=True))
    p = ui.job(width=384, height=256)
    ui.generate(p, *ON)
    assert len(levels(ui, "first")) == 12
    assert close(levels(ui, "hires"), [0.12])
    assert any("does not know the schedule of Ideogram4" in comment for comment in p.comments)


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 3M SDE", "DPM adaptive"])
def test_our_solver_runs_inside_the_hosts_sampler(sampler: str) -> None:
    ui = webui("forge")
    p = ui.job(width=384, height=256, sampler_name=sampler)
    ui.generate(p, {"solver": "multistep"})
    assert close(levels(ui, "first"), plan_lists(ui, 384, 256)[0])
    assert all(each.func is each.original for each in ui.samplers)
    euler = webui("forge")
    euler.generate(euler.job(width=384, height=256), *ON)
    assert not torch.equal(ui.mixed[0][0], euler.mixed[0][0])
    assert not ui.errors


def test_a_host_without_the_hook_before_sampling_still_runs_the_lists() -> None:
    ui = webui("a1111")
    ui.script = SimpleNamespace(
        **{name: getattr(ui.script, name) for name in EVERY_HOOK if name != "process_before_every_sampling"}
    )
    p = ui.job(width=384, height=256)
    ui.generate(p, {"solver": "multistep"})
    first, last = plan_lists(ui, 384, 256)
    assert close([level for _, level, _ in ui.calls], [*first, *last])
    assert any("uses the WebUI's sampler" in comment for comment in p.comments)
    assert not ui.errors


def test_steps_changed_by_another_extension_still_get_a_whole_schedule() -> None:
    ui = webui("forge")
    ui.at["before_process_batch"] = lambda p: setattr(p, "steps", 5)
    ui.generate(ui.job(width=384, height=256), *ON)
    assert close(levels(ui, "first"), plan_lists(ui, 384, 256, low_steps=5)[0])


# ----------------------------------------------------------------------------------------------- noise, seeds, guidance


@pytest.mark.parametrize("model", ["flux", "qwen"])
@pytest.mark.parametrize("rule", ["seed + 1", "host"])
def test_a_batch_of_three_is_three_single_images(model: str, rule: str) -> None:
    def make(**fields: Any) -> tuple[WebUI, Any]:
        ui = WebUI("neo", QwenImage(neo=True) if model == "qwen" else Flux(neo=True))
        return ui, ui.generate(ui.job(width=512, height=512, **fields), {"refine_seed": rule})

    together, result = make(batch_size=3, seed=70)
    noises = together.mixed[0][1]
    assert noises.ndim == (5 if model == "qwen" else 4)
    for i in range(3):
        alone, single = make(seed=70 + i)
        assert torch.equal(alone.mixed[0][1][0], noises[i])
        assert torch.equal(alone.mixed[0][0][0], together.mixed[0][0][i])  # the encoder's draw as well
        assert torch.allclose(single.images[0], result.images[i], atol=1e-6)


def test_the_refine_noise_is_that_of_the_next_seed() -> None:
    ui = webui("forge")
    ui.generate(ui.job(width=512, height=512, seed=41), *ON)
    wanted = torch.randn((16, 64, 64), generator=torch.Generator().manual_seed(42))
    assert torch.equal(ui.mixed[0][1][0], wanted)
    plain = webui("forge")
    plain.generate(plain.job(width=512, height=512, seed=41), {"refine_seed": "host"})
    assert torch.equal(plain.mixed[0][1][0], torch.randn((16, 64, 64), generator=torch.Generator().manual_seed(41)))


def test_the_refine_noise_is_the_same_after_any_number_of_calls() -> None:
    ui = webui("forge")
    seen: list[torch.Tensor] = []

    def look(p: Any) -> None:
        if p.is_hr_pass:
            noise = torch.zeros(1, 16, 64, 64)
            run.process_before_every_sampling(p, ui.api, noise, noise)
            seen.append(noise)

    ui.at["process_before_every_sampling"] = look
    ui.generate(ui.job(width=512, height=512), *ON)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], ui.mixed[0][1])


def test_the_variation_seed_varies_the_refine_noise_too() -> None:
    ui = webui("forge")
    ui.generate(ui.job(width=512, height=512, seed=41, subseed=7, subseed_strength=0.25), *ON)
    base, other = (torch.randn((16, 64, 64), generator=torch.Generator().manual_seed(seed)) for seed in (42, 8))
    assert torch.allclose(ui.mixed[0][1][0], 0.75 * base + 0.25 * other)


def test_noise_that_another_extension_sets_is_kept() -> None:
    ui = webui("forge")
    own = torch.full((1, 16, 64, 64), 0.25)

    def change(p: Any) -> None:
        if p.is_hr_pass:
            p.modified_noise = own

    ui.at["process_before_every_sampling"] = change
    ui.generate(ui.job(width=512, height=512), *ON)
    assert torch.equal(ui.mixed[0][1], own)


def test_no_random_number_of_the_process_is_used_up() -> None:
    ui = webui("forge")
    states: list[torch.Tensor] = []

    def note(p: Any) -> None:
        states.append(torch.random.get_rng_state())
        noise = torch.zeros(1, 16, 64, 64)
        run.process_before_every_sampling(p, ui.api, noise, noise)
        states.append(torch.random.get_rng_state())

    ui.at["before_hr"] = note
    ui.generate(ui.job(width=512, height=512), *ON)
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_depends_on_the_seed_and_on_nothing_else(kind: str) -> None:
    def latents(draws: int, **fields: Any) -> torch.Tensor:
        ui = webui(kind)
        ui.at["before_process_batch"] = lambda _: torch.randn(draws)
        ui.generate(ui.job(width=512, height=512, **fields), *ON)
        assert "encode_first_stage" not in vars(ui.model)
        assert "get_first_stage_encoding" not in vars(ui.model)
        return ui.mixed[0][0]

    assert torch.equal(latents(0), latents(3))
    assert not torch.equal(latents(0), latents(0, seed=3))


@pytest.mark.parametrize(
    ("choice", "wanted"), [({}, 5.0), ({"refine_cfg": "off"}, 1.0), ({"refine_cfg": "value", "refine_cfg_value": 2}, 2)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_refine_guidance(kind: str, choice: dict[str, Any], wanted: float) -> None:
    ui = webui(kind)
    p = ui.job(width=512, height=512, cfg_scale=5.0, n_iter=2)
    ui.generate(p, choice)
    per_batch = [5.0] * 12 + [wanted]
    assert ui.scales == per_batch * 2
    assert p.cfg_scale == 5.0
    assert {text["CFG scale"] for text in ui.infotexts} == {5.0}


def test_the_distilled_guidance_follows_the_first_pass() -> None:
    ui = webui("forge")
    p = ui.job(width=512, height=512, distilled_cfg_scale=2.5)
    seen: list[float] = []
    ui.at["before_hr"] = lambda p: seen.append(p.hr_distilled_cfg)
    ui.generate(p, *ON)
    assert seen == [2.5]
    assert p.hr_distilled_cfg == 3.5


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_encoded_once_where_nothing_differs(kind: str) -> None:
    ui = webui(kind)
    ui.generate(ui.job(width=512, height=512), *ON)
    assert len(ui.texts) == 1
    for fields in ({"hr_prompt": "another"}, {"prompt": "[a:b:5] tree"}, {"prompt": "[cow|horse]"}):
        ui = webui(kind)
        ui.generate(ui.job(width=512, height=512, **fields), *ON)
        assert len(ui.texts) == 2
    ui = WebUI("forge", StableDiffusionXL())
    ui.generate(ui.job(width=384, height=256), *ON)
    assert len(ui.texts) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_another_lora_in_the_hires_prompt_is_another_text(kind: str) -> None:
    """Hosts take the tags out of the prompts: what is left of both is the same words."""

    def encoded(hires: dict[str, Any]) -> int:
        def take_out(p: Any) -> None:
            p.extra_network_data = {"lora": ["soft:0.5"]}
            p.hr_extra_network_data = hires

        ui = webui(kind)
        ui.at["process_batch"] = take_out
        ui.generate(ui.job(width=512, height=512), *ON)
        return len(ui.texts)

    assert encoded({"lora": ["soft:0.5"]}) == 1
    assert encoded({"lora": ["soft:1.0"]}) == 2


# ------------------------------------------------------------------------------------------------- what the image says


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_pastes_to_the_same_controls_and_never_to_hires_fix(kind: str) -> None:
    ui = webui(kind)
    choice = {"preset": "9+2", "sigma": 0.2, "refine_cfg": "off", "colour_guard": "auto"}
    ui.generate(ui.job(width=416, height=608, n_iter=2), choice)
    for text in (*ui.infotexts, *ui.params_txt):
        found = pasted(text)
        assert infotext.read(found) == Controls.from_args([choice])
        assert (found["Size-1"], found["Size-2"]) == ("416", "608")
        assert not any(key.startswith("Hires") for key in found)
        assert "Denoising strength" not in found
        assert found["Steps"] == "9"


def test_a_hires_prompt_is_used_and_told() -> None:
    ui = webui("forge")
    ui.generate(ui.job(width=512, height=512, hr_prompt="sharper"), *ON)
    assert ui.texts == [["a lighthouse"], ["sharper"]]
    assert ui.infotexts[0]["Hires prompt"] == "sharper"


def test_metadata_made_after_the_job_says_the_same() -> None:
    ui = webui("forge")
    p = ui.job(width=416, height=608)
    ui.generate(p, *ON)
    assert create_infotext(p, 0) == ui.infotexts[0]


def test_the_comment_tells_the_stages_and_their_seconds() -> None:
    ui = webui("forge")
    p = ui.job(width=384, height=256, n_iter=2)
    result = ui.generate(p, *ON)
    [comment] = [comment for comment in p.comments if comment.startswith("MrFlow: 192x128 x12 (")]
    assert "-> R-ESRGAN 2x+ (" in comment
    assert "-> 384x256 x1 at sigma 0.12 (" in comment
    assert re.search(r" s\)(; 20 steps at this size would take about \d+\.\d times as long)?$", comment)
    assert comment in result.comments


def test_without_a_super_resolution_model_the_hint_stands_under_the_image() -> None:
    for kind, name in (("forge", "Lanczos"), ("neo", "None")):
        ui = webui(kind)
        ui.sd_upscalers = [entry for entry in ui.sd_upscalers if entry.name != "R-ESRGAN 2x+"]
        seen: list[str] = []
        ui.at["process"] = lambda p, seen=seen: seen.append(p.hr_upscaler)
        p = ui.job(width=512, height=512)
        ui.generate(p, *ON)
        assert seen == [name]
        assert any("No x2 super-resolution model" in comment for comment in p.comments)


def test_what_the_fast_upscaler_has_to_say_stands_under_the_image() -> None:
    ui = webui("forge")
    ui.sd_upscalers[-1].scaler = SimpleNamespace(take_sentences=lambda: ["The model was run in tiles."])
    p = ui.job(width=512, height=512)
    ui.generate(p, *ON)
    assert "The model was run in tiles." in p.comments


def test_stage_images_are_saved_on_request() -> None:
    ui = webui("forge")
    ui.generate(ui.job(width=512, height=512), {"save_stages": True})
    assert ui.saved == [(1, 3, 256, 256)]
    assert ui.opts.save_images_before_highres_fix is False


def test_stage_images_are_saved_where_the_option_was_never_saved() -> None:
    """Hosts keep in `opts.data` what the settings file holds, and put back no other option."""
    ui = webui("forge")
    del ui.opts.data["save_images_before_highres_fix"]
    ui.generate(ui.job(width=512, height=512), {"save_stages": True})
    assert ui.saved == [(1, 3, 256, 256)]
    ui.generate(ui.job(width=512, height=512), *ON)
    assert ui.saved == [(1, 3, 256, 256)]


def test_an_option_that_the_host_does_not_know_stays_as_it_was_sent() -> None:
    ui = webui("neo")
    for options in (ui.opts.data, ui.opts.defaults):
        del options["img2img_extra_noise"]
    p = ui.job(width=512, height=512, override_settings={"img2img_extra_noise": 0.2})
    ui.args = ON
    ui.hook("before_process", p)
    assert p.override_settings == {"img2img_extra_noise": 0.2}
    assert p.enable_hr
    assert not p.comments
    assert not ui.errors


# 0.008 of the range of 1 nobody sees, 0.2 is another picture; between lies what the guard takes back.
@pytest.mark.parametrize(("cast", "taken"), [(0.1, 0.1), (0.016, 0.0), (0.4, 0.0)])
@pytest.mark.parametrize("kind", ["a1111", "forge", "neo"])
def test_the_colour_guard_takes_a_cast_back(kind: str, cast: float, taken: float) -> None:
    def brightness(guard: str) -> torch.Tensor:
        ui = webui(kind)
        decode, passes = ui.model.decode_first_stage, [0]

        def tinted(z: torch.Tensor) -> torch.Tensor:
            passes[0] += 1
            return decode(z) * 0.5 + (cast if passes[0] == 2 else 0.0)

        ui.model.decode_first_stage = tinted
        result = ui.generate(ui.job(width=512, height=512), {"colour_guard": guard})
        return result.images[0].mean(dim=(1, 2))

    assert (brightness("off") - brightness("auto")).mean() == pytest.approx(taken, abs=0.03 if taken else 1e-6)


@pytest.mark.parametrize("guard", ["off", "auto"])
def test_the_colour_guard_lets_opacity_be(guard: str) -> None:
    def opacity(guard: str) -> tuple[torch.Tensor, torch.Tensor]:
        ui = WebUI("neo", QwenImage21(neo=True))
        decode, passes = ui.model.decode_first_stage, [0]

        def tinted(z: torch.Tensor) -> torch.Tensor:
            passes[0] += 1
            return decode(z) * 0.5 + (0.1 if passes[0] == 2 else 0.0)

        ui.model.decode_first_stage = tinted
        (image,) = ui.generate(ui.job(width=512, height=512), {"colour_guard": guard}).images
        return image[:3], image[3]

    (colours, alpha), (untouched, own) = opacity(guard), opacity("off")
    assert torch.equal(alpha, own)
    assert (untouched - colours).mean() == pytest.approx(0.1 if guard == "auto" else 0.0, abs=0.03)


@pytest.mark.parametrize(
    ("loaded", "family", "steps"),
    [
        (Krea2("krea2_turbo"), "krea2-turbo", 8),
        (ErnieImage("ernie-image"), "ernie-image", 12),
        (QwenImage21("qwen-image-2.1"), "qwen-image-2.1", 12),
        (QwenImage21("qwen-image-2.1-turbo"), "qwen-image-2.1-turbo", 8),
        (Anima("anima"), "anima", 12),
    ],
)
def test_the_network_of_each_new_engine_is_called_at_the_plans_levels(loaded: Any, family: str, steps: int) -> None:
    ui = WebUI("neo", type(loaded)(loaded.sd_checkpoint_info.name_for_extra, neo=True))
    p = ui.job(width=768, height=512, batch_size=2)
    result = ui.generate(p, {"enabled": True})
    plan = make_plan(family, 768, 512)
    assert [stage.steps for stage in plan.stages] == [steps, 1]
    assert [level for _, level, _ in ui.calls] == pytest.approx([*plan.stages[0].sigmas[:-1], 0.12], abs=1e-6)
    channels, factor = loaded.channels, loaded.factor
    assert {shape[:2] for _, _, shape in ui.calls} == {(2, channels)}
    assert [tuple(image.shape[-2:]) for image in result.images] == [(512, 768)] * 2
    assert {shape[-2:] for place, _, shape in ui.calls if place == "hires"} == {(512 // factor, 768 // factor)}
    assert not ui.errors


@pytest.mark.parametrize(
    ("loaded", "own"),
    [
        (Flux(neo=True), False),
        (StableDiffusionXL(neo=True), True),
        (Mugen(neo=True), True),
        (engine("StableDiffusionXL", is_sdxl=True)("rectified", neo=True), True),
    ],
)
def test_models_that_are_told_the_size_get_a_conditioning_of_each_size(loaded: Any, own: bool) -> None:
    ui = WebUI("neo", loaded)
    ui.generate(ui.job(), *ON)
    assert (len(ui.texts) == 2) is own


# ---------------------------------------------------------------------------------------------------- what is left on p


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_means_untouched(kind: str) -> None:
    for args in ((False, "12+1"), (), ({"enabled": False, "sigma": 9},), (False, "nonsense")):
        ui, plain = webui(kind), webui(kind)
        p, other = (each.job(width=640, height=384, **hires_fields(kind)) for each in (ui, plain))
        plain.script = SimpleNamespace(**{name: lambda *_, **__: None for name in EVERY_HOOK})
        before = attributes(p)
        ui.generate(p, *args)
        plain.generate(other)
        untouched(p, {**before, "hr_prompt": "a lighthouse"})
        assert ui.infotexts == plain.infotexts
        assert ui.calls == plain.calls
        assert not p.comments


EVERY_HOOK = (
    "before_process",
    "process",
    "before_process_batch",
    "process_batch",
    "process_before_every_sampling",
    "before_hr",
    "post_sample",
    "postprocess",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hires", [False, True])
def test_nothing_is_left_after_a_job(kind: str, hires: bool) -> None:
    ui = webui(kind)
    p = ui.job(
        width=416,
        height=608,
        n_iter=2,
        sampler_name="DDIM",
        override_settings={"img2img_extra_noise": 0.2, "other": 1},
        **(hires_fields(kind) if hires else {}),
    )
    before = attributes(p)
    ui.generate(p, {"solver": "multistep", "save_stages": True, "refine_cfg": "off"})
    untouched(p, {**before, "hr_prompt": p.hr_prompt} if hires else before)
    assert not vars(ui.script).keys() - {"api"}
    assert all(each.func is each.original for each in ui.samplers)
    assert (any("replaces Hires. fix" in comment for comment in p.comments)) is hires


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [3, 13])
def test_nothing_is_left_after_an_exception(kind: str, call: int) -> None:
    ui = webui(kind)
    ui.fail_at = call
    p = ui.job(width=416, height=608)
    before = attributes(p)
    with pytest.raises(RuntimeError, match="out of memory"):
        ui.generate(p, {"solver": "multistep", "refine_cfg": "off"})
    untouched(p, {**before, "is_hr_pass": call == 13})
    assert all(each.func is each.original for each in ui.samplers)
    assert "encode_first_stage" not in vars(ui.model)
    ui.fail_at, ui.calls = -1, []
    p.is_hr_pass = False
    ui.generate(p, *ON)
    first, last = plan_lists(ui, 416, 608)
    assert close([level for _, level, _ in ui.calls], [*first, *last])


def test_nothing_is_left_after_a_failure_before_sampling() -> None:
    ui = webui("forge")
    p = ui.job(width=416, height=608)
    before = attributes(p)
    ui.at["process"] = lambda p: setattr(p, "hr_upscaler", "gone")
    with pytest.raises(ValueError, match="could not find upscaler"):
        ui.generate(p, *ON)
    ui.at.clear()
    ui.generate(p, False)
    untouched(p, before)
    assert len(ui.calls) == 20


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_in_the_first_pass(kind: str) -> None:
    ui = webui(kind)
    ui.interrupt_at = 4
    p = ui.job(width=416, height=608, n_iter=2)
    before = attributes(p)
    result = ui.generate(p, {"solver": "multistep"})
    untouched(p, before)
    assert [tuple(image.shape) for image in result.images] == [(3, 304, 208)]
    assert any("the image is the low-resolution one, 208x304" in comment for comment in p.comments)
    assert not levels(ui, "hires")
    assert not ui.errors


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_in_the_refine_pass(kind: str) -> None:
    ui = webui(kind)
    ui.interrupt_at = 13
    p = ui.job(width=416, height=608, n_iter=2)
    before = attributes(p)
    result = ui.generate(p, *ON)
    untouched(p, before)
    assert [tuple(image.shape) for image in result.images] == [(3, 608, 416)]
    assert not any("low-resolution one" in comment for comment in p.comments)


@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_may_be_called_twice(kind: str) -> None:
    once, twice = webui(kind), webui(kind)
    twice.twice = True
    one = once.generate(once.job(width=416, height=608, n_iter=2), *ON)
    p = twice.job(width=416, height=608, n_iter=2)
    before = attributes(p)
    two = twice.generate(p, *ON)
    assert twice.calls == once.calls
    assert all(torch.equal(a, b) for a, b in zip(one.images, two.images, strict=True))
    assert twice.infotexts == once.infotexts
    untouched(p, before)
    assert not twice.errors


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_copies_neither_disarm_nor_arm_twice(kind: str) -> None:
    ui = webui(kind)

    def as_adetailer(p: Any) -> None:
        done = SimpleNamespace(width=p.width, height=p.height, comments="")
        ui.script.postprocess(copy.copy(p), done, *ON)
        again = copy.copy(p)
        ui.script.before_process(again, *ON)
        ui.script.process(again, *ON)
        assert (again.width, again.height) == (208, 304)
        assert vars(again)["sample"] is not vars(p)["sample"]
        ui.script.postprocess(again, done, *ON)
        assert (again.width, again.height) == (416, 608)

    ui.on_image = as_adetailer
    p = ui.job(width=416, height=608, n_iter=2, batch_size=2)
    before = attributes(p)
    result = ui.generate(p, *ON)
    assert [tuple(image.shape) for image in result.images] == [(3, 608, 416)] * 4
    first, last = plan_lists(ui, 416, 608)
    assert close([level for _, level, _ in ui.calls], [*first, *last] * 2)
    assert {text["MrFlow"] for text in ui.infotexts} == {"12+1 x2 v1"}
    untouched(p, before)


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_comes_after_sampling_sees_the_users_job(kind: str) -> None:
    """Detailers read size, steps and sampler when the image is finished, before the next batch's noise is made."""
    ui = webui(kind)
    names = ("width", "height", "steps", "sampler_name", "denoising_strength")
    seen: list[Any] = []
    low: list[Any] = []
    for name in ("postprocess_batch", "postprocess_image", "postprocess_image_after_composite"):
        ui.at[name] = lambda p: seen.append(tuple(getattr(p, name) for name in names))
    ui.at["process_batch"] = lambda p: low.append((p.width, p.height, p.steps, p.rng.shape[-2:]))
    fields: dict[str, Any] = {"width": 384, "height": 256, "steps": 24, "sampler_name": "DDIM", "n_iter": 3}
    result = ui.generate(ui.job(**fields, batch_size=2, denoising_strength=0.4), *ON)
    assert seen == [(384, 256, 24, "DDIM", 0.4)] * 15
    assert low == [(192, 128, 12, (16, 24))] * 3
    assert (result.width, result.height) == (384, 256)
    # Each image is still that of its own seed.
    alone = webui(kind)
    single = alone.generate(alone.job(**{**fields, "n_iter": 1}, seed=1004), *ON)
    assert torch.allclose(single.images[0], result.images[4], atol=1e-6)
    assert not ui.errors


def test_on_hires_fix_the_final_size_is_what_others_see() -> None:
    ui = webui("forge")
    seen: list[Any] = []
    ui.at["postprocess_image"] = lambda p: seen.append((p.width, p.height, p.enable_hr))
    ui.generate(ui.job(width=1000, height=616), *ON)
    assert seen == [(1000, 616, True)]


def test_a_copy_of_an_armed_job_can_be_generated_itself() -> None:
    ui = webui("forge")
    sizes: list[Any] = []

    def again(p: Any) -> None:
        if not sizes:
            sizes.append(None)
            sizes.append(tuple(ui.generate(copy.copy(p), *ON).images[0].shape))

    ui.on_image = again
    p = ui.job(width=416, height=608)
    before = attributes(p)
    result = ui.generate(p, *ON)
    assert sizes[1] == tuple(result.images[0].shape) == (3, 608, 416)
    untouched(p, before)


def test_cells_of_a_plot_do_not_see_one_another() -> None:
    ui = webui("forge")
    p = ui.job(width=416, height=608)
    before = attributes(p)
    texts: list[Any] = []
    for values in ({"sigma": 0.2}, {"enabled": False}, {"low_steps": 6, "factor": 4.0}, {"preset": "text"}):
        cell = copy.copy(p)
        cell._mrflow_axes = values
        ui.infotexts, ui.calls = [], []
        result = ui.generate(cell, *ON)
        texts.append(ui.infotexts[0])
        assert tuple(result.images[0].shape) == (3, 608, 416)
        if values.get("enabled") is False:
            assert texts[-1] == {key: value for key, value in texts[-1].items() if "MrFlow" not in key}
            assert len(ui.calls) == 20
            assert texts[-1]["Steps"] == 20
        else:
            assert infotext.read(pasted(texts[-1])) == Controls(True, **{"preset": "12+1", **values})
    untouched(p, before)
    assert not hasattr(p, "_mrflow_axes")


def test_a_job_used_again_with_other_settings_starts_afresh() -> None:
    ui = webui("forge")
    p = ui.job(width=384, height=256)
    ui.generate(p, *ON)
    p.width, p.prompt, ui.calls = 416, "a tree", []
    result = ui.generate(p, True, "6+2")
    assert tuple(result.images[0].shape) == (3, 256, 416)
    assert len(ui.calls) == 8
    assert ui.texts[-1] == ["a tree"]


# ---------------------------------------------------------------------------------------------------------- refusals

REFUSED = [
    ("neo", lambda: Wan(neo=True), {}, "makes videos"),
    ("neo", lambda: Flux(name="flux1-kontext-dev", neo=True), {}, "edit model"),
    ("neo", lambda: QwenImage(name="qwen_image_edit_2509", neo=True), {}, "edit model"),
    ("forge", lambda: engine("StableDiffusionXLRefiner", predictor_kind="epsilon", channels=4)(), {}, "refiner"),
    ("forge", Flux, {"refiner_checkpoint": "sdxl-refiner"}, "switch the refiner off"),
    ("forge", Flux, {"width": 96, "height": 512, "hr_scale": 1.0}, "sides must be at least 64 px"),
    ("a1111", Sd3Model, {"width": 96, "height": 96, "hr_resize_x": 96}, "sides must be at least 64 px"),
]


@pytest.mark.parametrize(("kind", "make", "fields", "sentence"), REFUSED)
@pytest.mark.parametrize("hires", [False, True])
def test_a_refused_job_is_made_as_if_mrflow_were_off(
    kind: str, make: Any, fields: dict[str, Any], sentence: str, hires: bool
) -> None:
    ui, plain = WebUI(kind, make()), WebUI(kind, make())
    plain.script = SimpleNamespace(**{name: lambda *_, **__: None for name in EVERY_HOOK})
    settings = {"img2img_extra_noise": 0.25}
    fields = {"width": 512, "height": 512, "seed": 5, **(hires_fields(kind) if hires else {}), **fields}
    jobs = [each.job(**fields, override_settings=dict(settings)) for each in (ui, plain)]
    snapshots: list[dict[str, Any]] = []
    for each in (ui, plain):
        each.opts.save_images_before_highres_fix = hires
        each.at["process"] = lambda p: snapshots.append(attributes(p))
    results = [each.generate(job, {"save_stages": True}) for each, job in zip((ui, plain), jobs, strict=True)]
    [comment] = list(jobs[0].comments)
    assert sentence in comment
    assert comment.endswith(".")
    key = {"MrFlow": f"refused ({comment[:-1]})"}
    assert snapshots[0]["extra_generation_params"] == key
    snapshots[0]["extra_generation_params"] = {}
    assert snapshots[0] == snapshots[1]
    assert ui.calls == plain.calls
    assert ui.infotexts == [{**text, **key} for text in plain.infotexts]
    assert infotext.read(pasted(ui.infotexts[0])) == Controls()
    assert ui.saved == plain.saved
    assert all(torch.equal(a, b) for a, b in zip(results[0].images, results[1].images, strict=True))
    after, other = (attributes(job) for job in jobs)
    same = {name for name in other if isinstance(other[name], (str, int, float, type(None), dict, list))}
    assert {name: after[name] for name in same - {"extra_generation_params"}} == {
        name: other[name] for name in same - {"extra_generation_params"}
    }
    assert set(after) == set(other)
    assert not ui.errors


def test_neo_tells_by_its_own_record_that_a_model_edits() -> None:
    ui = WebUI("neo", Flux(name="my-merge", neo=True))
    ui.dynamic_args.kontext = True
    p = ui.job()
    ui.generate(p, *ON)
    assert any("edit model my-merge" in comment for comment in p.comments)


def test_old_forge_refuses_flow_models_and_runs_others() -> None:
    model: Any = Flux()
    del model.forge_objects.unet.model.predictor
    model.forge_objects.unet.model.model_type = SimpleNamespace(name="FLUX")
    p = SimpleNamespace(sd_model=model, cfg_scale=1.0)
    info = probe_model(p)
    assert "variance-exploding" in str(info.refusal)
    other: Any = StableDiffusion()
    del other.forge_objects.unet.model.predictor
    assert probe_model(SimpleNamespace(sd_model=other)).refusal is None


def test_wrong_arguments_are_one_sentence_and_a_normal_image() -> None:
    ui = webui("forge")
    p = ui.job()
    before = attributes(p)
    ui.generate(p, True, "12+1", 9)
    untouched(p, before)
    assert list(p.comments) == ["MrFlow is off for this job: factor must be a number from 1.25 to 4, got 9."]
    assert len(ui.calls) == 20


def test_a_refusal_stops_the_job_where_the_user_wants_that() -> None:
    ui = WebUI("neo", Wan(neo=True))
    ui.opts.mrflow_when_refused = "stop the job"
    result = ui.generate(ui.job(), *ON)
    assert result.images == []
    assert not ui.calls


@pytest.mark.parametrize("make", [lambda: Wan(neo=True), Flux], ids=["in process", "in before_process"])
def test_an_api_job_that_is_stopped_ends_in_an_error_with_the_sentence(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HTTPException(Exception):
        def __init__(self, status_code: int, detail: str) -> None:
            super().__init__(detail)
            self.status_code = status_code

    monkeypatch.setattr(
        refusing, "import_module", {"fastapi": SimpleNamespace(HTTPException=HTTPException)}.__getitem__
    )
    ui = WebUI("neo", make())
    args = {"preset": "12+1"} if not isinstance(ui.model, Flux) else {"sgma": 0.2}
    # As a setting of one job, which hosts put into force only after the first hook.
    p = ui.job(is_api=True, override_settings={"mrflow_when_refused": "stop the job"})
    with pytest.raises(
        HTTPException, match=r"makes videos|'sgma' is not a setting of MrFlow; did you mean 'sigma'"
    ) as e:
        ui.generate(p, args)
    assert e.value.status_code == 422
    assert not ui.calls


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"sgma": 0.2}, "'sgma' is not a setting"),
        (("true",), "enabled must be true or false"),
        ((1,), "enabled must be true or false"),
        ({"sigma": "0.2"}, "sigma must be a number"),
        ({"sigma": float("nan")}, "sigma must be a number"),
        ({"sigma": float("inf")}, "sigma must be a number"),
        ({"low_steps": 10**400}, "low_steps must be a whole number"),
        ({"preset": {"a": 1}}, "preset must be"),
        ({"preset": "9999+1"}, "preset must be"),
        ({"upscaler": 3}, "upscaler must be"),
        ({"draft": "yes"}, "draft must be true or false"),
        ({"draft": True, "sigma": -1}, "sigma must be a number"),
    ],
)
def test_an_api_client_reads_why_its_job_was_refused(args: Any, words: str) -> None:
    ui = webui("neo")
    p = ui.job(is_api=True)
    result = ui.generate(p, *(args if isinstance(args, tuple) else (args,)))
    assert len(ui.calls) == 20
    assert words in result.extra_generation_params["MrFlow"]
    assert result.extra_generation_params["MrFlow"].startswith("refused (MrFlow is off for this job: ")


def test_an_api_client_reads_the_report() -> None:
    ui = webui("forge")
    result = ui.generate(ui.job(width=512, height=512, sampler_name="DDIM"), *ON)
    report = result.extra_generation_params["MrFlow report"]
    assert "Euler is used." in report
    assert "MrFlow: 256x256 x12" in report
    assert not any("MrFlow report" in text for text in ui.infotexts)


class Unreadable:
    """A host's list that fails as a library may: with a ValueError, which is no refusal."""

    def __iter__(self) -> Any:
        raise ValueError("the list is damaged")


@pytest.mark.parametrize(
    ("broken", "reason"), [(None, "TypeError: "), (Unreadable(), "ValueError: the list is damaged)")]
)
def test_a_failure_of_ours_costs_the_speed_but_not_the_image(
    monkeypatch: pytest.MonkeyPatch, broken: Any, reason: str
) -> None:
    ui = webui("forge")
    p = ui.job(width=416, height=608)
    before = attributes(p)
    monkeypatch.setattr(ui, "sd_upscalers", broken)
    ui.generate(p, *ON)
    untouched(p, before)
    assert len(ui.calls) == 20
    assert any(comment.startswith(f"MrFlow failed ({reason}") for comment in p.comments)


def test_a_fault_before_the_model_is_loaded_is_no_refusal_of_the_arguments() -> None:
    ui = webui("forge")
    p = ui.job()
    setattr(p, axes.ATTRIBUTE, "not a dict")
    ui.generate(p, *ON)
    assert len(ui.calls) == 20
    [comment] = p.comments
    assert comment.startswith("MrFlow failed (ValueError: ")
    assert comment.endswith("the image is made without it.")


def test_other_kinds_of_jobs_are_left_alone() -> None:
    ui = webui("forge")
    p = Img2Img()
    for name in EVERY_HOOK:
        extra = {"x": None, "noise": None} if name == "process_before_every_sampling" else {}
        before = (SimpleNamespace(),) if name in ("post_sample", "postprocess") else ()
        getattr(ui.script, name)(p, *before, *ON, **extra)
    assert vars(p) == vars(Img2Img())


def test_a_job_may_find_no_model_or_another_model_at_first() -> None:
    ui = webui("forge")
    ui.generate(ui.job(width=512, height=512), *ON)
    ui.model = StableDiffusion()
    p = ui.job(width=384, height=256)
    ui.calls = []
    ui.generate(p, *ON)
    assert close(levels(ui, "hires"), [0.12 / 0.88])
    assert ui.calls[0][2][1] == 4


# ------------------------------------------------------------------------------------------------- the gallery's button


@pytest.mark.parametrize("kind", KINDS)
def test_the_upscale_button_runs_stages_two_to_four(kind: str) -> None:
    ui = webui(kind)
    picture = noise_image(512, 512)
    p = ui.job(width=512, height=512, enable_hr=True, firstpass_image=picture, hr_scale=1.5, hr_upscaler="None")
    p.txt2img_upscale = True
    p.override_settings["save_images_before_highres_fix"] = False
    before = attributes(p)
    result = ui.generate(p, True, "12+2", 2.0, 0, 0, 0.3)
    assert tuple(result.images[0].shape) == (3, 768, 768)
    assert not levels(ui, "first")
    assert close(levels(ui, "hires"), [0.3, 0.15])
    assert not any(key.startswith("Hires") for key in ui.infotexts[0])
    assert (
        ui.infotexts[0]["MrFlow enlarged"]
        == "512x512 to 768x768 with R-ESRGAN 2x+, 2 at sigma 0.3, refine seed seed + 1"
    )
    # Pasted, they make the image that was enlarged: a native one of this size.
    assert ui.infotexts[0]["Size"] == "512x512"
    assert not infotext.read(pasted(ui.infotexts[0])).enabled
    untouched(p, {**before, "hr_scheduler": p.hr_scheduler, "hr_prompt": p.hr_prompt})


def test_what_the_button_did_is_added_to_what_made_the_image() -> None:
    ui = webui("forge")
    made = ui.generate(ui.job(width=512, height=384), *ON)
    image = made.pictures[0]
    for step in (1, 2):
        p = ui.job(width=64, height=64, steps=33, enable_hr=True, firstpass_image=image, hr_upscaler="None")
        p.txt2img_upscale = True
        image = ui.generate(p, True, "12+1").pictures[0]
        params = parse_generation_parameters(image.info["parameters"])
        assert params["MrFlow enlarged"].count(" to ") == step
        # Everything else makes the first image, when it is pasted.
        assert (params["Size-1"], params["Size-2"], params["Steps"], params["MrFlow"]) == (
            *("512", "384", "12"),
            "12+1 x2 v1",
        )


def test_the_upscale_button_at_scale_one_takes_the_factor() -> None:
    ui = webui("forge")
    p = ui.job(width=512, height=512, enable_hr=True, firstpass_image=noise_image(512, 512), hr_scale=1.0)
    p.txt2img_upscale = True
    assert tuple(ui.generate(p, *ON).images[0].shape) == (3, 1024, 1024)
    assert p.hr_scale == 1.0
