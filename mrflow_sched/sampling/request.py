"""What a caller asks of a run, checked before anything is made: one sentence for each thing that does not fit."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched._runtime.values import check_dense, check_unit_range
from mrflow_sched.images.alpha import opaque
from mrflow_sched.plan.checks import checked_whole, is_number, plain
from mrflow_sched.plan.notes import image_notes
from mrflow_sched.plan.recipes import explicit_recipe
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampling.engine import capabilities_of
from mrflow_sched.sampling.noise import stage_seed
from mrflow_sched.sampling.solvers import solver_forwards

if TYPE_CHECKING:
    from mrflow_sched.plan.stages import Stage
    from mrflow_sched.sampling.engine import Engine

__all__ = ["Request", "check_function", "check_parts", "request_of", "text_items"]

# img2img: sigmas of stage 1's schedule closer to the start than this factor are left out.
_SHORTEST_STEP = 0.98
_ENGINE = ("family", "device", "encode_text", "latent_shape", "denoise", "encode", "decode")
_METHOD = ("gradients", "start", "stage", "handoff")


@dataclass(frozen=True)
class Texts:
    """What a stage is told to show.

    Attributes:
        prompts: One per image.
        negatives: As many, or None.
        lora_scale: The scale of all LoRAs; None: as the engine is set.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str, ...] | None
    lora_scale: float | None = None

    def encoded(self, engine: Engine, size: tuple[int, int]) -> Any:
        """The conditioning that the engine makes of them.

        Args:
            engine: Encodes.
            size: (width, height) of the final image in pixels.

        Returns:
            What its `encode_text` returns.
        """
        negatives = None if self.negatives is None else list(self.negatives)
        able: Any = engine
        more: dict[str, Any] = {} if self.lora_scale is None else {"lora_scale": self.lora_scale}
        if capabilities_of(engine).text_size:
            more["size"] = size
        return able.encode_text(list(self.prompts), negatives, **more)


@dataclass(frozen=True)
class Request:
    """A run as it was asked for, checked.

    Attributes:
        texts: What each stage is told to show.
        stages: The stages, the first of them cut where it starts from an image.
        costs: The network's cost of each, in any unit.
        image: (B, 3, H, W), float32 in [0, 1], or None.
        latents: (B, *latent_shape), float32: what stage 1 sampled, to be decoded; None: it is to be sampled.
        first: The first stage that is run, from 0: 1 where `image` replaces stage 1.
        seeds: The caller's own, or None.
        notes: The plan's notes that hold for this run, and what becomes of `image`.
    """

    texts: tuple[Texts, ...]
    stages: tuple[Stage, ...]
    costs: tuple[float, ...]
    image: Tensor | None
    latents: Tensor | None
    first: int
    seeds: tuple[int, ...] | None
    notes: tuple[str, ...]

    @property
    def batch(self) -> int:
        """Number of images."""
        return len(self.texts[0].prompts)

    def encoded_texts(self, engine: Engine, plan: StagedPlan, warn: Callable[[str], object]) -> list[Any]:
        """The conditioning of every stage, each text encoded once; None for a stage that is not run.

        Args:
            engine: Encodes.
            plan: Its final size counts.
            warn: Called with each sentence that the engine has to say.

        Returns:
            As many as stages.
        """
        read = self.texts[self.first if self.latents is None else 1 :]
        made = {each: each.encoded(engine, (plan.width, plan.height)) for each in dict.fromkeys(read)}
        for text in made.values():
            for note in getattr(text, "notes", ()):
                warn(note)
        off = engine.family.guidance_kind == "cfg" and all(stage.guidance == 1.0 for stage in self.stages)
        if off and any(negative.strip() for each in read for negative in each.negatives or ()):
            warn("The negative prompt has no effect, as guidance is off (1); give a scale above 1 for it to count.")
        return [made.get(each) for each in self.texts]

    def noise_seeds(self, plan: StagedPlan, stage: int) -> tuple[int, ...]:
        """Noise seeds of a stage.

        Args:
            plan: Its seed and seed rule count.
            stage: From 0.

        Returns:
            One per image.
        """
        if self.seeds is not None:
            return tuple(stage_seed(seed, 0, stage, plan.seed_rule) for seed in self.seeds)
        return tuple(stage_seed(plan.seed, image, stage, plan.seed_rule) for image in range(self.batch))


def request_of(
    engine: Engine,
    plan: StagedPlan,
    prompt: object,
    negative_prompt: object,
    refine: tuple[object, object, object],
    batch: object,
    image: object,
    start_sigma: object,
    seeds: object,
    latents: object = None,
    until: object = None,
) -> Request:
    """The arguments of `sample_staged` that say what is to be made, checked.

    Args:
        engine: Made sure of by `check_parts`.
        plan: Likewise.
        prompt: As in `sample_staged`, as all that follow.
        negative_prompt: None for none.
        refine: Prompt, negative prompt and LoRA scale of the stages after the first; None: those of stage 1.
        batch: Number of images.
        image: None for none.
        start_sigma: None for none.
        seeds: None: those of the plan.
        latents: None for none.
        until: None: the last stage.

    Returns:
        The request.

    Raises:
        MrFlowError: One of them does not fit.
    """
    prompts = _prompts(prompt, batch)
    count = len(prompts)
    negatives = None if negative_prompt is None else _per_image(negative_prompt, count, "negative_prompt")
    first = Texts(prompts, negatives)
    later = _later_texts(first, refine, engine, plan)
    given = None if image is None else _start_images(image, engine, count)
    start = None if start_sigma is None else _start_of(start_sigma, given)
    stages, costs = _stages_of(plan, start, given)
    replaced = given if start is None else None
    made = None if latents is None else _finished_latents(latents, engine, stages[0], count, replaced)
    if made is not None:
        costs = (0.0, *costs[1:])
    last = len(stages) if until is None else checked_whole(until, "until", 1, len(stages))
    if last == 1 and made is None and given is not None and start is None:
        raise MrFlowError("until=1 ends with stage 1, which image replaces; leave one of the two out.")
    stages, costs = stages[:last], costs[:last]
    return Request(
        texts=(first, *[later] * (len(stages) - 1)),
        stages=stages,
        costs=costs,
        image=given,
        latents=made,
        first=0 if given is None or start is not None else 1,
        seeds=_checked_seeds(seeds, count),
        notes=plan.notes if given is None else image_notes(plan, given.shape[-1], given.shape[-2], start),
    )


# ------------------------------------------------------------------------------------------------------------ the parts


def check_parts(engine: object, plan: object, method: object | None, callback: object, cancel: object) -> None:
    """Refuse an engine, plan, method or function that is none, and a plan for another family than the engine's.

    Args:
        engine: An `Engine`.
        plan: A `StagedPlan`.
        method: A `Method`, or None.
        callback: A function, or None.
        cancel: Likewise.

    Raises:
        MrFlowError: One of them is not.
    """
    _check_role(engine, "engine", _ENGINE, "give an engine (mrflow_sched.engines), or call MrFlow with a pipeline")
    if method is not None:
        _check_role(method, "method", _METHOD, "give a method (mrflow_sched.methods), or leave it out")
    if not isinstance(plan, StagedPlan):
        raise MrFlowError(f"plan is {_kind(plan)}; give what make_plan or StagedPlan.from_string returns.")
    for name, function in (("callback", callback), ("cancel", cancel)):
        check_function(function, name)
    family = cast("Engine", engine).family
    if plan.family != family.name:
        raise MrFlowError(
            f"the plan is for family {plan.family!r} but the engine is {family.name!r}, whose sizes, sigmas and "
            "guidance differ; plan with make_plan(engine.family, ...)."
        )
    _check_networks(engine, plan)


def _check_networks(engine: Any, plan: StagedPlan) -> None:
    """Refuse a stage whose network the engine does not have, before the first one runs."""
    if any(stage.few_step for stage in plan.stages) and not capabilities_of(engine).few_step:
        raise MrFlowError(
            f"the preset {plan.preset} is for a model that comes with a few-step LoRA, and {type(engine).__name__} has "
            "none; put one on your model, and give its steps as the preset, such as 4+1."
        )
    for name in dict.fromkeys(stage.precision for stage in plan.stages if stage.precision != "own"):
        if not capabilities_of(engine).precisions:
            raise MrFlowError(f"{type(engine).__name__} runs its network in one precision; leave precision {name} out.")
        engine.in_precision(name)


def check_function(function: object, name: str) -> None:
    """Refuse what cannot be called.

    Args:
        function: A function, or None.
        name: The argument's name, for the refusal.

    Raises:
        MrFlowError: It is neither.
    """
    if function is not None and not callable(function):
        raise MrFlowError(f"{name} is {_kind(function)}; give a function, or leave it out.")


def _check_role(value: object, name: str, wanted: Sequence[str], advice: str) -> None:
    if isinstance(value, type):
        raise MrFlowError(f"{name} is the class {value.__name__}; give an object of it: {value.__name__}(...).")
    lacking = next((each for each in wanted if not hasattr(value, each)), None)
    if lacking is not None:
        raise MrFlowError(f"{name} is {_kind(value)}, which has no {lacking}; {advice}.")


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


# ------------------------------------------------------------------------------------------------------------ the texts


def _prompts(prompt: object, batch: object) -> tuple[str, ...]:
    """One prompt per image. Raises MrFlowError where counts or types do not fit, or nothing is asked for."""
    try:
        count = operator.index(cast("int", batch))
    except TypeError:
        count = 0
    if count < 1:
        raise MrFlowError(f"batch must be 1 or more, got {batch!r}; it is the number of images.")
    items = text_items(prompt, "prompt")
    one_each = not isinstance(prompt, str) and count == 1 and len(items) > 0
    return _per_image(prompt, len(items) if one_each else count, "prompt")


def _per_image(text: object, batch: int, name: str) -> tuple[str, ...]:
    """One text per image. Raises MrFlowError where counts or types do not fit."""
    items = text_items(text, name)
    if isinstance(text, str):
        return tuple(items) * batch
    if len(items) != batch:
        raise MrFlowError(f"{name} must be one text or one per image, got {len(items)} for a batch of {batch}.")
    return tuple(items)


def text_items(text: object, name: str) -> list[str]:
    """The texts in an argument that is one text or several.

    Args:
        text: A text, or anything that holds texts.
        name: Of the argument.

    Returns:
        The texts; may be empty.

    Raises:
        MrFlowError: There is something else than texts.
    """
    if text is None:
        raise MrFlowError(f"{name} is None; give a text, which may be empty, or one per image.")
    items: list[object] = [text]
    if isinstance(text, Iterable) and not isinstance(text, (str, bytes)):
        items = list(cast("Iterable[object]", text))
    wrong = [item for item in items if not isinstance(item, str)]
    if wrong:
        raise MrFlowError(f"{name} must be a text or a list of texts, got {_kind(wrong[0])}.")
    return cast("list[str]", items)


def _later_texts(first: Texts, refine: tuple[object, object, object], engine: Engine, plan: StagedPlan) -> Texts:
    """What the stages after the first are told to show; `first` where nothing else is given. Raises MrFlowError."""
    prompt, negative, lora_scale = refine
    given = {"refine_prompt": prompt, "refine_negative_prompt": negative, "refine_lora_scale": lora_scale}
    asked = next((name for name, value in given.items() if value is not None), None)
    if asked is None:
        return first
    if len(plan.stages) < 2:
        raise MrFlowError(f"{asked} is for the stages after the first, but the plan has one stage; leave it out.")
    batch = len(first.prompts)
    prompts = first.prompts if prompt is None else _per_image(prompt, batch, "refine_prompt")
    negatives = first.negatives if negative is None else _per_image(negative, batch, "refine_negative_prompt")
    scale: float | None = None
    if lora_scale is not None:
        scale = _number(lora_scale, "refine_lora_scale", "a finite number; 1 is a LoRA as it was loaded")
        if not capabilities_of(engine).lora_scale:
            raise MrFlowError(
                f"refine_lora_scale={scale!r} cannot be used, as {engine.family.title} takes no LoRA scale for a stage"
                "; leave it out."
            )
    return Texts(prompts, negatives, scale)


def _number(value: object, name: str, allowed: str) -> float:
    """A finite number. Raises MrFlowError."""
    number = plain(value)
    if not is_number(number) or not abs(cast("float", number)) < torch.inf:
        raise MrFlowError(f"{name} must be {allowed}, got {quoted(value)}.")
    return float(cast("float", number))


def _checked_seeds(seeds: object, batch: int) -> tuple[int, ...] | None:
    """The caller's own seeds, or None. Raises MrFlowError."""
    if seeds is None:
        return None
    try:
        values = tuple(operator.index(seed) for seed in cast("Sequence[int]", seeds))
    except TypeError as error:
        raise MrFlowError(f"seeds must hold one whole number per image ({error}).") from error
    if len(values) != batch:
        raise MrFlowError(f"seeds must hold one seed per image, got {len(values)} for a batch of {batch}.")
    return values


# ----------------------------------------------------------------------------------------------------------- the images


def _start_images(image: object, engine: Engine, batch: int) -> Tensor:
    """The image that replaces stage 1, or that it starts from, as (B, 3, H, W) on the device. Raises MrFlowError."""
    if not isinstance(image, Tensor):
        raise MrFlowError(
            f"image is {_kind(image)}; give a tensor (3, H, W) of floats from 0 to 1, as mrflow_sched.images makes it: "
            "load_image of a file, from_pictures of a PIL image or array."
        )
    check_dense(image, "image")
    shape = tuple(image.shape)
    alpha = capabilities_of(engine).alpha
    if image.ndim not in (3, 4) or shape[-3] not in (3, 3 + alpha) or 0 in shape:
        advice = "drop the alpha channel" if len(shape) in (3, 4) and shape[-3] == 4 else "RGB comes first"
        raise MrFlowError(f"image must be (3, H, W) or ({batch}, 3, H, W), got {shape}; {advice}.")
    images = image if image.ndim == 4 else image[None]
    images = opaque(images) if alpha else images
    if len(images) not in (1, batch):
        prompts = "1 prompt" if batch == 1 else f"{batch} prompts"
        raise MrFlowError(
            f"image holds {len(images)} images for {prompts}; give one prompt per image, as a list, or one image."
        )
    if not images.is_floating_point():
        raise MrFlowError(f"image must hold floats from 0 to 1, got {image.dtype}; divide 8-bit values by 255.")
    check_unit_range(images, "image")
    return images.to(engine.device, torch.float32).expand(batch, -1, -1, -1)


def _finished_latents(latents: object, engine: Engine, stage: Stage, batch: int, image: Tensor | None) -> Tensor:
    """The latents that stage 1 sampled before, as (B, *latent_shape) on the device. Raises MrFlowError."""
    if image is not None:
        raise MrFlowError("latents and image both replace stage 1; leave one of them out.")
    shape = (batch, *engine.latent_shape(stage.width, stage.height))
    if not isinstance(latents, Tensor):
        raise MrFlowError(f"latents is {_kind(latents)}; give the latents of stage 1, a tensor {shape}.")
    check_dense(latents, "latents")
    whole = latents if latents.ndim == len(shape) else latents[None]
    if tuple(whole.shape) != shape or not whole.is_floating_point():
        raise MrFlowError(
            f"latents must be {shape} in floats, as stage 1 at {stage.width}x{stage.height} leaves them, got "
            f"{tuple(latents.shape)}, {latents.dtype}."
        )
    if not bool(whole.isfinite().all()):
        raise MrFlowError("latents hold NaN or infinity, from which no image is made; sample stage 1 again.")
    return whole.to(engine.device, torch.float32)


def _start_of(start_sigma: object, image: Tensor | None) -> float:
    """The sigma at which stage 1 starts from an image. Raises MrFlowError."""
    if image is None:
        raise MrFlowError(f"start_sigma={start_sigma!r} needs an image to start from; give image too, or leave it out.")
    allowed = "above 0 and at most 1"
    start = _number(start_sigma, "start_sigma", allowed)
    if not 0.0 < start <= 1.0:
        raise MrFlowError(f"start_sigma must be {allowed}, got {start_sigma!r}; it is the fraction of noise.")
    return start


def _stages_of(
    plan: StagedPlan, start: float | None, image: Tensor | None
) -> tuple[tuple[Stage, ...], tuple[float, ...]]:
    """The stages that are run and their costs: the plan's, the first starting at `start` if one is given."""
    stages, costs = plan.stages, plan.stage_costs()
    if start is None:
        if image is not None and len(stages) < 2:
            raise MrFlowError("image needs a plan of two stages or more, got one stage; plan with stages=2.")
        return stages, costs
    first = stages[0]
    # A first step of almost no length would cost a forward and change nothing.
    if first.shares and start < 1.0:
        raise MrFlowError(
            "start_sigma must be left out where stage 1 sees a share of the tokens, as Just-in-Time does."
        )
    below = tuple(sigma for sigma in first.sigmas if sigma < _SHORTEST_STEP * start)
    sigmas = (start, *below) if start < 1.0 else first.sigmas
    share = solver_forwards(first.solver, len(sigmas) - 1) / solver_forwards(first.solver, first.steps)
    begun = replace(
        first, sigmas=sigmas, forwards=round(first.forwards * share), recipe=explicit_recipe(sigmas), mu=None
    )
    return (begun, *stages[1:]), (costs[0] * share, *costs[1:])
