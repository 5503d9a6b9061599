"""Tries hostile files, faults, signals, parallel runs and wild input, and counts what goes wrong.

    python -m bench.reliability                           everything; exit code 1 where anything is wrong
    python -m bench.reliability --quick upscalers         fewer cases, of one group
    python -m bench.reliability --out bench/results --label now --page docs/reliability.md
    python -m bench.reliability --checkout OLD --label before --out bench/results
    python -m bench.reliability --python OLDEST/bin/python folders

Every hostile input is made by the bench itself. Every case runs in a process of its own, whose memory and CPU time are
watched. Needs Linux or macOS.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.command import results_file, results_folder, run_command
from bench.reliability import faults, folders, fuzz, images, parallel, report, signals, upscalers
from bench.reliability.runner import ROOT, Bench

GROUPS = {
    "upscalers": upscalers,
    "folders": folders,
    "images": images,
    "faults": faults,
    "parallel": parallel,
    "signals": signals,
    "fuzz": fuzz,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"{', '.join(GROUPS)}; left out, all")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--seed", type=int, default=16, help="seed of everything that is drawn (default 16)")
    parser.add_argument("--python", default=sys.executable, help="interpreter under which the package is tried")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="folder whose mrflow_sched is tried")
    parser.add_argument("--label", default="now", help="name of the column (default now)")
    parser.add_argument("--out", type=results_folder, help="folder for reliability.json, to which the column is added")
    parser.add_argument("--page", type=results_file, help="page between whose marks the table of --out is written")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.groups) - set(GROUPS)):
        parser.error(f"unknown group {unknown[0]!r}; there are {', '.join(GROUPS)}")
    if options.page and not options.out:
        parser.error("--page takes its table from --out; name that folder too")
    if not (options.checkout / "mrflow_sched" / "__init__.py").is_file():
        parser.error(f"--checkout {str(options.checkout)!r} holds no mrflow_sched")
    print(f"seed {options.seed}", file=sys.stderr)
    column: report.Column = {}
    for name in options.groups or GROUPS:
        group, began = GROUPS[name], time.monotonic()
        with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
            bench = Bench(Path(folder), options.python, options.checkout, options.seed, quick=options.quick)
            try:
                tally = group.run(bench)
            finally:
                bench.close()
        other = "" if options.python == sys.executable else f", diffusers {bench.versions['diffusers']}"
        title = group.TITLE + other
        column[title] = report.entry(tally, options.seed, bench.versions, quick=options.quick)
        print(f"{title}: {tally.tried} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        columns = {options.label: column}
        if options.out:
            columns = report.add(options.out / "reliability.json", options.label, column)
        if options.page:
            report.write_page(options.page, report.table_of(columns))
    print(report.table_of({options.label: column}))
    return 0 if all(each["checked"] and not each["wrong"] for each in column.values()) else 1


if __name__ == "__main__":
    run_command(main)
