"""`MrFlow`: the staged method for a loaded diffusers pipeline, in one call.

    from mrflow_sched import MrFlow
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")
    image = MrFlow(pipe, upscaler="RealESRGAN_x2plus.pth")("a lighthouse at dawn", width=1024, height=1024).images[0]

The pipeline itself is not changed. docs/diffusers.md has an example per family.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor

from mrflow_sched._runtime.device import resolve_device
from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.apps.asked import (
    check_pipe,
    images_of,
    prompts_of,
    refine_texts,
    scale_of,
    seeds_of,
    strength_of,
    tensor_inputs_of,
    texts_of,
)
from mrflow_sched.apps.drafting import MrFlowDraft, make_drafts
from mrflow_sched.apps.formatted import formatted
from mrflow_sched.apps.options import DECIDED, PLAN_OPTIONS, FileUpscaler, unknown_argument, unknown_option, upscaler_of
from mrflow_sched.apps.pictures import check_pictures, inpainting_of, reading_of, references_of, size_like
from mrflow_sched.engines.diffusers.arguments import check_arguments
from mrflow_sched.engines.diffusers.compiled import NetworkCompiler
from mrflow_sched.engines.diffusers.editing import Pictures
from mrflow_sched.engines.diffusers.folder import load_pipeline
from mrflow_sched.engines.diffusers.layouts import find_layout
from mrflow_sched.engines.diffusers.layouts.base import parameter_names
from mrflow_sched.engines.diffusers.layouts.pictures import edits_as_classic, picture_arguments
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine
from mrflow_sched.engines.diffusers.precision import LoweredNetworks, check_precision
from mrflow_sched.engines.diffusers.view import HINT
from mrflow_sched.images.alpha import split_alpha
from mrflow_sched.images.convert import from_pictures
from mrflow_sched.methods import method_of
from mrflow_sched.plan.checks import checked_flag, checked_side, checked_whole, listed
from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.notes import idle_notes
from mrflow_sched.plan.options import CallOptions
from mrflow_sched.plan.sizes import from_an_image, size_step
from mrflow_sched.sampler import sample_staged
from mrflow_sched.sampling.request import check_function
from mrflow_sched.upscaling.role import kind_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mrflow_sched.drafts import TextMemory
    from mrflow_sched.engines.diffusers.layouts import Layout
    from mrflow_sched.plan.checks import UpscalerKind
    from mrflow_sched.plan.cost import Offload
    from mrflow_sched.plan.families import Family
    from mrflow_sched.plan.options import MadeOptions
    from mrflow_sched.plan.stages import StagedPlan
    from mrflow_sched.sampler import Fault, StageImage
    from mrflow_sched.sampling.method import Method
    from mrflow_sched.sampling.progress import Progress, StageTiming
    from mrflow_sched.upscaling.role import PixelUpscaler

    class _More(CallOptions, total=False, extra_items=Any):
        """What a call takes besides: options of the plan, and whatever the pipeline's own call takes."""


__all__ = ["MrFlow", "MrFlowOutput"]

logger = logging.getLogger(__name__)

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_OF_FINISH = ("output_type", "keep_stages", "callback", "cancel")


@dataclass(frozen=True)
class MrFlowOutput:
    """What a run produced.

    Attributes:
        images: In the form that `output_type` asks for: a list of PIL images, an array (B, H, W, C) or a tensor (B, C,
            H, W), both in [0, 1], or the packed latents. C is 4 where images have transparency. Where `unfinished`, the
            best so far, at the size they had then.
        plan: All numbers of the run.
        seeds: One per image; `seed=output.seeds[i]` makes image i again.
        timings: Seconds of every part.
        stages: The intermediate images; empty unless `keep_stages` was set.
        warnings: One sentence each, for the user; the plan's notes among them.
        cancelled: Stopped by the caller.
        unfinished: Cancelled, out of memory, or a part failed for an image.
        faults: For each image, the part that failed first (`sampler.Fault`: part, stage, step); None where none did.
        nsfw_content_detected: For each image, whether the pipeline's safety checker made it black; None where the
            pipeline has no checker, and for latents, which are not judged.
    """

    images: Any
    plan: StagedPlan
    seeds: tuple[int, ...]
    timings: tuple[StageTiming, ...]
    stages: tuple[StageImage, ...]
    warnings: tuple[str, ...]
    cancelled: bool
    unfinished: bool
    faults: tuple[Fault | None, ...] = ()
    nsfw_content_detected: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class _Asked:
    """The arguments of a call that `MrFlow` itself reads, as `MrFlow.__call__` describes them."""

    width: int | None = None
    height: int | None = None
    preset: str | None = None
    negative_prompt: str | Sequence[str] | None = None
    refine_prompt: str | Sequence[str] | None = None
    refine_negative_prompt: str | Sequence[str] | None = None
    refine_lora_scale: float | None = None
    num_images_per_prompt: int = 1
    guidance_scale: float | None = None
    seed: int | Sequence[int] | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    output_type: str = "pil"
    image: Any = None
    reference_image: Any = None
    inpaint_image: Any = None
    mask_image: Any = None
    strength: float | None = None
    callback: Callable[[Progress], object] | None = None
    callback_on_step_end: Callable[..., Any] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] | None = None
    cancel: Callable[[], bool] | None = None
    keep_stages: bool = False
    method: Method | str | None = None
    refine_mask: Any = None


class MrFlow:
    """Staged sampling with a loaded diffusers text-to-image pipeline: FLUX, SD3, Qwen-Image, Z-Image, Sana, ...

    Attributes:
        pipe: The pipeline that was given.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        upscaler: str | os.PathLike[str] | PixelUpscaler | None = None,
        upscaler_dtype: str | torch.dtype = "auto",
        upscaler_tile: int | None = None,
        family: str | None = None,
        compile_mode: str | None = None,
        precision: str | Mapping[str, str] | None = None,
        colour_guard: bool = False,
    ) -> None:
        """Take a loaded `pipe`, which stays as it is and stays usable.

        Args:
            pipe: A text-to-image pipeline of diffusers, classic or modular.
            upscaler: An ESRGAN-type file (.safetensors, .pth), a model that spandrel loaded, or any `PixelUpscaler`;
                None or "lanczos": images are upscaled with Lanczos, which adds no detail, so presets refine more.
            upscaler_dtype: What a file's model runs in: "float32", "float16", "bfloat16", or "auto", as in
                `load_upscaler`.
            upscaler_tile: Largest side in input pixels that a file's model is given at once; None: the whole image, and
                tiles only where memory runs out.
            family: Name of the family (`FAMILIES`), where you know better than its class and configuration.
            compile_mode: A mode of `torch.compile` ("default", "reduce-overhead" with CUDA graphs, ...): compiles the
                network for the first stage, once per size; it pays over many images.
            precision: The network in fewer bits for some stages, by torchao: {"stage1": "int8"}, {"refine": "int8"},
                or one name for all; see `engines.diffusers.precision.PRECISIONS`. A twin of the network is kept beside
                it. A call's own `precision` and `refine_precision` take its place.
            colour_guard: Take back a shift of the mean colour that upscaling and refining bring in.

        Raises:
            MrFlowError: A pipeline whose stages cannot be run, an unknown mode, or a file that is not an upscaler.
        """
        check_pipe(pipe)
        self.pipe = pipe
        self._compiler = None if compile_mode is None else NetworkCompiler(compile_mode)
        self._precision, self._lowered = _stage_precisions(precision), LoweredNetworks()
        self._family = family
        self._colour_guard = checked_flag(colour_guard, "colour_guard")
        self._upscaler = upscaler_of(upscaler, upscaler_dtype, upscaler_tile)
        self._layout = find_layout(pipe, family)
        for name in self._precision.values():
            check_precision(name, self._layout.network, self._layout.device)
        self._upscaler_on(self._layout.device)

    def __repr__(self) -> str:
        upscaler = self._upscaler.name if self._upscaler is not None else "lanczos"
        return f"MrFlow({type(self.pipe).__name__}, family={self.family.name!r}, upscaler={upscaler!r})"

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | Mapping[str, str] = "auto",
        offload: bool | Offload = False,
        config: str | Path | None = None,
        **options: Any,
    ) -> MrFlow:
        """Load a local model and take it: as the command line does, without downloads and without running its code.

        Args:
            path: A diffusers folder, or a single-file checkpoint (.safetensors).
            device: "auto" (CUDA if available), or as torch spells it.
            dtype: "auto", a dtype of all parts, or one for each part by name.
            offload: On a GPU only: "model" or True keeps each part on the CPU until it is used, "layers" each layer,
                which takes the least memory and is slow.
            config: For a single file: the diffusers folder that describes it; None: one of the file's name beside it,
                else the folder it lies in.
            **options: Of `MrFlow`; all options are looked at before weights are read.

        Returns:
            The pipeline, ready to be called.

        Raises:
            MrFlowError: A model that cannot be loaded or whose stages cannot be run, or an option as in `MrFlow`.
        """
        for name in set(options) - _names(MrFlow.__init__):
            raise MrFlowError(unknown_option(name, _names(MrFlow.__init__) | _names(MrFlow.from_pretrained)))
        where = resolve_device(device)
        if options.get("family") is not None:
            get_family(options["family"])
        if options.get("compile_mode") is not None:
            NetworkCompiler(options["compile_mode"])
        _stage_precisions(options.get("precision"))
        checked_flag(options.get("colour_guard", False), "colour_guard")
        named = (options.get("upscaler"), options.pop("upscaler_dtype", "auto"), options.pop("upscaler_tile", None))
        upscaler = upscaler_of(*named)
        if isinstance(upscaler, FileUpscaler):
            upscaler.on(where)
        pipe = load_pipeline(path, device=where, dtype=dtype, offload=offload, config=config)
        known: dict[str, Any] = {**options, "upscaler": upscaler}
        return cls(pipe, **known)

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
            preset: Any "N+M" (low-resolution + refine steps), "fast", "balanced" or "best"; None: the family's default.
            **options: As in `make_plan`.

        Returns:
            The plan.

        Raises:
            MrFlowError: A value out of range.
        """
        wide, high = _size(self.family, width, height)
        if options.get("upscaler_kind") is None and not options.get("native"):
            options["upscaler_kind"] = self._upscaler_kind
        return make_plan(self.family, wide, high, preset, **self._with_precision(options))

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        width: int | None = None,
        height: int | None = None,
        preset: str | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        refine_prompt: str | Sequence[str] | None = None,
        refine_negative_prompt: str | Sequence[str] | None = None,
        refine_lora_scale: float | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        image: Any = None,
        reference_image: Any = None,
        inpaint_image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        callback: Callable[[Progress], object] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        cancel: Callable[[], bool] | None = None,
        keep_stages: bool = False,
        method: Method | str | None = None,
        refine_mask: Any = None,
        **more: Unpack[_More],
    ) -> MrFlowOutput:
        """Make images: few steps at low resolution, super-resolution, a little noise, one step at full size.

        Args:
            prompt: One, or a list.
            width: Of the final image in pixels; None: the family's usual, or what follows from the pictures given.
            height: Likewise.
            preset: Any "N+M" (low-resolution + refine steps), "fast", "balanced" or "best"; None: the family's default.
            negative_prompt: One, or one per prompt.
            refine_prompt: Likewise, for the stages after the first; None: `prompt`.
            refine_negative_prompt: Likewise; None: `negative_prompt`.
            refine_lora_scale: The scale of all LoRAs in the stages after the first; None: as in stage 1, where the
                pipeline's own argument sets it (joint_attention_kwargs={"scale": ...}).
            num_images_per_prompt: Images of each prompt.
            guidance_scale: As the pipeline takes it; 1, or the pipeline's own value, turns it off. None: the family's.
            seed: One (further images take the next), or one per image.
            generator: One seed per image is drawn from it; a list gives one seed each. With neither, seeds are random
                and returned in the result.
            output_type: "pil", "np", "pt" or "latent".
            image: A PIL image, array or tensor in [0, 1], or one per prompt: upscaled and refined in place of stage 1.
                Alpha is kept; a model that makes transparent images reads it.
            reference_image: What an editing pipeline looks at (FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit, ...): an image,
                a list where it takes several, or a function (width, height) -> either. Every stage gets them at about
                its own size.
            inpaint_image: For an inpainting pipeline: the picture, or one per prompt, of which a part is painted anew.
                All else of it stays as it is, to the last bit, alpha too.
            mask_image: White where it is painted anew, black where it stays; grey blends.
            strength: With `image` or `inpaint_image`: the flow sigma, above 0 and at most 1, at which stage 1
                starts from it.
            callback: Called with `Progress` at every part and step.
            callback_on_step_end: The pipeline's own, called in every stage; `step` counts from 0 in each.
            callback_on_step_end_tensor_inputs: The pipeline's own.
            cancel: Polled at every step; True stops the run.
            keep_stages: Keep the intermediate images.
            method: How stages are sampled and joined: "jit-4x" or "jit-7x" for Just-in-Time sampling, or a method of
                `mrflow_sched.methods`; None: what the plan asks for.
            refine_mask: A picture, white where later stages refine; elsewhere the upscaled image stays. For networks
                that take tokens with their positions (FLUX.1, FLUX.2).
            **more: Options of the plan (`make_plan`: low_steps, refine_steps, sigma, factor, stages, solver, ...);
                every other name goes to the pipeline's call in every stage (prompt_2, prompt_embeds,
                joint_attention_kwargs, `control_image`, which may be a function (width, height) -> hint).

        Returns:
            The images with plan, seeds, timings and warnings; the best so far where the run was cancelled or memory ran
            out after stage 1.

        Raises:
            MrFlowError: An argument that does not fit.
        """
        own = {name: value for name, value in locals().items() if name not in ("self", "prompt", "more")}
        return self._run(prompt, _Asked(**own), more)[0]

    def draft(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **options: Any,
    ) -> tuple[MrFlowDraft, ...]:
        """Stage 1 alone, cheaply, for many images to choose from; each is sampled by itself.

        Args:
            prompt: One, or a list.
            num_images_per_prompt: Drafts of each prompt.
            seed: As in the call.
            generator: Likewise.
            **options: The other arguments of the call, which hold for the whole run; of `image`, `output_type` and
                `keep_stages` there are none, and of `strength` only with `inpaint_image`. Arrays, tensors and images
                are copied: a draft stays as it is where the caller changes them.

        Returns:
            The drafts, in the order of the images that the call would make.

        Raises:
            MrFlowError: An argument that does not fit.
        """

        def run(text: str | None, values: Mapping[str, Any], memory: TextMemory) -> tuple[MrFlowOutput, Tensor | None]:
            return self._run(text, *_split(values), until=1, memory=memory)

        return make_drafts(run, prompt, num_images_per_prompt, seed, generator, options)

    @overload
    def finish(self, drafts: MrFlowDraft, **options: Any) -> MrFlowOutput: ...
    @overload
    def finish(self, drafts: Sequence[MrFlowDraft], **options: Any) -> list[MrFlowOutput]: ...
    def finish(self, drafts: Any, **options: Any) -> Any:
        """The later stages of drafts: the images of their whole runs, bit for bit.

        Args:
            drafts: One of `draft`, or several.
            **options: `output_type`, `keep_stages`, `callback` and `cancel` of the call.

        Returns:
            As the call of that one seed returns; a list for several drafts.

        Raises:
            MrFlowError: Something else than a draft, or another option.
        """
        other = next((name for name in options if name not in _OF_FINISH), None)
        if other is not None:
            raise MrFlowError(f"finish takes {', '.join(_OF_FINISH)}, and {other} from the draft; leave it out.")
        given = listed(cast("object", drafts)) if isinstance(drafts, (list, tuple)) else [drafts]
        found = [each for each in given if isinstance(each, MrFlowDraft)]
        if len(found) < len(given):
            wrong = next(type(each).__name__ for each in given if not isinstance(each, MrFlowDraft))
            raise MrFlowError(f"drafts holds {wrong}; give what MrFlow.draft returned.")
        made = [
            self._run(each.prompt, *_split({**each.options, **options, "seed": each.seed}), latents=each.latents)[0]
            for each in found
        ]
        return made[0] if isinstance(drafts, MrFlowDraft) else made

    def _run(
        self,
        prompt: str | Sequence[str] | None,
        asked: _Asked,
        more: Mapping[str, Any],
        *,
        latents: Tensor | None = None,
        until: int | None = None,
        memory: TextMemory | None = None,
    ) -> tuple[MrFlowOutput, Tensor | None]:
        """A call that may begin behind stage 1 or end with it; also the latents of the last stage."""
        if asked.output_type not in _OUTPUT_TYPES:
            raise MrFlowError(f"output_type must be one of {', '.join(_OUTPUT_TYPES)}, got {asked.output_type!r}.")
        keep_stages = checked_flag(asked.keep_stages, "keep_stages")
        image = asked.image
        given = {name: getattr(asked, name) for name in ("image", "reference_image", "inpaint_image", "mask_image")}
        check_pictures(self.pipe, given, more)
        check_function(asked.callback_on_step_end, "callback_on_step_end")
        each = checked_whole(asked.num_images_per_prompt, "num_images_per_prompt", 1)
        guidance_scale, strength = (
            scale_of(asked.guidance_scale, "guidance_scale"),
            strength_of(asked.strength, asked.inpaint_image if image is None else image),
        )
        sides = (("width", asked.width), ("height", asked.height))
        width, height = (None if side is None else checked_side(side, name) for name, side in sides)
        layout = find_layout(self.pipe, self._family)
        numbers, arguments = self._sorted(more, layout.call_names)
        method = None if isinstance(asked.method, str) else asked.method
        if isinstance(asked.method, str):
            numbers["method"] = asked.method
        if method is not None and asked.refine_mask is not None:
            raise MrFlowError("refine_mask is for the plan's own method; leave method out, or give it the mask itself.")
        if asked.callback_on_step_end is not None:
            if "callback_on_step_end" not in layout.call_names:
                raise MrFlowError(
                    f"callback_on_step_end is given, but the loop of {type(self.pipe).__name__} calls none; use "
                    "callback, which is called after every step."
                )
            arguments["callback_on_step_end"] = asked.callback_on_step_end
        if asked.callback_on_step_end_tensor_inputs is not None:
            arguments["callback_on_step_end_tensor_inputs"] = tensor_inputs_of(
                asked.callback_on_step_end_tensor_inputs, self.pipe
            )
        check_arguments(layout.pipe, arguments)
        prompts = prompts_of(prompt, arguments, each)
        negatives = texts_of(asked.negative_prompt, "negative_prompt", len(prompts), each)
        refine = refine_texts(asked.refine_prompt, asked.refine_negative_prompt, arguments, len(prompts), each)
        if refine[1] is not None and negatives is None:
            negatives = [""] * len(prompts)
        seeds = seeds_of(asked.seed, asked.generator, len(prompts))
        _check_image(self.pipe, image, arguments)
        said: list[str] = []
        pixels, alpha = None, None
        if image is not None:
            pixels, alpha = split_alpha(images_of(from_pictures(image, said.append), len(prompts), each))
            if alpha is not None and layout.keeps_alpha:  # the model reads it, and makes its own
                pixels, alpha = torch.cat([pixels, alpha], dim=1), None
        two = _guided_by_two(layout, arguments, negatives)
        if two:
            layout = layout.guided_by_two()
            if guidance_scale is not None:
                arguments["guidance_scale"], guidance_scale = guidance_scale, None
        if pixels is not None and (width is None or height is None):
            factor = 1.0 if strength is not None else size_step(layout.family, numbers)
            width, height = _image_size(pixels, width, height, factor)
        references = references_of(asked.reference_image, self.pipe, said.append)
        reading = reading_of(
            *(asked.inpaint_image, asked.mask_image),
            lambda images, name: images_of(images, len(prompts), each, name),
            said.append,
        )
        if reading is not None and (width is None or height is None):
            width, height = _image_size(reading.picture, width, height, 1.0)
        if width is None or height is None:
            width, height = size_like(references, layout.family, width, height) or (width, height)
        wide, high = _size(layout.family, width, height)
        scale = _guidance(layout, guidance_scale, arguments)
        if scale is not None:
            numbers["guidance"] = scale
        options: dict[str, Any] = self._with_precision({"preset": asked.preset, **numbers})
        if image is not None and strength is None:
            options = from_an_image(options)
        plan = make_plan(layout.family, wide, high, seed=seeds[0], upscaler_kind=self._upscaler_kind, **options)
        if image is not None and strength is None:
            plan = replace(plan, notes=(*plan.notes, *idle_notes(numbers)))
        whole = (HINT, *(name for name in given if name != "image" and given[name] is not None))
        tiled = next((name for name in whole if name in given or arguments.get(name) is not None), None)
        if plan.tile and tiled is not None:
            raise MrFlowError(f"tile={plan.tile} would give every tile the whole {tiled}; leave one of the two out.")
        inpainting = None if reading is None else inpainting_of(reading, plan, said.append)
        pictures = Pictures(references) if inpainting is None else replace(inpainting.pictures, references=references)
        if strength is not None and inpainting is not None:
            pixels, _ = pictures.at(plan.stages[0].width, plan.stages[0].height)
        engine = PipelineEngine(
            self.pipe,
            family=self._family,
            arguments=arguments,
            seeds=seeds,
            compiler=self._compiler,
            lowered=self._lowered,
            guided_by_two=two,
            pictures=pictures,
        )
        if asked.refine_mask is not None:
            method = method_of(plan, asked.refine_mask)
        result = sample_staged(
            engine if memory is None else memory.reading(engine),
            plan,
            prompts,
            negative_prompt=negatives,
            refine_prompt=refine[0],
            refine_negative_prompt=refine[1],
            refine_lora_scale=asked.refine_lora_scale,
            colour_guard=self._colour_guard,
            upscaler=self._upscaler_on(engine.device),
            callback=asked.callback,
            cancel=asked.cancel,
            keep_stages=keep_stages,
            image=pixels,
            start_sigma=strength,
            seeds=seeds,
            latents=latents,
            until=until,
            compose=None if inpainting is None else functools.partial(pictures.composed, blend=False),
            method=method,
        )
        images = formatted(result, alpha, asked.output_type, engine, inpainting)
        if asked.reference_image is None:
            said.extend(_image_warnings(self.pipe, image))
        said.extend(
            f"Image {number} is black, as the pipeline's safety checker rejected it."
            for number, rejected in enumerate(engine.rejected or (), 1)
            if rejected
        )
        for sentence in said:
            logger.warning("%s", sentence)
        compiling = () if self._compiler is None else self._compiler.notes
        output = MrFlowOutput(
            images=images,
            plan=plan,
            seeds=seeds,
            timings=result.timings,
            stages=result.stages,
            warnings=tuple(dict.fromkeys((*result.notes, *result.warnings, *compiling, *said))),
            cancelled=result.cancelled,
            unfinished=result.unfinished,
            faults=result.faults,
            nsfw_content_detected=engine.rejected,
        )
        return output, result.latents

    def _sorted(self, more: Mapping[str, Any], call_names: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """`more` as (options of the plan, arguments of the pipeline's call); any other name is refused."""
        numbers: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        for name, value in more.items():
            if name in PLAN_OPTIONS:
                numbers[name] = value
            elif name == "true_cfg_scale" and name in call_names:
                scale = scale_of(value, name)
                arguments |= {} if scale is None else {name: scale}
            elif name in DECIDED:
                raise MrFlowError(f"{name} is not accepted, as the plan decides it; use {DECIDED[name]}.")
            elif name in call_names or (name == HINT and _has_control(self.pipe)):
                arguments[name] = value
            else:
                own, asked = _names(MrFlow.__init__), _names(MrFlow.__call__)
                raise MrFlowError(unknown_argument(name, own, asked | call_names, type(self.pipe).__name__))
        return numbers, arguments

    def _with_precision(self, options: Any) -> Any:
        """Options of a plan with the precisions that were asked for at the start, where the call names none."""
        names = ("precision",) if options.get("native") or options.get("method") else ("precision", "refine_precision")
        if options.get("precision") is not None:
            return options
        own = {name: self._precision[name] for name in names if name in self._precision}
        return {**options, **{name: value for name, value in own.items() if options.get(name) is None}}

    @property
    def _upscaler_kind(self) -> UpscalerKind:
        return self._upscaler.kind if isinstance(self._upscaler, FileUpscaler) else kind_of(self._upscaler)

    def _upscaler_on(self, device: torch.device) -> PixelUpscaler | None:
        """The upscaler; one that was read from a file moves with the pipeline."""
        return self._upscaler.on(device) if isinstance(self._upscaler, FileUpscaler) else self._upscaler


# -------------------------------------------------------------------------------------------------------- what is asked


def _stage_precisions(precision: object) -> dict[str, Any]:
    """The argument `precision` of `MrFlow` as options of a plan; {} for None. Raises MrFlowError for anything else."""
    if precision is None:
        return {}
    if isinstance(precision, str):
        return {"precision": precision, "refine_precision": precision}
    names = {"stage1": "precision", "refine": "refine_precision"}
    if isinstance(precision, Mapping):
        found = cast("Mapping[Any, object]", precision)
        if found and all(name in names and isinstance(value, str) for name, value in found.items()):
            return {option: found.get(name, "own") for name, option in names.items()}
    raise MrFlowError(
        "precision must be a name such as 'int8', or names by stage such as {'stage1': 'int8'} (stage1, refine), got "
        f"{quoted(cast('object', precision))}."
    )


def _size(family: Family, width: int | None, height: int | None) -> tuple[int, int]:
    usual = family.default_size or family.native_size
    return usual[0] if width is None else width, usual[1] if height is None else height


def _has_control(pipe: Any) -> bool:
    """Whether a pipeline takes a control image: FLUX Control, a ControlNet or a T2I-Adapter."""
    parts = parameter_names(type(pipe).__init__) & {"controlnet", "adapter"}
    return HINT in parameter_names(pipe.__call__) or any(getattr(pipe, name, None) is not None for name in parts)


def _check_image(pipe: Any, image: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse a controlled pipeline without its hint, which has another name here than in some pipelines."""
    if not _has_control(pipe) or arguments.get(HINT) is not None or picture_arguments(pipe).picture == HINT:
        return
    given = "is missing" if image is None else "is missing, as image is what MrFlow starts from"
    raise MrFlowError(
        f"{HINT} {given}; {type(pipe).__name__} needs a control image: give it as {HINT} (it is resized for "
        "every stage), or as a function (width, height) -> hint."
    )


def _image_warnings(pipe: Any, image: Any) -> tuple[str, ...]:
    """A sentence where `image` means something else in the pipeline's own call: a reference to edit."""
    if image is not None and edits_as_classic(pipe):
        return (
            f"image is upscaled and refined; {type(pipe).__name__} is modular: to edit it, load the classic pipeline "
            "of this model that takes references (FluxKontextPipeline, ...) and give it as reference_image.",
        )
    if image is None or picture_arguments(pipe).reference != "image":
        return ()
    return (
        f"image is upscaled and refined; to have {type(pipe).__name__} edit it, give it as reference_image instead.",
    )


def _guided_by_two(layout: Layout, arguments: Mapping[str, Any], negatives: Sequence[str] | None) -> bool:
    """Whether a family with embedded guidance is to be guided by a negative branch in addition (true CFG)."""
    scale = arguments.get("true_cfg_scale")
    if layout.family.guidance_kind == "cfg" or scale is None or scale <= 1.0:
        return False
    return negatives is not None or arguments.get("negative_prompt_embeds") is not None


def _guidance(layout: Layout, scale: float | None, arguments: dict[str, Any]) -> float | None:
    """The plan's guidance, from the pipeline's own argument for it, which is taken out of `arguments`."""
    if "true_cfg_scale" in arguments and "true_cfg_scale" in layout.guidance_arguments(2.0):
        scale = arguments.pop("true_cfg_scale")
    if scale is None or (layout.family.guidance_kind == "none" and scale in (0.0, 1.0)):
        return None  # model cards of distilled models write 0 where others write 1
    return layout.plan_guidance(scale)


def _image_size(image: Tensor, width: int | None, height: int | None, factor: float) -> tuple[int, int]:
    """Width and height of an image upscaled by `factor`, or fitted to the one side that is given."""
    rows, columns = image.shape[-2:]
    if width is None and height is None:
        return round(columns * factor), round(rows * factor)
    if width is None:
        return round(columns * (height or rows) / rows), height or rows
    return width, round(rows * width / columns)


def _split(options: Mapping[str, Any]) -> tuple[_Asked, dict[str, Any]]:
    """The arguments of a call that `MrFlow` reads, and the others."""
    names = {each.name for each in fields(_Asked)}
    own = {name: value for name, value in options.items() if name in names}
    return _Asked(**own), {name: value for name, value in options.items() if name not in names}


def _names(function: Callable[..., Any]) -> frozenset[str]:
    """The arguments that a function names, without those that come first by habit."""
    found = inspect.signature(function).parameters.items()
    return frozenset(name for name, each in found if each.kind is not each.VAR_KEYWORD) - {"self", "pipe", "path"}
