"""The state of one job, and how the host's job object is changed and put back.

Everything is kept on the job object `p`, in `p._mrflow` (a `Run`). A `Run` knows its `owner`: hooks are also called on
shallow copies of `p`, which carry the same run without being its owner.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mrflow_sched.apps.webui.controls import Controls
from mrflow_sched.apps.webui.host import HostApi, ModelInfo, own_attributes
from mrflow_sched.apps.webui.recipe import Recipe
from mrflow_sched.apps.webui.words import translated

if TYPE_CHECKING:
    from mrflow_sched.apps.webui.drafts import Draft

__all__ = [
    "ABSENT",
    "ATTRIBUTE",
    "METHODS",
    "Run",
    "answer",
    "change",
    "change_known",
    "current",
    "install",
    "lend",
    "override",
    "own",
    "put_back",
    "release_sampler",
    "remember",
    "say",
    "take_back",
    "tidy",
]

ATTRIBUTE = "_mrflow"
"""Where a job object carries its `Run`."""

METHODS = ("calculate_target_resolution", "sample", "sample_hr_pass", "calculate_hr_conds")
"""Methods of the job object that may be replaced while a job runs."""

ABSENT: Any = object()
"""Stands for an attribute or an option that was not there."""


@dataclass(eq=False)
class Run:
    """What is known of one job.

    Attributes:
        owner: The job object that this run belongs to.
        controls: What the user chose.
        wanted: The job's width and height in pixels, as asked for; those of the final image for drafts.
        button: The job came from the gallery's upscale button, with an image that is no draft.
        drafts: What the job finishes, one for each batch; empty for other jobs.
        source: For a job of the button, the metadata that its image brings along.
        originals: Attributes of `owner` as they were, by name, to be put back.
        settings: For each option that is overridden: its value in the job's override settings, and the host's.
        model: The loaded model; None until it is loaded.
        recipe: All numbers of the job; None until the model is loaded.
        marks: When each part of this batch began, in seconds of `time.perf_counter`.
        seconds: How long each part took, over all batches: "start", "upscale" and "refine" are the whole; within them,
            "before" the first pass, "first" and "network" in the samplers of the two passes, "decode" at the end.
        sampler: Name of the sampler that the job was decided for; other extensions put their own in its place.
        first_cfg: The first pass's guidance, while hosts with one guidance for both passes run the other.
        stopped: The pass in which the user last interrupted or skipped, "first" or "refine"; empty: none.
        lent: Values of ours that stand aside while other extensions work on finished images, by name.
        pixels: The images of a draft's batch (h, w, 3), as the host made them and nothing else changed them.
        said: What was said under the image.
    """

    owner: Any
    controls: Controls
    wanted: tuple[int, int]
    button: bool = False
    drafts: tuple[Draft, ...] = ()
    source: dict[str, str] = field(default_factory=dict[str, str])
    originals: dict[str, Any] = field(default_factory=dict[str, Any])
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict[str, "tuple[Any, Any]"])
    model: ModelInfo | None = None
    recipe: Recipe | None = None
    marks: dict[str, float] = field(default_factory=dict[str, float])
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    sampler: str = ""
    first_cfg: float | None = None
    stopped: str = ""
    lent: dict[str, Any] = field(default_factory=dict[str, Any])
    pixels: list[Any] = field(default_factory=list[Any])
    said: list[str] = field(default_factory=list[str])

    def end_part(self, name: str, begin: float | None) -> None:
        """Add the seconds of a part that ends now.

        Args:
            name: The part.
            begin: When it began, in seconds of `time.perf_counter`; None: that is not known, and its sum is NaN.
        """
        took = math.nan if begin is None else time.perf_counter() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + took


def current(p: Any) -> Run | None:
    """Return the run of a job whose numbers are decided.

    Args:
        p: The job.

    Returns:
        The run; None for other jobs, for copies of a job, and before the numbers are decided.
    """
    run = own(p)
    return run if run is not None and run.recipe is not None else None


def own(p: Any) -> Run | None:
    """Return the run of a job itself, not that of the job it was copied from.

    Args:
        p: The job.

    Returns:
        The run, or None.
    """
    run = getattr(p, ATTRIBUTE, None)
    return run if isinstance(run, Run) and run.owner is p else None


def say(p: Any, sentence: str) -> None:
    """Show a sentence under the image, in the user's language.

    Args:
        p: The job.
        sentence: What the user should read, in English; hosts show equal ones once.
    """
    run = own(p)
    if run is not None:
        run.said.append(sentence)
    sentence, comment = translated(sentence), getattr(p, "comment", None)
    if callable(comment):
        comment(sentence)
    elif isinstance(getattr(p, "comments", None), dict):
        p.comments[sentence] = 1


# ------------------------------------------------------------------------------------------------------------- setting


def remember(run: Run, p: Any, name: str) -> None:
    """Keep an attribute as it is now, or that it is absent, unless it has been kept already.

    Args:
        run: The job's run, which keeps the original.
        p: The job.
        name: The attribute.
    """
    run.originals.setdefault(name, own_attributes(p).get(name, ABSENT))


def change(run: Run, p: Any, name: str, value: Any) -> None:
    """Set an attribute, which `tidy` puts back.

    Args:
        run: The job's run, which keeps the original.
        p: The job.
        name: The attribute.
        value: Its value while the job runs.
    """
    remember(run, p, name)
    setattr(p, name, value)


def change_known(run: Run, p: Any, name: str, value: Any) -> None:
    """Set an attribute as `change` does, on hosts that have it.

    Args:
        run: The job's run, which keeps the original.
        p: The job.
        name: The attribute.
        value: Its value while the job runs.
    """
    if hasattr(p, name):
        change(run, p, name, value)


def override(run: Run, p: Any, host: HostApi, key: str, value: Any) -> None:
    """Let the host set one of its options for this job; it restores the option itself.

    Args:
        run: The job's run, which keeps the originals.
        p: The job, whose override settings are changed.
        host: The WebUI.
        key: The option; where the host does not know it, nothing happens.
        value: Its value while the job runs.
    """
    settings: dict[str, Any] = p.override_settings or {}
    if not hasattr(host.opts, key) or settings.get(key, getattr(host.opts, key)) == value:
        return
    if key not in host.opts.data:
        # The user never saved this option: hosts put back only what is written down.
        host.opts.data[key] = getattr(host.opts, key)
    if "override_settings" not in run.originals:
        change(run, p, "override_settings", dict(settings))
    run.settings[key] = p.override_settings.get(key, ABSENT), host.opts.data[key]
    p.override_settings[key] = value


def answer(run: Run, p: Any, sigmas: Callable[[int], Sequence[float]] | None) -> None:
    """Set the schedule that the host gets when it asks for one.

    Args:
        run: The job's run, which keeps the original.
        p: The job.
        sigmas: Returns the sigmas for a number of steps, in the model's own measure; None: the host makes its own.
    """
    if sigmas is None:
        put_back(run, p, "sampler_noise_scheduler_override")
        return

    def answer(steps: int) -> Tensor:
        return torch.tensor(sigmas(int(steps)), dtype=torch.float32)

    change(run, p, "sampler_noise_scheduler_override", answer)


class _Replacement:
    """A method of one job object that replaces the host's. Once the job's run is over it only calls the host's.

    Args:
        p: The job.
        run: Its run.
        name: The method's name.
        before: What the job object itself had under that name; `ABSENT` where the method came from its class.
        work: The new method, called as `work(p, run, call, *args)`, where `call` is the host's.
    """

    mrflow = True

    def __init__(self, p: Any, run: Run, name: str, before: Any, work: Callable[..., Any]) -> None:
        self._p, self._run, self._name, self._before, self._work = p, run, name, before, work

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if own(self._p) is not self._run:
            return self._call(*args, **kwargs)
        return self._work(self._p, self._run, self._call, *args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is not ABSENT:
            return self._before(*args, **kwargs)
        return getattr(self._p.__class__, self._name)(self._p, *args, **kwargs)

    def rebound(self, p: Any, run: Run) -> _Replacement:
        """Make the same method for a copy of the job.

        Args:
            p: The copy.
            run: The copy's own run.

        Returns:
            The method, to be set on the copy.
        """
        return _Replacement(p, run, self._name, self._before, self._work)


def install(run: Run, p: Any, name: str, work: Callable[..., Any]) -> None:
    """Replace a method of the job object, until `tidy` puts it back.

    Args:
        run: The job's run, which keeps the original.
        p: The job.
        name: One of `METHODS`.
        work: The new method, called as `work(p, run, call, *args)`, where `call` is the host's.
    """
    before = own_attributes(p).get(name, ABSENT)
    change(run, p, name, _Replacement(p, run, name, before, work))


# ------------------------------------------------------------------------------------------------------------- lending

_READ_AFTER_SAMPLING = ("width", "height", "steps", "sampler_name", "denoising_strength")


def lend(run: Run, p: Any) -> None:
    """Show the user's job to whoever works on the finished images: the final size, their steps and sampler.

    Args:
        run: The job's run, which keeps our values.
        p: The job.
    """
    recipe = run.recipe
    if recipe is None or run.lent:
        return
    final = {"width": recipe.width, "height": recipe.height}
    for name in _READ_AFTER_SAMPLING:
        if run.originals.get(name, ABSENT) is not ABSENT:
            # An extension's own sampler of this batch is gone by the next.
            run.lent[name] = run.sampler if name == "sampler_name" else getattr(p, name)
            setattr(p, name, final.get(name, run.originals[name]))


def take_back(run: Run, p: Any) -> None:
    """Undo `lend`, before the next batch.

    Args:
        run: The job's run.
        p: The job.
    """
    for name, value in run.lent.items():
        setattr(p, name, value)
    run.lent.clear()


# -------------------------------------------------------------------------------------------------------- putting back


def put_back(run: Run, p: Any, name: str) -> None:
    """Put one attribute back, if it was changed.

    Args:
        run: The job's run, which keeps the original.
        p: The job.
        name: The attribute. A method that another extension has replaced since is left alone.
    """
    if name not in run.originals:
        return
    value = run.originals.pop(name)
    now = own_attributes(p).get(name, ABSENT)
    if isinstance(now, _Replacement) or name not in METHODS:
        if value is not ABSENT:
            setattr(p, name, value)
        elif now is not ABSENT:
            delattr(p, name)


def _put_settings_back(p: Any, run: Run) -> None:
    original = run.originals.pop("override_settings", ABSENT)
    if original is ABSENT:
        return
    settings = dict(p.override_settings)
    for key, (before, _) in run.settings.items():
        settings.pop(key, None)
        if before is not ABSENT:
            settings[key] = before
    if original is not None:
        original.clear()
        original.update(settings)
    p.override_settings = original


def release_sampler(run: Run) -> None:
    """Give the job's sampler its own sampling function back, if it was replaced.

    Args:
        run: The job's run.
    """
    kept = run.originals.pop("sampler.func", None)
    if kept is not None:
        sampler, func = kept
        sampler.func = func


def tidy(p: Any, run: Run) -> None:
    """Put everything back on a job and its sampler. Our keys stay in the metadata, for images still to be saved.

    Args:
        p: The job.
        run: Its run.
    """
    release_sampler(run)
    _put_settings_back(p, run)
    for name in list(run.originals):
        put_back(run, p, name)
    own_attributes(p).pop(ATTRIBUTE, None)
