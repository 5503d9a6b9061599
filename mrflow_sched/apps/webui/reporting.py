"""What a job reports: metadata while it runs, sentences under the image, to API clients and on the console."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from mrflow_sched.apps.webui import infotext
from mrflow_sched.apps.webui.expected import LEAST, learn, steps_beside, times_as_long
from mrflow_sched.apps.webui.host import HostApi
from mrflow_sched.apps.webui.job import Run, say
from mrflow_sched.apps.webui.recipe import Recipe

__all__ = ["attach_console", "forget", "report", "take_times", "write_infotext"]

logger = logging.getLogger("mrflow")

# Host keys that say hires fix would switch it on when the metadata is pasted; its prompts do not.
_HIRES_PROMPTS = ("Hires prompt", "Hires negative prompt")


def attach_console() -> None:
    """Let our log reach the console, once: some hosts leave the root logger at errors only."""
    if any(isinstance(handler, _Console) for handler in logger.handlers):
        return
    handler = _Console(sys.stderr)
    handler.setFormatter(logging.Formatter("MrFlow: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Console(logging.StreamHandler[Any]):
    """Our handler, known again after a reload of the page's scripts."""


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
    if run.button:
        _write_enlarged(p, run, recipe)
        return
    params.update(infotext.write(run.controls, recipe))
    if run.drafts:
        # As the run that goes on at once wrote it, whatever preset "automatic" stands for today.
        params[infotext.KEY] = run.drafts[0].params[infotext.KEY]
    for key in list(params):
        if key.startswith("Hires ") and key not in _HIRES_PROMPTS:
            params[key] = None
    for key, name, shown in (
        ("Hires prompt", "all_hr_prompts", "all_prompts"),
        ("Hires negative prompt", "all_hr_negative_prompts", "all_negative_prompts"),
    ):
        if callable(params.get(key)):
            params[key] = _HiresText(name, shown)
    params["Denoising strength"] = None
    # These win over what the host writes from `p`, also when it asks again after the job is tidied.
    params["Size"] = f"{recipe.width}x{recipe.height}"
    params["Steps"] = recipe.low_steps
    if "sampler_name" in run.originals:
        params["Sampler"] = run.sampler


@dataclass(frozen=True)
class _HiresText:
    """An image's own text of the refine pass, where it differs; hosts' own writers look at the batch's first images.

    Attributes:
        name: The job's list of such texts.
        shown: The job's list of texts of the first pass.
    """

    name: str
    shown: str

    def __call__(self, p: Any, index: int, **others: Any) -> str | None:
        at = index if index >= p.batch_size else index + getattr(p, "iteration", 0) * p.batch_size
        texts: list[Any] = getattr(p, self.name) or []
        shown: list[Any] = getattr(p, self.shown) or []
        return str(texts[at]) if at < min(len(texts), len(shown)) and texts[at] != shown[at] else None


def _write_enlarged(p: Any, run: Run, recipe: Recipe) -> None:
    """Write the metadata of an image that the upscale button enlarged: those of the image before, and what was done.

    Pasted, they make the image that was enlarged.
    """
    params, before = p.extra_generation_params, run.source
    for key in list(params):
        if key.startswith("Hires ") and key not in _HIRES_PROMPTS:
            params[key] = None
    params["Denoising strength"] = None
    params["Size"] = f"{recipe.low_width}x{recipe.low_height}"
    params.update(before)
    done = replace(recipe, width=p.hr_upscale_to_x or recipe.width, height=p.hr_upscale_to_y or recipe.height)
    params[infotext.ENLARGED] = infotext.enlarged(run.controls, done, before.get(infotext.ENLARGED))


def forget(p: Any) -> None:
    """Remove what an earlier job left in the same dict of metadata (all cells of a plot share one).

    Args:
        p: The job that is about to start.
    """
    params = p.extra_generation_params
    if params and any(key == infotext.KEY or key.startswith(infotext.PREFIX) for key in params):
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
    first = f"{low} x{recipe.low_steps}{spent('start')}"
    if run.controls.draft and not run.stopped:
        _say(p, f"MrFlow: draft {first}; finished, it is {recipe.width}x{recipe.height}.")
        return
    if run.button or (run.drafts and run.drafts[0].image is not None):
        first = low
    if run.stopped == "first":
        say(p, f"MrFlow: stopped in the first pass; the image is the low-resolution one, {low}.")
    elif run.stopped:
        say(p, "MrFlow: stopped in the refine pass; the image is not refined to its end.")
    else:
        final = f"{recipe.width}x{recipe.height}"
        upscaler = "Lanczos" if recipe.upscaler == "None" else recipe.upscaler
        sentence = (
            f"MrFlow: {first} -> {upscaler}{spent('upscale')} -> {final} x{recipe.refine_steps} at sigma "
            f"{recipe.sigma:.4g}{spent('refine')}{_ratio(p, run)}"
        )
        _say(p, sentence)
    for entry in host.upscalers():
        take = getattr(getattr(entry, "scaler", None), "take_sentences", None)
        if entry.name == recipe.upscaler and callable(take):
            for said in take():  # pyright: ignore[reportUnknownVariableType, reportGeneralTypeIssues]
                say(p, str(said))  # pyright: ignore[reportUnknownArgumentType]


def _say(p: Any, sentence: str) -> None:
    say(p, sentence)
    logger.info("%s", sentence.removeprefix("MrFlow: "))


def _ratio(p: Any, run: Run) -> str:
    """Compare the job with the user's own number of steps at the final size, where its seconds allow that."""
    recipe, model, controls = run.recipe, run.model, run.controls
    refine = {"same": p.cfg_scale, "off": 1.0, "value": controls.refine_cfg_value}[controls.refine_cfg]
    if recipe is None or model is None or run.button or run.drafts or refine != p.cfg_scale:
        return ""
    learn(recipe, model, run.seconds, p.batch_size * (getattr(p, "iteration", 0) + 1), p.cfg_scale)
    steps = steps_beside(model, run.originals.get("steps", p.steps))
    ratio = times_as_long(recipe, model, run.seconds, steps)
    if ratio is None or ratio < LEAST:
        return ""
    return f"; {steps} steps at this size would take about {ratio:.1f} times as long"
