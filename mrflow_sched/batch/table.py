"""Tables of prompts: a text file with a prompt on each line, JSON lines, CSV or Parquet, as rows of text."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from mrflow_sched._runtime.errors import MrFlowError, first_line, quoted, shown

__all__ = ["SUFFIXES", "Row", "Table", "read_table"]

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
"""Endings of the tables that can be read; standard input, and a file of any other ending, is refused or plain text."""

_MOST_BYTES = 2**30
_JOINED: Mapping[str, str] = {"size": "x", "lora": ";"}
"""How the values of a list become one text; those of other columns are joined by commas."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        line: Where it stands: the line of a text file, the row of a Parquet file, from 1.
        values: Column -> text. Empty cells are left out.
    """

    line: int
    values: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table as it was read.

    Attributes:
        name: Of the file, for sentences.
        rows: In their order; at least one.
        ignored: Columns that nobody asked for.
    """

    name: str
    rows: tuple[Row, ...]
    ignored: tuple[str, ...]

    def refusal(self, row: Row, reason: object) -> MrFlowError:
        """A refusal of a row.

        Args:
            row: The row.
            reason: What is wrong with it, a sentence.

        Returns:
            The error, which names the file and the line.
        """
        return MrFlowError(f"line {row.line} of {self.name!r}: {reason}")


def read_table(file: Path | Literal["-"], columns: Collection[str], *, longest: int) -> Table:
    """Read a table of prompts.

    Column names count without case, and with - as with _. A column that nobody asked for is left out, unless its name
    is nearly that of one: then it is taken for a slip and refused.

    Args:
        file: A file whose ending is one of `SUFFIXES`; or "-" for prompts on standard input, one a line.
        columns: The names that are known; "prompt" is one that must be there.
        longest: Most letters of a cell.

    Returns:
        The table.

    Raises:
        MrFlowError: It cannot be read, holds no prompt, or a line is not as it should be.
    """
    name = str(file)
    suffix = ".txt" if file == "-" else Path(file).suffix.lower()
    if suffix not in SUFFIXES:
        raise MrFlowError(f"PROMPTS is {name!r}; give a file that ends in {', '.join(SUFFIXES[:-1])} or .parquet.")
    if suffix == ".parquet":
        found: Iterable[tuple[int, Mapping[str, object]]] = _parquet(Path(file), name)
    else:
        text = _text(file, name)
        found = {".txt": _lines, ".jsonl": _json_lines, ".csv": _csv}[suffix](text, name)
    rows: list[Row] = []
    ignored: dict[str, None] = {}
    meanings: dict[str, str | None] = {}
    for line, cells in found:
        values: dict[str, str] = {}
        for title, cell in cells.items():
            if title not in meanings:
                meanings[title] = _meaning(title, columns, name)
            column = meanings[title]
            if column is None:
                ignored[title] = None
                continue
            value = _cell(cell, column, f"line {line} of {name!r}", longest)
            if value:
                if column in values:
                    raise MrFlowError(f"line {line} of {name!r} has the column {column} twice; leave one out.")
                values[column] = value
        if "prompt" not in values:
            raise MrFlowError(f"line {line} of {name!r} has no prompt; say what the image shows.")
        rows.append(Row(line, values))
    if not rows:
        raise MrFlowError(f"PROMPTS is {name!r}, which holds no prompt; write one a line.")
    return Table(name, tuple(rows), tuple(ignored))


def _meaning(title: str, columns: Collection[str], name: str) -> str | None:
    """The column that a title names; None for one that nobody asked for. Raises MrFlowError for a slip."""
    word = title.strip().lower().replace("-", "_").replace(" ", "_")
    if word in columns:
        return word
    near = difflib.get_close_matches(word, columns, n=1, cutoff=0.8)
    if near:
        raise MrFlowError(f"{name!r} has the column {shown(title)!r}; did you mean {near[0]}? Rename it.")
    return None


def _cell(value: object, column: str, where: str, longest: int) -> str:
    """A cell as text, "" where it is empty. Raises MrFlowError."""
    if isinstance(value, list | tuple):
        parts = [_cell(each, column, where, longest) for each in cast("list[object]", value)]
        return _JOINED.get(column, ",").join(parts)
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # a column of whole numbers with gaps is one of floats in many tools
    if not isinstance(value, str | int | float):
        raise MrFlowError(f"{where} has {column} = {quoted(value)}; give text, a number or a list of them.")
    text = str(value).strip()
    if len(text) > longest:
        raise MrFlowError(f"{where} has a {column} of more than {longest} letters; shorten it.")
    if any((ord(letter) < 32 and letter not in "\t\n\r") or "\ud800" <= letter <= "\udfff" for letter in text):
        raise MrFlowError(f"{where} has control characters in {column}; give text.")
    return text


# --- the formats -------------------------------------------------------------------------------


def _text(file: Path | Literal["-"], name: str) -> str:
    try:
        with _opened(file) as stream:
            data = stream.read(_MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise MrFlowError(f"PROMPTS is {name!r}, which does not exist; check the path.") from error
    except OSError as error:
        raise MrFlowError(f"PROMPTS is {name!r}, which cannot be read ({(error.strerror or '').lower()}).") from error
    if len(data) > _MOST_BYTES:
        raise MrFlowError(f"PROMPTS is {name!r}, which is larger than {_MOST_BYTES >> 30} GiB; split it.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MrFlowError(f"line {line} of {name!r} is not UTF-8; save the file as UTF-8 text.") from None


def _opened(file: Path | Literal["-"]) -> BinaryIO:
    """The file; standard input as a stream of its own, so that to close it changes nothing."""
    return open(os.dup(0), "rb") if file == "-" else open(file, "rb")


def _lines(text: str, _name: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(io.StringIO(text), 1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield number, {"prompt": prompt}


def _json_lines(text: str, name: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        try:
            found: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MrFlowError(f"line {number} of {name!r} is not JSON ({first_line(error)}).") from error
        if isinstance(found, str):
            found = {"prompt": found}
        if not isinstance(found, dict):
            raise MrFlowError(f'line {number} of {name!r} is no object; write {{"prompt": "..."}}.')
        yield number, cast("dict[str, object]", found)


def _csv(text: str, name: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        titles = next(reader, list[str]())
        if "prompt" not in (title.strip().lower() for title in titles):
            raise MrFlowError(f"the first line of {name!r} names no column prompt; write the columns' names there.")
        for cells in reader:
            if len(cells) > len(titles):
                raise MrFlowError(
                    f"line {reader.line_num} of {name!r} has {len(cells)} cells for {len(titles)} columns; put text "
                    "that holds commas in quotation marks."
                )
            if any(cell.strip() for cell in cells):
                yield reader.line_num, dict(zip(titles, cells, strict=False))
    except csv.Error as error:
        raise MrFlowError(f"line {reader.line_num} of {name!r} is not CSV ({first_line(error)}).") from error


def _parquet(file: Path, name: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    if find_spec("pyarrow") is None:
        raise MrFlowError(
            f"PROMPTS is {name!r}, and Parquet needs pyarrow, which is not installed; run pip install "
            "'mrflow-sched[batch]', or give a .jsonl or .csv file."
        )
    import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]

    library: Any = parquet
    if not file.is_file():
        raise MrFlowError(f"PROMPTS is {name!r}, which is not a file; check the path.")
    number = 0
    try:
        with library.ParquetFile(file) as opened:
            for part in opened.iter_batches(batch_size=4096):
                for cells in part.to_pylist():
                    number += 1
                    yield number, cells
    except MrFlowError:
        raise
    except Exception as error:  # whatever its readers raise for a damaged file
        raise MrFlowError(f"PROMPTS is {name!r}, which is no readable Parquet file ({first_line(error)}).") from error
