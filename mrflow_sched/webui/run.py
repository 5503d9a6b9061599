"""The life of one job on a host: arm -> fit -> each pass -> tidy. One function per hook; the script only delegates.

All state hangs on the job object `p`, in `p._mrflow` (a `Run`); nothing is kept on the script, in a module, on the
host or on its samplers. The host samples: hires fix is switched on, and sigma lists reach the host through
`p.sampler_noise_scheduler_override`, which it asks in both passes.

Hooks are called twice, on shallow copies of `p`, and out of order by other extensions. A `Run` knows its `owner`: a
copy of an armed job gets a run of its own, and only the owner's tidies up.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from mrflow_sched._errors import first_line
from mrflow_sched.solvers import get_solver
from mrflow_sched.webui import infotext
from mrflow_sched.webui.axes import overrides
from mrflow_sched.webui.controls import Controls
from mrflow_sched.webui.encode import steady_encoding
from mrflow_sched.webui.host import HostApi, ModelInfo, own_attributes, probe_model
from mrflow_sched.webui.recipe import Recipe, make_recipe
from mrflow_sched.webui.settings import when_refused

__all__ = [
    "Run",
    "before_hr",
    "before_process",
    "before_process_batch",
    "current",
    "post_sample",
    "postprocess",
    "process",
    "process_batch",
    "process_before_every_sampling",
]

logger = logging.getLogger("mrflow")

ATTRIBUTE = "_mrflow"
DRIFT = 3 / 255, 0.15
"""The colour guard acts on a shift of a channel's mean between these (of a range of 1): below nobody sees it, and
above it is no cast but another picture."""

_ABSENT: Any = object()
_SAME_MODULES = ["Use same choices"]
_NO_REFINER = (None, "", "None", "none")
# Host keys that say hires fix, and so would switch it on when the metadata is pasted; its prompts are kept.
_HIRES_PROMPTS = ("Hires prompt", "Hires negative prompt")
# "[a:b:10]" and "[a|b]" change with the step; the passes have different steps.
_EDITED_PROMPT = re.compile(r"\[[^\]]*[:|]")


@dataclass
class Run:
    """What is known of one job. `originals`: attributes of `owner` as they were, to be put back."""

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
    run = _own(p)
    return run if run is not None and run.recipe is not None else None


# ------------------------------------------------------------------------------------------------------------- arming


def before_process(p: Any, args: Sequence[Any], host: HostApi) -> None:
    """Switch the host's hires fix on for a job that wants MrFlow. The model may not be loaded yet; sizes wait."""
    if not hasattr(p, "enable_hr"):
        return
    run = getattr(p, ATTRIBUTE, None)
    try:
        controls = _controls(p, args)
    except ValueError as error:
        _leave(p, run)
        if not _off(args):
            _refused(p, host, f"MrFlow is off for this job: {error}")
        return
    if run is not None and controls == run.controls:
        if run.owner is not p:
            _adopt(p, run, host)
        return
    _leave(p, run)
    if not controls.enabled:
        return
    if getattr(p, "refiner_checkpoint", None) not in _NO_REFINER:
        sentence = (
            f"MrFlow cannot be used with the refiner {p.refiner_checkpoint}; switch the refiner off, or generate "
            "without MrFlow."
        )
        _refused(p, host, sentence)
        return
    _guarded(_arm, p, controls, host)


def _off(args: Sequence[Any]) -> bool:
    """Whether a list of arguments that cannot be read at least says that MrFlow is off."""
    first: Any = args[0] if args else False
    return first is False or (isinstance(first, dict) and cast("dict[Any, Any]", first).get("enabled") is False)


def _controls(p: Any, args: Sequence[Any]) -> Controls:
    """The script's arguments, under what a plot set for this job."""
    controls, cell = Controls.from_args(args), overrides(p)
    return replace(controls, **cell) if cell else controls


def _arm(p: Any, controls: Controls, host: HostApi) -> None:
    run = Run(p, controls, (p.width, p.height), bool(getattr(p, "txt2img_upscale", False)))
    setattr(p, ATTRIBUTE, run)
    for name in ("hr_prompt", "hr_negative_prompt", "all_hr_prompts", "all_hr_negative_prompts"):
        if not p.enable_hr:
            _remember(run, p, name)
    _change(run, p, "enable_hr", True)
    _override(run, p, host, "img2img_extra_noise", 0)
    if controls.save_stages and not run.button:
        _override(run, p, host, "save_images_before_highres_fix", True)


def _adopt(p: Any, run: Run, host: HostApi) -> None:
    """Give `p`, a copy of an armed job, a run of its own, with the methods bound to it."""
    own = replace(run, owner=p, originals=dict(run.originals), settings=dict(run.settings), marks={}, seconds={})
    setattr(p, ATTRIBUTE, own)
    for name in _METHODS:
        if getattr(own_attributes(p).get(name), "mrflow", False):
            setattr(p, name, own_attributes(p)[name].rebound(p, own))


# ------------------------------------------------------------------------------------------------------------- fitting


def process(p: Any, host: HostApi) -> None:
    """Fix all numbers, now that the model is loaded, and write them into the job; or refuse and put all back."""
    run = _own(p)
    if run is not None and run.recipe is None:
        _guarded(_fit, p, run, host)


def _fit(p: Any, run: Run, host: HostApi) -> None:
    run.model = probe_model(p, host)
    names = [str(entry.name) for entry in host.upscalers()]
    wanted = _button_size(p, run) if run.button else run.wanted
    try:
        recipe = make_recipe(run.controls, run.model, *wanted, upscalers=names)
    except ValueError as error:
        _refuse(p, run, host, str(error))
        return
    if run.button:
        recipe = replace(recipe, low_width=p.width, low_height=p.height)
    run.recipe = recipe
    if not run.button:
        if run.originals.get("enable_hr") is True:
            _say(p, f"MrFlow takes the place of Hires. fix; {recipe.width}x{recipe.height} is the final size.")
        for sentence in recipe.notes:
            _say(p, sentence)
    logger.info("%s", recipe.line)
    if not run.button:
        _fit_first_pass(p, run, recipe, host)
    _fit_refine_pass(p, run, recipe)


def _button_size(p: Any, run: Run) -> tuple[int, int]:
    """About the size that the host will give a picture from the gallery's upscale button."""
    if getattr(p, "hr_resize_x", 0) or getattr(p, "hr_resize_y", 0):
        width, height = p.hr_resize_x, p.hr_resize_y
        return width or height * p.width // p.height, height or width * p.height // p.width
    if p.hr_scale <= 1:
        _change(run, p, "hr_scale", run.controls.factor)
    return int(p.width * p.hr_scale), int(p.height * p.hr_scale)


def _fit_first_pass(p: Any, run: Run, recipe: Recipe, host: HostApi) -> None:
    model = run.model
    # Hosts may have rounded the size since; the job is left with the one that was asked for.
    run.originals.update(width=run.wanted[0], height=run.wanted[1])
    _change(run, p, "width", recipe.low_width)
    _change(run, p, "height", recipe.low_height)
    _change(run, p, "steps", recipe.low_steps)
    _change(run, p, "hr_scale", recipe.width / recipe.low_width)
    _change(run, p, "hr_resize_x", recipe.width)
    _change(run, p, "hr_resize_y", recipe.height)
    if hasattr(p, "calculate_target_resolution"):
        _install(run, p, "calculate_target_resolution", _target_resolution)
    if model is not None and model.flow and p.sampler_name in host.timestep_samplers():
        _say(p, f"The sampler {p.sampler_name} cannot follow a flow model's noise levels; Euler is used.")
        _change(run, p, "sampler_name", "Euler")


def _fit_refine_pass(p: Any, run: Run, recipe: Recipe) -> None:
    _change(run, p, "hr_second_pass_steps", recipe.refine_steps)
    _change(run, p, "denoising_strength", 1.0)
    _change(run, p, "hr_upscaler", recipe.upscaler)
    _change(run, p, "hr_checkpoint_name", None)
    _change(run, p, "hr_sampler_name", "Euler")
    _change_known(run, p, "hr_scheduler", None)
    _change_known(run, p, "hr_additional_modules", list(_SAME_MODULES))
    if hasattr(p, "hr_cfg"):
        _change(run, p, "hr_cfg", _refine_cfg(p, run.controls))
    if hasattr(p, "distilled_cfg_scale"):
        _change_known(run, p, "hr_distilled_cfg", p.distilled_cfg_scale)
    _remember(run, p, "sampler_noise_scheduler_override")
    _install(run, p, "sample", _sample)
    _install(run, p, "sample_hr_pass", _sample_hr_pass)
    if hasattr(p, "calculate_hr_conds"):
        _install(run, p, "calculate_hr_conds", _hr_conds)


def _refine_cfg(p: Any, controls: Controls) -> float:
    return {"same": p.cfg_scale, "off": 1.0, "value": controls.refine_cfg_value}[controls.refine_cfg]


# ------------------------------------------------------------------------------------------------------------- passes


def before_process_batch(p: Any, host: HostApi) -> None:
    """Answer the first pass of the coming batch with the plan's list, whatever the batch before left."""
    run = current(p)
    if run is None or run.recipe is None:
        return
    run.marks = {"start": time.perf_counter()}
    _answer(run, p, None if run.recipe.first_sigmas is None else run.recipe.first_list)


def process_batch(p: Any, host: HostApi) -> None:
    """Write our keys into the metadata, before the host writes params.txt, and take out what says hires fix."""
    _write_infotext(p, current(p))


def process_before_every_sampling(p: Any, host: HostApi, x: Tensor, noise: Tensor) -> None:
    """First pass: the solver. Hires pass: the refine noise, written in place; running twice changes nothing."""
    run = current(p)
    if run is None or run.recipe is None:
        return
    if not p.is_hr_pass:
        _prepare_sampler(p, run, run.recipe)
    elif run.controls.refine_seed != "host":
        seeds, subseeds = ([int(seed) + 1 for seed in seeds] for seeds in (p.seeds, p.subseeds))
        noise.copy_(host.make_noise(p, noise.shape[1:], seeds, subseeds))


def before_hr(p: Any, host: HostApi) -> None:
    """Answer the hires pass with the refine list, from exactly its sigma to 0."""
    run = current(p)
    if run is None or run.recipe is None:
        return
    run.marks["refine"] = time.perf_counter()
    p.denoising_strength = 1.0
    p.hr_second_pass_steps = run.recipe.refine_steps
    _answer(run, p, run.recipe.refine_list)
    if not hasattr(p, "hr_cfg"):
        _change(run, p, "cfg_scale", _refine_cfg(p, run.controls))
    _write_infotext(p, run)


def post_sample(p: Any, host: HostApi) -> None:
    """After both passes of a batch: timings, and what was set for this batch only is put back."""
    run = current(p)
    if run is None:
        return
    _take_times(run)
    _put_back(run, p, "cfg_scale")
    _put_back(run, p, "sampler_noise_scheduler_override")
    _write_infotext(p, run)
    if "refine" not in run.marks and getattr(host.state, "interrupted", False):
        run.stopped_early = True
    if getattr(p, "iteration", 0) >= p.n_iter - 1 or run.stopped_early:
        _report(p, run, host)


def postprocess(p: Any, host: HostApi, processed: Any) -> None:
    """The job is done: tell its final size, and leave `p` as it came."""
    run = _own(p)
    if run is None:
        return
    recipe = run.recipe
    if recipe is not None and not run.button:
        for name, low, final in (
            ("width", recipe.low_width, recipe.width),
            ("height", recipe.low_height, recipe.height),
        ):
            if getattr(processed, name, None) == low:
                setattr(processed, name, final)
    kept = {name: getattr(p, name) for name in ("all_hr_prompts", "all_hr_negative_prompts") if hasattr(p, name)}
    _tidy(p, run)
    # The metadata made after this (a plot's grid) still looks its prompts up there.
    for name, value in kept.items():
        setattr(p, name, value)


def _answer(run: Run, p: Any, sigmas: Callable[[int], Sequence[float]] | None) -> None:
    """Let the host's question for a schedule of n steps be answered by `sigmas(n)`, or (None) by itself."""
    if sigmas is None:
        _put_back(run, p, "sampler_noise_scheduler_override")
        return

    def answer(steps: int) -> Tensor:
        return torch.tensor(sigmas(int(steps)), dtype=torch.float32)

    _change(run, p, "sampler_noise_scheduler_override", answer)


def _prepare_sampler(p: Any, run: Run, recipe: Recipe) -> None:
    """See that the first pass runs on usable levels with the solver that was chosen."""
    sampler, model = getattr(p, "sampler", None), run.model
    if sampler is None or model is None or getattr(sampler.func, "mrflow", False):
        return
    if model.flow and recipe.first_sigmas is None and hasattr(sampler, "get_sigmas"):
        levels = [float(level) for level in sampler.get_sigmas(p, p.steps)]
        if not _usable(levels):
            schedule = getattr(p, "scheduler", None) or "Automatic"
            _say(p, f"The schedule {schedule} does not suit {model.title}; MrFlow's own is used.")
            _answer(run, p, recipe.first_list)
    solver = recipe.solver if hasattr(sampler, "get_sigmas") else None
    if solver is None and model.flow and "sigmas" not in inspect.signature(sampler.func).parameters:
        _say(p, f"The sampler {p.sampler_name} chooses noise levels by itself; Euler is used.")
        solver = "euler"
    if solver is not None:
        run.originals.setdefault("sampler.func", (sampler, sampler.func))
        sampler.func = _host_solver(solver)


def _usable(levels: Sequence[float]) -> bool:
    """Whether a schedule is one of flow levels: finite, at most 1, falling."""
    finite = all(math.isfinite(level) and -1e-6 <= level <= 1.0001 for level in levels)
    return finite and all(after < before for before, after in pairwise(levels))


def _host_solver(name: str) -> Callable[..., Tensor]:
    """Our solver `name` in the place of a host's sampling function, which also gets keywords that ours do not know."""
    solver = get_solver(name)

    def sample(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Any = None,
        callback: Any = None,
        disable: Any = None,
        **ignored: Any,
    ) -> Tensor:
        return solver(model, x, sigmas, extra_args, callback, disable).to(x.dtype)

    sample.mrflow = True  # pyright: ignore[reportFunctionMemberAccess]
    return sample


# ------------------------------------------------------------------------------------------------------------- methods


class _Method:
    """A method of one job object in the place of the host's: `work(p, run, call, *args)`, where `call` is what was
    there before. Once the job's run is over it only passes through.
    """

    mrflow = True

    def __init__(self, p: Any, run: Run, name: str, before: Any, work: Callable[..., Any]) -> None:
        self._p, self._run, self._name, self._before, self._work = p, run, name, before, work

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _own(self._p) is not self._run:
            return self._call(*args, **kwargs)
        return self._work(self._p, self._run, self._call, *args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is not _ABSENT:
            return self._before(*args, **kwargs)
        return getattr(self._p.__class__, self._name)(self._p, *args, **kwargs)

    def rebound(self, p: Any, run: Run) -> _Method:
        """The same method for `p`, a copy of the job."""
        return _Method(p, run, self._name, self._before, self._work)


def _install(run: Run, p: Any, name: str, work: Callable[..., Any]) -> None:
    before = own_attributes(p).get(name, _ABSENT)
    _change(run, p, name, _Method(p, run, name, before, work))


def _target_resolution(p: Any, run: Run, call: Callable[..., Any]) -> Any:
    """The host's final size, made exactly ours: hosts round it, or shrink the first pass in an old mode."""
    size = p.width, p.height
    result = call()
    recipe = run.recipe
    if recipe is not None:
        p.width, p.height = size
        p.hr_upscale_to_x, p.hr_upscale_to_y = recipe.width, recipe.height
        p.truncate_x = p.truncate_y = 0
    return result


def _sample(p: Any, run: Run, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Both passes of a batch; after an exception no other hook comes, so the job is tidied here."""
    try:
        return call(*args, **kwargs)
    except BaseException:
        _tidy(p, run)
        raise


def _sample_hr_pass(
    p: Any, run: Run, call: Callable[..., Any], samples: Any, decoded: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Enlarging, encoding and the hires pass, with an encoder that depends on the seeds alone."""
    run.marks.setdefault("enlarge", time.perf_counter())
    _release_sampler(run)
    with steady_encoding(p.sd_model, p.seeds or []):
        result = call(samples, decoded, *args, **kwargs)
    if run.controls.colour_guard == "auto" and isinstance(decoded, Tensor) and isinstance(result, list):
        _guard_colours(decoded, cast("list[Any]", result), unit_range=hasattr(p.sd_model, "is_wan"))
    return cast("Any", result)


def _hr_conds(p: Any, run: Run, call: Callable[..., Any]) -> Any:
    """The hires pass's text conditioning: that of the first pass where nothing differs, so text is encoded once."""
    if p.hr_c is None and _same_text(p, run):
        p.hr_c = p.c
        p.hr_uc = None if getattr(p, "hr_cfg", None) == 1 else p.uc
        return None
    return call()


def _same_text(p: Any, run: Run) -> bool:
    model = run.model
    if model is None or model.family.name == "sdxl" or p.c is None:  # SDXL is conditioned on the size
        return False
    if p.uc is None and getattr(p, "hr_cfg", 1) != 1:
        return False
    first, second = (p.prompts, p.negative_prompts), (p.hr_prompts, p.hr_negative_prompts)
    same = [list(texts) for texts in first] == [list(texts or ()) for texts in second]
    same = same and p.extra_network_data == p.hr_extra_network_data
    return same and not any(_EDITED_PROMPT.search(str(text)) for texts in first for text in texts)


def _guard_colours(before: Tensor, after: list[Any], *, unit_range: bool) -> None:
    """Move each channel's mean in the pictures `after` (each (..., 3, H, W) in [-1, 1]) back to `before`'s where it
    drifted. `before` is (B, ..., 3, h, w) in [-1, 1]; on hosts that give [0, 1] there, `unit_range`.
    """
    low = before.float()
    if not unit_range or float(low.min()) < -0.01:
        low = (low + 1.0) / 2.0
    for i, picture in enumerate(after[: low.shape[0]]):
        drift = _means((picture.float() + 1.0) / 2.0) - _means(low[i])
        worst = float(drift.abs().max())
        if DRIFT[0] < worst < DRIFT[1]:
            after[i] = picture - (2.0 * drift).reshape(3, 1, 1).to(picture)
            logger.info("colour guard: means moved by %s", [f"{-float(value):+.3f}" for value in drift])


def _means(picture: Tensor) -> Tensor:
    """The mean of each channel (3,) of (..., 3, H, W) on the CPU, values outside [0, 1] clipped."""
    return picture.clamp(0.0, 1.0).movedim(-3, 0).flatten(1).mean(dim=1).cpu()


# ------------------------------------------------------------------------------------------------------------- words


def _write_infotext(p: Any, run: Run | None) -> None:
    """Our keys and the facts of this job; hosts write some of the hires keys late, so this runs more than once."""
    if run is None or run.recipe is None:
        return
    recipe, params = run.recipe, p.extra_generation_params
    params.update(infotext.write(run.controls, recipe))
    for key in list(params):
        if key.startswith("Hires ") and key not in _HIRES_PROMPTS:
            params[key] = None
    params["Denoising strength"] = None
    # These win over what the host writes from `p`, also when it asks again after the job is tidied.
    if run.button:
        params["Size"] = f"{p.hr_upscale_to_x or recipe.width}x{p.hr_upscale_to_y or recipe.height}"
        return
    params["Size"] = f"{recipe.width}x{recipe.height}"
    params["Steps"] = recipe.low_steps
    if "sampler_name" in run.originals:
        params["Sampler"] = p.sampler_name


def _forget(p: Any) -> None:
    """Take out what an earlier job with the same dict of metadata left (all cells of a plot share one)."""
    params = p.extra_generation_params
    if params and infotext.KEY in params:
        ours = (infotext.KEY, "Size", "Steps", "Sampler", "Denoising strength")
        for key in list(params):
            if key in ours or key.startswith((infotext.PREFIX, "Hires ")):
                del params[key]


def _take_times(run: Run) -> None:
    marks = {**run.marks, "end": time.perf_counter()}
    names = [name for name in ("start", "enlarge", "refine", "end") if name in marks]
    for name, following in pairwise(names):
        run.seconds[name] = run.seconds.get(name, 0.0) + marks[following] - marks[name]


def _report(p: Any, run: Run, host: HostApi) -> None:
    """Under the image and into the log: where the seconds went, and what the upscaler has to say."""
    recipe = run.recipe
    if recipe is None:
        return

    def spent(name: str) -> str:
        return f" ({run.seconds[name]:.1f} s)" if name in run.seconds else ""

    low = f"{recipe.low_width}x{recipe.low_height}"
    first = low if run.button else f"{low} x{recipe.low_steps}{spent('start')}"
    if run.stopped_early:
        _say(p, f"MrFlow: stopped in the first pass; the picture is the low-resolution one, {low}.")
    else:
        final = f"{recipe.width}x{recipe.height}"
        sentence = (
            f"MrFlow: {first} -> {recipe.upscaler}{spent('enlarge')} -> {final} x{recipe.refine_steps} at sigma "
            f"{recipe.sigma:.4g}{spent('refine')}"
        )
        _say(p, sentence)
        logger.info("%s", sentence)
    for entry in host.upscalers():
        take = getattr(getattr(entry, "scaler", None), "take_sentences", None)
        if entry.name == recipe.upscaler and callable(take):
            for said in take():  # pyright: ignore[reportUnknownVariableType, reportGeneralTypeIssues]
                _say(p, str(said))  # pyright: ignore[reportUnknownArgumentType]


def _say(p: Any, sentence: str) -> None:
    """Show `sentence` under the image; hosts keep equal ones once."""
    comment = getattr(p, "comment", None)
    if callable(comment):
        comment(sentence)
    elif isinstance(getattr(p, "comments", None), dict):
        p.comments[sentence] = 1


# ------------------------------------------------------------------------------------------------------------- refusing


def _refuse(p: Any, run: Run, host: HostApi, sentence: str) -> None:
    """Put everything back as if MrFlow were off; the options too, which the host has set by now."""
    for key, (before, option) in run.settings.items():
        host.opts.data[key] = option if before is _ABSENT else before
    _tidy(p, run)
    _refused(p, host, sentence)


def _refused(p: Any, host: HostApi, sentence: str) -> None:
    _say(p, sentence)
    logger.warning("%s", sentence)
    if when_refused(host.opts) == "stop":
        host.state.interrupt()


def _guarded(work: Callable[..., None], p: Any, *args: Any) -> None:
    """Run a step before sampling; if it fails the image is made without MrFlow. The last of `args` is the host."""
    try:
        work(p, *args)
    except Exception as error:
        logger.exception("MrFlow failed")
        sentence = f"MrFlow failed ({type(error).__name__}: {first_line(error)}); the image is made without it."
        run = _own(p)
        if run is None:
            _refused(p, args[-1], sentence)
        else:
            _refuse(p, run, args[-1], sentence)


# -------------------------------------------------------------------------------------------------------- putting back


def _own(p: Any) -> Run | None:
    """The run of `p` itself, not that of the job it was copied from."""
    run = getattr(p, ATTRIBUTE, None)
    return run if isinstance(run, Run) and run.owner is p else None


def _remember(run: Run, p: Any, name: str) -> None:
    run.originals.setdefault(name, own_attributes(p).get(name, _ABSENT))


def _change(run: Run, p: Any, name: str, value: Any) -> None:
    _remember(run, p, name)
    setattr(p, name, value)


def _change_known(run: Run, p: Any, name: str, value: Any) -> None:
    if hasattr(p, name):
        _change(run, p, name, value)


def _override(run: Run, p: Any, host: HostApi, key: str, value: Any) -> None:
    """Let the host set option `key` for this job; it restores the option itself."""
    if key not in host.opts.data:
        return
    if "override_settings" not in run.originals:
        _change(run, p, "override_settings", dict(p.override_settings or {}))
    run.settings[key] = p.override_settings.get(key, _ABSENT), host.opts.data[key]
    p.override_settings[key] = value


def _put_back(run: Run, p: Any, name: str) -> None:
    """Restore one attribute, if it was changed."""
    if name not in run.originals:
        return
    value = run.originals.pop(name)
    now = own_attributes(p).get(name, _ABSENT)
    if isinstance(now, _Method) or name not in _METHODS:
        if value is not _ABSENT:
            setattr(p, name, value)
        elif now is not _ABSENT:
            delattr(p, name)


def _put_settings_back(p: Any, run: Run) -> None:
    original = run.originals.pop("override_settings", _ABSENT)
    if original is _ABSENT:
        return
    settings = dict(p.override_settings)
    for key, (before, _) in run.settings.items():
        settings.pop(key, None)
        if before is not _ABSENT:
            settings[key] = before
    if original is not None:
        original.clear()
        original.update(settings)
    p.override_settings = original


def _release_sampler(run: Run) -> None:
    kept = run.originals.pop("sampler.func", None)
    if kept is not None:
        sampler, func = kept
        sampler.func = func


def _tidy(p: Any, run: Run) -> None:
    """Leave nothing of ours on `p` or its sampler; the metadata's keys stay for the images still to be saved."""
    _release_sampler(run)
    _put_settings_back(p, run)
    for name in list(run.originals):
        _put_back(run, p, name)
    own_attributes(p).pop(ATTRIBUTE, None)


def _leave(p: Any, run: Any) -> None:
    """Before a job with other controls: undo what an earlier arming left on `p`, or on the job it is a copy of."""
    if isinstance(run, Run):
        _tidy(p, run if run.owner is p else replace(run, originals=dict(run.originals)))
        if run.owner is not p:
            p.extra_generation_params = dict(p.extra_generation_params)
    _forget(p)


_METHODS = ("calculate_target_resolution", "sample", "sample_hr_pass", "calculate_hr_conds")
