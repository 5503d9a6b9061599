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
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from mrflow_sched._runtime.errors import first_line
from mrflow_sched.apps.webui import infotext
from mrflow_sched.apps.webui.encode import steady_encoding
from mrflow_sched.apps.webui.host import HostApi
from mrflow_sched.apps.webui.job import Run, answer, release_sampler, say, tidy
from mrflow_sched.apps.webui.recipe import Recipe
from mrflow_sched.sampling.shrink import shrink_noise
from mrflow_sched.sampling.solvers import get_solver
from mrflow_sched.upscaling.colours import colour_shift

__all__ = [
    "hr_conds",
    "nest_noise",
    "prepare_first_pass",
    "prepare_refine",
    "sample",
    "sample_hr_pass",
    "target_resolution",
]

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
        decoded: The images of the first pass (B, ..., C, h, w), with which the colour guard compares.
        *args: Passed on.
        **kwargs: Passed on.

    Returns:
        What the host's method returned; images in it have their colours corrected where the guard is on.
    """
    run.marks.setdefault("upscale", time.perf_counter())
    release_sampler(run)
    decoded = _untruncated(decoded, getattr(p, "firstpass_image", None))
    try:
        with steady_encoding(p.sd_model, p.seeds or []):
            result = call(samples, decoded, *args, **kwargs)
            run.end_part("decode", run.marks.get("sampled"))
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
    if p.hr_c is None and _same_text(p):
        p.hr_c = p.c
        p.hr_uc = None if getattr(p, "hr_cfg", None) == 1 else p.uc
        return None
    return call()


def _same_text(p: Any) -> bool:
    if p.c is None or bool(getattr(p.sd_model, "is_sdxl", False)):  # SDXL is conditioned on the size
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
        before: (B, ..., C, h, w) in [-1, 1], or in [0, 1] on some hosts: three colours, and whatever else follows
            them, such as opacity, is let be.
        after: Images (..., C, H, W) in [-1, 1]; corrected ones are replaced in the list.
        unit_range: The host may give `before` in [0, 1]; values below 0 show that it did not.
    """
    low = before[..., :3, :, :].float()
    if not unit_range or float(low.min()) < -0.01:
        low = (low + 1.0) / 2.0
    low = (low.clamp(0.0, 1.0) * 255.0).floor() / 255.0  # the 8 bits that were upscaled, which a draft has too
    for i, image in enumerate(after[: low.shape[0]]):
        colours = image[..., :3, :, :]
        shift = colour_shift(low[i], (colours.float() + 1.0) / 2.0)
        if bool(shift.any()):
            moved = colours - (2.0 * shift).reshape(3, 1, 1).to(image)
            after[i] = torch.cat([moved, image[..., 3:, :, :]], dim=-3)
            logger.info("colour guard: means moved by %s", [f"{-float(value):+.3f}" for value in shift])


def _untruncated(decoded: Any, image: Any) -> Any:
    """Return an image that the host took from a file so that its 8 bits come out of the next truncation unchanged.

    Hosts scale 8 bits to floats and cut them back to 8 bits before they upscale; on the way some values lose 1.

    Args:
        decoded: (1, ..., 3, h, w) in [-1, 1], or in [0, 1] on some hosts.
        image: The image; None where stage 1 made `decoded`.
    """
    if image is None or not isinstance(decoded, Tensor):
        return decoded
    levels = torch.as_tensor(np.array(image, np.float32)).movedim(-1, 0).reshape(decoded.shape)
    unit = (levels + 0.5) / 255.0
    signed = 2.0 * unit - 1.0
    nearer = (decoded.float() - unit).abs().mean() < (decoded.float() - signed).abs().mean()
    return (unit if bool(nearer) else signed).to(decoded)


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
    run.originals.setdefault("sampler.func", (sampler, sampler.func))
    sampler.func = _timed(sampler.func if solver is None else _host_solver(solver), run, "first")


def nest_noise(p: Any, run: Run, recipe: Recipe, host: HostApi, noise: Tensor) -> None:
    """Let the first pass start from what the host would make the final image of these seeds from, shrunk.

    Args:
        p: The job.
        run: Its run; where there is no such noise, its controls say so from then on.
        recipe: The run's recipe.
        host: The WebUI, which draws the noise.
        noise: The host's noise of the first pass (B, C, ..., h, w), overwritten in place.
    """
    side = host.pixels_per_latent()
    shape = *noise.shape[1:-2], recipe.height // side, recipe.width // side
    try:
        full = host.make_noise(p, shape, p.seeds, p.subseeds)
        small = shrink_noise(full.flatten(1, -3), noise.shape[-2], noise.shape[-1])
    except Exception as error:  # hosts go on after a failed hook, and the metadata would say what was not done
        logger.warning("failed", exc_info=error)
        run.controls = replace(run.controls, keep_composition=False)
        p.extra_generation_params.pop(infotext.NOISE, None)
        say(p, f"The composition is not kept, as the noise cannot be shrunk ({first_line(error)}).")
        return
    noise.copy_(small.reshape(noise.shape))


def prepare_refine(p: Any, run: Run) -> None:
    """Measure how long the network takes in the refine pass.

    Args:
        p: The job, whose sampler's function is wrapped.
        run: Its run, where the seconds are added.
    """
    sampler = getattr(p, "sampler", None)
    if sampler is not None and not getattr(sampler.func, "mrflow", False):
        run.originals.setdefault("sampler.func", (sampler, sampler.func))
        sampler.func = _timed(sampler.func, run, "network")


def _timed(func: Callable[..., Any], run: Run, part: Literal["first", "network"]) -> Callable[..., Any]:
    """Wrap a host's sampling function: its seconds are those of `part`, NaN where it does not come to its end."""

    @functools.wraps(func)  # hosts look at the signature
    def timed(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if part == "first":
            run.end_part("before", run.marks.get("start"))
        begin: float | None = time.perf_counter()
        try:
            result = func(model, x, *args, **kwargs)
            _settle(x.device)
        except BaseException:
            begin = None
            raise
        finally:
            run.end_part(part, begin)
        run.marks["sampled"] = time.perf_counter()
        return result

    timed.mrflow = True  # pyright: ignore[reportAttributeAccessIssue]
    return timed


def _settle(device: torch.device) -> None:
    """Wait until a device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type in ("mps", "xpu"):
        getattr(torch, device.type).synchronize()


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
