"""What a job does: make an image, drafts, a comparison; each image is saved before the next begins."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mrflow_sched import drafts
from mrflow_sched.apps.ui.jobs import Job
from mrflow_sched.apps.ui.studio import Studio, Wish
from mrflow_sched.images.convert import to_pil
from mrflow_sched.measure import ranking
from mrflow_sched.measure.compare import native_plan_of, shortest
from mrflow_sched.measure.scores import get_score
from mrflow_sched.sampler import sample_staged

if TYPE_CHECKING:
    from mrflow_sched.drafts import Draft
    from mrflow_sched.sampler import StagedResult
    from mrflow_sched.sampling.progress import Progress, StageTiming

logger = logging.getLogger(__name__)

BY_SEED = "seed"
"""The order in which drafts are made."""
_PREVIEW_EVERY = 0.4
"""Seconds between two previews, at least."""
_PREVIEW_SHARE = 15
"""A preview may take one part in so many of the time since the last one."""


@dataclass(frozen=True)
class Made:
    """An image that was made and saved.

    Attributes:
        path: Its file.
        wish: What was asked for.
        seconds: From the prompt to the image in memory.
        timings: Seconds by part.
        unfinished: A later stage is missing.
        notes: Sentences for the user.
    """

    path: Path
    wish: Wish
    seconds: float
    timings: tuple[StageTiming, ...]
    unfinished: bool
    notes: tuple[str, ...]


def generate(studio: Studio, wish: Wish, job: Job) -> Made | None:
    """Make one image and save it.

    Args:
        studio: The model.
        wish: What to make.
        job: Is told how far it is; its `stop` ends the run with the best so far.

    Returns:
        The image; None where the run was stopped before there was one.

    Raises:
        MrFlowError: The run cannot be done, or the image cannot be saved.
    """
    watch = _Watch(studio, job)
    return _kept(studio, wish, job, lambda: _sampled(studio, wish, job, watch))


def make_drafts(studio: Studio, wish: Wish, count: int, job: Job) -> None:
    """Run stage 1 alone for one seed after the other; each draft is in `job.made` when it is there.

    Args:
        studio: The model.
        wish: What the finished images show; its plan's seed is that of the first draft.
        count: How many drafts, each with the next seed.
        job: Is told how far it is, and receives the drafts.

    Raises:
        MrFlowError: The run cannot be done.
    """
    watch = _Watch(studio, job, "draft {number} of {count}", count)

    def keep(made: Draft) -> None:
        job.made.append(made)
        watch.number += 1

    drafts.draft(
        studio.engine,
        wish.plan,
        wish.prompt,
        batch=count,
        negative_prompt=wish.negative,
        on_draft=keep,
        callback=watch,
        cancel=job.stop.is_set,
    )


def ordered(made: Sequence[Draft], order: str) -> tuple[tuple[Draft, str], ...]:
    """Drafts in an order, each with what is said of it.

    Args:
        made: The drafts.
        order: `BY_SEED`, or the name of a score, whose highest comes first.

    Returns:
        (draft, its seed and, if there is one, its score) for each.

    Raises:
        MrFlowError: There is no such score, or it cannot judge these drafts.
    """
    if order == BY_SEED or not made:
        return tuple((each, f"seed {each.seed}") for each in sorted(made, key=lambda each: each.seed))
    images = torch.stack([each.image for each in made])
    rows, best_first = ranking.order(images, [each.prompt for each in made], [get_score(order)])
    return tuple((made[place], f"seed {made[place].seed}, {rows[place][0]:.3g}") for place in best_first)


def finish(studio: Studio, chosen: Sequence[Draft], job: Job) -> None:
    """Run the later stages of drafts and save what they give; the images come to `job.made`.

    Args:
        studio: The model.
        chosen: The drafts, in the order in which they are finished.
        job: Is told how far it is, and receives the images.

    Raises:
        MrFlowError: A run cannot be done, or an image cannot be saved.
    """
    watch = _Watch(studio, job, "" if len(chosen) == 1 else "image {number} of {count}", len(chosen))
    for each in chosen:
        if job.stop.is_set():
            return
        job.preview = to_pil(each.image)
        wish = Wish(
            each.plan,
            each.prompt,
            each.negative_prompt,
            refine_prompt=each.refine_prompt,
            refine_negative=each.refine_negative_prompt,
        )
        note = drafts.rerun_note(f"The draft of seed {each.seed}", each)
        said = () if note is None else (note,)
        _kept(studio, wish, job, lambda each=each: _finished(studio, each, watch), said)
        watch.number += 1


def compare(studio: Studio, wish: Wish, job: Job) -> None:
    """Make the same image natively and staged, after a short run of each; both come to `job.made`, native first.

    Args:
        studio: The model.
        wish: The staged image to make.
        job: Is told how far it is, and receives the images.

    Raises:
        MrFlowError: A run cannot be done, or an image cannot be saved.
    """
    native = native_plan_of(wish.plan, family=studio.family)
    studio.check(native)
    for name, plan in (("native", native), ("staged", wish.plan)):
        if job.stop.is_set():
            return
        own = replace(wish, plan=plan)
        _sampled(studio, replace(own, plan=shortest(plan)), job, lambda _, name=name: job.tell(f"{name}: warming up"))
        watch = _Watch(studio, job, name)
        _kept(studio, own, job, lambda own=own, watch=watch: _sampled(studio, own, job, watch))


# ------------------------------------------------------------------------------------------------------------ the parts


def _sampled(studio: Studio, wish: Wish, job: Job, callback: Callable[[Progress], object]) -> StagedResult:
    return sample_staged(
        studio.engine,
        wish.plan,
        wish.prompt,
        negative_prompt=wish.negative,
        upscaler=studio.upscaler,
        callback=callback,
        cancel=job.stop.is_set,
        image=None if wish.start is None else wish.start.pixels,
    )


def _finished(studio: Studio, chosen: Draft, watch: _Watch) -> StagedResult:
    return drafts.finish(studio.engine, chosen, upscaler=studio.upscaler, callback=watch, cancel=watch.job.stop.is_set)


def _kept(
    studio: Studio, wish: Wish, job: Job, run: Callable[[], StagedResult], said: tuple[str, ...] = ()
) -> Made | None:
    """Run and save, whatever was made; None where nothing was. `said`: notes that stand before those of the run."""
    begun = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - begun
    if result.empty:
        return None
    job.tell("saving", 1.0)
    path = studio.save(wish, result)
    notes = _new((*said, *(result.notes if wish.start is None else wish.start.notes(wish.plan)), *result.warnings))
    made = Made(path, wish, seconds, result.timings, result.unfinished, notes)
    job.made.append(made)
    return made


def _new(sentences: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(sentences))


class _Watch:
    """Tells a job how far it is, and shows it what stage 1 is making.

    Attributes:
        job: The job.
        number: Which of its runs is in work, from 0.
    """

    def __init__(self, studio: Studio, job: Job, name: str = "", count: int = 1) -> None:
        """Watch the runs of a job.

        Args:
            studio: Decodes.
            job: Is told.
            name: Of a run, where the job has several: "draft {number} of {count}".
            count: How many runs the job has.
        """
        self.job = job
        self.number = 0
        self._engine = studio.engine if studio.previews else None
        self._name, self._count = name, count
        self._last, self._cost = time.perf_counter(), 0.0

    def __call__(self, progress: Progress) -> None:
        steps = f" · step {progress.step} of {progress.steps}" if progress.name.endswith("sample") else ""
        name = self._name.format(number=self.number + 1, count=self._count)
        words = f"{name}: {progress.name}{steps}" if name else f"{progress.name}{steps}"
        self.job.tell(words, (self.number + progress.fraction) / self._count)
        due = time.perf_counter() - self._last > max(_PREVIEW_EVERY, _PREVIEW_SHARE * self._cost)
        if due and progress.stage == 1 and self._engine is not None:
            self._show(progress)

    def _show(self, progress: Progress) -> None:
        estimate = progress.denoised
        if estimate is None or self._engine is None:
            return
        begun = time.perf_counter()
        try:
            self.job.preview = to_pil(self._engine.decode(estimate[:1])[0].float().cpu().clamp(0, 1))
        except Exception as error:  # of memory, say: no preview is worth the run
            logger.info("no previews: %s", error)
            self._engine = None
        self._last = time.perf_counter()
        self._cost = self._last - begun
