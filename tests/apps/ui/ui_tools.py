"""What the tests of the page share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mrflow_sched.apps.cli.load import Job as CliJob
from mrflow_sched.apps.cli.load import find_upscaler, load, plan_family
from mrflow_sched.apps.cli.options import ModelChoices
from mrflow_sched.apps.cli.ui import studio_of
from mrflow_sched.apps.ui.choices import Choices
from mrflow_sched.apps.ui.jobs import Desk, Job
from mrflow_sched.apps.ui.studio import Studio
from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.make import make_plan

SMALL = Choices(prompt="a red star", size="32x32", seed="5", low_steps="3", refine_steps="1")
WORDS = ("a red star", "--size", "32x32", "--low-steps", "3", "--refine-steps", "1", "--seed", "5")
ON_CPU = ("--dtype", "float32", "--device", "cpu")


def studio_on(model: Path, folder: Path) -> Studio:
    """What `mrflow ui --model MODEL --out FOLDER` hands to the page."""
    folder.mkdir(exist_ok=True)
    choices = ModelChoices(model=str(model), device="cpu", dtype="float32")
    known = plan_family(choices)
    family = get_family(known) if isinstance(known, str) else known
    loaded = load(choices, CliJob(make_plan(family, 32, 32), ""), find_upscaler(choices))
    return studio_of(choices, family, loaded, folder)


def done(work: Callable[[Job], object], desk: Desk | None = None) -> Job:
    """A job that has ended; its error is raised."""
    job = (desk or Desk()).start("tab", work)
    assert job.done.wait(60)
    if job.error is not None:
        raise job.error
    return job


def cancelled_at(job: Job, moment: str) -> None:
    """Let the job's owner press Cancel as soon as it says `moment`."""
    usual = job.tell

    def tell(words: str, fraction: float = 0.0) -> None:
        usual(words, fraction)
        if moment in words:
            job.stop.set()

    job.tell = tell
