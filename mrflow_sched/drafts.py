"""Draft, pick, finish: stage 1 alone for many seeds, and the later stages for those that are wanted.

Stage 1 costs a small part of a run and decides what an image shows. A draft is its result with its latents in float32,
so a finished draft is what the whole run would have made, to the last bit. Each draft is sampled alone: the last bits
of an image depend on how many are sampled together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.plan.checks import MAX_SEED, checked_whole, listed, plain
from mrflow_sched.plan.make import with_first_steps
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import sample_staged
from mrflow_sched.sampling.engine import Capabilities, capabilities_of
from mrflow_sched.sampling.request import text_items

if TYPE_CHECKING:
    from mrflow_sched.images.record import RunRecord
    from mrflow_sched.sampler import StagedResult
    from mrflow_sched.sampling.engine import Engine
    from mrflow_sched.sampling.method import Method
    from mrflow_sched.sampling.progress import Progress
    from mrflow_sched.upscaling.role import PixelUpscaler

__all__ = ["Draft", "TextMemory", "draft", "draft_of", "finish", "fitted", "rerun_note"]


@dataclass(frozen=True, eq=False)
class Draft:
    """Stage 1 of one image, from which the later stages can go on.

    Attributes:
        plan: Of the whole run; its seed is this image's.
        prompt: What the image shows.
        image: Stage 1's image, (3, h, w), float32 in [0, 1], on the CPU.
        latents: What it was decoded from, (*latent_shape), float32, on the CPU; None where stage 1 has to run again.
        negative_prompt: What it should not show; None: nothing was said.
        refine_prompt: The prompt of the later stages; None: `prompt`.
        refine_negative_prompt: Their negative prompt; None: `negative_prompt`.
        steps: The fewer steps that it was sampled with, for ranking alone: the finished image comes from another stage
            1, of the plan's steps. None: it is the plan's own stage 1.
        warnings: What the run had to say, one sentence each.
    """

    plan: StagedPlan
    prompt: str
    image: Tensor
    latents: Tensor | None
    negative_prompt: str | None = None
    refine_prompt: str | None = None
    refine_negative_prompt: str | None = None
    steps: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """Seed of the image's noise."""
        return self.plan.seed


def draft(
    engine: Engine,
    plan: StagedPlan,
    prompt: str | Sequence[str],
    *,
    batch: int = 1,
    seeds: Sequence[int] | None = None,
    negative_prompt: str | None = None,
    refine_prompt: str | None = None,
    refine_negative_prompt: str | None = None,
    steps: int | None = None,
    on_draft: Callable[[Draft], object] | None = None,
    callback: Callable[[Progress], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    method: Method | None = None,
) -> tuple[Draft, ...]:
    """Stage 1 alone, for several seeds of one or several prompts.

    Args:
        engine: Predicts, encodes and decodes.
        plan: Of the whole run, of two stages or more.
        prompt: One text, or several: each gets all seeds.
        batch: How many seeds of each prompt where `seeds` is None: the plan's, and those after it.
        seeds: One for each draft of a prompt.
        negative_prompt: For all of them; None for none.
        refine_prompt: The prompt of the later stages; None: `prompt`.
        refine_negative_prompt: Their negative prompt; None: `negative_prompt`.
        steps: Fewer steps than the plan's: cheap drafts, which rank images and are no part of them (`Draft.steps`).
        on_draft: Called with each draft as soon as it is there, to show or to save it.
        callback: Called with `Progress` at every part and step; its fraction counts within one draft.
        cancel: Polled at every step. Once it returns True, the draft in work is dropped.
        method: How stage 1 is sampled; None: what the plan asks for.

    Returns:
        The drafts: all seeds of the first prompt, then of the second. Fewer where the run was cancelled; one whose
        network or decoder returned NaN is left out, and the log says so.

    Raises:
        MrFlowError: Arguments that do not fit.
    """
    prompts = _texts(prompt)
    all_seeds = _seeds(plan, batch, seeds)
    if len(plan.stages) < 2:
        raise MrFlowError("a draft is the first of several stages, and the plan has one; plan with stages=2.")
    cheap = plan if steps is None else with_first_steps(plan, steps)
    if cheap.stages[0].steps > plan.stages[0].steps:
        raise MrFlowError(
            f"steps must be at most the {plan.stages[0].steps} of the plan's stage 1, got {steps!r}; leave it out for "
            "whole drafts."
        )
    used = None if cheap is plan else steps
    reading: Any = TextMemory().reading(engine)
    made: list[Draft] = []
    for text, seed in itertools.product(prompts, all_seeds):
        result = sample_staged(
            *(reading, replace(cheap, seed=seed), text),
            negative_prompt=negative_prompt,
            callback=callback,
            cancel=cancel,
            until=1,
            method=method,
        )
        if result.cancelled:
            break
        if result.latents is None:  # a part failed, and the log has told which
            continue
        made.append(
            Draft(
                plan=replace(plan, seed=seed),
                prompt=text,
                image=result.images[0].cpu(),
                latents=None if used is not None else result.latents[0].cpu(),
                negative_prompt=negative_prompt,
                refine_prompt=refine_prompt,
                refine_negative_prompt=refine_negative_prompt,
                steps=used,
                warnings=result.warnings,
            )
        )
        if on_draft is not None:
            on_draft(made[-1])
    return tuple(made)


def finish(
    engine: Engine,
    draft: Draft,
    *,
    pixels: Tensor | None = None,
    upscaler: PixelUpscaler | None = None,
    callback: Callable[[Progress], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    keep_stages: bool = False,
    colour_guard: bool = False,
    method: Method | None = None,
) -> StagedResult:
    """The later stages of a draft: the image of its whole run, bit for bit, for what they cost.

    Args:
        engine: The one that made the draft, in the same dtypes on the same kind of device.
        draft: From `draft` or a file (`draft_of`). One without latents has its stage 1 sampled again.
        pixels: The draft's image as somebody changed it, (3, h, w), floats in [0, 1], which takes the place of the
            latents: the result is near the whole run's image, not equal.
        upscaler: As in `sample_staged`.
        callback: Likewise.
        cancel: Likewise.
        keep_stages: Likewise.
        colour_guard: Likewise.
        method: Likewise.

    Returns:
        The run's result, of one image.

    Raises:
        MrFlowError: Arguments that do not fit.
    """
    if not isinstance(cast("object", draft), Draft):
        raise MrFlowError(f"draft is {type(draft).__name__}; give one that mrflow_sched.drafts.draft returned.")
    return sample_staged(
        *(engine, draft.plan, draft.prompt),
        negative_prompt=draft.negative_prompt,
        refine_prompt=draft.refine_prompt,
        refine_negative_prompt=draft.refine_negative_prompt,
        upscaler=upscaler,
        callback=callback,
        cancel=cancel,
        keep_stages=keep_stages,
        colour_guard=colour_guard,
        image=pixels,
        latents=draft.latents if pixels is None else None,
        method=method,
    )


def draft_of(name: str, record: RunRecord, image: Tensor, latents: Tensor | None) -> Draft:
    """The draft that a file holds (`mrflow_sched.images.drafts.read_draft`).

    Args:
        name: Of the file, for a refusal.
        record: What it says of its run.
        image: Its pixels, (3, h, w), float32 in [0, 1].
        latents: Its latents, or None.

    Returns:
        The draft; without latents where it was for ranking alone.

    Raises:
        MrFlowError: The run has no later stages, or began with an image.
    """
    plan = StagedPlan.from_string(record.plan)
    if len(plan.stages) < 2 or record.start_sha256 is not None:
        raise MrFlowError(
            f"{name} says that its run has no later stages, or began with an image; its text was altered."
        )
    return Draft(
        plan=replace(plan, seed=record.seed),
        prompt=record.prompt,
        image=image,
        latents=None if record.draft_steps is not None else latents,
        negative_prompt=record.negative,
        refine_prompt=record.refine_prompt,
        refine_negative_prompt=record.refine_negative,
        steps=record.draft_steps,
    )


def fitted(draft: Draft, engine: Engine) -> Draft:
    """A draft without its latents where they are not of the shape that the model leaves.

    Args:
        draft: As a file holds it.
        engine: That is to finish it.

    Returns:
        The same draft, or one whose stage 1 is sampled again.
    """
    stage, latents = draft.plan.stages[0], draft.latents
    if latents is None or tuple(latents.shape) == tuple(engine.latent_shape(stage.width, stage.height)):
        return draft
    return replace(draft, latents=None)


def rerun_note(name: str, draft: Draft) -> str | None:
    """What to say before a draft is finished whose stage 1 is sampled again.

    Args:
        name: Of the draft, which begins the sentence.
        draft: The draft.

    Returns:
        A sentence; None where its later stages go on from its latents.
    """
    if draft.steps is not None:
        return (
            f"{name} was sampled in {draft.steps} steps, for ranking alone: the image comes from a stage 1 of its own, "
            f"of {draft.plan.stages[0].steps} steps."
        )
    if draft.latents is None:
        return f"{name} holds no latents that can be used, so stage 1 runs again, at the whole run's cost."
    return None


# ------------------------------------------------------------------------------------------------------------- helpers


def _texts(prompt: object) -> list[str]:
    texts = text_items(prompt, "prompt")
    if not texts:
        raise MrFlowError("prompt holds no text; give one, or several.")
    return texts


def _seeds(plan: StagedPlan, batch: object, seeds: Sequence[int] | None) -> tuple[int, ...]:
    """The seeds of every prompt's drafts. Raises MrFlowError."""
    if seeds is None:
        count = checked_whole(batch, "batch", 1)
        last = checked_whole(plan.seed + count - 1, "the seed of the last draft", 0, MAX_SEED)
        return tuple(range(plan.seed, last + 1))
    given = listed(list(seeds) if isinstance(seeds, range) else plain(seeds))
    if not given:
        raise MrFlowError(f"seeds must be a list of at least one seed, got {quoted(seeds)}; or give batch.")
    return tuple(checked_whole(seed, "seeds", 0, MAX_SEED) for seed in given)


class TextMemory:
    """The last text that was encoded, for runs of the same one."""

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._asked: Any = None
        self._text: Any = None

    def reading(self, engine: Engine) -> Any:
        """An engine that encodes a text once.

        Args:
            engine: Encodes, and does all else.

        Returns:
            The same engine, asking this memory first.
        """
        return _Remembering(engine, self)

    def text(self, asked: object, encode: Callable[[], Any]) -> Any:
        """The conditioning of a text.

        Args:
            asked: What tells one text from another.
            encode: Makes it, where it is not the last one.

        Returns:
            What `encode` returned.
        """
        if asked != self._asked:
            self._text = encode()
            self._asked = asked
        return self._text


class _Remembering:
    """An engine that encodes a text once for many runs of it; all else is the wrapped engine's own."""

    def __init__(self, engine: Engine, memory: TextMemory) -> None:
        """Wrap `engine`.

        Args:
            engine: Encodes what `memory` does not hold.
            memory: The last text.
        """
        self._engine, self._memory = engine, memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def capabilities(self) -> Capabilities:
        """Those of the wrapped engine."""
        return capabilities_of(self._engine)

    def encode_text(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None, **more: Any) -> Any:
        """Encode as the wrapped engine does.

        Args:
            prompts: One text per image.
            negative_prompts: As many, or None.
            **more: What the wrapped engine takes besides.

        Returns:
            What it returned; to the texts of the last call, that again.
        """
        negatives = None if negative_prompts is None else tuple(negative_prompts)
        asked = (tuple(prompts), negatives, tuple(more.items()))
        return self._memory.text(asked, lambda: self._engine.encode_text(prompts, negative_prompts, **more))
