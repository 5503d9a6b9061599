"""A rehearsal: a flow pipeline of an unknown class is run on two small images, and watched.

Its own code runs, with its own text encoders, on a view that has stand-ins for the expensive parts: a network that
answers at once with random values, a VAE that notes what it is given to decode, and a scheduler that notes what it is
asked for and ends the loop at a state of random values. What is seen is how the loop arranges and scales latents, which
times the network is told at which sigma, which list of sigmas the pipeline asks for, and how it guides. Nothing is read
from the pipeline's source, and nothing of the pipeline is changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched._runtime.memory import is_memory_error
from mrflow_sched.engines.diffusers.layouts.arrangement import Map, find_map
from mrflow_sched.engines.diffusers.layouts.base import network_name, parameter_names
from mrflow_sched.engines.diffusers.quiet import short_lines
from mrflow_sched.engines.diffusers.view import (
    TOKENIZER_LOCK,
    argument_names,
    attributes_of,
    put_network,
    shell_of,
    view_of,
)
from mrflow_sched.sampling.network import first_of, tensor_of

__all__ = ["Guiding", "Rehearsal", "guidance_word", "patch_of", "rehearse"]

_SIZES = ((192, 128), (128, 256))
"""Small images whose sides every VAE factor and patch in use divides; they differ in their number of tokens."""
_LISTS = ((0.7, 0.3, 0.0), (0.8, 0.6, 0.3, 0.0))
"""Sigmas of the two runs, 0.3 in both."""
_SCALE = 3.0
_TIMES = ("timestep", "timesteps", "t", "sigma", "sigmas")


@dataclass(frozen=True)
class Guiding:
    """How a pipeline guides.

    Attributes:
        word: The argument of its call that holds the scale; "" where there is none.
        cfg: Whether a second branch of the network runs.
        weight: w in p + w (p - n) of the positive and negative branches, less the scale: -1 in most pipelines.
        off: The scale that turns the second branch off.
        positive_first: Whether the positive branch is the first half of a doubled batch.
        negative_call_first: Whether the negative branch is the first of two calls.
    """

    word: str = ""
    cfg: bool = False
    weight: float = -1.0
    off: float = 1.0
    positive_first: bool = False
    negative_call_first: bool = False


@dataclass(frozen=True)
class Rehearsal:
    """What was seen.

    Attributes:
        map: From the loop's state to what the VAE decodes.
        factor: Pixels per latent pixel along a side.
        frame: The VAE takes an axis of one video frame.
        asked: For each run, what the pipeline gave its scheduler's `set_timesteps`, by name.
        latents: For each run, (rows, columns) of the VAE's latents.
        steps: For each run, its steps.
        guiding: How it guides.
        takes_state: What its call takes as `latents` is the loop's state.
    """

    map: Map
    factor: int
    frame: bool
    asked: tuple[Mapping[str, Any], ...]
    latents: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    guiding: Guiding
    takes_state: bool


@dataclass
class _Run:
    """One run, as the stand-ins saw it."""

    width: int
    height: int
    sigmas: tuple[float, ...]
    asked: dict[str, Any] = field(default_factory=dict[str, Any])
    times: dict[float, float] = field(default_factory=dict[float, float])
    pending: list[Tensor] = field(default_factory=list[Tensor])
    answers: list[list[Tensor]] = field(default_factory=list[list[Tensor]])
    outputs: list[Tensor] = field(default_factory=list[Tensor])
    first: Tensor | None = None
    handed: Tensor | None = None
    moved: bool = False
    probe: Tensor | None = None
    latents: Tensor | None = None
    pixel: float | None = None


def rehearse(pipe: Any) -> Rehearsal:
    """Run a pipeline on two small images with stand-ins for its network and VAE, and note its conventions.

    Args:
        pipe: A loaded diffusers pipeline.

    Returns:
        What was seen.

    Raises:
        MrFlowError: It could not be run, or does what no stage can follow.
    """
    kind, names = type(pipe).__name__, parameter_names(pipe.__call__)
    word = guidance_word(pipe)
    one, two = ({word: scale} if word else {} for scale in (_SCALE, 1.0))
    runs = [_performed(pipe, 0, one)]
    first, factor = _map_of(kind, runs[0]), _factor(kind, runs[0])
    rows, columns = (side // factor for side in (_SIZES[1][1], _SIZES[1][0]))
    start = first.arrangement.pack(torch.randn(1, len(first.scale), rows, columns))
    given = None
    if "latents" in names:
        with contextlib.suppress(MrFlowError):
            given = _performed(pipe, 1, {**two, "latents": start.to(pipe._execution_device)})
    takes_state = given is not None and _begins_at(given, start)
    runs.append(given if given is not None and takes_state else _performed(pipe, 1, two))
    if not first.agrees(_map_of(kind, runs[1])) or _factor(kind, runs[1]) != factor:
        raise MrFlowError(f"pipe is {kind}, which scales its latents by the size of the image; no stage can follow it.")
    _check_times(kind, runs)
    _check_states(kind, runs)
    return Rehearsal(
        map=first,
        factor=factor,
        frame=cast("Tensor", runs[0].latents).ndim == 5,
        asked=tuple(run.asked for run in runs),
        latents=tuple((run.height // factor, run.width // factor) for run in runs),
        steps=tuple(len(run.sigmas) - 1 for run in runs),
        guiding=_guiding(runs, word),
        takes_state=takes_state,
    )


def patch_of(network: Any) -> int:
    """Latent pixels per token along a side, by a network's configuration.

    Args:
        network: A network of diffusers.

    Returns:
        1 where the configuration has none.
    """
    said: Any = getattr(network.config, "patch_size", None) or 1
    return int(cast("Sequence[int]", said)[-1]) if isinstance(said, (list, tuple)) else int(said)


def guidance_word(pipe: Any) -> str:
    """The argument of a pipeline's call that holds the scale: of two, that of CFG, unless the network reads the other.

    Args:
        pipe: The pipeline.

    Returns:
        Its name; "" where there is none.
    """
    names = parameter_names(pipe.__call__)
    words = [word for word in ("true_cfg_scale", "guidance_scale", "distilled_guidance_scale") if word in names]
    network = getattr(pipe, network_name(pipe))
    return words[-1 if getattr(network.config, "guidance_embeds", False) else 0] if words else ""


# ------------------------------------------------------------------------------------------------------------- the run


def _performed(pipe: Any, number: int, given: Mapping[str, Any]) -> _Run:
    """One of the two runs, with the pipeline's own network where it does not take a stand-in's answer."""
    run = _Run(*_SIZES[number], _LISTS[number])
    try:
        _perform(pipe, run, given, real=False)
    except MrFlowError as error:
        run = _Run(*_SIZES[number], _LISTS[number])
        try:
            _perform(pipe, run, given, real=True)
        except MrFlowError:
            raise error from error.__cause__
    return run


def _begins_at(run: _Run, start: Tensor) -> bool:
    seen = run.first
    return seen is not None and seen.shape == start.shape and torch.allclose(seen.float().cpu(), start, 1e-2, 1e-2)


def _perform(pipe: Any, run: _Run, given: Mapping[str, Any], *, real: bool) -> None:
    """Call a view of the pipeline with stand-ins; `run` holds what they saw."""
    view = view_of(pipe, scheduler=_listening(pipe.scheduler.config, run), vae=_noting(pipe.vae, run))
    name = network_name(pipe)
    network = getattr(pipe, name)
    put_network(view, name, shell_of(network, _answering(network, view.scheduler, run, real)))
    names = parameter_names(pipe.__call__)
    arguments: dict[str, Any] = {
        "prompt": "a photo",
        "negative_prompt": "a drawing",
        "width": run.width,
        "height": run.height,
        "num_inference_steps": len(run.sigmas) - 1,
        "max_area": run.width * run.height,
        "num_frames": 1,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt",
        "return_dict": False,
        "use_resolution_binning": False,
        **given,
    }
    try:
        with torch.no_grad(), short_lines(), TOKENIZER_LOCK:
            answer = view(**{name: value for name, value in arguments.items() if name in names})
    except Exception as error:  # the pipeline's own code may raise anything
        if isinstance(error, MrFlowError) or is_memory_error(error):
            raise
        said = f"{type(error).__name__}: {first_line(error)}"
        raise MrFlowError(
            f"pipe is {type(pipe).__name__}, a class that is not known, and trying it out failed ({said}); see whether "
            "it runs by itself."
        ) from error
    finally:
        view.maybe_free_model_hooks()
        if hasattr(pipe, "_all_hooks"):
            object.__setattr__(pipe, "_all_hooks", view._all_hooks)
    images: Any = first_of(answer)
    run.pixel = float(images.float().mean()) if isinstance(images, Tensor) else None


def _listening(config: Mapping[str, Any], run: _Run) -> Any:
    """A scheduler that walks the run's sigmas, and whose last step returns random values."""
    from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler

    class Listening(MrFlowScheduler):
        def set_timesteps(
            self,
            num_inference_steps: int | None = None,
            device: str | torch.device | None = None,
            sigmas: Sequence[float] | None = None,
            mu: float | None = None,
            timesteps: Sequence[float] | None = None,
            **others: Any,
        ) -> None:
            given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
            run.asked = {name: value for name, value in given.items() if value is not None}
            super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps, **others)

        def step(
            self,
            model_output: Tensor,
            timestep: float | Tensor,
            sample: Tensor,
            *,
            return_dict: bool = True,
            generator: torch.Generator | None = None,
            **ignored: Any,
        ) -> Any:
            run.first = sample.clone() if run.first is None else run.first
            if run.handed is not None:
                run.moved |= not torch.allclose(sample.float(), run.handed, 1e-2, 1e-2)
            run.outputs.append(model_output.float())
            run.answers.append(run.pending)
            run.pending = []
            answer = super().step(model_output, timestep, sample, return_dict=return_dict)
            if len(run.outputs) < len(run.sigmas) - 1:
                run.handed = (answer[0] if isinstance(answer, tuple) else answer.prev_sample).float().clone()
                return answer
            run.probe = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1)).to(sample.device)
            if isinstance(answer, tuple):
                return (run.probe, *answer[1:])
            answer.prev_sample = run.probe
            return answer

    return Listening.for_stage(config, run.sigmas, "euler")


def _answering(network: Any, scheduler: Any, run: _Run, real: bool) -> Callable[..., Any]:
    """A forward of the network's signature that answers with random values, or (`real`) as the network does."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    names = argument_names(type(network))  # pyright: ignore[reportUnknownArgumentType]
    draws = torch.Generator().manual_seed(2)

    def invented(inputs: Mapping[str, Any]) -> Any:
        given: Any = inputs[names[0]] if names[0] in inputs else next(iter(inputs.values()))
        each: list[Tensor] = [given] if isinstance(given, Tensor) else list(given)
        made = [torch.randn(_shape_of(network, x), generator=draws).to(x) for x in each]
        answer: Any = made[0] if isinstance(given, Tensor) else made
        return (answer,) if inputs.get("return_dict") is False else Transformer2DModelOutput(sample=answer)

    def forward(*values: Any, **named: Any) -> Any:
        inputs: dict[str, Any] = {**dict(zip(names, values, strict=False)), **named}
        answer = network(**inputs) if real else invented(inputs)
        run.pending.append(tensor_of(first_of(answer)).float())
        told = next((inputs[name] for name in _TIMES if inputs.get(name) is not None), None)
        if told is not None:
            run.times[scheduler.current_sigma] = float(torch.as_tensor(told, dtype=torch.float32).flatten()[0])
        return answer

    return forward


def _shape_of(network: Any, x: Tensor) -> tuple[int, ...]:
    """Shape of the network's answer to `x`, which may have more channels than are predicted."""
    config = network.config
    out, into = getattr(config, "out_channels", None), getattr(config, "in_channels", None)
    axis = 2 if x.ndim == 3 else 1
    if not out or not into or x.shape[axis] != into:
        return tuple(x.shape)
    shape = list(x.shape)
    shape[axis] = int(out) * (patch_of(network) ** 2 if x.ndim == 3 else 1)
    return tuple(shape)


def _noting(vae: Any, run: _Run) -> Any:
    """A VAE whose `decode` notes its latents, in float32, and returns one grey."""
    from diffusers.models.autoencoders.vae import DecoderOutput

    def decode(z: Tensor, *values: Any, return_dict: bool = True, **named: Any) -> Any:
        run.latents = z.float()
        frame = (1,) if z.ndim == 5 else ()
        channels = int(getattr(vae.config, "out_channels", None) or 3)
        grey = torch.full((len(z), channels, *frame, run.height, run.width), 0.5, device=z.device)
        return DecoderOutput(sample=grey) if return_dict else (grey,)

    kind = cast("type[Any]", type(vae))
    shell: Any = shell_of(vae, vae.forward)
    shell.__class__ = type(kind.__name__, (kind,), {"dtype": torch.float32})
    attributes_of(shell)["decode"] = decode
    return shell


# ---------------------------------------------------------------------------------------------------------- conclusions


def _map_of(kind: str, run: _Run) -> Map:
    if run.probe is None or run.latents is None:
        raise MrFlowError(f"pipe is {kind}, which does not decode its latents by its vae; no stage can follow that.")
    if run.pixel is not None and abs(run.pixel - 0.75) > 0.01:
        raise MrFlowError(f"pipe is {kind}, whose vae does not make images from -1 to 1; no stage can follow that.")
    latents = run.latents[:, :, 0] if run.latents.ndim == 5 else run.latents
    found = find_map(run.probe.float().cpu(), latents.cpu()) if latents.ndim == 4 else None
    if found is None:
        shapes = f"{tuple(run.probe.shape)} and {tuple(run.latents.shape)}"
        raise MrFlowError(
            f"pipe is {kind}, which turns its loop's latents into those of its vae ({shapes}) in a way that is not "
            "known; ask for it to be added."
        )
    return found


def _factor(kind: str, run: _Run) -> int:
    rows, columns = cast("Tensor", run.latents).shape[-2:]
    factor = run.height // rows
    if (rows * factor, columns * factor) != (run.height, run.width):
        raise MrFlowError(
            f"pipe is {kind}, which made latents of {columns}x{rows} for {run.width}x{run.height} pixels; stages need "
            "a pipeline that keeps to the size it is given."
        )
    return factor


def _check_times(kind: str, runs: Sequence[_Run]) -> None:
    """Refuse a pipeline that tells its network times which do not follow from its scheduler's sigmas alone."""
    told = [run.times for run in runs]
    both = {**told[0], **told[1]}
    if not both:
        return
    ordered = [both[sigma] for sigma in sorted(both)]
    rising, falling = (all(sign * a < sign * b for a, b in pairwise(ordered)) for sign in (1, -1))
    reach = max(ordered) - min(ordered)
    steady = all(abs(told[0][sigma] - told[1][sigma]) <= 1e-2 * reach for sigma in told[0].keys() & told[1].keys())
    if not (steady and (rising or falling)):
        raise MrFlowError(
            f"pipe is {kind}, whose network is told times that do not follow its scheduler's sigmas; no plan can "
            "follow that."
        )


def _check_states(kind: str, runs: Sequence[_Run]) -> None:
    """Refuse a pipeline that starts from other noise than of deviation 1, or changes its latents between steps."""
    start = cast("Tensor", runs[0].first).float()
    deviation = float(start.std())
    if abs(deviation - 1.0) > 0.1:
        raise MrFlowError(
            f"pipe is {kind}, whose loop starts from noise of deviation {deviation:.3g} instead of 1; no stage can "
            "follow that."
        )
    if any(run.moved for run in runs):
        raise MrFlowError(
            f"pipe is {kind}, which changes its latents between the steps of its scheduler; no stage can follow that."
        )


def _guiding(runs: Sequence[_Run], word: str) -> Guiding:
    rows = [sum(map(len, each)) for each in runs[0].answers]
    if not word or max(rows) == 1:
        return Guiding(word)
    off = 1.0 if all(sum(map(len, each)) == 1 for each in runs[1].answers) else 0.0
    for answers, output in zip(runs[0].answers, runs[0].outputs, strict=True):
        both = torch.cat(answers)
        if len(both) != 2:
            continue
        if both.numel() != 2 * output.numel() and both.ndim == output.ndim > 3:
            both = both[:, : output.shape[1]]  # the pipeline cuts variances off
        for positive_first in (False, True):
            positive, negative = both if positive_first else both.flip(0)
            for weight in (-1.0, 0.0):
                made = positive + (_SCALE + weight) * (positive - negative)
                if any(_mostly(sign * made.flatten(), output.flatten()) for sign in (1.0, -1.0)):
                    halves = len(answers) == 1
                    return Guiding(word, True, weight, off, positive_first and halves, not (positive_first or halves))
    return Guiding(word, True, -1.0, off)


def _mostly(made: Tensor, seen: Tensor) -> bool:
    """Whether most values agree: some pipelines leave a channel unguided."""
    return made.shape == seen.shape and float(torch.isclose(made, seen, 1e-2, 1e-2).float().mean()) > 0.6
