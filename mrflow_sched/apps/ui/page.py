"""The page: its controls, and what happens when one is used. Read `build` first."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.ui import words, work
from mrflow_sched.apps.ui.choices import RANDOM, Choices, sizes_of
from mrflow_sched.apps.ui.given import given_draft, read_given
from mrflow_sched.apps.ui.jobs import Desk, Job
from mrflow_sched.apps.ui.studio import Studio
from mrflow_sched.demo import example_prompts
from mrflow_sched.demo.scenes import COLOURS, DETAILS, GROUNDS, LIGHTS, SHAPES, SKIES, TEXTURES
from mrflow_sched.images.convert import to_pil
from mrflow_sched.measure.scores import NAMES
from mrflow_sched.plan.families import TIERS

if TYPE_CHECKING:
    from fastapi import FastAPI

    from mrflow_sched.plan.cost import Speeds

gr: Any = gradio  # its annotations are partial

MAX_DRAFTS = 16
"""Most drafts of one press of the button."""
_EVERY = 0.15
"""Seconds between two looks at a running job."""
_MAX_UPLOAD = "200mb"
_STYLE = Path(__file__).with_name("page.css")
# No font of the theme, which its style sheet would load from elsewhere.
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def mounted(app: FastAPI, studio: Studio, desk: Desk, shown: Path) -> FastAPI:
    """Put the page on an application.

    Args:
        app: The application.
        studio: The model.
        desk: Where its jobs are done.
        shown: A folder for copies of what the browser is given, so that it can ask for no other file.

    Returns:
        The application.
    """
    return gr.mount_gradio_app(
        app,
        Page(studio, desk, shown).build(),
        path="/",
        server_name="127.0.0.1",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        mcp_server=False,
        max_file_size=_MAX_UPLOAD,
        theme=gr.themes.Default(**_FONTS),
        css=_STYLE.read_text("utf-8"),
    )


class Page:
    """The page of one model, for all tabs that are opened on it."""

    def __init__(self, studio: Studio, desk: Desk, shown: Path) -> None:
        """Take what the page works with.

        Args:
            studio: The model.
            desk: Where jobs are done.
            shown: A folder for copies of what the browser is given.
        """
        self._studio, self._desk, self._shown = studio, desk, shown
        self._speeds: Speeds | None = None

    def build(self) -> Any:
        """Lay the page out and connect it.

        Returns:
            gradio's `Blocks`.
        """
        with gr.Blocks(title="MrFlow", analytics_enabled=False, fill_width=True) as page:
            gr.HTML(f'<h1 class="mrflow-title">MrFlow</h1><p>{words.escaped(self._studio.title)}</p>')
            with gr.Row():
                with gr.Column(scale=4, min_width=360):
                    self._controls()
                    self._buttons()
                    if self._studio.embedded:
                        self._suggestions()
                with gr.Column(scale=5, min_width=360):
                    self._results()
            self._connect(page)
        return page

    # ------------------------------------------------------------------------------------------------------- layout

    def _controls(self) -> None:
        family, embedded = self._studio.family, self._studio.embedded
        first = example_prompts()[0] if embedded else ""
        self.prompt = gr.Textbox(first, label="Prompt", lines=2, elem_id="mrflow-prompt")
        self.negative = gr.Textbox(label="Negative prompt", visible=family.guidance_kind == "cfg")
        with gr.Row():
            names = list(dict.fromkeys((*TIERS, *(preset.name for preset in family.presets))))
            default, sizes = family.get_preset().name, list(sizes_of(family))
            free: dict[str, Any] = {"allow_custom_value": True, "min_width": 130}
            self.preset = gr.Dropdown(names, value=default, label="Preset", elem_id="mrflow-preset", **free)
            self.size = gr.Dropdown(sizes, value=sizes[0], label="Size", elem_id="mrflow-size", **free)
            self.seed = gr.Textbox(RANDOM, label="Seed", elem_id="mrflow-seed", min_width=130)
        with gr.Row():
            self.random = gr.Button("Random seed", size="sm", min_width=90)
            self.reuse = gr.Button("Last seed", size="sm", min_width=90, elem_id="mrflow-reuse")
        with gr.Accordion("Advanced", open=False, elem_id="mrflow-advanced"):
            with gr.Row():
                empty: dict[str, Any] = {"placeholder": "the preset's", "min_width": 100}
                self.low = gr.Textbox(label=words.NAMES["low_steps"], elem_id="mrflow-low_steps", **empty)
                self.refine = gr.Textbox(label=words.NAMES["refine_steps"], **empty)
                self.sigma = gr.Textbox(label=words.NAMES["sigma"], **empty)
            self.nested = gr.Checkbox(
                label="Composition lock", info="keeps most of the layout of the seed's native image"
            )
        self.plan = gr.HTML(elem_id="mrflow-plan")

    def _suggestions(self) -> None:
        """Prompts and words that the embedded model knows."""
        self.examples = gr.Dataset(
            label="Examples",
            components=["textbox"],
            samples=[[text] for text in example_prompts()],
            type="values",
            elem_id="mrflow-examples",
        )
        with gr.Accordion("Words that the model knows", open=False, elem_id="mrflow-vocabulary"):
            skies = tuple(f"{sky} sky" for sky in SKIES)
            kinds = (SHAPES, TEXTURES[1:], tuple(COLOURS), GROUNDS, skies, DETAILS, LIGHTS)
            self.words = gr.Dataset(
                label="Click to add. A word to be written: 2 to 5 capitals, as in the word FLOW",
                components=["textbox"],
                samples=[[word] for kind in kinds for word in kind],
                samples_per_page=60,
                type="values",
                elem_id="mrflow-words",
            )

    def _buttons(self) -> None:
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", elem_id="mrflow-generate", min_width=90)
            self.drafts = gr.Button("Drafts", elem_id="mrflow-draft", min_width=90)
            self.cancel = gr.Button("Cancel", variant="stop", elem_id="mrflow-cancel", min_width=90)
        self.status = gr.HTML(elem_id="mrflow-status")

    def _results(self) -> None:
        with gr.Tabs(elem_id="mrflow-tabs") as self.tabs:
            with gr.Tab("Image", id="image"):
                self.image = gr.Image(
                    label="Image",
                    type="filepath",
                    interactive=False,
                    format="png",
                    height=520,
                    buttons=["download", "fullscreen"],
                    elem_id="mrflow-image",
                )
                self.files = gr.File(
                    label="Saved", file_count="multiple", interactive=False, elem_id="mrflow-files", visible=False
                )
            with gr.Tab("Drafts", id="drafts"):
                with gr.Row():
                    self.count = gr.Slider(2, MAX_DRAFTS, 6, step=1, label="How many drafts", elem_id="mrflow-count")
                    scores = [name for name in NAMES if self._studio.embedded or name != "judge"]
                    self.order = gr.Dropdown(
                        [work.BY_SEED, *scores], value=work.BY_SEED, label="Order by", elem_id="mrflow-order"
                    )
                self.gallery = gr.Gallery(
                    label="Click a draft to finish it",
                    allow_preview=False,
                    columns=3,
                    format="png",
                    interactive=False,
                    elem_id="mrflow-gallery",
                    object_fit="contain",
                    buttons=[],
                )
                self.picked = gr.CheckboxGroup([], label="Or tick several", elem_id="mrflow-picked")
                self.finish = gr.Button("Finish the ticked ones", elem_id="mrflow-finish")
            with gr.Tab("Native and staged", id="compare"):
                self.compare = gr.Button("Make the image both ways", elem_id="mrflow-compare")
                self.slider = gr.ImageSlider(
                    label="Native and staged", interactive=False, format="png", elem_id="mrflow-slider", max_height=520
                )
                self.both = gr.HTML(elem_id="mrflow-both")
            with gr.Tab("From an image", id="given"):
                self.given = gr.File(
                    label="Drop an image here, to take its settings, finish it (a draft) or upscale it with the prompt",
                    elem_id="mrflow-given",
                    height=120,
                )
                self.said = gr.HTML(elem_id="mrflow-said")
                with gr.Row():
                    self.finish_given = gr.Button("Finish the draft", elem_id="mrflow-finish-given")
                    self.take = gr.Button("Take its settings", elem_id="mrflow-take")
                    self.upscale = gr.Button("Upscale it", elem_id="mrflow-upscale")
        self.made_drafts, self.last_seed = gr.State(()), gr.State(RANDOM)

    # ---------------------------------------------------------------------------------------------------- connections

    def _connect(self, page: Any) -> None:
        text = (self.prompt, self.negative, self.preset, self.size, self.seed)
        values = (*text, self.low, self.refine, self.sigma, self.nested)
        self.choices: list[Any] = list(values)
        live: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        changes = [page.load, *(value.change for value in values)]
        gr.on(changes, self._line, self.choices, [self.plan], trigger_mode="always_last", **live)
        if self._studio.embedded:
            self.examples.click(_first, [self.examples], [self.prompt], **live)
            self.words.click(_added, [self.words, self.prompt], [self.prompt], **live)
        self.random.click(lambda: RANDOM, None, [self.seed], **live)
        self.reuse.click(str, [self.last_seed], [self.seed], **live)
        shown_drafts = [self.gallery, self.picked, self.made_drafts]
        self.order.change(self._order, [self.order, self.made_drafts], [*shown_drafts, self.status], **live)
        self.cancel.click(self._cancel, None, [self.status], **live)
        self.given.change(self._say_given, [self.given], [self.said], **live)
        self.take.click(self._take, [self.given], [*self.choices, self.said], **live)
        # Every tab may start a job; the desk decides whose turn it is.
        job: dict[str, Any] = {
            "show_progress": "hidden",
            "concurrency_limit": None,
            "trigger_mode": "once",
            "api_visibility": "private",
        }
        shown = [self.status, self.image, self.files, self.last_seed, self.tabs]
        drafts = [self.status, *shown_drafts, self.last_seed, self.tabs]
        both = [self.status, self.image, self.files, self.slider, self.both, self.last_seed]
        for ended in (
            self.generate.click(self._generate, self.choices, shown, **job),
            self.upscale.click(self._upscale, [self.given, *self.choices], shown, **job),
            self.drafts.click(self._make_drafts, [self.count, self.order, *self.choices], drafts, **job),
            self.gallery.select(self._finish_clicked, [self.made_drafts], shown, **job),
            self.finish.click(self._finish_picked, [self.made_drafts, self.picked], shown, **job),
            self.finish_given.click(self._finish_given, [self.given], shown, **job),
            self.compare.click(self._compare, self.choices, both, **job),
        ):
            ended.then(self._line, self.choices, [self.plan], **live)  # with the speeds of this run

    def _line(self, *values: Any) -> str:
        return words.plan_html(self._studio, Choices.from_page(*values), self._speeds)

    def _cancel(self, request: gradio.Request) -> Any:
        if self._desk.cancel(_owner(request)):
            return gr.skip()  # the job says the rest
        # A tab that was closed or loaded again leaves its job running.
        return words.said_html("The job of another tab ends." if self._desk.cancel() else "Nothing runs.")

    def _say_given(self, file: str | None) -> str:
        if file is None:
            return ""
        try:
            return words.said_html(read_given(Path(file), self._studio.family).words)
        except Exception as error:
            return self._refused(error, file)

    def _take(self, file: str | None) -> list[Any]:
        same = [gr.skip()] * len(self.choices)
        try:
            given = read_given(_dropped(file), self._studio.family)
        except Exception as error:
            return [*same, self._refused(error, file)]
        if given.choices is None:
            return [*same, words.said_html(given.words)]
        taken = given.choices
        texts = (taken.prompt, taken.negative, taken.preset or self._studio.family.get_preset().name)
        size = taken.size or sizes_of(self._studio.family)[0]
        numbers = (taken.low_steps, taken.refine_steps, taken.sigma, taken.nested)
        return [*texts, size, taken.seed, *numbers, words.said_html(given.words)]

    # ----------------------------------------------------------------------------------------------------------- jobs

    def _generate(self, request: gradio.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        yield from self._make(request, lambda: Choices.from_page(*values).wish(self._studio))

    def _upscale(self, request: gradio.Request, file: str | None, *values: Any) -> Iterator[dict[Any, Any]]:
        def wish() -> Any:
            start = self._studio.read_start(_dropped(file))
            return Choices.from_page(*values).wish(self._studio, start)

        yield from self._make(request, wish, file)

    def _make(
        self, request: gradio.Request, wish_of: Callable[[], Any], file: str | None = None
    ) -> Iterator[dict[Any, Any]]:
        try:
            wish = wish_of()
        except Exception as error:
            yield {self.status: self._refused(error, file)}
            return
        yield {self.tabs: gr.Tabs(selected="image"), self.last_seed: str(wish.plan.seed)}
        job = self._desk.start(_owner(request), lambda job: work.generate(self._studio, wish, job))
        yield from self._images(job)

    def _make_drafts(self, request: gradio.Request, count: float, order: str, *values: Any) -> Iterator[dict[Any, Any]]:
        try:
            wish = Choices.from_page(*values).wish(self._studio)
        except Exception as error:
            yield {self.status: self._refused(error)}
            return
        yield {
            self.tabs: gr.Tabs(selected="drafts"),
            self.last_seed: str(wish.plan.seed),
            **self._gallery([], work.BY_SEED),
        }
        job = self._desk.start(_owner(request), lambda job: work.make_drafts(self._studio, wish, int(count), job))
        shown = 0
        for state in self._followed(job):
            if len(job.made) > shown:
                shown = len(job.made)
                state |= self._gallery(job.made[:shown], work.BY_SEED)
            yield state
        if job.error is None:
            done = f"{shown} drafts. Click one to finish it." if shown else "Stopped before there was a draft."
            yield {self.status: words.said_html(done)}
        if order != work.BY_SEED:
            yield self._order(order, job.made)

    def _order(self, order: str, drafts: Sequence[Any]) -> dict[Any, Any]:
        try:
            return self._gallery(drafts, order)
        except Exception as error:
            return {self.status: self._refused(error)}

    def _gallery(self, drafts: Sequence[Any], order: str) -> dict[Any, Any]:
        """What shows drafts in an order, and remembers them in it."""
        found = work.ordered(drafts, order)
        names = [f"#{number} {said}" for number, (_, said) in enumerate(found, 1)]
        return {
            self.gallery: [(to_pil(each.image), f"#{number}") for number, (each, _) in enumerate(found, 1)],
            self.picked: gr.CheckboxGroup(names, value=[]),
            self.made_drafts: tuple(each for each, _ in found),
        }

    def _finish_clicked(
        self, drafts: Sequence[Any], event: gradio.SelectData, request: gradio.Request
    ) -> Iterator[dict[Any, Any]]:
        yield from self._finish([drafts[event.index]], request)

    def _finish_picked(
        self, drafts: Sequence[Any], picked: Sequence[str], request: gradio.Request
    ) -> Iterator[dict[Any, Any]]:
        numbers = sorted(int(name[1:].split()[0]) - 1 for name in picked)
        yield from self._finish([drafts[number] for number in numbers if number < len(drafts)], request)

    def _finish_given(self, request: gradio.Request, file: str | None) -> Iterator[dict[Any, Any]]:
        try:
            chosen = given_draft(_dropped(file), self._studio)
        except Exception as error:
            yield {self.status: self._refused(error, file)}
            return
        yield from self._finish([chosen], request)

    def _finish(self, chosen: list[Any], request: gradio.Request) -> Iterator[dict[Any, Any]]:
        if not chosen:
            yield {self.status: words.said_html("Tick the drafts to finish first.")}
            return
        yield {self.tabs: gr.Tabs(selected="image")}
        job = self._desk.start(_owner(request), lambda job: work.finish(self._studio, chosen, job))
        yield from self._images(job)

    def _compare(self, request: gradio.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        try:
            wish = Choices.from_page(*values).wish(self._studio)
        except Exception as error:
            yield {self.status: self._refused(error)}
            return
        yield {self.last_seed: str(wish.plan.seed), self.slider: None, self.both: ""}
        job = self._desk.start(_owner(request), lambda job: work.compare(self._studio, wish, job))
        yield from self._images(job)
        if len(job.made) == 2 and not any(each.unfinished for each in job.made):
            native, staged = job.made
            times = f"{native.seconds / staged.seconds:.1f} times as fast"
            said = f"Native (left) {native.seconds:.2f} s, staged (right) {staged.seconds:.2f} s: {times}."
            yield {self.slider: tuple(self._copies(job.made)), self.both: words.said_html(said)}

    def _images(self, job: Job) -> Iterator[dict[Any, Any]]:
        """What the page shows of a job that makes images."""
        for state in self._followed(job):
            yield state | ({self.image: job.preview} if job.preview is not None else {})
            job.preview = None
        if job.made:
            paths = self._copies(job.made)
            self._learn(job.made[-1])
            yield {self.image: paths[-1], self.files: gr.File(paths, visible=True)}
        if job.error is None:
            none = words.said_html("Stopped before there was an image.")
            yield {self.status: words.made_html(job.made) if job.made else none}

    def _followed(self, job: Job) -> Iterator[dict[Any, Any]]:
        """The status of a job until it has ended, at last the sentence of its error."""
        while not job.done.wait(_EVERY):
            yield {self.status: words.progress_html(job)}
        yield {self.status: words.progress_html(job) if job.error is None else self._refused(job.error)}

    def _copies(self, made: Sequence[work.Made]) -> list[str]:
        return [shutil.copy(each.path, tempfile.mkdtemp(dir=self._shown)) for each in made]

    def _learn(self, made: work.Made) -> None:
        self._speeds = words.learned(self._studio, made) or self._speeds

    def _refused(self, error: BaseException, file: str | None = None) -> str:
        """An error as a sentence, in which a dropped file goes by its name: where it was put says nothing."""
        said = words.refused_html(self._studio, error)
        return said if file is None else said.replace(file, Path(file).name)


def _first(sample: Sequence[str]) -> str:
    return sample[0]


def _added(sample: Sequence[str], prompt: str) -> str:
    return f"{prompt} {sample[0]}".strip()


def _owner(request: gradio.Request) -> str:
    return str(request.session_hash)


def _dropped(file: str | None) -> Path:
    if file is None:
        raise MrFlowError("There is no image yet; drop one into the box.")
    return Path(file)
