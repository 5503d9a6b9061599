"""One job's state, and how it is written on the host's job object and taken off again.

Everything hangs on the job object `p`, in `p._mrflow` (a `Run`). A `Run` knows its `owner`: hooks are also called on
shallow copies of `p`, which carry the same run without being its owner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mrflow_sched.apps.webui.controls import Controls
from mrflow_sched.apps.webui.host import HostApi, ModelInfo, own_attributes
from mrflow_sched.apps.webui.recipe import Recipe

__all__ = [
    "ABSENT",
    "ATTRIBUTE",
    "METHODS",
    "Method",
    "Run",
    "answer",
    "change",
    "change_known",
    "current",
    "install",
    "override",
    "own",
    "put_back",
    "release_sampler",
    "remember",
    "say",
    "tidy",
]

ATTRIBUTE = "_mrflow"

METHODS = ("calculate_target_resolution", "sample", "sample_hr_pass", "calculate_hr_conds")
"""Methods of the job object that may stand in the host's place while a job runs."""

ABSENT: Any = object()


@dataclass(eq=False)
class Run:
    """What is known of one job.

    `wanted`: the final size that was asked for. `button`: the job came from the gallery's upscale button. `originals`:
    attributes of `owner` as they were, to be put back. `settings`: option -> (its value in the job's override settings,
    the host's). `recipe` and `model` are None until the model is loaded. `marks`: when each stage of this batch began;
    `seconds`: how long each took over all batches. `stopped_early`: interrupted in a first pass.
    """

    owner: Any
    controls: Controls
    wanted: tuple[int, int]
    button: bool
    originals: dict[str, Any] = field(default_factory=dict[str, Any])
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict[str, "tuple[Any, Any]"])
    model: ModelInfo | None = None
    recipe: Recipe | None = None
    marks: dict[str, float] = field(default_factory=dict[str, float])
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    stopped_early: bool = False


def current(p: Any) -> Run | None:
    """The run that `p` itself owns and whose numbers are fixed; None for other jobs and for copies."""
    run = own(p)
    return run if run is not None and run.recipe is not None else None


def own(p: Any) -> Run | None:
    """The run of `p` itself, not that of the job it was copied from."""
    run = getattr(p, ATTRIBUTE, None)
    return run if isinstance(run, Run) and run.owner is p else None


def say(p: Any, sentence: str) -> None:
    """Show `sentence` under the image; hosts keep equal ones once."""
    comment = getattr(p, "comment", None)
    if callable(comment):
        comment(sentence)
    elif isinstance(getattr(p, "comments", None), dict):
        p.comments[sentence] = 1


# ------------------------------------------------------------------------------------------------------------- setting


def remember(run: Run, p: Any, name: str) -> None:
    """Keep attribute `name` as it is now (or that there is none), unless it has been kept already."""
    run.originals.setdefault(name, own_attributes(p).get(name, ABSENT))


def change(run: Run, p: Any, name: str, value: Any) -> None:
    """Set an attribute that `tidy` puts back."""
    remember(run, p, name)
    setattr(p, name, value)


def change_known(run: Run, p: Any, name: str, value: Any) -> None:
    """`change`, on hosts that have the attribute."""
    if hasattr(p, name):
        change(run, p, name, value)


def override(run: Run, p: Any, host: HostApi, key: str, value: Any) -> None:
    """Let the host set option `key`, if it knows it, for this job; it restores the option itself."""
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
    """Let the host's question for a schedule of n steps be answered by `sigmas(n)`, or (None) by itself."""
    if sigmas is None:
        put_back(run, p, "sampler_noise_scheduler_override")
        return

    def answer(steps: int) -> Tensor:
        return torch.tensor(sigmas(int(steps)), dtype=torch.float32)

    change(run, p, "sampler_noise_scheduler_override", answer)


class Method:
    """A method of one job object in the place of the host's: `work(p, run, call, *args)`, where `call` is what was
    there before. Once the job's run is over it only passes through.
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

    def rebound(self, p: Any, run: Run) -> Method:
        """The same method for `p`, a copy of the job."""
        return Method(p, run, self._name, self._before, self._work)


def install(run: Run, p: Any, name: str, work: Callable[..., Any]) -> None:
    before = own_attributes(p).get(name, ABSENT)
    change(run, p, name, Method(p, run, name, before, work))


# -------------------------------------------------------------------------------------------------------- putting back


def put_back(run: Run, p: Any, name: str) -> None:
    """Restore one attribute, if it was changed."""
    if name not in run.originals:
        return
    value = run.originals.pop(name)
    now = own_attributes(p).get(name, ABSENT)
    if isinstance(now, Method) or name not in METHODS:
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
    kept = run.originals.pop("sampler.func", None)
    if kept is not None:
        sampler, func = kept
        sampler.func = func


def tidy(p: Any, run: Run) -> None:
    """Leave nothing of ours on `p` or its sampler; the metadata's keys stay for the images still to be saved."""
    release_sampler(run)
    _put_settings_back(p, run)
    for name in list(run.originals):
        put_back(run, p, name)
    own_attributes(p).pop(ATTRIBUTE, None)
