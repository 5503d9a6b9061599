"""What stands in the host's place while a job runs: some methods of the job object, and a sampler's function.

Each method is `work(p, run, call, *args)`, where `call` is the host's own; see `job.install`. All are gone when the job
is done, also after an exception.
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

__all__ = ["hr_conds", "prepare_first_pass", "prepare_refine", "sample", "sample_hr_pass", "target_resolution"]

logger = logging.getLogger("mrflow")

DRIFT = 3 / 255, 0.15
"""The colour guard acts on a shift of a channel's mean between these (of a range of 1): below nobody sees it, and
above it is no cast but another picture."""

# "[a:b:10]" and "[a|b]" change with the step; the passes have different steps.
_EDITED_PROMPT = re.compile(r"\[[^\]]*[:|]")


def target_resolution(p: Any, run: Run, call: Callable[..., Any]) -> Any:
    """The host's final size, made exactly ours: hosts round it, or shrink the first pass in an old mode."""
    size = p.width, p.height
    result = call()
    recipe = run.recipe
    if recipe is not None:
        p.width, p.height = size
        p.hr_upscale_to_x, p.hr_upscale_to_y = recipe.width, recipe.height
        p.truncate_x = p.truncate_y = 0
    return result


def sample(p: Any, run: Run, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Both passes of a batch; after an exception no other hook comes, so the job is tidied here."""
    try:
        return call(*args, **kwargs)
    except BaseException:
        tidy(p, run)
        raise


def sample_hr_pass(
    p: Any, run: Run, call: Callable[..., Any], samples: Any, decoded: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Enlarging, encoding and the hires pass, with an encoder that depends on the seeds alone."""
    run.marks.setdefault("enlarge", time.perf_counter())
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


# ------------------------------------------------------------------------------------------------------------- colours


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


# ------------------------------------------------------------------------------------------------------------ samplers


def prepare_first_pass(p: Any, run: Run, recipe: Recipe) -> None:
    """See that the first pass runs on usable levels with the solver that was chosen."""
    sampler, model = getattr(p, "sampler", None), run.model
    if sampler is None or model is None or getattr(sampler.func, "mrflow", False):
        return
    if model.flow and recipe.first_sigmas is None and hasattr(sampler, "get_sigmas"):
        levels = [float(level) for level in sampler.get_sigmas(p, p.steps)]
        if not _usable(levels):
            schedule = getattr(p, "scheduler", None) or "Automatic"
            say(p, f"The schedule {schedule} does not suit {model.title}; MrFlow's own is used.")
            answer(run, p, recipe.first_list)
    solver = recipe.solver if hasattr(sampler, "get_sigmas") else None
    if solver is None and model.flow and "sigmas" not in inspect.signature(sampler.func).parameters:
        say(p, f"The sampler {p.sampler_name} chooses noise levels by itself; Euler is used.")
        solver = "euler"
    if solver is not None:
        run.originals.setdefault("sampler.func", (sampler, sampler.func))
        sampler.func = _host_solver(solver)


def prepare_refine(p: Any, run: Run) -> None:
    """Measure what the network takes in the refine pass."""
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
