"""What the page's jobs make, on the tiny random folder: the images of the command line, saved as it saves them."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ui_tools import ON_CPU, SMALL, WORDS, cancelled_at, done, studio_on

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.ui import work
from mrflow_sched.apps.ui.jobs import WAITING, Desk, Job
from mrflow_sched.apps.ui.studio import Studio
from mrflow_sched.images.files import read_text
from mrflow_sched.images.record import RunRecord
from mrflow_sched.plan.stages import StagedPlan


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return studio_on(tiny_folder, tmp_path_factory.mktemp("loaded"))


@pytest.fixture
def studio(loaded: Studio, tiny_folder: Path, tmp_path: Path) -> Studio:
    """With a folder of its own."""
    return studio_on(tiny_folder, tmp_path / "page")


def pixels(path: Path | str) -> Any:
    with Image.open(path) as image:
        return np.array(image)


def record(path: Path) -> RunRecord:
    return RunRecord.from_json(read_text(path)["mrflow"])


@pytest.fixture
def usual(mrflow: Any, tmp_path: Path) -> Path:
    """The image that `mrflow generate` makes of the same choices."""
    code, out, _ = mrflow("generate", *WORDS, *ON_CPU, "--out", str(tmp_path / "cli"))
    assert code == 0
    return Path(out.strip())


def test_an_image_is_that_of_the_command_line(studio: Studio, usual: Path) -> None:
    [made] = done(lambda job: work.generate(studio, SMALL.wish(studio), job)).made
    assert made.path == studio.folder / usual.name
    assert np.array_equal(pixels(made.path), pixels(usual))
    assert read_text(made.path) == read_text(usual)
    assert (made.unfinished, made.seconds > 0) == (False, True)
    assert [timing.name for timing in made.timings][:2] == ["text", "stage 1 sample"]


def test_a_draft_becomes_the_image_of_the_command_line(studio: Studio, usual: Path) -> None:
    wish = replace(SMALL, seed="3").wish(studio)
    drafts = done(lambda job: work.make_drafts(studio, wish, 4, job)).made
    assert [draft.seed for draft in drafts] == [3, 4, 5, 6]
    assert list(studio.folder.iterdir()) == []
    made = done(lambda job: work.finish(studio, [drafts[2], drafts[0]], job)).made
    assert [each.path.name for each in made] == ["mrflow-5.png", "mrflow-3.png"]
    assert np.array_equal(pixels(made[0].path), pixels(usual))
    assert read_text(made[0].path) == read_text(usual)


def test_drafts_are_ordered_by_a_score_and_back(loaded: Studio) -> None:
    made = done(lambda job: work.make_drafts(loaded, SMALL.wish(loaded), 4, job)).made
    ranked = work.ordered(made, "brightness")
    means = [
        float((each.image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).mean()) for each, _ in ranked
    ]
    assert means == sorted(means, reverse=True)
    assert len({said for _, said in ranked}) == 4
    assert [each.seed for each, _ in work.ordered([each for each, _ in ranked], work.BY_SEED)] == [5, 6, 7, 8]
    assert work.ordered([], "brightness") == ()
    with pytest.raises(MrFlowError, match="loudness"):
        work.ordered(made, "loudness")


def test_an_image_is_upscaled_as_by_the_command_line(studio: Studio, mrflow: Any, usual: Path) -> None:
    words = ("a red star", "--image", str(usual), "--seed", "5", *ON_CPU)
    code, out, _ = mrflow("generate", *words, "--out", str(usual.parent / "large"))
    assert code == 0
    wish = replace(SMALL, low_steps="", refine_steps="").wish(studio, studio.read_start(usual))
    [made] = done(lambda job: work.generate(studio, wish, job)).made
    assert pixels(made.path).shape == (64, 64, 3)
    assert np.array_equal(pixels(made.path), pixels(out.strip()))
    assert record(made.path).start_sha256 == record(Path(out.strip())).start_sha256


def test_a_comparison_is_native_and_staged_of_one_seed(studio: Studio) -> None:
    native, staged = done(lambda job: work.compare(studio, SMALL.wish(studio), job)).made
    plans = [StagedPlan.from_string(record(each.path).plan) for each in (native, staged)]
    assert [len(plan.stages) for plan in plans] == [1, 2]
    assert [plan.seed for plan in plans] == [5, 5]
    assert plans[0].stages[0].steps == plans[1].native_steps
    assert [record(each.path).upscaler for each in (native, staged)] == ["none", "Lanczos"]


# ------------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("at", ["stage 1 sample · step 2", "upscale", "stage 2 sample · step 0"])
def test_cancel_keeps_the_best_so_far(studio: Studio, at: str) -> None:
    def run(job: Job) -> None:
        cancelled_at(job, at)
        work.generate(studio, SMALL.wish(studio), job)

    [made] = done(run).made
    assert made.path.name == "mrflow-5-unfinished.png"
    assert made.unfinished
    assert record(made.path).unfinished
    assert float(pixels(made.path).std()) > 0


def test_cancel_before_there_is_an_image_saves_none(studio: Studio) -> None:
    def run(job: Job) -> None:
        cancelled_at(job, "text")
        work.generate(studio, SMALL.wish(studio), job)

    assert done(run).made == []
    assert list(studio.folder.iterdir()) == []


def test_cancel_keeps_the_drafts_that_are_there(loaded: Studio) -> None:
    def run(job: Job) -> None:
        cancelled_at(job, "draft 3 of 5: stage 1 sample · step 1")
        work.make_drafts(loaded, SMALL.wish(loaded), 5, job)

    assert [draft.seed for draft in done(run).made] == [5, 6]


def test_cancel_ends_a_series_and_keeps_what_is_finished(studio: Studio) -> None:
    drafts = done(lambda job: work.make_drafts(studio, SMALL.wish(studio), 3, job)).made

    def run(job: Job) -> None:
        cancelled_at(job, "image 2 of 3: stage 2 sample · step 0")
        work.finish(studio, drafts, job)

    assert [each.unfinished for each in done(run).made] == [False, True]


def test_jobs_run_one_after_the_other_and_waiting_can_be_ended() -> None:
    desk, go, order = Desk(), threading.Event(), list[str]()

    def slow(job: Job) -> None:
        job.tell("at work")
        assert go.wait(30)
        order.append("first")

    first = desk.start("one", slow)
    second = desk.start("two", lambda _: order.append("second"))
    third = desk.start("three", lambda _: order.append("third"))
    assert (second.words, third.words) == (WAITING, WAITING)
    assert desk.cancel("three")
    assert third.done.wait(30)
    assert not desk.cancel("four")
    assert not first.stop.is_set()
    go.set()
    assert second.done.wait(30)
    assert order == ["first", "second"]


def test_a_desk_that_closes_waits_for_what_is_being_saved() -> None:
    desk, saved = Desk(), list[str]()

    def run(job: Job) -> None:
        assert job.stop.wait(30)
        saved.append("the best so far")

    desk.start("one", run)
    desk.close()
    assert saved == ["the best so far"]


def test_a_job_that_fails_leaves_the_desk_to_others() -> None:
    desk = Desk()

    def run(_: Job) -> None:
        raise MrFlowError("no")

    job = desk.start("one", run)
    assert job.done.wait(30)
    assert isinstance(job.error, MrFlowError)
    assert done(lambda job: job.made.append("yes"), desk).made == ["yes"]


# ------------------------------------------------------------------------------------------------------------- previews


def test_previews_change_no_image_and_none_is_worth_the_run(
    studio: Studio, usual: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_PREVIEW_EVERY", 0.0)
    monkeypatch.setattr(work, "_PREVIEW_SHARE", 0)
    job = done(lambda job: work.generate(studio, SMALL.wish(studio), job))
    assert job.preview.size == (16, 16)
    assert np.array_equal(pixels(job.made[0].path), pixels(usual))

    engine: Any = studio.engine
    decode, calls = type(engine).decode, list[int]()

    def failing(self: Any, latents: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return decode(self, latents)

    monkeypatch.setattr(type(engine), "decode", failing)
    job = done(lambda job: work.generate(studio, SMALL.wish(studio), job))
    assert job.preview is None
    assert len(calls) == 3  # the preview that failed, and the two stages
    assert np.array_equal(pixels(job.made[0].path), pixels(usual))


def test_no_preview_where_parts_wait_on_the_cpu(loaded: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_PREVIEW_EVERY", 0.0)
    job = done(lambda job: work.generate(replace(loaded, previews=False), SMALL.wish(loaded), job))
    assert job.preview is None


# ------------------------------------------------------------------------------------------------------------- refusals


def test_an_image_with_nan_is_refused_and_not_saved(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = torch.full((1, 3, 16, 16), torch.nan)
    monkeypatch.setattr(type(studio.engine), "decode", lambda *_: broken)
    with pytest.raises(MrFlowError, match="NaN"):
        done(lambda job: work.generate(studio, SMALL.wish(studio), job))
    assert list(studio.folder.iterdir()) == []


def test_a_run_that_does_not_fit_into_memory_is_refused_before_it_begins(loaded: Studio) -> None:
    with pytest.raises(MrFlowError, match="memory"):
        replace(SMALL, size="16384x16384").wish(loaded)
