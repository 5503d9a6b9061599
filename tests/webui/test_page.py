"""The accordion: what is built, what the line says, and, in a real browser, that the two stay together.

The browser tests run the page of `page_host` under each Python named in MRFLOW_PAGE_PYTHONS (paths joined by ":", each
with gradio and the package's needs), or under this one where it has gradio. They need playwright and a Chromium.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mrflow_sched.apps.webui import ui, words
from mrflow_sched.apps.webui.controls import FIELDS, LABELS, LIMITS, Controls

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "tests" / "webui" / "page_host" / "app.py"

# --------------------------------------------------------------------------------------------- the line, without gradio

PAGE = {"width": 1024, "height": 1024, "cfg_scale": 1.0}


def line(page: dict[str, Any] | None = None, **changes: Any) -> str:
    """The plan as HTML for the default controls with `changes`, switched on."""
    chosen = {**Controls(enabled=True).to_dict(), **changes}
    return ui.plan_html([chosen[name] for name in FIELDS], PAGE if page is None else page)[0]


def flux_loaded(monkeypatch: pytest.MonkeyPatch, *upscalers: str, model: Any = "flux") -> None:
    """A host in `sys.modules` with a FLUX model of Forge's shape and these upscalers."""

    class Flux:
        forge_objects = SimpleNamespace(
            unet=SimpleNamespace(model=SimpleNamespace(predictor=SimpleNamespace(prediction_type="const")))
        )
        sd_checkpoint_info = SimpleNamespace(name="flux1-dev.safetensors", name_for_extra="flux1-dev")

    shared: Any = ModuleType("modules.shared")
    shared.sd_upscalers = [SimpleNamespace(name=name) for name in ("None", "Lanczos", *upscalers)]
    shared.opts = SimpleNamespace(sd_model_checkpoint="qwen-image-fp8.safetensors")
    models: Any = ModuleType("modules.sd_models")
    models.model_data = SimpleNamespace(sd_model=Flux() if model == "flux" else model)
    monkeypatch.setitem(sys.modules, "modules.shared", shared)
    monkeypatch.setitem(sys.modules, "modules.sd_models", models)


def test_the_line_says_what_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    flux_loaded(monkeypatch, "2x-Tiny (MrFlow)")
    said = line()
    for part in ("512×512 ×12", "×2", "1024×1024 ×1", "σ 0.12", "× faster than 20 steps", "mrflow-on"):
        assert part in said
    assert "<li>" not in said
    assert "800×800 ×7" in line({**PAGE, "width": 1200, "height": 1200}, low_steps=7.0, factor=1.5)


def test_off_shows_the_plan_too_but_no_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    flux_loaded(monkeypatch)
    chosen = list(Controls().to_dict().values())
    said, summary = ui.plan_html(chosen, PAGE)
    assert "mrflow-off" in said
    assert summary == ""
    assert "512×512" in ui.plan_html([True, *chosen[1:]], PAGE)[1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sigma": 0.01}, "Sigma must be a number from 0.02 to 0.9, got 0.01"),
        ({"preset": "<b>fast</b>"}, "&lt;b&gt;fast&lt;/b&gt;"),
        ({"factor": None}, "1024×1024"),
        ({"low_steps": 3.5}, "Low_steps must be a whole number"),
        ({"upscaler": "9x-Gone"}, "9x-Gone"),
    ],
)
def test_bad_values_are_told_in_the_line(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sentence: str
) -> None:
    flux_loaded(monkeypatch, "2x-Tiny (MrFlow)")
    assert sentence in line(**changes)


@pytest.mark.parametrize(
    "page", [{}, {"width": None, "height": 1024}, {"width": 0, "height": -5}, {"width": "wide", "height": 512}]
)
def test_the_line_never_raises(monkeypatch: pytest.MonkeyPatch, page: dict[str, Any]) -> None:
    flux_loaded(monkeypatch)
    assert "mrflow-refused" in line(page)
    assert "mrflow-refused" in ui.plan_html([], page)[0]


class Unreadable:
    """A host's list that fails as a library may: with a ValueError, which is no refusal."""

    def __iter__(self) -> Any:
        raise ValueError("the list is <damaged>")


def test_the_header_says_in_short_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flux_loaded(monkeypatch)
    chosen = Controls(enabled=True).to_dict()

    def header(**page: Any) -> str:
        return ui.plan_html(list(chosen.values()), {**PAGE, **page})[1]

    assert header(width=96, height=96) == (
        '<span class="mrflow-refused" title="MrFlow cannot make 96x96 with factor 2: the low-resolution image would be '
        '48x48, and its sides must be at least 64 px; choose a larger size or a smaller factor.">'
        "MrFlow cannot make 96x96 with factor 2</span>"
    )
    assert header().startswith('<span class="mrflow-on" title="512×512 ×12 → ')
    monkeypatch.setattr(sys.modules["modules.shared"], "sd_upscalers", Unreadable())
    assert header().endswith(">MrFlow failed (ValueError: the list is &lt;damaged&gt;)</span>")


def test_a_fault_is_told_as_one_in_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    flux_loaded(monkeypatch)
    monkeypatch.setattr(sys.modules["modules.shared"], "sd_upscalers", Unreadable())
    said = line()
    assert "MrFlow failed (ValueError: the list is &lt;damaged&gt;); see the console." in said
    assert "mrflow-refused" in said


def test_a_refused_model_is_refused_in_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    flux_loaded(monkeypatch)
    info = SimpleNamespace(name="flux1-kontext-dev.safetensors", name_for_extra="flux1-kontext-dev")
    monkeypatch.setattr(sys.modules["modules.sd_models"].model_data.sd_model, "sd_checkpoint_info", info, raising=False)
    said = line()
    assert "mrflow-refused" in said
    assert "edit model" in said


def test_the_line_names_no_upscaler_that_is_still_to_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    flux_loaded(monkeypatch)
    listed = sys.modules["modules.shared"].sd_upscalers
    listed.append(SimpleNamespace(name="R-ESRGAN 2x+", data_path="https://example.invalid/x2.pth"))
    assert "R-ESRGAN" not in line()
    listed[-1].data_path = "/models/x2.pth"
    assert "R-ESRGAN" in line()


@pytest.mark.parametrize("model", [None, SimpleNamespace()])
def test_before_a_model_is_loaded_its_name_decides(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    flux_loaded(monkeypatch, model=model)
    said = line()
    assert "The checkpoint is loaded with the first image" in said
    assert "Qwen" in said


def test_without_a_host_there_is_a_line_as_well() -> None:
    assert "modules.shared" not in sys.modules
    assert "FLUX.1-dev" in line()


class HostJob:
    """What the hosts' class of jobs does with Hires. fix, rounding as Forge Neo does."""

    def calculate_target_resolution(self: Any) -> None:
        self.extra_generation_params["Hires upscale"] = self.hr_scale
        wanted = self.width * self.hr_scale, self.height * self.hr_scale
        if self.hr_resize_x or self.hr_resize_y:
            wanted = self.hr_resize_x or self.hr_resize_y * self.width / self.height, self.hr_resize_y
        self.hr_upscale_to_x, self.hr_upscale_to_y = (int(side / 64 + 0.5) * 64 for side in wanted)


HIRES = {"width": 512, "height": 320, "enable_hr": True, "hr_scale": 2.0, "hr_resize_x": 0, "hr_resize_y": 0}


@pytest.mark.parametrize(
    ("changes", "final"),
    [
        ({}, "1024×640"),
        ({"hr_scale": 1.75}, "896×560"),
        ({"hr_resize_x": 768}, "768×480"),
        ({"hr_resize_y": 640}, "1024×640"),
        ({"hr_resize_x": 1000, "hr_resize_y": 1000}, "1000×1000"),
        ({"enable_hr": False}, "512×320"),
        ({"hr_scale": None, "hr_resize_x": 768.0}, "768×480"),
    ],
)
def test_hires_fix_decides_the_final_size(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], final: str) -> None:
    flux_loaded(monkeypatch, "2x-Tiny (MrFlow)")
    said = line({**HIRES, **changes})
    assert f"→ {final} ×1" in said
    told = f"MrFlow replaces Hires. fix; its target {final.replace('×', 'x')} is the final size."
    assert (told in said) is (changes.get("enable_hr") is not False)


def test_the_hosts_own_rounding_decides_the_hires_target(monkeypatch: pytest.MonkeyPatch) -> None:
    flux_loaded(monkeypatch, "2x-Tiny (MrFlow)")
    processing: Any = ModuleType("modules.processing")
    processing.StableDiffusionProcessingTxt2Img = HostJob
    monkeypatch.setitem(sys.modules, "modules.processing", processing)
    assert "→ 896×576 ×1" in line({**HIRES, "hr_scale": 1.75})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hr_scale": float("nan")}, "Hr_scale must be a number above 0 to 100, got nan."),
        ({"hr_scale": 1e9}, "Hr_scale must be"),
        ({"hr_resize_x": "wide"}, "Hr_resize_x must be a whole number of pixels"),
        ({"hr_resize_y": -8}, "Hr_resize_y must be a whole number of pixels"),
        ({"steps": float("inf")}, "Steps must be a whole number from 1 to 1000, got inf."),
        ({"cfg_scale": "high"}, "Cfg_scale must be a number"),
        ({"width": float("nan")}, "Width must be a whole number of pixels"),
        ({"width": 10**30}, "Width must be a whole number of pixels"),
        ({"hr_scale": 99}, "must be 1 to 32768 pixels"),
    ],
)
def test_bad_numbers_of_the_page_are_named(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sentence: str
) -> None:
    flux_loaded(monkeypatch)
    said = line({**HIRES, **changes})
    assert sentence in said.replace("&#x27;", "'")
    assert "mrflow-refused" in said


# ------------------------------------------------------------------------------------------- what is built, on a double


class Component:
    """One component of a page: remembers how it was made and who listens."""

    def __init__(self, kind: str, **made: Any) -> None:
        self.kind, self.made = kind, made
        self.value, self.label, self.elem_id = made.get("value"), made.get("label"), made.get("elem_id")
        self.listeners: list[dict[str, Any]] = []

    def change(self, **listener: Any) -> None:
        self.listeners.append(listener)

    click = change

    def __enter__(self) -> Component:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def extra(self) -> Component:
        return Component("Column")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> list[Component]:
    """Stand-ins for gradio and the host's modules; the list of every component made."""
    made: list[Component] = []

    def maker(kind: str) -> Callable[..., Component]:
        def make(*args: Any, **options: Any) -> Component:
            if args:
                options["value"] = args[0]
            made.append(Component(kind, **options))
            return made[-1]

        return make

    flux_loaded(monkeypatch, "2x-Tiny (MrFlow)")
    gradio: Any = ModuleType("gradio")
    for kind in ("HTML", "Dropdown", "Slider", "Radio", "Checkbox", "Button", "File", "Row", "Accordion"):
        setattr(gradio, kind, maker(kind))
    gradio.update = lambda **changes: changes
    components: Any = ModuleType("modules.ui_components")
    components.InputAccordion = maker("InputAccordion")
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setitem(sys.modules, "modules.ui_components", components)
    return made


def script() -> Any:
    return SimpleNamespace(elem_id=lambda item: f"script_mrflow_{item}", infotext_fields=None)


def slider(name: str) -> Component:
    return Component("Slider", elem_id=f"txt2img_{name}", value=1024)


LATER = ("cfg_scale", "steps", "hr-checkbox", "hr_scale", "hr_resize_x", "hr_resize_y")


def test_controls_stand_in_the_api_s_order_with_float_numbers(page: list[Component]) -> None:
    *controls, files = ui.build(False, script())
    assert (files.label, files.elem_id) == (ui.DROP, "script_mrflow_finish")
    assert [control.label for control in controls] == [LABELS[name] for name in FIELDS]
    assert [control.elem_id for control in controls] == [f"script_mrflow_{name}" for name in FIELDS]
    for name, control in zip(FIELDS, controls, strict=True):
        assert control.value == getattr(Controls(), name)
        if name in LIMITS:
            assert isinstance(control.value, float)
            assert tuple(control.made[key] for key in ("minimum", "maximum", "step")) == LIMITS[name]
    ids = [component.elem_id for component in page if component.elem_id]
    assert len(ids) == len(set(ids))


def test_settings_decide_what_the_page_starts_with_at_each_launch(
    page: list[Component], monkeypatch: pytest.MonkeyPatch
) -> None:
    opts = SimpleNamespace(mrflow_enabled=True, mrflow_preset="20+1", mrflow_save_stages=True)
    monkeypatch.setattr(sys.modules["modules.shared"], "opts", opts)
    controls = dict(zip(FIELDS, ui.build(False, script())[:-1], strict=True))
    for name, value in (("enabled", True), ("preset", "20+1"), ("save_stages", True)):
        assert controls[name].value == value
        assert vars(controls[name])["do_not_save_to_config"] is True


@pytest.mark.parametrize("order", ["before", "after", "around"])
@pytest.mark.parametrize("later", [LATER, LATER[:1], ()], ids=["all", "cfg", "size only"])
def test_the_line_listens_to_everything_in_any_order_of_the_page(
    page: list[Component], order: str, later: tuple[str, ...]
) -> None:
    owner = script()
    watched = [slider(name) for name in ("width", "height", *later)]
    early = {"before": len(watched), "around": 1, "after": 0}[order]
    for component in [slider("seed"), *watched[:early]]:
        ui.after_component(owner, component)
    controls = ui.build(False, owner)
    for component in [*watched[early:], slider("gallery")]:
        ui.after_component(owner, component)
    for component in [*controls, *watched]:
        [listener] = component.listeners
        assert listener["inputs"] == [*controls, *watched]
        assert listener["queue"] is False
        assert listener["show_progress"] == "hidden"
    values = [control.value for control in controls]
    others = (1216, 832, *(4.0, 30, False, 2.0, 0, 0)[: len(later)])
    said, summary, shown = controls[0].listeners[0]["fn"](*values, *others)
    assert "1216×832" in said
    assert ("faster than 30 steps" if len(later) > 1 else "faster than 20 steps") in said
    assert summary == ""
    assert shown == {"visible": False}
    values[FIELDS.index("refine_cfg")] = "value"
    assert controls[0].listeners[0]["fn"](*values, *others)[2] == {"visible": True}


def test_a_page_with_everything_waits_for_nothing_more(page: list[Component]) -> None:
    owner = script()
    controls = ui.build(False, owner)
    for name in ("width", "height", *LATER):
        assert not controls[0].listeners
        ui.after_component(owner, slider(name))
    assert len(controls[0].listeners) == 1


def test_the_line_counts_the_drafts_that_generate_will_finish(page: list[Component]) -> None:
    owner = script()
    for component in (slider("width"), slider("height")):
        ui.after_component(owner, component)
    controls = ui.build(False, owner)
    ui.after_component(owner, Component("Gallery", elem_id="txt2img_gallery"))
    values = [True, *(control.value for control in controls[1:-1])]
    for files, said in ((["a.png"], "finishes the draft,"), (["a.png", "b.png"], "finishes 2 drafts"), (None, "×12")):
        assert said in controls[0].listeners[0]["fn"](*values, files, 1024, 1024)[0]
    values[FIELDS.index("draft")] = True
    assert "draft 512×512 ×12 · finished later: → " in controls[0].listeners[0]["fn"](*values, None, 1024, 1024)[0]
    values[FIELDS.index("keep_composition")] = True
    assert " · keeps composition" in controls[0].listeners[0]["fn"](*values, None, 1024, 1024)[0]


def test_building_again_after_a_reload_listens_once_to_the_new_page(page: list[Component]) -> None:
    for _ in range(2):
        owner = script()
        controls = ui.build(False, owner)
        for name in ("width", "height", "gallery", "gallery"):
            ui.after_component(owner, slider(name))
        assert all(len(control.listeners) == 1 for control in controls)


def test_an_api_only_host_builds_without_a_page_around(page: list[Component]) -> None:
    owner = script()
    assert len(ui.build(False, owner)) == len(ui.build(False, owner)) == len(FIELDS) + 1


def test_pasting_fills_every_control_and_an_unknown_image_switches_off(page: list[Component]) -> None:
    owner = script()
    controls = ui.build(False, owner)
    fields = owner.infotext_fields
    assert [component for component, _ in fields] == controls[:-1]
    assert [source({"Steps": "20"}) for _, source in fields] == list(Controls().to_dict().values())
    keys = {"MrFlow": "8+1 x2 sigma=0.2 v1", "MrFlow solver": "multistep", "MrFlow noise": "nested"}
    pasted = [source(keys) for _, source in fields]
    wanted = Controls(enabled=True, preset="8+1", sigma=0.2, solver="multistep", keep_composition=True)
    assert Controls.from_args(pasted) == wanted


# -------------------------------------------------------------------------------------------------------- real browsers


def pythons() -> list[str]:
    named = [path for path in os.environ.get("MRFLOW_PAGE_PYTHONS", "").split(":") if path]
    if named:
        return named
    return [sys.executable] if importlib.util.find_spec("gradio") else []


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("MRFLOW_CHROMIUM") or next((path for path in map(shutil.which, names) if path), None)


def why_no_browser() -> str | None:
    if not pythons():
        return "gradio is not installed here; name Pythons that have it in MRFLOW_PAGE_PYTHONS"
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    return None if chromium() else "no Chromium was found; install one or name it in MRFLOW_CHROMIUM"


REASON = why_no_browser()
needs_browser = pytest.mark.skipif(REASON is not None, reason=REASON or "")
SHOTS = os.environ.get("MRFLOW_PAGE_SHOTS")


@contextmanager
def serving(python: str, folder: Path, **environment: str) -> Generator[tuple[str, str], None, None]:
    """The page of `page_host` under `python`: its address and gradio version."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    models = folder / "ESRGAN"
    models.mkdir(exist_ok=True)
    (models / "RealESRGAN_x2plus.pth").touch()
    given = {"PAGE_ESRGAN": str(models), "GRADIO_ANALYTICS_ENABLED": "False", **environment}
    log = folder / "page.log"
    with log.open("w+") as output:
        process = subprocess.Popen(
            [python, str(APP), str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **given},
        )
        try:
            deadline = time.monotonic() + 300
            while "\nready " not in "\n" + log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            [ready] = [entry for entry in log.read_text().splitlines() if entry.startswith("ready ")]
            yield f"http://127.0.0.1:{port}", ready.rsplit(" ", 1)[1]
        finally:
            process.terminate()
            process.wait()


@pytest.fixture(scope="module")
def browser() -> Generator[Any, None, None]:
    from playwright.sync_api import sync_playwright  # pyright: ignore

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module", params=pythons() or ["none"], ids=lambda path: Path(path).parts[-3:][0])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Any, None, None]:
    with serving(request.param, tmp_path_factory.mktemp("page")) as found:
        yield found


class Tab:
    """The page in a browser tab, by what a user sees and does."""

    def __init__(self, browser: Any, served: tuple[str, str], theme: str = "light", before: str = "") -> None:
        self.address, self.version = served
        self.theme = theme
        self.tab = browser.new_page(viewport={"width": 760, "height": 1000}, color_scheme=theme)
        self.tab.set_default_timeout(60_000)
        self.errors: list[str] = []
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.add_init_script(before)
        self.tab.goto(f"{self.address}/?__theme={theme}", wait_until="domcontentloaded")
        self.tab.wait_for_selector("body[data-ready=yes]")

    def find(self, name: str) -> Any:
        return self.tab.locator(f"#script_mrflow_{name}").first

    def says(self, text: str, where: str = "plan") -> None:
        self.tab.wait_for_function(
            "([id, text]) => document.getElementById(id).textContent.includes(text)",
            arg=[f"script_mrflow_{where}", text],
        )

    def fold(self, name: str) -> None:
        self.find(name).locator("> .label-wrap").click()

    def values(self) -> dict[str, Any]:
        shown = self.tab.locator("#page_values textarea").first
        self.tab.locator("#page_show").click()
        self.tab.wait_for_function("() => document.querySelector('#page_values textarea').value.startsWith('[')")
        return dict(zip(FIELDS, json.loads(shown.input_value())[: len(FIELDS)], strict=True))

    def shoot(self, name: str) -> None:
        if SHOTS:
            major = self.version.split(".")[0]
            self.tab.mouse.move(1, 1)
            self.tab.wait_for_timeout(1500)
            path = Path(SHOTS) / f"gradio{major}-{self.theme}-{name}.png"
            self.tab.screenshot(path=str(path), full_page=True, animations="disabled")


@pytest.fixture
def tab(browser: Any, served: Any) -> Generator[Tab, None, None]:
    opened = Tab(browser, served)
    yield opened
    opened.tab.close()
    assert opened.errors == []


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_switching_on_and_unfolding(browser: Any, served: Any, theme: str) -> None:
    opened = Tab(browser, served, theme)
    opened.says("1024×1024")  # the page asked by itself
    opened.shoot("off")
    assert opened.find("summary").inner_text().strip() == ""
    opened.find("enabled-visible-checkbox").click()
    opened.says("512×512 ×12", where="summary")
    opened.shoot("folded")
    assert not opened.find("plan").is_visible()
    opened.fold("enabled")
    assert opened.find("plan").locator(".mrflow-on").is_visible()
    assert not opened.find("summary").is_visible()
    assert not opened.find("sigma").is_visible()
    opened.shoot("open")
    opened.fold("advanced")
    opened.find("sigma").wait_for(state="visible")
    opened.shoot("advanced")
    assert opened.values()["enabled"] is True
    opened.tab.close()
    assert opened.errors == []


@needs_browser
def test_the_line_follows_the_page(tab: Tab) -> None:
    tab.fold("enabled")
    tab.says("512×512 ×12 → RealESRGAN_x2plus")
    preset = tab.find("preset").locator("input").first
    preset.click()
    preset.fill("20+1")
    preset.press("Enter")
    tab.says("×20 →")
    tab.says("σ 0.15")
    width = tab.tab.locator("#txt2img_width input[type=number]").first
    width.fill("832")
    width.press("Tab")
    tab.says("832×1024")
    tab.fold("advanced")
    sigma = tab.find("sigma").locator("input[type=number]").first
    sigma.fill("0.01")
    sigma.press("Tab")
    tab.says("Sigma must be a number from 0.02 to 0.9, got 0.01")
    tab.shoot("refused")
    sigma.fill("0.2")
    sigma.press("Tab")
    tab.says("σ 0.2")
    assert not tab.find("refine_cfg_value").is_visible()
    tab.find("refine_cfg").get_by_text("value", exact=True).last.click()
    tab.find("refine_cfg_value").wait_for(state="visible")
    found = tab.values()
    assert (found["preset"], found["sigma"], found["refine_cfg"]) == ("20+1", 0.2, "value")


@needs_browser
def test_the_line_follows_steps_and_hires_fix(tab: Tab) -> None:
    def fill(name: str, value: str) -> None:
        field = tab.tab.locator(f"#txt2img_{name} input[type=number]").first
        field.fill(value)
        field.press("Tab")

    tab.fold("enabled")
    tab.says("faster than 20 steps")
    fill("steps", "30")
    tab.says("faster than 30 steps")
    box = tab.tab.get_by_label("Hires. fix")
    box.check()
    tab.says("1024×1024 ×12 → RealESRGAN_x2plus ×2 → 2048×2048")
    tab.says("MrFlow replaces Hires. fix; its target 2048x2048 is the final size.")
    fill("hr_scale", "1.5")
    tab.says("→ 1536×1536 ×1")
    fill("hr_resize_x", "1280")
    tab.says("→ 1280×1280 ×1")
    box.uncheck()
    tab.says("→ 1024×1024 ×1")


HOLD_ONE = """
window.held = "no";
const plainFetch = window.fetch;
window.fetch = async (...given) => {
    const answer = await plainFetch(...given);
    if (window.held === "wanted" && String(given[0]).includes("predict")) {
        window.held = "yes";
        await new Promise((done) => setTimeout(done, 6000));
        window.held = "done";
    }
    return answer;
};
"""


@needs_browser
def test_an_answer_that_comes_late_does_not_stay(browser: Any, served: Any) -> None:
    tab = Tab(browser, served, before=HOLD_ONE)
    tab.fold("enabled")
    tab.says("512×512 ×12")
    tab.tab.wait_for_timeout(2000)
    tab.tab.evaluate("window.held = 'wanted'")
    for name in ("width", "height"):
        side = tab.tab.locator(f"#txt2img_{name} input[type=number]").first
        side.fill("832")
        side.press("Tab")
        tab.tab.wait_for_function("window.held !== 'wanted'")
    tab.says("832×832")
    tab.tab.wait_for_function("window.held === 'done'")
    tab.tab.wait_for_timeout(500)
    tab.says("832×832")
    tab.tab.close()


@needs_browser
def test_pasting_fills_the_controls_and_a_plain_image_switches_off(tab: Tab) -> None:
    metadata = tab.tab.locator("#page_metadata textarea").first
    metadata.fill(
        "Steps: 8, Size: 1024x1024, MrFlow: 8+1 x1.5 low=9 sigma=0.2 v1, MrFlow solver: multistep, "
        "MrFlow refine CFG: value 3.5"
    )
    tab.tab.locator("#page_paste").click()
    tab.says("×9 →")
    tab.says("σ 0.2")
    tab.find("plan").locator(".mrflow-on").wait_for(state="visible")  # it unfolds, for it is the switch
    wanted = Controls(
        enabled=True,
        preset="8+1",
        factor=1.5,
        low_steps=9,
        sigma=0.2,
        solver="multistep",
        refine_cfg="value",
        refine_cfg_value=3.5,
    )
    assert Controls.from_args(list(tab.values().values())) == wanted
    tab.shoot("pasted")
    metadata.fill("Steps: 20, Size: 512x512")
    tab.tab.locator("#page_paste").click()
    tab.says("512×512 ×12")
    tab.find("plan").locator(".mrflow-on").wait_for(state="hidden")
    tab.tab.locator("#page_values textarea").first.evaluate("(shown) => { shown.value = ''; }")
    assert Controls.from_args(list(tab.values().values())) == Controls()


@needs_browser
@pytest.mark.parametrize(("theme", "width"), [("light", 760), ("dark", 760), ("light", 430)])
def test_a_folded_header_shows_a_refusal_readable(browser: Any, served: Any, theme: str, width: int) -> None:
    opened = Tab(browser, served, theme)
    opened.tab.set_viewport_size({"width": width, "height": 900})
    for name in ("width", "height"):
        side = opened.tab.locator(f"#txt2img_{name} input[type=number]").first
        side.fill("96")
        side.press("Tab")
    opened.find("enabled-visible-checkbox").click()
    opened.says("MrFlow cannot make 96x96 with factor 2", where="summary")
    shown = opened.find("summary").locator("span")
    assert "choose a larger size" in shown.get_attribute("title")
    assert shown.evaluate("(text) => text.scrollWidth <= text.clientWidth + 1")  # nothing is cut off
    colour = shown.evaluate("(text) => getComputedStyle(text).color")
    red, green, blue = (int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    assert red > 2 * max(green, blue)
    title = opened.find("enabled").locator("> .label-wrap > span").first.bounding_box()
    assert shown.bounding_box()["x"] >= title["x"] + title["width"] + 5
    opened.shoot(f"refused-folded-{width}")
    opened.tab.close()
    assert opened.errors == []


@needs_browser
def test_the_routes_answer(tab: Tab) -> None:
    answer = tab.tab.request.get(f"{tab.address}/mrflow/v1/schema")
    assert [argument["name"] for argument in answer.json()["arguments"]] == list(FIELDS)
    body = {"width": 1024, "height": 1024, "args": {"preset": "6+1"}}
    answer = tab.tab.request.post(f"{tab.address}/mrflow/v1/plan", data=body)
    assert (answer.json()["refused"], answer.json()["low"]) == (None, [512, 512])
    assert tab.tab.request.post(f"{tab.address}/mrflow/v1/plan", data=[body]).status == 422


@needs_browser
@pytest.mark.parametrize("python", pythons() or ["none"], ids=lambda path: Path(path).parts[-3:][0])
def test_a_reordered_page_in_another_language_without_a_model(browser: Any, python: str, tmp_path: Path) -> None:
    german, pack = json.loads((words.FOLDER / "de.json").read_text(encoding="utf-8")), tmp_path / "de_DE.json"
    pack.write_text(json.dumps({"Width": "Breite", "auto": "von selbst"}), encoding="utf-8")
    with serving(python, tmp_path, PAGE_LATE="1", PAGE_MODEL="none", PAGE_PACK=str(pack)) as served:
        opened = Tab(browser, served)
        opened.fold("enabled")
        opened.says("512×512 ×12")
        opened.says("-mal so schnell wie ")
        opened.says("Das Modell wird mit dem ersten Bild geladen; bis dahin gilt dieser Plan für FLUX.1-dev.")
        opened.fold("advanced")
        for text in ("Breite", "von selbst", *german.values()):
            if "{}" not in text and text.startswith(
                ("Breite", "von s", "Rausch", "Zeitplan", "Mehrschritt", "Erweiterte", "nach Auflösung")
            ):
                assert opened.tab.get_by_text(text, exact=True).first.is_visible(), text
        opened.tab.locator("#txt2img_height input[type=number]").first.fill("832")
        opened.tab.locator("#txt2img_height input[type=number]").first.press("Tab")
        opened.says("1024×832")
        opened.shoot("german")
        opened.tab.close()
        assert opened.errors == []


@needs_browser
@pytest.mark.parametrize("python", pythons() or ["none"], ids=lambda path: Path(path).parts[-3:][0])
def test_a_page_in_chinese_refuses_in_chinese(browser: Any, python: str, tmp_path: Path) -> None:
    pack = tmp_path / "zh-Hans (Stable).json"
    pack.write_text(json.dumps({"Width": "宽度", "Height": "高度"}), encoding="utf-8")
    with serving(python, tmp_path, PAGE_PACK=str(pack)) as served:
        opened = Tab(browser, served)
        opened.find("enabled-visible-checkbox").click()
        opened.says(" 步采样", where="summary")
        opened.fold("enabled")
        opened.fold("advanced")
        opened.find("sigma").wait_for(state="visible")
        opened.shoot("chinese")
        opened.tab.locator("#txt2img_width input[type=number]").first.fill("96")
        opened.tab.locator("#txt2img_width input[type=number]").first.press("Tab")
        opened.says("MrFlow 无法以倍数 2 生成 96x1024：低分辨率图像将是 48x512")
        opened.fold("enabled")
        opened.says("MrFlow 无法以倍数 2 生成 96x1024", where="summary")
        opened.shoot("chinese-refused")
        opened.tab.close()
        assert opened.errors == []
