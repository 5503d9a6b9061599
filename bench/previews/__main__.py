"""Measures drafts and previews on the embedded model; writes a page for each section.

    python -m bench.previews --out bench/results           all sections (hours of one CPU core, most of them for ranks)
    python -m bench.previews previews warps --out DIR      some sections
    python -m bench.previews previews --prompts 4          a few prompts, prints only

A section is a module of this folder with `section(*, prompts, seeds, folder) -> str`. What was made is kept in --folder
at once: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.command import results_folder, run_command


class Section(NamedTuple):
    """A section's title, and how many prompts and seeds it takes."""

    title: str
    prompts: int
    seeds: int


SECTIONS: Mapping[str, Section] = {
    "previews": Section("Previews of native runs", 24, 2),
    "warps": Section("Moved and bent pictures", 4, 2),
    "cost": Section("What a draft costs", 5, 2),
    "composition": Section("The composition lock", 24, 2),
    "ranks": Section("Scores of drafts", 4, 64),
}
"""The modules with sections."""


def known() -> tuple[str, ...]:
    """The sections that are there."""
    return tuple(name for name in SECTIONS if importlib.util.find_spec(f"bench.previews.{name}") is not None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the measurements from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.previews", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(known())} (default all)")
    parser.add_argument("--prompts", type=int, help="how many prompts (default: the section's own number)")
    parser.add_argument("--seeds", type=int, help="seeds of each prompt (default: the section's own number)")
    parser.add_argument("--folder", type=Path, default=Path("runs/previews"), help="keeps what was made")
    parser.add_argument("--out", type=results_folder, help="folder for the pages")
    options = parser.parse_args(arguments)
    unknown = next((name for name in options.sections if name not in known()), None)
    if unknown is not None:
        parser.error(f"{unknown!r} is no section; choose from {', '.join(known())}")
    if any(count is not None and count < 2 for count in (options.prompts, options.seeds)):
        parser.error("--prompts and --seeds must be 2 or more: differences are paired over prompts and seeds")
    for name in options.sections or known():
        usual, run = SECTIONS[name], importlib.import_module(f"bench.previews.{name}").section
        text = run(prompts=options.prompts or usual.prompts, seeds=options.seeds or usual.seeds, folder=options.folder)
        page = f"# {usual.title}\n\n{text.strip()}\n"
        print(page, flush=True)
        if options.out is not None:
            (options.out / f"{name}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
