"""What the page's controls ask for, what the line says of it, and what a dropped image gives back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from ui_tools import SMALL, done, studio_on

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.ui import words, work
from mrflow_sched.apps.ui.choices import Choices, sizes_of
from mrflow_sched.apps.ui.given import Given, given_draft, read_given
from mrflow_sched.apps.ui.jobs import Job
from mrflow_sched.apps.ui.studio import Studio
from mrflow_sched.images.convert import to_8_bit
from mrflow_sched.images.drafts import mark, save_draft
from mrflow_sched.images.files import read_text, save_png
from mrflow_sched.images.record import RunRecord
from mrflow_sched.plan.cost import work_ratio
from mrflow_sched.plan.families import FAMILIES, get_family
from mrflow_sched.plan.make import make_plan

DEMO = get_family("demo")
GREY = torch.full((3, 8, 8), 0.5)


@pytest.fixture(scope="module")
def studio(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return studio_on(tiny_folder, tmp_path_factory.mktemp("page"))


# ------------------------------------------------------------------------------------------------------------- controls


def test_left_empty_the_family_decides() -> None:
    plan = Choices().plan(DEMO)
    assert (plan.width, plan.height, plan.preset, plan.seed) == (256, 256, "12+1", 0)
    assert Choices.from_page(None, None, None, None, None, None, None, None, None).plan(DEMO) == plan
    nested = Choices(nested=True, preset="10+2", size="128X 192", seed="7").plan(DEMO)
    assert (nested.noise, nested.width, nested.height, nested.seed) == ("nested", 128, 192, 7)
    assert [stage.steps for stage in nested.stages] == [10, 2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"size": "wide"}, "The size is 'wide'; write WIDTHxHEIGHT"),
        ({"size": "0x64"}, "0"),
        ({"seed": "12x"}, "The seed is '12x'; give random, or a number from 0 to"),
        ({"seed": str(2**63)}, "The seed is"),
        ({"low_steps": "3.5"}, "low_steps must be a whole number from 1 to 1000, got 3.5"),
        ({"low_steps": "nan"}, "low_steps must be"),
        ({"low_steps": "few"}, "low_steps must be a whole number from 1 to 1000, got 'few'"),
        ({"refine_steps": "-1"}, "refine_steps must"),
        ({"sigma": "1.5"}, "sigma must"),
        ({"preset": "<b>"}, "preset '<b>' is not one of family"),
        ({"prompt": "  "}, "The prompt is empty"),
        ({"prompt": "a" * 1_000_001}, "The prompt has 1000001 letters; shorten it to 1000000."),
        ({"negative": "a" * 1_000_001}, "The negative prompt has 1000001 letters"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_in_the_line_and_on_the_button(
    studio: Studio, changes: dict[str, Any], sentence: str
) -> None:
    choices = replace(SMALL, **changes)
    with pytest.raises(MrFlowError) as refused:
        choices.wish(studio)
    assert sentence in str(refused.value)
    for said in (words.plan_html(studio, choices, None), words.both_html(studio, choices)):
        assert "mrflow-refused" in said
        assert "<b>" not in said


def test_a_random_seed_is_drawn_once_and_is_short(studio: Studio) -> None:
    seeds = {replace(SMALL, seed=text).wish(studio).plan.seed for text in ("random", "", "-1", " Random ")}
    assert len(seeds) == 4
    assert max(seeds) < 2**32


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_the_sizes_that_are_proposed_can_be_made(family: Any) -> None:
    for size in sizes_of(family):
        plan = Choices(size=size).plan(family)
        assert f"{plan.width}x{plan.height}" == size


# ------------------------------------------------------------------------------------------------------------- the line


def test_the_line_says_sizes_steps_forwards_and_work(studio: Studio) -> None:
    said = words.plan_html(studio, SMALL, None)
    upscaler = SimpleNamespace(name="x2")
    named = words.plan_html(replace(studio, upscaler=cast("Any", upscaler)), SMALL, None)
    assert "16×16 ×3 → upscaler x2, ×2 → 32×32" in named
    for part in (
        "16×16 ×3 → Lanczos ×2 → 32×32 ×1 @ σ 0.6",
        "4 forwards",
        "× less work than 50 steps",
    ):
        assert part in said
    assert " s</p>" not in said


def test_the_lines_of_both_ways_and_of_upscaling_say_what_they_will_do(studio: Studio, tmp_path: Path) -> None:
    both = words.both_html(studio, replace(SMALL, low_steps="12"))
    ratio = work_ratio(replace(SMALL, low_steps="12").plan(studio.family), studio.family)
    assert f"Native: 32×32, 50 steps, about {ratio:.2g} times the work" in both
    save_png(tmp_path / "wide.png", torch.full((3, 32, 48), 0.5))
    start = studio.read_start(tmp_path / "wide.png")
    assert "Upscaling makes 96×64 of 48×32" in words.upscale_html(studio, SMALL, start)
    save_png(tmp_path / "thin.png", torch.full((3, 2, 48), 0.5))
    with pytest.raises(MrFlowError) as refused:
        words.upscale_html(studio, SMALL, studio.read_start(tmp_path / "thin.png"))
    said = words.refused_html(studio, refused.value)
    assert "The image is " in said
    assert "--" not in said


@pytest.mark.parametrize(
    ("sentence", "spoken"),
    [
        ("size or shift_tokens must be smaller", "Size must be smaller."),
        ("width must be a whole number", "The width in Size must be a whole number."),
        ("low_steps must be one", "Low steps must be one."),
        ("name it with --model DIR.", "Name it with --model DIR. Such options are those of mrflow ui; start it again"),
    ],
)
def test_refusals_name_controls_of_the_page(studio: Studio, sentence: str, spoken: str) -> None:
    assert f"<p>{spoken}" in words.refused_html(studio, MrFlowError(sentence))


def test_of_both_ways_it_is_said_which_file_is_native(studio: Studio) -> None:
    made = done(lambda job: work.compare(studio, SMALL.wish(studio), job)).made
    assert [
        f"{way}: Saved as {each.path}" in words.made_html(made)
        for way, each in zip(("Native", "Staged"), made, strict=True)
    ] == [True, True]
    assert "Staged: " not in words.made_html(made[1:])


def test_after_a_run_the_line_says_seconds(studio: Studio) -> None:
    [made] = done(lambda job: work.generate(studio, SMALL.wish(studio), job)).made
    speeds = words.learned(studio, made)
    assert speeds is not None
    assert " s</p>" in words.plan_html(studio, SMALL, speeds)
    assert words.learned(studio, replace(made, unfinished=True)) is None
    assert f"Saved as {made.path} · seed 5" in words.made_html([made])
    assert f"Unfinished, saved as {made.path}" in words.made_html([replace(made, unfinished=True)])


def test_words_that_the_embedded_model_does_not_know_are_told(studio: Studio) -> None:
    strange = replace(SMALL, prompt="a <i>cat</i> over green hills")
    assert "does not know" not in words.plan_html(studio, strange, None)
    said = words.plan_html(replace(studio, embedded=True), strange, None)
    assert "does not know &#x27;&lt;i&gt;cat&lt;/i&gt;&#x27;" in said
    assert "does not know" not in words.plan_html(replace(studio, embedded=True), SMALL, None)
    unclear = replace(SMALL, prompt="a star, a ring and a heart")
    said = words.plan_html(replace(studio, embedded=True), unclear, None)
    assert "does not understand this prompt: &#x27;a star&#x27; alone is a caption." in said
    assert "does not understand" not in words.plan_html(studio, unclear, None)
    assert "does not understand" not in words.plan_html(replace(studio, embedded=True), SMALL, None)


def test_a_fault_is_told_as_one_and_shown_in_the_terminal(studio: Studio, capsys: pytest.CaptureFixture[str]) -> None:
    said = words.refused_html(studio, RuntimeError("<broken>"))
    assert "A fault of mrflow" in said
    assert "RuntimeError: &lt;broken&gt;" in said
    assert "RuntimeError: <broken>" in capsys.readouterr().err
    assert "not enough memory" in words.refused_html(studio, MemoryError())
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_and_words() -> None:
    job = Job("tab")
    job.tell("stage 1 <sample>", 0.371)
    said = words.progress_html(job)
    assert "width:37%" in said
    assert "stage 1 &lt;sample&gt; · 37 %" in said


# ------------------------------------------------------------------------------------------------------ dropped images


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"low_steps": "", "refine_steps": "", "preset": "6+1", "nested": True},
        {"sigma": "0.3", "size": "48x32", "seed": "9"},
    ],
)
def test_a_saved_image_gives_its_settings_back(studio: Studio, changes: dict[str, Any]) -> None:
    wish = replace(SMALL, **changes).wish(studio)
    [made] = done(lambda job: work.generate(studio, wish, job)).made
    given = read_given(made.path, studio.family, studio.upscaler_kind)
    assert given.choices is not None
    assert given.choices.prompt == "a red star"
    assert given.choices.plan(studio.family, upscaler_kind=studio.upscaler_kind) == wish.plan
    assert "leaves out" not in given.words


def saved(path: Path, record: RunRecord) -> Path:
    save_png(path, GREY, {"mrflow": record.to_json()})
    return path


def test_what_the_page_has_no_controls_for_is_told(studio: Studio, tmp_path: Path) -> None:
    native, staged = done(lambda job: work.compare(studio, SMALL.wish(studio), job)).made
    assert (
        "out: that it is a native image; mrflow generate --from repeats" in read_given(native.path, studio.family).words
    )
    record = RunRecord.from_json(read_text(staged.path)["mrflow"])
    other = read_given(staged.path, get_family("flux1-dev"))
    assert "its model's steps (FLUX.1-dev is loaded)" in other.words
    assert other.choices == Choices(prompt="a red star", size="32x32", seed="5")
    heun = make_plan(studio.family, 32, 32, low_steps=3, refine_steps=1, solver="heun", seed=5)
    batch = replace(record, plan=heun.to_string(), batch=4, image=3)
    given = read_given(saved(tmp_path / "heun.png", batch), studio.family)
    assert given.choices is not None
    assert (given.choices.seed, given.choices.preset) == ("8", "3+1")
    assert "leaves out: its solver; mrflow" in given.words


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"preset": "10+1+2", "sigma": 0.3}, ""),
        ({"stages": 3, "low_steps": 5}, ""),
        ({"low_steps": 9, "refine_steps": 2, "sigma": 0.3}, ""),
        ({"low_steps": 9, "refine_steps": 0}, ""),
        ({"stages": 3, "low_steps": 5, "guidance": 2.0}, "its guidance"),
        ({"low_steps": 9, "mu": 0.9}, "its shift or sigmas"),
        ({"sigmas": [1.0, 0.6, 0.3]}, "its shift or sigmas"),
        ({"posterior": "sample", "low_steps": 9}, "settings that the page has no controls for"),
    ],
)
def test_of_every_record_the_page_takes_what_it_has_controls_for(
    studio: Studio, tmp_path: Path, options: dict[str, Any], left_out: str
) -> None:
    plan = make_plan(studio.family, 128, 128, seed=5, **options)
    [made] = done(lambda job: work.generate(studio, SMALL.wish(studio), job)).made
    record = RunRecord.from_json(read_text(made.path)["mrflow"])
    given = read_given(saved(tmp_path / "own.png", replace(record, plan=plan.to_string())), studio.family)
    assert given.choices is not None
    own = given.choices.plan(studio.family)
    assert [stage.steps for stage in own.stages] == [stage.steps for stage in plan.stages]
    assert [stage.start_sigma for stage in own.stages] == [stage.start_sigma for stage in plan.stages]
    assert (own == plan) == (not left_out)
    assert given.words.partition("The page leaves out: ")[2].partition(";")[0] == left_out


def test_what_an_image_is_and_what_would_repeat_it_is_said(studio: Studio, tmp_path: Path) -> None:
    [made] = done(lambda job: work.generate(studio, SMALL.wish(studio), job)).made
    record = replace(RunRecord.from_json(read_text(made.path)["mrflow"]), start="a.png")
    for changes, kind, exact in (
        ({"preview": "few, 6 steps"}, "A preview (few, 6 steps) of a native image, made by", "makes the native image"),
        ({"unfinished": True}, "An unfinished image, made by mrflow", "completes its run."),
        ({"draft": mark(GREY)}, "A draft, made by mrflow", "makes the whole image."),
        ({}, "Made by mrflow", "repeats the image as it is."),
    ):
        given = read_given(saved(tmp_path / "own.png", replace(record, **changes)), studio.family)
        assert given.words.startswith(kind)
        assert f"that it began with; mrflow generate --from {exact}" in given.words


def test_a_negative_prompt_is_taken_only_where_it_can_be_seen(studio: Studio, tmp_path: Path) -> None:
    [made] = done(lambda job: work.generate(studio, SMALL.wish(studio), job)).made
    record = replace(RunRecord.from_json(read_text(made.path)["mrflow"]), negative="a dog")
    graph = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dog"}},
        "3": {"class_type": "KSampler", "inputs": {"positive": ["1", 0], "negative": ["2", 0], "seed": 5}},
    }
    texts = (
        {"mrflow": record.to_json()},
        {"parameters": "a cat\nNegative prompt: a dog\nSteps: 20, Seed: 5, Size: 64x64"},
        {"prompt": json.dumps(graph)},
    )
    for number, text in enumerate(texts):
        save_png(tmp_path / f"{number}.png", GREY, text)
        hidden, seen = (read_given(tmp_path / f"{number}.png", get_family(name)) for name in ("flux1-dev", "sd3"))
        assert hidden.choices is not None
        assert seen.choices is not None
        assert (hidden.choices.negative, seen.choices.negative) == ("", "a dog")
        assert "its negative prompt (FLUX.1-dev takes none)" in hidden.words
        assert "negative prompt (" not in seen.words


def test_an_image_of_another_program_gives_what_it_says(tmp_path: Path) -> None:
    text = "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 11, Size: 512x768"
    save_png(tmp_path / "a1111.png", GREY, {"parameters": text})
    given = read_given(tmp_path / "a1111.png", get_family("sd3"))
    assert given.choices == Choices(prompt="a cat", negative="dog", seed="11", size="512x768")
    assert "Made by A1111" in given.words
    save_png(tmp_path / "plain.png", GREY)
    assert read_given(tmp_path / "plain.png", DEMO).choices is None


def test_an_image_of_mrflows_nodes_in_comfyui_gives_its_numbers(tmp_path: Path) -> None:
    def given(**widgets: Any) -> Given:
        numbers = {
            "width": 512,
            "height": 384,
            "seed": 11,
            "preset": "8+1",
            "sigma": 0.2,
            "cfg": 0.0,
            "noise": "nested",
        }
        graph = {
            "m": {"class_type": "MrFlowDemoModel", "inputs": {}},
            "p": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}},
            "n": {"class_type": "CLIPTextEncode", "inputs": {"text": "dog"}},
            "s": {
                "class_type": "MrFlowSampler",
                "inputs": {
                    "model": ["m", 0],
                    "positive": ["p", 0],
                    "negative": ["n", 0],
                    "upscale_model": ["m", 3],
                    **numbers,
                    **widgets,
                },
            },
        }
        save_png(tmp_path / "comfy.png", GREY, {"prompt": json.dumps(graph)})
        return read_given(tmp_path / "comfy.png", get_family("sd3"))

    own = Choices(prompt="a cat", negative="dog", seed="11", size="512x384", preset="8+1", sigma="0.2", nested=True)
    assert given() == Given(own, "Made by MrFlow's nodes in ComfyUI; its settings were taken.")
    more = given(batch_size=3, solver="heun", cfg=2.5, seed=-1)
    assert more.choices == replace(own, seed=Choices.seed)
    assert more.words.endswith(
        " It is one of 3 images of a run, and the file does not say which. The page leaves out: its solver, its "
        "guidance. the seed -1 cannot be used here."
    )
    assert "The page leaves out: its numbers (preset 'unheard' is not one of" in given(preset="unheard").words


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n\0\0"])
def test_a_file_that_is_no_image_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(MrFlowError, match=r"bad\.png"):
        read_given(tmp_path / "bad.png", DEMO)


def test_a_saved_draft_is_finished_to_the_same_image(studio: Studio, tmp_path: Path) -> None:
    wish = SMALL.wish(studio)
    [whole] = done(lambda job: work.generate(studio, wish, job)).made
    [draft, _] = done(lambda job: work.make_drafts(studio, wish, 2, job)).made
    record = RunRecord.from_json(read_text(whole.path)["mrflow"])
    foreign = torch.zeros(16, 2, 2)
    for latents, note in (
        (draft.latents, ""),
        (foreign, ""),
        (None, "holds no latents that can be used, so stage 1 runs again"),
    ):
        file, _ = save_draft(tmp_path, "draft", draft.image, latents, record)
        said = read_given(file, studio.family).words
        assert "A draft, made by mrflow" in said
        assert note in said
        found = given_draft(file, studio)
        assert (found.seed, found.latents is None) == (5, latents is not draft.latents)
        [made] = done(lambda job, found=found: work.finish(studio, [found], job)).made
        assert read_text(made.path) == read_text(whole.path)
        assert made.path.read_bytes() == whole.path.read_bytes()
        assert any("The draft of seed 5 holds no latents" in note for note in made.notes) == (found.latents is None)


def test_a_draft_for_ranking_alone_is_finished_with_the_word_that_the_image_is_another(
    studio: Studio, tmp_path: Path
) -> None:
    [whole] = done(lambda job: work.generate(studio, SMALL.wish(studio), job)).made
    record = RunRecord.from_json(read_text(whole.path)["mrflow"])
    file = saved(tmp_path / "cheap.png", replace(record, draft=mark(to_8_bit(GREY)), draft_steps=1))
    sentence = "was sampled in 1 steps, for ranking alone: the image comes from a stage 1 of its own, of 3 steps."
    assert f" It {sentence}" in read_given(file, studio.family).words
    [made] = done(lambda job: work.finish(studio, [given_draft(file, studio)], job)).made
    assert f"The draft of seed 5 {sentence}" in made.notes
    assert made.path.read_bytes() == whole.path.read_bytes()


def test_a_contact_sheet_is_told_from_a_draft(studio: Studio, tmp_path: Path) -> None:
    save_png(tmp_path / "drafts.png", GREY, {"mrflow drafts": "[]"})
    with pytest.raises(MrFlowError, match=r"'drafts\.png' is a contact sheet of drafts; drop the single draft's file"):
        given_draft(tmp_path / "drafts.png", studio)
    assert "contact sheet" in read_given(tmp_path / "drafts.png", studio.family).words


def test_a_draft_of_another_model_and_a_finished_image_are_refused(studio: Studio, tmp_path: Path) -> None:
    wish = SMALL.wish(studio)
    [whole] = done(lambda job: work.generate(studio, wish, job)).made
    with pytest.raises(MrFlowError, match="is no draft"):
        given_draft(whole.path, studio)
    record = RunRecord.from_json(read_text(whole.path)["mrflow"])
    other = replace(record, draft=mark(GREY), model_fingerprint="another")
    with pytest.raises(MrFlowError, match="other weights"):
        given_draft(saved(tmp_path / "other.png", other), studio)
    edited = replace(record, draft="00000000")
    with pytest.raises(MrFlowError, match=r"the pixels of the draft 'edited\.png' are not those that were made"):
        given_draft(saved(tmp_path / "edited.png", edited), studio)
    lanczos = replace(record, draft=mark(GREY), upscaler="x2", upscaler_sha256="0" * 64)
    with pytest.raises(MrFlowError, match="made with the upscaler 'x2'"):
        given_draft(saved(tmp_path / "x2.png", lanczos), studio)
