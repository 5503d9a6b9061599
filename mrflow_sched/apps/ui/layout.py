"""The page's controls and where they stand; `page` says what happens when one is used."""

from __future__ import annotations

import html
from typing import Any

import gradio

from mrflow_sched.apps.ui import words, work
from mrflow_sched.apps.ui.choices import RANDOM, sizes_of
from mrflow_sched.apps.ui.studio import Studio
from mrflow_sched.demo import example_prompts
from mrflow_sched.demo.words import unknown_words, world
from mrflow_sched.measure.scores import NAMES

gr: Any = gradio  # its annotations are partial

MAX_DRAFTS = 16
"""Most drafts of one press of the button."""
MAX_UPLOAD = 200
"""Largest file that can be dropped, in MB."""


class Layout:
    """The controls, for `Page` to connect; made within gradio's `Blocks`."""

    def __init__(self, studio: Studio) -> None:
        """Lay the page out.

        Args:
            studio: The model.
        """
        self._studio = studio
        gr.HTML(f'<h1 class="mrflow-title">MrFlow</h1><p>{html.escape(studio.title)}</p>')
        with gr.Row(elem_id="mrflow-columns"):
            with gr.Column(scale=4, min_width=360, elem_id="mrflow-left"):
                with gr.Column():
                    self._controls()
                    self._buttons()
                if studio.embedded:
                    with gr.Column(elem_id="mrflow-suggestions"):
                        self._suggestions()
            with gr.Column(scale=5, min_width=360):
                self._results()
        self.made_drafts, self.last_seed = gr.State(()), gr.State(RANDOM)
        self.dropped = gr.State(None)  # the file's path: one that is gone is refused by us, not by gradio
        self.choices: list[Any] = [
            *(self.prompt, self.negative, self.preset, self.size, self.seed),
            *(self.low, self.refine, self.sigma, self.nested),
        ]

    def _controls(self) -> None:
        family, embedded = self._studio.family, self._studio.embedded
        first = example_prompts()[0] if embedded else ""
        self.prompt = gr.Textbox(first, label="Prompt", lines=2, elem_id="mrflow-prompt")
        self.negative = gr.Textbox(label="Negative prompt", visible=family.guidance_kind == "cfg")
        with gr.Row():
            names, default, sizes = list(family.preset_names), family.get_preset().name, list(sizes_of(family))
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
        examples = (*example_prompts(), *example_prompts("open"), *example_prompts("fine"))
        self.examples = gr.Dataset(
            label="Examples. What a prompt leaves out, the seed decides",
            components=["textbox"],
            samples=[[text] for text in examples if not unknown_words(text)],
            samples_per_page=len(examples),
            type="values",
            elem_id="mrflow-examples",
        )
        with gr.Accordion("Words that the model knows", open=False, elem_id="mrflow-vocabulary"):
            self.words = gr.Dataset(
                label="Click to add. A word to be written: 2 to 5 capitals, as in the word FLOW",
                components=["textbox"],
                samples=[[phrase] for kind in world() for phrase in kind],
                samples_per_page=100,
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
                self.several = gr.Gallery(
                    label="All that were finished, in order",
                    columns=3,
                    format="png",
                    interactive=False,
                    elem_id="mrflow-several",
                    object_fit="contain",
                    buttons=["download", "fullscreen"],
                    visible=False,
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
                gr.HTML("<p>Click a draft to finish it.</p>")
                self.gallery = gr.Gallery(
                    label="Drafts",
                    show_label=False,  # it covers a corner of the first
                    allow_preview=False,
                    columns=3,
                    format="png",
                    interactive=False,
                    elem_id="mrflow-gallery",
                    object_fit="contain",
                    buttons=[],
                )
                self.picked = gr.CheckboxGroup([], label="Or tick several", elem_id="mrflow-picked")
                # gradio's own check raises where a tab is older than the server.
                self.picked.preprocess = list
                self.finish = gr.Button("Finish the ticked ones", elem_id="mrflow-finish")
            with gr.Tab("Native and staged", id="compare"):
                self.before_both = gr.HTML(elem_id="mrflow-before-both")
                self.compare = gr.Button("Make the image both ways", elem_id="mrflow-compare")
                self.slider = gr.ImageSlider(
                    label="Native and staged", interactive=False, format="png", elem_id="mrflow-slider", max_height=520
                )
                self.both = gr.HTML(elem_id="mrflow-both")
            with gr.Tab("From an image", id="given"):
                self.given = gr.File(
                    label=f"Drop an image (up to {MAX_UPLOAD} MB): take its settings, finish a draft, or upscale it",
                    elem_id="mrflow-given",
                    height=120,
                )
                self.said = gr.HTML(elem_id="mrflow-said")
                self.before_upscale = gr.HTML(elem_id="mrflow-before-upscale")
                with gr.Row():
                    self.finish_given = gr.Button("Finish the draft", elem_id="mrflow-finish-given")
                    self.take = gr.Button("Take its settings", elem_id="mrflow-take")
                    self.upscale = gr.Button("Upscale it", elem_id="mrflow-upscale")
