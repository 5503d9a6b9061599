"""Draft, pick, finish on doubles of A1111, Forge and Neo: what is finished is the image of the whole run."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from doubles import Flux, Sd3Model, StableDiffusion, WebUI, attributes, levels, parse_generation_parameters
from PIL import Image, PngImagePlugin

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.webui import infotext
from mrflow_sched.apps.webui.controls import FIELDS
from mrflow_sched.apps.webui.drafts import mark, read_draft
from mrflow_sched.apps.webui.infotext import DRAFT
from mrflow_sched.images.parameters import read_parameters

KINDS = ("a1111", "forge", "neo")
JOB: dict[str, Any] = {"width": 512, "height": 384, "negative_prompt": "fog, rain", "cfg_scale": 3.0}


def webui(kind: str) -> WebUI:
    ui = WebUI(kind, Sd3Model() if kind == "a1111" else Flux(neo=kind == "neo"))
    ui.sd_model = ui.model
    ui.model.sd_model_hash = "0123456789"
    return ui


def as_file(picture: Image.Image, *, metadata: bool = True) -> str:
    """The image as the host saves it, in base64 as API clients send it."""
    texts = PngImagePlugin.PngInfo()
    if metadata:
        texts.add_text("parameters", picture.info["parameters"])
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=texts)
    return base64.b64encode(file.getvalue()).decode()


def pixels(picture: Image.Image) -> Any:
    return np.asarray(picture.convert("RGB"))


def equal(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and bool((pixels(first) == pixels(second)).all())


def run_of(kind: str, *args: Any, **fields: Any) -> tuple[WebUI, Any, Any]:
    ui = webui(kind)
    p = ui.job(**{**JOB, **fields})
    return ui, p, ui.generate(p, *args)


# ------------------------------------------------------------------------------------------------------- draft → finish


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"preset": "8+2", "sigma": 0.4, "refine_cfg": "off"},
        {"refine_seed": "host", "colour_guard": "auto", "solver": "multistep", "shift": "host"},
    ],
    ids=["defaults", "own numbers", "other choices"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_draft_is_the_whole_run(kind: str, choice: dict[str, Any]) -> None:
    _, _, whole = run_of(kind, {**choice}, n_iter=2)
    ui, _, drafts = run_of(kind, {**choice, "draft": True}, n_iter=2)
    assert [picture.size for picture in drafts.pictures] == [(256, 192)] * 2
    assert not levels(ui, "hires")
    for at in (0, 1):
        later = webui(kind)
        # The page shows something else by now.
        job = later.job(prompt="other", seed=7, steps=3, width=64, height=64, cfg_scale=9.0, sampler_name="DPM2")
        before = attributes(job)
        finished = later.generate(job, {"finish": as_file(drafts.pictures[at])})
        assert not levels(later, "first")
        assert equal(finished.pictures[0], whole.pictures[at])
        assert finished.pictures[0].info["parameters"] == whole.pictures[at].info["parameters"]
        assert not later.errors
        for name in (
            "prompt",
            "negative_prompt",
            "seed",
            "steps",
            "width",
            "height",
            "cfg_scale",
            "enable_hr",
            "n_iter",
        ):
            assert getattr(job, name) == before[name]
    assert not ui.errors


@pytest.mark.parametrize("kind", KINDS)
def test_several_picks_are_finished_in_one_job(kind: str) -> None:
    _, _, whole = run_of(kind, {}, n_iter=4)
    _, _, drafts = run_of(kind, {"draft": True}, n_iter=4)
    ui = webui(kind)
    picks = [drafts.pictures[at] for at in (3, 1)]
    finished = ui.generate(ui.job(), {"finish": [as_file(picks[0]), picks[1].info["parameters"]]})
    assert [equal(one, whole.pictures[at]) for one, at in zip(finished.pictures, (3, 1), strict=True)] == [True, True]
    assert len(levels(ui, "hires")) == 2
    assert len(levels(ui, "first")) == 12  # the second pick came as text: stage 1 runs again


@pytest.mark.parametrize("kind", KINDS)
def test_the_button_under_the_gallery_finishes_a_draft(kind: str) -> None:
    _, _, whole = run_of(kind, {})
    _, _, drafts = run_of(kind, {"draft": True})
    ui = webui(kind)
    p = ui.job(prompt="changed meanwhile", enable_hr=True, hr_upscaler="None", firstpass_image=drafts.pictures[0])
    p.txt2img_upscale = True
    p.extra_generation_params["Original Size"] = "512x512"
    # The page's switch "Draft" may still be on.
    finished = ui.generate(p, {"draft": True})
    assert equal(finished.pictures[0], whole.pictures[0])
    assert finished.pictures[0].info["parameters"] == whole.pictures[0].info["parameters"]
    assert p.txt2img_upscale is True


def test_a_file_of_the_page_is_finished(tmp_path: Any) -> None:
    _, _, whole = run_of("forge", {})
    _, _, drafts = run_of("forge", {"draft": True})
    path = tmp_path / "draft.png"
    path.write_bytes(base64.b64decode(as_file(drafts.pictures[0])))
    ui = webui("forge")
    values = [True, *(None,) * (len(FIELDS) - 1), [SimpleNamespace(name=str(path))]]
    assert equal(ui.generate(ui.job(), *values).pictures[0], whole.pictures[0])
    # Off is off, whatever lies in the box.
    off = webui("forge")
    off.generate(off.job(), *[False, *values[1:]])
    assert len(off.calls) == 20


def test_what_automatic_stood_for_is_kept() -> None:
    _, _, drafts = run_of("forge", {"draft": True})
    later = webui("forge")
    later.sd_upscalers.append(SimpleNamespace(name="RealESRGAN_x2plus", scaler=None))
    p = later.job()
    seen: list[str] = []
    later.at["before_hr"] = lambda p: seen.append(p.hr_upscaler)
    finished = later.generate(p, {"finish": as_file(drafts.pictures[0])})
    assert seen == ["R-ESRGAN 2x+"]
    assert "automatic (R-ESRGAN 2x+)" in finished.pictures[0].info["parameters"]


def test_a_draft_keeps_what_others_do_to_images_away_from_its_pixels() -> None:
    ui = webui("forge")
    ui.opts.samples_format = "jpg"
    ui.opts.enable_pnginfo = False
    told: list[Any] = []

    def repaint(p: Any, pp: Any) -> None:
        told.append((p._ad_disabled, ui.opts.samples_format, ui.opts.enable_pnginfo))
        pp.image = Image.new("RGB", pp.image.size, "red")

    ui.on_finished = repaint
    p = ui.job(**JOB)
    drafts = ui.generate(p, {"draft": True})
    assert told == [(True, "png", True)]
    assert not hasattr(p, "_ad_disabled")
    assert (ui.opts.samples_format, ui.opts.enable_pnginfo) == ("jpg", False)
    params = parse_generation_parameters(drafts.pictures[0].info["parameters"])
    assert params[DRAFT] == mark(pixels(drafts.pictures[0]))
    assert (params["Size-1"], params["Size-2"]) == ("512", "384")
    assert any("MrFlow: draft 256x192 x12" in comment for comment in p.comments)


def test_a_draft_pastes_as_a_draft() -> None:
    _, _, drafts = run_of("neo", {"draft": True, "preset": "8+1"})
    read = infotext.read(parse_generation_parameters(drafts.pictures[0].info["parameters"]))
    assert (read.enabled, read.draft, read.preset) == (True, True, "8+1")


def test_the_prompt_of_the_refine_pass_goes_along() -> None:
    fields = {"hr_prompt": "sharper", "styles": ["old"]}
    _, _, drafts = run_of("forge", {"draft": True}, **fields)
    ui = webui("forge")
    ui.generate(ui.job(), {"finish": as_file(drafts.pictures[0])})
    assert ui.texts[-1] == ["sharper, old"]


# ------------------------------------------------------------------------------------------------------ what is refused


def with_text(before: str, after: str) -> str:
    picture = run_of("forge", {"draft": True})[2].pictures[0]
    picture.info["parameters"] = picture.info["parameters"].replace(before, after)
    return as_file(picture)


def varied() -> str:
    return as_file(run_of("forge", {"draft": True}, subseed_strength=0.3)[2].pictures[0])


def draft_file() -> str:
    return as_file(run_of("forge", {"draft": True})[2].pictures[0])


def other_settings() -> list[str]:
    drafts = [run_of("forge", {"draft": True}, **fields)[2].pictures[0] for fields in ({}, {"cfg_scale": 4.0})]
    return [as_file(picture) for picture in drafts]


REFUSED: dict[str, tuple[Any, str]] = {
    "no draft": (lambda: as_file(run_of("forge", {})[2].pictures[0]), "needs a draft"),
    "no metadata": (lambda: as_file(run_of("forge", {"draft": True})[2].pictures[0], metadata=False), "needs a draft"),
    "text of no draft": (lambda: "a lighthouse\nSteps: 12, Seed: 1, Size: 512x512", "needs a draft"),
    "nonsense": (lambda: "hello", "needs a draft"),
    "no image": (lambda: base64.b64encode(b"hello there").decode(), "is no image"),
    "cut off": (lambda: draft_file()[:2000], "damaged"),
    "a number": (lambda: 7, "must be a draft's image in base64"),
    "no seed": (
        lambda: with_text("Seed: 1000", "Seed: much"),
        "The draft's Seed must be a whole number up to 18446744073709551615, got 'much'",
    ),
    "no size": (
        lambda: with_text("Size: 512x384", "Size: large"),
        "The draft's Size must be two whole numbers such as 512x768, got 'large'",
    ),
    "no guidance": (lambda: with_text("CFG scale: 3.0", "CFG scale: NaNo"), "The draft's CFG scale must be a number"),
    "a huge size": (
        lambda: with_text("Size: 512x384", "Size: 900000x900000"),
        "must be 1 to 32768 pixels",
    ),
    "not a number": (lambda: with_text("CFG scale: 3.0", "CFG scale: nan"), "The draft's CFG scale must be a number"),
    "a huge seed": (lambda: with_text("Seed: 1000", f"Seed: {10**30}"), "Seed must be a whole number up to"),
    "a setting": (lambda: with_text("Seed: 1000", "Seed: 1000, Clip skip: abc"), "The draft's settings cannot be used"),
    "refused once": (lambda: with_text("MrFlow: automatic 12+1 x2 v1", "MrFlow: refused (x)"), "needs a draft"),
    "another size": (lambda: with_text("MrFlow size: 256x192", "MrFlow size: 128x96"), "its metadata say 128x96"),
    "cut base64": (lambda: draft_file()[:2001], "its base64 is cut off or not clean"),
    "a bad one of two": (lambda: [draft_file(), "hello"], "Draft 2 of 2: finish needs a draft"),
    "nothing": (lambda: "", "must be a draft's image in base64"),
    "an empty list": (list, "must be a draft's image in base64"),
    "variations": (lambda: [draft_file(), varied()], "differ in Variation seed strength"),
    "differing": (other_settings, "differ in CFG scale; finish them one by one"),
    "too many": (lambda: ["x"] * 101, "at most 100"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_draft_is_refused_and_nothing_else_is_made_instead(case: str) -> None:
    make, sentence = REFUSED[case]
    ui = webui("forge")
    p = ui.job()
    result = ui.generate(p, {"finish": make()})
    assert result.images == []
    assert not ui.calls
    [comment] = p.comments
    assert sentence in comment
    assert not ui.errors


def test_other_arguments_beside_finish_are_refused() -> None:
    ui = webui("forge")
    p = ui.job()
    ui.generate(p, {"finish": draft_file(), "sigma": 0.3})
    assert list(p.comments) == [
        "finish takes its settings from the draft; leave 'sigma' out, or generate without finish."
    ]


def test_a_draft_of_another_model_loads_it_or_is_refused() -> None:
    _, _, drafts = run_of("forge", {"draft": True})
    text = drafts.pictures[0].info["parameters"] + ", Model hash: 00000000ff, Model: gone"
    drafts.pictures[0].info["parameters"] = text
    ui = webui("forge")
    p = ui.job()
    assert ui.generate(p, {"finish": as_file(drafts.pictures[0])}).images == []
    assert any("made with the checkpoint gone (00000000ff), which is not installed" in said for said in p.comments)
    # The checkpoint is here, but not loaded: the host loads it for this job.
    drafts.pictures[0].info["parameters"] = text.replace("00000000ff", "fedcba9876")
    ui = webui("forge")
    seen: list[str] = []
    ui.at["process"] = lambda p: seen.append(ui.opts.sd_model_checkpoint)
    ui.generate(ui.job(), {"finish": as_file(drafts.pictures[0])})
    assert seen == ["fedcba9876"]
    assert ui.opts.sd_model_checkpoint == "checkpoint [0123456789]"


def test_transparency_that_an_editor_or_the_host_adds_is_taken_off() -> None:
    _, _, whole = run_of("a1111", {})
    _, _, drafts = run_of("a1111", {"draft": True})
    picture = drafts.pictures[0].convert("RGBA")
    picture.info["parameters"] = drafts.pictures[0].info["parameters"]
    ui = webui("a1111")
    p = ui.job()
    finished = ui.generate(p, {"finish": as_file(picture)})
    assert equal(finished.pictures[0], whole.pictures[0])
    assert not any("near it" in comment for comment in p.comments)


def test_line_breaks_in_base64_do_no_harm() -> None:
    _, _, drafts = run_of("forge", {"draft": True})
    packed = as_file(drafts.pictures[0])
    broken = "\n".join(packed[at : at + 76] for at in range(0, len(packed), 76)) + "\n"
    assert read_draft(broken).image is not None


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_of_other_prompts_keep_their_own_texts(kind: str) -> None:
    made = [run_of(kind, {"draft": True}, prompt=prompt)[2].pictures[0] for prompt in ("a red circle", "blue")]
    ui = webui(kind)
    finished = ui.generate(ui.job(), {"finish": [as_file(picture) for picture in made]})
    texts = [picture.info["parameters"] for picture in finished.pictures]
    assert [text.split("\n")[0] for text in texts] == ["a red circle", "blue"]
    assert not any("Hires" in text for text in texts)


def test_an_interrupted_draft_is_no_draft() -> None:
    ui = webui("forge")
    ui.interrupt_at = 4
    drafts = ui.generate(ui.job(**JOB), {"draft": True})
    params = read_parameters(drafts.pictures[0].info["parameters"]).values
    assert params["MrFlow stopped"] == "first pass"
    assert DRAFT not in params


def test_changed_pixels_are_told() -> None:
    _, _, drafts = run_of("forge", {"draft": True})
    picture = drafts.pictures[0]
    changed = picture.point(lambda value: value // 2)
    changed.info["parameters"] = picture.info["parameters"]
    ui = webui("forge")
    p = ui.job()
    ui.generate(p, {"finish": as_file(changed)})
    assert any("near it, not equal" in comment for comment in p.comments)
    shrunk = picture.resize((128, 96))
    shrunk.info["parameters"] = picture.info["parameters"]
    result = ui.generate(q := ui.job(), {"finish": as_file(shrunk)})
    assert result.images == []
    assert any("The draft is 128x96" in comment for comment in q.comments)


def test_a_draft_is_read_from_an_image_or_its_text() -> None:
    _, _, drafts = run_of("forge", {"draft": True})
    found = read_draft(drafts.pictures[0])
    assert (found.prompt, found.negative, found.size, found.changed) == ("a lighthouse", "fog, rain", (512, 384), False)
    assert read_draft("data:image/png;base64," + as_file(drafts.pictures[0])).image is not None
    with pytest.raises(MrFlowError, match="needs a draft"):
        read_draft("words " * 200_000)


def test_a_model_that_cannot_run_staged_makes_no_draft() -> None:
    ui = WebUI("forge", StableDiffusion())
    p = ui.job(width=96, height=96)
    ui.generate(p, {"draft": True})
    assert len(ui.calls) == 20
    assert "MrFlow" in p.extra_generation_params
    assert not hasattr(p, "_ad_disabled")


def test_a_grid_of_drafts_is_no_draft() -> None:
    ui = webui("forge")
    p = ui.job(**JOB)
    ui.generate(p, {"draft": True})
    mark_of = p.extra_generation_params[DRAFT]
    assert mark_of(use_main_prompt=False) == str(mark_of)
    assert mark_of(use_main_prompt=True) is None


def test_a_plot_finishes_no_drafts() -> None:
    file = draft_file()
    ui = webui("forge")
    p = ui.job()
    p.script_args = [3, True]
    assert ui.generate(p, {"finish": file}).images == []
    assert list(p.comments) == ["Drafts cannot be finished by a script such as X/Y/Z plot; set Script to None."]


def test_what_is_left_of_a_finish_that_was_interrupted_says_so() -> None:
    file = draft_file()
    ui = webui("forge")
    ui.interrupt_at = 1
    p = ui.job()
    finished = ui.generate(p, {"finish": [file, file]})
    assert len(finished.images) == 1
    assert read_parameters(finished.pictures[0].info["parameters"]).values["MrFlow stopped"] == "refine pass"
    assert any("stopped in the refine pass" in said for said in p.comments)
