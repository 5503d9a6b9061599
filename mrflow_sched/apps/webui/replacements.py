"""What replaces the host's own while a job runs: some methods of the job object, and a sampler's function.

Each method is `work(p, run, call, *args)`, where `call` is the host's own; see `job.install`. All are removed when the
job is done, also after an exception.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from mrflow_sched.apps.webui.encode import steady_encoding
from mrflow_sched.apps.webui.job import Run, answer, release_sampler, say, tidy
from mrflow_sched.apps.webui.recipe import Recipe
from mrflow_sched.sampling.solvers import get_solver
from mrflow_sched.upscaling.colours import colour_shift

__all__ = ["hr_conds", "prepare_first_pass", "prepare_refine", "sample", "sample_hr_pass", "target_resolution"]

logger = logging.getLogger("mrflow")

# "[a:b:10]" and "[a|b]" change with the step; the passes have different steps.
_EDITED_PROMPT = re.compile(r"\[[^\]]*[:|]")


def target_resolution(p: Any, run: Run, call: Callable[..., Any]) -> Any:
    """Set the host's final size to exactly ours: hosts round it, or shrink the first pass in an old mode.

    Args:
        p: The job.
        run: Its run.
        call: The host's method.

    Returns:
        What the host's method returned.
    """
    size = p.width, p.height
    result = call()
    recipe = run.recipe
    if recipe is not None:
        p.width, p.height = size
        p.hr_upscale_to_x, p.hr_upscale_to_y = recipe.width, recipe.height
        p.truncate_x = p.truncate_y = 0
    return result


def sample(p: Any, run: Run, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Sample both passes of a batch. After an exception the host calls no other hook, so the job is tidied here.

    Args:
        p: The job.
        run: Its run.
        call: The host's method.
        *args: Passed on.
        **kwargs: Passed on.

    Returns:
        What the host's method returned.
    """
    try:
        return call(*args, **kwargs)
    except BaseException:
        tidy(p, run)
        raise


def sample_hr_pass(
    p: Any, run: Run, call: Callable[..., Any], samples: Any, decoded: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Upscale, encode and sample the hires pass, with an encoder that depends on the seeds alone.

    Args:
        p: The job.
        run: Its run.
        call: The host's method.
        samples: The host's latents of the first pass, passed on.
        decoded: The images of the first pass (B, ..., 3, h, w), with which the colour guard compares.
        *args: Passed on.
        **kwargs: Passed on.

    Returns:
        What the host's method returned; images in it have their colours corrected where the guard is on.
    """
    run.marks.setdefault("upscale", time.perf_counter())
    release_sampler(run)
    try:
        with steady_encoding(p.sd_model, p.seeds or []):
            result = call(samples, decoded, *args, **kwargs)
    finally:
        release_sampler(run)
    if run.controls.colour_guard == "auto" and isinstance(decoded, Tensor) and isinstance(result, list):
        _guard_colours(decoded, cast("list[Any]", result), unit_range=hasattr(p.sd_model, "is_wan"))
    return cast("Any", result)


def hr_conds(p: Any, run: Run, call: Callable[..., Any]) -> Any:
    """Set the text conditioning of the hires pass: that of the first pass where nothing differs, to encode text once.

    Args:
        p: The job.
        run: Its run.
        call: The host's method.

    Returns:
        What the host's method returned, or None.
    """
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


# ------------------------------------------------------------------------------------------------------------- colours


def _guard_colours(before: Tensor, after: list[Any], *, unit_range: bool) -> None:
    """Move the mean of each channel in the images `after` back to that of `before` where it drifted.

    Args:
        before: (B, ..., 3, h, w) in [-1, 1], or in [0, 1] on some hosts.
        after: Images (..., 3, H, W) in [-1, 1]; corrected ones are replaced in the list.
        unit_range: The host may give `before` in [0, 1]; values below 0 show that it did not.
    """
    low = before.float()
    if not unit_range or float(low.min()) < -0.01:
        low = (low + 1.0) / 2.0
    for i, image in enumerate(after[: low.shape[0]]):
        shift = colour_shift(low[i], (image.float() + 1.0) / 2.0)
        if bool(shift.any()):
            after[i] = image - (2.0 * shift).reshape(3, 1, 1).to(image)
            logger.info("colour guard: means moved by %s", [f"{-float(value):+.3f}" for value in shift])


# ------------------------------------------------------------------------------------------------------------ samplers


def prepare_first_pass(p: Any, run: Run, recipe: Recipe) -> None:
    """Make sure that the first pass runs on usable sigmas, with the solver that was chosen.

    Args:
        p: The job, whose sampler's function is replaced where a solver of ours runs.
        run: Its run.
        recipe: The run's recipe.
    """
    sampler, model = getattr(p, "sampler", None), run.model
    if sampler is None or model is None or getattr(sampler.func, "mrflow", False):
        return
    if model.flow and recipe.first_sigmas is None and hasattr(sampler, "get_sigmas"):
        sigmas = [float(sigma) for sigma in sampler.get_sigmas(p, p.steps)]
        if not _usable(sigmas):
            schedule = getattr(p, "scheduler", None) or "Automatic"
            say(p, f"The schedule {schedule} does not suit {model.title}; MrFlow's own is used.")
            answer(run, p, recipe.first_list)
    solver = recipe.solver if hasattr(sampler, "get_sigmas") else None
    if solver is None and model.flow and "sigmas" not in inspect.signature(sampler.func).parameters:
        say(p, f"The sampler {p.sampler_name} chooses its own sigmas; Euler is used.")
        solver = "euler"
    if solver is not None:
        run.originals.setdefault("sampler.func", (sampler, sampler.func))
        sampler.func = _host_solver(solver)


def prepare_refine(p: Any, run: Run) -> None:
    """Measure how long the network takes in the refine pass.

    Args:
        p: The job, whose sampler's function is wrapped.
        run: Its run, where the seconds are added under "network".
    """
    sampler = getattr(p, "sampler", None)
    if sampler is not None and not getattr(sampler.func, "mrflow", False):
        run.originals.setdefault("sampler.func", (sampler, sampler.func))
        sampler.func = _timed(sampler.func, run)


def _timed(func: Callable[..., Any], run: Run) -> Callable[..., Any]:
    @functools.wraps(func)  # hosts look at the signature
    def timed(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = func(model, x, *args, **kwargs)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        run.seconds["network"] = run.seconds.get("network", 0.0) + time.perf_counter() - begin
        return result

    timed.mrflow = True  # pyright: ignore[reportAttributeAccessIssue]
    return timed


def _usable(sigmas: Sequence[float]) -> bool:
    """Return whether a schedule is one of flow sigmas: finite, from 0 to 1, falling."""
    finite = all(math.isfinite(sigma) and -1e-6 <= sigma <= 1.0001 for sigma in sigmas)
    return finite and all(after < before for before, after in pairwise(sigmas))


def _host_solver(name: str) -> Callable[..., Tensor]:
    """Wrap our solver `name` as a host's sampling function, which also gets keywords that ours does not know."""
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
