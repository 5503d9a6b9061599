"""An accordion with a checkbox in its header; page.js keeps the two together."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import gradio

gr: Any = gradio  # that of the host, whose release is another than the tests' own


@contextmanager
def InputAccordion(value: bool, *, label: str, elem_id: str) -> Generator[Any, None, None]:
    """A hidden checkbox "<elem_id>-checkbox" that is the value, and an accordion that shows it."""
    box = gr.Checkbox(value=value, label=label, elem_id=f"{elem_id}-checkbox", visible=False)
    box.change(fn=None, inputs=[box], **{_js_name(): f"(on) => {{ pageHost.follow('{elem_id}', on); }}"})
    box.accordion = gr.Accordion(label=label, open=value, elem_id=elem_id, elem_classes=["input-accordion"])
    box.extra = lambda: gr.Column(elem_id=f"{elem_id}-extra", elem_classes=["input-accordion-extra"], min_width=0)
    with box.accordion:
        yield box


def _js_name() -> str:
    return "_js" if gr.__version__.startswith("3.") else "js"
