"""The findings as tables of docs/pipelines.md, and what that page says of a class."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.markdown import table
from bench.pipelines.classes import TRIED, pipeline_classes, unavailable
from bench.pipelines.judge import Row
from bench.pipelines.sweep import NOT_BUILT, Swept, share
from bench.tiny.parts import diffusers

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
MARK = "pipelines"
_NOT_LOADED = "not loaded without"

_HEADS = {
    ("text-to-image", True): "Text to image, by flow",
    ("text-to-image", False): "Text to image, by other models",
    ("editing", True): "Editing by references",
    ("editing", False): "Editing by references",
    ("inpainting", True): "Inpainting",
    ("inpainting", False): "Inpainting",
    ("image-to-image", True): "Image to image",
    ("image-to-image", False): "Image to image",
    ("video", True): "Video models, as one frame",
    ("video", False): "Video models, as one frame",
}


def tables(found: Sequence[Swept], version: str) -> str:
    """The page's tables.

    Args:
        found: All findings.
        version: Of the installed diffusers.

    Returns:
        Markdown: the share, what runs, what is refused and what was not built.
    """
    names, running = share(found)
    parts = [
        f"diffusers {version}: of {len(names)} text-to-image flow classes {len(running)} run "
        f"({100 * len(running) / max(len(names), 1):.0f} %)."
    ]
    for head in dict.fromkeys(_HEADS.values()):
        of_kind = [each for each in found if _HEADS[each.kind.makes, each.kind.flow] == head and each.row.ran]
        if of_kind:
            parts += [f"## {head}", _running(of_kind)]
    other = [each for each in found if not each.row.ran]
    for outcome, head, first in (
        ("refused", "Refused", "sentence, X being the class"),
        ("differs", "Runs, and does not draw what the pipeline draws", "what differs"),
        ("fails", "Fails", "error"),
        (NOT_BUILT, "Not built here", "why"),
    ):
        of_outcome = [each for each in other if each.row.outcome == outcome]
        if of_outcome:
            parts += [f"## {head}", _grouped(of_outcome, first)]
    tried = {each.kind.name for each in found}
    lists: dict[str, list[str]] = {}
    for kind in pipeline_classes():
        if kind.makes not in TRIED and kind.name not in tried:
            lists.setdefault(kind.makes, []).append(kind.name)
    for name, packages in unavailable().items():
        lists.setdefault(f"{_NOT_LOADED} {', '.join(packages)}", []).append(name)
    parts += ["## Not tried: they make no images from text, or need a package that is not installed here"]
    return "\n\n".join([*parts, *(f"* {what}: {_quoted(names)}" for what, names in lists.items())])


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _running(found: Sequence[Swept]) -> str:
    head = ("class", "family", "", "compared with", "stage 1", "times", "refine time")
    return table(head, [_cells(each.row) for each in found], "llllrrr")


def _cells(row: Row) -> list[str]:
    compared = {"own": "its own sampler", "Euler": "Euler on the plan's levels"}[row.sampler]
    return [f"`{row.kind}`", row.family, row.outcome, compared, *map(_number, (row.picture, row.times, row.refine))]


def _number(value: float) -> str:
    return "" if math.isnan(value) else "0" if value == 0 else f"{value:.0e}"


def _grouped(found: Sequence[Swept], first: str) -> str:
    by_sentence: dict[str, list[str]] = {}
    for each in found:
        names = by_sentence.setdefault(re.sub(rf"\b{each.kind.name}\b", "X", each.row.sentence), [])
        names += [] if each.kind.name in names else [each.kind.name]
    rows = [(sentence, _quoted(names)) for sentence, names in by_sentence.items()]
    return table((first, "classes"), rows, "ll")


def changes(found: Sequence[Swept], page: Path = PAGE) -> str:
    """How findings differ from what the page says.

    Args:
        found: All findings.
        page: The page.

    Returns:
        A Markdown table, a row for each class that does something else than the page says, is not named there, or is
        gone; empty where there is none.
    """
    version, said = read(page)
    now: dict[str, str] = {}
    for each in found:
        name, state = each.kind.name, "" if each.row.ran else each.row.sentence
        # Of a class's several findings, the one that the page does not say.
        if not now.get(name) or (state and _alike(said.get(name), now[name])):
            now[name] = state
    gone = {name: "gone" for name in said if not hasattr(diffusers(), name)}
    there = {kind.name for kind in pipeline_classes() if kind.makes in TRIED} | set(now)
    rows = [
        (f"`{name}`", _words(said.get(name, "not named")), _words(state))
        for name, state in {**now, **gone}.items()
        if not _alike(said.get(name), state) and (name in there or state == "gone")
    ]
    head = ("class", f"docs/pipelines.md, diffusers {version}", f"diffusers {diffusers().__version__}")
    return table(head, rows, "l") if rows else ""


def failures(found: Sequence[Swept], page: Path = PAGE) -> list[str]:
    """Which classes neither run nor are refused, and the page does not say so.

    Args:
        found: All findings, or some.
        page: The page.

    Returns:
        Names of classes.
    """
    _, said = read(page)
    failed = [each for each in found if not each.row.ran and each.row.outcome not in ("refused", NOT_BUILT)]
    return [each.kind.name for each in failed if not _alike(said.get(each.kind.name), each.row.sentence)]


def _alike(said: str | None, state: str) -> bool:
    """Whether the page says a state; of a class that was not loaded for want of a package it says nothing."""
    if said is None:
        return False
    unknown = said.startswith(_NOT_LOADED) and state != "gone"
    return unknown or _without_number(said) == _without_number(state)


def _without_number(state: str) -> str:
    """What is said but by how much, which is another number on another machine."""
    return re.sub(r"(?<= differs by )\S+", "", state)


def _words(state: str) -> str:
    return state or "runs"


def write(text: str, page: Path = PAGE) -> None:
    """Put the tables between the marks of the page.

    Args:
        text: What `tables` returned.
        page: The page.
    """
    head, rest = page.read_text("utf-8").split(f"<!-- {MARK} -->\n", 1)
    _, tail = rest.split("<!-- end -->", 1)
    page.write_text(f"{head}<!-- {MARK} -->\n{text}\n<!-- end -->{tail}", "utf-8")


def read(page: Path = PAGE) -> tuple[str, Mapping[str, str]]:
    """What the page says.

    Args:
        page: The page.

    Returns:
        The version of diffusers, and for each class "" where it runs, else the sentence with which it is refused, or
        why it was not built or tried.
    """
    text = page.read_text("utf-8").split(f"<!-- {MARK} -->\n", 1)[1].split("<!-- end -->", 1)[0]
    version = re.search(r"^diffusers (\S+):", text)
    said: dict[str, str] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            said.setdefault(cells[0].strip("`"), "")
        elif line.startswith("* "):
            state = line[2:].split(":")[0] if line.startswith(f"* {_NOT_LOADED}") else "not tried"
            said |= dict.fromkeys(re.findall(r"`(\w+)`", line), state)
        elif line.startswith("| ") and "`" in cells[-1]:
            said |= {name: re.sub(r"\bX\b", name, cells[0]) for name in re.findall(r"`(\w+)`", cells[-1])}
    return version.group(1) if version else "", said
