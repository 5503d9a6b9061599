"""A layout for flow pipelines of classes that no family names, from a rehearsal of the pipeline itself.

Text is passed to the pipeline as it is. What a rehearsal cannot tell, or no stage can follow, is refused in one
sentence. A pipeline without weights cannot be rehearsed: its numbers are those of its configurations.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.layouts.arrangement import Arrangement, Map
from mrflow_sched.engines.diffusers.layouts.base import Layout, network_name, parameter_defaults, parameter_names
from mrflow_sched.engines.diffusers.layouts.rehearsal import Guiding, Rehearsal, guidance_word, patch_of, rehearse
from mrflow_sched.engines.diffusers.layouts.shift import renoise_of, shift_rule
from mrflow_sched.plan.families import Family, GuidanceKind, ShiftRule, get_family
from mrflow_sched.plan.schedule import mu_flux2, mu_for_tokens

__all__ = ["GenericLayout", "follows_its_own", "generic_layout"]

_MET: weakref.WeakKeyDictionary[Any, dict[tuple[Any, str, str], Rehearsal]] = weakref.WeakKeyDictionary()
"""Rehearsals by VAE, class of pipeline and settings, so that views of a pipeline need none of their own."""


@dataclass(frozen=True)
class GenericLayout(Layout):
    """Conventions as a rehearsal saw them.

    Attributes:
        seen: The rehearsal.
    """

    seen: Rehearsal | None = None

    @property
    def _seen(self) -> Rehearsal:
        return cast("Rehearsal", self.seen)

    @property
    @override
    def positive_first(self) -> bool:
        # As the pipeline combined the two halves.
        return self._seen.guiding.positive_first

    @property
    @override
    def negative_call_first(self) -> bool:
        # Likewise, of two calls.
        return self._seen.guiding.negative_call_first

    @property
    @override
    def gives_state(self) -> bool:
        # Where its `latents` are something else than the loop's state.
        return not self._seen.takes_state

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return self._seen.map.arrangement.pack(latents)

    @override
    def unpack(self, state: Tensor, width: int, height: int) -> Tensor:
        _, rows, columns = self.latent_shape(width, height)
        return self._seen.map.arrangement.unpack(state, rows, columns)

    def _normalise(self, latents: Tensor) -> Tensor:
        return self._seen.map.normalise(latents[:, :, 0] if self._seen.frame else latents)

    def _denormalise(self, latents: Tensor) -> Tensor:
        made = self._seen.map.denormalise(latents)
        return made[:, :, None] if self._seen.frame else made

    def _to_vae_image(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, None] if self._seen.frame else pixels

    def _from_vae_image(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, 0] if self._seen.frame else pixels

    @override
    def encode_text(self, prompts: Any, negative_prompts: Any = None, options: Any = None) -> dict[str, Any]:
        # The prompts as strings, with those `options` that the pipeline's call takes.
        text = {name: value for name, value in dict(options or {}).items() if name in self.call_names}
        if prompts is not None:
            text["prompt"] = list(prompts)
        if negative_prompts is not None and "negative_prompt" in self.call_names:
            text["negative_prompt"] = list(negative_prompts)
        elif self._guided and prompts is not None and self._negative_is_none:
            text["negative_prompt"] = [""] * len(prompts)  # without one, some pipelines leave guidance out
        return text

    @property
    def _negative_is_none(self) -> bool:
        return parameter_defaults(self.pipe.__call__).get("negative_prompt", "") is None

    @override
    def plan_guidance(self, guidance: float) -> float:
        return 1.0 if self._guided and guidance <= self._seen.guiding.off else guidance

    @override
    def guidance_weight(self, guidance: float) -> float:
        return 0.0 if guidance == 1.0 else guidance + self._seen.guiding.weight

    @override
    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        found = self._seen.guiding
        off = self._guided and guidance == 1.0
        return {found.word: found.off if off else guidance} if found.word else {}


def generic_layout(pipe: Any, family: str | None) -> Layout:
    """The layout of a flow pipeline of a class that is not known.

    Args:
        pipe: The pipeline. One whose weights are not loaded is described by its configurations alone.
        family: Name of a family whose costs and presets are used; None: the pipeline's own numbers, and
            SD3's for the rest.

    Returns:
        The layout, marked experimental.

    Raises:
        MrFlowError: It could not be rehearsed, or does what no stage can follow.
    """
    seen = _assumed(pipe) if _unloaded(pipe) else _rehearsed(pipe)
    rule, patch, own_list = _rule(pipe, seen)
    layout = GenericLayout(pipe, _family(pipe, seen, rule, patch, family), True, seen=seen)
    if not own_list:
        return layout
    said = f"{type(pipe).__name__} makes a list of sigmas of its own; stage 1 has evenly spaced ones, then shifted."
    return replace(layout, notes=(said,))


def follows_its_own(layout: Layout) -> bool:
    """Whether a pipeline whose class overrides parts of a known one still does as the known layout says.

    Args:
        layout: Of the known class.

    Returns:
        True where a rehearsal shows the same latents, and a list of sigmas of the same kind.

    Raises:
        MrFlowError: The pipeline does what no stage can follow.
    """
    pipe, seen = layout.pipe, _rehearsed(layout.pipe)
    width, height = 192, 128
    latents = torch.randn(1, *layout.latent_shape(width, height))
    state = layout.pack(latents)
    try:
        theirs = seen.map.arrangement.unpack(state, height // seen.factor, width // seen.factor)
    except (RuntimeError, ValueError):  # of another shape
        return False
    unpacked = layout.unpack(state, width, height).to(layout.device)
    ours = layout._denormalise(unpacked)  # pyright: ignore[reportPrivateUsage]
    wanted = seen.map.denormalise(theirs).to(ours)
    ours = ours[:, :, 0] if ours.ndim == 5 else ours
    alike = ours.shape == wanted.shape and torch.allclose(ours, wanted, 1e-2, 1e-2)
    info = layout.family.pipeline
    return alike and (info is None or not info.even_list or not _rule(pipe, seen)[2])


def _rehearsed(pipe: Any) -> Rehearsal:
    met = _MET.setdefault(pipe.vae, {})
    key: tuple[Any, str, str] = cast("Any", type(pipe)), str(dict(pipe.scheduler.config)), str(dict(pipe.vae.config))
    if key not in met:
        met[key] = rehearse(pipe)
    return met[key]


def _unloaded(pipe: Any) -> bool:
    """Whether weights have no memory, and no hook of accelerate brings them in when they are needed."""
    for part in (getattr(pipe, network_name(pipe)), pipe.vae):
        weight = next(iter(part.parameters()), None)
        if weight is not None and weight.is_meta and not any(hasattr(each, "_hf_hook") for each in part.modules()):
            return True
    return False


def _assumed(pipe: Any) -> Rehearsal:
    """What the configurations say, for a pipeline without weights, which is only asked for its numbers."""
    config, factor = pipe.vae.config, int(getattr(pipe, "vae_scale_factor", None) or 8)
    channels = int(getattr(config, "latent_channels", None) or getattr(config, "z_dim", None) or 4)
    arrangement = Arrangement("tokens", 2) if hasattr(pipe, "_pack_latents") else Arrangement("first")
    plain = Map(arrangement, torch.ones(channels, 1, 1), torch.zeros(channels, 1, 1))
    words, said = parameter_names(pipe.__call__), parameter_defaults(pipe.__call__)
    word = guidance_word(pipe)
    cfg = bool(words & {"negative_prompt", "negative_prompt_embeds"}) and said.get(word) is not None
    even: Mapping[str, Any] = {"sigmas": (1.0,)} if _gives_sigmas(pipe) else {}
    return Rehearsal(plain, factor, False, (even,), ((16, 24),), (1,), Guiding(word, cfg), True)


def _gives_sigmas(pipe: Any) -> bool:
    """Whether the source of a pipeline's call makes a list of sigmas; True where it cannot be read."""
    try:
        return "linspace" in inspect.getsource(type(pipe).__call__)
    except (OSError, TypeError):
        return True


def _rule(pipe: Any, seen: Rehearsal) -> tuple[ShiftRule, int, bool]:
    """The shift rule, the patch that tokens are counted by, and whether the pipeline's list is one of its own."""
    lists = [each.get("sigmas") for each in seen.asked]
    even = [each is not None and _is_even([float(sigma) for sigma in each]) for each in lists]
    own_list = any(each is not None for each in lists) and not all(even)
    for each in lists:
        given = [] if each is None else [float(sigma) for sigma in each]
        if given and (abs(given[0] - 1.0) > 0.01 or any(a <= b for a, b in pairwise(given))):
            raise MrFlowError(
                f"pipe is {type(pipe).__name__}, whose list of sigmas does not fall from 1 (it begins "
                f"{', '.join(f'{sigma:.3g}' for sigma in given[:3])}); no stage can follow that."
            )
    patch = max(seen.map.arrangement.patch, patch_of(getattr(pipe, network_name(pipe))))
    if not pipe.scheduler.config.get("use_dynamic_shifting") or "mu" not in seen.asked[0]:
        return shift_rule(pipe.scheduler, None, even_list=all(even)), patch, own_list
    plain = shift_rule(pipe.scheduler, None, even_list=all(even))
    mus = [float(each["mu"]) for each in seen.asked]
    for side in dict.fromkeys((patch, 1, 2, 4)):
        tokens = [rows * columns // side**2 for rows, columns in seen.latents]
        line = {name: getattr(plain, name) for name in ("base_tokens", "max_tokens", "base_shift", "max_shift")}
        by_steps = [mu_flux2(count, steps) for count, steps in zip(tokens, seen.steps, strict=True)]
        rules = (
            (plain, [mu_for_tokens(count, **line) for count in tokens]),
            (ShiftRule("flux2", terminal=plain.terminal), by_steps),
        )
        for rule, made in rules:
            if all(abs(a - b) < 1e-3 for a, b in zip(made, mus, strict=True)):
                return rule, side, own_list
    if max(mus) - min(mus) < 1e-6:
        fixed = ShiftRule("static", shift=float(torch.tensor(mus[0]).exp()), terminal=plain.terminal)
        return replace(fixed, sigma_min=plain.sigma_min), patch, own_list
    raise MrFlowError(
        f"pipe is {type(pipe).__name__}, which shifts its sigmas by a rule of its own (mu of {mus[0]:.4g} and "
        f"{mus[1]:.4g} for {seen.latents[0]} and {seen.latents[1]} latent pixels); ask for it to be added."
    )


def _is_even(sigmas: Sequence[float]) -> bool:
    """Whether sigmas are 1 ... 1/steps, with or without the final 0."""
    count = len(sigmas) - (sigmas[-1] == 0.0)
    return all(abs(sigma - (1 - index / count)) < 1e-3 for index, sigma in enumerate(sigmas))


def _family(pipe: Any, seen: Rehearsal, rule: ShiftRule, patch: int, name: str | None) -> Family:
    """A family from the pipeline's own numbers, or the named one with them."""
    grid = seen.factor * patch
    measured: dict[str, Any] = {
        "shift": rule,
        "renoise": renoise_of(pipe.scheduler),
        "grid": grid,
        "vae_factor": seen.factor,
        "patch": patch,
        "latent_channels": len(seen.map.scale),
        "pipeline": None,
    }
    if name is not None:
        known = get_family(name)
        sources = {**known.sources, **dict.fromkeys(measured, "seen in a rehearsal of the pipeline")}
        return replace(known, **measured, sources=MappingProxyType(sources))
    like, said, network = get_family("sd3"), parameter_defaults(pipe.__call__), getattr(pipe, network_name(pipe))
    word = seen.guiding.word
    scale = said.get(word) if isinstance(said.get(word), (int, float)) else None
    kind: GuidanceKind = "none"
    if seen.guiding.cfg:
        kind = "cfg"
    elif getattr(network.config, "guidance_embeds", False) and word:
        kind = "embedded"
    side = int(getattr(pipe, "default_sample_size", None) or 0) * seen.factor
    side = side // grid * grid if side >= 512 else like.native_size[0]
    own: dict[str, Any] = {
        **measured,
        "name": "flow",
        "title": type(pipe).__name__.removesuffix("Pipeline"),
        "guidance_kind": kind,
        "guidance": 1.0 if kind == "none" or scale is None else max(float(scale), 1.0),
        "text_tokens": 0,
        "native_steps": int(said.get("num_inference_steps") or like.native_steps),
        "native_size": (side, side),
        "solver": "careful" if kind == "cfg" else "multistep",
        # Every weight meets every token about once; pairs of tokens are left out.
        "linear_cost": 2.0 * sum(weight.numel() for weight in network.parameters()),
        "attention_cost": 0.0,
        "network_cost": None,
    }
    return replace(like, **own, sources=MappingProxyType(dict.fromkeys(like.sources, "seen in a rehearsal")))
