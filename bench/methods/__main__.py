"""Measures sparse methods on the embedded model.

    python -m bench.methods --out bench/results         every part (half an hour on two CPU cores)
    python -m bench.methods --parts sparse --scenes 1   prints only

Writes methods.json and methods.md. Parts: jit, Just-in-Time sampling against plain sampling; sparse, how much of a
refine step is kept by what is refined, with its FLOP over those of a dense one in brackets; precision, how near an
image stays with fewer bits in a stage; turbo, the few-step LoRA, presets and sigmas on the model and on the fine-tunes
in the folder of --finetunes; step, seconds of a network call with the proportions of FLUX.1. All but the last have a
row known to be bad.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.command import results_folder, run_command, to_json
from bench.methods import jit, precision, sparse, step, turbo
from bench.quality.kinds import FIRST_SEED, all_scenes
from bench.quality.ways import AUTHORS_SIGMA
from mrflow_sched import demo, load_upscaler, make_plan

PARTS = ("jit", "sparse", "precision", "turbo", "step")
SIZE = 256


def measure(parts: Sequence[str], count: int, finetunes: Path | None = None) -> dict[str, Any]:
    """The rows of each part."""
    engine, upscaler = demo.load_engine(), load_upscaler(demo.upscaler_path())
    scenes = all_scenes(count)
    own_sigma = make_plan(engine.family, SIZE, SIZE).stages[-1].sigmas[0]
    rows: dict[str, Any] = {}
    if "jit" in parts:
        rows["jit"] = jit.measure(engine, scenes, FIRST_SEED, SIZE)
    if "sparse" in parts:
        rows["sparse"] = sparse.measure(engine, upscaler, scenes, FIRST_SEED, SIZE, (AUTHORS_SIGMA, own_sigma))
    if "precision" in parts:
        rows["precision"] = precision.measure(engine, upscaler, scenes, FIRST_SEED, SIZE)
    if "turbo" in parts:
        rows["turbo"] = turbo.measure(count, FIRST_SEED, SIZE, finetunes)
    if "step" in parts:
        rows["step"] = step.measure()
    return rows


def report(rows: dict[str, Any]) -> str:
    """The tables."""
    kinds: dict[str, Any] = {"jit": jit, "sparse": sparse, "precision": precision, "turbo": turbo, "step": step}
    return "\n\n".join(f"## {name}\n\n{kinds[name].report(each)}" for name, each in rows.items()) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.methods", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--scenes", type=int, default=4, help="of each category, and as many with fine detail")
    parser.add_argument("--finetunes", type=Path, metavar="FOLDER", help="LoRAs of tools.train_demo.finetune")
    parser.add_argument("--out", type=results_folder, help="folder for methods.json and methods.md")
    asked = parser.parse_args(words)
    rows = measure(asked.parts, asked.scenes, asked.finetunes)
    text = report(rows)
    if asked.out is not None:
        (asked.out / "methods.json").write_text(to_json({"scenes": asked.scenes, "rows": rows}))
        (asked.out / "methods.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_command(main)
