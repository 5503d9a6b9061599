"""What a draft costs beside the whole run that it begins, and beside native sampling.

python -m bench.previews cost
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.markdown import table
from bench.previews.pictures import scenes
from mrflow_sched import demo, draft, finish, load_upscaler, make_native_plan, make_plan, sample_staged
from mrflow_sched.demo.captions import caption

RUNS: tuple[tuple[str, int, dict[str, Any], int | None], ...] = (
    ("12+1 at 256", 256, {}, None),
    ("12+1 at 256, drafts of 6 steps", 256, {}, 6),
    ("12+1 at 512, from 256", 512, {}, None),
    ("12+1+1 at 512, three stages", 512, {"stages": 3}, None),
)
"""Name, side in pixels, options of the plan, steps of the draft."""


def section(*, prompts: int, seeds: int, folder: Path) -> str:
    """The table: CPU seconds, the median of a few prompts, a warm-up before it."""
    del seeds, folder
    engine, upscaler = demo.load_engine(), load_upscaler(demo.upscaler_path())
    texts = [caption(scene) for scene in scenes(min(prompts, 5))]
    native = {
        side: _median(
            lambda text, side=side: sample_staged(engine, make_native_plan("demo", side, side), text), texts[:2]
        )
        for side in {side for _, side, _, _ in RUNS}
    }
    rows: list[list[str]] = []
    for name, side, options, steps in RUNS:
        plan = make_plan("demo", side, side, **options)
        whole = _median(lambda text, plan=plan: sample_staged(engine, plan, text, upscaler=upscaler), texts)
        drafted = _median(lambda text, plan=plan, steps=steps: draft(engine, plan, text, steps=steps), texts)
        made = draft(engine, plan, texts[0], steps=steps)[0]
        finished = _median(lambda _, made=made: finish(engine, made, upscaler=upscaler), texts)
        share, cost = drafted / whole, plan.stage_costs()[0] / sum(plan.stage_costs())
        row = [f"{drafted:.2f}", f"{finished:.2f}", f"{whole:.2f}", f"{share:.0%}", f"{drafted / native[side]:.0%}"]
        rows.append([name, *row, f"{cost * (1 if steps is None else steps / plan.stages[0].steps):.0%}"])
    heads = [
        "run",
        "draft, CPU s",
        "finish",
        "whole run",
        "draft / whole run",
        "draft / native",
        "of the network's cost",
    ]
    text = (
        "Native is Euler of the family's own step count at the same size. A cheap draft is finished from noise again."
    )
    return f"## What a draft costs\n\n{text}\n\n{table(heads, rows)}"


def _median(make: Callable[[str], object], texts: list[str]) -> float:
    """Median CPU seconds over `texts`, after one that does not count."""
    make(texts[0])
    found: list[float] = []
    for text in texts:
        begin = time.process_time()
        make(text)
        found.append(time.process_time() - begin)
    return statistics.median(found)


if __name__ == "__main__":
    print(section(prompts=5, seeds=2, folder=Path()))
