"""What may use what: the import contracts of pyproject.toml hold, and an import that breaks one is found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mrflow_sched", "bench", "tools")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources alone, to be spoiled."""
    pytest.importorskip("importlinter")
    folder = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for source in (path for name in PACKAGES for path in (ROOT / name).rglob("*.py")):
        target = folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return folder


def broken(folder: Path) -> list[str]:
    """Names of the contracts that do not hold in `folder`."""
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports_command as run; sys.exit(run())",
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    found = subprocess.run(
        [*command, "--no-cache"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert "Contracts: " in found.stdout, found.stdout + found.stderr
    return re.findall(r"^(.+) BROKEN(?: \(.*\))?$", found.stdout, re.MULTILINE)


def test_the_contracts_hold(copy: Path) -> None:
    assert broken(copy) == []


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("mrflow_sched/plan/sizes.py", "import torch", "A plan is numbers"),
        ("mrflow_sched/plan/sizes.py", "import mrflow_sched.sampling.noise", "Arrows only fall"),
        ("mrflow_sched/methods/__init__.py", "import mrflow_sched.engines.analytic", "The loop and the methods"),
        ("mrflow_sched/sampler.py", "import diffusers", "The loop and the methods"),
        ("mrflow_sched/engines/analytic.py", "import mrflow_sched.demo", "Arrows only fall"),
        ("mrflow_sched/apps/webui/__init__.py", "import mrflow_sched.engines", "In the WebUI"),
        ("mrflow_sched/apps/pipeline.py", "import mrflow_sched.apps.webui.run", "The command line uses"),
        ("mrflow_sched/apps/ui/words.py", "import mrflow_sched.apps.pipeline", "The command line uses"),
        ("mrflow_sched/apps/cli/ui.py", "import gradio", "Only apps.ui uses gradio"),
        ("mrflow_sched/apps/serve/jobs.py", "import mrflow_sched.apps.ui.jobs", "The command line uses"),
        ("mrflow_sched/apps/serve/jobs.py", "import uvicorn", "Only apps.ui uses gradio"),
        ("mrflow_sched/measure/runs.py", "import mrflow_sched.apps.cli.main", "Nothing uses the command line"),
        ("mrflow_sched/images/files.py", "import modules.shared", "Only apps.webui and"),
        ("mrflow_sched/apps/webui/run.py", "import comfy.samplers", "Only apps.webui and"),
        ("mrflow_sched/apps/comfy/parts.py", "import mrflow_sched.engines.analytic", "In ComfyUI"),
        ("mrflow_sched/apps/comfy/parts.py", "import mrflow_sched.apps.webui.run", "The command line uses"),
        ("mrflow_sched/demo/scenes.py", "import bench.solvers", "The package needs"),
        ("mrflow_sched/upscaling/role.py", "import mrflow_sched.upscaling.load", "No two rooms"),
    ],
)
def test_an_import_that_breaks_a_contract_is_found(copy: Path, file: str, line: str, contract: str) -> None:
    path = copy / file
    text = path.read_text()
    path.write_text(f"{text}\n{line}\n")
    try:
        assert any(name.startswith(contract) for name in broken(copy))
    finally:
        path.write_text(text)


@pytest.mark.parametrize(
    ("room", "names"),
    [("webui", r"modules"), ("comfy", r"(comfy|comfy_api|comfy_execution|comfy_extras|folder_paths|nodes)")],
)
def test_only_its_room_names_a_hosts_modules(room: str, names: str) -> None:
    """Names looked up at run time, which no import graph shows."""
    named = re.compile(rf"[\"']{names}[.\"']")
    files = [path for path in (ROOT / "mrflow_sched").rglob("*.py") if named.search(path.read_text(encoding="utf-8"))]
    assert files
    assert {path.parent.relative_to(ROOT).as_posix() for path in files} == {f"mrflow_sched/apps/{room}"}


def test_make_lint_looks_at_format_rules_and_contracts() -> None:
    [recipe] = re.findall(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in ("ruff format --check .", "ruff check .", "lint-imports"):
        assert command in recipe


def test_a_public_function_without_sections_is_found(tmp_path: Path) -> None:
    pytest.importorskip("pydoclint")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    said = (
        '"""The half."""',
        '"""The half.\n\n    Args:\n        whole: A number.\n\n    Returns:\n        Half of it.\n    """',
    )
    codes: list[set[str]] = []
    for text in said:
        (tmp_path / "half.py").write_text(f"def half(whole: float) -> float:\n    {text}\n    return whole / 2\n")
        command = [sys.executable, "-m", "pydoclint.main", "--quiet", "half.py"]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        codes.append(set(re.findall(r"DOC\d+", found.stdout + found.stderr)))
    assert codes == [{"DOC101", "DOC103", "DOC201"}, set()]


def texts() -> dict[str, str]:
    """Every text that people or programs read for commands, by its path; this file's own strings aside."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    paths = [ROOT / name for name in listed if name.endswith((".py", ".md", ".yml", "Makefile", "run"))]
    if not paths:
        pytest.skip("not a git checkout")
    own = Path(__file__).resolve()
    return {
        path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths if path != own and path.exists()
    }


def test_nothing_edits_the_path() -> None:
    edits = re.compile(r"sys\.path(\.(insert|append|extend)|\[[^]]*\] *=| *\+?=)")
    assert [name for name, text in texts().items() if edits.search(text)] == []


def test_benches_and_tools_are_called_as_modules_that_exist() -> None:
    named: set[str] = set()
    for name, text in texts().items():
        assert not re.search(r"python (bench|tools)/", text), name
        named |= set(re.findall(r"python -m ((?:bench|tools)[\w.]*)", text))
    assert {"bench.quality", "bench.reference", "bench.solvers", "bench.speed", "bench.webui"} <= named
    assert {"tools.figures", "tools.train"} <= named
    for module in named:
        path = ROOT / module.rstrip(".").replace(".", "/")
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert 'if __name__ == "__main__":' in file.read_text("utf-8"), module
