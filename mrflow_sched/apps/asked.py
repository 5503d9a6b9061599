"""What a call of `MrFlow` asks for, checked; texts, seeds and images one for each image that is made."""

from __future__ import annotations

import operator
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.engines.diffusers.pipeline import given_embeddings
from mrflow_sched.plan.checks import MAX_GUIDANCE, checked_number, is_number, listed, plain
from mrflow_sched.sampling.request import text_items

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_pipe",
    "images_of",
    "prompts_of",
    "refine_texts",
    "scale_of",
    "seeds_of",
    "strength_of",
    "tensor_inputs_of",
    "texts_of",
]

_DRAWN_SEEDS = 2**32


def prompts_of(prompt: str | Sequence[str] | None, arguments: Mapping[str, Any], each: int) -> list[str]:
    """One prompt per image, images of one prompt side by side.

    Args:
        prompt: One, or a list.
        arguments: Of the pipeline's call; embeddings among them take the place of prompts.
        each: Images of each prompt.

    Returns:
        The prompts; empty ones where embeddings are given.

    Raises:
        MrFlowError: There is none, or embeddings as well, or embeddings with NaN.
    """
    _check_embeddings(arguments)
    embedded = given_embeddings(arguments)
    if prompt is None and not embedded:
        raise MrFlowError("prompt is missing; describe the image, or give prompt_embeds.")
    if prompt is not None and embedded:
        raise MrFlowError("prompt and prompt_embeds are both given; leave one out.")
    texts = [""] * embedded if prompt is None else text_items(prompt, "prompt")
    if not texts:
        raise MrFlowError("prompt is empty; describe the image.")
    return [text for text in texts for _ in range(each)]


def _check_embeddings(arguments: Mapping[str, Any]) -> None:
    """Refuse embeddings with NaN, which would look like the encoder's. Raises MrFlowError."""
    for name, value in arguments.items():
        if "prompt_embeds" not in name or value is None:
            continue
        several = cast("Sequence[object]", value) if isinstance(value, (list, tuple)) else [cast("object", value)]
        for each in several:
            if isinstance(each, torch.Tensor) and bool((each.isnan() | (each == torch.inf)).any()):
                raise MrFlowError(f"{name} holds NaN or infinity; encode the prompt again, in bfloat16 or float32.")


def texts_of(texts: str | Sequence[str] | None, name: str, batch: int, each: int) -> list[str] | None:
    """Further texts, one per image.

    Args:
        texts: One, or one per prompt; None for none.
        name: Of the argument.
        batch: Number of images.
        each: Images of each prompt.

    Returns:
        The texts, or None.

    Raises:
        MrFlowError: Another count than prompts, or something else than texts.
    """
    if texts is None:
        return None
    own = [texts] * (batch // each) if isinstance(texts, str) else text_items(texts, name)
    if len(own) * each != batch:
        raise MrFlowError(f"{name} must be one text or one per prompt, got {len(own)} for {batch // each} prompts.")
    return [text for text in own for _ in range(each)]


def refine_texts(
    prompt: str | Sequence[str] | None,
    negative: str | Sequence[str] | None,
    arguments: Mapping[str, Any],
    batch: int,
    each: int,
) -> tuple[list[str] | None, list[str] | None]:
    """Prompts and negative prompts of the stages after the first, one per image.

    Args:
        prompt: One, or one per prompt of the call; None: the call's own.
        negative: Likewise.
        arguments: Of the pipeline's call; texts among them that only it knows leave no room for others.
        batch: Number of images.
        each: Images of each prompt.

    Returns:
        Both, each None where nothing is given.

    Raises:
        MrFlowError: Another count than prompts, or embeddings or further prompts are given as well.
    """
    for name, text, start in (("refine_prompt", prompt, "prompt"), ("refine_negative_prompt", negative, "negative_")):
        taken = [key for key, value in arguments.items() if key.startswith(start) and value is not None]
        if text is not None and taken:
            raise MrFlowError(f"{name} and {taken[0]} are both given; leave one out, as {taken[0]} is for every stage.")
    return (
        texts_of(prompt, "refine_prompt", batch, each),
        texts_of(negative, "refine_negative_prompt", batch, each),
    )


def seeds_of(
    seed: int | Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
) -> tuple[int, ...]:
    """One seed per image. Seeds are drawn from a generator, so that its next use gives other images.

    Args:
        seed: One (further images take the next), or one per image.
        generator: One, or one per image.
        batch: Number of images.

    Returns:
        The seeds; random ones where neither is given.

    Raises:
        MrFlowError: Both are given, there are not as many as images, or they are of another type.
    """
    if seed is not None and generator is not None:
        raise MrFlowError("seed and generator are both given; leave one out.")
    if generator is not None:
        one = isinstance(generator, torch.Generator)
        if not one and not isinstance(generator, (list, tuple)):
            raise MrFlowError(f"generator is {type(generator).__name__}; give a torch.Generator, or a list of them.")
        sources: list[Any] = [generator] * batch if one else list(generator)
        wrong = [type(each).__name__ for each in sources if not isinstance(each, torch.Generator)]
        if wrong:
            raise MrFlowError(f"generator holds {wrong[0]}; give a torch.Generator, or a list of them.")
        drawn = [int(torch.randint(_DRAWN_SEEDS, (), generator=each, device=each.device)) for each in sources]
        return _one_per_image(drawn, "generator", batch)
    if seed is None:
        first = secrets.randbelow(_DRAWN_SEEDS)
        return tuple(range(first, first + batch))
    given: Any = plain(seed)
    try:
        if hasattr(given, "__index__"):
            first = operator.index(given)
            return tuple(range(first, first + batch))
        own = [operator.index(each) for each in given]
    except TypeError as error:
        raise MrFlowError(f"seed must be a whole number, or one per image ({error}).") from error
    return _one_per_image(own, "seed", batch)


def images_of(images: Tensor, batch: int, each: int, name: str = "image") -> Tensor:
    """The images to start from: one for all, one per prompt, or one per image that is made.

    Args:
        images: (B, C, H, W).
        batch: Number of images that are made.
        each: Images of each prompt.
        name: Of the argument.

    Returns:
        (1, C, H, W) or (`batch`, C, H, W).

    Raises:
        MrFlowError: There are as many as neither.
    """
    prompts = batch // each
    if len(images) in (1, batch):
        return images
    if len(images) == prompts:
        return images.repeat_interleave(each, dim=0)
    made = "" if each == 1 else f" of {each} images each"
    raise MrFlowError(
        f"{name} holds {len(images)} images for {prompts} prompt{'s' if prompts > 1 else ''}{made}; give one image, or "
        "one per prompt, with the prompts as a list."
    )


def strength_of(strength: object, image: object) -> float | None:
    """The flow sigma at which stage 1 starts from an image.

    Args:
        strength: As it was given; None: it does not.
        image: The image, or None.

    Returns:
        A number above 0 and at most 1, or None.

    Raises:
        MrFlowError: `strength` is anything else, or there is no image.
    """
    if strength is None:
        return None
    number: Any = plain(strength)
    if image is None:
        raise MrFlowError(f"strength={quoted(strength)} needs an image to start from; give image too, or leave it out.")
    if not (is_number(number) and 0.0 < number <= 1.0):
        raise MrFlowError(
            f"strength must be above 0 and at most 1, got {quoted(strength)}; it is the fraction of noise at which "
            "stage 1 starts."
        )
    return float(number)


def scale_of(scale: object, name: str) -> float | None:
    """A guidance scale.

    Args:
        scale: As it was given.
        name: Of the argument.

    Returns:
        A number from 0 to 100; None for None.

    Raises:
        MrFlowError: `scale` is anything else.
    """
    return None if scale is None else checked_number(scale, name, 0, MAX_GUIDANCE)


def tensor_inputs_of(names: object, pipe: Any) -> list[str]:
    """The tensors that a pipeline hands to `callback_on_step_end`.

    Args:
        names: As they were given.
        pipe: Knows which it can hand over.

    Returns:
        The names.

    Raises:
        MrFlowError: `names` is no list of names, or the pipeline knows one of them not.
    """
    known = cast("Sequence[str]", getattr(pipe, "_callback_tensor_inputs", ()))
    given = listed(names)
    if not isinstance(names, (list, tuple)) or any(name not in known for name in given):
        raise MrFlowError(
            f"callback_on_step_end_tensor_inputs must be a list of {', '.join(known)}, got "
            f"{quoted(cast('object', names))}."
        )
    return [str(name) for name in given]


def check_pipe(pipe: object) -> None:
    """Refuse what is mistaken for a loaded pipeline: a path, a class.

    Args:
        pipe: What was given as one.

    Raises:
        MrFlowError: It is either.
    """
    if isinstance(pipe, (str, os.PathLike)):
        raise MrFlowError(
            f"pipe is a path, {quoted(cast('object', pipe))}; load a local folder or file with "
            "MrFlow.from_pretrained(path), or give a loaded pipeline."
        )
    if isinstance(pipe, type):
        raise MrFlowError(
            f"pipe is the class {pipe.__name__}; give a loaded pipeline, such as {pipe.__name__}.from_pretrained(...)."
        )


def _one_per_image(values: list[int], name: str, batch: int) -> tuple[int, ...]:
    if len(values) != batch:
        raise MrFlowError(f"{name} must be one, or one per image, got {len(values)} for {batch} images.")
    return tuple(values)
