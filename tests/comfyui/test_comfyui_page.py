"""ComfyUI's page in a real browser: examples open and run, nodes are found, and speak the user's language.

They need playwright and a Chromium beside a ComfyUI; MRFLOW_CHROMIUM names one that is not on the path.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
LANGUAGES = ("en", "zh", "ja")
NODE_IDS = set(json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text("utf-8")))
# The page's own first workflow comes last, and would take the place of what a test puts there.
READY = "() => window.app?.graph?.nodes.length > 0 && Boolean(LiteGraph.registered_node_types['MrFlowSampler'])"

ADD = """(kinds) => {
    app.graph.clear();
    return kinds.map(kind => {
        const node = LiteGraph.createNode(kind);
        node.pos = [300, 200];
        app.graph.add(node);
        app.canvas.ds.scale = 1;
        app.canvas.ds.offset = [0, 0];
        return {
            title: node.title,
            inputs: Object.fromEntries(node.inputs.filter(each => !each.widget)
                .map(each => [each.name, each.label ?? each.localized_name])),
            widgets: Object.fromEntries((node.widgets ?? []).map(each => [each.name, each.label ?? each.name])),
            outputs: node.outputs.map(each => each.label ?? each.localized_name),
        };
    });
}"""

NODES = """() => app.graph.nodes.map(node => [
    node.type, Object.fromEntries((node.widgets ?? []).filter(each => each.type !== 'customtext_markdown')
        .map(each => [each.name, each.value])),
])"""

DROP = """(data) => {
    const held = new DataTransfer();
    const bytes = Uint8Array.from(atob(data), each => each.charCodeAt(0));
    held.items.add(new File([bytes], 'mine.png', {type: 'image/png'}));
    const dropped = new DragEvent('drop', {bubbles: true, cancelable: true, dataTransfer: held});
    document.querySelector('canvas').dispatchEvent(dropped);
}"""


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("MRFLOW_CHROMIUM") or next((path for path in map(shutil.which, names) if path), None)


def why_no_browser() -> str | None:
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    return None if chromium() else "no Chromium was found; install one or name it in MRFLOW_CHROMIUM"


REASON = why_no_browser()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


@pytest.fixture(scope="module")
def browser() -> Generator[Any, None, None]:
    from playwright.sync_api import sync_playwright  # pyright: ignore

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield running
        running.close()


def waited(ready: Callable[[], Any], seconds: float = 60) -> Any:
    """What `ready` gives as soon as it gives something."""
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


class Tab:
    """The page in a browser tab, and all that it complains of."""

    def __init__(self, browser: Any, server: Any, language: str = "en") -> None:
        self.server, self.complaints = server, list[str]()
        # A user who was here before: for a new one the page opens what introduces it.
        known = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.49.6"}
        server.post("/settings", {**known, "Comfy.Locale": language, "Comfy.Workflow.Persist": False})
        self.page = browser.new_page(viewport={"width": 1600, "height": 1000})
        self.page.set_default_timeout(30_000)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self._note(str(error)))
        self.page.on("response", lambda answer: answer.status >= 400 and self._note(answer.url))
        self.page.goto(server.address, wait_until="domcontentloaded")
        self.page.wait_for_function(READY)
        self.page.get_by_test_id("queue-button").wait_for()
        self.page.wait_for_timeout(2000)  # nothing on the page says when the last of its handlers is there

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self._note(f"{message.text} {message.location}")

    def _note(self, words: str) -> None:
        """ComfyUI's page complains of much that is not ours."""
        if "mrflow" in words.lower():
            self.complaints.append(words)

    def toasts(self) -> list[str]:
        return self.page.locator(".p-toast-message").all_inner_texts()

    def nodes(self) -> list[Any]:
        return self.page.evaluate(NODES)

    def open_example(self, name: str) -> None:
        self.page.get_by_text("Templates", exact=True).first.click()
        self.page.get_by_text(name, exact=True).click()
        waited(lambda: "MrFlowDemoModel" in [kind for kind, _ in self.nodes()])

    def search(self, words: str) -> Any:
        """Type into the search that a double click opens; what it shows under a title."""
        focused = self.page.locator("input:focus")

        def opened() -> bool:
            self.page.mouse.dblclick(1000, 700)
            self.page.wait_for_timeout(700)
            return focused.count() > 0

        waited(opened)
        self.page.keyboard.type(words, delay=5)
        return lambda title: self.page.get_by_text(title, exact=True).locator("visible=true").first

    def run(self) -> dict[str, Any]:
        """Press Run; the run's entry of the history."""
        before = set(self.server.get("/history"))
        self.page.get_by_test_id("queue-button").click()
        [made] = waited(lambda: set(self.server.get("/history")) - before, 300)
        return self.server.get("/history")[made]


@pytest.fixture
def tab(browser: Any, server: Any) -> Generator[Callable[..., Tab], None, None]:
    """Opens tabs."""
    opened: list[Tab] = []

    def new(language: str = "en") -> Tab:
        opened.append(Tab(browser, server, language))
        return opened[-1]

    yield new
    for each in opened:
        each.page.close()
    server.post("/settings", {"Comfy.Locale": "en"})


def pictures(server: Any, entry: dict[str, Any]) -> list[bytes]:
    """The files that a run saved."""
    found = [each for output in entry["outputs"].values() for each in output.get("images", ())]
    saved = [each for each in found if each["type"] == "output"]
    return [(server.base / "output" / each["subfolder"] / each["filename"]).read_bytes() for each in saved]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_opens_from_the_templates_and_ends_with_a_picture(tab: Any, server: Any, name: str) -> None:
    opened = tab()
    opened.open_example(name)
    shipped = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text("utf-8"))
    assert sorted(kind for kind, _ in opened.nodes()) == sorted(each["type"] for each in shipped["nodes"])
    assert opened.toasts() == []
    entry = opened.run()
    assert entry["status"]["status_str"] == "success", entry["status"]
    [picture] = pictures(server, entry)
    image = Image.open(io.BytesIO(picture)).convert("L")
    assert min(image.size) >= 256
    assert np.ptp(np.asarray(image)) > 100
    assert opened.toasts() == []
    assert opened.complaints == []


def test_nodes_are_found_by_what_people_type(tab: Any, info: Any) -> None:
    opened = tab()
    titles = {each["display_name"].lower(): each["display_name"] for name, each in info.items() if name in NODE_IDS}
    for words, title in {"hires fix": "MrFlow Refine", "staged sampling": "MrFlow Sampler", **titles}.items():
        opened.page.evaluate("() => app.graph.clear()")
        opened.search(words)(title).wait_for()
        opened.page.keyboard.press("Escape")
    assert opened.complaints == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_speaks_the_language_of_the_page(tab: Any, language: str) -> None:
    told = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    opened = tab(language)
    shown = opened.page.evaluate(ADD, list(told))
    for node, words in zip(shown, told.values(), strict=True):
        names = {name: each["name"] for name, each in words["inputs"].items()}
        assert node["title"] == words["display_name"]
        assert {**node["inputs"], **node["widgets"]} == names
        assert node["outputs"] == [each["name"] for each in words["outputs"].values()]
    assert opened.toasts() == []
    assert opened.complaints == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_help_of_a_node_is_its_page_in_that_language(tab: Any, language: str) -> None:
    opened = tab(language)
    told = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))["MrFlowSampler"]
    opened.page.evaluate(ADD, ["MrFlowSampler"])
    opened.page.evaluate("() => app.canvas.selectNode(app.graph.nodes[0])")
    opened.page.mouse.click(450, 185)
    opened.page.get_by_test_id("info-button").click()
    opened.page.get_by_role("heading", name=told["display_name"], exact=True).first.wait_for()
    row = opened.page.locator("tr", has_text="low_sigmas")
    assert told["inputs"]["low_sigmas"]["tooltip"].rstrip(".") in row.first.inner_text()
    assert opened.complaints == []


def test_a_saved_picture_dropped_on_the_page_brings_its_workflow_back(tab: Any, server: Any) -> None:
    first = tab()
    first.open_example("mrflow_one_node")
    first.page.evaluate(
        "() => { app.graph.nodes.find(each => each.widgets?.[0]?.name === 'width').widgets[3].value = 77; }"
    )
    made, [picture] = first.nodes(), pictures(server, first.run())
    second = tab()
    second.page.evaluate("() => app.graph.clear()")
    second.page.evaluate(DROP, base64.b64encode(picture).decode())
    waited(lambda: "MrFlowSampler" in [kind for kind, _ in second.nodes()])
    again = second.nodes()
    assert again == made
    assert next(values["seed"] for kind, values in again if kind == "MrFlowSampler") == 77
    assert second.toasts() == []
    assert second.complaints == []
