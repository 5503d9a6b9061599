"""What `mrflow draft` and `mrflow finish` share: drafts as files, contact sheets, and the later stages of a draft."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.apps.cli.console import say
from mrflow_sched.apps.cli.load import Job, Loaded
from mrflow_sched.apps.cli.results import Results
from mrflow_sched.apps.cli.stopping import Stop
from mrflow_sched.images.record import SHEET, RunRecord

if TYPE_CHECKING:
    from torch import Tensor

    from mrflow_sched.drafts import Draft
    from mrflow_sched.sampler import StagedResult
    from mrflow_sched.sampling.progress import Progress

MOST_DRAFTS = 4096
"""Most drafts of a contact sheet; one that lists more was not written here."""

_PART = re.compile(r"0*([1-9][0-9]{0,5})(?:-0*([1-9][0-9]{0,5}))?")


# --- drafts as files ---------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedDraft:
    """A draft that was made and saved.

    Attributes:
        draft: The draft.
        path: Its file.
        record: What the file says of its run.
    """

    draft: Draft
    path: Path
    record: RunRecord


def save(folder: Path, draft: Draft, record: RunRecord) -> SavedDraft:
    """Write a draft with the record of its run and its latents.

    Args:
        folder: Where it goes.
        draft: The draft.
        record: Of the drafts' common run; plan, prompt and seed of this one are filled in.

    Returns:
        The draft and where it is.

    Raises:
        FileError: The file cannot be written.
    """
    from mrflow_sched.images.drafts import save_draft

    own = replace(record, plan=draft.plan.to_string(), prompt=draft.prompt, seed=draft.seed, draft_steps=draft.steps)
    return SavedDraft(draft, *save_draft(folder, f"draft-{draft.seed}", draft.image, draft.latents, own))


def sheet_text(drafts: Sequence[SavedDraft]) -> dict[str, str]:
    """The text of a contact sheet.

    Args:
        drafts: In the order of their numbers on the sheet.

    Returns:
        Keyword -> text.
    """
    return {
        SHEET: json.dumps([{"file": each.path.name, "record": json.loads(each.record.to_json())} for each in drafts])
    }


# --- which drafts are meant --------------------------------------------------------------------


@dataclass(frozen=True)
class Picked:
    """A draft that is to be finished.

    Attributes:
        name: As the user named it.
        record: Of its run.
        job: The whole run.
        draft: The draft; its latents are None where stage 1 runs again.
        pixels: (3, h, w): the file's pixels, where they are not those that were made and take the place of the latents.
    """

    name: str
    record: RunRecord
    job: Job
    draft: Draft
    pixels: Tensor | None = None


@dataclass(frozen=True)
class Pick:
    """A word of `mrflow finish`: a draft's file, or numbers on a contact sheet.

    Attributes:
        file: A draft or a contact sheet.
        numbers: From 1, in the order in which they were given; empty: the file is a draft.
    """

    file: Path
    numbers: tuple[int, ...] = ()

    @classmethod
    def from_text(cls, text: str) -> Pick:
        """Read a word.

        Args:
            text: FILE, or SHEET#3, SHEET#1,4-6.

        Returns:
            The pick.

        Raises:
            MrFlowError: What stands behind the # is no list of numbers.
        """
        path, mark, numbers = text.rpartition("#")
        if not mark or not path or Path(text).is_file():
            return cls(Path(text))
        found: list[int] = []
        for part in numbers.split(","):
            match = _PART.fullmatch(part.strip())
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if not first <= last < first + MOST_DRAFTS:
                raise MrFlowError(f"{quoted(text)} should end in numbers of drafts, such as #3 or #1,4-6.")
            found.extend(range(first, last + 1))
        return cls(Path(path), tuple(dict.fromkeys(found)))


def files_of(pick: Pick) -> tuple[tuple[str, Path, RunRecord | None], ...]:
    """The drafts' files that a word stands for.

    Args:
        pick: The word.

    Returns:
        (name, file, the record of the contact sheet, or None) for each draft.

    Raises:
        MrFlowError: The file is no contact sheet, or has no such number; a sheet without a number was given.
    """
    from mrflow_sched.images.files import read_text

    texts = read_text(pick.file)
    if SHEET not in texts:
        if pick.numbers:
            raise MrFlowError(
                f"{str(pick.file)!r} is no contact sheet of drafts; leave out #{','.join(map(str, pick.numbers))}, or "
                "give the sheet that mrflow draft made."
            )
        return ((str(pick.file), pick.file, None),)
    listed = _listed(pick.file, texts[SHEET])
    if not pick.numbers:
        raise MrFlowError(
            f"{str(pick.file)!r} shows {len(listed)} drafts; say which: {pick.file}#1 to {pick.file}#{len(listed)}, or "
            "several as in #1,4-6."
        )
    wrong = next((number for number in pick.numbers if number > len(listed)), None)
    if wrong is not None:
        raise MrFlowError(f"{str(pick.file)!r} has drafts 1 to {len(listed)}, and no {wrong}.")
    chosen = ((number, *listed[number - 1]) for number in pick.numbers)
    return tuple((f"{pick.file}#{number}", pick.file.parent / name, record) for number, name, record in chosen)


def _listed(file: Path, text: str) -> list[tuple[str, RunRecord]]:
    """The files and records of a contact sheet. Raises MrFlowError."""
    altered = MrFlowError(f"the contact sheet {str(file)!r} has a list of drafts that was altered; give drafts' files.")
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise altered from error
    if not isinstance(found, list) or not 0 < len(cast("list[Any]", found)) <= MOST_DRAFTS:
        raise altered
    listed: list[tuple[str, RunRecord]] = []
    for each in cast("list[Any]", found):
        entry = cast("dict[str, Any]", each) if isinstance(each, dict) else {}
        name = entry.get("file")
        if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
            raise altered
        listed.append((name, RunRecord.from_json(json.dumps(entry.get("record")))))
    return listed


# --- the later stages --------------------------------------------------------------------------


def finish_one(
    loaded: Loaded,
    picked: Picked,
    *,
    bar: Callable[[str, Progress], None],
    name: str,
    stop: Stop,
    folder: Path,
    suffix: str,
    record: RunRecord,
    results: Results,
    keep_stages: bool = False,
) -> StagedResult:
    """Run the later stages of a draft and save the image.

    Args:
        loaded: The model and the upscaler.
        picked: The draft.
        bar: Shows the progress.
        name: Of the run, for the bar.
        stop: Polled at every step.
        folder: Where the image goes.
        suffix: Ending of the image file.
        record: Of the finished run.
        results: Notes the image and the seconds.
        keep_stages: Save the image of each stage too.

    Returns:
        The run's result.
    """
    from mrflow_sched.drafts import finish

    if picked.pixels is not None:
        say(
            f"{picked.name}: its pixels are not those that were made, so they are what is finished, from 8 bits a "
            "channel: near, not equal to the whole run."
        )
    result = finish(
        *(loaded.engine, picked.draft),
        pixels=picked.pixels,
        upscaler=loaded.upscaler,
        callback=lambda step: bar(name, step),
        cancel=stop.polled,
        keep_stages=keep_stages,
    )
    results.add_timings(result.timings)
    if not result.empty:
        results.save(folder, suffix, picked.job, record, result)
    return result
