"""Step caching of diffusers: where the first block changes little from step to step, the other blocks are skipped."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers

from bench.quality.ways import FAMILY, Way, planned
from mrflow_sched import demo, make_plan
from mrflow_sched.engines.diffusers.pipeline import PipelineEngine


@cache
def _engine(threshold: float) -> PipelineEngine:
    engine = demo.load_engine()
    if threshold:
        engine.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
    return engine


def cached(size: int, threshold: float, low_steps: int = 12) -> Way:
    """The staged way with first-block caching from `threshold` (0: none).

    Its cost counts all forwards; the skipped blocks show in the seconds only.
    """

    def around(_engine_of_model: Any) -> PipelineEngine:
        return _engine(threshold)

    plan = make_plan(FAMILY, size, size, low_steps=low_steps, refine_steps=1)
    return planned(f"threshold {threshold:g}, {low_steps}+1", "cached", plan, around=around)
