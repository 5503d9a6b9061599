"""Every example workflow runs on the demo model, and what it saves can be opened again."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from PIL import Image

from .client import Client
from .process import INSTALLATION, REASON, REPOSITORY, Server
from .workflows import NOTES, read, to_api

if INSTALLATION is None:
    pytest.skip(REASON, allow_module_level=True)

EXAMPLES = REPOSITORY / "example_workflows"
WORKFLOWS = sorted(EXAMPLES.glob("*.json"))


def test_there_are_examples() -> None:
    assert len(WORKFLOWS) >= 6


@pytest.fixture
def pictures(server: Server) -> None:
    """What the examples load lies in ComfyUI's own folder for it."""
    for path in EXAMPLES.iterdir():
        if path.suffix in (".png", ".jpg", ".webp"):
            shutil.copyfile(path, server.base / "input" / path.name)
    ramp = Image.linear_gradient("L").convert("RGB")
    ramp.save(server.base / "input" / "example.png")


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_runs(client: Client, server: Server, info: Any, path: Any) -> None:
    workflow = read(path)
    lacking = {node["type"] for node in workflow["nodes"]} - {*info, *NOTES}
    if lacking:
        assert not any(kind.startswith("MrFlow") for kind in lacking)
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(lacking))}")
    extra = {"extra_pnginfo": {"workflow": workflow}}
    run = client.run(to_api(workflow, info), extra_data=extra).succeeded()
    shown = [entry for output in run.outputs.values() for entry in output.get("images", ())]
    assert shown
    saved = [entry for entry in shown if entry["type"] == "output"]
    for entry in saved:
        with Image.open(server.base / "output" / entry["subfolder"] / entry["filename"]) as picture:
            assert json.loads(picture.info["workflow"]) == workflow
            assert any(node["class_type"].startswith("MrFlow") for node in json.loads(picture.info["prompt"]).values())
            assert min(picture.size) >= 64
