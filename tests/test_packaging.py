"""What a user installs: the wheel's contents, its metadata, the pinned versions, and texts fit to be published."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mrflow_sched

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
DATA = (".json", ".safetensors", ".txt", ".md")


def dependencies() -> list[str]:
    lines = (ROOT / "dependencies.txt").read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


STRAYS = (
    "__init__.py",
    "comfy_web/mrflow.js",
    "example_workflows/mrflow.json",
    "locales/ja/main.json",
    "bench/__init__.py",
    "docs/images/large.jpg",
    "mrflow_sched/demo/weights/optimizer.ckpt",
    "out/picture.png",
    "tests/test_plan.py",
    "tools/__init__.py",
    "tools/train.py",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both distributions: the source from a copy with things lying about that must not get in, the wheel from that."""
    work = tmp_path_factory.mktemp("built")
    texts = ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")
    for name in ("pyproject.toml", "dependencies.txt", "setup.py", "MANIFEST.in", *texts):
        shutil.copy(ROOT / name, work / name)
    shutil.copytree(ROOT / "mrflow_sched", work / "mrflow_sched", ignore=shutil.ignore_patterns("__pycache__"))
    for stray in STRAYS:
        (work / stray).parent.mkdir(parents=True, exist_ok=True)
        (work / stray).write_text("stray")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return work / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    [path] = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_source_distribution_holds_what_the_wheel_is_built_from(built: Path, wheel: zipfile.ZipFile) -> None:
    """And no tests without the benches and tools that they test."""
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    code = {name for name in wheel.namelist() if ".dist-info/" not in name}
    beside = {name for name in held - code if "egg-info/" not in name}
    assert code <= held
    texts = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "PKG-INFO"}
    assert beside == texts | {"MANIFEST.in", "dependencies.txt", "pyproject.toml", "setup.cfg", "setup.py"}


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    here = [path for path in (ROOT / "mrflow_sched").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    code = {path.relative_to(ROOT).as_posix() for path in here if path.suffix == ".py" or path.name == "py.typed"}
    data = {path for path in here if {"weights", "languages"} & set(path.parts) and path.suffix in DATA}
    data |= {ROOT / "mrflow_sched" / "demo" / name for name in ("judge.safetensors", "fine_judge.safetensors")}
    data.add(ROOT / "mrflow_sched" / "apps" / "ui" / "page.css")
    assert names == code | {path.relative_to(ROOT).as_posix() for path in data}
    assert {"mrflow_sched/sampler.py", "mrflow_sched/apps/cli/main.py", "mrflow_sched/py.typed"} <= names


def test_the_weights_are_small_enough_to_ship() -> None:
    size = sum(path.stat().st_size for path in (ROOT / "mrflow_sched").rglob("*.safetensors"))
    assert size <= 28_500_000  # 25 of the embedded model, and its judges


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    found = email.message_from_bytes(wheel.read(name))
    assert (found["Name"], found["Version"]) == ("mrflow-sched", mrflow_sched.__version__)
    assert found["Requires-Python"] == ">=3.10"
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Author"] == "MrFlow developers"
    assert {url.split(",")[0] for url in found.get_all("Project-URL", [])} >= {"Homepage", "Documentation", "Changelog"}
    base = [str(each) for each in found.get_all("Requires-Dist", []) if "extra ==" not in str(each)]
    assert base == dependencies()
    names = {line.split(">=")[0] for line in base}
    assert {"torch", "diffusers", "transformers", "spandrel", "safetensors", "numpy", "pillow", "tqdm"} <= names
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert "mrflow = mrflow_sched.__main__:main" in wheel.read(name).decode()


def test_the_description_leads_somewhere_outside_the_repository(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    text = str(email.message_from_bytes(wheel.read(name)).get_payload())
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 5
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    written = re.findall(r"!\[[^]]*\]\((?!https?:)([^)]+)\)", (ROOT / "README.md").read_text("utf-8"))
    assert all(f"/raw/main/{path})" in text for path in written)


def test_extras_are_named_after_what_they_are_for(wheel: zipfile.ZipFile) -> None:
    """ "large", the older name of "offload", goes on working."""
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    found = email.message_from_bytes(wheel.read(name))
    assert set(found.get_all("Provides-Extra", [])) >= {"offload", "large", "docs", "dev"}
    extras = [str(each) for each in found.get_all("Requires-Dist", []) if "extra ==" in str(each)]
    assert 'mrflow-sched[offload]; extra == "large"' in extras
    assert any(re.fullmatch(r'accelerate>=[\d.]+; extra == "offload"', each) for each in extras)


def test_comfyui_finds_nothing_to_install() -> None:
    """Its manager installs a pack's requirements.txt, its registry the dependencies that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert "dependencies" not in project
    assert "dependencies" in project["dynamic"]
    assert not any((ROOT / name).exists() for name in ("requirements.txt", "manager_requirements.txt"))


def test_constraints_pin_everything_the_package_asks_for() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {re.split("==", line)[0].lower().replace("_", "-"): line for line in lines}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; python_version >= \"3\.\d+\")?", line) for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*dependencies(), *extras["offload"], *extras["docs"], *extras["dev"]]
    asked = {re.split(r"[\[<>=]", line)[0].lower() for line in lines}
    assert len(asked) > 15
    assert asked <= set(pins)
    assert pins["torch"] == "torch==2.13.0"
    assert pins["torchvision"] == "torchvision==0.28.0"


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "dependencies.txt", "constraints.txt", "Makefile", ".ci/run", "README.md"]
)
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


def test_importing_and_planning_load_no_tensor_library() -> None:
    """That is what makes them quick."""
    code = (
        "import sys, mrflow_sched; plan = mrflow_sched.make_plan('flux1-dev', 1024, 1024); plan.to_json();"
        "print(sorted({'torch', 'numpy', 'diffusers', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
