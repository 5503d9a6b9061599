"""The files around the code: they parse, and what they say of the package is what pyproject.toml says."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mrflow_sched

yaml = pytest.importorskip("yaml")
if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TOPS = [ROOT, ROOT / ".github", ROOT / ".github" / "workflows", ROOT / ".github" / "ISSUE_TEMPLATE"]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def jobs() -> dict[str, Any]:
    return {f"{path.stem}: {name}": job for path in WORKFLOWS for name, job in read(path)["jobs"].items()}


def test_every_file_of_settings_parses() -> None:
    parsed = (".yml", ".yaml", ".cff", ".toml", ".ini")
    found = [path for top in TOPS for path in top.iterdir() if path.suffix in parsed or path.name == ".editorconfig"]
    kinds = {path.suffix or path.name for path in found}
    assert kinds == {*parsed, ".editorconfig"}
    for path in found:
        text = path.read_text("utf-8")
        if path.suffix in (".yml", ".yaml", ".cff"):
            assert isinstance(yaml.safe_load(text), dict), path
        elif path.suffix == ".toml":
            assert tomllib.loads(text), path
        elif path.suffix == ".ini":
            configparser.ConfigParser().read_string(text)
        else:
            configparser.ConfigParser().read_string(text.replace("root = true", "", 1))
    for path in (ROOT / "mrflow_sched" / "apps" / "webui" / "languages").glob("*.json"):
        assert json.loads(path.read_text("utf-8")), path


def test_the_tests_do_not_go_through_comfyuis_door(tmp_path: Path) -> None:
    """A package at the root would be imported, under the folder's name and with the folder above on the path."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    (tmp_path / "__init__.py").write_text("raise RuntimeError('the door')\n")
    (tmp_path / "tests" / "test_one.py").write_text("def test_one() -> None:\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_workflows_run_the_versions_that_the_package_claims() -> None:
    claimed = [line.rsplit(" ", 1)[1] for line in project()["classifiers"] if re.search(r":: 3\.\d+$", line)]
    matrix = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == claimed
    assert project()["requires-python"] == f">={claimed[0]}"
    assert [extra["os"] for extra in matrix["include"]] == ["windows-latest"]
    assert {extra["python"] for extra in matrix["include"]} <= set(claimed)
    used = [
        step["with"]["python-version"]
        for job in jobs().values()
        for step in job.get("steps", [])
        if step.get("uses", "").startswith("actions/setup-python@")
    ]
    assert set(used) <= {*claimed, "${{ matrix.python }}"}


def test_workflows_call_what_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    ran = [step.get("run", "") for job in jobs().values() for step in job.get("steps", [])]
    asked = {word for line in ran if line.startswith("make ") for word in line.split()[1:]}
    assert {"lint", "types", "oldest", "docs"} <= asked <= targets
    called = {job["uses"] for job in jobs().values() if "uses" in job}
    assert called
    assert all((ROOT / path).is_file() for path in called)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_few_rights_and_an_end(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"]["contents"] == "read"
    for name, job in workflow["jobs"].items():
        assert "uses" in job or job["timeout-minutes"] <= 60, name


def test_only_the_jobs_that_publish_may_say_who_they_are() -> None:
    holders = [name for name, job in jobs().items() if job.get("permissions", {}).get("id-token") == "write"]
    assert holders == ["docs: site", "release: publish"]
    assert not re.search(r"secrets\.", "".join(path.read_text("utf-8") for path in WORKFLOWS))


def test_the_wheel_is_tried_in_an_environment_without_the_repository() -> None:
    steps = read(ROOT / ".github" / "workflows" / "package.yml")["jobs"]["smoke"]["steps"]
    assert not any(step.get("uses", "").startswith("actions/checkout") for step in steps)
    ran = "\n".join(step.get("run", "") for step in steps)
    assert "dist/*.whl" in ran
    assert "mrflow plan --family demo" in ran
    assert "--size 64x64" in ran


def test_hooks_run_the_pinned_ruff() -> None:
    [pinned] = re.findall(r"^ruff==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    revisions = {
        hook["repo"].rsplit("/", 1)[1]: hook["rev"] for hook in read(ROOT / ".pre-commit-config.yaml")["repos"]
    }
    assert revisions["ruff-pre-commit"] == f"v{pinned}"


def test_the_citation_names_this_version_and_the_paper() -> None:
    cited = read(ROOT / "CITATION.cff")
    assert (cited["title"], cited["version"]) == (project()["name"], mrflow_sched.__version__)
    assert cited["license"] == project()["license"]
    assert [author["name"] for author in cited["authors"]] == [author["name"] for author in project()["authors"]]
    [paper] = cited["references"]
    assert paper["url"].endswith("2607.01642")


def test_bug_reports_ask_for_what_the_doctor_prints() -> None:
    forms = {path.stem: read(path) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")}
    assert {"bug", "webui", "feature", "config"} == set(forms)
    assert "mrflow doctor" in str(forms["bug"]["body"])
    for name, form in forms.items():
        fields = form.get("body", [])
        assert len({field["id"] for field in fields}) == len(fields), name


def test_the_changelog_says_what_is_so() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## (\d[\d.]*)", text, re.MULTILINE)[0] == mrflow_sched.__version__
    assert f"A table of {len(mrflow_sched.FAMILIES)} model families" in text
    pins = (ROOT / "constraints.txt").read_text() + (ROOT / "requirements-oldest.txt").read_text()
    newest, oldest = re.findall(r"^diffusers==([\d.]+)", pins, re.MULTILINE)
    assert f"with diffusers {oldest} and {newest}." in text
    tested = [line.rsplit(" ", 1)[1] for line in project()["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert f"Python {tested[0]} to {tested[-1]}" in text
    named = set(re.findall(r"`([\w-]+)`", text[text.index("Extras:") :].split("\n-", 1)[0]))
    assert named - {"large"} == set(project()["optional-dependencies"]) - {"large"}


def test_the_registry_of_comfyui_finds_what_it_reads() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["comfy"]
    assert (settings["PublisherId"], settings["DisplayName"]) == (project()["name"], "MrFlow")
    assert all((ROOT / name).is_dir() for name in settings["includes"])
    assert {"comfy_web", "example_workflows", "locales", "mrflow_sched"} <= set(settings["includes"])
    assert settings["requires-comfyui"].startswith(">=0.")
    icon = ROOT / settings["Icon"].split("/main/", 1)[1]
    assert Image.open(icon).size == (400, 400)
    assert icon.stat().st_size < 30_000
    assert project()["urls"]["Repository"].startswith("https://github.com/")
    # It reads systems and accelerators from here, and drops all of a kind where it does not know one.
    assert [each for each in project()["classifiers"] if each.startswith("Environment ::")] == []
    assert "Operating System :: OS Independent" in project()["classifiers"]


def test_pictures_of_comfyuis_page_are_small() -> None:
    shown = sorted((ROOT / "docs" / "images").glob("comfyui-*.png"))
    assert len(shown) >= 5
    assert all(path.stat().st_size < 200_000 for path in shown)
