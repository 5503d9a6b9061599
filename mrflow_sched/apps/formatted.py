"""The images of a run in the form that a call of `MrFlow` asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mrflow_sched.images.convert import to_pil
from mrflow_sched.upscaling.fit import fit_like

if TYPE_CHECKING:
    from mrflow_sched.apps.pictures import Inpainting
    from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
    from mrflow_sched.sampler import StagedResult

__all__ = ["formatted"]


def formatted(
    result: StagedResult,
    alpha: Tensor | None,
    output_type: str,
    engine: PipelineEngine,
    inpainting: Inpainting | None = None,
) -> Any:
    """A result's images in the form that was asked for, as the pipeline would return them.

    Args:
        result: The run's.
        alpha: (1 or B, 1, h, w) in [0, 1]: the transparency of the image it started from; None where there is none.
        output_type: "pil", "np", "pt" or "latent".
        engine: Finishes the images (safety checker, watermark).
        inpainting: The picture that stays outside its mask; None where there is none.

    Returns:
        A list of PIL images, an array (B, H, W, C), a tensor (B, C, H, W), or packed latents.
    """
    if output_type == "latent":
        latents = engine.encode(_on_grid(result)) if result.latents is None else result.latents
        return engine.layout.pack(latents).to(engine.dtype)
    images = engine.finish(result.images.nan_to_num())
    if inpainting is not None:
        images = inpainting.finished(images, engine.rejected)
    if alpha is not None:
        images = torch.cat(
            [images, fit_like(alpha.to(images), images, result.plan).expand(len(images), -1, -1, -1)], dim=1
        )
    if output_type == "pt":
        return images
    if output_type == "np":
        return images.permute(0, 2, 3, 1).cpu().numpy()
    return [to_pil(image) for image in images]


def _on_grid(result: StagedResult) -> Tensor:
    """The images with the edges that the grid adds to what was asked for, as their last rows and columns repeated."""
    images, plan = result.images, result.plan
    rows, columns = plan.asked_area
    if images.shape[-2:] != (rows.stop - rows.start, columns.stop - columns.start):
        return images
    edges = (columns.start, plan.width - columns.stop, rows.start, plan.height - rows.stop)
    return torch.nn.functional.pad(images, edges, mode="replicate")
