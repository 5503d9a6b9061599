"""The accordion under txt2img: one switch, a live line that says what will run, and the rest folded away.

The same code runs on gradio 3.41 and 4.40. The line is made again from the values on the page whenever one of them
changes, the image's width and height included; nothing of the page is remembered.
"""

from __future__ import annotations

import html
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast

from mrflow_sched._runtime.errors import MrFlowError, first_line, quoted
from mrflow_sched.apps.webui import drafts, settings
from mrflow_sched.apps.webui.controls import AUTOMATIC, CHOICES, FIELDS, LABELS, LIMITS, Controls
from mrflow_sched.apps.webui.expected import Expected, expect, phrase
from mrflow_sched.apps.webui.hires import hires_note, hires_target
from mrflow_sched.apps.webui.host import ModelInfo, capabilities, probe_model
from mrflow_sched.apps.webui.infotext import field_value
from mrflow_sched.apps.webui.recipe import Recipe, make_recipe
from mrflow_sched.apps.webui.words import translated
from mrflow_sched.plan.checks import MAX_SIDE, MAX_STEPS, checked_number, checked_whole, is_number
from mrflow_sched.plan.families import get_family

__all__ = [
    "ADVANCED",
    "DROP",
    "FINISH_CHOSEN",
    "FINISH_FILES",
    "INFO",
    "Preview",
    "after_component",
    "build",
    "finish_line",
    "plan_html",
    "preview",
    "refusal",
]

logger = logging.getLogger("mrflow")

ADVANCED = "Advanced settings"
"""Label of the folded part."""

FINISH_FILES = "Finish drafts from files"
"""Label of the part where drafts of another day are finished."""

FINISH_CHOSEN = "MrFlow: finish the selected draft, or all that are marked (Ctrl + click marks a draft)"
"""Hint of the button under the gallery."""

DROP = "Draft images (PNG); Generate finishes them at full size"
"""Label of its box."""

INFO: Mapping[str, str] = {
    "preset": "automatic suits the loaded model; or low steps + refine steps, also your own, such as 16+2",
    "factor": "final size divided by the size of the first stage",
    "low_steps": "steps at low resolution; 0 uses the preset's",
    "refine_steps": "steps at the final size; 0 uses the preset's",
    "sigma": "fraction of noise that the refine steps start from, 0.02 to 0.9; 0 uses the preset's; for small "
    "lettering choose the preset detail",
    "shift": "schedule of the low-resolution steps",
    "solver": "multistep is second order, at the cost of Euler; automatic takes the solver that suits the model",
    "upscaler": "upscales the image between the stages; x2 models are best",
    "refine_cfg": "guidance of the refine steps; off halves their cost",
    "refine_seed": "noise of the refine steps",
    "colour_guard": "auto removes a colour shift that the later stages introduce",
    "draft": "low-resolution images only, in a fraction of the time; finish the ones you like",
    "keep_composition": "layout near that of this seed without MrFlow; details still differ",
}
"""The hint under each control: keys of the translations, like the labels."""

# Components of the page that the line depends on: elem_id -> what they hold.
_WATCHED = {
    "txt2img_width": "width",
    "txt2img_height": "height",
    "txt2img_cfg_scale": "cfg_scale",
    "txt2img_steps": "steps",
    "txt2img_hr-checkbox": "enable_hr",
    "txt2img_hr_scale": "hr_scale",
    "txt2img_hr_resize_x": "hr_resize_x",
    "txt2img_hr_resize_y": "hr_resize_y",
}
_NEEDED = ("width", "height")
_UPSCALE_BUTTON = "txt2img_upscale"
_LAST = "txt2img_gallery"
"""Made after everything that the user can put in another order."""

# The first clause of a sentence, in any of our languages; what stands in brackets is not looked into.
_CLAUSE = re.compile(r"(?:[(（][^)）]*[)）]|:(?!\s)|[^;:；：。])+")


@dataclass
class _Page:
    """The components of one build of the page."""

    controls: list[Any] = field(default_factory=list[Any])
    outputs: list[Any] = field(default_factory=list[Any])
    refresh: Any = None
    watched: dict[str, Any] = field(default_factory=dict[str, Any])
    complete: bool = False
    live: bool = False


# -------------------------------------------------------------------------------------------------------- the accordion


def build(is_img2img: bool, script: Any) -> list[Any]:
    """Make the accordion inside the host's page.

    Args:
        is_img2img: Whether the page is img2img; not used, because the script is shown in txt2img only.
        script: The host's script object. Its `infotext_fields` are set, with which the host pastes an image's metadata
            into the controls.

    Returns:
        The components, in the order of `Controls`, and the box for drafts to finish.
    """
    gr = import_module("gradio")
    shared = import_module("modules.shared")
    start = settings.defaults(shared.opts)
    made: dict[str, Any] = {}
    make = _Maker(gr, script, start, made)
    page = _page(script)
    accordion = import_module("modules.ui_components").InputAccordion
    with accordion(start.enabled, label=LABELS["enabled"], elem_id=script.elem_id("enabled")) as made["enabled"]:
        with made["enabled"].extra():
            summary = gr.HTML(value="", elem_id=script.elem_id("summary"))
        line = gr.HTML(value="", elem_id=script.elem_id("plan"))
        with gr.Row():
            make.dropdown("preset", list(CHOICES["preset"]))
            make.checkbox("draft")
            make.checkbox("keep_composition")
        with gr.Accordion(label=ADVANCED, open=False, elem_id=script.elem_id("advanced")):
            _advanced(gr, make, [AUTOMATIC, *_upscaler_names(shared)])
        with gr.Accordion(label=FINISH_FILES, open=False, elem_id=script.elem_id("finish_files")):
            finish = gr.File(
                label=DROP, file_count="multiple", file_types=[".png"], elem_id=script.elem_id(drafts.FINISH)
            )
        refresh = gr.Button(value="↻", visible=False, elem_id=script.elem_id("refresh"))
    _keep_out_of_ui_config(made["enabled"], made["preset"], made["save_stages"])
    page.controls = [*(made[name] for name in FIELDS), finish]
    page.outputs, page.refresh, page.live = [line, summary, made["refine_cfg_value"]], refresh, False
    script.infotext_fields = [(made[name], field_value(name)) for name in FIELDS]
    _make_live(page, gr)
    return page.controls


def _advanced(gr: Any, make: _Maker, upscalers: list[str]) -> None:
    with gr.Row():
        make.slider("factor")
        make.dropdown("upscaler", upscalers)
    with gr.Row():
        make.slider("low_steps")
        make.slider("refine_steps")
    with gr.Row():
        make.slider("sigma")
    with gr.Row():
        make.radio("shift")
        make.radio("solver")
    with gr.Row():
        make.radio("refine_cfg")
        make.slider("refine_cfg_value", visible=make.start.refine_cfg == "value")
        make.radio("refine_seed")
    with gr.Row():
        make.radio("colour_guard")
        make.checkbox("save_stages")


@dataclass(frozen=True)
class _Maker:
    """Makes a component for a field of `Controls` with its label, info, id and first value."""

    gr: Any
    script: Any
    start: Controls
    made: dict[str, Any]

    def slider(self, name: str, **more: Any) -> None:
        low, high, step = LIMITS[name]
        # Floats throughout: hosts convert what they paste to the type of the first value.
        self._add(self.gr.Slider, name, float, minimum=low, maximum=high, step=step, **more)

    def dropdown(self, name: str, choices: list[str]) -> None:
        self._add(self.gr.Dropdown, name, str, choices=choices, allow_custom_value=True)

    def radio(self, name: str) -> None:
        self._add(self.gr.Radio, name, str, choices=list(CHOICES[name]))

    def checkbox(self, name: str) -> None:
        self._add(self.gr.Checkbox, name, bool)

    def _add(self, component: Callable[..., Any], name: str, kind: type, **more: Any) -> None:
        if name in INFO:
            more["info"] = INFO[name]
        value = kind(getattr(self.start, name))
        self.made[name] = component(value=value, label=LABELS[name], elem_id=self.script.elem_id(name), **more)


def _keep_out_of_ui_config(*components: Any) -> None:
    # Their first values come from the settings page; ui-config.json would freeze what they were at the first launch.
    for component in components:
        component.do_not_save_to_config = True
        if hasattr(component, "accordion"):
            component.accordion.do_not_save_to_config = True


def _upscaler_names(shared: Any) -> list[str]:
    return [str(entry.name) for entry in shared.sd_upscalers]


# -------------------------------------------------------------------------------------------------------- the live line


def after_component(script: Any, component: Any) -> None:
    """Take note of a component that the host made; some of txt2img change the line.

    The user orders the sections of the page, so these may be made before or after our own controls.

    Args:
        script: The host's script object, on which the page's state is kept.
        component: Any component of the page.
    """
    elem_id = str(getattr(component, "elem_id", None))
    if elem_id == _UPSCALE_BUTTON:
        # Made here, it stands beside that button, under the gallery. The page's script does the rest.
        button = import_module("modules.ui_components").ToolButton
        button(value="🏁", elem_id="mrflow_finish", tooltip=FINISH_CHOSEN)
    if elem_id not in _WATCHED and elem_id != _LAST:
        return
    page = _page(script)
    if elem_id in _WATCHED:
        page.watched[_WATCHED[elem_id]] = component
    page.complete = page.complete or elem_id == _LAST or len(page.watched) == len(_WATCHED)
    _make_live(page, import_module("gradio"))


def _page(script: Any) -> _Page:
    page = getattr(script, "mrflow_page", None)
    if page is None:
        page = script.mrflow_page = _Page()
    return page


def _make_live(page: _Page, gr: Any) -> None:
    """Connect the line once all components that it depends on are there; some hosts lack a few."""
    ready = page.complete and page.controls and all(name in page.watched for name in _NEEDED)
    if page.live or not ready:
        return
    page.live = True
    names = list(page.watched)

    def update(*values: Any) -> tuple[str, str, Any]:
        chosen, others = values[: len(FIELDS)], dict(zip((drafts.FINISH, *names), values[len(FIELDS) :], strict=True))
        line, summary = plan_html(chosen, others)
        shown = chosen[FIELDS.index("refine_cfg")] == "value"
        return line, summary, gr.update(visible=shown)

    inputs = [*page.controls, *page.watched.values()]
    listen = {"inputs": inputs, "outputs": page.outputs, "queue": False, "show_progress": "hidden"}
    for component in inputs:
        component.change(fn=update, **listen)
    page.refresh.click(fn=update, **listen)


def plan_html(chosen: Sequence[Any], page: Mapping[str, Any]) -> tuple[str, str]:
    """Make the plan for the values on the page. Never raises: a sentence says what cannot run.

    Args:
        chosen: Values of the controls, in the order of `controls.FIELDS`.
        page: As in `preview`, and the files in the box for drafts.

    Returns:
        Two pieces of HTML, in the user's language: the line with its notes, and for the accordion's header the line
        alone, or what is refused in short; it is empty while MrFlow is off.
    """
    waiting = len(page.get(drafts.FINISH) or ())
    try:
        controls = Controls.from_args(list(chosen))
        if waiting:
            line, notes = finish_line(waiting), ()
        else:
            made = preview(controls, page)
            line, notes = made.line, made.notes
        state = "on" if controls.enabled else "off"
    except Exception as error:
        line, notes, state = refusal(error), (), "refused"
    enabled = bool(chosen) and chosen[0] is True
    line = translated(line)
    items = "".join(f"<li>{html.escape(translated(note))}</li>" for note in notes)
    body = f'<p class="mrflow-line">{html.escape(line)}</p>' + (f"<ul>{items}</ul>" if items else "")
    summary = _summary(line, state) if enabled else ""
    return f'<div class="mrflow-plan mrflow-{state}" role="status">{body}</div>', summary


def finish_line(count: int) -> str:
    """Say what a job does that finishes drafts.

    Args:
        count: How many.

    Returns:
        A sentence for the user.
    """
    if count == 1:
        return "Generate finishes the draft, with its own settings."
    return f"Generate finishes {count} drafts, each with its own settings."


def _summary(line: str, state: str) -> str:
    """Return what the header shows: what was refused to its first clause, for it is wrapped and not cut."""
    clause = _CLAUSE.match(line) if state == "refused" else None
    short = line if clause is None else clause[0].strip(" .")
    return f'<span class="mrflow-{state}" title="{html.escape(line)}">{html.escape(short)}</span>'


def refusal(error: Exception) -> str:
    """Say why there is no plan; a fault is logged too.

    Args:
        error: What `Controls.from_args` or `preview` raised.

    Returns:
        A sentence for the user.
    """
    if isinstance(error, MrFlowError):
        text = str(error)
        return text[:1].upper() + text[1:]
    logger.error("failed", exc_info=error)
    return f"MrFlow failed ({type(error).__name__}: {first_line(error)}); see the console."


@dataclass(frozen=True)
class Preview:
    """What a job will do.

    Attributes:
        recipe: All its numbers.
        model: The model they are for.
        expected: How it compares with native sampling; None for a model whose cost is not known.
        line: All in one line.
        notes: Sentences for the user.
    """

    recipe: Recipe
    model: ModelInfo
    expected: Expected | None
    line: str
    notes: tuple[str, ...]


def preview(controls: Controls, page: Mapping[str, Any]) -> Preview:
    """Decide what a job with these values would do.

    Args:
        controls: What the user chose.
        page: "width" and "height" in pixels, and where known "steps", "cfg_scale", "enable_hr", "hr_scale",
            "hr_resize_x" and "hr_resize_y", as the page or the API has them.

    Returns:
        What will run.

    Raises:
        MrFlowError: It cannot run, or a value is not allowed.
    """
    shared = sys.modules.get("modules.shared")
    steps, guidance = _steps(page.get("steps")), _scale(page.get("cfg_scale"))
    width, height = (_side(name, page.get(name)) for name in _NEEDED)
    hires = page.get("enable_hr") is True
    if hires:
        host_class = getattr(sys.modules.get("modules.processing"), "StableDiffusionProcessingTxt2Img", None)
        asked = {"hr_scale": 2.0, "applied_old_hires_behavior_to": None, **page, "width": width, "height": height}
        width, height = hires_target(asked, host_class)
    model, note = _loaded(shared, page)
    upscalers = () if shared is None else list(shared.sd_upscalers)
    recipe = make_recipe(controls, model, width, height, upscalers=upscalers)
    expected = expect(recipe, model, controls, steps, guidance)
    line = recipe.line if expected is None or controls.draft else f"{recipe.line} · {phrase(expected)}"
    notes = hires_note(recipe.width, recipe.height) if hires else None, *recipe.notes, note
    return Preview(recipe, model, expected, line, tuple(each for each in notes if each))


def _side(name: str, value: Any) -> int:
    if not is_number(value) or value != value or abs(value) > MAX_SIDE or value != int(value):
        raise MrFlowError(f"{name} must be a whole number of pixels up to {MAX_SIDE}, got {quoted(value)}.")
    return int(value)


def _steps(value: Any) -> int | None:
    if value is None:
        return None
    whole = isinstance(value, float) and value.is_integer()  # gradio's sliders may give floats
    return checked_whole(int(value) if whole else value, "steps", 1, MAX_STEPS)


def _scale(value: Any) -> float | None:
    return None if value is None else checked_number(value, "cfg_scale", 0, 1000)


# ----------------------------------------------------------------------------------------------------- the loaded model

_UNLOADED: tuple[tuple[str, str], ...] = (
    ("klein.*base", "flux2-klein-base"),
    ("klein", "flux2-klein"),
    (r"qwen.*2[._]?1.*turbo", "qwen-image-2.1-turbo"),
    (r"qwen.*2[._]?1", "qwen-image-2.1"),
    ("qwen", "qwen-image"),
    (r"z[-_ ]?image.*turbo", "z-image-turbo"),
    (r"z[-_ ]?image", "z-image"),
    ("chroma", "chroma"),
    (r"krea[-_ ]?2.*turbo", "krea2-turbo"),
    (r"krea[-_ ]?2", "krea2"),
    ("krea", "flux1-krea"),
    (r"ernie.*turbo", "ernie-image-turbo"),
    ("ernie", "ernie-image"),
    ("anima(?!te|g)", "anima"),
    ("schnell", "flux1-schnell"),
    ("flux", "flux1-dev"),
    ("lumina", "lumina2"),
    (r"sd[-_ ]?3[._]?5", "sd35"),
    (r"sd[-_ ]?3", "sd3"),
    (r"xl|pony|illustrious|noob", "sdxl"),
    (r"sd[-_ ]?(?:v?1|2)|v1-5|v2-1", "sd15"),
)


def _loaded(shared: Any, page: Mapping[str, Any]) -> tuple[ModelInfo, str | None]:
    """Return the loaded model, or the one that the chosen checkpoint's name suggests, with a note that says so."""
    # Not shared.sd_model: asking A1111 for it loads a model there and then.
    data = getattr(sys.modules.get("modules.sd_models"), "model_data", None)
    job = SimpleNamespace(sd_model=getattr(data, "sd_model", None), cfg_scale=page.get("cfg_scale"))
    if capabilities(job).noising != "none":
        record = getattr(sys.modules.get("backend.args"), "dynamic_args", None)
        return probe_model(job, cast("Any", SimpleNamespace(dynamic_args=record))), None
    chosen = str(getattr(getattr(shared, "opts", None), "sd_model_checkpoint", None) or "")
    found = next((name for pattern, name in _UNLOADED if re.search(pattern, chosen.lower())), "flux1-dev")
    family = get_family(found)
    flow = family.prediction == "flow"
    grid = family.grid if family.shift.kind == "flux2" else family.vae_factor
    model = ModelInfo(family, family.title, flow, not flow, None, grid, family.grid)
    return model, f"The checkpoint is loaded with the first image; until then this is the plan for {family.title}."
