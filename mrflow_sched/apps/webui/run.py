"""The life of one job on a host: arm -> fit -> each pass -> lend -> tidy. One function per hook; the script delegates.

All state is kept on the job object `p`, in `p._mrflow` (a `Run`); nothing is kept on the script, in a module, on the
host or on its samplers. The host samples: hires fix is switched on, and our schedules reach the host through
`p.sampler_noise_scheduler_override`, which it calls in both passes. A draft is the first pass alone, without hires fix;
a job that finishes drafts gives them to the host in place of its first pass. From the end of a batch's sampling to the
next batch the job is lent to those who work on finished images (detailers), with the user's own size and steps.

Hooks are called twice, on shallow copies of `p`, and out of order by other extensions. A `Run` knows its `owner`: a
copy of an armed job gets a run of its own, and only the owner's tidies up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from PIL import Image
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.webui import infotext
from mrflow_sched.apps.webui.axes import overrides
from mrflow_sched.apps.webui.controls import FIELDS, Controls
from mrflow_sched.apps.webui.drafts import Draft, asked_drafts, mark, set_job
from mrflow_sched.apps.webui.hires import hires_note, hires_target
from mrflow_sched.apps.webui.host import HostApi, capabilities, own_attributes, probe_model, refiner_refusal
from mrflow_sched.apps.webui.job import (
    ATTRIBUTE,
    METHODS,
    Run,
    answer,
    change,
    change_known,
    current,
    install,
    lend,
    override,
    own,
    put_back,
    release_sampler,
    remember,
    say,
    take_back,
    tidy,
)
from mrflow_sched.apps.webui.recipe import Recipe, make_recipe
from mrflow_sched.apps.webui.refusing import guarded, reason, refuse, refuse_run
from mrflow_sched.apps.webui.replacements import (
    hr_conds,
    nest_noise,
    prepare_first_pass,
    prepare_refine,
    sample,
    sample_hr_pass,
    target_resolution,
)
from mrflow_sched.apps.webui.reporting import forget, report, take_times, write_infotext
from mrflow_sched.images.parameters import PARAMETERS, read_parameters

__all__ = [
    "before_hr",
    "before_process",
    "before_process_batch",
    "post_sample",
    "postprocess",
    "postprocess_batch",
    "postprocess_image",
    "process",
    "process_batch",
    "process_before_every_sampling",
]

logger = logging.getLogger("mrflow")

REPORT = "MrFlow report"
"""Where the host's facts of a job hold what was said under the image. It is not in the metadata of files."""

_SAME_MODULES = ["Use same choices"]


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
        drafts = () if isinstance(run, Run) and run.drafts else asked_drafts(p, args)
    except Exception as error:
        _leave(p, run)
        refuse(p, host, reason(error, stop=True), stop=True)
        return
    try:
        controls = drafts[0].controls if drafts else _controls(p, args)
    except Exception as error:
        _leave(p, run)
        if not _off(args):
            told = isinstance(error, MrFlowError)
            refuse(p, host, f"MrFlow is off for this job: {error}" if told else reason(error))
        return
    if run is not None and (run.drafts or (controls == run.controls and not drafts)):
        if run.owner is not p:
            _adopt(p, run, host)
        return
    _leave(p, run)
    if not controls.enabled:
        return
    if drafts:
        guarded(_arm_finish, p, drafts, host)
        return
    refusal = refiner_refusal(getattr(p, "refiner_checkpoint", None))
    if refusal is not None:
        refuse(p, host, refusal)
        return
    guarded(_arm, p, controls, host)


def _off(args: Sequence[Any]) -> bool:
    """Return whether arguments that cannot be read at least say that MrFlow is off."""
    first: Any = args[0] if args else False
    return first is False or (isinstance(first, dict) and cast("dict[Any, Any]", first).get("enabled") is False)


def _controls(p: Any, args: Sequence[Any]) -> Controls:
    """Read the script's arguments; what a plot set for this job replaces them."""
    listed = bool(args) and not isinstance(args[0], Mapping)
    controls, cell = Controls.from_args(args[: len(FIELDS)] if listed else args), overrides(p)
    return replace(controls, **cell) if cell else controls


def _arm(p: Any, controls: Controls, host: HostApi) -> None:
    run = Run(p, controls, (p.width, p.height), bool(getattr(p, "txt2img_upscale", False)))
    if controls.draft and run.button:
        run.controls = replace(controls, draft=False)
    setattr(p, ATTRIBUTE, run)
    _remember_job(p, run)
    if run.controls.draft:
        change(run, p, "enable_hr", False)
        # ADetailer's own mark for jobs that it leaves alone: a draft is not repainted.
        change(run, p, "_ad_disabled", True)
        # A draft is finished from its pixels and its metadata, so both are kept whole.
        override(run, p, host, "samples_format", "png")
        override(run, p, host, "enable_pnginfo", True)
        return
    if run.button:
        run.source = _source(p)
    change(run, p, "enable_hr", True)
    override(run, p, host, "img2img_extra_noise", 0)
    if controls.save_stages and not run.button:
        override(run, p, host, "save_images_before_highres_fix", True)


def _source(p: Any) -> dict[str, str]:
    """Return what the metadata of the image under the button says of how that image was made."""
    text = str(getattr(getattr(p, "firstpass_image", None), "info", {}).get(PARAMETERS, ""))
    found = infotext.joined(read_parameters(text).values, ("Steps", "Sampler", "Size"))
    if found.get(infotext.KEY, "").startswith("refused"):
        del found[infotext.KEY]
    return found


def _arm_finish(p: Any, drafts: tuple[Draft, ...], host: HostApi) -> None:
    run = Run(p, drafts[0].controls, drafts[0].size, drafts=drafts)
    setattr(p, ATTRIBUTE, run)
    if (getattr(p, "script_args", None) or [0])[0] not in (0, "0", None, "", "None"):
        raise MrFlowError("Drafts cannot be finished by a script such as X/Y/Z plot; set Script to None.")
    _remember_job(p, run)
    set_job(run, p, host)
    p.extra_generation_params.pop("Original Size", None)
    change(run, p, "enable_hr", True)
    override(run, p, host, "img2img_extra_noise", 0)


def _remember_job(p: Any, run: Run) -> None:
    """Keep what hosts change before our next hook: they round the size, and fill in the prompts of the hires pass."""
    for name in ("width", "height"):
        remember(run, p, name)
    for name in ("hr_prompt", "hr_negative_prompt", "all_hr_prompts", "all_hr_negative_prompts"):
        if not p.enable_hr:
            remember(run, p, name)


def _adopt(p: Any, run: Run, host: HostApi) -> None:
    """Give `p`, a copy of an armed job, a run of its own, with the methods bound to it."""
    fresh: dict[str, Any] = {"marks": {}, "seconds": {}, "lent": {}, "pixels": [], "said": []}
    own = replace(run, owner=p, originals=dict(run.originals), settings=dict(run.settings), **fresh)
    setattr(p, ATTRIBUTE, own)
    for name, value in run.lent.items():
        setattr(p, name, value)
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
        guarded(_fit, p, run, host)


def _fit(p: Any, run: Run, host: HostApi) -> None:
    run.model = probe_model(p, host)
    able = capabilities(p).has_every_sampling
    if run.controls.keep_composition and not able and not (run.drafts and run.drafts[0].image is not None):
        run.controls = replace(run.controls, keep_composition=False)
        say(p, "This WebUI has no hook before sampling, so the composition is not kept.")
    controls = run.drafts[0].pinned if run.drafts else run.controls
    controls = replace(controls, keep_composition=run.controls.keep_composition)
    try:
        recipe = make_recipe(controls, run.model, *_final_size(p, run), upscalers=host.upscalers())
        _check_drafts(p, run, recipe)
    except MrFlowError as error:
        refuse_run(p, run, host, str(error))
        return
    if run.button:
        width, height = getattr(getattr(p, "firstpass_image", None), "size", (p.width, p.height))
        recipe = replace(recipe, low_width=width, low_height=height)
    run.recipe = recipe
    if not run.button:
        if run.originals.get("enable_hr") is True and not run.drafts:
            say(p, hires_note(recipe.width, recipe.height))
        for sentence in recipe.notes:
            say(p, sentence)
    if not able:
        logger.info("This WebUI has no hook before sampling: the refine noise is drawn from the image's own seed.")
        if recipe.solver is not None:
            say(p, "This WebUI has no hook before sampling, so stage 1 uses the WebUI's sampler.")
    logger.info("%s", recipe.line)
    if not run.button:
        _fit_first_pass(p, run, recipe, host)
    run.sampler = p.sampler_name
    if len(run.drafts) > 1:
        # The host filled them in from lists; its own scripts and others expect texts.
        for name in ("hr_prompt", "hr_negative_prompt"):
            if isinstance(getattr(p, name, None), list):
                change(run, p, name, getattr(p, name)[0])
    if run.controls.draft:
        install(run, p, "sample", sample)
        for name, key in (("hr_prompt", "Hires prompt"), ("hr_negative_prompt", "Hires negative prompt")):
            if getattr(p, name, ""):
                p.extra_generation_params[key] = host.with_styles(getattr(p, name), p.styles)
    else:
        _fit_refine_pass(p, run, recipe)


def _check_drafts(p: Any, run: Run, recipe: Recipe) -> None:
    """Refuse drafts that the loaded model would have made at another size; say what else would not be equal."""
    for draft in run.drafts:
        low = recipe.low_width, recipe.low_height
        if draft.image is not None and draft.image.size != low:
            raise MrFlowError(
                f"The draft is {draft.image.width}x{draft.image.height}, and its metadata with the loaded model make "
                f"{low[0]}x{low[1]}; load the draft's checkpoint, or give the file as it was saved."
            )
        if draft.changed:
            say(p, "The draft's pixels were changed after it was made: what is finished is near it, not equal.")


def _final_size(p: Any, run: Run) -> tuple[int, int]:
    """Return the wanted size: the target of Hires. fix where that is on, and for the gallery's upscale button."""
    if run.button:
        if p.hr_scale <= 1 and not (p.hr_resize_x or p.hr_resize_y):
            change(run, p, "hr_scale", run.controls.factor)
        return hires_target(own_attributes(p), type(p))
    if run.drafts or run.originals.get("enable_hr") is not True:
        return run.wanted
    # Hosts may have rounded the size since.
    return hires_target({**own_attributes(p), "width": run.wanted[0], "height": run.wanted[1]}, type(p))


def _fit_first_pass(p: Any, run: Run, recipe: Recipe, host: HostApi) -> None:
    model = run.model
    change(run, p, "width", recipe.low_width)
    change(run, p, "height", recipe.low_height)
    change(run, p, "steps", recipe.low_steps)
    if not run.controls.draft:
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
    """Make the job ours again for the coming batch: sizes, the schedule of its first pass, the draft that it finishes.

    Args:
        p: The job.
        host: The WebUI.
    """
    run = current(p)
    if run is None or run.recipe is None:
        return
    if run.lent:
        take_back(run, p)
        # The host made its generator with the size that was lent; nothing was drawn from it yet.
        shape, side = p.rng.shape, host.pixels_per_latent()
        p.rng.shape = (*shape[:-2], p.height // side, p.width // side)
    if run.drafts:
        p.firstpass_image = run.drafts[min(getattr(p, "iteration", 0), len(run.drafts) - 1)].image
    p.extra_generation_params.pop(infotext.STOPPED, None)
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
    """Set the solver and the noise of the first pass, or the noise of the hires pass. Twice changes nothing more.

    Args:
        p: The job.
        host: The WebUI.
        x: The latents (B, C, ..., h, w) that sampling starts from; not used.
        noise: The noise of the same shape that the host will add; where ours is wanted, it is overwritten in place.
    """
    run = current(p)
    if run is None or run.recipe is None:
        return
    if not p.is_hr_pass:
        prepare_first_pass(p, run, run.recipe)
        if run.controls.keep_composition:
            nest_noise(p, run, run.recipe, host, noise)
        return
    prepare_refine(p, run)
    if run.controls.refine_seed != "host":
        seeds, subseeds = ([(int(seed) + 1) % 2**64 for seed in seeds] for seeds in (p.seeds, p.subseeds))
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
        run.first_cfg = p.cfg_scale
        change(run, p, "cfg_scale", _refine_cfg(p, run.controls))
    write_infotext(p, run)


def post_sample(p: Any, host: HostApi) -> None:
    """Take the times after both passes of a batch, put back what was set for it only, and lend the job to others.

    What the user stopped is noted in the metadata; the job is reported after its last batch.

    Args:
        p: The job.
        host: The WebUI.
    """
    run = current(p)
    if run is None:
        return
    take_times(run)
    release_sampler(run)
    put_back(run, p, "sampler_noise_scheduler_override")
    if run.first_cfg is not None:
        p.cfg_scale, run.first_cfg = run.first_cfg, None
    write_infotext(p, run)
    interrupted = bool(getattr(host.state, "interrupted", False))
    if interrupted or getattr(host.state, "skipped", False):
        run.stopped = "first" if "refine" not in run.marks else "refine"
        p.extra_generation_params[infotext.STOPPED] = f"{run.stopped} pass"
    if getattr(p, "iteration", 0) >= p.n_iter - 1 or interrupted:
        report(p, run, host)
    lend(run, p)


def postprocess_batch(p: Any, images: Tensor) -> None:
    """Keep the pixels of a batch of drafts, before anything else works on them.

    Args:
        p: The job.
        images: (B, 3, h, w), or 4 channels with transparency, in [0, 1], as the host is about to save them.
    """
    run = current(p)
    if run is not None and run.controls.draft:
        levels = images.float().clamp(0.0, 1.0).movedim(-3, -1).cpu().numpy() * 255.0
        run.pixels = list(levels.astype(np.uint8))  # cut off, as hosts do, also before they upscale


def postprocess_image(p: Any, finished: Any) -> None:
    """Put a draft's own pixels into its file, with their mark in the metadata.

    Args:
        p: The job.
        finished: The host's record of one image, as `image`.
    """
    run = current(p)
    at = getattr(p, "batch_index", 0)
    if run is None or run.stopped or at >= len(run.pixels):  # what was stopped is no draft
        return
    finished.image = Image.fromarray(run.pixels[at])
    p.extra_generation_params[infotext.DRAFT] = _Mark(mark(run.pixels[at]))


class _Mark(str):
    """A draft's mark: of images, but not of the grid of them. Hosts before 1.9 take it as text."""

    __slots__ = ()

    def __call__(self, *, use_main_prompt: bool = False, **others: Any) -> str | None:
        return None if use_main_prompt else str(self)


def postprocess(p: Any, host: HostApi, processed: Any) -> None:
    """Add what was said under the image to the facts of a finished job, and put the job object back.

    Args:
        p: The job.
        host: The WebUI.
        processed: What the host returns for the job; API clients get its facts.
    """
    run = own(p)
    if run is None:
        return
    facts = getattr(processed, "extra_generation_params", None)
    if run.said and isinstance(facts, dict):
        # A new dict: the host's is in the metadata of the next cell of a plot.
        processed.extra_generation_params = {**cast("dict[str, Any]", facts), REPORT: " ".join(run.said)}
    kept = {name: getattr(p, name) for name in ("all_hr_prompts", "all_hr_negative_prompts") if hasattr(p, name)}
    tidy(p, run)
    # The metadata made after this (a plot's grid) still looks its prompts up there.
    for name, value in kept.items():
        setattr(p, name, value)
