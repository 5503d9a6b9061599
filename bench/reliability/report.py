"""The table of what was wrong: a row a group, a column a measured version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.markdown import table
from bench.reliability.runner import KINDS, Tally

MARK = "reliability"

Column = dict[str, dict[str, Any]]
"""Title of a group -> its tally, and how it was measured."""


def entry(tally: Tally, seed: int, versions: Mapping[str, str], *, quick: bool) -> dict[str, Any]:
    """What is kept of one group's run: all but the examples, which name files that are gone."""
    counts = {"tried": tally.tried, "wrong": tally.wrong, "checked": tally.checked}
    return {**counts, "seed": seed, "quick": quick, "versions": dict(versions)}


def add(path: Path, label: str, column: Column) -> dict[str, Column]:
    """Put groups into the file's column of that label, over the same groups of an earlier run; all columns."""
    columns: dict[str, Column] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    columns[label] = {**columns.get(label, {}), **column}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(columns, indent=1) + "\n", "utf-8")
    return columns


def table_of(columns: Mapping[str, Column]) -> str:
    """The table in Markdown, and how each column was measured."""
    rows: list[list[str]] = []
    for title in dict.fromkeys(title for column in columns.values() for title in column):
        found = [column.get(title) for column in columns.values()]
        checked = all(each["checked"] for each in found if each)
        rows.append([title, *(_cell(each) for each in found), "yes" if checked else "**no**"])
    head = ["group", *(f"{label}: tried, wrong" for label in columns), "bad subjects found"]
    return f"{table(head, rows, 'l')}\n\n{_measured(columns)}"


def _measured(columns: Mapping[str, Column]) -> str:
    entries = [each for column in columns.values() for each in column.values()]
    seeds = sorted({str(each["seed"]) for each in entries})
    versions = sorted({f"{name} {each['versions'][name]}" for each in entries for name in each["versions"]})
    short = " Some groups are short runs (`--quick`)." if any(each["quick"] for each in entries) else ""
    return f"Seed {', '.join(seeds)}; {', '.join(versions)}.{short}"


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    wrong = ", ".join(f"{kind} {found['wrong'][kind]}" for kind in KINDS if kind in found["wrong"])
    return f"{found['tried']:,}, {wrong or 'none'}"


def write_page(page: Path, text: str) -> None:
    """Put the table between the marks of a page."""
    head, rest = page.read_text("utf-8").split(f"<!-- {MARK} -->\n", 1)
    _, tail = rest.split("<!-- end -->", 1)
    page.write_text(f"{head}<!-- {MARK} -->\n{text}\n<!-- end -->{tail}", "utf-8")
