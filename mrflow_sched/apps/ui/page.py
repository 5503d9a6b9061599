"""What happens when a control of the page is used. Read `Page` first; the controls are in `layout`."""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.ui import words, work
from mrflow_sched.apps.ui.choices import RANDOM, Choices
from mrflow_sched.apps.ui.given import given_draft, read_given
from mrflow_sched.apps.ui.jobs import Desk, Job
from mrflow_sched.apps.ui.layout import MAX_UPLOAD, Layout, gr
from mrflow_sched.apps.ui.studio import Start, Studio
from mrflow_sched.images.convert import to_pil

if TYPE_CHECKING:
    from fastapi import FastAPI

    from mrflow_sched.plan.cost import Speeds

_EVERY = 0.15
"""Seconds between two looks at a running job."""
_MAX_SENT = "2gb"
"""Where the browser itself stops sending, with a message that soon goes away; what is over `MAX_UPLOAD` gets ours."""
_STYLE = Path(__file__).with_name("page.css")
# No font of the theme, which its style sheet would load from elsewhere.
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}

Shown = Iterator[dict[Any, Any]]
"""What a handler shows, step by step: a value for each control that changes."""


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
        Page(studio, desk, shown).blocks,
        path="/",
        server_name="127.0.0.1",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        mcp_server=False,
        max_file_size=_MAX_SENT,
        theme=gr.themes.Default(**_FONTS),
        css=_STYLE.read_text("utf-8"),
    )


def _telling(handler: Callable[..., Shown]) -> Callable[..., Shown]:
    """A handler that ends in a sentence where it raises."""

    @functools.wraps(handler)
    def told(page: Page, *values: Any) -> Shown:
        try:
            yield from handler(page, *values)
        except Exception as error:
            yield {page.status: page.refused(error)}

    return told


class Page(Layout):
    """The page of one model, for all tabs that are opened on it.

    Attributes:
        blocks: gradio's `Blocks`.
    """

    def __init__(self, studio: Studio, desk: Desk, shown: Path) -> None:
        """Lay the page out and connect it.

        Args:
            studio: The model.
            desk: Where jobs are done.
            shown: A folder for copies of what the browser is given.
        """
        self._desk, self._shown = desk, shown
        self._speeds: Speeds | None = None
        self._start: tuple[str, Start] | None = None
        with gr.Blocks(title="MrFlow", analytics_enabled=False, fill_width=True) as self.blocks:
            super().__init__(studio)
            self._connect()

    def _connect(self) -> None:
        live: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        changes = [self.blocks.load, *(value.change for value in self.choices)]
        lines = [self.plan, self.before_both, self.before_upscale]
        asked = [self.dropped, *self.choices]
        gr.on(changes, self._lines, asked, lines, trigger_mode="always_last", **live)
        self.blocks.load(self._greet, None, [self.status], **live)
        if self._studio.embedded:
            self.examples.click(_first, [self.examples], [self.prompt], **live)
            self.words.click(_added, [self.words, self.prompt], [self.prompt], **live)
        self.random.click(lambda: RANDOM, None, [self.seed], **live)
        self.reuse.click(str, [self.last_seed], [self.seed], **live)
        shown_drafts = [self.gallery, self.picked, self.made_drafts]
        self.order.change(self._order, [self.order, self.made_drafts], [*shown_drafts, self.status], **live)
        self.cancel.click(self._cancel, None, [self.status], **live)
        said = [self.dropped, self.said, self.before_upscale, self.status]
        self.given.change(self._drop, [self.given, *self.choices], said, **live)
        self.take.click(self._take, [self.dropped], [*self.choices, self.said], **live)
        # Every tab may start a job; the desk decides whose turn it is.
        job: dict[str, Any] = {
            "show_progress": "hidden",
            "concurrency_limit": None,
            "trigger_mode": "once",
            "api_visibility": "private",
        }
        images = [self.status, self.image, self.several, self.files, self.last_seed]
        shown = [*images, self.tabs]
        drafts = [self.status, *shown_drafts, self.last_seed, self.tabs]
        both = [*images, self.slider, self.both]
        for ended in (
            self.generate.click(self._generate, self.choices, shown, **job),
            self.upscale.click(self._upscale, asked, shown, **job),
            self.drafts.click(self._make_drafts, [self.count, self.order, *self.choices], drafts, **job),
            self.gallery.select(self._finish_clicked, [self.made_drafts], shown, **job),
            self.finish.click(self._finish_picked, [self.made_drafts, self.picked], shown, **job),
            self.finish_given.click(self._finish_given, [self.dropped], shown, **job),
            self.compare.click(self._compare, self.choices, both, **job),
        ):
            ended.then(self._lines, asked, lines, **live)  # with the speeds of this run

    def _lines(self, file: str | None, *values: Any) -> tuple[str, str, str]:
        """What will run: on Generate, both ways, and from the dropped image."""
        choices = Choices.from_page(*values)
        line = words.plan_html(self._studio, choices, self._speeds)
        return line, words.both_html(self._studio, choices), self._before_upscale(file, choices)

    def _before_upscale(self, file: str | None, choices: Choices) -> str:
        if file is None:
            return ""
        try:
            return words.upscale_html(self._studio, choices, self._start_of(file))
        except Exception as error:
            return self.refused(error)

    def _start_of(self, file: str | None) -> Start:
        """The dropped image; the last one is kept, because the line asks for it at every change."""
        kept = self._start  # of another tab, perhaps, which may change it meanwhile
        if kept is None or kept[0] != file:
            path = _dropped(file)
            self._start = kept = str(path), self._studio.read_start(path)
        return kept[1]

    def _greet(self) -> str:
        busy = "A job is running, of a tab that was closed or loaded again, or of another one; Cancel ends it."
        return words.said_html(busy) if self._desk.busy else ""

    def _cancel(self, request: gradio.Request) -> Any:
        if self._desk.cancel(_owner(request)):
            return gr.skip()  # the job says the rest
        # A tab that was closed or loaded again leaves its job running.
        return words.said_html("The job of another tab ends." if self._desk.cancel() else "Nothing runs.")

    def _drop(self, file: str | None, *values: Any) -> tuple[Any, ...]:
        if file is None:
            return None, "", "", gr.skip()
        try:
            _check_bytes(Path(file))
            said = words.said_html(read_given(Path(file), self._studio.family, self._studio.upscaler_kind).words)
        except Exception as error:
            # The status is of something older, which this file has not become.
            return file if Path(file).is_file() else None, self.refused(error), "", ""
        return file, said, self._before_upscale(file, Choices.from_page(*values)), gr.skip()

    def _take(self, file: str | None) -> list[Any]:
        same = [gr.skip()] * len(self.choices)
        try:
            given = read_given(_dropped(file), self._studio.family, self._studio.upscaler_kind)
        except Exception as error:
            return [*same, self.refused(error)]
        if given.choices is None:
            return [*same, words.said_html(given.words)]
        taken = given.choices
        steps = (taken.preset, taken.low_steps, taken.refine_steps, taken.sigma)
        if any(steps):
            preset, *numbers = steps[0] or self._studio.family.get_preset().name, *steps[1:]
        else:  # another program's, another family's or a native run's: the page's own stay
            preset, *numbers = [gr.skip()] * len(steps)
        size = taken.size or gr.skip()
        said = words.said_html(given.words)
        return [taken.prompt, taken.negative, preset, size, taken.seed, *numbers, taken.nested, said]

    # ----------------------------------------------------------------------------------------------------------- jobs

    @_telling
    def _generate(self, request: gradio.Request, *values: Any) -> Shown:
        yield from self._make(request, Choices.from_page(*values))

    @_telling
    def _upscale(self, request: gradio.Request, file: str | None, *values: Any) -> Shown:
        yield from self._make(request, Choices.from_page(*values), self._start_of(file))

    def _make(self, request: gradio.Request, choices: Choices, start: Start | None = None) -> Shown:
        wish = choices.wish(self._studio, start)
        yield {self.tabs: gr.Tabs(selected="image"), self.last_seed: str(wish.plan.seed)}
        job = self._desk.start(_owner(request), lambda job: work.generate(self._studio, wish, job))
        yield from self._images(job)

    @_telling
    def _make_drafts(self, request: gradio.Request, count: float, order: str, *values: Any) -> Shown:
        wish = Choices.from_page(*values).wish(self._studio)
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
            return {self.status: self.refused(error)}

    def _gallery(self, drafts: Sequence[Any], order: str) -> dict[Any, Any]:
        """What shows drafts in an order, and remembers them in it."""
        found = work.ordered(drafts, order)
        ticks = [(f"#{number + 1} {said}", number) for number, (_, said) in enumerate(found)]
        return {
            self.gallery: [(to_pil(each.image), f"#{number}") for number, (each, _) in enumerate(found, 1)],
            self.picked: gr.CheckboxGroup(ticks, value=[]),
            self.made_drafts: tuple(each for each, _ in found),
        }

    @_telling
    def _finish_clicked(self, drafts: Sequence[Any], event: gradio.SelectData, request: gradio.Request) -> Shown:
        yield from self._finish(drafts, [int(event.index)], request)

    @_telling
    def _finish_picked(self, drafts: Sequence[Any], picked: Sequence[int], request: gradio.Request) -> Shown:
        if not picked:
            raise MrFlowError("No draft is ticked; tick those to finish first.")
        yield from self._finish(drafts, picked, request)

    @_telling
    def _finish_given(self, request: gradio.Request, file: str | None) -> Shown:
        yield from self._finish([given_draft(_dropped(file), self._studio)], [0], request)

    def _finish(self, drafts: Sequence[Any], picked: Sequence[int], request: gradio.Request) -> Shown:
        if max(picked) >= len(drafts):
            raise MrFlowError(words.GONE)
        chosen = [drafts[number] for number in picked]
        yield {self.tabs: gr.Tabs(selected="image")}
        job = self._desk.start(_owner(request), lambda job: work.finish(self._studio, chosen, job))
        yield from self._images(job)

    @_telling
    def _compare(self, request: gradio.Request, *values: Any) -> Shown:
        wish = Choices.from_page(*values).wish(self._studio)
        yield {self.last_seed: str(wish.plan.seed), self.slider: None, self.both: ""}
        job = self._desk.start(_owner(request), lambda job: work.compare(self._studio, wish, job))
        yield from self._images(job)
        if len(job.made) == 2 and not any(each.unfinished for each in job.made):
            native, staged = job.made
            times = f"{native.seconds / staged.seconds:.1f} times as fast"
            said = f"Native (left) {native.seconds:.2f} s, staged (right) {staged.seconds:.2f} s: {times}."
            yield {self.slider: tuple(self._copies(job.made)), self.both: words.said_html(said)}

    def _images(self, job: Job) -> Shown:
        """What the page shows of a job that makes images."""
        for state in self._followed(job):
            yield state | ({self.image: job.preview} if job.preview is not None else {})
            job.preview = None
        if job.made:
            paths = self._copies(job.made)
            self._learn(job.made[-1])
            several = gr.update(value=paths, visible=len(paths) > 1)
            yield {self.image: paths[-1], self.several: several, self.files: gr.File(paths, visible=True)}
        if job.error is None:
            none = words.said_html("Stopped before there was an image.")
            yield {self.status: words.made_html(job.made) if job.made else none}

    def _followed(self, job: Job) -> Shown:
        """The status of a job until it has ended, at last the sentence of its error."""
        while not job.done.wait(_EVERY):
            yield {self.status: words.progress_html(job)}
        yield {self.status: words.progress_html(job) if job.error is None else self.refused(job.error)}

    def _copies(self, made: Sequence[work.Made]) -> list[str]:
        return [shutil.copy(each.path, tempfile.mkdtemp(dir=self._shown)) for each in made]

    def _learn(self, made: work.Made) -> None:
        self._speeds = words.learned(self._studio, made) or self._speeds

    def refused(self, error: BaseException) -> str:
        """Why something was not done.

        Args:
            error: What was raised.

        Returns:
            A sentence in which a dropped file goes by its name: where it was put says nothing.
        """
        folders = rf"{re.escape(str(self._shown))}[/\\]+(?:\w+[/\\]+)*"
        return re.sub(folders, "", words.refused_html(self._studio, error))


def _first(sample: Sequence[str]) -> str:
    return sample[0]


def _added(sample: Sequence[str], prompt: str) -> str:
    return f"{prompt} {sample[0]}".strip()


def _owner(request: gradio.Request) -> str:
    return str(request.session_hash)


def _check_bytes(file: Path) -> None:
    size = file.stat().st_size
    if size > MAX_UPLOAD * 10**6:
        file.unlink()
        raise MrFlowError(f"{file.name!r} has {size / 10**6:.0f} MB; the page takes images of up to {MAX_UPLOAD} MB.")


def _dropped(file: str | None) -> Path:
    if file is None:
        raise MrFlowError("There is no image yet; drop one into the box, anew where the page was started again.")
    if not Path(file).is_file():
        raise MrFlowError(words.GONE)
    return Path(file)
