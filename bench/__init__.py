"""Benchmarks: every module is a command (`python -m bench.speed`), run from the repository's folder."""

from __future__ import annotations

from mrflow_sched._runtime.torchvision_ops import ensure_ops

ensure_ops()  # before anything here imports diffusers, transformers or spandrel
