"""How one stage becomes the next: super-resolution in pixel space, encode, noise.

The image comes in decoded, since the sampler shows and keeps it anyway. Everything stays float32 on its device: there
is no 8-bit rounding between the low-resolution decoder and the high-resolution encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrflow_sched._runtime.cancel import Cancelled, stop_if
from mrflow_sched._runtime.errors import MrFlowError, first_line, shown
from mrflow_sched._runtime.memory import is_callers_own, is_memory_error
from mrflow_sched.sampling.answers import float_tensor
from mrflow_sched.sampling.memory import within_memory
from mrflow_sched.sampling.noise import add_noise, draw_noise
from mrflow_sched.upscaling.fit import upscale_to

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import Stage
    from mrflow_sched.sampling.engine import Engine
    from mrflow_sched.upscaling.role import PixelUpscaler

PARTS = ("upscale", "encode", "noise")


@dataclass(frozen=True)
class HandoffResult:
    """What a handoff produced.

    Attributes:
        latents: (B, *latent_shape), float32: where the stage starts, noised to its `start_sigma` (for
            variance-exploding models to the sigma_ve of equal signal-to-noise ratio). None where the stage has no
            steps.
        image: (B, 3, H, W), float32 in [0, 1]: the upscaled image.
        encoded: `latents` before noise; None where the stage has no steps.
        warnings: One sentence each, for the user.
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
    on_image: Callable[[Tensor], object] | None = None,
    compose: Callable[[Tensor], Tensor] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> HandoffResult:
    """Carry finished images to the start of a stage: upscale, encode, add noise.

    x = (1 - start_sigma) E(U(image)) + start_sigma noise (docs/method.md, section 1.2). An upscaler that fails costs
    the detail, not the run: Lanczos takes its place, and a warning says so.

    Args:
        engine: Encodes; its family says how noise is mixed in.
        images: (B, 3, h, w), float32 in [0, 1].
        stage: The stage that is to start. Without sigmas it keeps the upscaled image: nothing is encoded.
        upscaler: Super-resolution; None means Lanczos.
        seeds: One noise seed per image, already those of this stage (`noise.stage_seed`).
        posterior: "mode" takes the mode of the encoder's distribution. "sample" draws from it with the first numbers of
            each seed, and the noise is the numbers after them, as in the official scripts.
        on_part: Called with the name as each of `PARTS` begins.
        on_image: Called with the upscaled image as soon as it is ready.
        compose: Called with the upscaled images; what it returns takes their place.
        cancel: Polled between parts, images and tiles; True stops the handoff.

    Returns:
        The latents and the images they were made from.

    Raises:
        MrFlowError: Arguments that do not fit.
        Cancelled: `cancel` returned True.
        MemoryError: Not even one image at a time fits, in tiles if the engine has them.
    """
    if len(seeds) != images.shape[0]:
        raise MrFlowError(f"seeds must hold one seed per image, got {len(seeds)} for {images.shape[0]} images.")
    if posterior not in ("mode", "sample"):
        raise MrFlowError(f"posterior must be 'mode' or 'sample', got {posterior!r}.")
    begin = on_part or _ignore
    warnings: list[str] = []
    begin("upscale")
    upscaled = upscale_or_resize(images, stage, upscaler, cancel=cancel, warn=warnings.append)
    if compose is not None:
        upscaled = compose(upscaled)
    if on_image is not None:
        on_image(upscaled)
    if not stage.sigmas:
        return HandoffResult(None, upscaled, None, tuple(warnings))
    begin("encode")
    stop_if(cancel)
    encoded = encode_images(engine, upscaled, posterior, seeds, cancel=cancel, warn=warnings.append)
    begin("noise")
    stop_if(cancel)
    noise = stage_noise(encoded.shape[1:], posterior, seeds, device=encoded.device)
    latents = add_noise(encoded, noise, stage.sigmas[0], engine.family.prediction, engine.family.shift.largest_ve)
    return HandoffResult(latents, upscaled, encoded, tuple(warnings))


def upscale_or_resize(
    images: Tensor,
    stage: Stage,
    upscaler: PixelUpscaler | None,
    *,
    cancel: Callable[[], bool] | None,
    warn: Callable[[str], object],
) -> Tensor:
    """Upscale images to a stage's size, with Lanczos where the upscaler fails.

    Args:
        images: (B, 3, h, w), float32 in [0, 1].
        stage: The stage that is to start.
        upscaler: Super-resolution; None means Lanczos.
        cancel: Polled between images and tiles; True raises `Cancelled`.
        warn: Called with a sentence where the upscaler failed or has something to say.

    Returns:
        (B, 3, H, W), float32 in [0, 1].
    """
    try:
        return upscale_to(images, stage.width, stage.height, upscaler, cancel=cancel, warn=warn)
    except Exception as error:
        if upscaler is None or isinstance(error, Cancelled) or is_memory_error(error) or is_callers_own(error):
            raise
        reason = str(error).rstrip(".")
        if not isinstance(error, MrFlowError):
            reason = f"the upscaler {shown(upscaler.name)} failed ({type(error).__name__}: {first_line(error)})"
        warn(f"{reason}, so the image was upscaled with Lanczos, which leaves fine detail soft; use another upscaler.")
    return upscale_to(images, stage.width, stage.height)


def stage_noise(
    shape: Sequence[int], posterior: str, seeds: Sequence[int], *, device: torch.device | str = "cpu"
) -> Tensor:
    """Noise for latents that were encoded with the same `posterior` and `seeds`.

    Latents and noise have one shape, so a posterior that was sampled used the very numbers that the noise would be:
    with "sample" the noise is the numbers after them.

    Args:
        shape: Of one sample, without the batch dimension.
        posterior: "mode" or "sample".
        seeds: One per image.
        device: Where the noise is put; it is drawn on the CPU.

    Returns:
        Standard normal noise (B, *shape), float32.
    """
    return draw_noise(shape, seeds, after=1 if posterior == "sample" else 0, device=device)


def encode_images(
    engine: Engine,
    images: Tensor,
    posterior: str,
    seeds: Sequence[int],
    *,
    cancel: Callable[[], bool] | None = None,
    warn: Callable[[str], object] | None = None,
) -> Tensor:
    """Latents of images within memory: all at once, one by one, or in tiles.

    Args:
        engine: Encodes.
        images: (B, 3, H, W), float32 in [0, 1].
        posterior: "mode" or "sample".
        seeds: One per image; "sample" draws with them.
        cancel: Polled between images; True raises `Cancelled`.
        warn: Called with a sentence if tiles were needed.

    Returns:
        (B, *latent_shape), float32.
    """
    draws = seeds if posterior == "sample" else None
    height, width = images.shape[-2:]
    shape = engine.latent_shape(width, height)

    def encode(able: Engine, part: slice) -> Tensor:
        rows = images[part]
        latents = able.encode(rows, posterior=posterior, seeds=draws and draws[part])
        return float_tensor(latents, (len(rows), *shape), able, "encode")

    return within_memory(
        encode,
        engine,
        len(images),
        f"encoding one image of {width}x{height}",
        cancel=cancel,
        warn=warn,
    )


def _ignore(name: str) -> None:
    pass
