"""A stage's own copy of a pipeline."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.upscaling.lanczos import resize_lanczos

if TYPE_CHECKING:
    from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler

# A fast tokenizer keeps truncation and padding of the call at work in itself: two threads must not be in it at once.
TOKENIZER_LOCK = threading.RLock()

HINT = "control_image"
"""Name of the ControlNet hint: the one argument that is resized for every stage."""


# -------------------------------------------------------------------------------------------------------------- helpers


def view_of(pipe: Any, **parts: Any) -> Any:
    """A shallow copy of a pipeline with some attributes replaced: the same modules, attributes of its own.

    Set past the pipeline's own `__setattr__`, which would rewrite the configuration that `from_config` reads.

    Args:
        pipe: The pipeline; not changed.
        **parts: Attributes of the copy, by name.

    Returns:
        The copy, of the pipeline's class.
    """
    view = copy.copy(pipe)
    for name, part in parts.items():
        object.__setattr__(view, name, part)
    return view


def shell_of(network: torch.nn.Module, forward: Callable[..., Any]) -> torch.nn.Module:
    """A module that looks like `network` and whose call is `forward`.

    Args:
        network: Its attributes, parameters and submodules are shared; it is not changed.
        forward: Called with the shell's arguments.

    Returns:
        The shell: of the same class, without hooks of its own, and with the network's signature, by which loops of
        modular pipelines choose what they pass.
    """

    def called(*values: Any, **named: Any) -> Any:
        return forward(*values, **named)

    inner = cast("torch.nn.Module", getattr(network, "_orig_mod", network))  # inside torch.compile's wrapper
    cast("Any", called).__signature__ = _signature(type(inner))
    shell: torch.nn.Module = object.__new__(type(network))
    # Past `__setattr__`: torch.compile's wrapper hands what is set on it to the module inside.
    own, shared = attributes_of(shell), attributes_of(network)
    own.update(shared)
    own.update({name: OrderedDict[Any, Any]() for name in _HOOKS if name in shared})
    own.update(forward=called, _compiled_call_impl=None)
    return shell


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


def argument_names(kind: type) -> tuple[str, ...]:
    """Names of the arguments of a network's `forward`, as its class has it.

    Args:
        kind: The network's class.

    Returns:
        The names in order, without self.
    """
    return tuple(_signature(kind).parameters)


@functools.lru_cache(maxsize=64)
def _signature(kind: type) -> inspect.Signature:
    """The signature of a network's `forward`, as its class has it, without `self`."""
    forward = getattr(cast("Any", kind), "forward")  # noqa: B009  # pyright: ignore[reportUnknownVariableType]
    found = inspect.signature(forward)
    return found.replace(parameters=list(found.parameters.values())[1:])


def put_network(view: Any, name: str, network: torch.nn.Module) -> None:
    """Replace a view's network, or its VAE, until it frees offloaded modules; then its own is put back.

    Offloading hooks belong to the owner's module, and freeing installs them anew on the modules it finds.

    Args:
        view: What `view_of` returned.
        name: "transformer", "unet" or "vae".
        network: Run in its place.
    """
    own, free = getattr(view, name), view.maybe_free_model_hooks

    def free_own() -> None:
        object.__setattr__(view, name, own)
        free()

    object.__setattr__(view, name, network)
    object.__setattr__(view, "maybe_free_model_hooks", free_own)


def returning(prepare_latents: Callable[..., Any], state: Tensor) -> Callable[..., Any]:
    """A pipeline's `prepare_latents` that returns a given state in place of the noise that it draws.

    Args:
        prepare_latents: The bound method; it may return other values besides.
        state: In the shape in which the loop holds its latents.

    Returns:
        A function with the same signature, which raises MrFlowError where nothing of that shape is returned.
    """

    @functools.wraps(prepare_latents)
    def given(*values: Any, **named: Any) -> Any:
        made = prepare_latents(*values, **named)
        alone = isinstance(made, Tensor)
        many: list[Any] = [made] if alone else list(made)
        for number, each in enumerate(many):
            if isinstance(each, Tensor) and each.shape == state.shape:
                many[number] = state.to(each)
                return many[0] if alone else tuple(many)
        shapes = [tuple(each.shape) for each in many if isinstance(each, Tensor)]
        raise MrFlowError(
            f"prepare_latents returned {shapes}, where the loop starts from {tuple(state.shape)}; this pipeline cannot "
            "be run in stages."
        )

    return given


def draws_freely(pipe: Any) -> bool:
    """Whether a pipeline draws encoded images from the global random state.

    Args:
        pipe: A diffusers pipeline.

    Returns:
        True where its source samples a posterior without a generator.
    """
    return _draws_freely(pipe.__class__)


@functools.lru_cache(maxsize=32)
def _draws_freely(kind: Any) -> bool:
    modules = {base.__module__ for base in kind.__mro__ if base.__module__.startswith("diffusers.pipelines.")}
    return any("latent_dist.sample()" in inspect.getsource(sys.modules[name]) for name in sorted(modules))


def steady_vae(vae: Any) -> Any:
    """A VAE that encodes for a pipeline of another dtype, and does not draw from the global random state.

    Args:
        vae: Stays as it is.

    Returns:
        A copy around the same weights: it takes images of any dtype, answers in theirs, and answers the mode where no
        generator is given to draw with.
    """
    copied, encode = copy.copy(vae), vae.encode

    def encoded(images: Tensor, *values: Any, **named: Any) -> Any:
        made: Any = encode(images.to(vae.dtype), *values, **named)
        posterior: Any = getattr(made, "latent_dist", None)
        if posterior is None:
            return made
        draw, mode = posterior.sample, posterior.mode

        def sample(generator: Any = None) -> Tensor:
            return (mode() if generator is None else draw(generator)).to(images.dtype)

        posterior.sample, posterior.mode = sample, lambda: mode().to(images.dtype)
        return made

    attributes_of(copied)["encode"] = encoded
    return copied


class Mirror:
    """Shows on the owner's pipeline what a call sets on a view of it, for as long as calls of that pipeline last.

    Caching hooks (`current_timestep_callback=lambda: pipe.current_timestep`) and callbacks read the pipeline they were
    given. An interrupt is not mirrored: the owner's own flag is read (`interrupted`). Of calls in several threads the
    latest value is shown, and the last call to end restores what the first one found.
    """

    def __init__(self, owner: Any, view: Any) -> None:
        """Record how the view is before the call.

        Args:
            owner: The pipeline that its owner knows.
            view: The copy that is called.
        """
        self._owner, self._view = owner, view
        self._start = dict(attributes_of(view))
        self._shown: dict[str, Any] = {}
        self._lent: _Lent | None = None

    def show(self, instead: Mapping[str, Any] | None = None) -> None:
        """Set on the owner what the call has set on the view so far.

        Args:
            instead: Values to show in place of the view's, by attribute name.
        """
        with _LENT_LOCK:
            if self._lent is None:
                self._lent = _LENT.setdefault(id(self._owner), _Lent())
                self._lent.calls += 1
            for name, value in {**attributes_of(self._view), **(instead or {})}.items():
                if not name.startswith("_") or name in _OWN or value is self._start.get(name, _ABSENT):
                    continue
                if value is not self._shown.get(name, _ABSENT):
                    self._lent.found.setdefault(name, attributes_of(self._owner).get(name, _ABSENT))
                    self._shown[name] = self._lent.shown[name] = value
                    object.__setattr__(self._owner, name, value)

    def end(self) -> None:
        """Restore the owner's values once no call shows its own, unless somebody else has changed them since."""
        with _LENT_LOCK:
            lent, self._lent = self._lent, None
            if lent is None:
                return
            lent.calls -= 1
            if lent.calls:
                return
            del _LENT[id(self._owner)]
            for name, value in lent.found.items():
                if attributes_of(self._owner).get(name, _ABSENT) is not lent.shown[name]:
                    continue
                if value is _ABSENT:
                    object.__delattr__(self._owner, name)
                else:
                    object.__setattr__(self._owner, name, value)


@dataclass
class _Lent:
    """What the calls under way show on one pipeline: their number, what the first found, what was set last."""

    calls: int = 0
    found: dict[str, Any] = field(default_factory=dict[str, Any])
    shown: dict[str, Any] = field(default_factory=dict[str, Any])


_LENT: dict[int, _Lent] = {}
_LENT_LOCK = threading.Lock()
_ABSENT: Any = object()
_OWN = ("_interrupt", "_all_hooks", "_offload_device", "_progress_bar_config")


def with_tokenizer_lock(encode_prompt: Any) -> Any:
    """A pipeline's `encode_prompt` behind the lock of tokenizers, for pipelines that take their prompts as text.

    Args:
        encode_prompt: The bound method.

    Returns:
        A function with the same signature.
    """

    @functools.wraps(encode_prompt)
    def locked(*values: Any, **named: Any) -> Any:
        with TOKENIZER_LOCK:
            return encode_prompt(*values, **named)

    return locked


def attributes_of(thing: Any) -> dict[str, Any]:
    """The attributes of an object itself, without those of its class.

    Args:
        thing: The object.

    Returns:
        The live dict, as `vars` gives.
    """
    return thing.__dict__


def remembering(encode: Any, memory: dict[Any, Any]) -> Any:
    """A function that encodes text, run once for the same arguments.

    Args:
        encode: A method of a pipeline that only reads its arguments.
        memory: Holds what it returned, by its arguments; kept as long as it is to last.

    Returns:
        A function with the same signature.
    """

    @functools.wraps(encode)
    def remembered(*values: Any, **named: Any) -> Any:
        try:
            key = _key([values, sorted(named.items())])
        except TypeError:  # an argument that cannot be told from another one
            return encode(*values, **named)
        if key not in memory:
            memory[key] = encode(*values, **named)
        return memory[key]

    return remembered


def _key(value: Any) -> Any:
    """What tells an argument from another one. Raises TypeError for kinds that are not known."""
    if isinstance(value, (list, tuple)):
        return tuple(_key(each) for each in cast("Sequence[Any]", value))
    if isinstance(value, Tensor) and value.device.type != "meta":
        return value.dtype, tuple(value.shape), value.double().cpu().numpy().tobytes()
    if isinstance(value, torch.nn.Module):
        return id(value)  # the pipeline keeps it for as long as the run lasts
    if value is None or isinstance(value, (str, int, float, torch.device, torch.dtype)):
        return type(value), value
    raise TypeError(repr(value))


def interrupted(pipe: Any) -> bool:
    """Whether a pipeline was told to stop.

    Args:
        pipe: A diffusers pipeline, or a view of one.

    Returns:
        Its `_interrupt`; False where it has none.
    """
    return bool(getattr(pipe, "_interrupt", False))


def copy_containers(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with their lists and dicts copied, since pipelines write into those that they are given.

    Args:
        arguments: Keyword arguments of a pipeline's call, or of its `encode_prompt`.

    Returns:
        The same values; lists and dicts are shallow copies, so what a caller keeps within them stays shared.
    """
    written = {
        name: copy.copy(cast("Any", value)) for name, value in arguments.items() if isinstance(value, (list, dict))
    }
    return {**arguments, **written}


def hint_for_stage(hint: Any, width: int, height: int, rows: range, batch: int) -> Any:
    """The ControlNet hint for one stage; pipelines resize images, but not tensors.

    Args:
        hint: What the caller gave: an image, a tensor (C, H, W) or (B, C, H, W), or a function (width, height) -> hint.
        width: Of the stage in pixels.
        height: Likewise.
        rows: Which images of the batch the stage is for.
        batch: Images of the whole batch.

    Returns:
        A tensor as (B, C, height, width), resized if needed and cut to `rows` if it held one hint per image; every
        other hint unchanged.
    """
    made = hint(width, height) if callable(hint) else hint
    if isinstance(made, Tensor):
        images = made if made.ndim == 4 else made[None]
        if images.shape[-2:] != (height, width):
            images = resize_lanczos(images, width, height).to(made.dtype)
        return images[rows.start : rows.stop] if len(images) == batch and len(rows) < batch else images
    return made


def stage_window(start: float, end: float, progress: Sequence[float], per_step: int) -> tuple[float, float]:
    """A ControlNet's window of the whole run as a window of one stage, which pipelines count in evaluations.

    A step is on where all of it lies between `start` and `end`; for stage 1 that is what the pipeline itself would do.

    Args:
        start: Fraction of the run, from 0 to 1, at which the ControlNet is switched on.
        end: Fraction of the run at which it is switched off.
        progress: For each sigma of the stage, the fraction of the run done when it is reached, steps + 1 values.
        per_step: Evaluations of each step but the last, which has one.

    Returns:
        `control_guidance_start` and `control_guidance_end` for the stage.
    """
    slack = 1e-9
    on = [start - slack <= now and then <= end + slack for now, then in pairwise(progress)]
    evaluations = [each for each in on[:-1] for _ in range(per_step)] + on[-1:]
    count = len(evaluations)
    if not any(evaluations):
        return 1.0 - 0.25 / count, 1.0
    first, last = evaluations.index(True), count - evaluations[::-1].index(True)
    return max((first - 0.5) / count, 0.0), min((last + 0.5) / count, 1.0)


def follow_last_change(callback: Callable[..., Any], scheduler: MrFlowScheduler, first: int = 0) -> Callable[..., Any]:
    """A `callback_on_step_end` whose changes to the latents after the last step of a stage count as well.

    In the steps before, the loop itself passes the changed latents on to the scheduler.

    Args:
        callback: The caller's.
        scheduler: That of the stage.
        first: What the first step counts.

    Returns:
        A function with the callback's signature.
    """

    def called(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        given = tensors.get("latents")
        answer = callback(pipe, first + step, timestep, tensors)
        if scheduler.final_state is not None and isinstance(answer, dict):
            changed = cast("dict[str, Any]", answer)
            latents = changed.get("latents", given)
            if isinstance(latents, Tensor):
                scheduler.follow(latents)
            return changed
        return answer

    return called
