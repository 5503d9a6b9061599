"""The weekly look at the newest libraries: its workflow, the issue that it writes, and what it calls a difference."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
page = pytest.importorskip("bench.pipelines.page")

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW: Any = yaml.safe_load((ROOT / ".github" / "workflows" / "watch.yml").read_text("utf-8"))
JOB = WORKFLOW["jobs"]["newest"]
GH = """#!/bin/sh
echo "$@" >> "$CALLS"
if [ "$2" = list ]; then echo "$OPEN"; fi
if [ "$2" = edit ] || [ "$2" = create ]; then cp report.md "$CALLS.report"; fi
"""


def test_it_runs_weekly_and_by_hand_and_may_write_issues_only() -> None:
    begins = WORKFLOW[True]  # YAML reads "on" as true
    assert begins["schedule"][0]["cron"].endswith(" * * 1")
    assert "workflow_dispatch" in begins
    assert JOB["permissions"] == {"contents": "read", "issues": "write"}
    coming = {each["diffusers"]: each["coming"] for each in JOB["strategy"]["matrix"]["include"]}
    assert coming == {"diffusers": False, "git+https://github.com/huggingface/diffusers": True}
    assert JOB["continue-on-error"] == "${{ matrix.coming }}"


def test_it_runs_what_exists() -> None:
    ran = "\n".join(step.get("run", "") for step in JOB["steps"])
    assert "python -m bench.pipelines --out pipelines.md --changes changes.md" in ran
    tests = next(word for word in (step.get("run", "") for step in JOB["steps"]) if "pytest" in word).split("2>&1")[0]
    assert all((ROOT / word).exists() for word in tests.split() if word.startswith("tests/"))
    # A pipe must not hide that the tests failed: only the named shell stops at any part of one.
    assert next(step for step in JOB["steps"] if step.get("id") == "tests")["shell"] == "bash"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("swept", "tested", "changes", "number", "called"),
    [
        ("success", "success", "", "", []),
        ("success", "success", "", "7", ["issue close 7"]),
        ("success", "success", "| `FluxPipeline` | runs | gone |", "", ["issue create"]),
        ("failure", "success", "| `FluxPipeline` | runs | gone |", "7", ["issue edit 7"]),
        ("success", "failure", "", "", ["issue create"]),
        ("failure", "failure", None, "", ["issue create"]),
    ],
)
def test_one_issue_says_what_differs(
    tmp_path: Path, swept: str, tested: str, changes: str | None, number: str, called: list[str]
) -> None:
    (step,) = [step for step in JOB["steps"] if step.get("name") == "One issue with what differs"]
    (tmp_path / "gh").write_text(GH)
    (tmp_path / "gh").chmod(0o755)
    (tmp_path / "versions.txt").write_text("diffusers 1.0\n")
    (tmp_path / "tests.txt").write_text("1 failed\n")
    if changes is not None:
        (tmp_path / "changes.md").write_text(changes)
    calls = tmp_path / "calls"
    given = {"TITLE": "Libraries", "RUN": "https://run", "SWEPT": swept, "TESTED": tested, "OPEN": number}
    environment = {**os.environ, **given, "CALLS": str(calls), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "-e", "-o", "pipefail", "-c", step["run"]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wrote = [line for line in calls.read_text().splitlines() if not line.startswith("issue list")]
    assert [" ".join(line.split()[: len(want.split())]) for line, want in zip(wrote, called, strict=True)] == called
    if called and "close" not in called[0]:
        report = (tmp_path / "calls.report").read_text()
        assert f"sweep {swept}, tests {tested}" in report
        assert "diffusers 1.0" in report
        assert (changes or "") in report
        assert ("1 failed" in report) is (tested == "failure")


def test_a_difference_is_a_row(tmp_path: Path) -> None:
    from bench.pipelines.classes import PipelineClass
    from bench.pipelines.judge import Row
    from bench.pipelines.sweep import Swept
    from bench.tiny.parts import diffusers

    def swept(name: str, outcome: str, sentence: str = "") -> Swept:
        kind = PipelineClass(getattr(diffusers(), name), "text-to-image", True)
        return Swept(kind, "", Row(name, outcome, sentence, sampler="own"))

    found = [
        swept("FluxPipeline", "works"),
        swept("StableDiffusionPipeline", "refused", "StableDiffusionPipeline."),
    ]
    said = tmp_path / "page.md"
    said.write_text(f"A page.\n<!-- {page.MARK} -->\n<!-- end -->\nIts end.\n")
    page.write(page.tables(found, "1.0"), said)
    version, states = page.read(said)
    assert version == "1.0"
    assert states["FluxPipeline"] == ""
    assert states["StableDiffusionPipeline"] == "StableDiffusionPipeline."
    assert said.read_text().endswith("Its end.\n")
    assert page.changes(found, said) == ""
    other = [swept("FluxPipeline", "differs", "stage 1 differs by 0.1"), found[1], swept("ZImagePipeline", "works")]
    lines = page.changes(other, said).splitlines()[2:]
    assert lines[0] == "| `FluxPipeline` | runs | stage 1 differs by 0.1 |"
    assert lines[1] == "| `ZImagePipeline` | not named | runs |"
    said.write_text(said.read_text().replace("`StableDiffusionPipeline`", "`GonePipeline`"))
    assert "| `GonePipeline` | GonePipeline. | gone |" in page.changes(found, said)


def test_what_the_page_says_already_is_no_failure_and_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.pipelines import __main__ as command
    from bench.pipelines.classes import PipelineClass
    from bench.pipelines.judge import Row
    from bench.pipelines.sweep import Swept
    from bench.tiny.parts import diffusers

    _, said = page.read()
    assert " differs by " in said["FluxControlInpaintPipeline"]
    assert said["KolorsPipeline"] == "not loaded without sentencepiece"
    assert "sentencepiece" not in "".join(step.get("run", "") for step in JOB["steps"])

    def swept(name: str, outcome: str, sentence: str) -> Swept:
        return Swept(PipelineClass(getattr(diffusers(), name), "inpainting", True), "", Row(name, outcome, sentence))

    known = [
        swept("FluxControlInpaintPipeline", "differs", "stage 1 differs by 0.31"),  # the page has another number
        swept("KolorsPipeline", "works", ""),
    ]
    new = [
        swept("FluxControlInpaintPipeline", "differs", "the times differ"),
        swept("FluxPipeline", "differs", "stage 1 differs by 0.27"),
        swept("FluxPipeline", "fails", "ValueError"),
    ]
    for found, failed in ((known, 0), *(([*known, each], 1) for each in new)):
        monkeypatch.setattr(command, "sweep", lambda _, found=found: iter(found))
        out = tmp_path / "changes.md"
        assert command.main(["--changes", str(out)]) == failed
        assert bool(out.read_text()) is bool(failed)
    assert "FluxControlInpaintPipeline" in capsys.readouterr().out
