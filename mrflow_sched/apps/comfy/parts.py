"""What the nodes do, on ComfyUI's objects: noise, sigmas, conditioning for a stage, the handoff, the last crop.

Images are ComfyUI's: (B, H, W, C), floats in [0, 1]. Stages are counted from 1.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.comfy import host
from mrflow_sched.apps.comfy.family import fit_of, mixes_as_flow
from mrflow_sched.apps.comfy.planned import Planned
from mrflow_sched.plan.notes import fitting_note
from mrflow_sched.plan.stages import Stage
from mrflow_sched.sampling.faults import bad_rows
from mrflow_sched.sampling.handoff import stage_noise, upscale_or_resize
from mrflow_sched.sampling.noise import model_sigmas, stage_seed
from mrflow_sched.sampling.shrink import shrink_noise
from mrflow_sched.upscaling.fit import NO_MODEL, upscale_to

__all__ = [
    "StageNoise",
    "check_negative",
    "decoded",
    "gathered",
    "handed_over",
    "picked",
    "stage_guider",
    "stage_sigmas",
]

logger = logging.getLogger("mrflow")

_NO_MODEL = (
    "No upscale model is connected, so the image was upscaled with Lanczos, which leaves fine detail soft; connect "
    "Load Upscale Model."
)


# --------------------------------------------------------------------------------------------------------------- noise


class StageNoise:
    """A NOISE: every image of a batch has the noise that it has alone.

    Attributes:
        seed: Of the first image's noise in this stage.
    """

    def __init__(self, planned: Planned, number: int) -> None:
        """The noise of one stage.

        Args:
            planned: The plan.
            number: Of the stage.

        Raises:
            MrFlowError: The plan has no such stage.
        """
        self._planned, self._index = planned, number - 1
        self._stage = planned.stage(number)
        self.seed = stage_seed(planned.plan.seed, 0, self._index, planned.plan.seed_rule)

    def generate_noise(self, input_latent: dict[str, Any]) -> Tensor:
        """Draw it.

        Args:
            input_latent: A LATENT; its `batch_index` tells the images' numbers where they are not 0, 1, 2.

        Returns:
            Standard normal noise in the shape of its samples, float32, on the CPU.
        """
        samples, plan = input_latent["samples"], self._planned.plan
        numbers: Sequence[int] = input_latent.get("batch_index") or range(len(samples))
        seeds = [stage_seed(plan.seed, int(number), self._index, plan.seed_rule) for number in numbers]
        shape = tuple(samples.shape[1:])
        if self._index > 0 or plan.noise == "own":
            return stage_noise(shape, plan.posterior, seeds)
        *channels, rows, columns = shape
        full = (rows * plan.height // self._stage.height, columns * plan.width // self._stage.width)
        large = stage_noise((*channels, *full), plan.posterior, seeds)
        return shrink_noise(large.flatten(1, -3), rows, columns).reshape(len(seeds), *shape)


# -------------------------------------------------------------------------------------------------------------- sigmas


def stage_sigmas(planned: Planned, model: Any, number: int) -> Tensor:
    """SIGMAS of one stage, in the units of the model.

    Args:
        planned: The plan.
        model: The MODEL that is to walk them.
        number: Of the stage.

    Returns:
        Float32, falling to 0.

    Raises:
        MrFlowError: The plan has no such stage.
    """
    stage = planned.stage(number)
    _check_model(planned, model)
    units = "flow" if mixes_as_flow(model) else "epsilon"
    largest = float(host.model_sampling(model).sigma_max)
    return torch.tensor(model_sigmas(stage.sigmas, units, largest), dtype=torch.float32)


# -------------------------------------------------------------------------------------------------------- conditioning


def stage_guider(planned: Planned, model: Any, positive: Any, negative: Any, number: int, cfg: float) -> Any:
    """A GUIDER for one stage.

    Args:
        planned: The plan.
        model: A MODEL.
        positive: CONDITIONING for the final size.
        negative: Likewise, or None.
        number: Of the stage.
        cfg: The scale; 0: the plan's.

    Returns:
        ComfyUI's object.

    Raises:
        MrFlowError: There is no negative conditioning and the scale is not 1, or the conditioning cannot be used at
            another size.
    """
    _check_model(planned, model)
    stage, scale = planned.stage(number), cfg or planned.scale(number)
    if scale != 1.0 and planned.family.guidance_kind == "none":
        raise MrFlowError(f"cfg must be 0 or 1 for {planned.family.title}, which is distilled; got {scale:g}.")
    check_negative(negative, "cfg", scale)
    sides = (stage.height / planned.plan.height, stage.width / planned.plan.width)
    for_stage = _sized(positive, sides)
    return host.guider(model, for_stage, for_stage if negative is None else _sized(negative, sides), scale)


def check_negative(negative: Any, name: str, scale: float) -> None:
    """Refuse CFG without a negative conditioning.

    Args:
        negative: CONDITIONING or a link to it; None: not connected.
        name: Of the input that holds the scale.
        scale: 1 is off.

    Raises:
        MrFlowError: `negative` is needed.
    """
    if negative is None and scale != 1.0:
        raise MrFlowError(
            f"negative is not connected, and {name} {scale:g} needs it; connect an encoded text (it may be empty), or "
            f"set {name} to 1."
        )


def _sized(conditioning: Any, sides: tuple[float, float]) -> Any:
    """Conditioning whose areas are those of a stage: ComfyUI counts them in latents of the final image."""
    made: list[Any] = []
    for tensor, facts in conditioning:
        if "concat_latent_image" in facts:
            raise MrFlowError(
                "the conditioning holds an image of the final size (concat_latent_image: inpainting, editing), which "
                "other stages cannot take; make the image without MrFlow, and refine it with conditioning of text."
            )
        area = facts.get("area")
        if area is not None and area[0] != "percentage":
            half = len(area) // 2  # sizes, then offsets; the last two of each are rows and columns
            scaled = tuple(
                value if each % half < half - 2 else round(value * sides[each % half - half + 2])
                for each, value in enumerate(area)
            )
            facts = {**facts, "area": tuple(max(value, 1) for value in scaled[:half]) + scaled[half:]}
        made.append([tensor, facts])
    return made


# ------------------------------------------------------------------------------------------------------ images, latents


def decoded(planned: Planned, samples: Tensor, vae: Any, number: int) -> Tensor:
    """The images of a stage's latents; those of the last stage without the edges that the model's grid added.

    Args:
        planned: The plan.
        samples: (B, C, h, w) or (B, C, 1, h, w).
        vae: A VAE.
        number: Of the stage.

    Returns:
        Images.

    Raises:
        MrFlowError: The plan has no such stage, or the latents are another model's, or a video's.
    """
    planned.stage(number)
    _check_latents(planned, samples, "samples")
    _check_whole(
        samples,
        f"the model returned NaN or infinity in stage {number}",
        "start ComfyUI with --bf16-unet, or change what patches the model",
    )
    images = vae.decode(samples)
    _check_whole(images, f"the VAE returned NaN or infinity in stage {number}", "start ComfyUI with --fp32-vae")
    if images.ndim == 5:  # of a VAE with an axis of time
        images = images.reshape(-1, *images.shape[-3:])
    return cropped(planned, images) if number == len(planned.plan.stages) else images


def cropped(planned: Planned, images: Tensor) -> Tensor:
    """Images of the final size without the edges that the model's grid added.

    Args:
        planned: The plan.
        images: Images; those of another size are left alone.

    Returns:
        Images of the size that was asked for.
    """
    rows, columns = planned.plan.asked_area
    whole = tuple(images.shape[1:3]) == (planned.plan.height, planned.plan.width)
    return images[:, rows, columns] if whole else images


def picked(images: Tensor, index: int, count: int) -> Tensor:
    """Some images of a batch.

    Args:
        images: Images.
        index: Of the first one, from 0.
        count: How many; 0: all from there on.

    Returns:
        Images.

    Raises:
        MrFlowError: The batch does not hold them.
    """
    last = index + count if count else len(images)
    if not 0 <= index < len(images) or last > len(images):
        raise MrFlowError(
            f"index {index} and count {count} pick images of a batch that holds {len(images)}; index counts from 0."
        )
    return images[index:last]


def gathered(images: Sequence[Tensor]) -> Tensor:
    """One batch of what a list of inputs made.

    Args:
        images: Images, at least one.

    Returns:
        Images.

    Raises:
        MrFlowError: They are of several sizes.
    """
    sizes = dict.fromkeys(f"{each.shape[2]}x{each.shape[1]}" for each in images)
    if len(sizes) > 1:
        raise MrFlowError(
            f"a list of inputs made images of {', '.join(sizes)}, which are no batch; give what makes one size."
        )
    return images[0] if len(images) == 1 else torch.cat(list(images))


def handed_over(
    planned: Planned, images: Tensor, vae: Any, upscale_model: Any, number: int, index: int = 0
) -> tuple[dict[str, Any], Tensor, str]:
    """Carry images to a stage: enlarge them to its size, never stretched, and encode them. ComfyUI adds the noise.

    Args:
        planned: The plan.
        images: What the stage before made.
        vae: A VAE.
        upscale_model: An UPSCALE_MODEL; None: Lanczos.
        number: Of the stage, from 2.
        index: Number of the first image in the batch that it was made in, which its seed follows.

    Returns:
        A LATENT, the enlarged images, and what went wrong ("" for nothing).

    Raises:
        MrFlowError: The plan has no such stage, or the VAE is another model's, or a video's.
    """
    stage, said = planned.stage(number), list[str]()
    if number < 2:
        raise MrFlowError(f"stage must be from 2 on for a handoff, which carries stage 1 to it, got {number}.")
    large = _enlarged(images, stage, upscale_model, said)
    said = [_NO_MODEL if sentence == NO_MODEL else sentence for sentence in said]
    crop = fitting_note("The image", (images.shape[2], images.shape[1]), (stage.width, stage.height))
    before = planned.plan.stages[number - 2]
    if crop is not None and tuple(images.shape[1:3]) != (before.height, before.width):
        said.append(crop)  # where it has the size of the stage before, the plan's notes say so
    for sentence in said:
        logger.warning("MrFlow: %s", sentence)
    samples = host.encode(vae, large)
    _check_latents(planned, samples, "the VAE", stage)
    _check_whole(samples, "the VAE returned NaN or infinity", "start ComfyUI with --fp32-vae")
    return {"samples": samples, "batch_index": list(range(index, index + len(images)))}, large, " ".join(said)


def _enlarged(images: Tensor, stage: Stage, upscale_model: Any, said: list[str]) -> Tensor:
    colours, alpha = images[..., :3].movedim(-1, 1).float(), images[..., 3:4].movedim(-1, 1).float()
    model = None if upscale_model is None else _HostUpscaler(upscale_model)
    try:
        large = upscale_or_resize(colours, stage, model, cancel=None, warn=said.append)
    except Cancelled as stopped:
        raise (stopped.__cause__ or stopped) from None  # ComfyUI's own interrupt
    if alpha.shape[1]:
        fitted = upscale_to(alpha.expand(-1, 3, -1, -1), stage.width, stage.height)
        large = torch.cat([large, fitted[:, :1]], dim=1)
    return large.movedim(1, -1)


class _HostUpscaler:
    # ComfyUI's UPSCALE_MODEL in our role of an upscaler.

    def __init__(self, model: Any) -> None:
        self._model = model
        self.name = str(getattr(getattr(model, "architecture", None), "name", "upscale_model"))
        self.scale = int(model.scale)

    def __call__(self, images: Tensor) -> Tensor:
        try:
            return host.upscale(self._model, images.movedim(1, -1)).movedim(-1, 1)
        except Exception as error:
            if host.is_interrupt(error):
                raise Cancelled from error
            raise


def _check_model(planned: Planned, model: Any) -> None:
    fit = fit_of(model)
    if fit != planned.fit:
        raise MrFlowError(
            f"the plan was made for {planned.fit.engine}, and the model is {fit.engine}; connect one model to both."
        )


def _check_latents(planned: Planned, samples: Tensor, name: str, stage: Stage | None = None) -> None:
    if samples.ndim == 5 and samples.shape[2] != 1:
        raise MrFlowError(f"{name} gives {samples.shape[2]} frames of a video; give a single image.")
    if samples.shape[1] != planned.fit.channels:
        raise MrFlowError(
            f"{name} gives latents of {samples.shape[1]} channels, and those of {planned.fit.engine} have "
            f"{planned.fit.channels}; connect what belongs to that model."
        )
    if stage is not None and samples.shape[-1] * planned.fit.ratio != stage.width:
        raise MrFlowError(
            f"{name} gives latents of {samples.shape[-1]} columns for {stage.width} pixels, and {planned.fit.engine} "
            f"has one for {planned.fit.ratio}; connect what belongs to that model."
        )


def _check_whole(values: Tensor, fault: str, advice: str) -> None:
    """Refuse a batch of which no image is whole; say which are not, where some are."""
    bad = bad_rows(values)
    if len(bad) == len(values):
        raise MrFlowError(f"{fault}; {advice}.")
    if bad:
        logger.warning("MrFlow: %s for image %s of the batch.", fault, ", ".join(str(row + 1) for row in sorted(bad)))
