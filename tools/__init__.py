"""Tools that make the embedded model and its pages: `python -m tools.train`, `python -m tools.figures`."""

from __future__ import annotations

from mrflow_sched._runtime.torchvision_ops import ensure_ops

ensure_ops()  # before anything here imports diffusers, transformers or spandrel
