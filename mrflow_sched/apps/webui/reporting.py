"""What a job reports: metadata while it runs, sentences under the image and in the log."""

from __future__ import annotations

import logging
import time
from itertools import pairwise
from typing import Any

from mrflow_sched.apps.webui import infotext
from mrflow_sched.apps.webui.host import HostApi
from mrflow_sched.apps.webui.job import Run, say

__all__ = ["forget", "report", "take_times", "write_infotext"]

logger = logging.getLogger("mrflow")

# Host keys that say hires fix would switch it on when the metadata is pasted; its prompts do not.
_HIRES_PROMPTS = ("Hires prompt", "Hires negative prompt")


def write_infotext(p: Any, run: Run | None) -> None:
    """Write our keys and the facts of a job into its metadata, and remove those of hires fix.

    Hosts write some of the hires keys late, so this is called more than once.

    Args:
        p: The job.
        run: Its run; None, or one without a recipe, writes nothing.
    """
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


def forget(p: Any) -> None:
    """Remove what an earlier job left in the same dict of metadata (all cells of a plot share one).

    Args:
        p: The job that is about to start.
    """
    params = p.extra_generation_params
    if params and infotext.KEY in params:
        ours = (infotext.KEY, "Size", "Steps", "Sampler", "Denoising strength")
        for key in list(params):
            if key in ours or key.startswith((infotext.PREFIX, "Hires ")):
                del params[key]


def take_times(run: Run) -> None:
    """Add the seconds that each part of this batch took to those of the batches before.

    Args:
        run: The job's run; its `marks` say when "start", "upscale" and "refine" began.
    """
    marks = {**run.marks, "end": time.perf_counter()}
    names = [name for name in ("start", "upscale", "refine", "end") if name in marks]
    for name, following in pairwise(names):
        run.seconds[name] = run.seconds.get(name, 0.0) + marks[following] - marks[name]


def report(p: Any, run: Run, host: HostApi) -> None:
    """Report under the image and in the log how long each part took, and what the upscaler has to say.

    Args:
        p: The job.
        run: Its run.
        host: The WebUI, among whose upscalers the one of the job is found.
    """
    recipe = run.recipe
    if recipe is None:
        return

    def spent(name: str) -> str:
        return f" ({run.seconds[name]:.1f} s)" if name in run.seconds else ""

    low = f"{recipe.low_width}x{recipe.low_height}"
    first = low if run.button else f"{low} x{recipe.low_steps}{spent('start')}"
    if run.stopped_early:
        say(p, f"MrFlow: stopped in the first pass; the image is the low-resolution one, {low}.")
    else:
        final = f"{recipe.width}x{recipe.height}"
        sentence = (
            f"MrFlow: {first} -> {recipe.upscaler}{spent('upscale')} -> {final} x{recipe.refine_steps} at sigma "
            f"{recipe.sigma:.4g}{spent('refine')}{_ratio(run)}"
        )
        say(p, sentence)
        logger.info("%s", sentence)
    for entry in host.upscalers():
        take = getattr(getattr(entry, "scaler", None), "take_sentences", None)
        if entry.name == recipe.upscaler and callable(take):
            for said in take():  # pyright: ignore[reportUnknownVariableType, reportGeneralTypeIssues]
                say(p, str(said))  # pyright: ignore[reportUnknownArgumentType]


def _ratio(run: Run) -> str:
    """Compare the job with the user's own number of steps at the final size, at the speed of the refine pass.

    For the other side only the network is counted. Empty where the refine steps had another guidance.
    """
    recipe, steps, network = run.recipe, run.originals.get("steps"), run.seconds.get("network", 0.0)
    if recipe is None or not isinstance(steps, int) or run.controls.refine_cfg != "same" or not network:
        return ""
    ours = sum(run.seconds.get(name, 0.0) for name in ("start", "upscale", "refine"))
    ratio = steps * network / recipe.refine_steps / ours
    return f"; {steps} steps at this size would take about {ratio:.1f} times as long"
