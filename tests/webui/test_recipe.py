"""The numbers of a job: sizes, lists, upscaler, notes and the readout."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from doubles import (
    Anima,
    ErnieImage,
    Flux,
    Flux2,
    Krea2,
    LdmModel,
    Mugen,
    PiD,
    Placeholder,
    QwenImage,
    QwenImage21,
    Sd3Model,
    StableDiffusion,
    StableDiffusionXL,
    ZImage,
    engine,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_infotext import model

from mrflow_sched.apps.webui.controls import Controls
from mrflow_sched.apps.webui.host import capabilities, probe_model
from mrflow_sched.apps.webui.recipe import fit_sizes, make_recipe
from mrflow_sched.plan.families import FAMILIES, ShiftRule
from mrflow_sched.plan.make import make_plan

NAMES = ("None", "Lanczos", "Nearest", "R-ESRGAN 4x+", "RealESRGAN_x2plus", "RealESRGAN_x2plus (MrFlow)")


def make(family: str = "flux1-dev", width: int = 1024, height: int = 1024, names: Any = NAMES, **choice: Any) -> Any:
    return make_recipe(Controls(True, **choice), model(family), width, height, upscalers=names)


def test_the_readout() -> None:
    line = make().line
    assert line == "512×512 ×12 → RealESRGAN_x2plus ×2 → 1024×1024 ×1 @ σ 0.12"
    assert make(names=("None", "R-ESRGAN 2x+")).line.startswith("512×512 ×12 → R-ESRGAN ×2 → ")
    assert " → Lanczos ×2 → " in make(names=("None",)).line
    assert make("sdxl", factor=4 / 3).line.endswith(" · experimental")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_recipe_is_the_librarys_plan(family: str) -> None:
    made, plan = make(family), make_plan(family, 1024, 1024, factor=2.0, solver="euler")
    assert made.plan == plan
    assert made.preset == FAMILIES[family].default_preset
    if FAMILIES[family].prediction == "flow":
        assert made.first_sigmas == plan.stages[0].sigmas
        assert made.refine_sigmas == plan.stages[1].sigmas
    else:
        assert made.first_sigmas is None
        assert made.refine_sigmas == pytest.approx((0.12 / 0.88, 0.0))


@pytest.mark.parametrize("name", ["None", "Lanczos", "Nearest", "Latent", "Latent (bicubic antialiased)"])
def test_without_a_network_the_image_is_refined_more_and_the_line_says_so(name: str) -> None:
    made = make(names=(*NAMES, name), upscaler=name)
    assert (made.low_steps, made.refine_steps, made.sigma, made.preset) == (12, 2, 0.45, "12+1")
    assert made.line.endswith("×2 @ σ 0.45 · refined more, as no network upscales")
    assert made.plan.upscaler_kind == "interpolation"
    counted = make(names=(*NAMES, name), upscaler=name, preset="12+1")
    assert (counted.refine_steps, counted.sigma) == (1, 0.45)
    given = make(names=(*NAMES, name), upscaler=name, sigma=0.12)
    assert (given.refine_steps, given.sigma) == (1, 0.12)
    assert "network" not in given.line
    assert make(names=(*NAMES, name)).plan.upscaler_kind == "network"
    assert make(names=(name,), upscaler="gone").sigma == 0.45  # what is used in its place


def test_presets_and_overrides() -> None:
    assert (make(preset="text").sigma, make(preset="text").low_steps) == (0.18, 12)
    assert [make(preset=tier).low_steps for tier in ("fast", "balanced", "best")] == [6, 12, 20]
    own = make(preset="9+3")
    assert (own.preset, own.low_steps, own.refine_steps, own.sigma) == ("9+3", 9, 3, 0.12)
    assert own.refine_sigmas == pytest.approx((0.12, 0.08, 0.04, 0.0))
    changed = make(low_steps=7, refine_steps=2, sigma=0.3)
    assert (changed.preset, changed.low_steps, changed.refine_steps, changed.sigma) == ("12+1", 7, 2, 0.3)
    deep = make(preset="detail")
    assert (deep.preset, deep.low_steps, deep.refine_steps, deep.sigma) == ("detail", 12, 4, 0.75)
    turbo = make("flux2-klein", preset="text")
    assert (turbo.preset, turbo.low_steps, turbo.refine_steps, turbo.sigma) == ("text", 4, 1, 0.25)


def test_shift_and_solver() -> None:
    assert make(shift="host").first_sigmas is None
    assert make().solver is None
    assert make(solver="multistep").solver == "multistep"
    assert make(solver="multistep").notes == ()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_multistep_is_multistep_and_automatic_is_the_familys_solver(family: str) -> None:
    steps: dict[str, Any] = {} if FAMILIES[family].shift.kind == "list" else {"low_steps": 2}
    made, own = make(family, solver="multistep", **steps), FAMILIES[family].solver
    assert (made.solver, made.plan.stages[0].solver) == ("multistep", "multistep")
    assert any("is distilled: Euler suits it better" in note for note in made.notes) == (own == "euler")
    picked = make(family, solver="automatic", **steps)
    assert (picked.solver, picked.plan.stages[0].solver) == (own, own)
    assert f"Stage 1 uses the solver {own}, which suits {FAMILIES[family].title}." in picked.notes
    assert not any("solver" in note or "Euler" in note for note in make(family, **steps).notes)


def test_a_models_own_list_is_answered_whatever_the_count() -> None:
    four = (1.0, 0.9, 0.7, 0.4, 0.0)
    info = model("flux1-schnell")
    family = replace(info.family, shift=ShiftRule("list", lists=(four,)))
    made = make_recipe(Controls(True), replace(info, family=family), 1024, 1024, upscalers=NAMES)
    assert made.first_list(4) == four
    assert made.first_list(5) == (1.0, 0.9, 0.7, 0.4, 0.4, 0.0)


def test_the_shift_is_that_of_the_low_size_that_runs() -> None:
    made = make(width=1000, height=616)
    assert (made.low_width, made.low_height) == (496, 304)
    assert made.plan.stages[0].tokens == 31 * 19
    assert made.plan.stages[0].mu == pytest.approx(0.5 + (31 * 19 - 256) * 0.65 / 3840)
    assert made.plan.stages[1].tokens == 63 * 39


@given(
    st.sampled_from(["flux1-dev", "flux2-klein", "sdxl", "z-image"]),
    st.integers(256, 3000),
    st.integers(256, 3000),
    st.floats(1.25, 4.0),
)
@settings(max_examples=200)
def test_sizes_lie_on_their_grids_and_near_what_was_asked(family: str, width: int, height: int, factor: float) -> None:
    info = model(family)
    final, low = fit_sizes(info, width, height, factor)
    for side, small, asked in zip(final, low, (width, height), strict=True):
        assert side % info.grid_final == 0
        assert abs(side - asked) <= info.grid_final / 2
        assert small % info.grid_low == 0
        assert abs(small - side / factor) <= info.grid_low
    floors = [max(int(side / factor / info.grid_low + 1e-9), 1) * info.grid_low for side in final]
    stretch, naive = (abs(math.log(a[0] * final[1] / (a[1] * final[0]))) for a in (low, floors))
    assert stretch <= naive + 1e-8


def test_hosts_lists() -> None:
    made = make(preset="3+2")
    first, last = made.first_sigmas, made.refine_sigmas
    assert made.first_list(3) == first
    assert made.first_list(4) == (*first[:-1], first[-2], 0.0)
    assert made.first_list(6) == make_plan("flux1-dev", 1024, 1024, low_steps=6).stages[0].sigmas
    assert made.refine_list(2) == last == (0.12, 0.06, 0.0)
    assert made.refine_list(3) == (0.12, 0.06, 0.06, 0.0)
    assert made.refine_list(5)[-3:] == last  # a strength below 1: the host takes the tail
    assert len(made.refine_list(5)) == 6
    assert made.refine_list(1) == (0.12, 0.0)


def test_the_upscaler() -> None:
    assert make().upscaler == "RealESRGAN_x2plus (MrFlow)"
    assert make(upscaler="Nearest").upscaler == "Nearest"
    missing = make(upscaler="4x-UltraSharp")
    assert missing.upscaler == "RealESRGAN_x2plus (MrFlow)"
    assert any("'4x-UltraSharp' is not installed here" in note for note in missing.notes)
    assert make(names=("None", "Lanczos")).upscaler == "Lanczos"
    assert make(names=("None",)).upscaler == "None"
    assert any("No x2 super-resolution model" in note for note in make(names=("None",)).notes)
    assert make().notes == ()


def test_automatic_downloads_nothing() -> None:
    def entry(name: str, place: str | None, local: str | None = None) -> Any:
        return SimpleNamespace(name=name, data_path=place, local_data_path=local)

    lanczos = entry("Lanczos", None)
    far = entry("R-ESRGAN 4x+", "https://host/x4.pth", "https://host/x4.pth")
    fetched = entry("R-ESRGAN 2x+", "https://host/x2.pth", "/models/x2.pth")
    assert make(names=(lanczos, far)).upscaler == "Lanczos"
    assert make(names=(lanczos, far), upscaler="R-ESRGAN 4x+").upscaler == "R-ESRGAN 4x+"
    assert make(names=(lanczos, far, fetched)).upscaler == "R-ESRGAN 2x+"


def test_notes_tell_what_changes() -> None:
    notes = " ".join(make("flux1-dev", 1003, 616).notes)
    assert "1003x616 is made at 1000x616" in notes
    assert "stretched by 0.5%" in notes
    assert "smaller than the 512 px square" in notes


def test_the_plans_own_notes_are_of_the_sizes_that_run() -> None:
    made = make("flux1-dev", 1000, 616)
    assert (made.plan.width, made.plan.height) == (1000, 616)
    text = " ".join(made.plan.notes)
    assert "is made at" not in text
    assert "cropped" not in text
    assert "Stage 1 at 496x304 is not shaped like 1000x616: the image is stretched by 0.5%." in text


def test_what_gains_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="sides must be at least 64 px"):
        make(width=96, height=96)
    with pytest.raises(ValueError, match=r"would cost 1\.\d+ times as much as 9 native steps"):
        make("z-image-turbo", low_steps=40, factor=1.5)
    with pytest.raises(ValueError, match="width and height"):
        make(width=0)


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize(
    ("loaded", "family", "grid"),
    [
        (Flux(), "flux1-dev", 8),
        (Flux(name="flux1-krea-dev_fp8"), "flux1-krea", 8),
        (Flux(name="flux1-schnell"), "flux1-schnell", 8),
        (Flux2(name="flux-2-klein-4b"), "flux2-klein", 16),
        (Flux2(name="flux-2-klein-base-4b"), "flux2-klein-base", 16),
        (Flux2(name="FLUX.2-klein-9B_fp8", neo=True), "flux2-klein", 16),
        (Flux2(name="flux2Klein_9bBase", neo=True), "flux2-klein-base", 16),
        (engine("Flux2", repository="black-forest-labs/FLUX.2-dev")(), "flux2-dev", 16),
        (QwenImage(), "qwen-image", 8),
        (QwenImage(neo=True), "qwen-image", 8),
        (QwenImage21(name="qwen_image_2.1_bf16"), "qwen-image-2.1", 16),
        (QwenImage21(name="qwen_image_2.1_turbo_Q8_0", neo=True), "qwen-image-2.1-turbo", 16),
        (engine("QwenImage21Engine", factor=16)(neo=True), "qwen-image-2.1", 16),
        (engine("Qwen21", factor=16)(), "qwen-image-2.1", 16),
        (Krea2(name="krea2_raw_bf16", neo=True), "krea2", 8),
        (Krea2(name="krea2_turbo_fp8_scaled", neo=True), "krea2-turbo", 8),
        (ErnieImage(name="ernie-image"), "ernie-image", 16),
        (ErnieImage(name="ernie-image-turbo", neo=True), "ernie-image-turbo", 16),
        (engine("ERNIE", factor=16)(name="ernie"), "ernie-image", 16),
        (Anima(name="anima-base-v1.0", neo=True), "anima", 8),
        (engine("Zimage")(name="z_image_turbo"), "z-image-turbo", 8),
        (ZImage(name="z_image_turbo_bf16"), "z-image-turbo", 8),
        (ZImage(name="z_image_bf16"), "z-image", 8),
        (engine("Chroma")(), "chroma", 8),
        (engine("Lumina2")(), "lumina2", 8),
        (engine("StableDiffusion3")(name="sd3.5_large"), "sd35", 8),
        (engine("StableDiffusion3")(name="sd3_medium"), "sd3", 8),
        (Sd3Model(), "sd3", 16),
        (LdmModel(), "sd15", 8),
        (StableDiffusion(), "sd15", 8),
        (StableDiffusionXL(), "sdxl", 8),
        (engine("StableDiffusionXL", predictor_kind="v_prediction")(), "sdxl", 8),
    ],
)
def test_families_are_known_by_what_the_host_loaded(loaded: Any, family: str, grid: int) -> None:
    info = probe_model(SimpleNamespace(sd_model=loaded))
    assert (info.family.name, info.grid_final, info.refusal, info.known) == (family, grid, None, True)
    assert info.flow is (info.family.prediction == "flow")
    assert info.experimental is not info.flow


def test_guidance_tells_distilled_models_apart_where_the_name_does_not() -> None:
    def name(loaded: Any, scale: float) -> str:
        return probe_model(SimpleNamespace(sd_model=loaded, cfg_scale=scale)).family.name

    assert (name(ZImage(), 1.0), name(ZImage(), 5.0)) == ("z-image-turbo", "z-image")
    assert (name(Flux2(), 1.0), name(Flux2(), 4.0)) == ("flux2-klein", "flux2-klein-base")
    assert (name(Krea2(), 1.0), name(Krea2(), 4.5)) == ("krea2-turbo", "krea2")
    assert (name(ErnieImage(), 1.0), name(ErnieImage(), 4.0)) == ("ernie-image-turbo", "ernie-image")
    # A name that says it counts more, and Qwen-Image 2.1 is used without CFG in both forms.
    assert (name(ZImage("z_image_turbo"), 4.0), name(ZImage("zImageBase"), 1.0)) == ("z-image-turbo", "z-image")
    assert (name(Flux2("klein-base"), 1.0), name(Flux2("klein-4step"), 4.0)) == ("flux2-klein-base", "flux2-klein")
    assert (name(QwenImage21(), 1.0), name(QwenImage21(), 4.0)) == ("qwen-image-2.1", "qwen-image-2.1")


@pytest.mark.parametrize(
    ("loaded", "shift", "grids"),
    [
        (engine("Ideogram4", factor=16)(neo=True), 3.0, (16, 16)),
        (engine("HunyuanImage", factor=32, shift=5.0)(neo=True), 5.0, (32, 32)),
        (engine("ChromaDCT", factor=1, shift=1.0)(neo=True), 1.0, (1, 16)),
        (Mugen(neo=True), 12.0, (8, 8)),
        (engine("StableDiffusionXL", is_sdxl=True, shift=1.0)("rectified"), 1.0, (8, 8)),
    ],
)
def test_an_unknown_flow_model_keeps_the_hosts_schedule(loaded: Any, shift: float, grids: tuple[int, int]) -> None:
    info = probe_model(SimpleNamespace(sd_model=loaded))
    title = type(loaded).__name__
    assert (info.flow, info.known, info.title, info.experimental, info.refusal) == (True, False, title, False, None)
    assert (info.grid_final, info.grid_low) == grids
    made = make_recipe(Controls(True), info, 1024, 1024, upscalers=NAMES)
    assert made.first_sigmas is None
    assert made.refine_sigmas == (0.12, 0.0)
    # Where the host's schedule cannot be used, MrFlow's has the host's shift.
    ends = 1 / 12, 11 / 12
    shifted = [shift * end / (1 + (shift - 1) * end) for end in ends]
    assert [made.first_list(12)[index] for index in (11, 1)] == pytest.approx(shifted, abs=1e-4)
    assert made.plan.stages[0].sigmas[-1] == 0.0


def test_sizes_of_models_whose_latents_are_of_16_pixels_are_multiples_of_16() -> None:
    for loaded in (ErnieImage(neo=True), QwenImage21(neo=True), engine("Ideogram4", factor=16)(neo=True)):
        made = make_recipe(Controls(True), probe_model(SimpleNamespace(sd_model=loaded)), 1000, 1240, upscalers=NAMES)
        assert [side % 16 for side in (made.width, made.height, made.low_width, made.low_height)] == [0, 0, 0, 0]


def test_models_that_make_no_image_from_text_alone_are_refused() -> None:
    def refusal(loaded: Any, **options: bool) -> str | None:
        host: Any = SimpleNamespace(dynamic_args=None, opts=SimpleNamespace(**options))
        return probe_model(SimpleNamespace(sd_model=loaded), host).refusal

    assert str(refusal(PiD("pid-2x"))).startswith("MrFlow makes images from text, and pid-2x finishes those of other")
    assert "edit model anima" in str(refusal(Anima("anima"), anima_do_reference=True))
    assert refusal(Anima("anima"), anima_do_reference=False) is None
    assert refusal(Flux(), anima_do_reference=True) is None
    # These forget the reference before anything is encoded after it.
    assert refusal(Krea2(), krea2_do_reference=True) is refusal(QwenImage21(), qwen21_do_reference=True) is None


def test_without_a_model_there_is_a_sentence() -> None:
    for thing in (SimpleNamespace(), SimpleNamespace(sd_model=None), SimpleNamespace(sd_model=Placeholder())):
        info = probe_model(thing)
        assert "needs a loaded checkpoint" in str(info.refusal)
        with pytest.raises(ValueError, match="needs a loaded checkpoint"):
            make_recipe(Controls(True), info, 1024, 1024)


def test_capabilities() -> None:
    from doubles import WebUI

    for kind, noising in (("a1111", "flow"), ("forge", "flow"), ("neo", "flow")):
        ui = WebUI(kind, Sd3Model() if kind == "a1111" else Flux())
        p = ui.job()
        assert capabilities(p).noising == "none"
        ui.sd_model = ui.model
        found = capabilities(p)
        assert found.noising == noising
        assert found.has_every_sampling
    assert capabilities(SimpleNamespace(sd_model=LdmModel())).noising == "ve"
