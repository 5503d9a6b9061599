"""A stand-in for a flow model that no file of this folder knows: what its host says of it, and assumptions."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType

from mrflow_sched.plan.families.base import KL_VAE, Family, GuidanceKind, ShiftRule, never
from mrflow_sched.plan.families.zimage import Z_IMAGE

__all__ = ["unknown_flow"]

_ASSUMED = "assumed: nothing is known of this model"
_SAID = "said by the host"
_KL_CHANNELS = (4, 16)
_GUIDANCE = {"cfg": 5.0, "embedded": 3.5, "none": 1.0}
_SOLVERS = {"cfg": "careful", "embedded": "multistep", "none": "euler"}


def unknown_flow(
    title: str,
    *,
    shift: float,
    like: Family = Z_IMAGE,
    vae_factor: int | None = None,
    patch: int | None = None,
    latent_channels: int | None = None,
    guidance_kind: GuidanceKind = "cfg",
) -> Family:
    """The family of a flow model that is in no table. Nothing recognises it, and `FAMILIES` does not have it.

    Args:
        title: Its name for people; empty: "flow model".
        shift: The host's shift of it, as a factor (exp(mu) where the host has mu); one below 1, or not finite, is 1.
        like: The family whose sizes, presets and costs are assumed.
        vae_factor: Pixels per latent pixel along a side; None: as `like`.
        patch: Latent pixels per token along a side; None: as `like`.
        latent_channels: Channels of the VAE's latents; None: as `like`.
        guidance_kind: How it takes guidance.

    Returns:
        A family named "flow", whose sources say what the host said and what is assumed.
    """
    factor = like.vae_factor if vae_factor is None else vae_factor
    tokens = like.patch if patch is None else patch
    channels = like.latent_channels if latent_channels is None else latent_channels
    said = {"shift": _SAID}
    said |= {} if vae_factor is None else {"vae_factor": _SAID}
    said |= {} if patch is None else {"patch": _SAID}
    said |= {} if latent_channels is None else {"latent_channels": _SAID}
    grid = factor * tokens
    return replace(
        like,
        name="flow",
        title=title or "flow model",
        prediction="flow",
        shift=ShiftRule("static", shift=max(shift, 1.0) if math.isfinite(shift) else 1.0),
        guidance_kind=guidance_kind,
        guidance=_GUIDANCE[guidance_kind],
        solver=_SOLVERS[guidance_kind],
        grid=grid,
        vae_factor=factor,
        patch=tokens,
        latent_channels=channels,
        native_size=_on_grid(like.native_size, grid),
        default_size=None if like.default_size is None else _on_grid(like.default_size, grid),
        network_cost=None,
        vae_cost=KL_VAE if factor == 8 and channels in _KL_CHANNELS else None,
        pipeline=None,
        host=never,
        sources=MappingProxyType({**dict.fromkeys(like.sources, _ASSUMED), "grid": "vae_factor x patch", **said}),
    )


def _on_grid(size: tuple[int, int], grid: int) -> tuple[int, int]:
    width, height = (max(side // grid, 1) * grid for side in size)
    return width, height
