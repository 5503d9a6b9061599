"""What a user installs: the wheel's contents, its metadata, the pinned versions, and texts fit to be published."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mrflow_sched

ROOT = Path(__file__).resolve().parent.parent
DATA = (".json", ".safetensors", ".txt", ".md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, with things lying about that must not get in."""
    work = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work / name)
    shutil.copytree(ROOT / "mrflow_sched", work / "mrflow_sched", ignore=shutil.ignore_patterns("__pycache__"))
    for stray in ("tests/__init__.py", "tools/train.py", "mrflow_sched/demo/weights/optimizer.ckpt", "out/picture.png"):
        (work / stray).parent.mkdir(parents=True, exist_ok=True)
        (work / stray).write_text("stray")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", "dist", "."]
    built = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    [path] = (work / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_package_and_weights_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    here = [path for path in (ROOT / "mrflow_sched").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    code = {path.relative_to(ROOT).as_posix() for path in here if path.suffix == ".py" or path.name == "py.typed"}
    weights = {path.relative_to(ROOT).as_posix() for path in here if "weights" in path.parts and path.suffix in DATA}
    assert names == code | weights
    assert {"mrflow_sched/sampler.py", "mrflow_sched/apps/cli/main.py", "mrflow_sched/py.typed"} <= names


def test_the_weights_are_small_enough_to_ship() -> None:
    size = sum(path.stat().st_size for path in (ROOT / "mrflow_sched").rglob("*.safetensors"))
    assert size <= 25_000_000


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    found = email.message_from_bytes(wheel.read(name))
    assert (found["Name"], found["Version"]) == ("mrflow-sched", mrflow_sched.__version__)
    assert found["Requires-Python"] == ">=3.10"
    assert found["License-Expression"] == "Apache-2.0"
    base = {str(each).split(">")[0] for each in found.get_all("Requires-Dist", []) if "extra ==" not in str(each)}
    assert {"torch", "diffusers", "transformers", "spandrel", "safetensors", "numpy", "pillow", "tqdm"} <= base
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert "mrflow = mrflow_sched.apps.cli.main:main" in wheel.read(name).decode()


def test_constraints_pin_everything_the_package_asks_for() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {re.split("==", line)[0].lower().replace("_", "-"): line for line in lines}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; python_version >= \"3\.\d+\")?", line) for line in lines)
    asked = re.findall(r'^ {4}"([a-z-]+)[>"]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(asked) > 10
    assert set(asked) <= set(pins)
    assert pins["torch"] == "torch==2.13.0"
    assert pins["torchvision"] == "torchvision==0.28.0"


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "Makefile", ".ci/run", "README.md"])
def test_no_registry_and_no_machine_is_named(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"https?://[^\s)]*(pypi|index|simple|mirror)|/home/|/root/|/opt/|/work/", text)


def test_the_two_commands_exist_and_the_gate_runs_the_second() -> None:
    makefile = (ROOT / "Makefile").read_text()
    readme = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    for command in ("demo", "test"):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)
        assert f"make {command}" in readme
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_importing_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys, time; begin = time.perf_counter(); import mrflow_sched; mrflow_sched.make_plan('demo', 256, 256);"
        "print(time.perf_counter() - begin, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch_loaded = found.stdout.split()
    assert torch_loaded == "False"
    assert float(seconds) < 2
