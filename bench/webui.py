"""Measures seconds on a real WebUI: native 20 steps, MrFlow 12+1, its draft, Hires. fix, and what each refines from.

    MRFLOW_WEBUI_ROOT=/path/to/webui MRFLOW_WEBUI_CHECKPOINT=name python -m bench.webui --size 768 --repeats 3

The host is started headless with its own Python, as tests/webui/live.py describes, with the options in
MRFLOW_WEBUI_ARGS. Each job runs once to warm up. Prints a line of JSON per job, with the seconds of the API call: the
median, and every run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tests.webui.live import Host, find_installation

FINISHED = "that draft finished"


def jobs(size: int, flux: bool) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """The extension's arguments and the host's fields of every job; `flux` adds what Forge needs for Flux jobs."""
    base: dict[str, Any] = {"width": size, "height": size, "steps": 20, "scheduler": "Simple", "sampler_name": "Euler"}
    if flux:
        base |= {"distilled_cfg_scale": 3.5, "hr_additional_modules": ["Use same choices"]}
    half = {**base, "width": size // 2, "height": size // 2, "steps": 12}
    hires = {**half, "enable_hr": True, "hr_scale": 2, "hr_upscaler": "Lanczos", "denoising_strength": 0.12}
    staged = [True, "12+1", 2.0, 0, 0, 0.0, "resolution-aware", "host sampler"]
    return {
        "native 20": ([False], base),
        "MrFlow 12+1, Lanczos": ([*staged, "Lanczos"], base),
        "MrFlow 12+1, x2 model": ([*staged, "automatic"], base),
        "draft of it": ([{"preset": "12+1", "draft": True}], base),
        FINISHED: ([], base),
        "built-in hires, 12+1 steps, 0.12": ([False], {**hires, "hr_second_pass_steps": 1}),
        "built-in hires, 12+12 steps, 0.12": ([False], {**hires, "hr_second_pass_steps": 0}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--flux", action="store_true", help="the checkpoint is a Flux model on Forge")
    options = parser.parse_args()
    found, why = find_installation(os.environ)
    if found is None:
        parser.error(why)
    host = Host(found, Path(tempfile.mkdtemp()))
    native, draft = 0.0, ""
    try:
        host.start()
        for name, (arguments, fields) in jobs(options.size, options.flux).items():
            if name == FINISHED:
                arguments = [{"finish": draft}]
            host.txt2img(arguments, **fields)
            runs = [host.txt2img(arguments, **fields) for _ in range(options.repeats)]
            seconds = [run.seconds for run in runs]
            middle = statistics.median(seconds)
            native = native or middle
            last = runs[-1]
            draft = last.encoded(0)
            row = {
                "job": name,
                "seconds": round(middle, 2),
                "all": [round(value, 2) for value in seconds],
                "native / this": round(native / middle, 2),
                "forwards": [len(last.forwards(hires=False)), len(last.forwards(hires=True))],
                "first sigma of the second pass": (last.sigmas(hires=True) or [None])[0],
                "size": last.images[0].size,
            }
            print(json.dumps(row), flush=True)
    finally:
        host.stop()


if __name__ == "__main__":
    main()
