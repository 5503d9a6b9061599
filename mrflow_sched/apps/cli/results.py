"""What `mrflow generate` leaves: images with their records, and a JSON value that says all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.console import DONE, REFUSED, Outcome, say
from mrflow_sched.apps.cli.load import Job
from mrflow_sched.apps.cli.stopping import current
from mrflow_sched.images.parameters import PARAMETERS, parameters_text
from mrflow_sched.images.record import KEY, RunRecord

if TYPE_CHECKING:
    from torch import Tensor

    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.sampler import StagedResult
    from mrflow_sched.sampling.progress import StageTiming


@dataclass(frozen=True)
class SavedImage:
    """An image that was saved.

    Attributes:
        path: Its file.
        prompt: What it shows.
        seed: Its own seed: that of the run plus its number in the batch.
        unfinished: A later stage is missing.
        stages: Files of the stages' images, in their order; empty unless --save-stages was given.
    """

    path: Path
    prompt: str
    seed: int
    unfinished: bool
    stages: tuple[Path, ...]


@dataclass
class Results:
    """What a command has made so far.

    Attributes:
        images: The saved images.
        lost: Names of those that were not saved because they contain NaN or infinity.
        timings: Parts of the runs and their seconds, those of several prompts added up.
        plan: The plan of the runs; None: there is none yet.
        upscaler: Name of the upscaler; None: a native run has none.
        notes: What the user was told.
        missing: What he was told of images that were wanted and are not there, or not finished.
    """

    images: list[SavedImage] = field(default_factory=list[SavedImage])
    lost: list[str] = field(default_factory=list[str])
    timings: dict[str, float] = field(default_factory=dict[str, float])
    plan: StagedPlan | None = None
    upscaler: str | None = None
    notes: list[str] = field(default_factory=list[str])
    missing: list[str] = field(default_factory=list[str])

    @property
    def unfinished(self) -> bool:
        """Whether an image is unfinished."""
        return any(image.unfinished for image in self.images)

    def add_timings(self, timings: Iterable[StageTiming]) -> None:
        """Add the seconds of a run.

        Args:
            timings: Its parts.
        """
        for timing in timings:
            self.timings[timing.name] = self.timings.get(timing.name, 0.0) + timing.seconds

    def save(self, folder: Path, suffix: str, job: Job, record: RunRecord, result: StagedResult) -> None:
        """Write the wanted images of a run, and its stages where kept, each with its record; never over another file.

        Images with NaN or infinity are left out. Once Ctrl-C was pressed twice, no further image is begun.

        Args:
            folder: Where they go; it is made again if another run, which failed, removed it.
            suffix: Ending of the files, which decides their format.
            job: The run.
            record: Its record; number and flags of each image are filled in.
            result: What it made.

        Raises:
            FileError: A file cannot be written.
        """
        stop = current()
        folder.mkdir(parents=True, exist_ok=True)
        for number in job.images:
            if stop.at_once:
                break
            with stop.whole():
                own = replace(record, image=number, unfinished=result.unfinished_images[number])
                self._save_one(folder, suffix, job, own, result)

    def tell_missing(self) -> None:
        """Tell the user what was wanted and is not there: images with NaN or infinity, what a signal or memory ended.

        Raises:
            MrFlowError: No image was saved, because of NaN or infinity.
        """
        lost = f"not saved, because of NaN or infinity in the image: {', '.join(self.lost)}; try --dtype float32."
        if self.lost and not self.images:
            raise MrFlowError(lost)
        unfinished = ", ".join(str(image.path) for image in self.images if image.unfinished)
        if self.lost:
            self.missing.append(lost)
        if current().requested:
            best = f"the best image so far is {self.images[-1].path}" if unfinished else "what was finished is saved"
            self.missing.append(f"Stopped; {best}.")
        elif unfinished:
            self.missing.append(f"not finished: {unfinished}.")
        for sentence in self.missing:
            say(sentence)

    def _save_one(self, folder: Path, suffix: str, job: Job, record: RunRecord, result: StagedResult) -> None:
        """Write one image and its stages; the stages take the name that the image got."""
        from mrflow_sched.images.alpha import on_white

        seed, number = job.plan.seed + record.image, record.image
        stem = f"mrflow-{seed}{'-unfinished' if record.unfinished else ''}"
        text = {PARAMETERS: parameters_text(record), KEY: record.to_json()}
        image = _with_alpha(_one(result.images, number), job, suffix)
        path = self._put(folder, stem, suffix, image, text)
        stages: list[Path | None] = []
        for step, stage in enumerate(result.stages, 1):
            name = re.sub(r"[^a-z0-9]+", "-", stage.name.lower()).strip("-")
            own = f"{stem if path is None else path.stem}-part{step}-{name}"
            shown = _one(stage.image, number)
            stages.append(self._put(folder, own, suffix, shown if holds_alpha(suffix) else on_white(shown), text))
        if path is not None:
            kept = tuple(stage for stage in stages if stage is not None)
            self.images.append(SavedImage(path, record.prompt, seed, record.unfinished, kept))

    def _put(self, folder: Path, stem: str, suffix: str, image: Tensor, text: dict[str, str]) -> Path | None:
        from mrflow_sched.images.files import save_new

        if bool(image.isfinite().all()):
            return save_new(folder, stem, image, text, suffix)
        self.lost.append(stem + suffix)
        return None

    def outcome(self, error: BaseException | None = None) -> Outcome:
        """End the work; signals that come later change nothing.

        Args:
            error: What ended it early, or None.

        Returns:
            What the command made; the code is 2 where something is missing.
        """
        current().end()
        paths = tuple(str(image.path) for image in self.images)
        value = self._to_json() if error or not self.missing else {**self._to_json(), "error": " ".join(self.missing)}
        return Outcome(value, paths, REFUSED if self.missing else DONE, error)

    def _to_json(self) -> dict[str, Any]:
        """The value that docs/cli.md describes."""
        return {
            "images": [str(image.path) for image in self.images],
            "details": [
                {
                    "path": str(image.path),
                    "prompt": image.prompt,
                    "seed": image.seed,
                    "unfinished": image.unfinished,
                    "stages": [str(path) for path in image.stages],
                }
                for image in self.images
            ],
            "lost": self.lost,
            "stages": [{"name": name, "seconds": seconds} for name, seconds in self.timings.items()],
            "plan": None if self.plan is None else self.plan.to_string(),
            "seed": None if self.plan is None else self.plan.seed,
            "upscaler": self.upscaler,
            "notes": self.notes,
            "cancelled": current().requested,
            "unfinished": self.unfinished,
        }


def _one(images: Tensor, number: int) -> Tensor:
    return images if images.ndim == 3 else images[number]


def _with_alpha(image: Tensor, job: Job, suffix: str) -> Tensor:
    """An image with its own transparency, or that of the one that the run started from, where the format holds it."""
    import torch

    from mrflow_sched.images.alpha import on_white
    from mrflow_sched.upscaling.fit import fit_like

    if not holds_alpha(suffix):
        return on_white(image)
    if job.start is None or job.start.alpha is None or len(image) == 4:
        return image
    return torch.cat([image, fit_like(job.start.alpha[None].to(image), image[None], job.plan)[0]])


def holds_alpha(suffix: str) -> bool:
    """Whether the files of a format can be transparent.

    Args:
        suffix: Ending of the files.

    Returns:
        False for JPEG.
    """
    from mrflow_sched.images.formats import OPAQUE

    return suffix not in OPAQUE


def check_format(suffix: str, plan: StagedPlan) -> None:
    """Refuse a format that cannot hold the images of a plan.

    Args:
        suffix: Ending of the image files.
        plan: The plan.

    Raises:
        MrFlowError: The final image is too large for the format.
    """
    from mrflow_sched.images.formats import check_writable

    check_writable(suffix, plan.width, plan.height)
