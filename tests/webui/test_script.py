"""scripts/mrflow.py as a host loads it: by its file, with the host's modules, without gradio, and its folder off the
path once it is loaded."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from doubles import Flux, WebUI, close, levels

from mrflow_sched.apps.webui.controls import FIELDS
from mrflow_sched.apps.webui.reporting import attach_console

SCRIPT = Path(__file__).parents[2] / "scripts" / "mrflow.py"


class Script:
    """The host's base class: hooks that do nothing."""


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Forge double with the script loaded into it."""
    ui = WebUI("forge", Flux())
    callbacks: dict[str, list[Any]] = {}

    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    def register(name: str) -> Any:
        return lambda callback: callbacks.setdefault(name, []).append(callback)

    names = ("on_before_ui", "on_ui_settings", "on_app_started")
    module("modules", __path__=[])
    module("modules.scripts", Script=Script, AlwaysVisible="always", scripts_data=[])
    module("modules.script_callbacks", **{name: register(name) for name in names})
    for name in ("modules.shared", "modules.rng", "modules.sd_samplers_timesteps"):
        monkeypatch.setitem(sys.modules, name, ui.import_module(name))
    monkeypatch.setitem(sys.modules, "gradio", None)  # importing it would fail
    spec = importlib.util.spec_from_file_location("mrflow.py", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script_module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script_module)
    return SimpleNamespace(ui=ui, module=script_module, callbacks=callbacks)


def test_it_is_always_there_in_txt2img_only(loaded: SimpleNamespace) -> None:
    script = loaded.module.MrFlowScript()
    assert script.title() == "MrFlow"
    assert script.show(False) == "always"
    assert script.show(True) is False
    assert {name: len(callbacks) for name, callbacks in loaded.callbacks.items()} == {
        "on_before_ui": 3,
        "on_ui_settings": 1,
        "on_app_started": 1,
    }


@pytest.mark.parametrize("args", [(True, "12+1"), ({"preset": "12+1"}, *[None] * (len(FIELDS) - 1))])
def test_a_job_runs_through_its_hooks(loaded: SimpleNamespace, args: tuple[Any, ...]) -> None:
    ui = loaded.ui
    ui.script = loaded.module.MrFlowScript()
    p = ui.job(width=416, height=608, n_iter=2)
    result = ui.generate(p, *args)
    assert [tuple(image.shape) for image in result.images] == [(3, 608, 416)] * 2
    assert close(levels(ui, "hires"), [0.12] * 2)
    assert not ui.errors
    assert not vars(ui.script)


def test_switched_off_it_does_nothing(loaded: SimpleNamespace) -> None:
    ui = loaded.ui
    ui.script = loaded.module.MrFlowScript()
    p = ui.job(width=512, height=512)
    ui.generate(p, *[None] * len(FIELDS))
    assert len(ui.calls) == 20
    assert not p.comments


def test_no_room_needs_a_host_or_gradio_to_be_imported() -> None:
    code = (
        "import sys; sys.modules['gradio'] = sys.modules['modules'] = None\n"
        "from mrflow_sched.apps.webui import api, axes, controls, encode, host, infotext, recipe, run\n"
        "from mrflow_sched.apps.webui import settings, ui, upscaler\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_our_log_reaches_the_console_where_the_root_logger_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("mrflow")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers = []
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        attach_console()
        attach_console()  # scripts are loaded again
        logger.info("512x512")
        logger.warning("no")
        assert capsys.readouterr().err == "MrFlow: 512x512\nMrFlow: no\n"
    finally:
        root.setLevel(level)
        logger.handlers, logger.level, logger.propagate = before
