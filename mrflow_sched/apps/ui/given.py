"""Image files that are dropped onto the page: what they say of their making, as settings of the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mrflow_sched._runtime.errors import MrFlowError, first_line, quoted, shown
from mrflow_sched.apps.ui.choices import Choices
from mrflow_sched.apps.ui.studio import Studio
from mrflow_sched.drafts import draft_of, fitted, rerun_note
from mrflow_sched.images.drafts import read_draft
from mrflow_sched.images.files import read_text
from mrflow_sched.images.foreign import read_foreign
from mrflow_sched.images.record import KEY, SHEET, RunRecord
from mrflow_sched.measure.compare import native_plan_of
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from mrflow_sched.drafts import Draft
    from mrflow_sched.images.foreign import ForeignRun, NodeSettings
    from mrflow_sched.plan.checks import UpscalerKind
    from mrflow_sched.plan.families import Family

EXACT = "mrflow generate --from"
"""The command that repeats what the page has no controls for."""
_OTHER = "settings that the page has no controls for"
_PARTS: dict[str, Callable[[StagedPlan], object]] = {
    "its number of stages": lambda plan: len(plan.stages),
    "which share of its tokens the network saw": lambda plan: [stage.shares for stage in plan.stages],
    "its steps": lambda plan: [stage.steps for stage in plan.stages],
    "its sigma": lambda plan: [stage.start_sigma for stage in plan.stages[1:]],
    "its solver": lambda plan: [(stage.solver, stage.renoise) for stage in plan.stages],
    "its guidance": lambda plan: [(stage.guidance, stage.guidance_interval) for stage in plan.stages],
    "the precision of its network": lambda plan: [stage.precision for stage in plan.stages],
    "its few-step LoRA": lambda plan: [stage.few_step for stage in plan.stages],
    "its tiles": lambda plan: plan.tile,
}
"""Parts of a plan in words."""


@dataclass(frozen=True)
class Given:
    """What a file says of its making.

    Attributes:
        choices: The settings of the page that come nearest; None: it says nothing.
        words: A sentence or two for the user.
    """

    choices: Choices | None
    words: str


def read_given(path: Path, family: Family, upscaler_kind: UpscalerKind = "network") -> Given:
    """Read what an image file says of its making: our record, or the texts of A1111 and ComfyUI.

    Args:
        path: An image file.
        family: That of the loaded model.
        upscaler_kind: What upscales the page's images.

    Returns:
        Its settings, and what is to be said of them.

    Raises:
        MrFlowError: It is no image file, or its record cannot be read.
    """
    texts = read_text(path)
    if KEY in texts:
        return _recorded(RunRecord.from_json(texts[KEY]), path, family, upscaler_kind)
    if SHEET in texts:
        return Given(None, "A contact sheet of drafts; to finish one, drop the single draft's file.")
    foreign = read_foreign(texts)
    return (
        Given(None, "It says nothing of its making; it can be upscaled.")
        if foreign is None
        else _foreign(foreign, family)
        if foreign.nodes is None
        else _of_nodes(foreign, foreign.nodes, family, upscaler_kind)
    )


def given_draft(path: Path, studio: Studio) -> Draft:
    """Read a draft that was saved, to finish it.

    Args:
        path: An image file.
        studio: The model that is loaded.

    Returns:
        The draft. Where its latents are gone or not such as the model leaves, its stage 1 is sampled again.

    Raises:
        MrFlowError: It is no draft, its pixels were changed, or the model that made it is not the one that is loaded.
    """
    texts = read_text(path)
    if SHEET in texts:
        raise MrFlowError(f"{path.name!r} is a contact sheet of drafts; drop the single draft's file.")
    if KEY not in texts or RunRecord.from_json(texts[KEY]).draft is None:
        raise MrFlowError(f"{path.name!r} is no draft of mrflow; its settings can be taken, and it can be upscaled.")
    file = read_draft(path)
    studio.check_draft(path.name, file.record)
    if file.changed:
        raise MrFlowError(
            f"the pixels of the draft {path.name!r} are not those that were made, so it cannot be finished to the "
            "image that it promised; upscale it as an image instead."
        )
    return fitted(draft_of(f"the draft {path.name!r}", file.record, file.image, file.latents), studio.engine)


def _recorded(record: RunRecord, path: Path, family: Family, kind_now: UpscalerKind) -> Given:
    plan = replace(StagedPlan.from_string(record.plan), seed=record.seed + record.image)
    negative, left = _negative(record.negative, family)
    choices = Choices(
        prompt=record.prompt,
        negative=negative,
        size=f"{plan.requested_width}x{plan.requested_height}",
        seed=str(plan.seed),
        nested=plan.noise == "nested",
    )
    lost = [*left, *(text for text, is_so in _lost(record, plan, family) if is_so)]
    if plan.family == family.name:
        choices, different = _nearest(choices, plan, family, kind_now)
        lost += different
    kind, exact = _kind(record)
    made = f"{kind} by mrflow with the model {quoted(record.model)} and the seed {plan.seed}."
    drafted = "" if record.draft is None else _finishing(path)
    more = f" The page leaves out: {', '.join(lost)}; {EXACT} {exact}." if lost else ""
    return Given(choices, made + drafted + more)


def _kind(record: RunRecord) -> tuple[str, str]:
    """What an image is, and what the command that repeats it makes of it."""
    if record.draft is not None:
        return "A draft, made", "makes the whole image"
    if record.preview is not None:
        return f"A preview ({shown(record.preview)}) of a native image, made", "makes the native image in full"
    if record.unfinished:
        return "An unfinished image, made", "completes its run"
    return "Made", "repeats the image as it is"


def _finishing(path: Path) -> str:
    """What is to be said of a draft before it is finished; empty: its image goes on from its latents."""
    file = read_draft(path)
    if file.changed:
        return " Its pixels were changed since, so it can be upscaled and not finished."
    note = rerun_note("It", draft_of(path.name, file.record, file.image, file.latents))
    return "" if note is None else f" {note}"


def _negative(text: str | None, family: Family) -> tuple[str, tuple[str, ...]]:
    """A negative prompt that the page can show, and what is left out for its sake."""
    if not text or family.guidance_kind == "cfg":
        return text or "", ()
    return "", (f"its negative prompt ({family.title} takes none)",)


def _lost(record: RunRecord, plan: StagedPlan, family: Family) -> tuple[tuple[str, bool], ...]:
    """What the page has no controls for, each with whether the record has it."""
    return (
        (f"its model's steps ({family.title} is loaded)", plan.family != family.name),
        ("that it is a native image", len(plan.stages) == 1),
        (f"the image {quoted(record.start)} that it began with", record.start is not None),
        ("its LoRAs", bool(record.loras)),
        ("its mask of what to refine", record.refine_mask is not None),
        ("the prompt of its later stages", (record.refine_prompt, record.refine_negative) != (None, None)),
    )


def _nearest(choices: Choices, plan: StagedPlan, family: Family, kind: UpscalerKind) -> tuple[Choices, tuple[str, ...]]:
    """The choices whose plan comes nearest to this one with the page's upscaler, and what differs all the same."""
    first, *later = plan.stages
    tried = [choices]  # of a native image the page can make a staged one
    if later:
        sigma = str(later[0].start_sigma or "")  # a stage without steps has none
        steps = {"low_steps": str(first.steps), "refine_steps": str(later[0].steps)}
        short = replace(choices, preset=plan.preset)
        tried = [short, replace(short, sigma=sigma), replace(choices, preset=_counts(plan), sigma=sigma)]
        if len(later) == 1:
            tried.append(replace(choices, **steps, sigma=sigma))
    made = [(each, _plan(each, len(plan.stages), family, kind)) for each in tried]
    found = [(each, _differences(own, plan)) for each, own in made if own is not None]
    return min(found, key=lambda pair: len(pair[1])) if found else (tried[-1], (_OTHER,))


def _counts(plan: StagedPlan) -> str:
    """The preset that counts the steps of each stage."""
    return "+".join(str(stage.steps) for stage in plan.stages)


def _plan(choices: Choices, stages: int, family: Family, kind: UpscalerKind) -> StagedPlan | None:
    """The page's plan of these choices, as a native one where there is one stage; None: it cannot be made."""
    try:
        plan = choices.plan(family, upscaler_kind=kind)
        return native_plan_of(plan, family=family) if stages == 1 else plan
    except MrFlowError:
        return None


def _differences(own: StagedPlan, plan: StagedPlan) -> tuple[str, ...]:
    """What differs between the page's plan and another, in words."""
    if own == replace(plan, upscaler_kind=own.upscaler_kind):
        return ()
    found = [name for name, part in _PARTS.items() if part(own) != part(plan)]
    sigmas_differ = [stage.sigmas for stage in own.stages] != [stage.sigmas for stage in plan.stages]
    if sigmas_differ and not {"its steps", "its sigma"} & {*found}:
        found.append("its shift or sigmas")
    return tuple(found) or (_OTHER,)


def _foreign(run: ForeignRun, family: Family) -> Given:
    size = "" if run.width is None or run.height is None else f"{run.width}x{run.height}"
    negative, lost = _negative(run.negative, family)
    choices = Choices(prompt=run.prompt, negative=negative, size=size)
    if run.seed is not None:
        choices = replace(choices, seed=str(run.seed))
    parts = {"the negative prompt": negative, "the seed": run.seed is not None, "the size": size}
    taken = ", ".join(("the prompt", *(name for name, value in parts.items() if value)))
    left = f" The page leaves out {lost[0]}." if lost else ""
    unusable = f" {', '.join(run.unusable)} cannot be used here." if run.unusable else ""
    return Given(
        choices,
        f"Made by {run.program}. It gives {taken}; model, LoRAs, sampler and steps are those of the page, so this "
        f"becomes a new image.{left}{unusable}",
    )


def _of_nodes(run: ForeignRun, nodes: NodeSettings, family: Family, kind: UpscalerKind) -> Given:
    """The settings that come nearest to a run of MrFlow's nodes in ComfyUI."""
    negative, without = _negative(run.negative, family)
    options = run.options_for(family)
    width, height = run.width or family.native_size[0], run.height or family.native_size[1]
    choices = Choices(
        prompt=run.prompt, negative=negative, size=f"{width}x{height}", nested="nested" in options.values()
    )
    if run.seed is not None:
        choices = replace(choices, seed=str(run.seed))
    left = [*nodes.left, *without]
    if nodes.refine_prompt is not None:
        left.append("the prompt of its later stages")
    if nodes.from_image:
        left.append("the image that it was made from")
    try:
        plan = make_plan(family, width, height, **{"upscaler_kind": kind, **options})
        choices, different = _nearest(choices, plan, family, kind)
    except MrFlowError as error:
        different = (f"its numbers ({first_line(error)})",)
    left += different
    batch = f" It is one of {nodes.batch} images of a run, and the file does not say which." if nodes.batch > 1 else ""
    lost = f" The page leaves out: {', '.join(left)}." if left else ""
    unusable = f" {', '.join(run.unusable)} cannot be used here." if run.unusable else ""
    return Given(choices, f"Made by MrFlow's nodes in ComfyUI; its settings were taken.{batch}{lost}{unusable}")
