"""The repository as a pack of nodes: what its `__init__.py` does in ComfyUI's process, and does not do elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# ComfyUI as far as the door needs it: any class of any of its modules.
STAND_IN = """
import asyncio, importlib.util, sys
from types import ModuleType
class Kind(type):
    def __getattr__(cls, name):
        if name.startswith("__"): raise AttributeError(name)
        return Anything
class Anything(metaclass=Kind):
    def __new__(cls, *values, **named): return Anything if cls is Anything else object.__new__(cls)
    def __init__(self, *values, **named): pass
def member(name):
    if name.startswith("__"): raise AttributeError(name)
    return type("ComfyExtension", (), {}) if name == "ComfyExtension" else Anything
for name in ("comfy_api", "comfy_api.latest", "comfy", "comfy.latent_formats", "comfy.supported_models"):
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__getattr__ = member
def door(folder):
    spec = importlib.util.spec_from_file_location("custom_nodes_x", folder + "/__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
def nodes(module):
    extension = asyncio.run(module.comfy_entrypoint())
    return [each.__name__ for each in asyncio.run(extension.get_node_list())]
"""


def run(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-c", f"{STAND_IN}\n{script}"]
    found = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found


@pytest.mark.parametrize("name", ["mrflow-sched", "foo"])
def test_the_pack_loads_from_a_folder_of_any_name_and_leaves_the_path_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(ROOT, target_is_directory=True)
    script = f"""
before = list(sys.path)
module = door({str(tmp_path / name)!r})
print(module.WEB_DIRECTORY, *nodes(module))
import mrflow_sched
print(mrflow_sched.__file__)
assert before == list(sys.path)
assert not hasattr(module, "NODE_CLASS_MAPPINGS")
assert "diffusers" not in sys.modules
"""
    lines = run(script, tmp_path).stdout.splitlines()
    web, *nodes = lines[0].split()
    assert (ROOT / web).is_dir()
    assert "MrFlowSampler" in nodes
    assert "MrFlowDemoModel" in nodes
    assert Path(lines[1]).resolve() == ROOT / "mrflow_sched" / "__init__.py"


def test_another_copy_that_is_loaded_gives_way_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "mrflow_sched").mkdir()
    (tmp_path / "mrflow_sched" / "__init__.py").write_text('__version__ = "0.0.1"\n')
    script = f"""
import logging
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
spec = importlib.util.spec_from_file_location("mrflow_sched", {str(tmp_path / "mrflow_sched" / "__init__.py")!r})
old = importlib.util.module_from_spec(spec)
sys.modules["mrflow_sched"] = old
spec.loader.exec_module(old)
module = door({str(ROOT)!r})
nodes(module)
import mrflow_sched
print(mrflow_sched.__version__ != "0.0.1")
nodes(module)  # a second time says nothing more
"""
    lines = run(script, tmp_path).stdout.splitlines()
    assert lines[0].startswith("MrFlow: another copy of mrflow_sched (0.0.1) was loaded from")
    assert lines[1:] == ["True"]


def test_the_door_does_nothing_elsewhere() -> None:
    script = f"door({str(ROOT)!r}); assert 'mrflow_sched' not in sys.modules and 'torch' not in sys.modules"
    run(script, ROOT)
