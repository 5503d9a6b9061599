"""The page itself: that it is built and keeps to this machine, and, in a real browser, what a user does on it.

The tests need gradio, those in the browser playwright and a Chromium besides. MRFLOW_UI_PYTHON names the Python that is
to serve the page (with gradio and the package's needs) where this one has none; MRFLOW_UI_SHOTS keeps screenshots.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from ui_tools import studio_on

ROOT = Path(__file__).resolve().parents[3]
PYTHON = os.environ.get("MRFLOW_UI_PYTHON") or (sys.executable if importlib.util.find_spec("gradio") else None)
SHOTS = os.environ.get("MRFLOW_UI_SHOTS")
HOSTS = re.compile(r"https?://([^/\s\"']+)")

# ---------------------------------------------------------------------------------------------------- without a browser


@pytest.fixture(scope="module")
def client(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A client of the page, in this process."""
    pytest.importorskip("gradio")
    from starlette.testclient import TestClient

    from mrflow_sched.apps.ui.jobs import Desk
    from mrflow_sched.apps.ui.page import mounted
    from mrflow_sched.apps.ui.serve import application

    folder = tmp_path_factory.mktemp("page")
    studio = studio_on(tiny_folder, folder / "out")
    (folder / "out" / "mine.txt").write_text("mine")
    shown = folder / "shown"
    shown.mkdir()
    with TestClient(
        application(lambda app: mounted(app, studio, Desk(), shown)), base_url="http://127.0.0.1:7870"
    ) as found:
        found.folder = folder  # pyright: ignore[reportAttributeAccessIssue]
        yield found


def test_the_page_is_served_with_a_policy_that_lets_nothing_in_from_elsewhere(client: Any) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert not HOSTS.search(policy)
    labels = {part["props"].get("label") for part in client.get("/config").json()["components"]}
    assert {"Prompt", "Preset", "Size", "Seed", "Low steps", "Drafts"} <= labels


@pytest.mark.parametrize("host", ["evil.example", "192.168.1.2", "127.0.0.1.evil.example"])
def test_other_names_of_this_machine_are_refused(client: Any, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 400
    assert client.get("/", headers={"host": "localhost:7870"}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:7871"])
def test_the_page_of_another_site_may_ask_for_nothing(client: Any, origin: str) -> None:
    files = {"files": ("a.png", b"much")}
    assert client.post("/gradio_api/upload", files=files, headers={"origin": origin}).status_code == 403
    own = client.post("/gradio_api/upload", files=files, headers={"origin": "http://127.0.0.1:7870"})
    assert own.status_code == 200


def test_no_file_is_served_that_the_page_did_not_show(client: Any) -> None:
    for path in (ROOT / "pyproject.toml", client.folder / "out" / "mine.txt", Path("/etc/passwd")):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404), path


@pytest.fixture(scope="module")
def page(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page, to call what its controls call."""
    pytest.importorskip("gradio")
    from mrflow_sched.apps.ui.jobs import Desk
    from mrflow_sched.apps.ui.page import Page

    folder = tmp_path_factory.mktemp("called")
    return Page(studio_on(tiny_folder, folder / "out"), Desk(), folder)


TAB = SimpleNamespace(session_hash="tab")


def values(seed: int, prompt: str = "a red star") -> tuple[Any, ...]:
    """Of the controls."""
    return (prompt, "", "", "32x32", str(seed), "3", "1", "", False)


def said(page: Any, shown: Any) -> str:
    """The last status of what a handler shows."""
    return [state[page.status] for state in shown if page.status in state][-1]


def test_a_tab_that_is_older_than_the_server_gets_a_sentence_and_the_terminal_nothing(
    page: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = str(tmp_path / "gone.png")
    sentence = "The page was ended or started again, or the file is gone; load the page anew."
    assert sentence in said(page, page._finish_clicked((), SimpleNamespace(index=2), TAB))
    assert sentence in said(page, page._finish_picked((), [0, 1], TAB))
    assert page.picked.preprocess([0, 1]) == [0, 1]  # gradio's own raises: they are not among its choices any more
    assert sentence in said(page, page._finish_given(TAB, gone))
    assert sentence in said(page, page._upscale(TAB, gone, *values(5)))
    assert sentence in page._take(gone)[-1]
    assert "There is no image yet" in said(page, page._upscale(TAB, None, *values(5)))
    assert capsys.readouterr().err == ""


def test_ticked_drafts_are_finished_and_shown_in_the_order_of_the_ticks(page: Any) -> None:
    states = list(page._make_drafts(TAB, 3, "seed", *values(70)))
    drafts = next(state[page.made_drafts] for state in states if len(state.get(page.made_drafts, ())) == 3)
    ticks = [state[page.picked] for state in states if page.picked in state][-1]
    assert ticks.choices == [("#1 seed 70", 0), ("#2 seed 71", 1), ("#3 seed 72", 2)]
    *_, images, last = page._finish_picked(drafts, [2, 0], TAB)
    names = ["mrflow-72.png", "mrflow-70.png"]
    assert [Path(path).name for path in images[page.several]["value"]] == names
    assert images[page.several]["visible"]
    assert Path(images[page.image]).name == names[-1]
    assert "mrflow-70.png" in last[page.status]
    assert "Tick" in said(page, page._finish_picked(drafts, [], TAB)).title()
    *_, images, _ = page._finish_picked(drafts, [1], TAB)
    assert not images[page.several]["visible"]


def test_a_tab_that_is_loaded_while_a_job_runs_is_told(page: Any) -> None:
    assert page._greet() == ""
    job = page._desk.start("closed", lambda job: job.stop.wait(30))
    assert "A job is running" in page._greet()
    assert "The job of another tab ends." in page._cancel(TAB)
    assert job.done.wait(30)
    assert page._greet() == ""


def test_what_is_dropped_is_told_with_what_upscaling_makes_of_it(page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), "grey").save(tmp_path / "wide.png")
    file = str(tmp_path / "wide.png")
    dropped, about, upscaling, _ = page._drop(file, *values(5))
    assert dropped == file
    assert "can be upscaled" in about
    assert "Upscaling makes 96×64 of 48×32" in upscaling
    assert "The prompt is empty" in page._lines(file, *values(5, ""))[2]
    assert page._drop(None, *values(5))[:3] == (None, "", "")
    for line in page._lines(None, *values(5))[:2]:
        assert "32×32" in line


def test_taking_the_settings_of_another_program_leaves_the_steps_of_the_page(page: Any, tmp_path: Path) -> None:
    from gradio import skip

    text = PngInfo()
    text.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler, Seed: 11")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", pnginfo=text)
    taken = page._take(str(tmp_path / "other.png"))
    assert taken[:-1] == ["a cat", "", skip(), skip(), "11", skip(), skip(), skip(), False]
    assert "&#x27;other.png&#x27; is no draft of mrflow" in said(
        page, page._finish_given(TAB, str(tmp_path / "other.png"))
    )


def test_a_file_that_is_too_large_is_refused_and_goes_away(page: Any, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(300 * 10**6)  # takes no place on the disk
    dropped, about, upscaling, status = page._drop(str(large), *values(5))
    assert (dropped, upscaling, status, large.exists()) == (None, "", "", False)
    assert "&#x27;large.png&#x27; has 300 MB; the page takes images of up to 200 MB." in about


# --------------------------------------------------------------------------------------------------------- in a browser


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("MRFLOW_CHROMIUM") or next((path for path in map(shutil.which, names) if path), None)


def why_no_browser() -> str | None:
    if PYTHON is None:
        return "gradio is not installed here; name a Python that has it in MRFLOW_UI_PYTHON"
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    return None if chromium() else "no Chromium was found; install one or name it in MRFLOW_CHROMIUM"


REASON = why_no_browser()
needs_browser = pytest.mark.skipif(REASON is not None, reason=REASON or "")


class Served:
    """`mrflow ui` in a process of its own, on the embedded model."""

    def __init__(self, folder: Path) -> None:
        self.out, self.log = folder / "out", folder / "ui.log"
        words = ("ui", "--port", "0", "--out", str(self.out), "--device", "cpu", "--dtype", "float32")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(PYTHON), "-m", "mrflow_sched", *words],
                stderr=log,
                stdout=log,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        deadline = time.monotonic() + 300
        while not (found := re.search(r"The page is at (\S+)", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)
        self.address = found[1]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Generator[Served, None, None]:
    found = Served(tmp_path_factory.mktemp("served"))
    yield found
    if found.process.poll() is None:
        found.process.kill()


@pytest.fixture(scope="module")
def browser() -> Generator[Any, None, None]:
    from playwright.sync_api import sync_playwright  # pyright: ignore

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield running
        running.close()


class Tab:
    """The page in a browser tab, by what a user sees and does."""

    def __init__(self, browser: Any, served: Served, theme: str = "light") -> None:
        self.theme, self.out = theme, served.out
        self.tab = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=theme)
        self.tab.set_default_timeout(60_000)
        self.errors, self.hosts = list[str](), set[str]()
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("request", lambda request: self.hosts.update(HOSTS.findall(request.url)))
        self.tab.goto(f"{served.address}/?__theme={theme}", wait_until="domcontentloaded")
        self.says("forwards", "plan")
        self.host = served.address.removeprefix("http://")

    def find(self, name: str) -> Any:
        return self.tab.locator(f"#mrflow-{name}").first

    def says(self, text: str, where: str = "status") -> str:
        script = "([id, text]) => document.getElementById(id)?.textContent.includes(text)"
        self.tab.wait_for_function(script, arg=[f"mrflow-{where}", text])
        return self.find(where).inner_text()

    def shows(self, name: str, text: str) -> None:
        script = "([id, text]) => document.querySelector(`#${id} :is(input, textarea)`).value.includes(text)"
        self.tab.wait_for_function(script, arg=[f"mrflow-{name}", text])

    def fill(self, name: str, text: str) -> None:
        field = self.find(name).locator("input, textarea").first
        field.click()
        field.fill(text)
        field.press("Enter" if name in ("size", "preset", "order") else "Tab")

    def click(self, name: str) -> None:
        self.find(name).click()

    def turn_to(self, name: str) -> None:
        self.tab.get_by_role("tab", name=name).first.click()

    def small(self, seed: int) -> None:
        """Settings that take no time."""
        self.fill("size", "64x64")
        self.fill("preset", "6+1")
        self.fill("seed", str(seed))
        self.says("32×32 ×6", "plan")

    def downloaded(self, folder: Path) -> Path:
        """The newest image, through its link on the page."""
        with self.tab.expect_download() as found:
            self.find("files").locator("a").first.click()
        path = folder / found.value.suggested_filename
        found.value.save_as(path)
        return path

    def drop(self, file: Path) -> None:
        box = self.find("given")
        if box.locator("input[type=file]").count() == 0:
            box.get_by_label(re.compile("clear|remove", re.IGNORECASE)).first.click()
        box.locator("input[type=file]").first.set_input_files(str(file))

    def shoot(self, name: str) -> None:
        if SHOTS:
            self.tab.mouse.move(1, 1)
            self.tab.wait_for_timeout(800)
            self.tab.screenshot(path=str(Path(SHOTS) / f"ui-{name}-{self.theme}.png"), animations="disabled")


@pytest.fixture
def tab(browser: Any, served: Served) -> Generator[Tab, None, None]:
    opened = Tab(browser, served)
    yield opened
    opened.tab.close()
    assert opened.errors == []
    assert opened.hosts == {opened.host}  # nothing was asked of another machine


def pixels(path: Path | str) -> Any:
    with Image.open(path) as image:
        return np.array(image)


PROMPT = "a purple dotted heart and a yellow triangle over grey mountains under a pink sky"


@needs_browser
def test_a_draft_that_is_clicked_becomes_the_image_of_the_command_line(tab: Tab, tmp_path: Path) -> None:
    tab.small(seed=11)
    tab.find("vocabulary").locator("button").first.click()
    tab.find("words").get_by_text("heart").first.click()
    tab.shows("prompt", "the word FLOW heart")
    tab.shoot("words")
    tab.find("examples").get_by_text("a purple dotted heart").first.click()
    tab.shows("prompt", "a purple dotted heart")
    tab.turn_to("Drafts")
    tab.fill("count", "3")
    tab.click("draft")
    tab.says("3 drafts. Click one to finish it.")
    tab.says("#3 seed 13", "picked")
    tab.fill("order", "judge")
    tab.says("seed 13, ", "picked")
    tab.fill("order", "seed")
    tab.says("#3 seed 13", "picked")
    tab.find("gallery").locator("img").nth(2).click()
    said = tab.says("Saved as")
    assert "seed 13" in said
    file = tab.downloaded(tmp_path)
    assert file.name == "mrflow-13.png"
    assert file.read_bytes() == (tab.out / "mrflow-13.png").read_bytes()
    words = ("--size", "64x64", "--preset", "6+1", "--seed", "13", "--device", "cpu", "--dtype", "float32")
    command = [str(PYTHON), "-m", "mrflow_sched", "generate", PROMPT, *words, "--out", str(tmp_path / "cli")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert np.array_equal(pixels(file), pixels(tmp_path / "cli" / "mrflow-13.png"))


@needs_browser
def test_several_drafts_are_finished_at_once(tab: Tab) -> None:
    tab.small(seed=21)
    tab.turn_to("Drafts")
    tab.fill("count", "2")
    tab.click("draft")
    tab.says("2 drafts.")
    for box in reversed(tab.find("picked").get_by_role("checkbox").all()):
        box.check()
    tab.click("finish")
    assert tab.says("mrflow-22.png").index("mrflow-21.png") < tab.says("mrflow-21.png").index("mrflow-22.png")
    tab.find("several").locator("img").nth(1).wait_for()
    assert [(tab.out / f"mrflow-{seed}.png").is_file() for seed in (21, 22)] == [True, True]


@needs_browser
def test_cancel_keeps_the_best_and_a_second_tab_waits(browser: Any, served: Served, tab: Tab) -> None:
    tab.fill("preset", "900+1")
    tab.fill("seed", "31")
    tab.says("×900", "plan")
    tab.click("generate")
    tab.says("stage 1 sample")
    tab.find("image").locator("img").wait_for()  # a preview
    other = Tab(browser, served)
    other.small(seed=32)
    other.click("generate")
    other.says("Waiting for the job of another tab or button.")
    tab.click("cancel")
    assert "mrflow-31-unfinished.png" in tab.says("Unfinished, saved as")
    other.says("mrflow-32.png")
    other.click("cancel")
    other.says("Nothing runs.")
    other.tab.close()
    assert (served.out / "mrflow-31-unfinished.png").is_file()


@needs_browser
def test_a_closed_tab_loses_nothing(browser: Any, served: Served) -> None:
    tab = Tab(browser, served)
    tab.fill("preset", "60+1")
    tab.fill("seed", "41")
    tab.says("×60", "plan")
    tab.click("generate")
    tab.says("stage 1 sample")
    tab.tab.close()
    deadline = time.monotonic() + 120
    while not (served.out / "mrflow-41.png").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@needs_browser
def test_a_dropped_image_gives_its_settings_back_and_is_upscaled(tab: Tab, tmp_path: Path) -> None:
    tab.small(seed=51)
    tab.fill("prompt", "the word MAGIC in white letters on a blue wall")
    tab.click("generate")
    file = tab.downloaded(tmp_path) if tab.says("mrflow-51.png") else tmp_path
    for name, text in (("prompt", "a red star"), ("seed", "random"), ("preset", "20+1"), ("size", "128x128")):
        tab.fill(name, text)
    tab.turn_to("From an image")
    tab.drop(file)
    tab.says("Made by mrflow with the model 'embedded' and the seed 51.", "said")
    tab.click("take")
    tab.says("32×32 ×6 → upscaler x2, ×2 → 64×64 ×1", "plan")
    for name, text in (("prompt", "the word MAGIC in white letters on a blue wall"), ("seed", "51"), ("size", "64x64")):
        tab.shows(name, text)
    tab.says("Upscaling makes 128×128 of 64×64", "before-upscale")
    tab.click("upscale")
    tab.says("mrflow-51-2.png")
    assert pixels(tab.out / "mrflow-51-2.png").shape == (128, 128, 3)
    tab.turn_to("From an image")
    (tmp_path / "hostile.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 100)
    tab.drop(tmp_path / "hostile.png")
    assert "<" not in tab.says("hostile.png", "said")
    tab.click("upscale")
    tab.says("hostile.png")


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_ways_side_by_side(browser: Any, served: Served, theme: str) -> None:
    tab = Tab(browser, served, theme)
    tab.shoot("start")
    if SHOTS:
        tab.fill("seed", "7")
    else:
        tab.small(seed=7)
    tab.click("draft")
    tab.says("6 drafts.")
    tab.shoot("drafts")
    tab.find("gallery").locator("img").nth(1).click()
    tab.says("Saved as")
    tab.shoot("image")
    tab.turn_to("Native and staged")
    tab.says("times the work of the staged image", "before-both")
    tab.click("compare")
    tab.says("times as fast", "both")
    tab.shoot("compare")
    for name in ("plan", "status"):
        line = tab.find(name).locator("p").last
        text, ground = (
            line.evaluate(f"(shown) => getComputedStyle(shown.closest('.mrflow-box')).{part}")
            for part in ("color", "backgroundColor")
        )
        light, dark = (sum(map(int, re.findall(r"\d+", part)[:3])) for part in (text, ground))
        assert abs(light - dark) > 300, (text, ground)  # of 765: readable in this theme
    tab.tab.close()
    assert tab.errors == []


@needs_browser
def test_refusals_stand_on_the_page_before_the_button_is_pressed(tab: Tab) -> None:
    tab.fill("prompt", "a <b>cat</b> over green hills")
    tab.says("The embedded model does not know '<b>cat</b>'", "plan")
    tab.fill("seed", "12x")
    tab.says("The seed is '12x'; give random", "plan")
    tab.click("generate")
    tab.says("The seed is '12x'; give random")
    tab.fill("seed", "1")
    tab.find("advanced").locator("button").first.click()
    tab.fill("low_steps", "5000")
    tab.says("Low steps must be a whole number from 1 to 1000, got 5000.", "plan")
    tab.fill("low_steps", "")
    tab.says("×12", "plan")
    tab.shoot("advanced")
    tab.fill("size", "99999x64")
    tab.says("99999", "plan")
    tab.click("generate")
    assert "mrflow-" not in tab.says("99999")


@needs_browser
def test_ctrl_c_keeps_the_best_and_ends_without_a_traceback(browser: Any, tmp_path: Path) -> None:
    served = Served(tmp_path)
    tab = Tab(browser, served)
    tab.fill("preset", "900+1")
    tab.fill("seed", "61")
    tab.says("×900", "plan")
    tab.click("generate")
    tab.says("stage 1 sample · step")
    assert served.stop() == 130
    tab.tab.close()
    said = served.log.read_text()
    assert said.splitlines()[-1] == "mrflow: Stopped."
    assert "Traceback" not in said
    assert [path.name for path in served.out.iterdir()] == ["mrflow-61-unfinished.png"]
