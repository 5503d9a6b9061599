"""A VAE that works in tiles of a chosen size."""

from __future__ import annotations

from typing import Any

__all__ = ["tile_vae"]


def tile_vae(vae: Any, side: int) -> bool:
    """Switch a VAE to tiles.

    Args:
        vae: Of diffusers; changed in place.
        side: The largest side of a tile in pixels. A VAE whose own tiles are smaller keeps them.

    Returns:
        Whether it can work in tiles.
    """
    if getattr(vae, "use_tiling", None) is None:
        return False
    vae.enable_tiling()
    own = getattr(vae, "tile_sample_min_size", None)  # AutoencoderKL takes its training size, often 1024
    if isinstance(own, int) and own > side:
        vae.tile_latent_min_size = max(vae.tile_latent_min_size * side // own, 1)
        vae.tile_sample_min_size = side
    return True
