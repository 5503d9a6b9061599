"""What a call of `MrFlow` asks for, one for each image: texts and seeds."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.pipeline import given_embeddings
from mrflow_sched.sampling.request import text_items

__all__ = ["prompts_of", "refine_texts", "seeds_of", "texts_of"]

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
        MrFlowError: There is none, or embeddings as well, or `each` is not a number above 0.
    """
    if isinstance(each, bool) or not isinstance(each, int) or each < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MrFlowError(f"num_images_per_prompt must be a whole number of at least 1, got {each!r}.")
    embedded = given_embeddings(arguments)
    if prompt is None and not embedded:
        raise MrFlowError("prompt is missing; describe the image, or give prompt_embeds.")
    if prompt is not None and embedded:
        raise MrFlowError("prompt and prompt_embeds are both given; leave one out.")
    texts = [""] * embedded if prompt is None else text_items(prompt, "prompt")
    if not texts:
        raise MrFlowError("prompt is empty; describe the image.")
    return [text for text in texts for _ in range(each)]


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
    try:
        if hasattr(seed, "__index__"):
            first = operator.index(cast("int", seed))
            return tuple(range(first, first + batch))
        own = [operator.index(each) for each in cast("Sequence[int]", seed)]
    except TypeError as error:
        raise MrFlowError(f"seed must be a whole number, or one per image ({error}).") from error
    return _one_per_image(own, "seed", batch)


def _one_per_image(values: list[int], name: str, batch: int) -> tuple[int, ...]:
    if len(values) != batch:
        raise MrFlowError(f"{name} must be one, or one per image, got {len(values)} for {batch} images.")
    return tuple(values)
