"""Kills workers and the driver of `mrflow batch` at random moments, and measures its throughput and its memory.

    python -m bench.batch --out bench/results              all parts (half an hour on two CPU cores)
    python -m bench.batch --parts kills --items 20 --size 32x32
    python -m bench.batch --python RAYENV/bin/python --parts ray    the kills with two actors of a Ray of this machine

Writes batch.json and batch.md; exit code 1 where an image is missing, made twice, not that of one process, or where the
manifest is not true. Runs the embedded model with one thread for each worker. Needs Linux or macOS.

kills    images by two processes, SIGKILL to a worker at random moments and to the driver twice, which is started again
ray      the same with two actors of Ray
speed    images a minute, first to last file, of two processes over one, in turns, so that other load meets both
memory   resident bytes of driver and worker over many small images: the mean of the last tenth over that of the second
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.command import results_folder, run_command
from bench.markdown import table

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("kills", "ray", "speed", "memory")
_WORDS = ("red", "blue", "green", "yellow", "purple", "orange")
_THINGS = ("circle", "star", "square", "triangle")
_LONGEST = 3600.0


@dataclass(frozen=True)
class Setting:
    """What all parts share.

    Attributes:
        python: The interpreter that runs the commands.
        folder: Where everything is written.
        size: Of the images, WIDTHxHEIGHT.
        steps: Of stage 1.
        items: Images of the kills and of each speed run.
        kills: Workers that are killed.
        drivers: Times that the driver is killed.
        many: Images of the memory part.
        seed: Of the random moments.
    """

    python: str
    folder: Path
    size: str
    steps: int
    items: int
    kills: int
    drivers: int
    many: int
    seed: int

    def prompts(self, count: int) -> Path:
        """A table of as many different images.

        Args:
            count: How many.

        Returns:
            Its file.
        """
        path = self.folder / f"prompts-{count}.jsonl"
        kinds = [f"a {colour} {thing}" for colour in _WORDS for thing in _THINGS]
        rows = [{"prompt": kinds[number % len(kinds)], "seed": number} for number in range(count)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path

    def start(self, count: int, out: str, *more: str) -> subprocess.Popen[bytes]:
        """Start `mrflow batch`.

        Args:
            count: Images.
            out: Name of the folder.
            *more: Further options.

        Returns:
            The process.
        """
        command = [
            self.python,
            "-m",
            "mrflow_sched",
            "batch",
            str(self.prompts(count)),
            "--out",
            str(self.folder / out),
        ]
        plan = ["--size", self.size, "--low-steps", str(self.steps), "--refine-steps", "1"]
        machine = ["--device", "cpu", "--dtype", "float32", "--threads", "1"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, *plan, *machine, *more], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )


def run(setting: Setting, count: int, out: str, *more: str) -> None:
    """Run `mrflow batch` to its end.

    Args:
        setting: The setting.
        count: Images.
        out: Name of the folder.
        *more: Further options.

    Raises:
        RuntimeError: It failed.
    """
    process = setting.start(count, out, *more)
    _, said = process.communicate(timeout=_LONGEST)
    if process.returncode:
        raise RuntimeError(f"mrflow batch ended with {process.returncode}: {said.decode('utf-8', 'replace')[-2000:]}")


# --- kills -------------------------------------------------------------------------------------


def kills(setting: Setting, out: str, *more: str) -> dict[str, Any]:
    """Kill workers and the driver, start again, and look at what is left.

    Args:
        setting: The setting.
        out: Name of the folder.
        *more: Options that choose the workers.

    Returns:
        What happened, and what is wrong.
    """
    draw = random.Random(setting.seed)
    run(setting, setting.items, "alone")
    # Each kill waits for a share of the images, so that they spread over the run, and for a random moment after it.
    marks = sorted(draw.uniform(0, 0.95) * setting.items for _ in range(setting.kills))
    ends = [(number + 1) / (setting.drivers + 1) * setting.items for number in range(setting.drivers)]
    folder, began = setting.folder / out, time.monotonic()
    killed, runs, half = 0, 0, 0
    while True:
        process = setting.start(setting.items, out, *more)
        runs += 1
        while process.poll() is None and time.monotonic() - began < _LONGEST:
            time.sleep(draw.uniform(0.01, 0.3))
            made = len(list(folder.glob("*.png"))) if folder.exists() else 0
            half += _half_written(folder)
            if ends and made >= ends[0]:
                ends.pop(0)
                process.kill()
            elif marks and made >= marks[0] and (workers := _workers(process.pid)):
                marks.pop(0)
                draw.choice(workers).send_signal(signal.SIGKILL)
                killed += 1
        process.communicate()
        if process.returncode == 0 or runs > setting.drivers + 3:
            break
    found = check(folder, setting.folder / "alone", setting.items)
    return {**found, "killed": killed, "runs": runs, "half": half, "seconds": round(time.monotonic() - began, 1)}


def _half_written(folder: Path) -> int:
    """Files under a final name that are no whole PNG at this moment."""
    return sum(not path.read_bytes().endswith(b"IEND\xaeB`\x82") for path in folder.glob("*.png"))


def _workers(driver: int) -> list[psutil.Process]:
    try:
        return [each for each in psutil.Process(driver).children(recursive=True) if _is_worker(each)]
    except psutil.Error:
        return []


def _is_worker(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "multiprocessing.spawn" in words or "_Actor" in words


def check(folder: Path, alone: Path, count: int) -> dict[str, Any]:
    """Compare a folder with that of one process, and with its manifest.

    Args:
        folder: Of the run that was killed.
        alone: Of one process.
        count: Images that should be there.

    Returns:
        "files", and the counts "missing", "different", "twice", "unlisted", "untrue".
    """
    files = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    single = {path.name: path.read_bytes() for path in alone.glob("*.png")}
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    done = [line for line in lines if line["status"] == "done"]
    true = {line["file"]: line["sha256"] for line in done}
    return {
        "files": len(files),
        "missing": count - len(set(files) & set(single)),
        "different": sum(files[name] != single[name] for name in set(files) & set(single)),
        "twice": len(set(files) - set(single)) + len(done) - len(true),
        "unlisted": len(set(files) - set(true)),
        "untrue": sum(true[name] != hashlib.sha256(files.get(name, b"")).hexdigest() for name in true),
        "tries": max((int(line.get("tries") or 1) for line in done), default=0),
    }


# --- speed and memory --------------------------------------------------------------------------


def speed(setting: Setting, turns: int = 2) -> dict[str, Any]:
    """Images a minute of one process and of two.

    Args:
        setting: The setting.
        turns: Runs of each.

    Returns:
        Both, and their ratio.
    """
    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(turns):
        for count in (1, 2):
            out = f"speed-{count}-{turn}"
            run(setting, setting.items, out, "--workers", str(count))
            times = sorted(path.stat().st_mtime for path in (setting.folder / out).glob("*.png"))
            rates[count].append((len(times) - 1) / (times[-1] - times[0]) * 60)
    one, two = statistics.median(rates[1]), statistics.median(rates[2])
    return {"one": round(one, 1), "two": round(two, 1), "ratio": round(two / one, 2)}


def memory(setting: Setting) -> dict[str, Any]:
    """Resident bytes of driver and worker over many small images.

    Args:
        setting: The setting.

    Returns:
        MB in the second tenth and in the last, and their ratio.
    """
    process = setting.start(setting.many, "memory", "--workers", "1")
    folder = setting.folder / "memory"
    samples: list[tuple[int, float]] = []
    while process.poll() is None:
        made = len(list(folder.glob("*.png"))) if folder.exists() else 0
        if made:
            samples.append((made, _resident(process.pid)))
        time.sleep(0.25)
    process.communicate()
    early = [size for made, size in samples if 0.1 <= made / setting.many < 0.2 and size]
    late = [size for made, size in samples if 0.9 <= made / setting.many < 1.0 and size]
    if process.returncode or not (early and late):
        return {"images": setting.many, "early_mb": 0.0, "late_mb": 0.0, "ratio": 0.0}
    before, after = statistics.fmean(early), statistics.fmean(late)
    return {
        "images": setting.many,
        "early_mb": round(before / 1e6, 1),
        "late_mb": round(after / 1e6, 1),
        "ratio": round(after / before, 3),
    }


def _resident(driver: int) -> float:
    try:
        own = psutil.Process(driver)
        return float(sum(each.memory_info().rss for each in (own, *own.children(recursive=True))))
    except psutil.Error:
        return 0.0


# --- the report --------------------------------------------------------------------------------


def is_right(found: Mapping[str, Any]) -> bool:
    """Whether nothing is wrong.

    Args:
        found: What the parts gave, by name.

    Returns:
        False where an image is missing, half, different or made twice, or the manifest is not true.
    """
    bad = ("missing", "different", "twice", "unlisted", "untrue", "half")
    return not any(part.get(name) for part in found.values() for name in bad)


def page(found: Mapping[str, Any]) -> str:
    """The tables.

    Args:
        found: What the parts gave, by name.

    Returns:
        Markdown.
    """
    parts: list[str] = []
    rows = [(name, found[name]) for name in ("kills", "ray") if name in found]
    if rows:
        head = ("images", "workers killed", "drivers killed", "missing", "half", "different", "twice", "untrue lines")
        cells = [
            [
                "two processes" if name == "kills" else "two actors of Ray",
                *(each[key] for key in ("files", "killed")),
                each["runs"] - 1,
                *(each[key] for key in ("missing", "half", "different", "twice")),
                each["untrue"] + each["unlisted"],
            ]
            for name, each in rows
        ]
        parts.append(table(("workers", *head), cells))
    if "speed" in found:
        each = found["speed"]
        parts.append(
            table(
                ("images a minute", ""), [("one process", each["one"]), ("two", each["two"]), ("ratio", each["ratio"])]
            )
        )
    if "memory" in found:
        each = found["memory"]
        titles = (f"resident memory over {each['images']} images", "MB")
        parts.append(table(titles, [("second tenth", each["early_mb"]), ("last tenth", each["late_mb"])]))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts.

    Args:
        arguments: Of the command line; None takes those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.batch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["kills", "speed", "memory"])
    parser.add_argument(
        "--items", type=int, default=200, help="images of the kills and of each speed run (default 200)"
    )
    parser.add_argument("--kills", type=int, default=20, help="workers that are killed (default 20)")
    parser.add_argument("--drivers", type=int, default=2, help="times that the driver is killed (default 2)")
    parser.add_argument("--many", type=int, default=1000, help="images of the memory part (default 1000)")
    parser.add_argument("--size", default="128x128", help="of the images (default 128x128)")
    parser.add_argument("--steps", type=int, default=12, help="of stage 1 (default 12)")
    parser.add_argument("--seed", type=int, default=24, help="of the random moments (default 24)")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs the commands")
    parser.add_argument(
        "--out", type=results_folder, help="folder for batch.json and batch.md, to which the parts are added"
    )
    options = parser.parse_args(arguments)
    file = None if options.out is None else options.out / "batch.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file is not None and file.is_file() else {}
    for part in options.parts:
        with tempfile.TemporaryDirectory(prefix="batch-") as folder:
            setting = Setting(
                options.python,
                Path(folder),
                options.size,
                options.steps,
                options.items,
                options.kills,
                options.drivers,
                options.many,
                options.seed,
            )
            if part in ("kills", "ray"):
                found[part] = kills(setting, "out", *(("--ray", "local") if part == "ray" else ()), "--workers", "2")
            else:
                found[part] = speed(setting) if part == "speed" else memory(setting)
            found[part]["size"] = options.size
        print(f"{part}: {found[part]}", file=sys.stderr, flush=True)
        if file is not None:
            file.write_text(json.dumps(found, indent=2) + "\n")
            file.with_suffix(".md").write_text(page(found))
    print(page(found))
    return 0 if is_right(found) else 1


if __name__ == "__main__":
    run_command(main)
