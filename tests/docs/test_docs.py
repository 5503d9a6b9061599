"""The pages of docs/: what the code refers to is there, and the site shows every page."""

from __future__ import annotations

import math
import pkgutil
import re
from pathlib import Path

import diffusers
import pytest

from mrflow_sched import make_native_plan, make_plan, refine_sigmas
from mrflow_sched.plan.schedule import shift_sigma

ROOT = Path(__file__).resolve().parents[2]
METHOD = ROOT / "docs" / "method.md"
SECTION = re.compile(r"docs/method\.md,\s+(?:#\s+)?section\s+(\d(?:\.\d)?)")
OLD = re.compile(r"\bspec(?:ification)? \d|\bsection \d(?:\.\d)? of the specification", re.IGNORECASE)


def sources() -> list[Path]:
    """Every file that may refer to a section of the method's page."""
    folders = ("mrflow_sched", "bench", "tools", "tests", "docs", "scripts")
    found = [path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".md")]
    return [path for path in found if path != Path(__file__).resolve()]


def named(pattern: re.Pattern[str]) -> dict[str, list[str]]:
    """What `pattern` finds in each file, with the words of a wrapped sentence on one line."""
    texts = {path: path.read_text("utf-8") for path in sources()}
    found = {path.relative_to(ROOT).as_posix(): pattern.findall(text) for path, text in texts.items()}
    return {name: words for name, words in found.items() if words}


def test_every_section_that_is_referred_to_exists() -> None:
    headings = re.findall(r"^#+ (\d(?:\.\d)?)\.? ", METHOD.read_text("utf-8"), re.MULTILINE)
    assert len(headings) == len(set(headings)) > 15
    referred = named(SECTION)
    assert referred
    assert {name: set(words) - set(headings) for name, words in referred.items() if set(words) - set(headings)} == {}


def test_sections_are_named_by_their_page() -> None:
    """Not by a "spec" that no reader has."""
    assert named(OLD) == {}


def test_the_refine_schedules_of_the_page_are_those_of_the_package() -> None:
    rows = re.findall(r"^\| ([1-4]) \| (0\.12[\d., ]*) \| (0\.12[\d., ]*) \|$", METHOD.read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 4
    for steps, *lists in rows:
        for curve, text in zip(("linear", "shifted"), lists, strict=True):
            told = [float(value) for value in text.split(",")]
            assert told == pytest.approx(refine_sigmas(0.12, int(steps), curve), abs=1e-5)


def test_the_shifts_of_the_page_are_those_of_the_families() -> None:
    """At 1024 tokens, the low size of 1024x1024, and at 4096, the size itself."""
    text = METHOD.read_text("utf-8")
    for name, low, full in (("flux1-dev", 0.63, 1.15), ("qwen-image", 0.539, 0.694)):
        assert f"$\\mu$ {low} at 1024 tokens ({full} at 4096)" in text
        plans = make_plan(name, 1024, 1024, factor=2), make_native_plan(name, 1024, 1024)
        assert [plan.stages[0].mu for plan in plans] == pytest.approx([low, full], abs=5e-4)
    moved = {0.12: 0.578, 0.10: 0.528, 0.15: 0.640, 0.25: 0.770}
    assert [shift_sigma(sigma, math.exp(2.309)) for sigma in moved] == pytest.approx(list(moved.values()), abs=5e-4)


def test_the_site_shows_every_page() -> None:
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    shown = set(re.findall(r"[\w/-]+\.md", config))
    assert shown == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}


def test_the_gate_builds_the_site_strictly() -> None:
    assert re.search(r"^docs:.*\n\t.*mkdocs build --strict", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "make docs" in (ROOT / ".ci" / "run").read_text()


def test_names_of_the_package_on_the_pages_exist() -> None:
    text = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    imported = re.findall(r"^from (mrflow_sched[\w.]*) import (.+)$", text, re.MULTILINE)
    names = [f"{module}.{name.strip()}" for module, found in imported for name in found.split(",")]
    names += re.findall(r"`(mrflow_sched(?:\.\w+)+)`", text)
    assert len(names) > 10
    for name in names:
        if ".diffusers.modular" not in name or hasattr(diffusers, "ModularPipeline"):
            pkgutil.resolve_name(name)


WORDS = {"enlarg": "upscale", "picture": "image", "foretel": "predict", "foretold": "predict", "truer": "more accurate"}
PLAIN = ("cli", "demo-model", "diffusers", "index", "method", "official", "quality", "solvers", "speed")


@pytest.mark.parametrize("page", PLAIN)
def test_a_page_has_one_word_for_one_thing(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).lower()
    assert {old: new for old, new in WORDS.items() if old in prose} == {}
