"""How one stage becomes the next: super-resolution in pixel space, encode, noise.

The image comes in decoded, since the sampler shows and keeps it anyway. Everything stays float32 on its device: no
8-bit rounding between the low-resolution decoder and the high-resolution encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrflow_sched.noise import add_noise, draw_noise
from mrflow_sched.upscale import free_memory, is_memory_error, stop_if, upscale_to

if TYPE_CHECKING:
    from mrflow_sched.engines.base import Engine
    from mrflow_sched.plan import Stage
    from mrflow_sched.upscale import PixelUpscaler

__all__ = ["PARTS", "HandoffResult", "handoff", "posterior_seed"]

PARTS = ("upscale", "encode", "noise")


@dataclass(frozen=True)
class HandoffResult:
    """What a handoff made.

    `latents` (B, *latent_shape, float32): where the stage starts, noised to its `start_sigma` (to the equal
    signal-to-noise sigma_ve for variance-exploding models). `encoded`: the same before noise. Both are None where the
    stage takes no step. `image` (B, 3, H, W, float32 in [0, 1]): the upscaled picture. `warnings`: sentences for the
    user.
    """

    latents: Tensor | None
    image: Tensor
    encoded: Tensor | None
    warnings: tuple[str, ...] = ()


def handoff(
    engine: Engine,
    images: Tensor,
    stage: Stage,
    upscaler: PixelUpscaler | None,
    *,
    seeds: Sequence[int],
    posterior: str = "mode",
    on_part: Callable[[str], object] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> HandoffResult:
    """Carry finished `images` (B, 3, h, w, float32 in [0, 1]) to the start of `stage`: upscale, encode, add noise.

    x = (1 - start_sigma) E(U(image)) + start_sigma noise (arXiv 2607.01642, section 1.2 of the specification). `seeds`
    holds one noise seed per image, already those of this stage (`noise.stage_seed`). `upscaler` None means Lanczos.
    `posterior` "sample" draws from the encoder's distribution with seeds derived from `seeds`, never the noise stream
    itself. `on_part(name)` is called as each of `PARTS` begins; `cancel` is polled between parts, images and tiles, and
    where it answers True the handoff raises `solvers.Cancelled`. A stage without sigmas keeps the upscaled image: no
    encode. Raises ValueError for arguments that do not fit and MemoryError where even one image at a time does not fit.
    """
    if len(seeds) != images.shape[0]:
        raise ValueError(f"seeds must hold one seed per image, got {len(seeds)} for {images.shape[0]} images.")
    if posterior not in ("mode", "sample"):
        raise ValueError(f"posterior must be 'mode' or 'sample', got {posterior!r}.")
    begin = on_part or _ignore
    warnings: list[str] = []
    begin("upscale")
    enlarged = upscale_to(images, stage.width, stage.height, upscaler, cancel=cancel, warn=warnings.append)
    if not stage.sigmas:
        return HandoffResult(None, enlarged, None, tuple(warnings))
    begin("encode")
    stop_if(cancel)
    encoded = _encode(engine, enlarged, posterior, seeds, cancel)
    begin("noise")
    stop_if(cancel)
    noise = draw_noise(encoded.shape[1:], seeds, device=encoded.device)
    latents = add_noise(encoded, noise, stage.sigmas[0], engine.family.prediction)
    return HandoffResult(latents, enlarged, encoded, tuple(warnings))


def posterior_seed(seed: int) -> int:
    """The seed for the encoder's own draw beside noise seed `seed`: 63 bits of BLAKE2.

    It must differ: latents and noise have one shape, so one seed would give one and the same tensor for both.
    """
    digest = hashlib.blake2b(f"posterior/{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _encode(
    engine: Engine, images: Tensor, posterior: str, seeds: Sequence[int], cancel: Callable[[], bool] | None
) -> Tensor:
    """Latents of the whole batch at once, or of one image after another where memory does not allow that."""
    draws = [posterior_seed(seed) for seed in seeds] if posterior == "sample" else None
    latents = _try_encode(engine, images, posterior, draws)
    if latents is not None:
        return latents
    parts: list[Tensor] = []
    for index in range(len(images) if len(images) > 1 else 0):
        stop_if(cancel)
        part = _try_encode(engine, images[index : index + 1], posterior, draws and [draws[index]])
        if part is None:
            break
        parts.append(part)
    if len(parts) < len(images):
        height, width = images.shape[-2:]
        raise MemoryError(
            f"memory ran out while encoding one image of {width}x{height}; choose a smaller size or free memory."
        )
    return torch.cat(parts)


def _try_encode(engine: Engine, images: Tensor, posterior: str, draws: Sequence[int] | None) -> Tensor | None:
    """The latents, or None where memory ran out; by then the failed attempt's tensors are gone."""
    try:
        return engine.encode(images, posterior=posterior, seeds=draws)
    except Exception as error:
        if not is_memory_error(error):
            raise
    free_memory(engine.device)
    return None


def _ignore(name: str) -> None:
    pass
