"""The life of one job on a host: arm -> fit -> each pass -> tidy. One function per hook; the script only delegates.

All state is kept on the job object `p`, in `p._mrflow` (a `Run`); nothing is kept on the script, in a module, on the
host or on its samplers. The host samples: hires fix is switched on, and our schedules reach the host through
`p.sampler_noise_scheduler_override`, which it calls in both passes.

Hooks are called twice, on shallow copies of `p`, and out of order by other extensions. A `Run` knows its `owner`: a
copy of an armed job gets a run of its own, and only the owner's tidies up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched.apps.webui.axes import overrides
from mrflow_sched.apps.webui.controls import Controls
from mrflow_sched.apps.webui.host import HostApi, capabilities, own_attributes, probe_model
from mrflow_sched.apps.webui.job import (
    ABSENT,
    ATTRIBUTE,
    METHODS,
    Run,
    answer,
    change,
    change_known,
    current,
    install,
    override,
    own,
    put_back,
    remember,
    say,
    tidy,
)
from mrflow_sched.apps.webui.recipe import Recipe, make_recipe
from mrflow_sched.apps.webui.replacements import (
    hr_conds,
    prepare_first_pass,
    prepare_refine,
    sample,
    sample_hr_pass,
    target_resolution,
)
from mrflow_sched.apps.webui.reporting import forget, report, take_times, write_infotext
from mrflow_sched.apps.webui.settings import when_refused

__all__ = [
    "before_hr",
    "before_process",
    "before_process_batch",
    "post_sample",
    "postprocess",
    "process",
    "process_batch",
    "process_before_every_sampling",
]

logger = logging.getLogger("mrflow")

_SAME_MODULES = ["Use same choices"]
_NO_REFINER = (None, "", "None", "none")


# -------------------------------------------------------------------------------------------------------------- arming


def before_process(p: Any, args: Sequence[Any], host: HostApi) -> None:
    """Switch the host's hires fix on for a job that wants MrFlow. Sizes are set later: the model may not be loaded yet.

    Args:
        p: The job.
        args: The script's arguments; see `Controls.from_args`.
        host: The WebUI.
    """
    if not hasattr(p, "enable_hr"):
        return
    run = getattr(p, ATTRIBUTE, None)
    try:
        controls = _controls(p, args)
    except Exception as error:
        _leave(p, run)
        if not _off(args):
            refusal = isinstance(error, MrFlowError)
            _refused(p, host, f"MrFlow is off for this job: {error}" if refusal else _fault(error))
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
    """Return whether arguments that cannot be read at least say that MrFlow is off."""
    first: Any = args[0] if args else False
    return first is False or (isinstance(first, dict) and cast("dict[Any, Any]", first).get("enabled") is False)


def _controls(p: Any, args: Sequence[Any]) -> Controls:
    """Read the script's arguments; what a plot set for this job replaces them."""
    controls, cell = Controls.from_args(args), overrides(p)
    return replace(controls, **cell) if cell else controls


def _arm(p: Any, controls: Controls, host: HostApi) -> None:
    run = Run(p, controls, (p.width, p.height), bool(getattr(p, "txt2img_upscale", False)))
    setattr(p, ATTRIBUTE, run)
    for name in ("hr_prompt", "hr_negative_prompt", "all_hr_prompts", "all_hr_negative_prompts"):
        if not p.enable_hr:
            remember(run, p, name)
    change(run, p, "enable_hr", True)
    override(run, p, host, "img2img_extra_noise", 0)
    if controls.save_stages and not run.button:
        override(run, p, host, "save_images_before_highres_fix", True)


def _adopt(p: Any, run: Run, host: HostApi) -> None:
    """Give `p`, a copy of an armed job, a run of its own, with the methods bound to it."""
    own = replace(run, owner=p, originals=dict(run.originals), settings=dict(run.settings), marks={}, seconds={})
    setattr(p, ATTRIBUTE, own)
    for name in METHODS:
        if getattr(own_attributes(p).get(name), "mrflow", False):
            setattr(p, name, own_attributes(p)[name].rebound(p, own))


def _leave(p: Any, run: Any) -> None:
    """Undo, before a job with other controls, what was set on `p` earlier, or on the job it is a copy of."""
    if isinstance(run, Run):
        tidy(p, run if run.owner is p else replace(run, originals=dict(run.originals)))
        if run.owner is not p:
            p.extra_generation_params = dict(p.extra_generation_params)
    forget(p)


# ------------------------------------------------------------------------------------------------------------- fitting


def process(p: Any, host: HostApi) -> None:
    """Decide all numbers, now that the model is loaded, and set them on the job; or refuse and put everything back.

    Args:
        p: The job.
        host: The WebUI.
    """
    run = own(p)
    if run is not None and run.recipe is None:
        _guarded(_fit, p, run, host)


def _fit(p: Any, run: Run, host: HostApi) -> None:
    run.model = probe_model(p, host)
    wanted = _button_size(p, run) if run.button else run.wanted
    try:
        recipe = make_recipe(run.controls, run.model, *wanted, upscalers=host.upscalers())
    except MrFlowError as error:
        _refuse(p, run, host, str(error))
        return
    if run.button:
        recipe = replace(recipe, low_width=p.width, low_height=p.height)
    run.recipe = recipe
    if not run.button:
        if run.originals.get("enable_hr") is True:
            say(p, f"MrFlow replaces Hires. fix; the final size is {recipe.width}x{recipe.height}.")
        for sentence in recipe.notes:
            say(p, sentence)
    if not capabilities(p).has_every_sampling:
        logger.info("This WebUI has no hook before sampling: the refine noise is drawn from the image's own seed.")
        if recipe.solver is not None:
            say(p, "This WebUI has no hook before sampling, so stage 1 uses the WebUI's sampler.")
    logger.info("%s", recipe.line)
    if not run.button:
        _fit_first_pass(p, run, recipe, host)
    _fit_refine_pass(p, run, recipe)


def _button_size(p: Any, run: Run) -> tuple[int, int]:
    """Return about the size that the host will give to an image from the gallery's upscale button."""
    if getattr(p, "hr_resize_x", 0) or getattr(p, "hr_resize_y", 0):
        width, height = p.hr_resize_x, p.hr_resize_y
        return width or height * p.width // p.height, height or width * p.height // p.width
    if p.hr_scale <= 1:
        change(run, p, "hr_scale", run.controls.factor)
    return int(p.width * p.hr_scale), int(p.height * p.hr_scale)


def _fit_first_pass(p: Any, run: Run, recipe: Recipe, host: HostApi) -> None:
    model = run.model
    # Hosts may have rounded the size since; the job is left with the one that was asked for.
    run.originals.update(width=run.wanted[0], height=run.wanted[1])
    change(run, p, "width", recipe.low_width)
    change(run, p, "height", recipe.low_height)
    change(run, p, "steps", recipe.low_steps)
    change(run, p, "hr_scale", recipe.width / recipe.low_width)
    change(run, p, "hr_resize_x", recipe.width)
    change(run, p, "hr_resize_y", recipe.height)
    if hasattr(p, "calculate_target_resolution"):
        install(run, p, "calculate_target_resolution", target_resolution)
    if model is not None and model.flow and p.sampler_name in host.timestep_samplers():
        say(p, f"The sampler {p.sampler_name} cannot follow a flow model's sigmas; Euler is used.")
        change(run, p, "sampler_name", "Euler")


def _fit_refine_pass(p: Any, run: Run, recipe: Recipe) -> None:
    change(run, p, "hr_second_pass_steps", recipe.refine_steps)
    change(run, p, "denoising_strength", 1.0)
    change(run, p, "hr_upscaler", recipe.upscaler)
    change(run, p, "hr_checkpoint_name", None)
    change(run, p, "hr_sampler_name", "Euler")
    change_known(run, p, "hr_scheduler", None)
    change_known(run, p, "hr_additional_modules", list(_SAME_MODULES))
    if hasattr(p, "hr_cfg"):
        change(run, p, "hr_cfg", _refine_cfg(p, run.controls))
    if hasattr(p, "distilled_cfg_scale"):
        change_known(run, p, "hr_distilled_cfg", p.distilled_cfg_scale)
    remember(run, p, "sampler_noise_scheduler_override")
    install(run, p, "sample", sample)
    install(run, p, "sample_hr_pass", sample_hr_pass)
    if hasattr(p, "calculate_hr_conds"):
        install(run, p, "calculate_hr_conds", hr_conds)


def _refine_cfg(p: Any, controls: Controls) -> float:
    return {"same": p.cfg_scale, "off": 1.0, "value": controls.refine_cfg_value}[controls.refine_cfg]


# -------------------------------------------------------------------------------------------------------------- passes


def before_process_batch(p: Any, host: HostApi) -> None:
    """Set the plan's schedule for the first pass of the coming batch, whatever the batch before left.

    Args:
        p: The job.
        host: The WebUI.
    """
    run = current(p)
    if run is None or run.recipe is None:
        return
    run.marks = {"start": time.perf_counter()}
    answer(run, p, None if run.recipe.first_sigmas is None else run.recipe.first_list)


def process_batch(p: Any, host: HostApi) -> None:
    """Write our keys into the metadata, before the host writes params.txt, and remove those of hires fix.

    Args:
        p: The job.
        host: The WebUI.
    """
    write_infotext(p, current(p))


def process_before_every_sampling(p: Any, host: HostApi, x: Tensor, noise: Tensor) -> None:
    """Set the solver of the first pass, or the refine noise of the hires pass. Called twice, it changes nothing more.

    Args:
        p: The job.
        host: The WebUI.
        x: The latents (B, C, ..., h, w) that sampling starts from; not used.
        noise: The noise of the same shape that the host will add; in the hires pass it is overwritten in place.
    """
    run = current(p)
    if run is None or run.recipe is None:
        return
    if not p.is_hr_pass:
        prepare_first_pass(p, run, run.recipe)
        return
    prepare_refine(p, run)
    if run.controls.refine_seed != "host":
        seeds, subseeds = ([int(seed) + 1 for seed in seeds] for seeds in (p.seeds, p.subseeds))
        noise.copy_(host.make_noise(p, noise.shape[1:], seeds, subseeds))


def before_hr(p: Any, host: HostApi) -> None:
    """Set the schedule of the hires pass: from exactly the recipe's sigma to 0.

    Args:
        p: The job.
        host: The WebUI.
    """
    run = current(p)
    if run is None or run.recipe is None:
        return
    run.marks["refine"] = time.perf_counter()
    p.denoising_strength = 1.0
    p.hr_second_pass_steps = run.recipe.refine_steps
    answer(run, p, run.recipe.refine_list)
    if not hasattr(p, "hr_cfg"):
        change(run, p, "cfg_scale", _refine_cfg(p, run.controls))
    write_infotext(p, run)


def post_sample(p: Any, host: HostApi) -> None:
    """Take the times after both passes of a batch, and put back what was set for this batch only.

    Args:
        p: The job.
        host: The WebUI.
    """
    run = current(p)
    if run is None:
        return
    take_times(run)
    put_back(run, p, "cfg_scale")
    put_back(run, p, "sampler_noise_scheduler_override")
    write_infotext(p, run)
    if "refine" not in run.marks and getattr(host.state, "interrupted", False):
        run.stopped_early = True
    if getattr(p, "iteration", 0) >= p.n_iter - 1 or run.stopped_early:
        report(p, run, host)


def postprocess(p: Any, host: HostApi, processed: Any) -> None:
    """Report the final size of a finished job, and put the job object back.

    Args:
        p: The job.
        host: The WebUI.
        processed: What the host returns for the job; its width and height become the final ones.
    """
    run = own(p)
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
    tidy(p, run)
    # The metadata made after this (a plot's grid) still looks its prompts up there.
    for name, value in kept.items():
        setattr(p, name, value)


# ------------------------------------------------------------------------------------------------------------ refusing


def _refuse(p: Any, run: Run, host: HostApi, sentence: str) -> None:
    """Put everything back as if MrFlow were off, also the options, which the host has set by now."""
    for key, (before, option) in run.settings.items():
        host.opts.data[key] = option if before is ABSENT else before
    tidy(p, run)
    _refused(p, host, sentence)


def _refused(p: Any, host: HostApi, sentence: str) -> None:
    say(p, sentence)
    logger.warning("%s", sentence)
    if when_refused(host.opts) == "stop":
        host.state.interrupt()


def _fault(error: Exception) -> str:
    """Log an error that is no refusal, and return the sentence for the user."""
    logger.error("MrFlow failed", exc_info=error)
    return f"MrFlow failed ({type(error).__name__}: {first_line(error)}); the image is made without it."


def _guarded(work: Callable[..., None], p: Any, *args: Any) -> None:
    """Run a step before sampling; if it fails, the image is made without MrFlow. The last of `args` is the host."""
    try:
        work(p, *args)
    except Exception as error:
        sentence = _fault(error)
        run = own(p)
        if run is None:
            _refused(p, args[-1], sentence)
        else:
            _refuse(p, run, args[-1], sentence)
