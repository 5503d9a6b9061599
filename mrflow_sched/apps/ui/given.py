"""Image files that are dropped onto the page: what they say of their making, as settings of the page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.apps.ui.choices import Choices
from mrflow_sched.apps.ui.studio import Studio
from mrflow_sched.drafts import draft_of
from mrflow_sched.images.drafts import read_draft
from mrflow_sched.images.files import read_text
from mrflow_sched.images.foreign import read_foreign
from mrflow_sched.images.record import KEY, RunRecord
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from mrflow_sched.drafts import Draft
    from mrflow_sched.images.foreign import ForeignRun
    from mrflow_sched.plan.families import Family

EXACT = "mrflow generate --from"
"""The command that repeats what the page has no controls for."""


@dataclass(frozen=True)
class Given:
    """What a file says of its making.

    Attributes:
        choices: The settings of the page that come nearest; None: it says nothing.
        words: A sentence or two for the user.
    """

    choices: Choices | None
    words: str


def read_given(path: Path, family: Family) -> Given:
    """Read what an image file says of its making: our record, or the texts of A1111 and ComfyUI.

    Args:
        path: An image file.
        family: That of the loaded model.

    Returns:
        Its settings, and what is to be said of them.

    Raises:
        MrFlowError: It is no image file, or its record cannot be read.
    """
    texts = read_text(path)
    if KEY in texts:
        return _recorded(RunRecord.from_json(texts[KEY]), family)
    foreign = read_foreign(texts)
    return Given(None, "It says nothing of its making; it can be upscaled.") if foreign is None else _foreign(foreign)


def given_draft(path: Path, studio: Studio) -> Draft:
    """Read a draft that was saved, to finish it.

    Args:
        path: An image file.
        studio: The model that is loaded.

    Returns:
        The draft. Where its latents are gone, its stage 1 is sampled again.

    Raises:
        MrFlowError: It is no draft, its pixels were changed, or the model that made it is not the one that is loaded.
    """
    file = read_draft(path)
    studio.check_draft(path.name, file.record)
    if file.changed:
        raise MrFlowError(
            f"the pixels of the draft {path.name!r} are not those that were made, so it cannot be finished to the "
            "image that it promised; upscale it as an image instead."
        )
    return draft_of(f"the draft {path.name!r}", file.record, file.image, file.latents)


def _recorded(record: RunRecord, family: Family) -> Given:
    plan = StagedPlan.from_string(record.plan)
    seed = record.seed + record.image
    choices = Choices(
        prompt=record.prompt,
        negative=record.negative or "",
        size=f"{plan.requested_width}x{plan.requested_height}",
        seed=str(seed),
        nested=plan.noise == "nested",
    )
    lost = [text for text, is_so in _lost(record, plan, family) if is_so]
    if plan.family == family.name and len(plan.stages) == 2:
        low, high = plan.stages
        short = replace(choices, preset=plan.preset)
        spelled = replace(
            choices, low_steps=str(low.steps), refine_steps=str(high.steps), sigma=str(high.start_sigma or "")
        )
        wanted = replace(plan, seed=seed)
        choices = short if _makes(short, family, wanted) else spelled
        if not lost and not _makes(choices, family, wanted):
            lost.append("settings that the page has no controls for")
    kind = "A draft, made" if record.draft is not None else "Made"
    made = f"{kind} by mrflow with the model {quoted(record.model)} and the seed {seed}."
    more = f" The page leaves out: {', '.join(lost)}; {EXACT} repeats the image as it is." if lost else ""
    return Given(choices, made + more)


def _lost(record: RunRecord, plan: StagedPlan, family: Family) -> tuple[tuple[str, bool], ...]:
    """What the page has no controls for, each with whether the record has it."""
    return (
        (f"its model's steps ({family.title} is loaded)", plan.family != family.name),
        (f"that it has {len(plan.stages)} stage{'s' * (len(plan.stages) > 1)}", len(plan.stages) != 2),
        (f"the image {quoted(record.start)} that it began with", record.start is not None),
        ("its LoRAs", bool(record.loras)),
        ("the prompt of its later stages", (record.refine_prompt, record.refine_negative) != (None, None)),
    )


def _makes(choices: Choices, family: Family, plan: StagedPlan) -> bool:
    """Whether the page makes this plan of these settings."""
    try:
        return choices.plan(family) == plan
    except MrFlowError:
        return False


def _foreign(run: ForeignRun) -> Given:
    size = "" if run.width is None or run.height is None else f"{run.width}x{run.height}"
    choices = Choices(prompt=run.prompt, negative=run.negative or "", size=size)
    if run.seed is not None:
        choices = replace(choices, seed=str(run.seed))
    parts = {"the negative prompt": run.negative, "the seed": run.seed is not None, "the size": size}
    taken = ", ".join(("the prompt", *(name for name, value in parts.items() if value)))
    unusable = f" {', '.join(run.unusable)} cannot be used here." if run.unusable else ""
    return Given(
        choices,
        f"Made by {run.program}. It gives {taken}; model, LoRAs, sampler and steps are those of the page, so this "
        f"becomes a new image.{unusable}",
    )
