"""Markdown tables for the pages of docs/ and the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[object], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """A markdown table.

    Args:
        head: The titles of the columns.
        rows: The cells of every row, as many as there are titles.
        align: A letter for each column, "l" or "r"; columns beyond the last letter repeat it. Without letters the first
            column is aligned left and all others right.

    Returns:
        The lines, without a line break at the end.

    Raises:
        ValueError: A row has more or fewer cells than there are titles.
    """
    letters = align or "lr"
    columns = [letters[min(index, len(letters) - 1)] for index in range(len(head))]
    lines = [_line(head), _line({"l": "---", "r": "---:"}[letter] for letter in columns)]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row of {len(head)} cells is needed, not {list(row)!r}")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
