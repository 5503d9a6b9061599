"""What a saved image says of its run, and whether that can be repeated here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mrflow_sched._runtime.errors import MrFlowError, shown
from mrflow_sched.apps.cli.console import say
from mrflow_sched.apps.cli.inputs import (
    LoraChoice,
    Reference,
    StartImage,
    hash_of,
    read_mask,
    read_references,
    read_start,
)
from mrflow_sched.apps.cli.load import EMBEDDED, UPSCALER, Job
from mrflow_sched.apps.cli.meaning import left_of
from mrflow_sched.apps.cli.options import ModelChoices, PlanChoices
from mrflow_sched.apps.cli.parsing import check_seeds
from mrflow_sched.images.record import KEY, RunRecord
from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.options import PlanOptions
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from mrflow_sched.images.foreign import ForeignRun, NodeSettings
    from mrflow_sched.plan.checks import UpscalerKind
    from mrflow_sched.plan.families import Family


@dataclass(frozen=True)
class Changes:
    """What was asked of a new run, in place of what another program's image says.

    Attributes:
        names: What was given of all this, by its names on the command line. A record leaves nothing to be changed.
        choices: Options of the plan.
        batch: How many images.
        negative: The negative prompt; None: the image's.
        refine_prompt: The prompt of the stages after the first, or None.
        refine_negative: Their negative prompt, or None.
        upscaler_kind: Of the upscaler that is used.
    """

    names: tuple[str, ...]
    choices: PlanChoices
    batch: int
    negative: str | None
    refine_prompt: str | None
    refine_negative: str | None
    upscaler_kind: UpscalerKind


def repeated_job(
    file: Path,
    model: ModelChoices,
    image: Path | None,
    family: str | Family,
    changes: Changes,
    references: tuple[Path, ...] = (),
    refine_mask: Path | None = None,
) -> Job:
    """Read what an image says of its run: our record, or the texts of A1111 and ComfyUI.

    Args:
        file: An image file.
        model: The model that was asked for.
        image: The file of --image, or None.
        family: The model's, from `plan_family`.
        changes: What else was asked for.
        references: The files of --reference.
        refine_mask: The file of --refine-mask, or None.

    Returns:
        The job: the recorded run, of whose images only the recorded one is saved; or a new run with the prompts, the
        seed and the size of another program's image where `changes` gives none, and with all numbers of MrFlow's nodes
        in ComfyUI.

    Raises:
        MrFlowError: The file says nothing that can be read, was made with other files than those given, or has a
            record, beside which `changes` have no meaning.
    """
    from mrflow_sched.images.files import read_text
    from mrflow_sched.images.foreign import read_foreign

    texts = read_text(file)
    if KEY in texts:
        if changes.names:
            raise MrFlowError(
                f"--from takes the prompt and all numbers from the image's record, so {changes.names[0]} has no "
                "meaning; leave one out."
            )
        record = RunRecord.from_json(texts[KEY])
        mask = _recorded_mask(file, record, refine_mask)
        return replace(_recorded_job(file, record, model, image, references), refine_mask=mask)
    foreign = read_foreign(texts)
    if foreign is None:
        raise MrFlowError(
            f"--from is {str(file)!r}, which has no mrflow record; give an image that mrflow, A1111 or ComfyUI made."
        )
    nodes = foreign.nodes
    if image is not None and (nodes is None or not nodes.from_image):
        raise MrFlowError(
            f"--from is {str(file)!r}, whose prompt is taken for a new run from noise; leave out --image."
        )
    if references:
        raise MrFlowError(f"--from is {str(file)!r}, which has no mrflow record of references; leave out --reference.")
    if refine_mask is not None:
        raise MrFlowError(f"--from is {str(file)!r}, which has no mrflow record of a mask; leave out --refine-mask.")
    if nodes is not None:
        known = get_family(family) if isinstance(family, str) else family
        return _node_job(file, foreign, nodes, known, changes, None if image is None else read_start(image, None))
    return _new_job(file, foreign, family, changes)


def _new_job(file: Path, foreign: ForeignRun, family: str | Family, changes: Changes) -> Job:
    """Make the job of a new run with what another program's image says and `changes` do not."""
    asked = changes.choices
    size = (foreign.width, foreign.height) if foreign.width is not None and foreign.height is not None else None
    negative = foreign.negative if changes.negative is None else None
    own: PlanOptions = {"seed": foreign.seed} if foreign.seed is not None and "seed" not in asked.options else {}
    parts = {"the negative prompt": negative, "the seed": own, "the size": size if asked.size is None else None}
    taken = ", ".join(("the prompt", *(name for name, value in parts.items() if value)))
    unusable = f" Not taken, as it cannot be used here: {', '.join(foreign.unusable)}." if foreign.unusable else ""
    say(
        f"{str(file)!r} was made by {foreign.program}. Taken from it: {taken}.{unusable} Not taken: model, LoRAs (see "
        "--lora), weights of words, sampler, steps, guidance; so this is a new image, not a repeated one."
    )
    options: PlanOptions = {**own, **asked.options}
    chosen = replace(asked, size=asked.size or size, options=options)
    plan = chosen.make_plan(family, upscaler_kind=changes.upscaler_kind)
    check_seeds(plan.seed, changes.batch)
    return _job_of(plan, foreign, changes, negative)


def _job_of(
    plan: StagedPlan, foreign: ForeignRun, changes: Changes, negative: str | None, later: str | None = None
) -> Job:
    """A new run with the prompts of another program's image; `negative` and `later` are those of its that are taken."""
    return Job(
        plan,
        foreign.prompt,
        negative or changes.negative,
        changes.batch,
        tuple(range(changes.batch)),
        refine_prompt=changes.refine_prompt or later,
        refine_negative=changes.refine_negative,
    )


def _node_job(
    file: Path, foreign: ForeignRun, nodes: NodeSettings, family: Family, changes: Changes, start: StartImage | None
) -> Job:
    """Make the job of the run of MrFlow's nodes in ComfyUI; what `changes` ask for takes the place of its numbers."""
    asked = changes.choices
    options = left_of(foreign.options_for(family), asked.options)
    size = asked.size or _size(foreign, start)
    guided = family.guidance_kind == "cfg"
    negative = foreign.negative if changes.negative is None and guided else None
    later = nodes.refine_prompt if changes.refine_prompt is None else None
    parts = {
        "the negative prompt": negative,
        "the prompt of the later stages": later,
        "the size": size if asked.size is None else None,
    }
    numbers = [f"{name.replace('_', ' ')} {shown(str(value))}" for name, value in options.items()]
    taken = ", ".join(("the prompt", *(name for name, value in parts.items() if value), *numbers))
    left = [*nodes.left, *_misfits(foreign, nodes, family)]
    unusable = f" Not taken, as it cannot be used here: {', '.join(foreign.unusable)}." if foreign.unusable else ""
    rest = f" Not taken: {', '.join(left)}." if left else ""
    say(f"{str(file)!r} was made by MrFlow's nodes in ComfyUI. Taken from it: {taken}.{unusable}{rest}")
    if nodes.batch > 1 and changes.batch == 1:
        say(
            f"It is one of {nodes.batch} images of a run, and the file does not say which: this makes the first; "
            f"--batch {nodes.batch} makes all."
        )
    if nodes.from_image and start is None:
        say(
            "It was made from another image, which the file does not hold, so this is a new image, not a repeated one; "
            "give that other one with --image FILE."
        )
    plan = replace(asked, size=size).make_plan(family, start, options, changes.upscaler_kind)
    check_seeds(plan.seed, changes.batch)
    return replace(_job_of(plan, foreign, changes, negative, later), start=start)


def _size(foreign: ForeignRun, start: StartImage | None) -> tuple[int, int] | None:
    """The final size; where one side was left to the shape of the image that the run started from, that decides."""
    width, height = foreign.width, foreign.height
    if start is not None and (width is None) != (height is None):
        rows, columns = start.pixels.shape[-2:]
        width, height = width or round((height or 0) * columns / rows), height or round((width or 0) * rows / columns)
    return None if width is None or height is None else (width, height)


def _misfits(foreign: ForeignRun, nodes: NodeSettings, family: Family) -> Iterator[str]:
    """What the model here takes otherwise."""
    if nodes.family not in (None, family.name):
        yield f"the family {nodes.family} (this model is of {family.name})"
    if family.guidance_kind == "embedded":
        if {nodes.cfg, nodes.refine_cfg} - {None, 1.0}:
            yield f"cfg, as {family.title} takes its guidance as an input"
    elif foreign.guidance is not None:
        yield f"the embedded guidance, as {family.title} takes none"
    if foreign.negative and family.guidance_kind != "cfg":
        yield f"the negative prompt, as {family.title} takes none"


def _recorded_job(
    file: Path, record: RunRecord, model: ModelChoices, image: Path | None, references: tuple[Path, ...]
) -> Job:
    """Make the job of a record. The whole batch runs again, because the last bits depend on the batch's size."""
    check_source(str(file), model, record)
    start = _recorded_start(file, record, image)
    seen = _recorded_references(file, record, references)
    if record.unfinished:
        say(f"{str(file)!r} is an unfinished image; its run is now completed.")
    if record.preview is not None:
        say(f"{str(file)!r} is a preview ({shown(record.preview)}); its native run is now made in full.")
    plan = StagedPlan.from_string(record.plan)
    later = record.refine_prompt, record.refine_negative
    return Job(plan, record.prompt, record.negative, record.batch, (record.image,), record, start, *later, seen)


def _recorded_references(file: Path, record: RunRecord, files: tuple[Path, ...]) -> tuple[Reference, ...]:
    """Read the references of a recorded run, which the record knows by their hashes alone."""
    wanted = len(record.references)
    if not wanted and files:
        raise MrFlowError(f"{str(file)!r} was made without references; leave out --reference.")
    if wanted != len(files):
        raise MrFlowError(
            f"{str(file)!r} was made with {wanted} reference{'s' if wanted > 1 else ''}, which it does not hold; give "
            "the same files again, each with --reference."
        )
    found = read_references(files)
    other = next((one for one, known in zip(found, record.references, strict=True) if one.sha256 != known), None)
    if other is not None:
        raise MrFlowError(
            f"{str(other.file)!r} is not the reference that {str(file)!r} was made with; give the same files, in the "
            "same order, each with --reference."
        )
    return found


def _recorded_mask(file: Path, record: RunRecord, mask: Path | None) -> Reference | None:
    """Read the mask of a recorded run, which the record knows by its hash alone."""
    if record.refine_mask is None:
        if mask is not None:
            raise MrFlowError(f"{str(file)!r} was made without a mask; leave out --refine-mask.")
        return None
    if mask is None:
        raise MrFlowError(
            f"{str(file)!r} was made with a mask of what to refine, which it does not hold; give the same file with "
            "--refine-mask."
        )
    found = read_mask(mask)
    if found.sha256 != record.refine_mask:
        raise MrFlowError(
            f"{str(mask)!r} is not the mask that {str(file)!r} was made with; give the same file with --refine-mask."
        )
    return found


def _recorded_start(file: Path, record: RunRecord, image: Path | None) -> StartImage | None:
    """Read the image that a recorded run started from."""
    if record.start_sha256 is None:
        if image is not None:
            raise MrFlowError(f"{str(file)!r} was made from noise; leave out --image.")
        return None
    if image is None:
        raise MrFlowError(f"{str(file)!r} was made from the image {record.start!r}; give that file with --image.")
    start = read_start(image, record.strength)
    if start.sha256 != record.start_sha256:
        raise MrFlowError(
            f"{str(file)!r} was made from the image {_named(record.start, record.start_sha256)}, "
            f"not {_named(image.name, start.sha256)}; give that file with --image."
        )
    return start


def recorded_loras(model: ModelChoices, record: RunRecord) -> ModelChoices:
    """Give the LoRAs of a repeated run their recorded order and scales.

    Args:
        model: The model and the files of --lora, in any order.
        record: The record that is repeated.

    Returns:
        The same choices, with the record's LoRAs.

    Raises:
        MrFlowError: A file is missing, or one was given that the run did not have, or had with another scale.
    """
    given = {hash_of(choice.file): choice for choice in model.loras}
    for lora in record.loras:
        choice = given.get(lora.sha256)
        if choice is None:
            raise MrFlowError(
                f"the image was made with the LoRA {_named(lora.file, lora.sha256)}; give that file with --lora."
            )
        if choice.scale_given and choice.scale != lora.scale:
            raise MrFlowError(
                f"the image was made with the LoRA {choice.file.name!r} at the scale {lora.scale:g}, not "
                f"{choice.scale:g}; leave the scale out."
            )
    extra = [choice.file for digest, choice in given.items() if digest not in {lora.sha256 for lora in record.loras}]
    if extra:
        raise MrFlowError(f"the image was made without the LoRA {extra[0].name!r}; leave it out.")
    return replace(model, loras=tuple(LoraChoice(given[lora.sha256].file, lora.scale) for lora in record.loras))


def check_weights(model: ModelChoices, file: Path | None, record: RunRecord) -> None:
    """Refuse to repeat a run with another model or upscaler. Hashes tell; nothing is loaded.

    Args:
        model: The model that was asked for.
        file: The upscaler's file; None means Lanczos.
        record: The record that is repeated.

    Raises:
        MrFlowError: The weights are others than those of the record.
    """
    check_model(model, record)
    other = other_upscaler(file, record)
    if other is not None:
        raise MrFlowError(other)


def check_model(model: ModelChoices, record: RunRecord) -> None:
    """Refuse to go on from a record with another model. Hashes tell; nothing is loaded.

    Args:
        model: The model that was asked for.
        record: The record.

    Raises:
        MrFlowError: The weights are others than those of the record.
    """
    from mrflow_sched import demo
    from mrflow_sched.engines.diffusers.folder import model_fingerprint

    if model_fingerprint(model.model or demo.weights_path(), model.config) != record.model_fingerprint:
        raise MrFlowError(
            f"the image was made with other weights of {record.model!r} than those found; "
            "give --model the folder that it was made with."
        )


def other_upscaler(file: Path | None, record: RunRecord) -> str | None:
    """What to say where the upscaler is not that of a record.

    Args:
        file: The upscaler's file; None means Lanczos.
        record: The record.

    Returns:
        One sentence; None where it is the same, or the run had none.
    """
    digest = None if file is None else hash_of(file)
    if record.upscaler == "none" or digest == record.upscaler_sha256:
        return None
    advice = "leave out --upscaler" if record.upscaler_sha256 is None else "give that file with --upscaler"
    found = "Lanczos" if file is None else file.stem
    return (
        f"the image was made with the upscaler {_named(record.upscaler, record.upscaler_sha256)}, "
        f"not {_named(found, digest)}; {advice}."
    )


def check_source(name: str, model: ModelChoices, record: RunRecord) -> None:
    """Refuse a record of the embedded model beside --model, and one of another model without it.

    Args:
        name: Of the image file, as it stands in the sentence.
        model: The model that was asked for.
        record: The record of the image.

    Raises:
        MrFlowError: They do not fit.
    """
    if record.model != EMBEDDED and model.model is None:
        raise MrFlowError(f"{name!r} was made with the model {record.model!r}; name it with --model DIR.")
    if record.model == EMBEDDED and model.model is not None:
        raise MrFlowError(f"{name!r} was made with the embedded model; leave out --model.")


def _named(name: str | None, digest: str | None) -> str:
    """A file's name with the first digits of its hash, which tell two files of one name apart."""
    return repr(name) if digest is None else f"{name!r} (SHA-256 {digest[:12]}...)"


def say_differences(old: RunRecord, new: RunRecord) -> None:
    """Say what may change the last bits of a repeated image.

    Args:
        old: The record that is repeated.
        new: What is loaded now.
    """
    moved = [f"{name} {before!r} is now {now!r}" for name, before, now in _arithmetic(old, new) if before != now]
    if moved:
        say(f"The image may differ from the original in its last bits: {', '.join(moved)}.")


def _arithmetic(old: RunRecord, new: RunRecord) -> Iterator[tuple[str, object, object]]:
    """Yield (name, then, now) of everything besides the weights on which the last bits depend."""
    yield "device", old.device, new.device
    for part in dict.fromkeys((*new.dtypes, *old.dtypes)):
        before = old.dtype_of(part)
        # An older version did not record the upscaler's, or recorded it where none was used; another one is told of.
        same = old.upscaler_sha256 == new.upscaler_sha256 and new.upscaler != "none"
        if part != UPSCALER or (before is not None and same):
            yield f"dtype of {part}", before, new.dtype_of(part)
    yield "threads", old.threads, new.threads
    for name, value in new.versions.items():
        yield name, old.versions.get(name), value
