"""A layout for flow pipelines that have no class of their own in `per_family`, found by probing the pipeline.

Packing is inferred from the noise that `prepare_latents` draws and checked against the pipeline's own `_pack_latents`.
How latents are scaled is inferred from which of the VAE's numbers the pipeline's source names. Text is passed to the
pipeline as it is. What cannot be inferred that way is refused in one sentence.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.layouts.base import Layout, parameter_defaults, parameter_names
from mrflow_sched.engines.diffusers.layouts.per_family import PackedLayout, VideoVaeLayout
from mrflow_sched.engines.diffusers.layouts.shift import shift_rule
from mrflow_sched.plan.families import Family, GuidanceKind, ShiftRule, get_family

__all__ = ["generic_layout"]

# A probe image whose sides every VAE factor and patch size in use divides.
_WIDTH, _HEIGHT = 192, 128


class _Generic(Layout):
    """What all generic layouts share: text as strings, and guidance by the argument names of the pipeline's call."""

    @property
    @override
    def positive_first(self) -> bool:
        # By the order in which the pipeline's source joins the two embeddings.
        return _joins_positive_first(self.pipe.__class__)

    @override
    def encode_text(self, prompts: Any, negative_prompts: Any = None, options: Any = None) -> dict[str, Any]:
        # The prompts as strings, with those `options` that the pipeline's call takes.
        text = {name: value for name, value in dict(options or {}).items() if name in self.call_names}
        if prompts is not None:
            text["prompt"] = list(prompts)
        if negative_prompts is not None and "negative_prompt" in self.call_names:
            text["negative_prompt"] = list(negative_prompts)
        return text

    @override
    def plan_guidance(self, guidance: float) -> float:
        return 1.0 if self._guided and guidance <= _off(self.pipe) else guidance

    @override
    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        word = _guidance_word(self.pipe)
        return {word: _off(self.pipe) if self._guided and guidance == 1.0 else guidance} if word else {}


class _Plain(_Generic):
    pass


class _Packed(_Generic, PackedLayout):
    pass


class _PackedVideo(_Generic, VideoVaeLayout, PackedLayout):
    pass


class _Unshifted(_Generic):
    """Scaled and not shifted, whatever else the VAE's configuration says."""

    def _normalise(self, latents: Tensor) -> Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def _denormalise(self, latents: Tensor) -> Tensor:
        return latents / self.pipe.vae.config.scaling_factor


@dataclass(frozen=True)
class _Shape:
    channels: int
    factor: int
    patch: int
    packed: bool


def generic_layout(pipe: Any, family: str | None) -> Layout:
    """The layout of a flow pipeline of a class that is not known.

    Args:
        pipe: The pipeline.
        family: Name of a family whose costs and presets are used; None: the pipeline's own numbers, and
            SD3's for the rest.

    Returns:
        The layout, marked experimental.

    Raises:
        MrFlowError: A convention that cannot be inferred.
    """
    source = _source(pipe)
    if re.search(r"sigmas\s*=\s*timesteps\s*/", source):
        raise MrFlowError(
            f"pipe is {type(pipe).__name__}, whose timesteps do not match its sigmas; no plan can follow that."
        )
    shape = _shape(pipe)
    kind = _scaling(pipe, source, shape.packed)
    even = any("linspace" in line and not line.lstrip().startswith("#") for line in source.splitlines())
    if re.search(
        r"""config\[["']use_dynamic_shifting["']\]""", source
    ):  # Bria: its own even list with that option only
        even = even and bool(pipe.scheduler.config.get("use_dynamic_shifting"))
    known = ShiftRule("flux2") if "compute_empirical_mu" in source else None
    rule = shift_rule(pipe.scheduler, known, even_list=even)
    return kind(pipe, _family(pipe, shape, rule, family), True)


def _scaling(pipe: Any, source: str, packed: bool) -> type[Layout]:
    """The layout whose scaling is what the pipeline's source does with the VAE's numbers."""
    config = pipe.vae.config
    if "running_mean" in source:
        found = None
    elif "latents_mean" in source:
        found = _PackedVideo if packed and getattr(config, "z_dim", None) else None
    elif "shift_factor" in source:
        found = _Packed if packed else _Plain
    else:
        found = _Unshifted if "scaling_factor" in source and not packed else None
    if found is not None:
        return found
    raise MrFlowError(f"pipe is {type(pipe).__name__}, whose latent scaling is not recognised; ask for it to be added.")


def _shape(pipe: Any) -> _Shape:
    """Channels, VAE factor, patch and packing, from the noise that the pipeline draws for a small image."""
    config = pipe.vae.config
    channels = int(getattr(config, "latent_channels", None) or getattr(config, "z_dim", None) or 0)
    noise = _drawn(pipe, channels)
    name = type(pipe).__name__
    if channels and noise.ndim == 4 and noise.shape[1] == channels and _HEIGHT % noise.shape[2] == 0:
        factor = _HEIGHT // noise.shape[2]
        patch = _patch(pipe) or 1
        if noise.shape[3] * factor == _WIDTH:
            return _Shape(channels, factor, patch, False)
    if channels and noise.ndim == 3 and noise.shape[2] % channels == 0:
        patch = math.isqrt(noise.shape[2] // channels)
        factor = math.isqrt(_WIDTH * _HEIGHT // (noise.shape[1] * patch**2))
        made = _Shape(channels, factor, patch, True)
        if _packs_alike(pipe, made):
            return made
    raise MrFlowError(
        f"pipe is {name}, whose latent shape {tuple(noise.shape)} is not recognised; ask for it to be added."
    )


def _drawn(pipe: Any, channels: int) -> Tensor:
    known: dict[str, Any] = {
        "batch_size": 1,
        "num_channels_latents": channels,
        "num_latents_channels": channels,
        "patch_size": _patch(pipe),
        "height": _HEIGHT,
        "width": _WIDTH,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "generator": torch.Generator().manual_seed(0),
        "latents": None,
    }
    try:
        wanted = inspect.signature(pipe.prepare_latents).parameters.values()
        made: Any = pipe.prepare_latents(**{each.name: known[each.name] for each in wanted})
        noise: Tensor = made if isinstance(made, Tensor) else made[0]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MrFlowError(
            f"pipe is {type(pipe).__name__}, whose prepare_latents takes unknown arguments; ask for it to be added."
        ) from error
    return noise


def _packs_alike(pipe: Any, shape: _Shape) -> bool:
    rows, columns = _HEIGHT // shape.factor, _WIDTH // shape.factor
    latents = torch.arange(shape.channels * rows * columns, dtype=torch.float32).view(1, shape.channels, rows, columns)
    ours = PackedLayout(pipe, replace(get_family("flux1-dev"), patch=shape.patch)).pack(latents)
    try:
        extra = (shape.patch,) if "patch_size" in parameter_names(pipe._pack_latents) else ()
        theirs = pipe._pack_latents(latents, 1, shape.channels, rows, columns, *extra)
    except (AttributeError, TypeError, RuntimeError):
        return False
    return torch.equal(ours, theirs)


def _patch(pipe: Any) -> int | None:
    said: Any = getattr(_network(pipe).config, "patch_size", None)
    if said is None:
        return None
    return int(cast("Sequence[int]", said)[-1]) if isinstance(said, (list, tuple)) else int(said)


def _network(pipe: Any) -> Any:
    transformer = getattr(pipe, "transformer", None)
    return pipe.unet if transformer is None else transformer


@lru_cache(maxsize=32)
def _joins_positive_first(kind: Any) -> bool:
    return re.search(r"cat\(\s*\[\s*prompt_embeds\s*,\s*negative_prompt_embeds", _source_of(kind)) is not None


def _source(pipe: Any) -> str:
    return _source_of(type(pipe))


def _source_of(kind: Any) -> str:
    """The source of the pipeline's class, and of those below it down to the one that has the loop."""
    bases = kind.__mro__
    last = next(number for number, base in enumerate(bases) if "__call__" in vars(base))
    try:
        return "\n".join(inspect.getsource(base) for base in bases[: last + 1])
    except (OSError, TypeError) as error:
        raise MrFlowError(
            f"pipe is {kind.__name__}, whose source cannot be read to learn its conventions; use a class of diffusers."
        ) from error


def _guidance_word(pipe: Any) -> str | None:
    words = parameter_names(pipe.__call__)
    return next((word for word in ("true_cfg_scale", "guidance_scale") if word in words), None)


def _off(pipe: Any) -> float:
    """The scale that turns CFG off: 1, or 0 where the pipeline guides from 0 on."""
    guided = getattr(cast("type[Any]", type(pipe)), "do_classifier_free_guidance", None)
    getter = guided.fget if isinstance(guided, property) else None
    return 0.0 if getter is not None and re.search(r">\s*0(\.0)?\b", inspect.getsource(getter)) else 1.0


def _family(pipe: Any, shape: _Shape, rule: ShiftRule, name: str | None) -> Family:
    """A family from the pipeline's own numbers, or the named one with them."""
    grid = shape.factor * shape.patch
    measured: dict[str, Any] = {
        "shift": rule,
        "grid": grid,
        "vae_factor": shape.factor,
        "patch": shape.patch,
        "latent_channels": shape.channels,
        "pipeline": None,
    }
    if name is not None:
        known = get_family(name)
        sources = {**known.sources, **dict.fromkeys(measured, "read from the pipeline")}
        return replace(known, **measured, sources=MappingProxyType(sources))
    like, said, network = get_family("sd3"), parameter_defaults(pipe.__call__), _network(pipe)
    config = network.config
    word = _guidance_word(pipe)
    scale = said.get(word or "") if isinstance(said.get(word or ""), (int, float)) else None
    kind: GuidanceKind = "none"
    if getattr(config, "guidance_embeds", False) and word == "guidance_scale":
        kind = "embedded"
    elif word and scale is not None and parameter_names(pipe.__call__) & {"negative_prompt", "negative_prompt_embeds"}:
        kind = "cfg"
    side = int(getattr(pipe, "default_sample_size", None) or 0) * int(pipe.vae_scale_factor)
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
    return replace(like, **own, sources=MappingProxyType(dict.fromkeys(like.sources, "read from the pipeline")))
