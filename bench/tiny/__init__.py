"""Tiny random-weight diffusers pipelines of the real classes, built offline in a second each: `make("flux1-dev")`.

Widths are a few channels, but everything that conventions depend on is real: VAE factors, patch sizes, latent
channels, statistics, schedulers with the released configurations, tokenizers with chat templates where the family has
one. The same name always gives the same weights. A group a file; each holds its `PIPELINES`.
"""

from __future__ import annotations

import os
from typing import Any

from bench.tiny import (
    by_betas,
    controlled,
    deep_vae,
    editing,
    flux,
    language_models,
    modular,
    other_times,
    qwen,
    special,
    stable_diffusion,
    transformers_on_kl,
    video,
)
from bench.tiny.parts import diffusers

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_GROUPS = (by_betas, deep_vae, flux, language_models, other_times, qwen, special, stable_diffusion, transformers_on_kl)
_PLAIN = {name: pair for group in _GROUPS for name, pair in group.PIPELINES.items()}
_VARIED = {
    **controlled.PIPELINES,
    **editing.PIPELINES,
    **by_betas.VARIANTS,
    **language_models.VARIANTS,
    **other_times.VARIANTS,
}
_PIPELINES = {**_PLAIN, **_VARIED, **modular.PIPELINES, **video.PIPELINES}

NAMES = tuple(_PLAIN)
"""Every pipeline from text alone that `make` can build where the installed diffusers has its class."""

VARIANTS = tuple(_VARIED)
"""Likewise, pipelines with the parts of another one: most need a hint besides."""

MODULAR = tuple(modular.PIPELINES)
"""Likewise, modular pipelines: their call has the inputs of their blocks, and returns their state."""

VIDEO = tuple(video.PIPELINES)
"""Likewise, pipelines that make videos; their call has another name for its result."""


def class_name(name: str) -> str:
    """The diffusers class of the pipeline called `name`."""
    return _PIPELINES[name][0]


def available() -> list[str]:
    """Those of `NAMES` whose pipeline class the installed diffusers has."""
    return [name for name in NAMES if hasattr(diffusers(), class_name(name))]


def make(name: str) -> Any:
    """A fresh pipeline called `name`, of a class that the installed diffusers has."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        pipe = _PIPELINES[name][1]()
        for part in pipe.components.values():
            if not isinstance(part, torch.nn.Module):
                continue
            if any(part is getattr(pipe, name, None) for name in ("unet", "transformer", "controlnet")):
                for weight in part.parameters():
                    if not weight.any():  # left at 0 by design, it would hide what comes before it: text, say
                        torch.nn.init.normal_(weight, std=0.1)
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
