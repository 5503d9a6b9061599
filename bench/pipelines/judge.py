"""One pipeline, run by `MrFlow` and judged against its own loop."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor

from bench import tiny
from bench.pipelines.heard import Heard, by_itself, cheap_network, copied, stages
from bench.pipelines.levels import flow_levels, is_plain_euler, walking
from mrflow_sched import MrFlow
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.layouts import find_layout
from mrflow_sched.engines.diffusers.layouts.base import parameter_defaults, parameter_names
from mrflow_sched.engines.diffusers.layouts.pictures import picture_arguments
from mrflow_sched.sampling.noise import model_sigmas

PICTURE, TIMES, REFINE = 1e-5, 1e-5, 1e-3
"""Largest differences: of pictures in [0, 1], of times in parts of their range, of times that schedulers round."""

PROMPT, NEGATIVE, SEED = "a red star over green hills", "rain", 3


@dataclass(frozen=True)
class Row:
    """What was found about one pipeline class.

    Attributes:
        kind: Name of the class.
        outcome: "works", "experimental", "refused", "differs" (it ran, and a number is too large), "fails" (an error
            that is no refusal) or "not built".
        sentence: The refusal, the error, what differs, or why it was not built.
        family: Name of the family.
        layout: Name of the layout's class.
        sampler: "own" where stage 1 was compared with the pipeline's own sampler, "Euler" where with diffusers' Euler
            scheduler on the plan's noise levels.
        picture: Largest difference of the stage-1 picture, in [0, 1]; NaN where there is none to compare.
        times: Largest difference of the times that the network was told in stage 1, in parts of their range.
        refine: Difference of the time told in the refine stage from the plan's sigma in the pipeline's own convention,
            likewise.
        whole: The final picture is finite and not flat.
    """

    kind: str
    outcome: str
    sentence: str = ""
    family: str = ""
    layout: str = ""
    sampler: str = ""
    picture: float = numpy.nan
    times: float = numpy.nan
    refine: float = numpy.nan
    whole: bool = False

    @property
    def ran(self) -> bool:
        """Whether it drew what the pipeline draws."""
        return self.outcome in ("works", "experimental")


def check(pipe: Any, *, preset: str | None = None, size: tuple[int, int] | None = None, **options: Any) -> Row:
    """Run `MrFlow` on a pipeline and judge the run against the pipeline itself.

    Args:
        pipe: A name of `bench.tiny.NAMES`, or a pipeline.
        preset: Of the plan; None: the family's default.
        size: Width and height of the final picture; None: six by four cells of the family's grid, of at least 32 px.
        **options: Further arguments of `MrFlow`'s call, in place of what is passed otherwise.

    Returns:
        The row; it is judged by `PICTURE`, `TIMES` and `REFINE`.
    """
    pipe = tiny.make(pipe) if isinstance(pipe, str) else pipe
    row = Row(type(pipe).__name__, "fails")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            flow = MrFlow(pipe)
            layout = find_layout(pipe)
            row = replace(row, family=flow.family.name, layout=type(layout).__name__)
            return _judged(row, flow, layout, preset, size, options)
    except MrFlowError as error:
        return replace(row, outcome="refused", sentence=str(error))
    except Exception as error:  # whatever a pipeline raises is what the row is about
        return replace(row, sentence=_place(error))


def _judged(
    row: Row, flow: Any, layout: Any, preset: str | None, size: tuple[int, int] | None, options: Mapping[str, Any]
) -> Row:
    pipe, family = flow.pipe, flow.family
    cell = max(family.grid, 32)
    width, height = size or (6 * cell, 4 * cell)
    texts: dict[str, Any] = {"prompt": PROMPT} | (
        {"negative_prompt": NEGATIVE} if "negative_prompt" in layout.call_names else {}
    )
    texts |= {"use_pe": False} if "use_pe" in layout.call_names else {}  # a language model that would draw other words
    word, scale = guidance_of(pipe) if family.guidance_kind != "none" else ("guidance_scale", None)
    asked: dict[str, Any] = {**texts, "guidance_scale": scale, **pictures_of(pipe, width, height), **options}
    with stages(pipe) as ours:
        made = flow(
            **asked,
            width=width,
            height=height,
            preset=preset,
            solver="euler",
            renoise=0,  # LCM's own noise comes from another generator: the network's calls are what is compared
            seed=SEED,
            keep_stages=True,
            output_type="pt",
        )
    first, last, plan = ours[0], ours[-1], made.plan
    if scale is None:  # distilled: off, in the pipeline's own words
        scale = first.arguments.get(word)
    sampler, told, picture = _native(pipe, layout, first, plan, {**texts, word: scale})
    mine = made.stages[0].image
    row = replace(
        row,
        sampler=sampler,
        picture=_largest(picture, mine),
        times=_times(told.told, first.told),
        refine=_refined(pipe, layout, last, plan, {**texts, word: scale}),
        whole=bool(torch.isfinite(made.images).all()) and float(made.images.std()) > 1e-3,
    )
    wrong = [
        f"{name} differs by {value:.2g}"
        for name, value, most in (
            ("stage 1", row.picture, PICTURE),
            ("a time of stage 1", row.times, TIMES),
            ("the time of the refine stage", row.refine, REFINE if sampler == "Euler" else TIMES),
        )
        if not value <= most
    ]
    wrong += [] if row.whole else ["the picture is flat or not finite"]
    if wrong:
        return replace(row, outcome="differs", sentence="; ".join(wrong))
    return replace(row, outcome="experimental" if flow.experimental else "works")


# -------------------------------------------------------------------------------------------------- how it is asked


def guidance_of(pipe: Any) -> tuple[str, float | None]:
    """The argument of a pipeline's call that sets CFG or embedded guidance, and its default there.

    Args:
        pipe: The pipeline.

    Returns:
        The name and the scale; None where the call has no such number.
    """
    said = parameter_defaults(pipe.__call__)
    numbers = {
        name: float(said[name])
        for name in ("guidance_scale", "true_cfg_scale")
        if isinstance(said.get(name), (int, float))
    }
    if numbers.get("guidance_scale", 0.0) <= 1.0 and numbers.get("true_cfg_scale", 0.0) > 1.0:
        return "true_cfg_scale", numbers["true_cfg_scale"]
    return "guidance_scale", numbers.get("guidance_scale")


def pictures_of(pipe: Any, width: int, height: int) -> dict[str, Any]:
    """The pictures without which a pipeline is not called, or not what it is for: hint, references, what is inpainted.

    Args:
        pipe: The pipeline.
        width: Of the final picture.
        height: Likewise.

    Returns:
        Arguments of `MrFlow`'s call.
    """
    takes = picture_arguments(pipe)
    made: dict[str, Any] = {}
    if takes.inpaints:
        mask = torch.zeros(1, 1, height, width)
        mask[:, :, height // 4 : height // 2, width // 4 : width // 2] = 1.0
        made = {"inpaint_image": _noise_picture(width, height, 6), "mask_image": mask}
    if takes.reference and ("Edit" in type(pipe).__name__ or "Kontext" in type(pipe).__name__):
        made["reference_image"] = _noise_picture(width, height, 7)
    hinted = "control_image" in parameter_names(pipe.__call__) and takes.picture != "control_image"
    if hinted or (not made and any(getattr(pipe, name, None) is not None for name in ("controlnet", "adapter"))):
        made["control_image"] = _noise_picture(width, height, 5)
    return made


def _noise_picture(width: int, height: int, seed: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


_AS_OURS = (
    *("use_resolution_binning", "max_area", "_auto_resize", "num_frames", "intermediate_timesteps"),
    *("image", "images", "input_images", "image_reference", "control_image", "mask_image", "control_mask", "strength"),
    *("control_mode", "generator", "guidance_schedule"),
)
"""Arguments that the pipeline itself is given as stage 1 gave them; all others are its own defaults."""


def _native(
    pipe: Any, layout: Any, first: Heard, plan: Any, asked: Mapping[str, Any]
) -> tuple[str, Heard, Tensor | None]:
    """The pipeline's own picture at the size of stage 1, from the noise that stage 1 was given."""
    stage = plan.stages[0]
    own = copy.copy(pipe)
    object.__setattr__(own, "scheduler", copy.deepcopy(pipe.scheduler))
    plain = is_plain_euler(pipe.scheduler)
    if own.scheduler.config.get("final_sigmas_type") == "sigma_min" and plain:
        # Cosmos-Predict2 throws away what its last call says; ours takes it, so let the pipeline take it too.
        own.scheduler.register_to_config(final_sigmas_type="zero")
    if not plain:
        levels = model_sigmas(stage.sigmas, layout.family.prediction, layout.family.shift.largest_ve)
        object.__setattr__(own, "scheduler", walking(pipe.scheduler, levels))
    _set_sizes(own, layout, (stage.width, stage.height), stage.guidance)
    names = parameter_names(pipe.__call__)
    arguments: dict[str, Any] = {name: value for name, value in asked.items() if name in names and value is not None}
    if layout.text_length is not None:  # what the model's card says, where that is not the call's default
        arguments["max_sequence_length"] = layout.text_length
    arguments |= {name: first.arguments[name] for name in _AS_OURS if name in first.arguments}
    arguments |= _sized(names, (stage.width, stage.height)) | {"num_inference_steps": len(stage.sigmas) - 1}
    given = first.arguments.get("latents")
    unit = float(getattr(own.scheduler, "init_noise_sigma", 1.0))
    arguments |= {} if given is None else {"latents": given / unit}
    decoded = not _decodes_otherwise(pipe)
    start = None if given is not None or first.start is None else first.start / unit
    with by_itself(own) as heard, _starting_from(own, layout, start, (stage.width, stage.height)):
        made = own(**copied(arguments), output_type="pt" if decoded else "latent")
    picture = _drawn(made)
    if not decoded and picture is not None and first.start is not None:
        state = picture.reshape(layout.pack(first.start).shape)
        picture = layout.decode(layout.unpack(state, stage.width, stage.height))
    if picture is not None and picture.ndim == 5:
        picture = picture[:, 0]
    return "own" if plain else "Euler", heard, picture


def _decodes_otherwise(pipe: Any) -> bool:
    """Whether what a pipeline returns is not what its VAE makes of its latents.

    A safety checker rounds it to 8 bits, without a VAE it is what the network left, and SD3's inpainting leaves the
    VAE's shift out (diffusers 0.42).
    """
    checker, vae = (getattr(pipe, name, None) for name in ("safety_checker", "vae"))
    inpaints = type(pipe).__name__ == "StableDiffusion3InpaintPipeline"
    return hasattr(checker, "check_video_safety") or vae is None or inpaints


def _sized(names: frozenset[str], size: tuple[int, int]) -> dict[str, Any]:
    """Arguments of a call for a size; a guidance of its own in place of a default schedule of guidance."""
    sides = {"width": size[0], "height": size[1], "guidance_schedule": None}
    return {name: value for name, value in sides.items() if name in names}


def _set_sizes(pipe: Any, layout: Any, size: tuple[int, int], guidance: float) -> None:
    """What a pipeline must be told besides its call's arguments to draw at a size; its safety checker stays its own."""
    for name, value in layout.view_attributes(guidance, *size).items():
        if name != "safety_checker":
            object.__setattr__(pipe, name, value)


@contextlib.contextmanager
def _starting_from(pipe: Any, layout: Any, start: Tensor | None, size: tuple[int, int]) -> Iterator[None]:
    """Let a pipeline that is given no latents draw `start` where it draws noise, and modes where it draws pictures.

    References that it would enlarge to a megapixel get as many pixels as the picture of `size` has.
    """
    module: Any = sys.modules[type(pipe).__call__.__module__]
    posterior: Any = sys.modules["diffusers.models.autoencoders.vae"].DiagonalGaussianDistribution
    plain: Any = getattr(module, "randn_tensor", None)
    sample = posterior.sample

    def drawn(shape: Any, *values: Any, **named: Any) -> Tensor:
        if start is not None and math.prod(shape) == start.numel():
            state = layout.pack(start) if len(shape) == 3 else start
            return state.reshape(tuple(shape)).to(named.get("dtype") or torch.float32)
        return plain(shape, *values, **named)

    def mode_without_generator(self: Any, generator: Any = None) -> Tensor:
        return self.mode() if generator is None else sample(self, generator)

    dimensions: Any = getattr(module, "calculate_dimensions", None)
    posterior.sample = mode_without_generator
    if plain is not None:
        module.randn_tensor = drawn
    if dimensions is not None:
        fixed = (*size, None) if picture_arguments(pipe).inpaints else None
        module.calculate_dimensions = lambda area, ratio: fixed or dimensions(min(area, math.prod(size)), ratio)
    try:
        yield
    finally:
        posterior.sample = sample
        if plain is not None:
            module.randn_tensor = plain
        if dimensions is not None:
            module.calculate_dimensions = dimensions


def _drawn(made: Any) -> Tensor | None:
    """What a pipeline's call returned, (B, C, H, W) or of one frame more."""
    found = next((getattr(made, name) for name in ("images", "image", "frames") if hasattr(made, name)), None)
    if isinstance(found, numpy.ndarray):  # T2I-Adapter's pipelines make no tensors
        return torch.as_tensor(found).movedim(-1, 1)
    return None if found is None else torch.as_tensor(found)


def _largest(theirs: Tensor | None, ours: Tensor) -> float:
    if theirs is None or theirs.shape != ours.shape:
        return numpy.nan
    return float((theirs.float() - ours.float().to(theirs.device)).abs().max())


def _range(times: Mapping[int, float]) -> float:
    return 1000.0 if max(map(abs, times.values()), default=0.0) > 10 else 1.0


def _times(theirs: Mapping[int, float], ours: Mapping[int, float]) -> float:
    if not theirs or theirs.keys() != ours.keys():
        return numpy.nan
    return max(abs(theirs[step] - ours[step]) for step in theirs) / _range(theirs)


def _refined(pipe: Any, layout: Any, last: Heard, plan: Any, asked: Mapping[str, Any]) -> float:
    """How far the time told in the refine stage is from the plan's sigma as the pipeline itself would tell it."""
    stage = plan.stages[-1]
    levels, times = convention(pipe, layout, last, (stage.width, stage.height), asked)
    slope = (times[1] - times[0]) / (levels[1] - levels[0])  # below the lowest level, where a list is short
    at_none = times[0] - slope * levels[0]
    expected = [float(numpy.interp(sigma, [0.0, *levels], [at_none, *times])) for sigma in stage.sigmas[:-1]]
    ours = list(last.told.values())
    if len(ours) != len(expected):
        return numpy.nan
    return max(abs(one - other) for one, other in zip(ours, expected, strict=True)) / _range(dict(enumerate(times)))


_MANY = 200
"""Steps of the loop from which a convention is read: sigmas in use must lie between two of its levels."""


def convention(
    pipe: Any, layout: Any, like: Heard, size: tuple[int, int], asked: Mapping[str, Any]
) -> tuple[list[float], list[float]]:
    """Which time a pipeline tells its network at which noise level, from a run of its own loop on its own scheduler.

    Args:
        pipe: The pipeline.
        layout: Its layout, for the attributes without which it would choose a size of its own.
        like: A call of MrFlow's at that size, for the arguments without which the pipeline cannot be called.
        size: Width and height of the picture.
        asked: Text and guidance.

    Returns:
        Rising flow sigmas, and the time told at each.
    """
    own = copy.copy(pipe)
    object.__setattr__(own, "scheduler", copy.deepcopy(pipe.scheduler))
    _set_sizes(own, layout, size, 1.0)
    names = parameter_names(pipe.__call__)
    arguments: dict[str, Any] = {name: value for name, value in asked.items() if name in names and value is not None}
    arguments |= {name: like.arguments[name] for name in _AS_OURS if name in like.arguments}
    most = int(own.scheduler.config.get("original_inference_steps") or _MANY)
    arguments |= _sized(names, size) | {"num_inference_steps": most, "output_type": "latent"}
    if pipe.config.get("sample_sigmas"):  # a list of its own, whatever the step count, and too coarse to read
        arguments["sigmas"] = numpy.linspace(1.0, 1.0 / most, most)
    with by_itself(own) as heard, cheap_network(own), _starting_from(own, layout, None, size):
        own(**copied(arguments))
    found = dict(zip(flow_levels(own.scheduler), (heard.told.get(step) for step in range(most + 1)), strict=False))
    pairs = sorted((level, time) for level, time in found.items() if time is not None)
    return [level for level, _ in pairs], [time for _, time in pairs]


def _place(error: BaseException) -> str:
    """An error in a line, with where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = next((frame for frame in reversed(frames) if "mrflow_sched" in frame.filename), frames[-1])
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {said} ({ours.name} in {ours.filename.rsplit('/', 1)[-1]})"
