"""What the page says: the plan before a run, the progress, the result, a refusal; as HTML with all text escaped."""

from __future__ import annotations

import html
import re
import sys
import traceback
from collections.abc import Iterable, Sequence

from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched.apps.ui.choices import Choices
from mrflow_sched.apps.ui.jobs import Job
from mrflow_sched.apps.ui.studio import Start, Studio
from mrflow_sched.apps.ui.work import Made
from mrflow_sched.demo.words import unknown_words, unread
from mrflow_sched.measure.compare import native_plan_of
from mrflow_sched.plan.cost import Speeds, work_ratio
from mrflow_sched.plan.stages import StagedPlan

NAMES = {"low_steps": "Low steps", "refine_steps": "Refine steps", "sigma": "Sigma", "preset": "Preset"}
"""The labels of controls that go by another name in a plan's refusals."""

GONE = "The page was ended or started again, or the file is gone; load the page anew."
"""What a tab is told that asks for something that the server does not have any more."""

_NAMED = 5
# How refusals for the command line begin or end, and what the page says instead.
_SPOKEN = {
    **{rf"\A{name} ": f"{label} " for name, label in NAMES.items()},
    r"\Asize or shift_tokens ": "Size ",
    r"\A(width|height) ": r"The \1 in Size ",
    r"\A--image is ": "The image is ",
    r", or choose the shape with --size\.\Z": ".",
    r"(?<=\s)(--[a-z].*)\Z": r"\1 Such options are those of mrflow ui; start it again with them.",
}


def plan_html(studio: Studio, choices: Choices, speeds: Speeds | None) -> str:
    """The live line: what will run, or why it cannot. Never raises.

    Args:
        studio: The model.
        choices: Values of the controls.
        speeds: This machine's, from the last run; None: none is known yet.

    Returns:
        The line and its notes.
    """
    try:
        choices.check_texts()
        plan = choices.plan(studio.family, upscaler_kind=studio.upscaler_kind)
        studio.check(plan)
    except Exception as error:
        return refused_html(studio, error)
    notes = [*plan.notes, *_prompt_notes(studio, choices)]
    return _box("on", plan_line(plan, studio, speeds), notes)


def both_html(studio: Studio, choices: Choices) -> str:
    """What making the image both ways will do. Never raises.

    Args:
        studio: The model.
        choices: Values of the controls.

    Returns:
        A line, or why it cannot be done.
    """
    try:
        choices.check_texts()
        plan = choices.plan(studio.family, upscaler_kind=studio.upscaler_kind)
        native = native_plan_of(plan, family=studio.family)
        studio.check(native)
    except Exception as error:
        return refused_html(studio, error)
    return said_html(
        f"Native: {native.width}×{native.height}, {native.stages[0].steps} steps, about "
        f"{work_ratio(plan, studio.family):.2g} times the work of the staged image; each way runs shortly before, "
        "uncounted."
    )


def upscale_html(studio: Studio, choices: Choices, start: Start) -> str:
    """What upscaling an image will do.

    Args:
        studio: The model.
        choices: Values of the controls.
        start: The image.

    Returns:
        A line.

    Raises:
        MrFlowError: As in `Choices.plan`, or the run does not fit into memory.
    """
    choices.check_texts()
    plan = choices.plan(studio.family, start, studio.upscaler_kind)
    studio.check(plan)
    rows, columns = start.pixels.shape[-2:]
    return said_html(f"Upscaling makes {plan.width}×{plan.height} of {columns}×{rows}, with the prompt and Preset.")


def plan_line(plan: StagedPlan, studio: Studio, speeds: Speeds | None) -> str:
    """A plan in one line.

    Args:
        plan: The plan.
        studio: The model and the upscaler.
        speeds: As in `plan_html`.

    Returns:
        Sizes, steps, forwards and what to expect.
    """
    first, *later = plan.stages
    parts = [f"{first.width}×{first.height} ×{first.steps}"]
    for before, stage in zip(plan.stages, later, strict=False):
        refine = f" ×{stage.steps} @ σ {stage.start_sigma:.4g}" if stage.steps else ""
        named = studio.upscaler_name if studio.upscaler_name == "Lanczos" else f"upscaler {studio.upscaler_name},"
        parts.append(f"{named} ×{stage.width / before.width:.3g}")
        parts.append(f"{stage.width}×{stage.height}{refine}")
    line = f"{' → '.join(parts)} · {plan.forwards} forwards"
    ratio = work_ratio(plan, studio.family)
    line += f" · about {ratio:.2g}× less work than {plan.native_steps} steps" if ratio > 1 else ""
    seconds = None if speeds is None else sum(value for _, value in speeds.predict(plan, studio.family))
    return line if seconds is None else f"{line} · about {seconds:.2g} s"


def _prompt_notes(studio: Studio, choices: Choices) -> Iterable[str]:
    unknown = unknown_words(choices.prompt) if studio.embedded else ()
    if unknown:
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        named = ", ".join(repr(word[:24]) for word in unknown[:_NAMED])
        yield f"The embedded model does not know {named}{more}; the words that it knows are listed below."
    why = unread(choices.prompt) if studio.embedded else None
    if why is not None:
        yield f"The embedded model does not understand this prompt: {why}. Examples that it does are listed below."


def learned(studio: Studio, made: Made) -> Speeds | None:
    """This machine's speeds, from an image that was made.

    Args:
        studio: The model.
        made: The image.

    Returns:
        The speeds; None where the run does not show them (one stage, stopped, an unknown family).
    """
    if made.unfinished:
        return None
    try:
        seconds = {timing.name: timing.seconds for timing in made.timings}
        return Speeds.measured(made.wish.plan, seconds, studio.family)
    except MrFlowError:
        return None


def progress_html(job: Job) -> str:
    """How far a job is.

    Args:
        job: The job.

    Returns:
        A bar and a few words.
    """
    percent = round(100 * job.fraction)
    bar = f'<div class="mrflow-bar"><div style="width:{percent}%"></div></div>'
    return f'<div class="mrflow-box mrflow-on" role="status">{bar}<p>{html.escape(job.words)} · {percent} %</p></div>'


def made_html(made: Sequence[Made]) -> str:
    """What was made.

    Args:
        made: The images of a job, in order.

    Returns:
        Names, seeds and seconds, and what is to be said of them.
    """
    notes = dict.fromkeys(note for each in made for note in each.notes)
    said = [
        f"{_way(made, each)}{'Unfinished, saved' if each.unfinished else 'Saved'} as {each.path} · "
        f"seed {each.wish.plan.seed} · {each.seconds:.2f} s"
        for each in made
    ]
    return _box("done", said[-1], [*said[:-1], *notes])


def _way(made: Sequence[Made], each: Made) -> str:
    """Which of the two ways an image was made; empty where there is one way."""
    if len({len(one.wish.plan.stages) == 1 for one in made}) == 1:
        return ""
    return "Native: " if len(each.wish.plan.stages) == 1 else "Staged: "


def said_html(sentence: str) -> str:
    """A sentence that is neither a result nor a refusal.

    Args:
        sentence: The sentence.

    Returns:
        The sentence in a box.
    """
    return _box("off", sentence, ())


def refused_html(studio: Studio, error: BaseException) -> str:
    """Why something was not done; of a fault, the terminal gets the traceback.

    Args:
        studio: Knows refusals.
        error: What was raised.

    Returns:
        One sentence in a box.
    """
    sentence = studio.refusal(error)
    if sentence is None:
        traceback.print_exception(error, file=sys.stderr)
        sentence = (
            f"A fault of mrflow, or of a library or model that it uses ({type(error).__name__}: {first_line(error)}); "
            "the terminal shows where."
        )
    named = sentence
    for pattern, spoken in _SPOKEN.items():
        named = re.sub(pattern, spoken, named)
    return _box("refused", named[:1].upper() + named[1:], ())


def _box(state: str, line: str, notes: Iterable[str]) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    body = f"<p>{html.escape(line)}</p>" + (f"<ul>{items}</ul>" if items else "")
    return f'<div class="mrflow-box mrflow-{state}" role="status">{body}</div>'
