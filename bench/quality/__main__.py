"""Measures what staged sampling costs in quality, on the embedded model, whose scenes are known exactly.

    python -m bench.quality --out DIR                   the ways at equal cost
    python -m bench.quality --sweep sigma --out DIR     one option at a time; `--sweep all` for all sweeps
    python -m bench.quality --sweep upscalers --out DIR refine steps and sigma for every upscaler
    python -m bench.quality --kinds --out DIR           which kinds of picture staged sampling loses, and what helps
    python -m bench.quality --ideas --out DIR           ideas that may beat staged 12+1
    python -m bench.quality --quick                     a few scenes, prints only

Writes quality.json, .md, .png, -pictures.png and -worst.png (or sweep-NAME.*, kinds.*, ideas.*). Scenes, seeds and
resamples are fixed, and no part of the model was trained on the scenes.

run.py           the order of it all
kinds.py         the scenes
scores.py        the composite, and all that is measured of a set of pictures
full_size.py     statistics at full size, paired scene by scene
two_sample.py    whether two sets can be told apart
patch_judge.py   a judge of wear at full size
known.py         what must come out as known; where it does not, nothing is ranked
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.command import INTERRUPTED, results_folder, run_command, side, to_json
from bench.quality import by_kind, by_upscaler, foreign, ideas, report, sweeps, ways
from bench.quality.kinds import FIRST_SEED, all_scenes, next_scenes, rendered, scenes_of
from bench.quality.run import compared_scenes, measure, setting
from mrflow_sched.demo.captions import caption

__all__ = ["FIRST_SEED", "main", "measure", "rendered", "scenes_of"]

OURS = report.OURS
SWEPT = "sweep one option instead of the comparison; upscalers: the refine stage for every upscaler, not in all"


def sweep_upscalers(size: int, each: int, count: int, names: Sequence[str], out: Path | None, *, quick: bool) -> None:
    """The refine stage swept for the upscalers of `names`; written as far as it is after each of them, beside what the
    file holds of others."""
    here = setting(size, each)

    def keep(record: dict[str, Any]) -> None:
        if out is not None:
            (out / "sweep-upscalers.json").write_text(to_json(record))
            (out / "sweep-upscalers.md").write_text(by_upscaler.to_markdown(record) + "\n")

    prompts = [caption(scene) for scene in next_scenes(each)]
    file = None if out is None else out / "sweep-upscalers.json"
    earlier = json.loads(file.read_text()) if file is not None and file.is_file() else None
    more: dict[str, Any] = {"recommended": by_upscaler.Calibrated(here.model, prompts), "earlier": earlier}
    if quick:
        more |= {"recommended": None, "grid": by_upscaler.GRID[:3], "varied": by_upscaler.VARIED[:1]}
    record = by_upscaler.measure(here.model, compared_scenes(here, count), names=names, tell=_say, keep=keep, **more)
    keep(record)
    print(by_upscaler.to_markdown(record), flush=True)


def kinds_of_picture(size: int, each: int, count: int, names: Sequence[str], out: Path | None, *, quick: bool) -> None:
    """What is lost and what helps by kind of picture, with the upscalers of `names`."""
    here = setting(size, each)
    shorter: dict[str, Any] = {"settings": by_kind.SETTINGS[:2], "natives": [ways.native(size, 2)]} if quick else {}
    record, pictures = by_kind.measure(here, count, names=names, tell=_say, **shorter)
    print(by_kind.to_markdown(record), flush=True)
    if out is not None:
        (out / "kinds.json").write_text(to_json(record))
        by_kind.write(record, pictures, here.truth, out)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=side, default=256, help="final side in pixels (default 256)")
    parser.add_argument(
        "--scenes", type=int, default=24, help="scenes per category, and as many with fine detail (default 24)"
    )
    parser.add_argument("--resamples", type=int, default=200, help="bootstrap samples (default 200)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--sweep", choices=[*sweeps.SWEEPS, "upscalers", "all"], help=SWEPT)
    what.add_argument("--kinds", action="store_true", help="by kind of picture: what is lost, and what helps")
    what.add_argument("--ideas", action="store_true", help="compare ideas with staged 12+1")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these ways (or upscalers); * matches any text")
    parser.add_argument("--quick", action="store_true", help="a scene per category and two ways")
    parser.add_argument("--out", type=results_folder, help="folder for the results")
    options = parser.parse_args(arguments)
    for name, least in (("scenes", 1), ("resamples", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(options, name)}.")
    of_upscalers = options.sweep == "upscalers" or options.kinds
    if options.only and not of_upscalers and (options.sweep or options.ideas or options.quick):
        parser.error(
            "--only chooses ways of the comparison, or upscalers of --kinds and --sweep upscalers; leave it out here."
        )
    if options.out is not None and find_spec("matplotlib") is None:
        parser.error(
            "--out draws plots with matplotlib, which is not installed; leave out --out, or install it with "
            "`pip install 'mrflow-sched[dev]'`."
        )
    each, count = (1, 20) if options.quick else (options.scenes, options.resamples)
    if of_upscalers:
        known = by_kind.UPSCALERS if options.kinds else ways.UPSCALERS
        wanted = options.only or ["*"]
        names = [name for name in known if any(fnmatch(name, pattern) for pattern in wanted)]
        if not names:
            parser.error(f"--only {wanted[0]!r} is no upscaler; choose from {'; '.join(known)}")
        run = kinds_of_picture if options.kinds else sweep_upscalers
        run(options.size, each, count, names, options.out, quick=options.quick)
        return 0
    base = "native 8 multistep" if options.quick else "native 50"
    jobs: dict[str, list[ways.Way]] = {}
    if options.ideas:
        # What helps an upscaler that was trained on this world may help nobody else.
        upscaler = "compact x4" if "compact x4" in foreign.installed() else "SR"
        _say(f"every idea with the upscaler {upscaler}")
        jobs["ideas"] = ideas.compared(options.size, upscaler)[: 4 if options.quick else None]
        base = "staged 12+1"
    elif options.sweep is None:
        every = ways.equal_cost(options.size)
        if options.only:
            unknown = [name for name in options.only if not any(fnmatch(way.name, name) for way in every)]
            if unknown:
                parser.error(f"--only {unknown[0]!r} is no way; choose from {'; '.join(way.name for way in every)}")
            every = [way for way in every if any(fnmatch(way.name, name) for name in (OURS, *options.only))]
            base = base if base in [way.name for way in every] else OURS
        jobs["quality"] = (
            [ways.native(options.size, 8, "multistep"), ways.staged(options.size)] if options.quick else every
        )
    else:
        names = list(sweeps.SWEEPS) if options.sweep == "all" else [options.sweep]
        base = "staged 12+1"
        for name in names:
            swept = sweeps.SWEEPS[name].ways(options.size)
            jobs[f"sweep-{name}"] = [ways.staged(options.size), *(swept[:2] if options.quick else swept)]
    stopped = False
    swept_records: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, chosen in jobs.items():
        record, pictures = measure(
            chosen,
            base,
            size=options.size,
            each=each,
            count=count,
            tell=_say,
        )
        print(report.to_markdown(record), flush=True)
        if options.sweep == "all":
            short = name.removeprefix("sweep-")
            swept_records[short] = (sweeps.SWEEPS[short].question, record)
        if options.out is not None:
            (options.out / f"{name}.json").write_text(to_json(record))
            (options.out / f"{name}.md").write_text(report.to_markdown(record) + "\n")
            report.plot(record, options.out / f"{name}.png", sweep=options.sweep is not None)
            report.sheet(record, pictures, all_scenes(each), options.out / f"{name}-pictures.png")
            if "worst" in record and name == "quality":
                report.worst_sheet(record, pictures, options.out / f"{name}-worst.png")
        stopped = bool(record["not measured"])
        if stopped:
            break
    if swept_records and options.out is not None:
        report.sweeps_plot(swept_records, options.out / "sweeps.png")
    return INTERRUPTED if stopped else 0


if __name__ == "__main__":
    run_command(main)
