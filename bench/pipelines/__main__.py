"""What MrFlow makes of every pipeline class of the installed diffusers, in tiny, against the pipelines themselves.

python -m bench.pipelines                all classes; exit code 1 where one fails that docs/pipelines.md does not say
python -m bench.pipelines NAME...        some: names of classes, or of bench.tiny
python -m bench.pipelines --write        all classes, into docs/pipelines.md
python -m bench.pipelines --out FILE     all classes, the same tables into a file
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
import warnings
from collections.abc import Generator, Sequence

from bench.command import results_file, run_command
from bench.pipelines import page
from bench.pipelines.sweep import Swept, share, sweep
from bench.tiny.parts import diffusers


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pipelines", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="classes, or names of bench.tiny; left out, all")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/pipelines.md")
    parser.add_argument("--out", type=results_file, help="write the tables into this file")
    parser.add_argument("--changes", type=results_file, help="write what differs from docs/pipelines.md into this file")
    options = parser.parse_args(arguments)
    if options.names and (options.write or options.out or options.changes):
        parser.error("--write, --out and --changes take all classes; leave the names out")
    found: list[Swept] = []
    with _libraries_silent():
        began = time.monotonic()
        for each in sweep(options.names):
            found.append(each)
            print(line_of(each, time.monotonic() - began), flush=True)
            began = time.monotonic()
    if not found:
        parser.error(f"no class or tiny pipeline is called {', '.join(options.names)}")
    names, running = share(found)
    if names:
        print(
            f"of {len(names)} text-to-image flow classes {len(running)} run ({100 * len(running) / len(names):.1f} %)"
        )
    failed = page.failures(found)
    if options.changes:
        options.changes.write_text(page.changes(found), "utf-8")
    if options.write or options.out:
        text = page.tables(found, diffusers().__version__)
        if options.write:
            page.write(text)
        if options.out:
            options.out.write_text(text + "\n", "utf-8")
    return int(bool(failed))


@contextlib.contextmanager
def _libraries_silent() -> Generator[None, None, None]:
    """No warnings, neither raised nor logged, while a block runs; what was set before holds again after it."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def line_of(each: Swept, seconds: float) -> str:
    """A finding in a line: class, tiny pipeline, outcome, then family, layout and numbers, or the sentence."""
    row = each.row
    numbers = f"{row.sampler:5} {row.picture:.0e} {row.times:.0e} {row.refine:.0e}" if row.sampler else ""
    found = " ".join(part for part in (row.family, row.layout, numbers, row.sentence) if part)
    return f"{row.kind:38} {each.name:24} {row.outcome:12} {seconds:4.1f} s  {found}"


if __name__ == "__main__":
    run_command(main)
