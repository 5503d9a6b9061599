"""`MrFlow.draft` and `MrFlow.finish`: stage 1 of many images, and the later stages of those that are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.asked import prompts_of, seeds_of, texts_of
from mrflow_sched.drafts import TextMemory
from mrflow_sched.plan.checks import checked_whole

if TYPE_CHECKING:
    from mrflow_sched.apps.pipeline import MrFlowOutput
    from mrflow_sched.plan.stages import StagedPlan

__all__ = ["MrFlowDraft", "make_drafts"]

_NOT_YET = ("output_type", "image", "keep_stages")
_PER_PROMPT = ("negative_prompt", "refine_prompt", "refine_negative_prompt")


@dataclass(frozen=True, eq=False)
class MrFlowDraft:
    """Stage 1 of one image, which `MrFlow.finish` takes to its end.

    Attributes:
        image: Stage 1's image, a PIL image.
        prompt: What it shows; None where embeddings say so.
        seed: Its seed.
        plan: Of the whole run.
        latents: Stage 1's, float32 on the CPU.
        warnings: What the run had to say.
        options: The arguments of `MrFlow.draft` that hold for the whole run.
    """

    image: Any
    prompt: str | None
    seed: int
    plan: StagedPlan
    latents: Tensor
    warnings: tuple[str, ...]
    options: Mapping[str, Any] = field(repr=False)


def make_drafts(
    run: Callable[..., tuple[MrFlowOutput, Tensor | None]],
    prompt: str | Sequence[str] | None,
    num_images_per_prompt: int,
    seed: Any,
    generator: Any,
    options: Mapping[str, Any],
) -> tuple[MrFlowDraft, ...]:
    """Make drafts one by one.

    Args:
        run: Stage 1 of one image, from its prompt, the arguments of its call and a memory for texts: the output and the
            latents.
        prompt: One, or a list.
        num_images_per_prompt: Drafts of each prompt.
        seed: As in the call.
        generator: Likewise.
        options: The other arguments of the call.

    Returns:
        The drafts; those that a failing part spoiled are left out, and where the call is cancelled, those that were not
        made.

    Raises:
        MrFlowError: An argument that does not fit.
    """
    early = next((name for name in _NOT_YET if options.get(name) is not None), None)
    if early == "image":
        raise MrFlowError(
            "image has no meaning for a draft, as it replaces stage 1; leave it out, or call MrFlow with it."
        )
    if early is not None:
        raise MrFlowError(f"{early} has no meaning for a draft; give it to finish, or leave it out.")
    if options.get("strength") is not None and options.get("inpaint_image") is None:
        raise MrFlowError(
            "strength has no meaning for a draft without inpaint_image; leave it out, or call MrFlow with it."
        )
    each = checked_whole(num_images_per_prompt, "num_images_per_prompt", 1)
    prompts = prompts_of(prompt, options, each)
    count = len(prompts)
    if prompt is None and count > each:
        raise MrFlowError("draft takes the embeddings of one prompt at a time; call it once for each.")
    options = {name: _kept(value) for name, value in options.items()}
    texts = {name: texts_of(options.get(name), name, count, each) for name in _PER_PROMPT}
    seeds = seeds_of(seed, generator, count)
    memory = TextMemory()
    made: list[MrFlowDraft] = []
    for number, own in enumerate(seeds):
        text = None if prompt is None else prompts[number]
        whole = {**options, **{name: values[number] for name, values in texts.items() if values is not None}}
        output, latents = run(text, {**whole, "seed": own}, memory)
        if output.cancelled:
            break
        if latents is not None:
            made.append(
                MrFlowDraft(
                    image=output.images[0],
                    prompt=text,
                    seed=own,
                    plan=output.plan,
                    latents=latents[0].cpu(),
                    warnings=output.warnings,
                    options={name: value for name, value in whole.items() if name not in ("callback", "cancel")},
                )
            )
    return tuple(made)


def _kept(value: Any) -> Any:
    """A copy of what the caller may change before a draft is finished: tensors, arrays, images, and lists of them."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray) or type(value) is Image.Image:  # an image file of Pillow's has a class of its own
        return cast("Any", value).copy()
    if isinstance(value, (list, tuple)):
        several = [_kept(each) for each in cast("Sequence[Any]", value)]
        return several if isinstance(value, list) else tuple(several)
    return value
