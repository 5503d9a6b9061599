"""`MrFlow`: the staged method for a loaded diffusers pipeline, in one call.

    from diffusers import FluxPipeline
    from mrflow_sched import MrFlow

    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")
    image = MrFlow(pipe, upscaler="RealESRGAN_x2plus.pth")("a lighthouse at dawn", width=1024, height=1024).images[0]

The pipeline itself is not changed. docs/diffusers.md has an example per family.
"""

from __future__ import annotations

import difflib
import inspect
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.compiled import NetworkCompiler
from mrflow_sched.engines.diffusers.layouts import find_layout
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine, given_embeddings
from mrflow_sched.engines.diffusers.view import HINT
from mrflow_sched.images.convert import from_pictures, to_pil
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.options import CallOptions
from mrflow_sched.plan.sizes import fit_box
from mrflow_sched.sampler import sample_staged
from mrflow_sched.upscaling.lanczos import resize_lanczos
from mrflow_sched.upscaling.load import load_upscaler

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mrflow_sched.engines.diffusers.layouts import Layout
    from mrflow_sched.plan.families import Family
    from mrflow_sched.plan.options import MadeOptions
    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.sampler import StagedResult, StageImage
    from mrflow_sched.sampling.method import Method
    from mrflow_sched.sampling.progress import Progress, StageTiming
    from mrflow_sched.upscaling.role import PixelUpscaler

    class _More(CallOptions, total=False, extra_items=Any):
        """What a call takes besides: options of the plan, and whatever the pipeline's own call takes."""


__all__ = ["MrFlow", "MrFlowOutput"]

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Options of a plan that the call takes by these names. A pipeline's `sigmas` are shifted, a plan's are not: neither is
# accepted, so that neither is mistaken for the other.
_PLAN_OPTIONS = frozenset(CallOptions.__annotations__)
# Arguments of a pipeline's call that a plan decides, and what to use in their place.
_DECIDED = {
    "num_inference_steps": "low_steps and refine_steps",
    "sigmas": "low_steps, refine_steps and sigma",
    "timesteps": "low_steps, refine_steps and sigma",
    "latents": "seed, or image with strength to start from an image",
    "return_dict": "the images of what the call returns",
    "max_area": "width and height",
}
_DRAWN_SEEDS = 2**32


@dataclass(frozen=True)
class MrFlowOutput:
    """What a run produced.

    Attributes:
        images: In the form that `output_type` asks for: a list of PIL images, an array (B, H, W, C) or a tensor (B, C,
            H, W), both in [0, 1], or the packed latents. Where `unfinished`, the best so far, at the size they had
            then.
        plan: All numbers of the run.
        seeds: One per image; `seed=output.seeds[i]` makes image i again.
        timings: Seconds of every part.
        stages: The intermediate images; empty unless `keep_stages` was set.
        warnings: One sentence each, for the user; the plan's notes among them.
        cancelled: Stopped by the caller.
        unfinished: Cancelled, or out of memory.
    """

    images: Any
    plan: StagedPlan
    seeds: tuple[int, ...]
    timings: tuple[StageTiming, ...]
    stages: tuple[StageImage, ...]
    warnings: tuple[str, ...]
    cancelled: bool
    unfinished: bool


class MrFlow:
    """Staged sampling with a loaded diffusers text-to-image pipeline: FLUX, SD3, Qwen-Image, Z-Image, Sana, ...

    Attributes:
        pipe: The pipeline that was given.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        upscaler: str | Path | PixelUpscaler | None = None,
        family: str | None = None,
        compile_mode: str | None = None,
    ) -> None:
        """Take a loaded `pipe`, which stays as it is and stays usable.

        Args:
            pipe: A text-to-image pipeline of diffusers.
            upscaler: An ESRGAN-type file (.safetensors, .pth), or any callable with the signature of `PixelUpscaler`;
                None:
                images are upscaled with Lanczos, which adds no detail.
            family: Name of the family (`FAMILIES`), where you know better than its class and configuration.
            compile_mode: A mode of `torch.compile` ("default", "reduce-overhead" with CUDA graphs, ...): compiles the
                network for the first stage, once per size; it pays over many images.

        Raises:
            MrFlowError: A pipeline whose stages cannot be run, an unknown mode, or a file that is not an upscaler.
        """
        self.pipe = pipe
        self._compiler = None if compile_mode is None else NetworkCompiler(compile_mode)
        self._family = family
        self._layout = find_layout(pipe, family)
        self._file = upscaler if isinstance(upscaler, (str, Path)) else None
        self._upscaler = None if isinstance(upscaler, (str, Path)) else upscaler
        if self._file is not None:
            self._upscaler = load_upscaler(self._file, device=self._layout.device)

    @property
    def family(self) -> Family:
        """The family of the pipeline, with the shift rule of its own scheduler."""
        return self._layout.family

    @property
    def experimental(self) -> bool:
        """Whether the method has not been validated on this kind of model."""
        return self._layout.experimental

    def plan(
        self,
        width: int | None = None,
        height: int | None = None,
        preset: str | None = None,
        **options: Unpack[MadeOptions],
    ) -> StagedPlan:
        """The plan that a call with these arguments would run.

        Args:
            width: Of the final image in pixels; None: the family's usual.
            height: Likewise.
            preset: "12+1" (low-resolution + refine steps), "fast", "balanced" or "best"; None: the family's default.
            **options: As in `make_plan`.

        Returns:
            The plan.

        Raises:
            MrFlowError: A value out of range.
        """
        wide, high = _size(self.family, width, height)
        return make_plan(self.family, wide, high, preset, **options)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        width: int | None = None,
        height: int | None = None,
        preset: str | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        image: Any = None,
        strength: float | None = None,
        callback: Callable[[Progress], object] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        cancel: Callable[[], bool] | None = None,
        keep_stages: bool = False,
        method: Method | None = None,
        **more: Unpack[_More],
    ) -> MrFlowOutput:
        """Make images: few steps at low resolution, super-resolution, a little noise, one step at full size.

        Args:
            prompt: One, or a list.
            width: Of the final image in pixels; None: the family's usual, or what follows from `image`.
            height: Likewise.
            preset: "12+1" (low-resolution + refine steps), "fast", "balanced" or "best"; None: the family's default.
            negative_prompt: One, or one per prompt.
            num_images_per_prompt: Images of each prompt.
            guidance_scale: As the pipeline takes it; 1, or the pipeline's own value, turns it off. None: the family's.
            seed: One (further images take the next), or one per image.
            generator: One seed per image is drawn from it; a list gives one seed each. With neither, seeds are random
                and returned in the result.
            output_type: "pil", "np", "pt" or "latent".
            image: A PIL image, array or tensor in [0, 1]: upscaled and refined in place of stage 1. Alpha is kept.
            strength: With `image`: the flow sigma, above 0 and at most 1, at which stage 1 starts from it.
            callback: Called with `Progress` at every part and step.
            callback_on_step_end: The pipeline's own, called in every stage; `step` counts from 0 in each.
            callback_on_step_end_tensor_inputs: The pipeline's own.
            cancel: Polled at every step; True stops the run.
            keep_stages: Keep the intermediate images.
            method: How stages are sampled and joined; None: what the plan asks for.
            **more: Options of the plan (`make_plan`: low_steps, refine_steps, sigma, factor, stages, solver, ...);
                every other name goes to the pipeline's call in every stage (prompt_2, prompt_embeds,
                joint_attention_kwargs, `control_image`, which may be a function (width, height) -> hint).

        Returns:
            The images with plan, seeds, timings and warnings; the best so far where the run was cancelled or memory ran
            out after stage 1.

        Raises:
            MrFlowError: An argument that does not fit.
        """
        if output_type not in _OUTPUT_TYPES:
            raise MrFlowError(f"output_type must be one of {', '.join(_OUTPUT_TYPES)}, got {output_type!r}.")
        layout = find_layout(self.pipe, self._family)
        numbers, arguments = self._sorted(more, layout.call_names)
        if callback_on_step_end is not None:
            arguments["callback_on_step_end"] = callback_on_step_end
        if callback_on_step_end_tensor_inputs is not None:
            arguments["callback_on_step_end_tensor_inputs"] = list(callback_on_step_end_tensor_inputs)
        prompts = _prompts(prompt, arguments, num_images_per_prompt)
        negatives = _negatives(negative_prompt, len(prompts), num_images_per_prompt)
        seeds = _seeds(seed, generator, len(prompts))
        _check_image(self.pipe, image, arguments)
        pixels, alpha = (None, None) if image is None else _pixels(image)
        two = _guided_by_two(layout, arguments, negatives)
        if two:
            layout = layout.guided_by_two()
            if guidance_scale is not None:
                arguments["guidance_scale"], guidance_scale = guidance_scale, None
        if strength is not None and pixels is None:
            raise MrFlowError(f"strength={strength!r} needs an image to start from; give image too, or leave it out.")
        if pixels is not None and (width is None or height is None):
            factor = 1.0 if strength is not None else _total_factor(layout.family, numbers)
            width, height = _image_size(pixels, width, height, factor)
        wide, high = _size(layout.family, width, height)
        scale = _guidance(layout, guidance_scale, arguments)
        if scale is not None:
            numbers["guidance"] = scale
        plan = make_plan(layout.family, wide, high, preset, seed=seeds[0], **numbers)
        if plan.tile and arguments.get(HINT) is not None:
            raise MrFlowError(f"tile={plan.tile} would give every tile the whole {HINT}; leave one of the two out.")
        engine = PipelineEngine(
            self.pipe,
            family=self._family,
            arguments=arguments,
            seeds=seeds,
            compiler=self._compiler,
            guided_by_two=two,
        )
        result = sample_staged(
            engine,
            plan,
            prompts,
            negative_prompt=negatives,
            upscaler=self._upscaler_on(engine.device),
            callback=callback,
            cancel=cancel,
            keep_stages=keep_stages,
            image=pixels,
            start_sigma=strength,
            seeds=seeds,
            method=method,
        )
        notes = _notes(plan, pixels is not None and strength is None)
        return MrFlowOutput(
            images=_formatted(result, alpha, output_type, engine),
            plan=plan,
            seeds=seeds,
            timings=result.timings,
            stages=result.stages,
            warnings=tuple(dict.fromkeys((*notes, *_image_warnings(self.pipe, image, layout), *result.warnings))),
            cancelled=result.cancelled,
            unfinished=result.unfinished,
        )

    def _sorted(self, more: Mapping[str, Any], call_names: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """`more` as (options of the plan, arguments of the pipeline's call); any other name is refused."""
        numbers: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        for name, value in more.items():
            if name in _PLAN_OPTIONS:
                numbers[name] = value
            elif name in _DECIDED:
                raise MrFlowError(f"{name} is not accepted, as the plan decides it; use {_DECIDED[name]}.")
            elif name in call_names or (name == HINT and _has_control(self.pipe)):
                arguments[name] = value
            else:
                known = sorted({*_PLAN_OPTIONS, *call_names, *inspect.signature(MrFlow.__call__).parameters} - {"self"})
                near = difflib.get_close_matches(name, known, n=3)
                hint = f"did you mean {' or '.join(near)}" if near else "make_plan and the pipeline's call list them"
                raise MrFlowError(
                    f"{name} is neither a plan option nor an argument of {type(self.pipe).__name__}; {hint}."
                )
        return numbers, arguments

    def _upscaler_on(self, device: torch.device) -> PixelUpscaler | None:
        """The upscaler; one that was read from a file moves with the pipeline."""
        loaded = cast("Any", self._upscaler)
        if self._file is not None and loaded.device.type != device.type:
            self._upscaler = load_upscaler(self._file, device=device)
        return self._upscaler


# -------------------------------------------------------------------------------------------------------- what is asked


def _size(family: Family, width: int | None, height: int | None) -> tuple[int, int]:
    usual = family.default_size or family.native_size
    return usual[0] if width is None else width, usual[1] if height is None else height


def _prompts(prompt: str | Sequence[str] | None, arguments: Mapping[str, Any], each: int) -> list[str]:
    """One prompt per image, images of one prompt side by side; empty ones where embeddings are given."""
    if each < 1:
        raise MrFlowError(f"num_images_per_prompt must be a whole number of at least 1, got {each!r}.")
    embedded = given_embeddings(arguments)
    if prompt is None and not embedded:
        raise MrFlowError("prompt is missing; describe the image, or give prompt_embeds.")
    if prompt is not None and embedded:
        raise MrFlowError("prompt and prompt_embeds are both given; leave one out.")
    texts = [""] * embedded if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts:
        raise MrFlowError("prompt is empty; describe the image.")
    return [text for text in texts for _ in range(each)]


def _negatives(negative: str | Sequence[str] | None, batch: int, each: int) -> list[str] | None:
    if negative is None:
        return None
    texts = [negative] * (batch // each) if isinstance(negative, str) else list(negative)
    if len(texts) * each != batch:
        raise MrFlowError(
            f"negative_prompt must be one text or one per prompt, got {len(texts)} for {batch // each} prompts."
        )
    return [text for text in texts for _ in range(each)]


def _seeds(
    seed: int | Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
) -> tuple[int, ...]:
    """One seed per image. Seeds are drawn from a generator, so that its next use gives other images."""
    if seed is not None and generator is not None:
        raise MrFlowError("seed and generator are both given; leave one out.")
    if generator is not None:
        one = isinstance(generator, torch.Generator)
        sources = [generator] * batch if one else list(generator)
        drawn = [int(torch.randint(_DRAWN_SEEDS, (), generator=each, device=each.device)) for each in sources]
        return _one_per_image(drawn, "generator", batch)
    if seed is None:
        first = secrets.randbelow(_DRAWN_SEEDS)
        return tuple(range(first, first + batch))
    if isinstance(seed, Sequence):
        return _one_per_image(list(seed), "seed", batch)
    return tuple(range(int(seed), int(seed) + batch))


def _one_per_image(values: list[int], name: str, batch: int) -> tuple[int, ...]:
    if len(values) != batch:
        raise MrFlowError(f"{name} must be one, or one per image, got {len(values)} for {batch} images.")
    return tuple(values)


def _has_control(pipe: Any) -> bool:
    """Whether a pipeline takes a control image: a ControlNet or a T2I-Adapter."""
    return any(getattr(pipe, name, None) is not None for name in ("controlnet", "adapter"))


def _check_image(pipe: Any, image: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse a controlled pipeline without its hint, which has another name here than in some pipelines."""
    if not _has_control(pipe) or arguments.get(HINT) is not None:
        return
    given = "is missing" if image is None else "is missing, as image is what MrFlow starts from"
    raise MrFlowError(
        f"{HINT} {given}; {type(pipe).__name__} needs a control image: give it as {HINT} (it is resized for "
        "every stage), or as a function (width, height) -> hint."
    )


def _image_warnings(pipe: Any, image: Any, layout: Layout) -> tuple[str, ...]:
    """A sentence where `image` means something else in the pipeline's own call: a reference to edit."""
    if image is None or "image" not in layout.call_names or _has_control(pipe):
        return ()
    return (f"image is upscaled and refined; MrFlow does not pass it to {type(pipe).__name__} as a reference to edit.",)


def _guided_by_two(layout: Layout, arguments: Mapping[str, Any], negatives: Sequence[str] | None) -> bool:
    """Whether a family with embedded guidance is to be guided by a negative branch in addition (true CFG)."""
    scale = arguments.get("true_cfg_scale")
    if layout.family.guidance_kind == "cfg" or not isinstance(scale, (int, float)) or scale <= 1.0:
        return False
    return negatives is not None or arguments.get("negative_prompt_embeds") is not None


def _guidance(layout: Layout, scale: float | None, arguments: dict[str, Any]) -> float | None:
    """The plan's guidance, from the pipeline's own argument for it, which is taken out of `arguments`."""
    if "true_cfg_scale" in arguments and "true_cfg_scale" in layout.guidance_arguments(2.0):
        scale = arguments.pop("true_cfg_scale")
    if scale is None or (layout.family.guidance_kind == "none" and scale in (0.0, 1.0)):
        return None  # model cards of distilled models write 0 where others write 1
    return layout.plan_guidance(scale)


def _total_factor(family: Family, numbers: Mapping[str, Any]) -> float:
    """Final side over the side of the first stage."""
    if numbers.get("factors"):
        return math.prod(numbers["factors"])
    steps = (numbers.get("stages") or 2) - 1
    return float(numbers.get("factor") or family.factor) ** steps


def _image_size(image: Tensor, width: int | None, height: int | None, factor: float) -> tuple[int, int]:
    """Width and height of an image upscaled by `factor`, or fitted to the one side that is given."""
    rows, columns = image.shape[-2:]
    if width is None and height is None:
        return round(columns * factor), round(rows * factor)
    if width is None:
        return round(columns * (height or rows) / rows), height or rows
    return width, round(rows * width / columns)


def _notes(plan: StagedPlan, upscaling: bool) -> tuple[str, ...]:
    """The plan's notes; an upscaled image has no stage 1 to note."""
    return tuple(note for note in plan.notes if not (upscaling and note.startswith("Stage 1 at")))


# -------------------------------------------------------------------------------------------------------- what is given


def _pixels(image: Any) -> tuple[Tensor, Tensor | None]:
    """(colour (B, 3, H, W), alpha (B, 1, H, W) or None) of one image or several, float32 in [0, 1]."""
    values = from_pictures(image)
    alpha = values[:, -1:] if values.shape[1] in (2, 4) else None
    colour = values if alpha is None else values[:, :-1]
    return colour.expand(-1, 3, -1, -1).contiguous(), alpha


def _formatted(result: StagedResult, alpha: Tensor | None, output_type: str, engine: PipelineEngine) -> Any:
    """The result's images in the form that was asked for, as the pipeline would return them."""
    if output_type == "latent":
        latents = engine.encode(result.images) if result.latents is None else result.latents
        return engine.layout.pack(latents).to(engine.dtype)
    images = engine.finish(result.images.nan_to_num())
    if alpha is not None:
        fitted = _fit(alpha.to(images), images.shape[-1], images.shape[-2]).expand(len(images), -1, -1, -1)
        images = torch.cat([images, fitted], dim=1)
    if output_type == "pt":
        return images
    if output_type == "np":
        return images.permute(0, 2, 3, 1).cpu().numpy()
    return [to_pil(image) for image in images]


def _fit(channel: Tensor, width: int, height: int) -> Tensor:
    """`channel` resized as the image was: filled and cropped at the centre, never stretched."""
    wide, high, left, top = fit_box(channel.shape[-1], channel.shape[-2], width, height)
    return resize_lanczos(channel, wide, high)[..., top : top + height, left : left + width].clamp(0, 1)
