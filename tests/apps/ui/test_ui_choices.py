"""What the page's controls ask for, what the line says of it, and what a dropped image gives back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ui_tools import SMALL, done, studio_on

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.ui import words, work
from mrflow_sched.apps.ui.choices import Choices, sizes_of
from mrflow_sched.apps.ui.given import given_draft, read_given
from mrflow_sched.apps.ui.jobs import Job
from mrflow_sched.apps.ui.studio import Studio
from mrflow_sched.images.drafts import mark_of, save_draft
from mrflow_sched.images.files import read_text, save_png
from mrflow_sched.images.record import RunRecord
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
    ],
)
def test_what_cannot_be_done_is_one_sentence_in_the_line_and_on_the_button(
    studio: Studio, changes: dict[str, Any], sentence: str
) -> None:
    choices = replace(SMALL, **changes)
    with pytest.raises(MrFlowError) as refused:
        choices.wish(studio)
    assert sentence in str(refused.value)
    if "prompt" not in changes:  # an empty prompt has a plan
        said = words.plan_html(studio, choices, None)
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
    for part in ("16×16 ×3 → Lanczos ×2 → 32×32 ×1 @ σ 0.12", "4 forwards", "× less work than 50 steps"):
        assert part in said
    assert " s</p>" not in said


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
    given = read_given(made.path, studio.family)
    assert given.choices is not None
    assert given.choices.prompt == "a red star"
    assert given.choices.plan(studio.family) == wish.plan
    assert "leaves out" not in given.words


def saved(path: Path, record: RunRecord) -> Path:
    save_png(path, GREY, {"mrflow": record.to_json()})
    return path


def test_what_the_page_has_no_controls_for_is_told(studio: Studio, tmp_path: Path) -> None:
    native, staged = done(lambda job: work.compare(studio, SMALL.wish(studio), job)).made
    assert "that it has 1 stage; mrflow generate --from" in read_given(native.path, studio.family).words
    record = RunRecord.from_json(read_text(staged.path)["mrflow"])
    other = read_given(staged.path, get_family("flux1-dev"))
    assert "its model's steps (FLUX.1-dev is loaded)" in other.words
    assert other.choices == Choices(prompt="a red star", size="32x32", seed="5")
    heun = make_plan(studio.family, 32, 32, low_steps=3, refine_steps=1, solver="heun", seed=5)
    batch = replace(record, plan=heun.to_string(), batch=4, image=3)
    given = read_given(saved(tmp_path / "heun.png", batch), studio.family)
    assert given.choices is not None
    assert (given.choices.seed, given.choices.low_steps) == ("8", "3")
    assert "settings that the page has no controls for" in given.words


def test_an_image_of_another_program_gives_what_it_says(tmp_path: Path) -> None:
    text = "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 11, Size: 512x768"
    save_png(tmp_path / "a1111.png", GREY, {"parameters": text})
    given = read_given(tmp_path / "a1111.png", DEMO)
    assert given.choices == Choices(prompt="a cat", negative="dog", seed="11", size="512x768")
    assert "Made by A1111" in given.words
    save_png(tmp_path / "plain.png", GREY)
    assert read_given(tmp_path / "plain.png", DEMO).choices is None


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
    text = {"mrflow": replace(record, draft=mark_of(draft.image)).to_json()}
    for latents in (draft.latents, None):  # without latents stage 1 runs again
        file = save_draft(tmp_path, "draft", draft.image, latents, text)
        assert "A draft, made by mrflow" in read_given(file, studio.family).words
        found = given_draft(file, studio)
        assert (found.seed, found.latents is None) == (5, latents is None)
        [made] = done(lambda job, found=found: work.finish(studio, [found], job)).made
        assert read_text(made.path) == read_text(whole.path)
        assert made.path.read_bytes() == whole.path.read_bytes()


def test_a_draft_of_another_model_and_a_finished_image_are_refused(studio: Studio, tmp_path: Path) -> None:
    wish = SMALL.wish(studio)
    [whole] = done(lambda job: work.generate(studio, wish, job)).made
    with pytest.raises(MrFlowError, match="is no draft"):
        given_draft(whole.path, studio)
    record = RunRecord.from_json(read_text(whole.path)["mrflow"])
    other = replace(record, draft=mark_of(GREY), model_fingerprint="another")
    with pytest.raises(MrFlowError, match="other weights"):
        given_draft(saved(tmp_path / "other.png", other), studio)
    edited = replace(record, draft="00000000")
    with pytest.raises(MrFlowError, match=r"the pixels of the draft 'edited\.png' are not those that were made"):
        given_draft(saved(tmp_path / "edited.png", edited), studio)
    lanczos = replace(record, draft=mark_of(GREY), upscaler="x2", upscaler_sha256="0" * 64)
    with pytest.raises(MrFlowError, match="made with the upscaler 'x2'"):
        given_draft(saved(tmp_path / "x2.png", lanczos), studio)
