"""Every pipeline class of the installed diffusers draws what it draws by itself, or is refused as the page says."""

from __future__ import annotations

import pytest

from bench.pipelines import page
from bench.pipelines.build import names_of
from bench.pipelines.classes import TRIED, PipelineClass, pipeline_classes
from bench.pipelines.sweep import sweep
from bench.tiny.parts import diffusers

KINDS = [kind for kind in pipeline_classes() if kind.makes in TRIED or names_of(kind.name)]
VERSION, SAID = page.read()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_class_does_what_the_page_says(kind: PipelineClass) -> None:
    (found,) = sweep([kind.name], once=True)
    row = found.row
    assert row.outcome != "fails", row.sentence
    if row.outcome == "differs":  # by how much is another number on another machine
        assert " differs by " in SAID.get(kind.name, ""), row.sentence
        return
    if diffusers().__version__ != VERSION and (kind.name not in SAID or not row.ran):
        pytest.skip(f"docs/pipelines.md is of diffusers {VERSION}; here {kind.name} is {row.outcome}: {row.sentence}")
    assert kind.name in SAID, f"docs/pipelines.md does not name it; it is {row.outcome}: {row.sentence}"
    assert SAID[kind.name] == ("" if row.ran else row.sentence)


def test_the_page_names_every_class_once_and_no_other() -> None:
    if diffusers().__version__ != VERSION:
        pytest.skip(f"docs/pipelines.md is of diffusers {VERSION}")
    assert {kind.name for kind in pipeline_classes()} <= set(SAID)
    assert all(hasattr(diffusers(), name) for name in SAID)


def test_most_text_to_image_flow_classes_run() -> None:
    flows = {kind.name for kind in pipeline_classes() if kind.flow and kind.makes == "text-to-image"}
    if diffusers().__version__ != VERSION:
        pytest.skip(f"docs/pipelines.md is of diffusers {VERSION}")
    running = {name for name in flows if SAID[name] == ""}
    assert len(running) >= 0.95 * len(flows), sorted(flows - running)
